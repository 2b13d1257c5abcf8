"""Units in the last place, rounding once, and the acceptance criterion: the one definition of each.

The criterion, for an output y of dtype T and the exact value ref::

    |y - ref| <= 0.5 * ulp_T(max(|y|, |ref|)) + 2^-19 * (|a| + |b|)

|a| + |b| is the output's formula with every summand replaced by its absolute value
(`qkrope.reference.criterion_terms`), so a result may cancel without the bound cancelling with it.
2^-19 is 32 roundings of a float32: sum of squares 7.5, its mean and eps 0.5, reciprocal square
root 2.1, weight 2, rotation 2, cosine and sine 7.4 make 21.5 in the worst case.

Gradients are held to the same formula with terms of their own
(`qkrope.reference_grad.gradient_terms`) and more roundings: docs/accuracy.md counts them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GRADIENT_UNITS", "SLACK", "error_over_bound", "round_once", "sum_units", "ulp"]

SLACK = 2.0**-19

# A gradient dx may be off by so many times SLACK, of its own terms.
GRADIENT_UNITS = {"norm_first": 2.25, "rope_first": 4.0}

# Bits of the significand and exponent of the smallest normal number.
_FORMAT = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from |x| to the next larger value of ``dtype``, in float64; subnormals included."""
    precision, smallest = _FORMAT[dtype]
    exponent = torch.frexp(x.double().abs()).exponent.clamp_min(smallest + 1) - precision
    exponent = torch.where(x == 0, smallest + 1 - precision, exponent)
    return ((exponent.long() + 1023) << 52).view(torch.float64)  # 2^exponent, by its bits


def sum_units(count: int) -> float:
    """How many times SLACK a sum of ``count`` summands, the gradient of a weight, may be off.

    1.25 of it are the summands' own, the rest is the longest chain of float32 additions: at most
    64, or 64 and a sixteenth of the summands.
    """
    return 1.25 + min(count, 64 + count / 16) * 2.0**-24 / SLACK


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to ``dtype``, to nearest even, exactly once.

    A plain cast to a 16-bit type passes through float32 and so rounds twice. Here float32 is
    reached by rounding to odd (an inexact value gets its last bit set), which keeps enough of the
    tail for the second step to be the only real one.
    """
    if x.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    near = x.float()
    too_far = near.double().abs() > x.abs()
    toward_zero = torch.where(too_far, near.nextafter(torch.zeros_like(near)), near)
    inexact = (toward_zero.double() != x) & ~x.isnan()
    odd = torch.where(inexact, toward_zero.view(torch.int32) | 1, toward_zero.view(torch.int32))
    return odd.view(torch.float32).to(dtype)


def error_over_bound(y: Tensor, ref: Tensor, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of every element as a share of the criterion's bound: accepted if no value exceeds 1.

    Args:
        y: the result under test, of dtype ``dtype``.
        ref: the exact result, float64, same shape.
        terms: |a| + |b| of each element, float64, same shape.
        dtype: the dtype that y was rounded to.

    Returns:
        float64 of y's shape; infinite where one of y and ref (rounded) is NaN or infinite and the
        other is not the same.
    """
    if y.dtype != dtype or y.shape != ref.shape or ref.shape != terms.shape:
        raise ValueError(
            f"y {y.dtype} {tuple(y.shape)}, ref {tuple(ref.shape)}, terms {tuple(terms.shape)}: "
            f"expected one shape, and y of {dtype}"
        )
    y, ref, terms = y.double(), ref.double(), terms.double()
    rounded = round_once(ref, dtype).double()
    ordinary = y.isfinite() & rounded.isfinite()
    same = (y == rounded) | (y.isnan() & rounded.isnan())
    bound = 0.5 * ulp(torch.maximum(y.abs(), ref.abs()), dtype) + SLACK * terms
    special = torch.where(same, 0.0, torch.inf).to(y.dtype)
    return torch.where(ordinary, (y - ref).abs() / bound, special)
