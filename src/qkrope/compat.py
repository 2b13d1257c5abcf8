"""The SGLang and TensorRT-LLM calls, with their argument order, on ``qkrope.ops``.

Both rotate by YaRN's (factor, low, high, attention_factor) triple; factor 1 with attention_factor 1
is plain RoPE. They also take what the originals refuse: float16 and float32, int64 positions, any
even head and rotary dim, any layout of leading dimensions, and tensors on the CPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from . import ops
from ._limits import flag, integer, real, refuse
from .scaling import YaRN
from .spec import MAX_HEAD_DIM, MAX_HEADS, Norm, Rope, Spec
from .variant import DTYPES

__all__ = ["can_use_fused_qk_norm_rope", "fused_qk_norm_rope", "fused_qk_norm_rope_out"]

# (Spec, width of a packed row) of every argument tuple seen: a model has a few.
_specs: dict[tuple[Any, ...], tuple[Spec, int]] = {}
_MAX_SPECS = 1024


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    base: float,
    is_neox: bool,
    position_ids: torch.Tensor,
    factor: float,
    low: float,
    high: float,
    attention_factor: float,
    rotary_dim: int | None = None,
) -> None:
    """RMSNorm each Q and K head of ``qkv``, then rotate it, in place; V is untouched.

    qkv: ``[..., (num_heads_q + num_heads_k + num_heads_v) * head_dim]``, float32, bfloat16 or
    float16. q_weight, k_weight: ``[head_dim]``. position_ids: int32 or int64, broadcast to the
    leading dimensions of qkv. ``base`` is theta; pairs are channels (i, i + rotary_dim / 2) with
    ``is_neox``, else (2i, 2i + 1); ``rotary_dim=None`` rotates the whole head. See
    ``YaRN.from_ramp`` for factor, low, high and attention_factor.

    Raises ValueError or TypeError before anything is written.
    """
    key = (
        num_heads_q, num_heads_k, num_heads_v, head_dim, eps, base, is_neox,
        factor, low, high, attention_factor, rotary_dim,
    )  # fmt: skip
    try:
        spec, width = _specs.get(key) or _remember(key)
    except TypeError:  # an unhashable argument, or a refused one: either way _make names it
        spec, width = _make(*key)
    try:
        columns = qkv.shape[-1]
    except (AttributeError, IndexError):
        columns = width  # no tensor, or one without dimensions: the call below names it
    if columns != width:
        raise ValueError(
            f"qkv: expected a last dimension of (num_heads_q + num_heads_k + num_heads_v) * "
            f"head_dim = {width}, got {columns}"
        )
    ops.qkv_norm_rope_(qkv, q_weight, k_weight, position_ids, spec)


def fused_qk_norm_rope_out(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    position_ids: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    base: float,
    is_neox: bool,
    factor: float,
    low: float,
    high: float,
    attention_factor: float,
    rotary_dim: int | None,
) -> None:
    """Do ``fused_qk_norm_rope`` with this argument order, in place in spite of its name."""
    fused_qk_norm_rope(
        qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, base,
        is_neox, position_ids, factor, low, high, attention_factor, rotary_dim,
    )  # fmt: skip


def can_use_fused_qk_norm_rope(
    head_dim: int,
    is_neox: bool,
    dtype: torch.dtype,
    yarn: bool = False,
    *,
    rotary_dim: int | None = None,
    device: torch.device | str | None = None,
) -> bool:
    """Whether the calls above run for these arguments; after True they compile nothing.

    Builds and loads exactly the variant they will use on ``device`` (None: the current CUDA device,
    or the CPU where there is none) with q, k and both weights of ``dtype``. ``yarn`` changes
    nothing: one variant serves every scaling.

    The reason for False goes to a UserWarning. A variant that should compile and does not raises
    CompileError; an argument of the wrong type raises TypeError.
    """
    flag("yarn", yarn)
    if not isinstance(dtype, torch.dtype):
        refuse(TypeError, "dtype", "a torch.dtype", dtype)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _why_not(torch.device(device), dtype, head_dim, is_neox, rotary_dim)
    if reason is not None:
        warnings.warn(f"fused_qk_norm_rope cannot be used: {reason}", UserWarning, stacklevel=2)
    return reason is None


def _why_not(
    device: torch.device, dtype: torch.dtype, head_dim: Any, is_neox: Any, rotary_dim: Any
) -> str | None:
    """Build what a call will use; the reason it cannot, or None."""
    if str(dtype).removeprefix("torch.") not in DTYPES:
        return f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"device: expected a CUDA device that torch can use, got {device} and none of them"
    try:
        spec, _ = _make(1, 1, 0, head_dim, 1e-6, 1e4, is_neox, 1.0, 0.0, 0.0, 1.0, rotary_dim)
        if device.type == "cuda":
            ops.build_variant(spec, device, dtype, dtype)
        else:
            ops.warmup(spec, device, dtype)
    except ValueError as error:
        return str(error)
    return None


def _remember(key: tuple[Any, ...]) -> tuple[Spec, int]:
    entry = _make(*key)
    if len(_specs) >= _MAX_SPECS:
        _specs.clear()
    _specs[key] = entry
    return entry


def _make(
    num_heads_q: Any,
    num_heads_k: Any,
    num_heads_v: Any,
    head_dim: Any,
    eps: Any,
    base: Any,
    is_neox: Any,
    factor: Any,
    low: Any,
    high: Any,
    attention_factor: Any,
    rotary_dim: Any,
) -> tuple[Spec, int]:
    """The Spec of a call and the width of its packed row, each limit checked by its name here."""
    heads_q = integer("num_heads_q", num_heads_q, 1, MAX_HEADS)
    heads_k = integer("num_heads_k", num_heads_k, 1, MAX_HEADS)
    heads_v = integer("num_heads_v", num_heads_v, 0, MAX_HEADS)
    head_dim = integer("head_dim", head_dim, 2, MAX_HEAD_DIM, even=True)
    if rotary_dim is not None:
        rotary_dim = integer("rotary_dim", rotary_dim, 2, head_dim, even=True)
    factor = real("factor", factor, above=0.0)
    attention_factor = real("attention_factor", attention_factor, above=0.0)
    scaling = None
    if factor != 1.0 or attention_factor != 1.0:
        low, high = real("low", low), real("high", high)
        scaling = YaRN.from_ramp(factor, low, high, attention_factor)
    rope = Rope(
        dim=rotary_dim,
        theta=real("base", base, above=0.0),
        pairing="half" if flag("is_neox", is_neox) else "interleaved",
        scaling=scaling,
    )
    norm = Norm(eps=real("eps", eps, low=0.0))
    spec = Spec(heads_q, heads_k, head_dim, norm=norm, rope=rope)
    return spec, (heads_q + heads_k + heads_v) * head_dim
