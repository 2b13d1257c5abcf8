"""The oracle's angles: from positions, or a caller's table, to the cosine and sine of each pair."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from . import angles
from ._limits import integer
from .scaling import MAX_LENGTH
from .spec import Spec

__all__ = ["CosSin", "Positions", "Source", "cos_sin_of_positions", "fractions", "resolve"]

Table = tuple[Tensor, Tensor]
Positions = Tensor | tuple[Tensor | None, Tensor | None] | None
CosSin = Table | tuple[Table | None, Table | None] | None


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
    positions: tuple[Tensor | None, Tensor | None]  # q's, k's
    tables: tuple[Table | None, Table | None]
    inv_freq: tuple[float, ...]
    attention_factor: float
    cache: Tensor | None
    rotate_from: int
    rotate_to: int | None

    @property
    def has_table(self) -> bool:
        """Whether cos and sin are the caller's, so that they may be of any size."""
        return self.cache is not None or self.tables != (None, None)

    def tokens(self, name: str, lead: torch.Size) -> slice | None:
        """The rotated tokens, along the last leading dimension; None for all of them."""
        start, stop = self.rotate_from, self.rotate_to
        if start == 0 and stop is None:
            return None
        count = lead[-1] if lead else 0
        stop = count if stop is None else stop
        if not lead or not start <= stop <= count:
            raise ValueError(
                f"rotate_from, rotate_to: expected a range within the {count} tokens of {name}, "
                f"got {start}, {stop}"
            )
        return slice(start, stop)

    def cos_sin(self, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Cosine and sine of both channels of each rotated pair of q or k.

        shape: that of q or k, [*lead, heads, head_dim]. Returns two float64 tensors
        [*lead, heads or 1, pairs, 2], where lead has the rotated tokens only.
        """
        lead, heads, side = shape[:-2], shape[-2], "qk".index(name)
        tokens = self.tokens(name, lead)
        table = self.tables[side]
        if table is None:
            if self.tables != (None, None):
                raise ValueError(f"cos_sin: None for {name}, expected its (cos, sin)")
            table = self._of_positions(self.positions[side], lead, tokens)
        if tokens is not None:
            lead = torch.Size((*lead[:-1], tokens.stop - tokens.start))
        wide = []
        for what, value in zip(("cos", "sin"), table, strict=True):
            per_head = value.ndim == len(shape)
            pairs = self._of_pairs(what, value if per_head else value.unsqueeze(-2))
            full = (*lead, heads if per_head else 1, *pairs.shape[-2:])
            try:
                wide.append(torch.broadcast_to(pairs, full))
            except RuntimeError:
                raise ValueError(
                    f"{what}: shape {tuple(value.shape)} does not broadcast to the tokens and "
                    f"heads {full[:-2]} of {name}"
                ) from None
        turns_back = self.spec.rope is not None and self.spec.rope.reverse and self.has_table
        return wide[0], -wide[1] if turns_back else wide[1]  # frequencies have their sign already

    def _of_positions(
        self, positions: Tensor | None, lead: torch.Size, tokens: slice | None
    ) -> tuple[Tensor, Tensor]:
        """[*lead, pairs] of the rotated tokens."""
        if positions is None:
            raise ValueError("positions: None, expected integers: this spec rotates")
        rows = None if self.cache is None else self.cache.shape[0]
        positions = _checked_positions(positions, lead, self.spec.position_axes, tokens, rows)
        if self.cache is None:
            cos, sin = cos_sin_of_positions(positions, self.inv_freq)
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        else:
            cos, sin = self.cache.double()[positions.long()].chunk(2, dim=-1)
        if self.spec.position_axes:
            cos, sin = (
                _of_own_axis(cos, self.spec.pair_axes),
                _of_own_axis(sin, self.spec.pair_axes),
            )
        return cos, sin

    def _of_pairs(self, name: str, table: Tensor) -> Tensor:
        """[..., pairs, 2], from one value a pair or one a rotated channel, in their order."""
        rot, width = self.spec.rotary_dim, table.shape[-1]
        table = table.double()
        if width == rot // 2:
            return table[..., None].expand(*table.shape, 2)
        if width != rot:
            raise ValueError(f"{name}: last dimension {width}, expected {rot // 2} or {rot}")
        channels = sorted(channel for pair in self.spec.output_pairs for channel in pair)
        at = [[channels.index(c) for c in pair] for pair in self.spec.output_pairs]
        return table[..., torch.tensor(at, device=table.device)]


def _of_own_axis(values: Tensor, axes: Sequence[int]) -> Tensor:
    """[A, ..., pairs] to [..., pairs]: each pair's value at the position of its own axis."""
    return torch.stack([values[axis, ..., i] for i, axis in enumerate(axes)], dim=-1)


def _checked_positions(
    positions: Tensor, lead: torch.Size, axes: int, tokens: slice | None, rows: int | None
) -> Tensor:
    """Positions of the rotated tokens, [*lead] or [A, *lead]."""
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: {positions.dtype}, expected int32 or int64")
    shape = tuple(positions.shape)
    if axes and shape[:1] != (axes,):
        raise ValueError(f"positions: shape {shape}, expected ({axes}, ...): an axis first")
    try:
        if axes:
            positions = torch.stack([torch.broadcast_to(p, lead) for p in positions])
        else:
            positions = torch.broadcast_to(positions, lead)
    except RuntimeError:
        raise ValueError(f"positions: shape {shape} does not broadcast to {tuple(lead)}") from None
    if tokens is not None:
        positions = positions[..., tokens]
    wide = positions.long()
    if wide.numel() and not -(2**31) <= wide.min() <= wide.max() < 2**31:
        raise ValueError("positions: a value outside [-2^31, 2^31)")
    if rows is not None and wide.numel() and not 0 <= wide.min() <= wide.max() < rows:
        raise ValueError(f"positions: outside the {rows} rows of cos_sin_cache")
    return positions


def _two_tables(cos_sin: CosSin) -> tuple[Table | None, Table | None]:
    """q's and k's (cos, sin), from one for both or one for each."""
    if cos_sin is None:
        return None, None
    if any(isinstance(item, Tensor) for item in cos_sin):
        both = cast(Table, cos_sin)
        return both, both
    q, k = cast("tuple[Table | None, Table | None]", cos_sin)
    return q, k


def resolve(
    spec: Spec,
    positions: Positions,
    *,
    cos_sin: CosSin = None,
    cos_sin_cache: Tensor | None = None,
    inv_freq: Tensor | None = None,
    seq_len: int | None = None,
    rotate_from: int = 0,
    rotate_to: int | None = None,
) -> Source:
    """Check what says the angles, and read the frequencies if they are needed."""
    given = {"cos_sin": cos_sin, "cos_sin_cache": cos_sin_cache, "inv_freq": inv_freq}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected at most one of them")
    start = integer("rotate_from", rotate_from, 0, MAX_LENGTH)
    stop = None if rotate_to is None else integer("rotate_to", rotate_to, 0, MAX_LENGTH)
    names += ["rotate_from"] if start else []
    names += [] if stop is None else ["rotate_to"]
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
        sign = -1.0 if spec.rope is not None and spec.rope.reverse else 1.0
        frequencies = tuple((sign * inv_freq.double()).tolist())
    if cos_sin_cache is not None and (
        cos_sin_cache.ndim != 2 or cos_sin_cache.shape[1] != spec.rotary_dim
    ):
        got = tuple(cos_sin_cache.shape)
        raise ValueError(f"cos_sin_cache: shape {got}, expected (rows, {spec.rotary_dim})")
    own = positions if isinstance(positions, tuple) else (positions, positions)
    tables = _two_tables(cos_sin)
    return Source(spec, own, tables, frequencies, attention_factor, cos_sin_cache, start, stop)
