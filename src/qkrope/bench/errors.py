"""How far a result is from the exact one: in the criterion's units, in ulps, in shares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qkrope import reference
from qkrope.accuracy import error_over_bound, round_once, ulp
from qkrope.spec import Spec

Pair = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Errors:
    """The worst elements of one comparison.

    worst: error over the criterion's bound; the criterion holds up to 1.
    pair_ulp: error in ulps of the rotated pair's length (an element's own ulp means nothing where
        the rotation cancels).
    correct: share of elements that are the correctly rounded value.
    """

    worst: float
    pair_ulp: float
    correct: float

    def plain(self) -> dict[str, float | None]:
        """The fields for JSON, which has no infinity: a stray NaN or infinity shows as None."""
        return {name: finite(value) for name, value in dataclasses.asdict(self).items()}

    @property
    def passed(self) -> bool:
        """Whether every element meets the criterion."""
        return self.worst <= 1.0


def finite(value: float) -> float | None:
    """The value, or None where JSON cannot hold it."""
    return value if math.isfinite(value) else None


def _pair_length(ref: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Length of the pair each element belongs to; its own size where it is not rotated."""
    rotary = spec.rotary_dim
    if spec.rope is None:
        return ref.abs()
    turned = ref[..., :rotary]
    if spec.rope.pairing == "half":
        one = torch.hypot(*turned.unflatten(-1, (2, -1)).unbind(-2))
        length = torch.cat((one, one), dim=-1)
    else:
        one = torch.hypot(*turned.unflatten(-1, (-1, 2)).unbind(-1))
        length = one.repeat_interleave(2, dim=-1)
    return torch.cat((length, ref[..., rotary:].abs()), dim=-1)


def pair_ulps(
    y: torch.Tensor, other: torch.Tensor, ref: torch.Tensor, spec: Spec, dtype: torch.dtype
) -> torch.Tensor:
    """|y - other| of each element in ulps of the length of its pair in `ref`."""
    return (y.double() - other.double()).abs() / ulp(_pair_length(ref, spec), dtype)


def compare(got: Pair, exact: Pair, terms: Pair, spec: Spec, dtype: torch.dtype) -> Errors:
    """Errors of q and k together. `exact` and `terms` come from `qkrope.reference`."""
    worst = pair_ulp = 0.0
    right = total = 0
    for y, ref, term in zip(got, exact, terms, strict=True):
        if y is None or ref is None or term is None or y.numel() == 0:
            continue
        worst = max(worst, float(error_over_bound(y, ref, term, dtype).max()))
        off = pair_ulps(y, ref, ref, spec, dtype).nan_to_num(math.inf)
        pair_ulp = max(pair_ulp, float(off.max()))
        right += int((y == round_once(ref, dtype)).sum())
        total += y.numel()
    return Errors(worst, pair_ulp, right / total if total else 1.0)


def merge(parts: Sequence[tuple[Errors, int]]) -> Errors:
    """Errors of several comparisons as one, given the number of rows of each."""
    total = sum(rows for _, rows in parts)
    return Errors(
        max(errors.worst for errors, _ in parts),
        max(errors.pair_ulp for errors, _ in parts),
        sum(errors.correct * rows for errors, rows in parts) / total,
    )


def exact_and_terms(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor | None,
    spec: Spec,
) -> tuple[Pair, Pair]:
    """The oracle's result (float64) and the scale of the criterion's bound, for the same inputs."""
    arguments = (q, k, q_weight, k_weight, positions, spec)
    q_ref, k_ref = reference.qk_norm_rope(*arguments)
    q_terms, k_terms = reference.criterion_terms(*arguments)
    return (q_ref, k_ref), (q_terms, k_terms)
