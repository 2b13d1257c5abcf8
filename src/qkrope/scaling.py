"""Length-extension rules of rotary embeddings, as values.

Each class holds the numbers of one rule under the names Hugging Face configs use; what they do to
the frequencies is in ``angles.py``. Every limit is checked at construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._limits import flag, integer, real, reals, refuse

__all__ = ["MAX_LENGTH", "NTK", "DynamicNTK", "Linear", "Llama3", "LongRoPE", "Scaling", "YaRN"]

MAX_LENGTH = 1 << 31  # positions are int32 values


class Scaling:
    """Base of every scaling: a frozen, hashable value."""

    __slots__ = ()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def check_rope(self, theta: float, dim: int, pairs: int) -> None:
        """Raise ValueError where this rule has no meaning for a theta, rotary dim or pairs."""


def _length(name: str, value: Any) -> int:
    return integer(name, value, 1, MAX_LENGTH)


def _optional_factor(name: str, value: Any) -> float | None:
    return None if value is None else real(name, value, above=0.0)


def _needs_four(owner: str, dim: int) -> None:
    if dim < 4:  # the exponent dim / (dim - 2)
        raise ValueError(f"{owner}: expected a rotary dim >= 4, got {dim}")


@dataclass(frozen=True, slots=True)
class Linear(Scaling):
    """Position interpolation: ``inv_freq / factor``."""

    factor: float

    def __post_init__(self) -> None:
        self._set(factor=real("Linear.factor", self.factor, above=0.0))


@dataclass(frozen=True, slots=True)
class NTK(Scaling):
    """Static NTK-aware scaling: ``theta * factor ** (dim / (dim - 2))``."""

    factor: float

    def __post_init__(self) -> None:
        self._set(factor=real("NTK.factor", self.factor, above=0.0))

    def check_rope(self, theta: float, dim: int, pairs: int) -> None:
        """The exponent needs a rotary dim of at least 4."""
        _needs_four("NTK", dim)


@dataclass(frozen=True, slots=True)
class DynamicNTK(Scaling):
    """Hugging Face 'dynamic': with L the trained length and n = max(sequence length, L),
    ``theta * (factor * n / L - (factor - 1)) ** (dim / (dim - 2))``.

    ``original_max_position_embeddings`` is L; None takes the Spec's ``max_position_embeddings``.
    """

    factor: float
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        self._set(factor=real("DynamicNTK.factor", self.factor, above=0.0))
        if (length := self.original_max_position_embeddings) is not None:
            name = "original_max_position_embeddings"
            self._set(original_max_position_embeddings=_length(f"DynamicNTK.{name}", length))

    def check_rope(self, theta: float, dim: int, pairs: int) -> None:
        """The exponent needs a rotary dim of at least 4."""
        _needs_four("DynamicNTK", dim)


@dataclass(frozen=True, slots=True, repr=False)
class YaRN(Scaling):
    """YaRN: a ramp over the pair index i blends ``inv_freq`` and ``inv_freq / factor``.

    ``inv_freq[i] * (1 - r) + inv_freq[i] / factor * r``, r = clamp((i - low) / (high - low), 0, 1)
    where low and high follow from ``beta_fast``, ``beta_slow`` and the trained length
    ``original_max_position_embeddings`` (floor and ceil of them where ``truncate``), or are given
    outright: see ``YaRN.from_ramp``. cos and sin are multiplied by the attention factor:
    ``attention_factor``, else m(mscale) / m(mscale_all_dim) where both are set and not 0, else
    m(1), with m(s) = 0.1 * s * ln(factor) + 1 (1 where factor <= 1).
    """

    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_ramp(cls, factor: float, low: float, high: float, attention_factor: float) -> YaRN:
        """The TensorRT-LLM and SGLang form: the ramp's ends are given as pair indices.

        low == high is served as high = low + 0.001, as there.
        """
        return cls(factor, attention_factor=attention_factor, low=low, high=high)

    def __post_init__(self) -> None:
        self._set(
            factor=real("YaRN.factor", self.factor, above=0.0),
            beta_fast=real("YaRN.beta_fast", self.beta_fast, above=0.0),
            beta_slow=real("YaRN.beta_slow", self.beta_slow, above=0.0),
            truncate=flag("YaRN.truncate", self.truncate),
            attention_factor=_optional_factor("YaRN.attention_factor", self.attention_factor),
        )
        for name in ("mscale", "mscale_all_dim"):
            if (value := getattr(self, name)) is not None:
                self._set(**{name: real(f"YaRN.{name}", value, low=0.0)})
        if self.beta_fast < self.beta_slow:
            expected = f"a number >= beta_slow = {self.beta_slow:g}"
            refuse(ValueError, "YaRN.beta_fast", expected, self.beta_fast)
        name = "YaRN.original_max_position_embeddings"
        if self.low is None and self.high is None:
            length = _length(name, self.original_max_position_embeddings)
            self._set(original_max_position_embeddings=length)
            return
        self._set(low=real("YaRN.low", self.low), high=real("YaRN.high", self.high))
        if self.attention_factor is None:
            refuse(TypeError, "YaRN.attention_factor", "a number beside low and high", None)
        for name in ("original_max_position_embeddings", "mscale", "mscale_all_dim"):
            if (value := getattr(self, name)) is not None:
                refuse(ValueError, f"YaRN.{name}", "None beside low and high", value)
        if (self.beta_fast, self.beta_slow, self.truncate) != (32.0, 1.0, True):
            got = (self.beta_fast, self.beta_slow, self.truncate)
            name = "YaRN.beta_fast, beta_slow, truncate"
            refuse(ValueError, name, "their defaults beside low and high", got)

    def check_rope(self, theta: float, dim: int, pairs: int) -> None:
        """The correction range divides by ln(theta)."""
        if self.low is None and theta == 1.0:
            raise ValueError("Rope.theta: expected a number other than 1 with YaRN, got 1.0")

    def __repr__(self) -> str:
        if self.low is not None:
            return (
                f"YaRN.from_ramp(factor={self.factor!r}, low={self.low!r}, high={self.high!r}, "
                f"attention_factor={self.attention_factor!r})"
            )
        names = [name for name in self.__slots__ if name not in ("low", "high")]
        return "YaRN(" + ", ".join(f"{name}={getattr(self, name)!r}" for name in names) + ")"


@dataclass(frozen=True, slots=True)
class Llama3(Scaling):
    """Llama 3.1: wavelengths above L / low_freq_factor are divided by ``factor``, those below
    L / high_freq_factor kept, the ones between blended (none where both factors are the same, as
    in Llama 4 Scout); L is the trained length.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        length = self.original_max_position_embeddings
        self._set(
            factor=real("Llama3.factor", self.factor, above=0.0),
            low_freq_factor=real("Llama3.low_freq_factor", self.low_freq_factor, above=0.0),
            high_freq_factor=real("Llama3.high_freq_factor", self.high_freq_factor, above=0.0),
            original_max_position_embeddings=_length(
                "Llama3.original_max_position_embeddings", length
            ),
        )
        if self.high_freq_factor < self.low_freq_factor:
            expected = f"a number >= low_freq_factor = {self.low_freq_factor:g}"
            refuse(ValueError, "Llama3.high_freq_factor", expected, self.high_freq_factor)


@dataclass(frozen=True, slots=True)
class LongRoPE(Scaling):
    """LongRoPE: ``inv_freq[i] / long_factor[i]`` for sequences longer than
    ``original_max_position_embeddings``, else ``inv_freq[i] / short_factor[i]``.

    cos and sin are multiplied by ``attention_factor``, else by sqrt(1 + ln(f) / ln(L)) with
    f = ``factor``, else the Spec's ``max_position_embeddings`` / L (1 where f <= 1).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        name = "LongRoPE.original_max_position_embeddings"
        self._set(
            short_factor=reals("LongRoPE.short_factor", self.short_factor, above=0.0),
            long_factor=reals("LongRoPE.long_factor", self.long_factor, above=0.0),
            original_max_position_embeddings=_length(name, self.original_max_position_embeddings),
            factor=_optional_factor("LongRoPE.factor", self.factor),
            attention_factor=_optional_factor("LongRoPE.attention_factor", self.attention_factor),
        )
        if self.original_max_position_embeddings < 2:  # ln(L) divides
            refuse(ValueError, name, f"an int in [2, {MAX_LENGTH}]", 1)
        if len(self.short_factor) != len(self.long_factor):
            expected = f"as many numbers as short_factor = {len(self.short_factor)}"
            refuse(ValueError, "LongRoPE.long_factor", expected, len(self.long_factor))

    def check_rope(self, theta: float, dim: int, pairs: int) -> None:
        """One factor for each rotated pair."""
        if len(self.short_factor) != pairs:
            raise ValueError(
                f"LongRoPE.short_factor: expected {pairs} numbers for rotary dim {2 * pairs}, "
                f"got {len(self.short_factor)}"
            )
