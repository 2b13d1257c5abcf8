"""`qkrope bench --peers`: the rows of other libraries' kernels, and a run that only tries them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import FAILED, OK, Output, UsageError

if TYPE_CHECKING:
    from qkrope.bench.baselines import Build
    from qkrope.bench.records import Record
    from qkrope.bench.runner import Plan

DRY_TOKENS = 5


def peers_from(given: str | None) -> dict[str, Build]:
    """What `--peers [DIR]` asks for, by name; nothing without the flag."""
    if given is None:
        return {}
    from qkrope.bench.peers import builders

    folder = Path(given) if given else None
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--peers: {given} is not a folder (tools/fetch_peers.py makes it)")
    return builders(folder)


def dry_run(plan: Plan, out: Output) -> int:
    """One tiny case of each shape through everything that would be measured; a line each.

    Exit code 1 if something that ran could not (not installed and refusals are no failure).
    """
    from qkrope.bench.runner import check_baselines

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for shape in plan.shapes:
        results = found.setdefault(shape.name, {})
        for name, result in check_baselines(plan, shape, DRY_TOKENS):
            results[name] = result
            out.text(f"{shape.name:20s} {name:18s} {describe(result)}")
    out.result(found)
    broken = [r for results in found.values() for r in results.values() if is_broken(r)]
    return FAILED if broken else OK


def is_broken(result: dict[str, Any]) -> bool:
    """Whether a baseline failed by an exception of its own."""
    return ": " in result.get("error", "")


def describe(result: dict[str, Any]) -> str:
    """One result of a check in words."""
    if "error" in result:
        return str(result["error"])
    return f"ran; worst error {ulps(result)} ulp"


def ulps(result: dict[str, Any]) -> str:
    """The worst error of a result that was checked."""
    worst = result.get("worst_ulp")
    return "infinite" if worst is None else f"{worst:.3g}"


def print_peers(found: list[Record], out: Output) -> None:
    """A row for each case and each thing beside ours: time, times ours, error, or why not."""
    columns = ["shape", "tokens", "cache", "what", "us", "x ours", "worst ulp", "why not"]
    rows = []
    for record in found:
        case = [record.shape, str(record.tokens), record.cache]
        worst = {"worst_ulp": record.worst_ulp}
        rows.append([*case, "qkrope", f"{record.us:.2f}", "1.00", ulps(worst), ""])
        for name, result in record.baselines.items():
            if "error" in result:
                rows.append([*case, name, "-", "-", "-", result["error"]])
            else:
                numbers = [f"{result['us']:.2f}", f"{result['speedup']:.2f}", ulps(result)]
                rows.append([*case, name, *numbers, ""])
    out.table("peers: time, time over ours, worst error in ulps of the rotated pair", columns, rows)
