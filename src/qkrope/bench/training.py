"""Forward and backward of a call, weights included, beside what people train with.

``python -m qkrope.bench.training`` prints microseconds per step: qkrope, the unfused operations in
eager mode and under torch.compile, and Liger's RMS norm and rotation where it can be imported or
``--peers`` has it (see tools/fetch_peers.py). On a GPU a step is a replay of its CUDA graph, on
buffers that do not fit in a cache; exit status 1 if a bar is missed there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qkrope

from ..spec import Rope, Spec
from . import baselines, peers, timing
from .data import Inputs, fp32_cos_sin
from .gradients import Rows, make_rows
from .machine import environment
from .runner import COLD_BYTES, reason
from .shapes import Shape

__all__ = ["BARS", "BUILDS", "Step", "measure", "steps"]

Forward = Callable[[], Any]  # q and k of the result
BARS = {"compile": 3.0, "liger": 1.0}  # their time over ours, at least
SHAPE = Shape("Qwen3-8B", Spec(32, 8, 128, rope=Rope(theta=1e6)))


@dataclass(frozen=True)
class Step:
    """The leaves of a step, and the gradients of its results."""

    inputs: Inputs
    leaves: tuple[Tensor, ...]  # q, k and the weights
    grads: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, rows: Rows) -> Step:
        """A step on the memory of a backward's buffers."""
        q, k = (x.detach().requires_grad_() for x in rows.sides(rows.x))
        assert rows.q_weight is not None and rows.k_weight is not None
        q_weight, k_weight = (
            w.detach().clone().requires_grad_() for w in (rows.q_weight, rows.k_weight)
        )
        # Nothing is packed here: qkv stands for the dtype and the device.
        inputs = Inputs(rows.shape, rows.x, q, k, q_weight, k_weight, rows.positions)
        return cls(inputs, (q, k, q_weight, k_weight), rows.sides(rows.dy))

    def run(self, forward: Forward) -> tuple[Tensor, ...]:
        """The gradients of the leaves."""
        return torch.autograd.grad(forward(), self.leaves, self.grads)


def _ours(given: Sequence[Step]) -> list[Forward]:
    def bind(i: Inputs) -> Forward:
        args = (i.q, i.k, i.q_weight, i.k_weight, i.positions, i.shape.spec)
        return lambda: qkrope.qk_norm_rope(*args)

    return [bind(step.inputs) for step in given]


def _unfused(compile: bool) -> Callable[[Sequence[Step]], list[Forward]]:
    def build(given: Sequence[Step]) -> list[Forward]:
        chain, (*_, cos, sin) = baselines._chain(given[0].inputs)
        if compile:
            chain = torch.compile(chain, dynamic=False, fullgraph=True)

        def bind(i: Inputs) -> Forward:
            return lambda: chain(i.q, i.k, i.q_weight, i.k_weight, cos, sin)

        return [bind(step.inputs) for step in given]

    return build


def _liger(folder: Path | None) -> Callable[[Sequence[Step]], list[Forward]]:
    def build(given: Sequence[Step]) -> list[Forward]:
        (peer,) = (p for p in peers.PEERS if p.name == "liger")
        op, first = peer.find(folder), given[0].inputs
        if why := peer.refusal(first):
            raise baselines.Unmeasured(why)
        tables = fp32_cos_sin(first.shape.spec, first.positions)
        cos, sin = (torch.cat((t, t), -1).to(first.q.dtype)[None] for t in tables)
        norm = first.shape.spec.q_norm
        inputs = [step.inputs for step in given]
        return [op(i.q, i.k, i.q_weight, i.k_weight, cos, sin, norm) for i in inputs]

    return build


def builds(folder: Path | None = None) -> dict[str, Callable[[Sequence[Step]], list[Forward]]]:
    """Forwards by name, one for each step."""
    return {
        "qkrope": _ours,
        "eager": _unfused(compile=False),
        "compile": _unfused(compile=True),
        "liger": _liger(folder),
    }


BUILDS = builds()


def steps(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Step]:
    """A rotation of steps: 300 MB of x, dy and dx on a GPU, two on a CPU."""
    moved = shape.bytes_moved(tokens, torch.empty((), dtype=dtype).element_size()) * 3 / 2
    count = max(2, math.ceil(COLD_BYTES / moved)) if device.type == "cuda" else 2
    return [Step.of(rows) for rows in make_rows(shape, tokens, dtype, device, count)]


def measure(
    given: Sequence[Step], rounds: int = 7, folder: Path | None = None
) -> dict[str, float | str]:
    """Median microseconds of each by name, or why there are none."""
    measures, found = {}, dict[str, float | str]()
    baselines.forget_compiled(BUILDS)
    for name, build in builds(folder).items():
        try:
            forwards = build(given)
            calls = [
                lambda step=step, forward=forward: step.run(forward)
                for step, forward in zip(given, forwards, strict=True)
            ]
            if given[0].inputs.q.is_cuda:
                calls[0]()  # compiles, outside the capture
                measures[name] = timing.graph_measure(calls, timing.launches_for(len(calls), 100.0))
            else:
                measures[name] = timing.host_measure(calls[0])
        except Exception as error:
            found[name] = reason(error)
    samples = timing.interleaved(measures, rounds=rounds, budget_s=5.0)
    return found | {name: sample.median for name, sample in samples.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every bar that was measured is met, or on a CPU."""
    parser = argparse.ArgumentParser(prog="python -m qkrope.bench.training", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", help="by default 4096 16384, CPU: 512")
    parser.add_argument("--peers", type=Path, help="the folder of tools/fetch_peers.py")
    parser.add_argument("--out", type=Path, help="append one JSON line a case")
    options = parser.parse_args(argv)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    missed = 0
    for tokens in options.tokens or ([4096, 16384] if device.type == "cuda" else [512]):
        found = measure(steps(SHAPE, tokens, dtype, device), folder=options.peers)
        ours = found["qkrope"]
        for name, us in found.items():
            if isinstance(us, str) or isinstance(ours, str):
                print(f"{tokens:6d} {name:10s} {us}", flush=True)
                continue
            bar, times = BARS.get(name), us / ours
            bad = bar is not None and device.type == "cuda" and times < bar
            missed += bad
            verdict = f"bar {bar} {'MISSED' if bad else ''}" if bar else ""
            print(
                f"{tokens:6d} {name:10s} {us:10.1f} us  {times:5.2f} times ours  {verdict}".rstrip()
            )
        if options.out:
            case = {"tokens": tokens, "dtype": options.dtype, "us": found}
            with options.out.open("a") as file:
                file.write(json.dumps({**environment(device), "case": SHAPE.heads, **case}) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
