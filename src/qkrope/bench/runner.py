"""One benchmark case: check against the oracle, time in turns with the sweep and the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import qkrope

from . import timing
from .baselines import BASELINES, Build, Call, Unmeasured, forget_compiled
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
    peers: Mapping[str, Build] = field(default_factory=dict)  # measured as the baselines are
    check_baselines: bool = False  # against the oracle, too
    compile_shapes: frozenset[str] = frozenset()  # names; torch.compile takes seconds a case
    oracle_rows: int | None = 256  # None: every row
    rounds: int = 25
    baseline_rounds: int = 3
    budget_s: float = 0.5  # for each of kernel, sweep and baseline, in one case

    def builders(self, shape: Shape) -> dict[str, Build]:
        """What is measured beside the kernel on a shape."""
        compiled = shape.name in self.compile_shapes
        names = [n for n in self.baselines if compiled or not n.startswith("compile")]
        return {name: BASELINES[name] for name in names} | dict(self.peers)

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
    others: dict[tuple[Shape, int], dict[str, dict[str, Any]]] = {}
    for shape, tokens, cache in plan.cases():
        case = (shape, tokens)
        with _current(plan.device):
            inputs = make_inputs(shape, tokens, plan.dtype, plan.device)
            if case not in checked:
                checked[case] = check(inputs, plan.oracle_rows)
                others[case] = dict(check_baselines(plan, *case) if plan.check_baselines else ())
            record = _measure(plan, inputs, cache, others[case], *checked[case], facts, note)
        yield record


def check_baselines(plan: Plan, shape: Shape, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each baseline and peer once, on inputs of its own: its worst error, or why there is none.

    A failure is its own alone: the others go on.
    """
    builders = plan.builders(shape)
    forget_compiled(builders)
    for name, build in builders.items():
        try:
            inputs = make_inputs(shape, tokens, plan.dtype, plan.device)
            (run,) = build([inputs])
            errors, _ = check(inputs, plan.oracle_rows, run)
        except Exception as error:
            found: dict[str, Any] = {"error": reason(error)}
        else:
            found = {"worst_error": finite(errors.worst), "worst_ulp": finite(errors.pair_ulp)}
        yield name, found


def reason(error: Exception) -> str:
    """One line for an exception."""
    if isinstance(error, Unmeasured):
        return str(error)
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0]


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


@torch.no_grad()
def check(inputs: Inputs, rows: int | None, run: Call | None = None) -> tuple[Errors, int]:
    """Run the call (ours for None) once and compare `rows` rows, first and last among them, with
    the oracle.

    Returns the errors and the number of rows; V must keep its bits (RuntimeError if it does not).
    """
    tokens, columns = inputs.tokens, inputs.shape.columns
    count = tokens if rows is None else min(rows, tokens)
    picks = torch.linspace(0, tokens - 1, count, dtype=torch.float64).round().long()
    picks = picks.to(inputs.qkv.device)
    before = (inputs.q[picks], inputs.k[picks])
    v_before = inputs.qkv[picks, columns:].clone()
    out: Any = (run or call(inputs))()
    q_out, k_out = (inputs.q, inputs.k) if out is None else out
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
        got = (q_out[rows_at], k_out[rows_at])
        parts.append((compare(got, exact, terms, spec, inputs.qkv.dtype), len(rows_at)))
    return merge(parts), count


@torch.no_grad()  # as engines run it; the weights then need no wait for the kernel before
def _measure(
    plan: Plan,
    inputs: Inputs,
    cache: str,
    checked: Mapping[str, dict[str, Any]],
    errors: Errors,
    rows: int,
    facts: dict[str, Any],
    note: Callable[[str], None],
) -> Record:
    shape, spec = inputs.shape, inputs.shape.spec
    moved = shape.bytes_moved(inputs.tokens, inputs.qkv.element_size())
    pdl = plan.device.type == "cuda" and torch.cuda.get_device_capability(plan.device) >= (9, 0)
    wrong = {name: found["error"] for name, found in checked.items() if "error" in found}
    builders = {n: build for n, build in plan.builders(shape).items() if n not in wrong}
    measures, launches, failed = _measures(stationary(inputs), cache, builders, moved, pdl)
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
            **checked.get(name, {}),
        }
        for name in slow
    }
    failed |= wrong
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
    inputs: Inputs, cache: str, builders: Mapping[str, Build], moved: int, pdl: bool
) -> tuple[dict[str, timing.Measure], int | None, dict[str, str]]:
    """The things to time, the launches a graph holds, and the reason of each that cannot be."""
    buffers, launches = [inputs], None
    if inputs.qkv.is_cuda:
        count = 2 if cache == "hot" else max(2, math.ceil(COLD_BYTES / (moved / 2)))
        buffers += [another_buffer(inputs) for _ in range(count - 1)]
        launches = timing.launches_for(count, moved / 3e6)  # at 3 TB/s
    makers: dict[str, Build] = {
        "kernel": lambda buffers: [call(b) for b in buffers],
        "sweep": lambda buffers: [host_sweep(b) for b in buffers],
        **builders,
    }
    forget_compiled(builders)
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
            failed[name] = reason(error)
    return measures, launches, failed
