"""Tables of what `qkrope.bench.host`, `.training` and `qkrope check --json` write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .decades import METHODS, label

Line = dict[str, Any]
_FACTS = ("device_name", "isa", "dtype", "driver", "torch", "qkrope", "commit")
_NAMED = _FACTS[3:]  # whose value does not say what it is


def provenance(found: Sequence[Line]) -> str:
    """Where figures come from, in a sentence; a fact that differs among them has all its values."""
    parts = []
    for name in _FACTS:
        values = dict.fromkeys(str(line[name]) for line in found if line.get(name) is not None)
        if values:
            parts.append((f"{name} " if name in _NAMED else "") + " and ".join(values))
    return ", ".join(parts) + "."


def render_host(found: Sequence[Line]) -> str:
    """The figures of `python -m qkrope.bench.host`, the last one of each, beside their bars."""
    if not found:
        return "No record yet.\n"
    latest = {line["case"]: line for line in found}
    rows = ["| figure | measured | bar |", "|---|---:|---:|"]
    for case, line in latest.items():
        bar = "-"
        if line["bar"] is not None:
            bar = f"{line['bar']:g} {line['unit']}".strip() + ("" if line["met"] else ", missed")
        value = f"{line['value']:.3g} {line['unit']}".strip()
        rows.append(_row((case.strip(), value, bar)))
    return "\n".join([*rows, "", provenance([*latest.values()]), ""])


def render_training(found: Sequence[Line]) -> str:
    """Steps of `python -m qkrope.bench.training`, the last of each case: ours, and times it."""
    if not found:
        return "No record yet.\n"
    latest = {(str(line["case"]), line["tokens"], line["dtype"]): line for line in found}
    others = [name for name in next(iter(latest.values()))["us"] if name != "qkrope"]
    rows = [_row(["heads", "tokens", "qkrope, us", *others]), "|---|" + "---:|" * (2 + len(others))]
    missing = dict[str, None]()
    for line in latest.values():
        us, cells = line["us"], [line["case"], str(line["tokens"]), f"{line['us']['qkrope']:.4g}"]
        for name in others:
            if isinstance(found_us := us.get(name, "not measured"), str):
                missing[f"{name}: {found_us}."] = None
                cells.append("-")
            else:
                cells.append(f"{found_us / us['qkrope']:.2f}x")
        rows.append(_row(cells))
    return "\n".join([*rows, "", *missing, provenance([*latest.values()]), ""])


def render_check(found: Sequence[Line]) -> str:
    """Errors by position of each `qkrope check`: one table a dtype, in the order of the files."""
    if not found:
        return "No record yet.\n"
    return "\n".join(_check(line) for line in found)


def _check(line: Line) -> str:
    figures: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("pair_ulp", lambda x: f"{x:.3g}"),
        ("correct", lambda x: f"{100 * x:.2f}%"),
    )
    names = list(METHODS)
    head = [
        "positions",
        *(f"{name}, ulp" for name in names),
        *(f"{name}, exact" for name in names),
    ]
    rows = [f"{line['dtype']}:", "", _row(head), "|---|" + "---:|" * (len(head) - 1)]
    for decade in line["decades"]:
        methods = decade["methods"]
        cells = [show(methods[name][key]) for key, show in figures for name in names]
        rows.append(_row([label(decade["first"], decade["last"]), *cells]))
    return "\n".join([*rows, "", provenance([line]), ""])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
