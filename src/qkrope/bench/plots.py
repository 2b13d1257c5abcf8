"""Two panels: time against bytes with the sweep's line, and the share of the sweep reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .records import Record


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw the records to a PNG. ValueError for none."""
    if not records:
        raise ValueError("plot: got no records")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first = records[0]
    figure, (times, shares) = plt.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
    names = list(dict.fromkeys(r.shape for r in records))
    colors = plt.get_cmap("tab20")
    for index, name in enumerate(names):
        for cache, marker in (("same", "o"), ("hot", "o"), ("cold", "s")):
            mine = sorted(
                (r for r in records if r.shape == name and r.cache == cache), key=lambda r: r.bytes
            )
            if not mine:
                continue
            style: dict[str, Any] = {
                "color": colors(index % 20),
                "marker": marker,
                "markersize": 5,
                "linewidth": 1.2,
            }
            label = name if cache != "hot" or not _has(records, name, "cold") else None
            times.plot([r.bytes for r in mine], [r.us for r in mine], label=label, **style)
            ratios = [(r.bytes, 100 / r.ratio) for r in mine if r.ratio]
            if ratios:
                shares.plot(*zip(*ratios, strict=True), label=label, **style)
    _lines(times, records)
    times.set(xscale="log", yscale="log", xlabel="bytes of Q and K, read + written")
    times.set(ylabel="time, us", title="Time per call")
    shares.axhline(100, color="black", linestyle="--", linewidth=1)
    shares.set(xscale="log", xlabel="bytes of Q and K, read + written", ylabel="% of the sweep")
    shares.set(title="Speed as a share of an in-place sweep of the same bytes")
    shares.set_ylim(bottom=0)
    for axis in (times, shares):
        axis.grid(True, which="major", alpha=0.3)
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, ncols=5, loc="outside lower center")
    threads = f", {first.threads} threads" if first.threads else ""
    caches = ", circles hot, squares cold" if first.device == "cuda" else ""
    figure.suptitle(f"qkrope {first.dtype}: {first.device_name}, {first.isa}{threads}{caches}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _has(records: Sequence[Record], name: str, cache: str) -> bool:
    return any(r.shape == name and r.cache == cache for r in records)


def _lines(axis: Any, records: Sequence[Record]) -> None:
    """The sweep's and eager torch's time at each size (medians over shapes of similar size)."""
    for label, style, value in (
        ("memory sweep", "--", lambda r: r.sweep_us),
        ("eager torch", ":", lambda r: r.baselines.get("eager", {}).get("us")),
    ):
        named: str | None = label
        for cache in dict.fromkeys(r.cache for r in records):
            groups: dict[int, list[tuple[int, float]]] = {}
            for r in records:
                if r.cache == cache and value(r):
                    groups.setdefault(r.bytes.bit_length() // 2, []).append((r.bytes, value(r)))
            points = [
                (median(b for b, _ in group), median(us for _, us in group))
                for _, group in sorted(groups.items())
            ]
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color="black", linestyle=style, linewidth=1.6, label=named)
                named = None
