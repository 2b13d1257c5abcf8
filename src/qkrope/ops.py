"""The public calls: normalise and rotate Q and K, in place or out of place.

With r = 1 / sqrt(mean(x^2) + eps) over a head and w the weight plus ``weight_offset``::

    n     = x * r * w
    y_a   = n_a * cos(t) - n_b * sin(t)        t = position * inv_freq[i]
    y_b   = n_b * cos(t) + n_a * sin(t)        for pair i = (a, b) of the rotary channels
    y     = n                                  for the other channels

computed in float32 with one rounding at the end; the angle is exact at every position (see
``qkrope.angles``). Arguments are checked by name in native code before anything is written.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch.autograd import forward_ad

from . import cpu
from .extras import Extras, native_operands, pair, refuse_negated
from .plan import Plan, bare_of, plan_of
from .prebuild import build_variant, warmup
from .scaling import DynamicNTK
from .spec import Spec

__all__ = ["build_variant", "qk_norm_rope", "qk_norm_rope_", "qkv_norm_rope_", "warmup"]

Tensor = torch.Tensor
Positions = Tensor | tuple[Tensor | None, Tensor] | None
CHECK_ONLY = 2  # flag of a native call that raises what the call would, and does nothing
_UNWRITTEN_WEIGHTS = 1  # nothing on the stream can have written them: no training step runs
_cuda: Any = None  # the CUDA backend's entry, once a call needs it
_grad_enabled = torch.is_grad_enabled
# Is the call being traced, into an op of torch_op.py? By Dynamo (outside it a constant, and so the
# cheaper question), or by torch.export without it, which has tensors of other classes.
_by_dynamo = torch.compiler.is_dynamo_compiling
_is_traced = torch.compiler.is_compiling


def _refuse_grad(in_place: bool, named: dict[str, Any]) -> None:
    for name, tensor in named.items():
        if getattr(tensor, "requires_grad", False):  # native code refuses what is no tensor
            if in_place:
                raise ValueError(
                    f"{name}: expected a tensor without requires_grad in an in-place call, got one "
                    "with it; call qk_norm_rope, or run under torch.no_grad()"
                )
            raise ValueError(
                f"{name}: expected a tensor without requires_grad, got one with it; a call has "
                "gradients for q, k, v, their weights and biases alone, and none with out=; run "
                "under torch.no_grad(), or call qkrope.reference.qk_norm_rope, which is "
                "differentiable"
            )


def _refuse_tangents(named: dict[str, Any]) -> None:
    """Asked inside a dual level alone, whose number ``forward_ad._current_level`` is, -1 outside.

    Where forward mode is off, as it is inside an autograd.Function, torch ignores tangents too.
    """
    if not forward_ad._is_fwd_grad_enabled():
        return
    for name, x in named.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        if forward_ad.unpack_dual(x).tangent is not None:
            raise no_forward_mode(name)


def no_forward_mode(name: str) -> ValueError:
    """The error about a tensor that carries a tangent."""
    return ValueError(
        f"{name}: expected a tensor without a tangent of forward-mode AD, got one with it; pass "
        "forward_ad.unpack_dual(tensor).primal, or call qkrope.reference.qk_norm_rope, which has "
        "derivatives in forward mode"
    )


def _prepare(
    in_place: bool | None,
    qkv: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Any,
    spec: Spec,
    extras: dict[str, Any],
) -> tuple[Plan, tuple[Any, ...]]:
    """The call in native order: everything but the plain packed call comes through here.

    in_place: what an error about gradients says; None where they are taken care of.
    """
    seq_len = extras.pop("seq_len", None)
    packed = qkv is not None
    sides = (packed or q is not None, packed or k is not None)
    known = native_operands(spec, extras, sides, packed) if extras else {}
    if forward_ad._current_level >= 0:
        named = {"qkv": qkv, "q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight}
        _refuse_tangents(named | known)
    if in_place is None:
        flags = 0  # of a training step, whose kernels do write weights
    elif torch.is_grad_enabled():
        named = {"qkv": qkv, "q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight}
        _refuse_grad(in_place, named | known)
        flags = 0
    else:
        flags = _UNWRITTEN_WEIGHTS
    for name, tensor in (("q", q), ("k", k), ("q_weight", q_weight), ("k_weight", k_weight)):
        if isinstance(tensor, Tensor) and tensor.is_neg():
            refuse_negated(name)
    k_positions = None
    if isinstance(positions, tuple | list):
        positions, k_positions = pair("positions", positions)
        alone = qkv is None and (q is None or k is None)  # the absent side's may be None
        if (positions is None and q is not None) or (k_positions is None and k is not None):
            alone = False
        if not alone and (positions is None or k_positions is None):
            raise TypeError("positions: expected (q_positions, k_positions), got None among them")
        if k_positions is None:
            k_positions = positions
    rope = spec.rope if isinstance(spec, Spec) else None
    if known and rope is not None and rope.scaling is not None:
        if any(known[name] is not None for name in ("cos", "k cos", "cos_sin_cache")):
            spec, seq_len = bare_of(spec), None  # the caller's table is the scaling
        elif known["inv_freq"] is not None and isinstance(rope.scaling, DynamicNTK):
            spec, seq_len = bare_of(spec), None  # it has no attention factor to keep
    operands = (flags, qkv, q, k, q_weight, k_weight, positions)
    if not known and k_positions is None:
        return plan_of(spec, seq_len), operands
    more = tuple(known.values())
    if all(item is None for item in more[6:-2]) and more[-2:] in ((), (0, -1)):
        more = more[:6] or (None,) * 6  # the rest is what native code takes it for
    return plan_of(spec, seq_len), (*operands, k_positions, *more)


def _run(is_cuda: bool, plan: Plan, *operands: Any) -> None:
    if is_cuda:
        (_cuda or _load_cuda())(plan, *operands)
    else:
        cpu.qk_norm_rope(plan, *operands)


def _load_cuda() -> Any:
    global _cuda
    from .cuda.launch import qk_norm_rope as _cuda

    return _cuda


def _plain(name: str, tensor: Any) -> Tensor:
    kind = type(tensor)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {kind.__name__}")
    if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        # A fake or wrapped tensor: the address it reports is not that of its elements.
        raise TypeError(f"{name}: expected a tensor with memory of its own, got {kind.__name__}")
    return tensor


def _first(q: Any, k: Any) -> Tensor:
    if q is None and k is None:
        raise ValueError("q, k: expected a tensor for at least one, got None for both")
    if k is not None and k.__class__ is not Tensor:
        _plain("k", k)
    return _plain("q", q) if q is not None else k


def _empty_like(name: str, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty(_plain(name, tensor).shape, dtype=tensor.dtype, device=tensor.device)


def qk_norm_rope(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> tuple[Tensor | None, ...]:
    """Normalise and rotate Q and K into new contiguous tensors, or into ``out``.

    q: ``[..., num_q_heads, head_dim]``, k: ``[..., num_kv_heads, head_dim]``; float32, bfloat16 or
    float16; last stride 1, all others free. Either may be None; its result is then None. They may
    differ in length where ``positions=(q_positions, k_positions)``.
    q_weight, k_weight: ``[head_dim]``, ``[heads, head_dim]`` (a row per head), with scope "row"
    also ``[heads * head_dim]``, in float32, bfloat16 or float16, or None for ones. With
    ``Norm.dim``: ``Norm.weight_dim`` channels in place of head_dim.
    positions: int32 or int64, broadcast to the leading dimensions, ``[A, ...]`` where the rotation
    has A axes; None without rotation or with ``cos_sin``. Values in [-2^31, 2^31): others raise on
    a CPU, and on CUDA, where nothing may wait for the device, they make the rotated channels of
    their token NaN.

    Keywords:
    cos_sin: (cos, sin), broadcastable to ``[..., rotary_dim / 2]`` (one value a pair) or
    ``[..., rotary_dim]`` (one a rotated channel, in their order), the last dimension exactly;
    with as many dimensions as q, ``[..., heads or 1, that]``; float32 or the dtype of q, any
    attention factor inside. ((q_cos, q_sin), (k_cos, k_sin)) where they differ.
    cos_sin_cache: ``[max_position, rotary_dim]`` = [cos | sin], rows by position, which must lie in
    the table (CPU: raises; CUDA: NaN as above, nothing out of bounds is read).
    inv_freq: ``[rotary_dim / 2]`` float32 or float64, radians a position, in place of the Spec's
    theta and scaling, finite (CPU: raises; CUDA: NaN as above); the Spec's attention factor stays.
    These three exclude each other.
    seq_len: the length that DynamicNTK and LongRoPE depend on, else the Spec's
    max_position_embeddings.
    q_bias, k_bias: shaped like a weight, added after it.
    q_scale, k_scale: a number, or a tensor in float32 or the dtype of q that broadcasts to
    ``[..., heads, head_dim]``; multiplies what the norm gives.
    rotate_from, rotate_to: only tokens whose index along the last leading dimension is in
    [rotate_from, rotate_to) turn; cos_sin has rows for these only.
    v, v_weight: ``[..., num_kv_heads, head_dim]`` and its weight, normalised by ``spec.v_norm``.
    out: (q_out, k_out), and v_out with v, of the inputs' shapes and dtype, separate from every
    input or the input itself.

    Returns (q, k), or (q, k, v) where v is given; differentiable (once) in q, k, v, their weights
    and biases, see ``qkrope.ops_backward``. A gradient has the dtype of what it is of. Nothing but
    the inputs is kept. Under autocast the inputs are taken as they are.
    Raises TypeError and ValueError naming argument, expected and got, before anything is written;
    CompileError where the kernel cannot be built.
    """
    if _by_dynamo() or (q.__class__ is not Tensor and _is_traced()):
        from . import torch_op

        return torch_op.qk_norm_rope(q, k, q_weight, k_weight, positions, spec, **extras)
    if _grad_enabled() and _has_gradient(q, k, q_weight, k_weight, extras):
        from . import torch_op

        return torch_op.qk_norm_rope_with_gradients(
            q, k, q_weight, k_weight, positions, spec, **extras
        )
    return _qk_norm_rope(False, q, k, q_weight, k_weight, positions, spec, **extras)


def _has_gradient(q: Any, k: Any, q_weight: Any, k_weight: Any, extras: Extras) -> bool:
    """Whether a call's results need gradients; what has none in it is refused later, by name."""
    if not (
        getattr(q, "requires_grad", False)
        or getattr(k, "requires_grad", False)
        or getattr(q_weight, "requires_grad", False)
        or getattr(k_weight, "requires_grad", False)
        or (extras and any(getattr(x, "requires_grad", False) for x in extras.values()))
    ):
        return False
    return extras.get("out") is None


def _qk_norm_rope(
    in_place: bool | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> tuple[Tensor | None, ...]:
    """The call itself; in_place as in `_prepare`."""
    first = _first(q, k)
    v = extras.get("v")
    given = (q, k) if v is None else (q, k, v)
    if (out := extras.get("out")) is None:
        made = tuple(_empty_like("qkv"[i], t) for i, t in enumerate(given))
    else:
        made = pair("out", out, len(given))
        for i, (to, t) in enumerate(zip(made, given, strict=True)):
            if t is not None and to is None:
                raise TypeError(f"out[{i}]: expected a tensor, got None")
    plan, operands = _prepare(
        in_place, None, q, k, q_weight, k_weight, positions, spec, {**extras, "out": made}
    )
    _run(first.is_cuda, plan, *operands)
    return made


def qk_norm_rope_(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> None:
    """``qk_norm_rope`` in place: q, k (and v) hold the result. They must not share memory.

    With ``out`` the result goes there and the inputs stay. With grad mode on, no tensor of the call
    may require grad.
    """
    if _by_dynamo() or (q.__class__ is not Tensor and _is_traced()):
        from . import torch_op

        return torch_op.qk_norm_rope_(q, k, q_weight, k_weight, positions, spec, **extras)
    first = _first(q, k)
    plan, operands = _prepare(True, None, q, k, q_weight, k_weight, positions, spec, dict(extras))
    _run(first.is_cuda, plan, *operands)


def qkv_norm_rope_(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> None:
    """``qk_norm_rope`` in place on a packed projection.

    qkv: ``[..., (nq + nk + nv) * head_dim]``, last stride 1; nv is inferred and may be 0. V is not
    touched, unless the Spec has a ``v_norm``: then nv is nk, and V is normalised with ``v_weight``.
    With ``out`` = (``[..., nq, head_dim]``, ``[..., nk, head_dim]``, and V's as K's with a
    ``v_norm``) the result goes there, qkv stays.
    """
    # The plain call, as engines make it per layer: no frame and no container that it does not need.
    if (
        not extras
        and not _by_dynamo()
        and forward_ad._current_level < 0
        and spec.__class__ is Spec
        and (plan := spec._plan) is not None
        and qkv.__class__ is positions.__class__ is Tensor
    ):
        flags = _UNWRITTEN_WEIGHTS
        if _grad_enabled():
            flags = 0
            if (
                qkv.requires_grad
                or getattr(q_weight, "requires_grad", False)
                or getattr(k_weight, "requires_grad", False)
            ):
                _refuse_grad(True, {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight})
        run = (_cuda or _load_cuda()) if qkv.is_cuda else cpu.qk_norm_rope
        run(plan, flags, qkv, None, None, q_weight, k_weight, positions)
        return
    if _is_traced():
        from . import torch_op

        return torch_op.qkv_norm_rope_(qkv, q_weight, k_weight, positions, spec, **extras)
    first = _plain("qkv", qkv)
    if extras.get("v") is not None:
        raise ValueError("v: expected None in a packed call, whose last heads it is, got a tensor")
    plan, operands = _prepare(
        True, qkv, None, None, q_weight, k_weight, positions, spec, dict(extras)
    )
    _run(first.is_cuda, plan, *operands)
