"""The compile-time knobs of a CUDA kernel as one frozen value: what a cubin is compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .rope import PAIRINGS, Pair
from .spec import MAX_HEAD_DIM, Spec
from .variant_options import NORM_LETTERS, NORMS, TURN_LETTERS, Options

__all__ = ["ANGLES", "DTYPES", "NORMS", "NORM_LETTERS", "TURN_LETTERS", "Variant", "is_general"]

DTYPES = ("float32", "bfloat16", "float16")  # by the numbers of params.h
ANGLES = ("none", "phase", "table", "inv_freq")


def is_general(spec: Spec) -> bool:
    """Whether a Spec takes the general kernels: qk_variant.general of native/params.h.

    The plain ones run a norm of each head, "rms" or "none", and then a rotation of its leading
    channels, rounded once. ``Rope.freq_dim`` is in the frequencies alone, and so is ``reverse``.
    """
    if spec.order != "norm_first" or spec.rounding != "once":
        return True
    for norm in (spec.q_norm, spec.k_norm_resolved):
        if norm.kind not in ("none", "rms") or norm.dim is not None:
            return True
        if norm.kind != "none" and norm.scope != "head":
            return True
    if spec.rope is None:
        return False
    if spec.rope.pairing not in ("half", "interleaved"):
        return True
    names = ("offset", "pair_distance", "output_pairing", "mrope_section", "axes_dim")
    return any(getattr(spec.rope, name) for name in names)


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel: everything the compiler sees. Run-time values (head counts, theta, scaling, eps,
    weight_offset, strides, token count) are not here, so they never compile anything.
    """

    head_dim: int
    rotary_dim: int
    pairing: str
    q_norm: str
    k_norm: str
    dtype: str
    q_weight: str
    k_weight: str
    angle: str
    options: Options | None = None  # of the general kernel; None: the plain one
    backward: bool = False  # the kernels of the gradients

    def __post_init__(self) -> None:
        # Twins of the static_asserts in kernel.cu.
        if not (2 <= self.head_dim <= MAX_HEAD_DIM and self.head_dim % 2 == 0):
            raise ValueError(f"head_dim: expected even, 2 to {MAX_HEAD_DIM}, got {self.head_dim}")
        if not (0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0):
            raise ValueError(
                f"rotary_dim: expected even, 0 to {self.head_dim}, got {self.rotary_dim}"
            )
        if (self.angle == "none") != (self.rotary_dim == 0):
            raise ValueError(f"angle: got {self.angle!r} with rotary_dim {self.rotary_dim}")
        if self.options is not None:
            self.options.check(self.head_dim, self.rotary_dim, self.pairing)

    @classmethod
    def of(
        cls,
        spec: Spec,
        dtype: str,
        q_weight: str | None,
        k_weight: str | None,
        angle: str,
        general: bool = False,
        backward: bool = False,
    ) -> Variant:
        """The variant that runs ``spec``; a weight that is not given has the activations' dtype.

        ``general`` where the call needs that kernel whatever the Spec does: a bias, a scale, a
        weight or table for each head, tokens that do not turn. It reads weights of any dtype, so
        that they are no part of it.
        """
        angle = angle if spec.rotary_dim else "none"
        reads = spec.rope is not None and spec.rope.reverse and angle in ("table", "inv_freq")
        general = general or reads or spec.v_norm is not None or is_general(spec)
        return cls(
            head_dim=spec.head_dim,
            rotary_dim=spec.rotary_dim,
            pairing=spec.rope.pairing if spec.rope else "half",
            q_norm=spec.q_norm.kind,
            k_norm=spec.k_norm_resolved.kind,
            dtype=dtype,
            q_weight=dtype if general else q_weight or dtype,
            k_weight=dtype if general else k_weight or dtype,
            angle=angle,
            options=Options.of(spec) if general else None,
            backward=backward,
        )

    @property
    def lane_units(self) -> int:
        """Units of four pairs that a lane holds: QK_LANE_UNITS of params.h."""
        units = (self.head_dim + 7) // 8
        return 1 if units <= 32 else 2 if units <= 64 else 4

    @property
    def vector_bytes(self) -> int:
        """Width of the aligned loads, 0 where a lane's channels make no whole number of them."""
        if self.options is not None:
            return self._vector_bytes()
        pairs, rotated, held = self.head_dim // 2, self.rotary_dim // 2, self.lane_units
        if (self.head_dim + 7) // 8 % held:
            return 0
        if self.pairing == "interleaved":
            return 16 if self.head_dim % 8 == 0 else 0
        if pairs % (4 * held) or rotated % (4 * held):
            return 0
        return 8 if held == 1 and self.dtype != "float32" else 16

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels of this variant: the fast ones by the heads a group of lanes serves, and the
        one for rows of any alignment.
        """
        if self.backward:
            return (*self._vectors, "scalar", "sums")
        return (*self._vectors, "scalar")

    @property
    def _vectors(self) -> tuple[str, ...]:
        if not self.vector_bytes:
            return ()
        if self.backward and self.options is None:
            return ("vector2",) if self.lane_units == 1 else ("vector1",)
        if self.options is not None and (self.options.has_rows or self.backward):
            simple = not self.backward and self.options.simple_rows and self.lane_units == 1
            return ("vector1", "vector2") if simple else ("vector1",)
        if self.options is not None:
            return ("vector1", "vector4" if self.lane_units == 1 else "vector2")
        return ("vector1", "vector2", *(("vector4",) if self.lane_units == 1 else ()))

    def _vector_bytes(self) -> int:
        """The same of the general kernel, whose lanes it goes through."""
        assert self.options is not None
        pairs, count = self.head_dim // 2, 4 * self.lane_units
        turning = self.options.offset // 2, self.rotary_dim // 2
        if pairs % count or (self.options.output_half and any(n % count for n in turning)):
            return 0
        read, written = self.options.lane_pairs(self.head_dim, self.rotary_dim, self.pairing)
        for at in range(0, pairs, count):
            for mine in (read[at : at + count], written[at : at + count]):
                if not _whole_runs(mine):
                    return 0
        # The shorter run of reading and writing: four pairs' channels a, or all of theirs.
        runs = self.pairing != "interleaved"
        return 8 if runs and self.lane_units == 1 and self.dtype != "float32" else 16

    def macros(self) -> str:
        """The variant as the preprocessor lines that precede kernel.cu or general.cu."""
        values: dict[str, Any] = {
            "HEAD_DIM": self.head_dim,
            "ROTARY_DIM": self.rotary_dim,
            "PAIRING": PAIRINGS.index(self.pairing),
            "Q_NORM": NORMS.index(self.q_norm),
            "K_NORM": NORMS.index(self.k_norm),
            "DTYPE": DTYPES.index(self.dtype),
            "Q_WEIGHT": DTYPES.index(self.q_weight),
            "K_WEIGHT": DTYPES.index(self.k_weight),
            "ANGLE": ANGLES.index(self.angle),
            "VECTOR_BYTES": self.vector_bytes,
        }
        if self.backward:
            values["BACKWARD"] = 1
        if self.options is not None:
            for name in ("Q_NORM", "K_NORM", "Q_WEIGHT", "K_WEIGHT"):
                del values[name]
            values |= self.options.macros(self.rotary_dim, self.pairing)
            values["SIMPLE_ROWS"] = int(self.options.has_rows and "vector2" in self.kernels)
        return "".join(f"#define QK_{name} {value}\n" for name, value in values.items())


def _whole_runs(pairs: Sequence[Pair]) -> bool:
    """Whether a lane's pairs are aligned runs of memory: a a a ..., b b b ..., or a b a b ..."""
    a, b = zip(*pairs, strict=True)
    if b[0] == a[0] + 1:
        return _is_run([channel for pair in pairs for channel in pair])
    return _is_run(a) and _is_run(b)


def _is_run(channels: Sequence[int]) -> bool:
    first, count = channels[0], len(channels)
    return first % count == 0 and list(channels) == list(range(first, first + count))
