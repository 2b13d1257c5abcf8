"""The oracle of the gradients: float64 autograd through `qkrope.reference`, and their criterion.

The formulas are in `qkrope.ops_backward`; here they are written down once more with every summand
replaced by its absolute value, which is what a float32 evaluation errs in proportion to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from . import reference
from .accuracy import GRADIENT_UNITS, sum_units
from .extras import NAMES
from .reference_angles import Positions
from .reference_side import Extras, Side, Span, sides
from .reference_steps import each_span, effective_weight, pair_sizes, rotate, statistics
from .spec import Spec

__all__ = ["gradient_terms", "qk_norm_rope_backward"]

Outputs = tuple[Tensor | None, ...]


def qk_norm_rope_backward(
    grads: Outputs,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> dict[str, Tensor]:
    """The exact gradients, float64, by name of `NAMES`; of what is given and not None.

    Args:
        grads: those of q's, k's (and v's) output, of the outputs' shapes, None for zeros.
        q, k, q_weight, k_weight, positions, spec, extras: as in `qkrope.reference.qk_norm_rope`;
            the rounding of the Spec is taken for "once".
    """
    given: dict[str, Any] = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, **extras}
    leaves = {
        name: given[name].detach().double().requires_grad_()
        for name in NAMES
        if given.get(name) is not None
    }
    given |= leaves
    for name in ("q_scale", "k_scale"):  # may have the dtype that x had
        if isinstance(given.get(name), Tensor):
            given[name] = given[name].float()
    with torch.enable_grad():
        outputs = reference.qk_norm_rope(
            positions=positions, spec=replace(spec, rounding="once"), **given
        )
        pairs = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if y is not None]
        total = sum(((y * dy.double()).sum() for y, dy in pairs if dy is not None), torch.zeros(()))
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def gradient_terms(
    grads: Outputs,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> dict[str, Tensor]:
    """What `qkrope.accuracy.error_over_bound` takes as the terms of each gradient, by name.

    With D = |dy| summed over a pair (times the gain of `reference.criterion_terms`),
    G = D * |scale| and N = (|x| + |mean|) * rstd:
    dx       rstd * (G|w| + N * average(G|w| * N) + average(G|w|)), the last for "layer" alone
    dweight  sum of G * N;  dbias: sum of G
    each times how many times the forward's slack its arithmetic takes. rope_first: x is the pair's
    in N, and what is summed over a pair is dx. Arguments as in `qk_norm_rope_backward`.
    """
    weights = {"q": q_weight, "k": k_weight, "v": extras.get("v_weight")}
    biases = {"q": extras.get("q_bias"), "k": extras.get("k_bias"), "v": None}
    found = sides(q, k, q_weight, k_weight, positions, spec, **extras)
    terms: dict[str, Tensor] = {}
    for name, side, dy in zip("qkv", found, grads, strict=False):
        if side is None:
            continue
        dy = torch.zeros_like(side.x) if dy is None else dy
        dx, products, plain = _terms(side, dy.double().abs(), spec.order)
        terms[name] = GRADIENT_UNITS[spec.order] * dx
        for what, of, summands in (("weight", weights, products), ("bias", biases, plain)):
            if (t := of[name]) is not None:
                terms[f"{name}_{what}"] = _summed(summands, t)
    return terms


def _terms(side: Side, dy: Tensor, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of dx, and of each summand of dweight and dbias, [..., heads, head_dim]."""
    x, turn, rope_first = side.x.double(), side.turn, order == "rope_first"
    turned = rotate(x, side) if rope_first else x
    size = pair_sizes(x.abs(), turn) if rope_first else x.abs()
    g = dy if rope_first else pair_sizes(dy, turn, back=True)
    if side.scale is not None:
        g = g * side.scale.double().abs()

    def normed(size: Tensor, span: Span) -> Tensor:
        """N."""
        own, norm = turned[..., span.channels], span.norm
        dims = (-2, -1) if norm.scope == "row" else (-1,)
        mean, rstd = statistics(own, norm)
        mean = mean.abs()
        if rope_first and norm.kind == "layer":
            mean = size.mean(dims, keepdim=True)
        return (size + mean) * rstd

    n = each_span(size, side, normed)

    def gradient(g: Tensor, span: Span) -> Tensor:
        own, norm = turned[..., span.channels], span.norm
        dims = (-2, -1) if norm.scope == "row" else (-1,)
        if (w := effective_weight(span)) is not None:
            g = g * w.abs()
        if norm.kind == "none":
            return g
        _, rstd = statistics(own, norm)
        along = (g * n[..., span.channels]).sum(dims, keepdim=True)
        if norm.kind == "l2":
            along = along * (own.square().sum(dims, keepdim=True).sqrt() >= norm.eps)
        else:
            along = along / own.shape[-1] / (own.shape[-2] if norm.scope == "row" else 1)
        mean = g.mean(dims, keepdim=True) if norm.kind == "layer" else 0.0
        return rstd * (g + n[..., span.channels] * along + mean)

    dx = each_span(g, side, gradient)
    return (pair_sizes(dx, turn, back=True) if rope_first else dx), g * n, g


def _summed(summands: Tensor, of: Tensor) -> Tensor:
    """Terms of the gradient of a weight or bias: its summands, and how many there are."""
    heads, width = summands.shape[-2], of.numel()
    shared = heads > 1 and of.ndim == 1 and width <= summands.shape[-1]
    width = width if shared else width // heads
    flat = summands[..., :width].reshape(-1, heads, width)
    total = flat.sum((0, 1)) if shared else flat.sum(0)
    count = flat.shape[0] * (heads if shared else 1)
    return (sum_units(count) * total).reshape(of.shape)
