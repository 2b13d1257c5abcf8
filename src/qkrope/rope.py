"""What rotates a head, as a frozen value, and which channels and axes its pairs are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ._limits import (
    MAX_HEAD_DIM,
    choice,
    flag,
    instance,
    integer,
    integers,
    real,
    refuse,
    short_repr,
)
from .scaling import Scaling

__all__ = ["MAX_AXES", "PAIRINGS", "Pair", "Rope"]

MAX_AXES = 4
PAIRINGS = ("half", "interleaved", "block_half")

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, repr=False)
class Rope:
    """The rotation: ``dim`` channels of a head, from ``offset`` on, turn by position * inv_freq.

    ``inv_freq[i] = theta ** (-2 * i / freq_dim)`` before ``scaling``, for pairs i < dim / 2;
    ``dim=None`` is the whole head, ``freq_dim=None`` is dim ("proportional" types: the head_dim;
    scalings then read it for the rotary dim too). Pair i is, counted from ``offset``::

        "half"         (i, i + dim / 2), NeoX; with pair_distance (i, i + pair_distance)
        "interleaved"  (2i, 2i + 1), GPT-J
        "block_half"   half-split in each half of the rotary channels (Gemma 4 ViT):
                       (i, i + dim / 4) for i < dim / 4, then the same from dim / 2 on

    ``output_pairing="half"`` reads interleaved pairs and writes them to (i, i + dim / 2), as
    Hugging Face's MLA does. ``reverse`` rotates by -position.

    Several axes: positions are ``[A, ...]``, and each pair turns by the position of its own axis.
    ``mrope_section`` gives the pairs that each of 2 to 4 axes takes of one common set of
    frequencies, in order ([t..., h..., w...]) or, with ``mrope_interleaved``, with n axes: pair i
    takes axis a >= 1 where i % n == a and i < n * section[a], else axis 0 (Qwen3-VL).
    ``axes_dim`` gives the channels that each axis takes, in order, each with frequencies of its own
    ``theta ** (-2 * j / axes_dim[a])`` (FLUX).
    """

    dim: int | None = None
    theta: float = 10000.0
    pairing: str = "half"
    scaling: Scaling | None = None
    offset: int = 0
    pair_distance: int | None = None
    freq_dim: int | None = None
    reverse: bool = False
    output_pairing: str | None = None
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    axes_dim: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("dim", "freq_dim"):
            if (value := getattr(self, name)) is not None:
                put(self, name, integer(f"Rope.{name}", value, 2, MAX_HEAD_DIM, even=True))
        put(self, "theta", real("Rope.theta", self.theta, above=0.0))
        put(self, "pairing", choice("Rope.pairing", self.pairing, PAIRINGS))
        instance("Rope.scaling", self.scaling, Scaling, optional=True)
        put(self, "offset", integer("Rope.offset", self.offset, 0, MAX_HEAD_DIM - 2, even=True))
        if (distance := self.pair_distance) is not None:
            distance = integer("Rope.pair_distance", distance, 1, MAX_HEAD_DIM - 1)
            put(self, "pair_distance", distance)
            self._only("pair_distance", "half")
        flag("Rope.reverse", self.reverse)
        if self.output_pairing is not None:
            choice("Rope.output_pairing", self.output_pairing, ("half",))
            self._only("output_pairing", "interleaved")
        self._check_axes()
        if self.dim is not None:
            self.check(self.dim)
            # What only repeats the default is the default: one value, one text.
            if self.pair_distance == self.dim // 2:
                put(self, "pair_distance", None)
            if self.freq_dim == self.dim:
                put(self, "freq_dim", None)

    def _only(self, name: str, pairing: str) -> None:
        if self.pairing != pairing:
            expected = f"None with pairing={self.pairing!r} (it goes with {pairing!r})"
            refuse(ValueError, f"Rope.{name}", expected, getattr(self, name))

    def _check_axes(self) -> None:
        put = object.__setattr__
        flag("Rope.mrope_interleaved", self.mrope_interleaved)
        for name, even in (("mrope_section", False), ("axes_dim", True)):
            if (value := getattr(self, name)) is not None:
                value = integers(f"Rope.{name}", value, (2, MAX_AXES), MAX_HEAD_DIM, even=even)
                put(self, name, value)
        if self.mrope_section is None and self.mrope_interleaved:
            refuse(ValueError, "Rope.mrope_interleaved", "False without mrope_section", True)
        if self.axes_dim is None:
            return
        for name in ("mrope_section", "freq_dim", "scaling"):
            if (value := getattr(self, name)) is not None:
                refuse(ValueError, f"Rope.{name}", "None beside axes_dim", value)

    def __repr__(self) -> str:
        return short_repr(self)

    def check(self, dim: int, head_dim: int | None = None) -> None:
        """Raise ValueError where this rope has no meaning for a rotary dim or a head."""
        if self.pairing == "block_half" and dim % 4:
            refuse(ValueError, "Rope.dim", "a multiple of 4 with pairing='block_half'", dim)
        if (distance := self.pair_distance) is not None and distance < dim // 2:
            refuse(ValueError, "Rope.pair_distance", f"at least dim / 2 = {dim // 2}", distance)
        if self.mrope_section is not None:
            self._check_sections(self.mrope_section, dim // 2)
        if self.axes_dim is not None and sum(self.axes_dim) != dim:
            refuse(ValueError, "Rope.axes_dim", f"a sum of dim = {dim}", self.axes_dim)
        if self.scaling is not None:
            self.scaling.check_rope(self.theta, self.freq_dim or dim, dim // 2)
        if head_dim is None:
            return
        if dim > head_dim:
            refuse(ValueError, "Rope.dim", f"at most head_dim = {head_dim}", dim)
        last = 1 + max(max(pair) for pair in self.pairs(dim))
        if last > head_dim:
            name = "offset" if self.pair_distance is None else "pair_distance"
            expected = f"pairs within head_dim = {head_dim} channels, not {last}"
            refuse(ValueError, f"Rope.{name}", expected, getattr(self, name))

    def _check_sections(self, section: tuple[int, ...], pairs: int) -> None:
        name = "Rope.mrope_section"
        if sum(section) != pairs:
            refuse(ValueError, name, f"a sum of dim / 2 = {pairs}", section)
        axes = self.axes(2 * pairs)
        if any(axes.count(a) != n for a, n in enumerate(section)):
            expected = f"sections that fit {pairs} pairs where mrope_interleaved"
            refuse(ValueError, name, expected, section)

    @property
    def position_axes(self) -> int:
        """A of positions ``[A, ...]``; 0 where positions have no axis of their own."""
        return len(self.mrope_section or self.axes_dim or ())

    def pairs(self, dim: int) -> tuple[Pair, ...]:
        """Channels (a, b) of a head that each pair reads: (a, b) becomes (ac - bs, bc + as)."""
        return _pairs(self.pairing, dim, self.offset, self.pair_distance)

    def output_pairs(self, dim: int) -> tuple[Pair, ...]:
        """Channels that each pair writes: those that it reads, unless ``output_pairing``."""
        return _pairs(self.output_pairing or self.pairing, dim, self.offset, self.pair_distance)

    def axes(self, dim: int) -> tuple[int, ...]:
        """The axis whose position turns each pair."""
        if self.mrope_section is not None and self.mrope_interleaved:
            section, n = self.mrope_section, len(self.mrope_section)
            return tuple(i % n if i < n * section[i % n] else 0 for i in range(dim // 2))
        widths = self.mrope_section or tuple(n // 2 for n in self.axes_dim or (dim,))
        return tuple(axis for axis, width in enumerate(widths) for _ in range(width))


@lru_cache(maxsize=256)
def _pairs(pairing: str, dim: int, offset: int, distance: int | None) -> tuple[Pair, ...]:
    if pairing == "interleaved":
        found = [(2 * i, 2 * i + 1) for i in range(dim // 2)]
    elif pairing == "block_half":
        quarter = dim // 4
        found = [(b + i, b + i + quarter) for b in (0, dim // 2) for i in range(quarter)]
    else:
        found = [(i, i + (distance or dim // 2)) for i in range(dim // 2)]
    return tuple((offset + a, offset + b) for a, b in found)
