"""Attention processors for diffusion transformers of diffusers, and one call that sets them.

Stock: each norm of Q and K, a concatenation of streams and a rotation in float32 are kernels of
their own. Here one call of `qkrope.qk_norm_rope` does them, on the model's own weights and rotation
tables; projections, masks, the attention backend and the output stay diffusers'. `patch` sets the
processor that fits on each attention module, `unpatch` puts the old ones back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..rounding import Rounding
from .diffusers_base import ADDED, QK, Processor, check_rounding
from .diffusers_images import (
    Flux2Processor,
    Flux2SingleProcessor,
    FluxProcessor,
    QwenImageProcessor,
    ZImageProcessor,
)
from .diffusers_videos import HunyuanVideoProcessor, LTX2Processor, WanProcessor
from .report import Report, block, grouped, warn_left

__all__ = [
    "Flux2Processor",
    "Flux2SingleProcessor",
    "FluxProcessor",
    "HunyuanVideoProcessor",
    "LTX2Processor",
    "QwenImageProcessor",
    "Report",
    "WanProcessor",
    "ZImageProcessor",
    "patch",
    "patched",
    "unpatch",
]

# What stands in for a stock processor: by file and class, exactly, since a subclass may do more.
# Some files hold a copy of another's, which diffusers keeps the same by a tool.
_PROCESSORS: dict[str, type[Processor]] = {
    "transformers.transformer_flux.FluxAttnProcessor": FluxProcessor,
    "transformers.transformer_flux2.Flux2AttnProcessor": Flux2Processor,
    "transformers.transformer_flux2.Flux2ParallelSelfAttnProcessor": Flux2SingleProcessor,
    "transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0": HunyuanVideoProcessor,
    "transformers.transformer_ltx2.LTX2AudioVideoAttnProcessor": LTX2Processor,
    "transformers.transformer_ltx2.LTX2PerturbedAttnProcessor": LTX2Processor,
    "transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0": QwenImageProcessor,
    "transformers.transformer_wan.WanAttnProcessor": WanProcessor,
    "transformers.transformer_wan_animate.WanAttnProcessor": WanProcessor,
    "transformers.transformer_chronoedit.WanAttnProcessor": WanProcessor,
    "transformers.transformer_z_image.ZSingleStreamAttnProcessor": ZImageProcessor,
    "controlnets.controlnet_z_image.ZSingleStreamAttnProcessor": ZImageProcessor,
}
# Those that a user could expect here, and what they do that ours do not.
_REFUSED = {
    "transformers.transformer_flux.FluxIPAdapterAttnProcessor": (
        "FluxIPAdapterAttnProcessor attends to images with queries that are normalised and not "
        "rotated, and has weights of its own"
    ),
    "transformers.transformer_flux2.Flux2KVAttnProcessor": (
        "Flux2KVAttnProcessor keeps keys and values of reference images from one step to the next"
    ),
    "transformers.transformer_flux2.Flux2KVParallelSelfAttnProcessor": (
        "Flux2KVParallelSelfAttnProcessor keeps keys and values of reference images from one step "
        "to the next"
    ),
}
_MODELS = "FLUX.1, FLUX.2, Qwen-Image, Z-Image, HunyuanVideo, Wan or LTX-2"
_NO_NORM = "no norm of Q and K"


def patch(model: nn.Module, *, rounding: Rounding = "once") -> Report:
    """Set qkrope's processor on each attention module of a diffusers transformer that it knows.

    model: a transformer of FLUX.1, FLUX.2, Qwen-Image, Z-Image, HunyuanVideo, Wan or LTX-2, or any
    module that holds their attention modules (a ControlNet, one block). Nothing of it changes but
    the processors; the attention backend and context parallelism of the old ones stay set.
    rounding: as in `qkrope.Spec`; "once" is nearest to the exact value, "upstream" rounds where the
    model's own code does (the same bits but for ties).

    Returns a `Report`. Modules with a norm of Q and K that are left are named in a UserWarning too.
    Raises ValueError where a module is patched already, where there is nothing to patch, and for a
    rounding that there is not; TypeError for something else than a module. Nothing is changed then.
    """
    _refuse_no_module(model)
    check_rounding(rounding)
    made: list[tuple[Any, Processor]] = []
    done: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, attn in _attention(model):
        if isinstance(attn.processor, Processor):
            raise ValueError(f"model: expected one that is not patched, got {name} patched already")
        found = _fitting(attn, rounding)
        if isinstance(found, str):
            left[name] = found
        else:
            made.append((attn, found))
            done[name] = type(found).__name__
    if not made:
        why = "; ".join(grouped(left)) or "no module has an attention processor"
        raise ValueError(
            f"model: expected one with attention modules of {_MODELS}, got {type(model).__name__} "
            f"({why})"
        )
    for attn, processor in made:
        _set(attn, processor)
    warn_left({name: why for name, why in left.items() if why != _NO_NORM})
    return Report(done, left)


def unpatch(model: nn.Module) -> int:
    """Put back the processors that `patch` replaced; returns how many.

    They are the same objects as before, with the attention backend that is set now. Raises
    TypeError for something else than a module.
    """
    _refuse_no_module(model)
    ours = [attn for _, attn in _attention(model) if isinstance(attn.processor, Processor)]
    ours = [attn for attn in ours if attn.processor.stock is not None]
    for attn in ours:
        _set(attn, attn.processor.stock)
    return len(ours)


def patched(model: nn.Module, *, rounding: Rounding = "once") -> AbstractContextManager[Report]:
    """`patch` for the length of a ``with`` block, whatever ends it."""
    return block(patch, unpatch, model, rounding)


def _fitting(attn: Any, rounding: Rounding) -> Processor | str:
    """Our processor for an attention module, or why there is none."""
    kind = type(attn.processor)
    key = f"{kind.__module__.removeprefix('diffusers.models.')}.{kind.__name__}"
    if key in _REFUSED:
        return _REFUSED[key]
    if getattr(attn, "norm_q", None) is None and getattr(attn, "norm_k", None) is None:
        return _NO_NORM
    if key not in _PROCESSORS:
        return f"{kind.__name__} is none of the processors that qkrope knows"
    for name in (*QK, *ADDED):
        if hasattr(getattr(attn, name, None), "_hf_hook"):
            return f"{name} is offloaded by a hook, which reading its weight does not call"
    try:
        return _PROCESSORS[key](attn, rounding=rounding, stock=attn.processor)
    except ValueError as error:
        return str(error)


def _attention(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "set_processor") and getattr(module, "processor", None) is not None:
            yield name, module


def _set(attn: Any, processor: Any) -> None:
    """Set a processor, which goes on with the backend and parallelism of the one before."""
    for name in ("_attention_backend", "_parallel_config"):
        setattr(processor, name, getattr(attn.processor, name, None))
    attn.set_processor(processor)


def _refuse_no_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch module, such as pipe.transformer, got {type(model).__name__}"
        )
