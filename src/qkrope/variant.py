"""The compile-time knobs of a CUDA kernel as one frozen value: what a cubin is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from .rope import PAIRINGS
from .spec import MAX_HEAD_DIM, Spec

DTYPES = ("float32", "bfloat16", "float16")  # by the numbers of params.h
ANGLES = ("none", "phase", "table", "inv_freq")
NORMS = ("none", "rms", "layer", "l2")
NORM_LETTERS = ("", "A", "B", "C")  # of Spec.rounding; "": once
TURN_LETTERS = ("", "b", "h", "f")


def unsupported(spec: Spec, backend: str) -> str | None:
    """Names the first value of ``spec`` that a backend's kernels ("cpu", "cuda") do not run yet, or
    None. The CPU ones run every Spec.

    ``Rope.freq_dim`` runs everywhere: it is in the frequencies alone.
    """
    if backend == "cpu":
        return None
    if spec.v_norm is not None:
        return f"v_norm={spec.v_norm.kind!r}"
    for name in ("reverse", "mrope_section", "axes_dim"):
        if spec.rope is not None and (value := getattr(spec.rope, name)):
            return f"rope.{name}={value!r}"
    return _beyond_plain(spec)


def is_general(spec: Spec) -> bool:
    """Whether this Spec takes the general CPU kernel: qk_variant.general of native/params.h."""
    return _beyond_plain(spec) is not None


def _beyond_plain(spec: Spec) -> str | None:
    """What is more than a norm of each head, "rms" or "none", and then a rotation of its leading
    channels, rounded once.
    """
    for side, norm in (("norm", spec.q_norm), ("k_norm", spec.k_norm_resolved)):
        if norm.kind not in ("none", "rms"):
            return f"{side}.kind={norm.kind!r}"
        if norm.kind != "none" and norm.scope != "head":
            return f"{side}.scope={norm.scope!r}"
        if norm.dim is not None:
            return f"{side}.dim={norm.dim!r}"
    if spec.order != "norm_first":
        return f"order={spec.order!r}"
    if spec.rounding != "once":
        return f"rounding={spec.rounding!r}"
    if spec.rope is None:
        return None
    if spec.rope.pairing not in ("half", "interleaved"):
        return f"rope.pairing={spec.rope.pairing!r}"
    for name in ("offset", "pair_distance", "output_pairing"):
        if value := getattr(spec.rope, name):
            return f"rope.{name}={value!r}"
    return None


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

    @classmethod
    def of(
        cls, spec: Spec, dtype: str, q_weight: str | None, k_weight: str | None, angle: str
    ) -> Variant:
        """The variant that runs ``spec``; a weight that is not given has the activations' dtype."""
        return cls(
            head_dim=spec.head_dim,
            rotary_dim=spec.rotary_dim,
            pairing=spec.rope.pairing if spec.rope else "half",
            q_norm=spec.q_norm.kind,
            k_norm=spec.k_norm_resolved.kind,
            dtype=dtype,
            q_weight=q_weight or dtype,
            k_weight=k_weight or dtype,
            angle=angle if spec.rotary_dim else "none",
        )

    @property
    def lane_units(self) -> int:
        """Units of four pairs that a lane holds: QK_LANE_UNITS of params.h."""
        units = (self.head_dim + 7) // 8
        return 1 if units <= 32 else 2 if units <= 64 else 4

    @property
    def vector_bytes(self) -> int:
        """Width of the aligned loads, 0 where a lane's channels make no whole number of them."""
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
        if not self.vector_bytes:
            return ("scalar",)
        return ("vector1", "vector2", *(("vector4",) if self.lane_units == 1 else ()), "scalar")

    def macros(self) -> str:
        """The variant as the preprocessor lines that precede kernel.cu."""
        values = {
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
        return "".join(f"#define QK_{name} {value}\n" for name, value in values.items())
