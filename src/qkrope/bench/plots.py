"""The roofline: achieved bandwidth against bytes moved, with the measured sweep as the roof.

`python -m qkrope.bench.plots RECORDS.jsonl FILE.png` draws the newest records of a file; a file
that holds several machines or dtypes needs `--where FIELD=VALUE`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from . import records as store
from .records import Record
from .tables import newest

# Cache state -> the roof's line and the marker of what was measured in it.
STATES = {"same": ("-", "o"), "hot": ("--", "o"), "cold": ("-", "s")}
# What is drawn beside ours where it was measured: name, colour, word in the legend.
BESIDE = (
    ("eager", "0.55", "eager torch"),
    ("compile", "#c05020", "torch.compile"),
    ("sglang", "#7a3fa0", "SGLang JIT"),
    ("vllm", "#2a7f3f", "vLLM"),
)
Line = list[tuple[float, float]]


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw the records of one machine and dtype to a PNG. ValueError for none, or for several."""
    machines = {(r.device_name, r.isa, r.threads, r.dtype) for r in records}
    if len(machines) != 1:
        raise ValueError(f"plot: got records of {len(machines)} machines, expected one")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (roof, share) = plt.subplots(
        1, 2, figsize=(14, 6.6), width_ratios=(3, 2), layout="constrained"
    )
    _roofs(roof, records)
    _beside(roof, records)
    _shapes(roof, share, records)
    unit = "bytes of Q and K, read and written"
    roof.set(xscale="log", yscale="log", xlabel=unit, ylabel="GB/s")
    roof.set_title("Achieved bandwidth under the roof that a plain sweep sets", loc="left")
    share.axhline(100, color="black", linewidth=1.4)
    share.set(xscale="log", xlabel=unit, ylabel="% of the sweep's bandwidth")
    share.set_title("Share of the roof", loc="left")
    share.set_ylim(0, max(110.0, share.get_ylim()[1]))
    for axis in (roof, share):
        axis.grid(True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda value, _: _size(value))
    roof.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    handles, labels = roof.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, ncols=6, loc="outside lower center", frameon=False)
    figure.suptitle(_title(records), x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _title(records: Sequence[Record]) -> str:
    first = records[0]
    parts = [f"qkrope, {first.dtype}: {first.device_name}", str(first.isa)]
    if first.threads:
        parts.append(f"{first.threads} thread{'s' * (first.threads > 1)}")
    if first.device == "cuda":
        parts.append("circles and dashes hot (two buffers), squares cold (300 MB of them)")
    return ", ".join(parts)


def _size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B"


def _line(records: Sequence[Record], cache: str, us: Callable[[Record], float | None]) -> Line:
    """GB/s by size in one cache state: medians over sizes within a factor of two, between the
    smallest and the largest record.
    """
    times = [(float(r.bytes), us(r)) for r in records if r.cache == cache]
    points = sorted((size, size / time * 1e-3) for size, time in times if time)
    if len(points) < 3:
        return points
    groups: dict[int, Line] = {}
    for size, rate in points:
        groups.setdefault(int(size).bit_length(), []).append((size, rate))
    middle = [
        (median(size for size, _ in group), median(rate for _, rate in group))
        for group in groups.values()
    ]
    return sorted({points[0], *middle, points[-1]})


def _roofs(axis: Any, records: Sequence[Record]) -> None:
    for cache, (style, _) in STATES.items():
        line = _line(records, cache, lambda r: r.sweep_us)
        if line:
            name = "the roof: an in-place sweep" + ("" if cache == "same" else f", {cache}")
            x, y = zip(*line, strict=True)
            axis.plot(x, y, color="black", linestyle=style, linewidth=1.8, label=name, zorder=3)
            axis.fill_between(x, y, min(y) / 1e4, color="0.5", alpha=0.06, linewidth=0)


def _time_of(name: str, record: Record) -> float | None:
    us: float | None = record.baselines.get(name, {}).get("us")
    return us


def _beside(axis: Any, records: Sequence[Record]) -> None:
    for name, color, word in BESIDE:
        label: str | None = word
        for cache, (style, _) in STATES.items():
            line = _line(records, cache, partial(_time_of, name))
            if line:
                x, y = zip(*line, strict=True)
                axis.plot(x, y, color=color, linestyle=style, marker=".", label=label)
                label = None


def _shapes(roof: Any, share: Any, records: Sequence[Record]) -> None:
    from matplotlib import pyplot as plt

    colors = plt.get_cmap("tab20")
    lowest = min(r.gbps for r in records)
    for index, shape in enumerate(dict.fromkeys(r.shape for r in records)):
        label: str | None = shape
        for cache, (style, marker) in STATES.items():
            mine = [r for r in records if r.shape == shape and r.cache == cache]
            mine.sort(key=lambda r: r.bytes)
            dots: dict[str, Any] = {"color": colors(index % 20), "marker": marker, "markersize": 5}
            thread = {"color": colors(index % 20), "linestyle": style, "lw": 0.8, "alpha": 0.4}
            if mine:
                points = [r.bytes for r in mine], [r.gbps for r in mine]
                roof.plot(*points, **thread)
                roof.plot(*points, linestyle="none", label=label, zorder=4, **dots)
                label = None
            ratios = [(r.bytes, 100 / r.ratio) for r in mine if r.ratio]
            if ratios:
                share.plot(*zip(*ratios, strict=True), **thread)
                share.plot(*zip(*ratios, strict=True), linestyle="none", **dots)
    slow = [r.bytes / b["us"] * 1e-3 for r in records for b in r.baselines.values() if "us" in b]
    roof.set_ylim(bottom=min([lowest, *slow]) / 1.6)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m qkrope.bench.plots", description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args(argv)
    found = newest(store.read(args.records))
    for condition in args.where:
        field, _, value = condition.partition("=")
        found = [r for r in found if str(getattr(r, field)) == value]
    try:
        draw(found, args.picture)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
