"""The knobs of the general CUDA kernel: what it is compiled for beside a plain Variant's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from .norm import Norm
from .rope import MAX_AXES, Pair, Rope
from .rounding import Letters
from .spec import Spec

__all__ = ["NORMS", "NORM_LETTERS", "TURN_LETTERS", "Options", "SideOptions"]

NORMS = ("none", "rms", "layer", "l2")  # by the numbers of params.h
NORM_LETTERS = ("", "A", "B", "C")  # of Spec.rounding; "": once
TURN_LETTERS = ("", "b", "h", "f")


@dataclass(frozen=True, slots=True)
class SideOptions:
    """One of q, k and v: the qk_side_variant of native/params.h."""

    norm: str = "none"
    row: bool = False
    dim: int = 0
    rest: str = "none"
    weight_dim: int = 0
    round_norm: str = ""
    round_turn: str = ""

    @classmethod
    def of(cls, norm: Norm, letters: Letters | None, head_dim: int) -> SideOptions:
        """Those of a norm, and the letters of its rounding, None for "once"."""
        parts = norm.parts(head_dim)
        rest = parts[-1].norm.kind if len(parts) > 1 else "none"
        row = norm.scope == "row" and norm.kind != "none"
        weight_dim = norm.weight_dim(head_dim)
        return cls(norm.kind, row, parts[0].stop, rest, weight_dim, *(letters or ("", "")))

    def check(self, name: str, head_dim: int) -> None:
        """Raise ValueError where such a side cannot be: the twin of fits() in options.cuh."""
        if not (2 <= self.dim <= head_dim and (self.dim == head_dim or not self.row)):
            raise ValueError(f"{name}.dim: got {self.dim} of head_dim {head_dim}")
        if self.rest != "none" and self.dim == head_dim:
            raise ValueError(f"{name}.rest: got {self.rest!r} without channels for it")
        if self.weight_dim != (self.dim if self.rest == "none" else head_dim):
            raise ValueError(f"{name}.weight_dim: got {self.weight_dim}")
        if (self.round_norm == "") != (self.round_turn == ""):
            raise ValueError(f"{name}: got the letters {self.round_norm!r}, {self.round_turn!r}")

    def numbers(self) -> tuple[int, ...]:
        """In the order of the struct."""
        letters = NORM_LETTERS.index(self.round_norm), TURN_LETTERS.index(self.round_turn)
        kinds = NORMS.index(self.norm), int(self.row), self.dim, NORMS.index(self.rest)
        return (*kinds, self.weight_dim, *letters)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything of a Spec that general.cu is compiled for beside the fields of Variant."""

    q: SideOptions
    k: SideOptions
    v: SideOptions
    has_v: bool = False
    rope_first: bool = False
    reverse: bool = False
    offset: int = 0
    pair_distance: int | None = None
    output_half: bool = False
    axis_pairs: tuple[int, ...] = ()
    axes_interleaved: bool = False

    @classmethod
    def of(cls, spec: Spec) -> Options:
        """Those of a Spec."""
        rope, (q, k) = spec.rope or Rope(), spec.roundings
        head_dim, rotates = spec.head_dim, spec.rope is not None
        return cls(
            q=SideOptions.of(spec.q_norm, q, head_dim),
            k=SideOptions.of(spec.k_norm_resolved, k, head_dim),
            v=SideOptions.of(spec.v_norm or Norm("none"), k, head_dim),
            has_v=spec.v_norm is not None,
            rope_first=rotates and spec.order == "rope_first",
            reverse=rope.reverse,
            offset=rope.offset,
            pair_distance=rope.pair_distance,
            output_half=rope.output_pairing is not None,
            axis_pairs=rope.mrope_section or tuple(n // 2 for n in rope.axes_dim or ()),
            axes_interleaved=rope.mrope_interleaved,
        )

    @property
    def has_rows(self) -> bool:
        """A norm of whole rows: then a block has all heads of a token."""
        return self.q.row or self.k.row or self.v.row

    @property
    def simple_rows(self) -> bool:
        """RMS norms of whole rows alone, which have a fast kernel: see team.cuh."""
        moved = self.has_v or self.rope_first or self.output_half
        return (
            self.q == self.k
            and self.q.row
            and self.q.norm == "rms"
            and not (moved or self.q.round_norm)
        )

    def check(self, head_dim: int, rotary_dim: int, pairing: str) -> None:
        """Raise ValueError where such a kernel cannot be: twins of channels.cuh and options.cuh."""
        for name in ("q", "k", "v"):
            getattr(self, name).check(name, head_dim)
        pairs = rotary_dim // 2
        if self.pair_distance is not None and (pairing != "half" or self.pair_distance < pairs):
            raise ValueError(
                f"pair_distance: got {self.pair_distance} with {pairs} {pairing} pairs"
            )
        if pairing == "block_half" and rotary_dim % 4:
            raise ValueError(f"rotary_dim: expected a multiple of 4, got {rotary_dim}")
        if self.output_half and pairing != "interleaved":
            raise ValueError(f"output_half: got it with pairing {pairing!r}")
        turning = self._rope(pairing).pairs(rotary_dim) if rotary_dim else ()
        last = max(chain((0,), *turning))
        if self.offset < 0 or self.offset % 2 or last >= head_dim:
            raise ValueError(f"offset: got {self.offset}, and a last channel {last} of {head_dim}")
        axes = len(self.axis_pairs)
        if axes and not (2 <= axes <= MAX_AXES and sum(self.axis_pairs) == pairs):
            raise ValueError(f"axis_pairs: got {self.axis_pairs} of {pairs} pairs")

    def _rope(self, pairing: str) -> Rope:
        output = "half" if self.output_half else None
        distance = self.pair_distance
        return Rope(
            pairing=pairing, offset=self.offset, pair_distance=distance, output_pairing=output
        )

    def lane_pairs(
        self, head_dim: int, rotary_dim: int, pairing: str
    ) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """The channels of each pair as lanes read and as they write them: channels.cuh."""
        rope = self._rope(pairing)
        read = rope.pairs(rotary_dim) if rotary_dim else ()
        written = rope.output_pairs(rotary_dim) if rotary_dim else ()
        if pairing == "interleaved":
            every = [(c, c + 1) for c in range(0, head_dim, 2)]
            goes = dict(zip(read, written, strict=True))
            return tuple(every), tuple(goes.get(pair, pair) for pair in every)
        turning = set(chain(*read))
        others = [c for c in range(head_dim) if c not in turning]
        half = len(others) // 2
        company = tuple(zip(others[:half], others[half:], strict=True))
        return read + company, written + company

    def macros(self, rotary_dim: int, pairing: str) -> dict[str, Any]:
        """By the names of general.cu."""
        distance = self.pair_distance or rotary_dim // (4 if pairing == "block_half" else 2)
        sides = ("{" + ", ".join(map(str, s.numbers())) + "}" for s in (self.q, self.k, self.v))
        return {
            "OFFSET": self.offset,
            "DISTANCE": distance,
            "OUTPUT_HALF": int(self.output_half),
            "ROPE_FIRST": int(self.rope_first),
            "REVERSE": int(self.reverse),
            "AXES": len(self.axis_pairs),
            "AXIS_PAIRS": ", ".join(map(str, self.axis_pairs or (0,))),
            "AXES_INTERLEAVED": int(self.axes_interleaved),
            "SIDES": ", ".join(sides),
            "HAS_V": int(self.has_v),
            "ROWS": int(self.has_rows),
        }
