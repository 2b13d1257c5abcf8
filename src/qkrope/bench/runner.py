"""One benchmark case: check against the oracle, time in turns with the sweep and the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import qkrope

from . import timing
from .baselines import BASELINES
from .data import Inputs, another_buffer, make_inputs, stationary
from .errors import Errors, compare, exact_and_terms, finite, merge
from .machine import environment
from .records import Record
from .shapes import Shape
from .sweep import device_sweep_measure, host_sweep

HOT_TOKENS = 1024  # CUDA: measured hot up to here, cold from here on
COLD_BYTES = 300e6  # a rotation at least this large cannot stay in any L2
ORACLE_CHUNK = 1024  # rows; float64 needs several times the memory of the call
OP = "qkv_norm_rope_"


@dataclass(frozen=True)
class Plan:
    """What to measure and how thoroughly."""

    shapes: Sequence[Shape]
    tokens: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    baselines: Sequence[str] = ("eager", "compile")
    compile_shapes: frozenset[str] = frozenset()  # names; torch.compile takes seconds a case
    oracle_rows: int | None = 256  # None: every row
    rounds: int = 25
    baseline_rounds: int = 3
    budget_s: float = 0.5  # for each of kernel, sweep and baseline, in one case

    def cases(self) -> list[tuple[Shape, int, str]]:
        """Shape, tokens and cache state of every record the plan makes."""
        return [
            (shape, tokens, cache)
            for shape in self.shapes
            for tokens in self.tokens
            for cache in cache_states(self.device, tokens)
        ]


def cache_states(device: torch.device, tokens: int) -> tuple[str, ...]:
    """Decode sizes find their data in the cache, prefill sizes do not; 1024 is measured as both."""
    if device.type == "cpu":
        return ("same",)
    return ("hot",) * (tokens <= HOT_TOKENS) + ("cold",) * (tokens >= HOT_TOKENS)


def run(plan: Plan, note: Callable[[str], None] = lambda text: None) -> Iterator[Record]:
    """Measure every case of a plan, in order. `note` hears what could not be measured and why."""
    facts = environment(plan.device)
    checked: dict[tuple[Shape, int], tuple[Errors, int]] = {}
    for shape, tokens, cache in plan.cases():
        names = [
            name
            for name in plan.baselines
            if name != "compile" or shape.name in plan.compile_shapes
        ]
        with _current(plan.device):
            inputs = make_inputs(shape, tokens, plan.dtype, plan.device)
            if (shape, tokens) not in checked:
                checked[shape, tokens] = check(inputs, plan.oracle_rows)
            errors, rows = checked[shape, tokens]
            record = _measure(plan, inputs, cache, names, errors, rows, facts, note)
        yield record


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make a CUDA device current, and give back what the graphs of a case held."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
        torch.cuda.empty_cache()


def call(inputs: Inputs) -> Callable[[], object]:
    """The public call under test, ready to run."""
    qkv, q_weight, k_weight = inputs.qkv, inputs.q_weight, inputs.k_weight
    positions, spec = inputs.positions, inputs.shape.spec

    return lambda: qkrope.qkv_norm_rope_(qkv, q_weight, k_weight, positions, spec)


def check(inputs: Inputs, rows: int | None) -> tuple[Errors, int]:
    """Run the call once and compare `rows` rows, first and last among them, with the oracle.

    Returns the errors and the number of rows; V must keep its bits (RuntimeError if it does not).
    """
    tokens, columns = inputs.tokens, inputs.shape.columns
    count = tokens if rows is None else min(rows, tokens)
    picks = torch.linspace(0, tokens - 1, count, dtype=torch.float64).round().long()
    picks = picks.to(inputs.qkv.device)
    before = (inputs.q[picks], inputs.k[picks])
    v_before = inputs.qkv[picks, columns:].clone()
    call(inputs)()
    if not torch.equal(inputs.qkv[picks, columns:], v_before):
        raise RuntimeError(f"{inputs.shape.name}: the V columns changed")
    spec = inputs.shape.spec
    parts: list[tuple[Errors, int]] = []
    for at in range(0, count, ORACLE_CHUNK):
        some = slice(at, at + ORACLE_CHUNK)
        q, k = before[0][some], before[1][some]
        rows_at = picks[some]
        exact, terms = exact_and_terms(
            q, k, inputs.q_weight, inputs.k_weight, inputs.positions[rows_at], spec
        )
        got = (inputs.q[rows_at], inputs.k[rows_at])
        parts.append((compare(got, exact, terms, spec, inputs.qkv.dtype), len(rows_at)))
    return merge(parts), count


@torch.no_grad()  # as engines run it; the weights then need no wait for the kernel before
def _measure(
    plan: Plan,
    inputs: Inputs,
    cache: str,
    baselines: Sequence[str],
    errors: Errors,
    rows: int,
    facts: dict[str, Any],
    note: Callable[[str], None],
) -> Record:
    shape, spec = inputs.shape, inputs.shape.spec
    moved = shape.bytes_moved(inputs.tokens, inputs.qkv.element_size())
    pdl = plan.device.type == "cuda" and torch.cuda.get_device_capability(plan.device) >= (9, 0)
    measures, launches, failed = _measures(plan, stationary(inputs), cache, baselines, moved, pdl)
    for name, reason in failed.items():
        note(f"{shape.name}, {inputs.tokens} tokens: {name} not measured: {reason}")
    fast = {name: m for name, m in measures.items() if name in ("kernel", "sweep")}
    slow = {name: m for name, m in measures.items() if name not in fast}
    # The baselines share the first rounds with the kernel, then leave it and the sweep to go on.
    shared = timing.interleaved(
        fast | slow, rounds=plan.baseline_rounds, budget_s=plan.budget_s, min_rounds=1
    )
    alone = timing.interleaved(fast, rounds=plan.rounds, budget_s=plan.budget_s, min_rounds=7)
    kernel = timing.Samples(shared["kernel"].us + alone["kernel"].us)
    sweep = None
    if "sweep" in fast:
        sweep = timing.Samples(shared["sweep"].us + alone["sweep"].us)
    results: dict[str, dict[str, Any]] = {
        name: {
            "us": shared[name].median,
            "speedup": shared[name].ratio(shared["kernel"]),
            "repeats": len(shared[name].us),
        }
        for name in slow
    }
    results |= {name: {"error": why} for name, why in failed.items() if name != "sweep"}
    return Record(
        **facts,
        op=OP,
        shape=shape.name,
        spec=spec.canonical(),
        heads=shape.heads,
        rotary_dim=spec.rotary_dim,
        pairing=spec.rope.pairing if spec.rope is not None else "none",
        tokens=inputs.tokens,
        dtype=str(inputs.qkv.dtype).removeprefix("torch."),
        cache=cache,
        bytes=moved,
        us=kernel.median,
        us_best=kernel.best_decile,
        gbps=moved / kernel.median * 1e-3,
        sweep_us=sweep.median if sweep else None,
        sweep_pdl=pdl if plan.device.type == "cuda" else None,
        ratio=kernel.ratio(sweep) if sweep else None,
        worst_error=finite(errors.worst),
        worst_ulp=finite(errors.pair_ulp),
        correct=errors.correct,
        passed=errors.passed,
        oracle_rows=rows,
        repeats=len(kernel.us),
        launches=launches,
        baselines=results,
    )


def _measures(
    plan: Plan, inputs: Inputs, cache: str, baselines: Sequence[str], moved: int, pdl: bool
) -> tuple[dict[str, timing.Measure], int | None, dict[str, str]]:
    """The things to time, the launches a graph holds, and the reason of each that cannot be."""
    buffers, launches = [inputs], None
    if inputs.qkv.is_cuda:
        count = 2 if cache == "hot" else max(2, math.ceil(COLD_BYTES / (moved / 2)))
        buffers += [another_buffer(inputs) for _ in range(count - 1)]
        launches = timing.launches_for(count, moved / 3e6)  # at 3 TB/s
    makers: dict[str, Callable[[Sequence[Inputs]], list[Callable[[], object]]]] = {
        "kernel": lambda buffers: [call(b) for b in buffers],
        "sweep": lambda buffers: [host_sweep(b) for b in buffers],
    }
    makers |= {name: BASELINES[name] for name in baselines}
    measures: dict[str, timing.Measure] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            if launches is None:
                measures[name] = timing.host_measure(make(buffers)[0])
            elif name == "sweep":
                measures[name] = device_sweep_measure(buffers, launches, pdl=pdl)
            else:
                measures[name] = timing.graph_measure(make(buffers), launches)
        except Exception as error:
            if name == "kernel":
                raise
            failed[name] = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
    return measures, launches, failed
