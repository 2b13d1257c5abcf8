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

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _native, cpu, ops
from .extras import NAMES, Tensor
from .plan import Plan, once_of, refuse_no_spec
from .spec import Spec

__all__ = ["NAMES", "qk_norm_rope_backward"]

_GRADS = ("dq_out", "dk_out", "dv_out")

# The operands of a call by their places, as native code has them when they are not given.
_ABSENT = [*(None,) * 22, 0, -1]


def qk_norm_rope_backward(
    dq_out: Tensor | None,
    dk_out: Tensor | None,
    dv_out: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Any,
    spec: Spec,
    *,
    wanted: Sequence[bool],
    **extras: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of a call by `NAMES`, None for those that are not made.

    dq_out, dk_out, dv_out: of its results, in their shapes and dtype; None leaves that side out.
    wanted: which gradients of weights and biases to make, in the order of `NAMES`.
    The rest as in `qkrope.qk_norm_rope`.

    It has no gradients of its own: run it under no_grad.

    Returns contiguous tensors of q's, k's and v's shape and dtype, then float32 sums of the
    weights' and biases' shapes; the same bits whatever the number of threads.
    Raises TypeError and ValueError naming argument, expected and got.
    """
    grads = (dq_out, dk_out, dv_out)
    if all(g is None for g in grads):
        raise ValueError("dq_out, dk_out, dv_out: expected a tensor for at least one, got None")
    if extras.get("out") is not None:
        raise ValueError("out: expected None in a backward, got a value")
    if len(wanted) != len(NAMES) - 3:
        raise ValueError(f"wanted: expected {len(NAMES) - 3} values, got {len(wanted)}")
    given = (q, k, extras.pop("v", None))
    for name, t in zip(("q", "k", "v", *_GRADS), (*given, *grads), strict=True):
        if t is not None and ops._plain(name, t).ndim < 2:
            raise ValueError(f"{name}: expected [..., heads, head_dim], got {t.ndim} dimensions")
    q, k, v = x = [None if g is None else t for t, g in zip(given, grads, strict=True)]
    dy = [None if g is None else _rows(g) for g in grads]
    dx = [None if t is None else ops._empty_like("qkv"[i], t) for i, t in enumerate(x)]
    v_weight = extras.pop("v_weight", None)
    of = (q_weight, k_weight, v_weight, extras.get("q_bias"), extras.get("k_bias"))
    sums = [
        _sum_of(w, t) if want and w is not None and t is not None else None
        for want, w, t in zip(wanted, of, (*x, q, k), strict=True)
    ]
    extras["out"] = dx[:2]
    if v is not None:
        extras |= {"v": v, "v_weight": v_weight, "out": dx}
    refuse_no_spec(spec)
    if forward_ad._current_level >= 0:
        ops._refuse_tangents(dict(zip(("dq_out", "dk_out", "dv_out"), grads, strict=True)))
    plan, (_, *operands) = ops._prepare(
        None, None, q, k, q_weight, k_weight, positions, once_of(spec), extras
    )
    operands += _ABSENT[len(operands) :]
    columns = sum(s.numel() for s in sums if s is not None)
    workspace = _workspace(plan, [t for t in x if t is not None], columns) if columns else None
    operands += [*dy, *sums, workspace]
    if next(t for t in x if t is not None).is_cuda:
        from .cuda.launch import qk_norm_rope_backward as run
    else:
        run = cpu.qk_norm_rope_backward
    run(plan, 0, *operands)
    return (*dx, *sums)


def _rows(dy: Tensor) -> Tensor:
    """A gradient whose last dimension native code can read: not an expanded one, as of a sum."""
    return dy if dy.stride(-1) == 1 else dy.contiguous()


def _sum_of(of: Tensor, x: Tensor) -> Tensor:
    make = torch.empty if x.numel() else torch.zeros  # native code writes none without tokens
    return make(of.shape, dtype=torch.float32, device=of.device)


def _workspace(plan: Plan, given: list[Tensor], columns: int) -> Tensor:
    """Room for the partial sums of the gradients of weights and biases."""
    tokens = max(math.prod(t.shape[:-2]) for t in given)
    device, units = given[0].device, 0
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    rows = _native.lib().backward_partials(plan.handle, tokens, units)
    return torch.empty(rows * columns, dtype=torch.float32, device=device)
