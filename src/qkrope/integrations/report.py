"""What every `patch` reports, warns of and undoes in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..rounding import Rounding

__all__ = ["Report", "block", "grouped", "warn_left"]


@dataclass(frozen=True)
class Report:
    """What `patch` did, by the names of ``model.named_modules()``.

    ``patched`` says what an attention module runs now (the calls of a layer, or a processor),
    ``left`` why one stays as it was.
    """

    patched: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} attention modules patched, {len(self.left)} left"]
        for title, entries in (("patched", self.patched), ("left", self.left)):
            lines += [f"  {title}: {text}" for text in grouped(entries)]
        return "\n".join(lines)


def grouped(entries: Mapping[str, str]) -> list[str]:
    """One text for each reason, with the modules that it is of."""
    names: dict[str, list[str]] = {}
    for name, reason in entries.items():
        names.setdefault(reason, []).append(name or "the model itself")
    return [
        f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {reason}"
        for reason, found in names.items()
    ]


def warn_left(left: Mapping[str, str]) -> None:
    """A UserWarning, at the caller of `patch`, of modules that could be expected to be patched."""
    if left:
        warnings.warn("qkrope leaves as they are: " + "; ".join(grouped(left)), stacklevel=3)


@contextmanager
def block(
    patch: Callable[..., Report],
    unpatch: Callable[[Any], int],
    model: nn.Module,
    rounding: Rounding,
) -> Iterator[Report]:
    """The body of each ``patched``."""
    report = patch(model, rounding=rounding)
    try:
        yield report
    finally:
        unpatch(model)
