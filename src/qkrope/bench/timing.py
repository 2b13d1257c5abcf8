"""Timing. Nothing in a timed region allocates or copies on the harness's behalf.

Kernel, sweep and baselines take turns inside each round, so that a machine that changes speed
changes it for all of them, and ratios are taken round by round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Measure = Callable[[], float]  # one sample: microseconds per call


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing, in microseconds per call."""

    us: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return median(self.us)

    @property
    def best_decile(self) -> float:
        """The sample that one in ten is at or below."""
        return sorted(self.us)[max(0, math.ceil(len(self.us) / 10) - 1)]

    def ratio(self, other: Samples) -> float:
        """Median over rounds of self / other."""
        return median(a / b for a, b in zip(self.us, other.us, strict=False))


def interleaved(
    measures: Mapping[str, Measure], *, rounds: int, budget_s: float, min_rounds: int = 3
) -> dict[str, Samples]:
    """Take one sample of each measure per round.

    A measure that has used up `budget_s` sits out the later rounds, but has at least `min_rounds`.
    """
    samples: dict[str, list[float]] = {name: [] for name in measures}
    spent = dict.fromkeys(measures, 0.0)
    for index in range(rounds):
        for name, measure in measures.items():
            if index >= min_rounds and spent[name] > budget_s:
                continue
            start = time.perf_counter()
            samples[name].append(measure())
            spent[name] += time.perf_counter() - start
    return {name: Samples(tuple(values)) for name, values in samples.items()}


def host_measure(call: Callable[[], object], *, sample_s: float = 1e-3) -> Measure:
    """Time `call` on the host clock, often enough in a row that one sample lasts `sample_s`."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    inner = min(1000, max(1, round(sample_s / once)))
    long = once > 20 * sample_s

    def sample() -> float:
        if not long:
            call()  # wakes the thread pool and brings this call's own data back
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - begin) / inner * 1e6

    return sample


MIN_LAUNCHES = 40
_MAX_LAUNCHES = 400
_GRAPH_US = 1000.0  # a graph this long makes the two event records negligible


def launches_for(buffers: int, expected_us: float) -> int:
    """How many launches one graph holds: whole turns over the buffers, 40 or more."""
    wanted = max(MIN_LAUNCHES, min(_MAX_LAUNCHES, _GRAPH_US / max(expected_us, 0.5)))
    return math.ceil(wanted / buffers) * buffers


def graph_measure(calls: Sequence[Callable[[], object]], launches: int) -> Measure:
    """Time a CUDA graph of `launches` calls that go round `calls` (one for each buffer)."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, loads and allocates outside the capture
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            calls[index % len(calls)]()
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    def sample(keep: object = tuple(calls)) -> float:
        # The graph holds addresses: the tensors behind them live as long as this measure does.
        # The first replay keeps the device busy while the host enqueues the timed one, and leaves
        # the caches as every later replay finds them.
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / launches

    return sample
