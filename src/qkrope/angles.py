"""The angle of every position: inverse frequencies of each scaling, and their fixed-point form.

A frequency becomes ``frac``, its fraction of a turn in units of 2^-64. The angle at position p is
p * frac mod 2^64, exact in integers, so one table serves every position, and nothing outside this
module knows about theta or scalings.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from ._limits import integer, refuse
from .scaling import MAX_LENGTH, NTK, DynamicNTK, Linear, Llama3, LongRoPE, YaRN
from .spec import Rope, Spec

__all__ = ["Angles", "frac", "frac_words", "resolve", "split"]

# floor(2^1280 / (2 pi)). A float64 is m * 2^e with |m| < 2^53 and e <= 971, so the bits left out
# change m * 2^(e + 64) / (2 pi) by less than 2^-192: no float64 comes that near to a rounding tie.
_TURN_BITS = 1280
_TURN = int(
    "28be60db9391054a7f09d5f47d4d377036d8a5664f10e4107f9458eaf7aef1586dc91b8e909374b8"
    "01924bba827464873f877ac72c4a69cfba208d7d4baed1213a671c09ad17df904e64758e60d4ce7d"
    "272117e2ef7e4a0ec7fe25fff7816603fbcbc462d6829b47db4d9fb3c9f2c26dd3d18fd9a797fa8b"
    "5d49eeb1faf97c5ecf41ce7de294a4ba9afed7ec47e357421580cc11bf1edaeafc33ef0826bd0d87",
    16,
)
_WORD = 1 << 32


class Angles(NamedTuple):
    """Radians per position of each rotated pair, and the factor of cos and sin.

    Pair i turns by positions of axis ``Spec.pair_axes[i]``; a Rope's ``reverse`` is in the signs.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float


def frac(inv_freq: float) -> int:
    """``round(inv_freq / (2 pi) * 2^64) mod 2^64`` of any finite float, exact to the last bit."""
    if not math.isfinite(inv_freq):
        refuse(ValueError, "inv_freq", "a finite number", inv_freq)
    numerator, denominator = inv_freq.as_integer_ratio()
    shift = _TURN_BITS - 64 + denominator.bit_length() - 1  # the denominator is a power of two
    turns = (abs(numerator) * _TURN + (1 << (shift - 1))) >> shift
    return (turns if numerator >= 0 else -turns) % (1 << 64)


def split(value: int) -> tuple[int, int]:
    """``(lo, hi)`` as signed 32-bit ints with ``value = hi * 2^32 + lo`` mod 2^64.

    lo lies in [-2^31, 2^31), so one signed high multiply carries negative positions too.
    """
    lo = _signed(value % _WORD)
    return lo, _signed((value - lo) // _WORD % _WORD)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


def frac_words(inv_freq: Iterable[float]) -> array[int]:
    """The table a kernel reads: lo, hi of every frequency in turn, as int32."""
    return array("i", (word for value in inv_freq for word in split(frac(value))))


def resolve(spec: Spec, seq_len: int | None = None) -> Angles:
    """The angles of a Spec, in float64.

    ``seq_len``, else the Spec's ``max_position_embeddings``, is the sequence length that
    ``DynamicNTK`` and ``LongRoPE`` depend on (ValueError where they have neither); the other
    scalings ignore it. Values are cached.
    """
    if seq_len is not None:
        seq_len = integer("seq_len", seq_len, 0, MAX_LENGTH)
    if spec.rope is None:
        return Angles((), 1.0)
    if not isinstance(spec.rope.scaling, DynamicNTK | LongRoPE):
        seq_len = None  # one cache entry whatever the length
    return _resolve(spec.rope, spec.rotary_dim, spec.max_position_embeddings, seq_len)


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a rule reads beside its own numbers."""

    theta: float
    dim: int  # the denominator of the exponents: freq_dim, which is the rotary dim by default
    pairs: int
    longest: int | None  # Spec.max_position_embeddings
    seq_len: int | None

    def powers(self, theta: float) -> list[float]:
        """``theta ** (-2 i / dim)`` for each pair i."""
        return [theta ** (-2 * i / self.dim) for i in range(self.pairs)]

    def stretched(self, ratio: float) -> list[float]:
        """The powers of the NTK-aware base."""
        return self.powers(self.theta * ratio ** (self.dim / (self.dim - 2)))

    def length(self, owner: str) -> int:
        length = self.longest if self.seq_len is None else self.seq_len
        if length is None:
            _missing(owner, "seq_len or Spec.max_position_embeddings")
        return length


_Result = tuple[list[float], float]


@lru_cache(maxsize=1024)
def _resolve(rope: Rope, dim: int, longest: int | None, seq_len: int | None) -> Angles:
    inv_freq: list[float] = []
    attention_factor = 1.0
    try:
        for width in rope.axes_dim or (dim,):  # an axis, or all axes that share their frequencies
            ask = _Ask(rope.theta, rope.freq_dim or width, width // 2, longest, seq_len)
            some, attention_factor = _RULES[type(rope.scaling)](rope.scaling, ask)
            inv_freq += some
    except ArithmeticError:  # overflow, or a base that became 0
        inv_freq = [math.inf]
    if not all(map(math.isfinite, (*inv_freq, attention_factor))):
        refuse(ValueError, "Rope", "theta and scaling whose frequencies float64 can hold", rope)
    return Angles(tuple(-f if rope.reverse else f for f in inv_freq), attention_factor)


def _missing(owner: str, names: str) -> NoReturn:
    raise ValueError(f"{owner}: expected {names}, got none of them")


def _default(_: None, ask: _Ask) -> _Result:
    return ask.powers(ask.theta), 1.0


def _linear(s: Linear, ask: _Ask) -> _Result:
    return [f / s.factor for f in ask.powers(ask.theta)], 1.0


def _ntk(s: NTK, ask: _Ask) -> _Result:
    return ask.stretched(s.factor), 1.0


def _dynamic_ntk(s: DynamicNTK, ask: _Ask) -> _Result:
    trained = s.original_max_position_embeddings
    if trained is None:
        trained = ask.longest
    if trained is None:
        _missing("DynamicNTK", "original_max_position_embeddings or Spec.max_position_embeddings")
    n = max(ask.length("DynamicNTK"), trained)
    return ask.stretched(s.factor * n / trained - (s.factor - 1)), 1.0


def _yarn(s: YaRN, ask: _Ask) -> _Result:
    low, high = _yarn_range(s, ask)
    if low == high:
        high += 0.001
    inv_freq = []
    for i, f in enumerate(ask.powers(ask.theta)):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        inv_freq.append(f / s.factor * ramp + f * (1.0 - ramp))
    if s.attention_factor is not None:
        return inv_freq, s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return inv_freq, _mscale(s.factor, s.mscale) / _mscale(s.factor, s.mscale_all_dim)
    return inv_freq, _mscale(s.factor, 1.0)


def _yarn_range(s: YaRN, ask: _Ask) -> tuple[float, float]:
    """The pair indices that turn beta_fast and beta_slow times within the trained length."""
    trained = s.original_max_position_embeddings
    if s.low is not None and s.high is not None:
        return s.low, s.high
    assert trained is not None  # YaRN.__post_init__ refuses it

    def index(turns: float) -> float:
        ratio = trained / (turns * 2 * math.pi)
        return ask.dim * math.log(ratio) / (2 * math.log(ask.theta))

    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, ask.dim - 1)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _llama3(s: Llama3, ask: _Ask) -> _Result:
    inv_freq = []
    for f in ask.powers(ask.theta):
        turns = s.original_max_position_embeddings * f / (2 * math.pi)
        width = s.high_freq_factor - s.low_freq_factor
        if width:
            keep = min(max((turns - s.low_freq_factor) / width, 0.0), 1.0)
        else:  # no ramp: a step (Llama 4 Scout)
            keep = float(turns > s.high_freq_factor)
        inv_freq.append(f / s.factor * (1.0 - keep) + f * keep)
    return inv_freq, 1.0


def _longrope(s: LongRoPE, ask: _Ask) -> _Result:
    trained = s.original_max_position_embeddings
    ext = s.long_factor if ask.length("LongRoPE") > trained else s.short_factor
    inv_freq = [f / e for f, e in zip(ask.powers(ask.theta), ext, strict=True)]
    if s.attention_factor is not None:
        return inv_freq, s.attention_factor
    factor = s.factor
    if factor is None and ask.longest is not None:
        factor = ask.longest / trained
    if factor is None:
        _missing("LongRoPE", "attention_factor, factor or Spec.max_position_embeddings")
    if factor <= 1.0:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1.0 + math.log(factor) / math.log(trained))


_RULES: dict[type, Callable[[Any, _Ask], _Result]] = {
    type(None): _default,
    Linear: _linear,
    NTK: _ntk,
    DynamicNTK: _dynamic_ntk,
    YaRN: _yarn,
    Llama3: _llama3,
    LongRoPE: _longrope,
}
