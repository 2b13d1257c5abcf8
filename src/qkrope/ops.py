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

from typing import Any

import torch

from . import cpu
from .plan import Plan, bare_of, plan_of, refuse_no_spec
from .prebuild import build_variant, warmup
from .scaling import DynamicNTK
from .spec import Spec

__all__ = ["build_variant", "qk_norm_rope", "qk_norm_rope_", "qkv_norm_rope_", "warmup"]

Tensor = torch.Tensor
Positions = Tensor | tuple[Tensor | None, Tensor] | None
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
                f"{name}: expected a tensor without requires_grad, got one with it, and this "
                "release has no backward; run under torch.no_grad(), or call "
                "qkrope.reference.qk_norm_rope, which is differentiable"
            )


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: expected a pair, got {type(value).__name__}")
    if len(value) != 2:
        raise TypeError(f"{name}: expected a pair, got a {type(value).__name__} of {len(value)}")
    return value[0], value[1]


def _extras(
    spec: Spec,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos_sin: tuple[Tensor, Tensor] | None,
    cos_sin_cache: Tensor | None,
    inv_freq: Tensor | None,
    out: tuple[Tensor | None, Tensor | None] | None,
) -> tuple[Any, ...]:
    """The optional arguments in native order, once their combination makes sense."""
    for name, bias in (("q_bias", q_bias), ("k_bias", k_bias)):
        if bias is not None:
            raise ValueError(
                f"{name}: expected None, got a bias, which the cpu and cuda kernels of this "
                "release do not add; qkrope.reference does"
            )
    refuse_no_spec(spec)
    sources = {"cos_sin": cos_sin, "cos_sin_cache": cos_sin_cache, "inv_freq": inv_freq}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected None beside {given[0]}: they exclude each other")
    if given and spec.rope is None:
        raise ValueError(f"{given[0]}: expected None since spec.rope is None, got a value")
    cos, sin = (None, None) if cos_sin is None else _pair("cos_sin", cos_sin)
    if (cos is None) != (sin is None) or (cos_sin is not None and cos is None):
        raise TypeError("cos_sin: expected two tensors (cos, sin), got None among them")
    tables = {"cos": cos, "sin": sin, "cos_sin_cache": cos_sin_cache, "inv_freq": inv_freq}
    for name, table in tables.items():
        # The sine of a conjugated table: its memory holds the opposite of its values.
        if isinstance(table, Tensor) and table.is_neg():
            raise ValueError(
                f"{name}: expected a tensor whose memory holds its values, got one that torch "
                "negates when it is read (the imag of a conj?); call resolve_neg() on it"
            )
    q_out, k_out = (None, None) if out is None else _pair("out", out)
    return cos, sin, cos_sin_cache, inv_freq, q_out, k_out


def _prepare(
    in_place: bool,
    qkv: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Any,
    spec: Spec,
    seq_len: int | None,
    extras: tuple[Any, ...],
) -> tuple[Plan, tuple[Any, ...]]:
    """The call in native order: everything but the two plain in-place calls comes through here."""
    given = [e for e in extras if e is not None]  # any() of a generator costs twice as much
    known = _extras(spec, *extras) if given else None
    if torch.is_grad_enabled():
        named = {"qkv": qkv, "q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight}
        if known is not None:
            table = zip(("cos", "sin", "cos_sin_cache", "inv_freq"), known, strict=False)
            outs = {"out[0]": known[4], "out[1]": known[5]}
            named |= {**dict(table), **outs}
        _refuse_grad(in_place, named)
        flags = 0
    else:
        flags = _UNWRITTEN_WEIGHTS
    k_positions = None
    if isinstance(positions, tuple | list):
        positions, k_positions = _pair("positions", positions)
        alone = qkv is None and (q is None or k is None)  # the absent side's may be None
        if (positions is None and q is not None) or (k_positions is None and k is not None):
            alone = False
        if not alone and (positions is None or k_positions is None):
            raise TypeError("positions: expected (q_positions, k_positions), got None among them")
        if k_positions is None:
            k_positions = positions
    rope = spec.rope if isinstance(spec, Spec) else None
    if known is not None and rope is not None and rope.scaling is not None:
        cos, _, cache, inv_freq = known[:4]
        if cos is not None or cache is not None:
            spec, seq_len = bare_of(spec), None  # the caller's table is the scaling
        elif inv_freq is not None and isinstance(rope.scaling, DynamicNTK):
            spec, seq_len = bare_of(spec), None  # it has no attention factor to keep
    operands = (flags, qkv, q, k, q_weight, k_weight, positions)
    if known is None and k_positions is None:
        return plan_of(spec, seq_len), operands
    return plan_of(spec, seq_len), (*operands, k_positions, *(known or (None,) * 6))


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
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    cos_sin_cache: Tensor | None = None,
    inv_freq: Tensor | None = None,
    seq_len: int | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Normalise and rotate Q and K into new contiguous tensors, or into ``out``.

    q: ``[..., num_q_heads, head_dim]``, k: ``[..., num_kv_heads, head_dim]``; float32, bfloat16 or
    float16; last stride 1, all others free. Either may be None; its result is then None. They may
    differ in length where ``positions=(q_positions, k_positions)``.
    q_weight, k_weight: ``[head_dim]`` in float32, bfloat16 or float16, or None for ones.
    positions: int32 or int64, broadcast to the leading dimensions; None without rotation or with
    ``cos_sin``. Values in [-2^31, 2^31): others raise on a CPU, and on CUDA, where nothing may wait
    for the device, they make the rotated channels of their token NaN.
    cos_sin: (cos, sin), broadcastable to ``[..., rotary_dim / 2]`` (one value a pair) or
    ``[..., rotary_dim]`` (one a channel), the last dimension exactly; float32 or the dtype of q,
    any attention factor inside.
    cos_sin_cache: ``[max_position, rotary_dim]`` = [cos | sin], rows by position, which must lie in
    the table (CPU: raises; CUDA: NaN as above, nothing out of bounds is read).
    inv_freq: ``[rotary_dim / 2]`` float32 or float64, radians a position, in place of the Spec's
    theta and scaling, finite (CPU: raises; CUDA: NaN as above); the Spec's attention factor stays.
    These three exclude each other.
    seq_len: the length that DynamicNTK and LongRoPE depend on, else the Spec's
    max_position_embeddings. q_bias, k_bias: refused by this release's kernels.
    out: (q_out, k_out), of q's and k's shape and dtype, separate from every input or the input
    itself.

    Raises TypeError and ValueError naming argument, expected and got, before anything is written;
    CompileError where the kernel cannot be built.
    """
    if _by_dynamo() or (q.__class__ is not Tensor and _is_traced()):
        from . import torch_op

        return torch_op.qk_norm_rope(
            q, k, q_weight, k_weight, positions, spec, q_bias=q_bias, k_bias=k_bias,
            cos_sin=cos_sin, cos_sin_cache=cos_sin_cache, inv_freq=inv_freq, seq_len=seq_len,
            out=out,
        )  # fmt: skip
    first = _first(q, k)
    if out is None:
        made = (_empty_like("q", q), _empty_like("k", k))
    else:
        made = _pair("out", out)
        for i, (given, t) in enumerate(zip(made, (q, k), strict=True)):
            if t is not None and given is None:
                raise TypeError(f"out[{i}]: expected a tensor, got None")
    extras = (q_bias, k_bias, cos_sin, cos_sin_cache, inv_freq, made)
    plan, operands = _prepare(
        False, None, q, k, q_weight, k_weight, positions, spec, seq_len, extras
    )
    _run(first.is_cuda, plan, *operands)
    return made[0], made[1]


def qk_norm_rope_(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    cos_sin_cache: Tensor | None = None,
    inv_freq: Tensor | None = None,
    seq_len: int | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
) -> None:
    """``qk_norm_rope`` in place: q and k hold the result. q and k must not share memory.

    With ``out`` the result goes there and the inputs stay. With grad mode on, no tensor of the call
    may require grad.
    """
    if _by_dynamo() or (q.__class__ is not Tensor and _is_traced()):
        from . import torch_op

        return torch_op.qk_norm_rope_(
            q, k, q_weight, k_weight, positions, spec, q_bias=q_bias, k_bias=k_bias,
            cos_sin=cos_sin, cos_sin_cache=cos_sin_cache, inv_freq=inv_freq, seq_len=seq_len,
            out=out,
        )  # fmt: skip
    first = _first(q, k)
    extras = (q_bias, k_bias, cos_sin, cos_sin_cache, inv_freq, out)
    plan, operands = _prepare(
        True, None, q, k, q_weight, k_weight, positions, spec, seq_len, extras
    )
    _run(first.is_cuda, plan, *operands)


def qkv_norm_rope_(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    cos_sin_cache: Tensor | None = None,
    inv_freq: Tensor | None = None,
    seq_len: int | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
) -> None:
    """``qk_norm_rope`` in place on a packed projection; V is not touched.

    qkv: ``[..., (nq + nk + nv) * head_dim]``, last stride 1; nv is inferred and may be 0. With
    ``out`` = (``[..., nq, head_dim]``, ``[..., nk, head_dim]``) the result goes there, qkv stays.
    """
    # The plain call, as engines make it per layer: no frame and no container that it does not need.
    if (
        not _by_dynamo()
        and spec.__class__ is Spec
        and (plan := spec._plan) is not None
        and qkv.__class__ is positions.__class__ is Tensor
        and q_bias is k_bias is cos_sin is cos_sin_cache is inv_freq is seq_len is out is None
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

        torch_op.qkv_norm_rope_(
            qkv, q_weight, k_weight, positions, spec, q_bias=q_bias, k_bias=k_bias,
            cos_sin=cos_sin, cos_sin_cache=cos_sin_cache, inv_freq=inv_freq, seq_len=seq_len,
            out=out,
        )  # fmt: skip
        return
    first = _plain("qkv", qkv)
    extras = (q_bias, k_bias, cos_sin, cos_sin_cache, inv_freq, out)
    plan, operands = _prepare(
        True, qkv, None, None, q_weight, k_weight, positions, spec, seq_len, extras
    )
    _run(first.is_cuda, plan, *operands)
