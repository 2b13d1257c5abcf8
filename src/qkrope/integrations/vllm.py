"""qkrope behind vLLM's ``torch.ops._C.fused_qk_norm_rope``.

    import qkrope.integrations.vllm
    qkrope.integrations.vllm.install()

or, in each process that vLLM starts, with ``VLLM_PLUGINS=qkrope`` in its environment. vLLM calls
the op where its compiler pass ``enable_qk_norm_rope_fusion`` finds norm and rotation, and through
``vllm._custom_ops``. Both name the op, not a function, so `install` gives the op other kernels in
torch's dispatcher: for CUDA the new one hides vLLM's until `uninstall` takes it away, for the CPU,
where vLLM has none, it is the only one. Where this build of vLLM does not define the op, it is
defined, with the signature of 0.33.0.

Cosine and sine come from vLLM's table, as with its own kernel; between norm and rotation nothing is
rounded, in neither. ``forced_token_heads_per_warp`` says how vLLM's kernel is launched: ours takes
no notice of it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..norm import Norm
from ..rope import Rope
from ..spec import Spec

__all__ = ["install", "plugin", "uninstall"]

_NAME = "fused_qk_norm_rope"
_SCHEMA = (
    f"{_NAME}(Tensor(a!) qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, "
    "float eps, Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, "
    "Tensor position_ids, int forced_token_heads_per_warp=-1) -> ()"
)
_libraries: list[torch.library.Library] = []


def install() -> None:
    """Give ``torch.ops._C.fused_qk_norm_rope`` qkrope's kernels, for CUDA and CPU tensors.

    A second call does nothing. Raises ImportError where vLLM cannot be imported, and RuntimeError
    where its op has another signature. Nothing is changed then.
    """
    if _libraries:
        return
    try:
        importlib.import_module("vllm._custom_ops")  # vLLM's ops must be there before ours
    except Exception as error:  # a library that does not load raises what it likes
        raise ImportError(
            f"vLLM: expected vllm._custom_ops, got {type(error).__name__}: {error}"
        ) from error
    if hasattr(torch.ops._C, _NAME):
        _check_schema(getattr(torch.ops._C, _NAME).default._schema)
        library = torch.library.Library("_C", "IMPL")
    else:
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(_SCHEMA)
        fake = f"_C::{_NAME}"
        torch.library.register_fake(fake, lambda *args, **keywords: None, lib=library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for key in ("CUDA", "CPU"):
            library.impl(_NAME, fused_qk_norm_rope, key, allow_override=True)
    _libraries.append(library)


def uninstall() -> None:
    """Take qkrope's kernels away, and the op where `install` defined it."""
    while _libraries:
        _libraries.pop()._destroy()


def plugin() -> None:
    """`install` where ``VLLM_PLUGINS`` names qkrope: the entry point that vLLM calls."""
    if "qkrope" in os.environ.get("VLLM_PLUGINS", "").split(","):
        install()


def fused_qk_norm_rope(  # noqa: PLR0913  vLLM's signature
    qkv: Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    position_ids: Tensor,
    forced_token_heads_per_warp: int = -1,
) -> None:
    """RMSNorm each Q and K head of ``qkv``, then rotate it by a table, in place; V is untouched.

    qkv: ``[..., (num_heads_q + num_heads_k + num_heads_v) * head_dim]``, float32, bfloat16 or
    float16. q_weight, k_weight: ``[head_dim]``. cos_sin_cache: ``[max_position, rotary_dim]`` =
    [cos | sin], float32 or the dtype of qkv. position_ids: int32 or int64, broadcast to the leading
    dimensions of qkv. Pairs are channels (i, i + rotary_dim / 2) with ``is_neox``, else
    (2i, 2i + 1). ``forced_token_heads_per_warp`` is vLLM's and changes nothing.

    Raises ValueError or TypeError before anything is written.
    """
    width = (num_heads_q + num_heads_k + num_heads_v) * head_dim
    if qkv.shape[-1:] != (width,):
        raise ValueError(
            f"qkv: expected a last dimension of (num_heads_q + num_heads_k + num_heads_v) * "
            f"head_dim = {width}, got shape {list(qkv.shape)}"
        )
    if cos_sin_cache.ndim != 2:
        raise ValueError(
            f"cos_sin_cache: expected shape [max_position, rotary_dim] = [cos | sin], got "
            f"{list(cos_sin_cache.shape)}"
        )
    spec = _spec(num_heads_q, num_heads_k, head_dim, eps, is_neox, cos_sin_cache.shape[1])
    ops.qkv_norm_rope_(qkv, q_weight, k_weight, position_ids, spec, cos_sin_cache=cos_sin_cache)


@lru_cache(maxsize=1024)
def _spec(
    num_heads_q: int, num_heads_k: int, head_dim: int, eps: float, is_neox: bool, rotary_dim: int
) -> Spec:
    rope = Rope(dim=rotary_dim, pairing="half" if is_neox else "interleaved")
    return Spec(num_heads_q, num_heads_k, head_dim, norm=Norm(eps=eps), rope=rope)


def _check_schema(schema: Any) -> None:
    """Raise RuntimeError where the op of this vLLM takes something else."""
    expected = [part.split("=")[0].split()[-1] for part in _SCHEMA[:-6].split("(", 1)[1].split(",")]
    got = [argument.name for argument in schema.arguments]
    if got not in (expected, expected[:-1]):  # older releases lack the last
        raise RuntimeError(
            f"torch.ops._C.{_NAME}: expected the arguments ({', '.join(expected)}), got "
            f"({', '.join(got)})"
        )
