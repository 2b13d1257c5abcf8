"""Accuracy by position decade: qkrope against what people run today.

chain:      the unfused model code: every step rounds to the activation dtype, cos and sin come
            from float32 angles.
fp32 angle: a fused kernel that keeps float32 to the end and rounds once, but takes its angle as
            float32 position times float32 inv_freq. Norm and rotation are exact here, so what it
            loses is the angle's alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import qkrope
from qkrope import reference
from qkrope.spec import Spec

from .data import fp32_cos_sin
from .errors import Errors, Pair, compare, exact_and_terms

Method = Callable[..., Pair]
LAST = 2**31  # positions are int32 values


@dataclass(frozen=True)
class Decade:
    """Errors of each method for the positions first..last."""

    first: int
    last: int
    errors: dict[str, Errors]

    @property
    def label(self) -> str:
        """The range as people write it."""
        return label(self.first, self.last)


def label(first: int, last: int) -> str:
    """A range of positions as people write it."""
    return f"{_short(first)} .. {_short(last)}"


def _short(value: int) -> str:
    if value == LAST - 1:
        return "2^31-1"
    if value == -LAST:
        return "-2^31"
    if abs(value) < 10000:
        return str(value)
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def ranges() -> list[tuple[int, int]]:
    """0..9, 10..99, ... up to 2^31-1, and all negative positions."""
    edges = [0, *(10**n for n in range(1, 10)), LAST]
    return [*((a, b - 1) for a, b in itertools.pairwise(edges)), (-LAST, -1)]


def _qkrope(q, k, q_weight, k_weight, positions, spec):  # type: ignore[no-untyped-def]
    return qkrope.qk_norm_rope(q, k, q_weight, k_weight, positions, spec)


def _chain(q, k, q_weight, k_weight, positions, spec):  # type: ignore[no-untyped-def]
    eager = dataclasses.replace(spec, rounding="eager")
    cos_sin = fp32_cos_sin(spec, positions) if spec.rope is not None else None
    return reference.qk_norm_rope(q, k, q_weight, k_weight, positions, eager, cos_sin=cos_sin)


def _fp32_angle(q, k, q_weight, k_weight, positions, spec):  # type: ignore[no-untyped-def]
    cos_sin = fp32_cos_sin(spec, positions) if spec.rope is not None else None
    return reference.qk_norm_rope(
        q, k, q_weight, k_weight, positions, spec, cos_sin=cos_sin, round_to=q.dtype
    )


METHODS: dict[str, Method] = {"qkrope": _qkrope, "chain": _chain, "fp32 angle": _fp32_angle}


def measure(
    spec: Spec, dtype: torch.dtype, device: torch.device, *, rows: int, seed: int = 0
) -> Iterator[Decade]:
    """One Decade at a time: `rows` random positions of the range, both ends among them."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=rng).to(device, dtype)

    for first, last in ranges():
        positions = torch.randint(first, last + 1, (rows,), generator=rng)
        positions[0], positions[-1] = first, last
        q = normal(rows, spec.num_q_heads, spec.head_dim)
        k = normal(rows, spec.num_kv_heads, spec.head_dim)
        # Rows of small magnitude bring eps into play.
        scale = torch.logspace(-3, 0.5, rows).to(device)[:, None, None]
        q, k = (q * scale).to(dtype), (k * scale.flip(0)).to(dtype)
        q_weight, k_weight = (
            None if norm.kind == "none" else 1 + 0.3 * normal(spec.head_dim) - norm.weight_offset
            for norm in (spec.q_norm, spec.k_norm_resolved)
        )
        arguments = (q, k, q_weight, k_weight, positions.to(device), spec)
        exact, terms = exact_and_terms(*arguments)
        yield Decade(
            first,
            last,
            {
                name: compare(method(*arguments), exact, terms, spec, dtype)
                for name, method in METHODS.items()
            },
        )
