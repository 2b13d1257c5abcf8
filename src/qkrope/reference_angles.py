"""The oracle's angles: from positions, or a caller's table, to a cosine and sine a channel."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import angles
from .spec import Spec

__all__ = ["CosSin", "Positions", "Source", "cos_sin_of_positions", "fractions", "resolve"]

Positions = Tensor | tuple[Tensor, Tensor] | None
CosSin = tuple[Tensor, Tensor] | None


@functools.lru_cache(maxsize=256)
def fractions(inv_freq: tuple[float, ...]) -> tuple[int, ...]:
    """Each frequency as a 64-bit fraction of a turn a position, read as a signed word."""
    words = (angles.frac(f) for f in inv_freq)
    return tuple(w - (1 << 64) if w >= 1 << 63 else w for w in words)


def cos_sin_of_positions(positions: Tensor, inv_freq: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * inv_freq, [..., pairs], within 1e-15 at every position.

    Whole turns do not matter, so the product of the integers may wrap: an int64 product is taken
    modulo 2^64, which here is modulo one turn, and what is left is a signed part of a turn.
    """
    frac = torch.tensor(fractions(inv_freq), dtype=torch.int64, device=positions.device)
    turns = (positions.to(torch.int64)[..., None] * frac).double() * 2.0**-64
    return (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()


@dataclass(frozen=True)
class Source:
    """Where the angles of one call come from."""

    spec: Spec
    q_positions: Tensor | None
    k_positions: Tensor | None
    inv_freq: tuple[float, ...]
    attention_factor: float
    cos_sin: CosSin
    cache: Tensor | None

    def channel_cos_sin(self, lead: torch.Size, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every rotated channel, float64, [*lead, 1, rotary_dim]."""
        pairs = self.spec.rotary_dim // 2
        cos_sin = self.cos_sin
        if cos_sin is None:
            if positions is None:
                raise ValueError("positions: None, expected integers: this spec rotates")
            positions = _checked_positions(positions, lead)
            if self.cache is not None:
                rows = self.cache.shape[0]
                if positions.numel() and not 0 <= positions.min() <= positions.max() < rows:
                    raise ValueError(f"positions: outside the {rows} rows of cos_sin_cache")
                row = self.cache.double()[positions.long()]
                cos_sin = row[..., :pairs], row[..., pairs:]
            else:
                cos, sin = cos_sin_of_positions(positions, self.inv_freq)
                cos_sin = cos * self.attention_factor, sin * self.attention_factor
        cos, sin = (self._widen(name, t) for name, t in zip(("cos", "sin"), cos_sin, strict=True))
        cos, sin = (torch.broadcast_to(t, (*lead, t.shape[-1])).unsqueeze(-2) for t in (cos, sin))
        return cos, sin

    def _widen(self, name: str, table: Tensor) -> Tensor:
        """One value a pair becomes one a channel."""
        rot, width = self.spec.rotary_dim, table.shape[-1]
        table = table.double()
        if width == rot:
            return table
        if width != rot // 2:
            raise ValueError(f"{name}: last dimension {width}, expected {rot // 2} or {rot}")
        if self.spec.rope is not None and self.spec.rope.pairing == "interleaved":
            return table.repeat_interleave(2, dim=-1)
        return torch.cat((table, table), dim=-1)


def _checked_positions(positions: Tensor, lead: torch.Size) -> Tensor:
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: {positions.dtype}, expected int32 or int64")
    wide = positions.long()
    if wide.numel() and not -(2**31) <= wide.min() <= wide.max() < 2**31:
        raise ValueError("positions: a value outside [-2^31, 2^31)")
    try:
        return torch.broadcast_to(positions, lead)
    except RuntimeError:
        shape = tuple(positions.shape)
        raise ValueError(f"positions: shape {shape} does not broadcast to {tuple(lead)}") from None


def resolve(
    spec: Spec,
    positions: Positions,
    cos_sin: CosSin,
    cos_sin_cache: Tensor | None,
    inv_freq: Tensor | None,
    seq_len: int | None,
) -> Source:
    """Check what says the angles, and read the frequencies if they are needed."""
    given = {"cos_sin": cos_sin, "cos_sin_cache": cos_sin_cache, "inv_freq": inv_freq}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected at most one of them")
    if names and spec.rope is None:
        raise ValueError(f"{names[0]}: given, but the spec has rope=None")
    frequencies: tuple[float, ...] = ()
    attention_factor = 1.0
    if spec.rope is not None and cos_sin is None and cos_sin_cache is None:
        resolved = angles.resolve(spec, seq_len)
        frequencies, attention_factor = tuple(resolved.inv_freq), resolved.attention_factor
    pairs = spec.rotary_dim // 2
    if inv_freq is not None:
        if tuple(inv_freq.shape) != (pairs,):
            raise ValueError(f"inv_freq: shape {tuple(inv_freq.shape)}, expected ({pairs},)")
        frequencies = tuple(inv_freq.double().tolist())
    if cos_sin_cache is not None and (
        cos_sin_cache.ndim != 2 or cos_sin_cache.shape[1] != spec.rotary_dim
    ):
        got = tuple(cos_sin_cache.shape)
        raise ValueError(f"cos_sin_cache: shape {got}, expected (rows, {spec.rotary_dim})")
    q_pos, k_pos = positions if isinstance(positions, tuple) else (positions, positions)
    return Source(spec, q_pos, k_pos, frequencies, attention_factor, cos_sin, cos_sin_cache)
