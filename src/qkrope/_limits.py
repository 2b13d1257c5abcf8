"""Argument checks of the value classes: one message shape, ``name: expected ..., got ...``."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, NoReturn

__all__ = [
    "MAX_COLUMNS",
    "MAX_HEAD_DIM",
    "choice",
    "flag",
    "instance",
    "integer",
    "integers",
    "real",
    "reals",
    "refuse",
    "short_repr",
    "show",
]

MAX_HEAD_DIM = 1024  # twin of QK_MAX_HEAD_DIM in native/params.h
MAX_COLUMNS = 1 << 30  # of a packed row

_FLOAT32_MAX = 3.4028234663852886e38


def show(value: object) -> str:
    """A short printable form of a value the caller passed, with its type."""
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def short_repr(value: Any) -> str:
    """The repr of a dataclass without the fields that have their defaults."""
    shown = (
        f"{field.name}={item!r}"
        for field in dataclasses.fields(value)
        if (item := getattr(value, field.name)) != field.default
    )
    return f"{type(value).__name__}({', '.join(shown)})"


def refuse(kind: type[Exception], name: str, expected: str, value: object) -> NoReturn:
    """Raise ``kind`` with the message every value class uses."""
    raise kind(f"{name}: expected {expected}, got {show(value)}")


def integer(name: str, value: Any, low: int, high: int, *, even: bool = False) -> int:
    """An int in [low, high]; a bool is not an int, numpy integers are."""
    expected = f"an {'even ' if even else ''}int in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        refuse(TypeError, name, expected, value)
    number = int(value)
    if not low <= number <= high or (even and number % 2):
        refuse(ValueError, name, expected, value)
    return number


def integers(
    name: str, value: Any, count: tuple[int, int], high: int, *, even: bool = False
) -> tuple[int, ...]:
    """A list or tuple of so many ints, each positive and at most ``high``."""
    expected = f"{count[0]} to {count[1]} ints"
    if not isinstance(value, list | tuple):
        refuse(TypeError, name, f"a list or tuple of {expected}", value)
    if not count[0] <= len(value) <= count[1]:
        refuse(ValueError, name, expected, value)
    low = 2 if even else 1
    return tuple(integer(f"{name}[{i}]", v, low, high, even=even) for i, v in enumerate(value))


def real(name: str, value: Any, *, low: float | None = None, above: float | None = None) -> float:
    """A finite float within float32's range, >= low or > above; NaN and inf are refused."""
    bound = "" if low is None else f" >= {low:g}"
    bound = bound if above is None else f" > {above:g}"
    expected = f"a finite number{bound}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(TypeError, name, expected, value)
    try:
        number = float(value) + 0.0  # -0.0 becomes 0.0: one value, one canonical text
    except OverflowError:
        number = math.inf
    if not abs(number) <= _FLOAT32_MAX:
        refuse(ValueError, name, expected + " that float32 can hold", value)
    if (low is not None and number < low) or (above is not None and not number > above):
        refuse(ValueError, name, expected, value)
    return number


def reals(name: str, value: Any, *, above: float) -> tuple[float, ...]:
    """A non-empty list or tuple of numbers, each > above."""
    if not isinstance(value, list | tuple):
        refuse(TypeError, name, "a list or tuple of numbers", value)
    if not value:
        refuse(ValueError, name, "at least one number", value)
    return tuple(real(f"{name}[{i}]", item, above=above) for i, item in enumerate(value))


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    """One of the given words."""
    expected = "one of " + ", ".join(map(repr, options))
    if not isinstance(value, str):
        refuse(TypeError, name, expected, value)
    if value not in options:
        refuse(ValueError, name, expected, value)
    return options[options.index(value)]


def flag(name: str, value: Any) -> bool:
    """A bool, and nothing that merely behaves like one."""
    if not isinstance(value, bool):
        refuse(TypeError, name, "a bool", value)
    return value


def instance(name: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """An instance of ``kind``, or None where that is allowed."""
    if not (isinstance(value, kind) or (optional and value is None)):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        tail = " or None" if optional else ""
        refuse(TypeError, name, f"{article} {kind.__name__}{tail}", value)
