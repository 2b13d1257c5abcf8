"""The gradients of ``qk_norm_rope``: one native call, from the gradients of its results.

With y = R n and n = ((x - mean) * rstd * w + bias) * scale, R the rotation of a token::

    dn = R^T dy       g = dn * scale       gx = g * w       h = (x - mean) * rstd
    dx = rstd * (gx - h * average(gx * h) - average(gx))    over the channels of a statistic;
         the last term is that of "layer" alone
    dweight = sum of g * h,  dbias = sum of g               over tokens (and heads)

"l2" has sums for averages, and dx = gx / eps where |x| < eps; "none" has dx = gx. With
``order="rope_first"`` h is of R x, and R^T is applied to the result. All of it is recomputed from
x: nothing but the inputs is kept. Casts of another ``rounding`` than "once" count as the identity.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _native, cpu, ops
from .extras import Extras, Tensor
from .plan import Plan

__all__ = ["Gradients", "qk_norm_rope_backward"]

Gradients = tuple[Tensor | None, ...]


def qk_norm_rope_backward(
    grads: Gradients,
    inputs: Gradients,
    weights: Gradients,
    biases: Gradients,
    wanted: tuple[bool, ...],
    positions: Any,
    spec: Any,
    extras: Extras,
) -> tuple[Gradients, Gradients]:
    """The gradients of the inputs, and of the weights and biases.

    grads: of q's, k's and v's output, of the input's shape and dtype, or None: then none is made of
    that side. inputs: (q, k, v), weights: theirs, biases: (q_bias, k_bias).
    wanted: which of the five sums (q_weight, k_weight, v_weight, q_bias, k_bias) to make.
    positions, spec, extras: as in `qkrope.qk_norm_rope`; extras without v, v_weight, biases, out.

    Returns ((dq, dk, dv), sums): contiguous, of the inputs' dtype; float32 of the shape of weight
    or bias. None for what is not made.
    """
    q, k, v = x = [None if g is None else t for t, g in zip(inputs, grads, strict=True)]
    first = next(t for t in x if t is not None)
    dy = [None if g is None else _rows(g) for g in grads]
    dx = [None if t is None else ops._empty_like("qkv"[i], t) for i, t in enumerate(x)]
    sums = [
        None if t is None or of is None or not want else _sum_of(of, t)
        for t, of, want in zip((*x, q, k), (*weights, *biases), wanted, strict=True)
    ]
    more = {**extras, "q_bias": biases[0], "k_bias": biases[1], "out": dx[:2]}
    if v is not None:
        more |= {"v": v, "v_weight": weights[2], "out": dx}
    plan, (_, *operands) = ops._prepare(
        None, None, q, k, weights[0], weights[1], positions, spec, more
    )
    operands += _REST[len(operands) :]  # those that a plain call does not bring
    columns = sum(s.numel() for s in sums if s is not None)
    workspace = _workspace(plan, x, columns) if columns else None
    if first.is_cuda:
        from .cuda.launch import qk_norm_rope_backward as run
    else:
        run = cpu.qk_norm_rope_backward
    run(plan, 0, *operands, *dy, *sums, workspace)
    return tuple(dx), tuple(sums)


# The operands of a call by their places, as native code has them when they are not given.
_REST = [*(None,) * 22, 0, -1]


def _rows(dy: Tensor) -> Tensor:
    """A gradient whose last dimension native code can read: not an expanded one, as of a sum."""
    return dy if dy.stride(-1) == 1 else dy.contiguous()


def _sum_of(of: Tensor, x: Tensor) -> Tensor:
    make = torch.empty if x.numel() else torch.zeros  # native code writes none without tokens
    return make(of.shape, dtype=torch.float32, device=of.device)


def _workspace(plan: Plan, x: list[Tensor | None], columns: int) -> Tensor:
    """Room for the partial sums of the gradients of weights and biases."""
    given = [t for t in x if t is not None]
    tokens = max(t.numel() // (t.shape[-2] * t.shape[-1]) for t in given)
    device = given[0].device
    units = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 0
    )
    rows = _native.lib().backward_partials(plan.handle, tokens, units)
    return torch.empty(rows * columns, dtype=torch.float32, device=device)
