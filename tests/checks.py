"""The acceptance checks of every test that runs the op."""

from __future__ import annotations

import torch
from torch import Tensor

from buffers import bits
from qkrope.accuracy import error_over_bound, round_once, ulp

__all__ = [
    "assert_chain",
    "assert_criterion",
    "assert_same_bits",
    "error_over_bound",
    "fraction_correctly_rounded",
    "round_once",
    "ulp",
]


def assert_criterion(
    y: Tensor, ref: Tensor, terms: Tensor, dtype: torch.dtype, what: str = "y"
) -> None:
    """Every element is within qkrope.accuracy's bound; NaN and infinity are where ref has them."""
    ratio = error_over_bound(y, ref, terms, dtype)
    if ratio.numel() == 0 or bool((ratio <= 1).all()):
        return
    flat = int(torch.where(ratio.isnan(), torch.inf, ratio).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
    raise AssertionError(
        f"{what}{list(at)} = {float(y[at])!r}, exact {float(ref[at])!r}: "
        f"{float(ratio[at]):.4g} times the bound; {int((ratio > 1).sum())} of {ratio.numel()} "
        f"elements exceed it"
    )


def fraction_correctly_rounded(y: Tensor, ref: Tensor) -> float:
    """Share of the elements of y that are ref rounded once to y's dtype."""
    best = round_once(ref, y.dtype)
    return float(((y == best) | (y.isnan() & best.isnan())).double().mean()) if y.numel() else 1.0


# The share of a chain's elements that may differ: where a float32 result lies so near to a tie of T
# that the order of a sum or the last bit of a reciprocal root decides (docs: 0.0014 % of bfloat16
# and 0.018 % of float16 elements), and, without a caller's table, a cosine or sine that does (twice
# 0.014 % and 0.08 %).
_UNDECIDED = {torch.bfloat16: (1e-4, 5e-4), torch.float16: (4e-4, 3e-3)}


def assert_chain(y: Tensor, ref: Tensor, terms: Tensor, table: bool, what: str = "y") -> None:
    """y is the chain of casts ref bit for bit, but for a few ties.

    A tie of a rounded statistic takes its head along, so one head may always differ. An element
    that differs does so by what two roundings to a neighbour of its summands come to; among
    subnormals a neighbour is one step of them away, times a weight and a scale of a few.
    """
    differs = (y != ref) & ~(y.isnan() & ref.isnan())
    share = _UNDECIDED[y.dtype][0 if table else 1]
    count, allowed = int(differs.sum()), max(y.shape[-1], share * y.numel())
    assert count <= allowed, f"{what}: {count} of {y.numel()} differ from the chain"
    info = torch.finfo(y.dtype)
    far = (y.double() - ref.double()).abs() > 2 * info.eps * (terms + 4 * info.smallest_normal)
    assert not bool((far & differs).any()), f"{what}: more than two neighbours from the chain"


def assert_same_bits(a: Tensor, b: Tensor, what: str = "y") -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    unequal = bits(a) != bits(b)
    assert not bool(unequal.any()), f"{what}: {int(unequal.sum())} of {a.numel()} differ in bits"
