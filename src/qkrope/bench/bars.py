"""The bars of the CUDA kernel: time over that of a plain sweep of the same bytes, case by case.

``python -m qkrope.bench.bars`` prints the table and exits 1 if a bar is missed; ``--grid`` tries
every number of rows and warps instead, which is what the constants of the grid rules come from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import _native
from ..spec import Norm, Rope, Spec
from . import gradients, timing
from .data import Inputs, another_buffer, make_inputs, stationary
from .machine import environment
from .runner import COLD_BYTES, call
from .shapes import Shape
from .sweep import device_sweep_measure

TOLERANCE = 0.01  # a bar is met when the median ratio is within this of it


@dataclass(frozen=True)
class Bar:
    """One case and the ratio to the sweep that it must not exceed (None: only reported)."""

    name: str
    heads: tuple[int, int, int]
    head_dim: int
    tokens: int
    cache: str
    ratio: float | None
    rotary: int | None = None
    pairing: str = "half"
    dtype: str = "bfloat16"
    norm: Norm = Norm()
    backward: str = ""  # "x": gradients of q and k; "weights": of the weights too

    @property
    def shape(self) -> Shape:
        """The case as a bench shape."""
        q, k, v = self.heads
        rope = Rope(dim=self.rotary, theta=1e6, pairing=self.pairing)
        return Shape(self.name, Spec(q, k, self.head_dim, norm=self.norm, rope=rope), v)


_QWEN = (32, 8, 8)
_ROW = Norm(scope="row")
BARS: tuple[Bar, ...] = (
    Bar("1 token", _QWEN, 128, 1, "hot", 1.17),
    Bar("64 hot", _QWEN, 128, 64, "hot", 1.18),
    Bar("256 hot", _QWEN, 128, 256, "hot", 1.16),
    Bar("1024 cold", _QWEN, 128, 1024, "cold", 1.05),
    Bar("1024 hot", _QWEN, 128, 1024, "hot", 1.12),
    Bar("4096 cold", _QWEN, 128, 4096, "cold", 1.03),
    Bar("4096 cold interleaved", _QWEN, 128, 4096, "cold", 1.03, pairing="interleaved"),
    Bar("16384 cold", _QWEN, 128, 16384, "cold", 1.015),
    Bar("FLUX 4608 cold", (24, 24, 24), 128, 4608, "cold", 1.04, pairing="interleaved"),
    Bar("16/4/4 x 256", (16, 4, 4), 256, 4096, "cold", 1.03),
    Bar("16/2/2 x 256 rot 64", (16, 2, 2), 256, 4096, "cold", 1.05, rotary=64),
    Bar("96/8/8 x 128 rot 64", (96, 8, 8), 128, 4096, "cold", 1.04, rotary=64),
    Bar("32/8/8 x 64", _QWEN, 64, 4096, "cold", 1.03),
    Bar("8/1/1 64 hot", (8, 1, 1), 128, 64, "hot", 1.15),
    Bar("8/1/1 16384 cold", (8, 1, 1), 128, 16384, "cold", 1.08),
    Bar("64/4/4 8192 cold", (64, 4, 4), 128, 8192, "cold", 1.02),
    Bar("head_dim 72", _QWEN, 72, 4096, "cold", 1.12),
    Bar("head_dim 80", _QWEN, 80, 4096, "cold", 1.12),
    Bar("head_dim 192", _QWEN, 192, 4096, "cold", 1.12),
    Bar("head_dim 96", _QWEN, 96, 4096, "cold", 1.07),
    Bar("head_dim 112", _QWEN, 112, 4096, "cold", 1.07),
    Bar("head_dim 512", (8, 2, 2), 512, 4096, "cold", 1.07),
    Bar("rotary 96 of 128", _QWEN, 128, 4096, "cold", 1.07, rotary=96),
    Bar("float16 4096", _QWEN, 128, 4096, "cold", 1.05, dtype="float16"),
    Bar("float32 4096", _QWEN, 128, 4096, "cold", 1.05, dtype="float32"),
    Bar("row 40/40/40", (40, 40, 40), 128, 4096, "cold", 1.10, pairing="interleaved", norm=_ROW),
    Bar("row 48/8/8", (48, 8, 8), 128, 4096, "cold", 1.10, rotary=64, norm=_ROW),
    Bar("layer 48/48/48 x 64", (48, 48, 48), 64, 4096, "cold", None, norm=Norm("layer")),
    Bar("backward 1024 cold", _QWEN, 128, 1024, "cold", 1.35, backward="weights"),
    Bar("backward 4096 cold", _QWEN, 128, 4096, "cold", 1.14, backward="weights"),
    Bar("backward 16384 cold", _QWEN, 128, 16384, "cold", 1.06, backward="weights"),
    Bar("backward 1024 cold, of x", _QWEN, 128, 1024, "cold", None, backward="x"),
    Bar("backward 4096 cold, of x", _QWEN, 128, 4096, "cold", None, backward="x"),
    Bar(
        *("backward 4096 interleaved", _QWEN, 128, 4096, "cold", None),
        pairing="interleaved",
        backward="weights",
    ),
    Bar("backward float32 4096", _QWEN, 128, 4096, "cold", None, dtype="float32", backward="x"),
)


Buffer = Inputs | gradients.Rows


def _bytes_of(bar: Bar) -> int:
    """What a call moves: each element read and written, of a backward with one more read."""
    twice = bar.shape.bytes_moved(bar.tokens, 4 if bar.dtype == "float32" else 2)
    return twice * 3 // 2 if bar.backward else twice


def buffers_of(bar: Bar) -> Sequence[Buffer]:
    """The rotation of a case: two buffers hot, at least 300 MB of them cold."""
    dtype, device = getattr(torch, bar.dtype), torch.device("cuda")
    held = _bytes_of(bar) if bar.backward else _bytes_of(bar) / 2  # by a buffer
    count = 2 if bar.cache == "hot" else max(2, math.ceil(COLD_BYTES / held))
    if bar.backward:
        return gradients.make_rows(bar.shape, bar.tokens, dtype, device, count)
    first = stationary(make_inputs(bar.shape, bar.tokens, dtype, device))
    return [first] + [another_buffer(first) for _ in range(count - 1)]


def graph(bar: Bar, buffers: Sequence[Any]) -> timing.Measure:
    """One graph of the rotation."""
    weights = bar.backward == "weights"
    calls = [gradients.call(b, weights) if bar.backward else call(b) for b in buffers]
    return timing.graph_measure(calls, timing.launches_for(len(calls), _bytes_of(bar) / 3e6))


def sweep_measure(bar: Bar, buffers: Sequence[Any]) -> timing.Measure:
    """The yardstick of a case."""
    launches = timing.launches_for(len(buffers), _bytes_of(bar) / 3e6)
    if bar.backward:
        return gradients.sweep_measure(buffers, launches)
    return device_sweep_measure(buffers, launches, pdl=True)


@torch.no_grad()
def measure(bar: Bar, rounds: int = 9) -> dict[str, float]:
    """Median microseconds of kernel and sweep, and the median of their ratio round by round."""
    buffers = buffers_of(bar)
    measures = {"kernel": graph(bar, buffers), "sweep": sweep_measure(bar, buffers)}
    samples = timing.interleaved(measures, rounds=rounds, budget_s=5.0)
    kernel, sweep = samples["kernel"], samples["sweep"]
    return {"us": kernel.median, "sweep_us": sweep.median, "ratio": kernel.ratio(sweep)}


WARPS = (1, 2, 3, 4, 5, 6, 8, 10, 20)


@torch.no_grad()
def try_grids(bar: Bar, rounds: int = 5) -> dict[str, float]:
    """Median microseconds of "sweep", of "rule", and of every "rows/warps a block" there is; of a
    backward, of the grids that `gradients.GRIDS` explains.
    """
    buffers = buffers_of(bar)
    measures = {"sweep": sweep_measure(bar, buffers), "rule": graph(bar, buffers)}
    if bar.backward:
        for grid in gradients.GRIDS:
            with gradients.forced(grid):
                measures["/".join(map(str, grid))] = graph(bar, buffers)
    else:
        force = _native.lib().force_grid
        most = 4 if bar.head_dim <= 256 else 2  # QK_PASSES
        for rows, warps in [(r, w) for r in (1, 2, 4) if r <= most for w in WARPS]:
            force(rows, warps)
            measures[f"{rows}/{warps}"] = graph(bar, buffers)
        force(0, 0)
    samples = timing.interleaved(measures, rounds=rounds, budget_s=5.0)
    return {key: samples[key].median for key in samples}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every bar is met."""
    parser = argparse.ArgumentParser(prog="python -m qkrope.bench.bars", description=__doc__)
    parser.add_argument("--only", help="cases whose name holds one of these texts (comma)")
    parser.add_argument("--runs", type=int, default=3, help="the median of this many runs decides")
    parser.add_argument("--grid", action="store_true", help="try every number of rows and warps")
    parser.add_argument("--out", type=Path, help="append one JSON line a case")
    options = parser.parse_args(argv)
    wanted = options.only.split(",") if options.only else [""]
    bars = [bar for bar in BARS if any(text in bar.name for text in wanted)]
    facts = environment(torch.device("cuda"))
    missed = 0
    for bar in bars:
        if options.grid:
            found = try_grids(bar)
            sweep = found["sweep"]
            best = sorted((k for k in found if "/" in k), key=lambda k: found[k])[:6]
            line = "  ".join(f"{k} {found[k] / sweep:.3f}" for k in best)
            print(f"{bar.name:24s} rule {found['rule'] / sweep:.3f}  best: {line}", flush=True)
            result: dict[str, Any] = {"grid": {k: round(us, 3) for k, us in found.items()}}
        else:
            runs = [measure(bar) for _ in range(options.runs)]
            result = {key: median(run[key] for run in runs) for key in runs[0]}
            met = bar.ratio is None or result["ratio"] <= bar.ratio + TOLERANCE
            missed += not met
            verdict = (
                "" if bar.ratio is None else f"bar {bar.ratio:5.3f} {'met' if met else 'MISSED'}"
            )
            print(
                f"{bar.name:24s} {result['us']:8.2f} us  sweep {result['sweep_us']:8.2f} us  "
                f"ratio {result['ratio']:.3f}  {verdict}",
                flush=True,
            )
        if options.out:
            line = json.dumps({**facts, "case": bar.name, "bar": bar.ratio, **result})
            with options.out.open("a") as file:
                file.write(line + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
