"""Attention processors for diffusion transformers of diffusers, and one call that sets them.

Stock: each norm of Q and K, a concatenation of streams and a rotation in float32 are kernels of
their own. Here one call of `qkrope.qk_norm_rope` does them, on the model's own weights and rotation
tables; projections, masks, the attention backend and the output stay diffusers'. `patch` sets the
processor that fits on each attention module, `unpatch` puts the old ones back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .diffusers_base import Processor, check_rounding
from .diffusers_images import (
    Flux2Processor,
    Flux2SingleProcessor,
    FluxProcessor,
    QwenImageProcessor,
    ZImageProcessor,
)
from .diffusers_videos import HunyuanVideoProcessor, LTX2Processor, WanProcessor

__all__ = [
    "Flux2Processor",
    "Flux2SingleProcessor",
    "FluxProcessor",
    "HunyuanVideoProcessor",
    "LTX2Processor",
    "Patched",
    "QwenImageProcessor",
    "WanProcessor",
    "ZImageProcessor",
    "patch",
    "unpatch",
]

# What stands in for a stock processor: by file and class, exactly, since a subclass may do more.
_PROCESSORS: dict[str, type[Processor]] = {
    "transformer_flux.FluxAttnProcessor": FluxProcessor,
    "transformer_flux2.Flux2AttnProcessor": Flux2Processor,
    "transformer_flux2.Flux2ParallelSelfAttnProcessor": Flux2SingleProcessor,
    "transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0": HunyuanVideoProcessor,
    "transformer_ltx2.LTX2AudioVideoAttnProcessor": LTX2Processor,
    "transformer_ltx2.LTX2PerturbedAttnProcessor": LTX2Processor,
    "transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0": QwenImageProcessor,
    "transformer_wan.WanAttnProcessor": WanProcessor,
    "transformer_z_image.ZSingleStreamAttnProcessor": ZImageProcessor,
}
# Those that a user could expect here, and what they do that ours do not.
_REFUSED = {
    "transformer_flux.FluxIPAdapterAttnProcessor": (
        "FluxIPAdapterAttnProcessor attends to images with queries that are normalised and not "
        "rotated, and has weights of its own"
    ),
    "transformer_flux2.Flux2KVAttnProcessor": (
        "Flux2KVAttnProcessor keeps keys and values of reference images from one step to the next"
    ),
    "transformer_flux2.Flux2KVParallelSelfAttnProcessor": (
        "Flux2KVParallelSelfAttnProcessor keeps keys and values of reference images from one step "
        "to the next"
    ),
}
_MODELS = "FLUX.1, FLUX.2, Qwen-Image, Z-Image, HunyuanVideo, Wan or LTX-2"


@dataclass(frozen=True)
class Patched:
    """What `patch` did: names of attention modules, and for those left as they were the reason."""

    modules: tuple[str, ...]
    left: dict[str, str]


def patch(transformer: nn.Module, *, rounding: str = "once") -> Patched:
    """Set qkrope's processor on each attention module of a diffusers transformer that it knows.

    transformer: a model of FLUX.1, FLUX.2, Qwen-Image, Z-Image, HunyuanVideo, Wan or LTX-2, or any
    module that holds their attention modules (a ControlNet, one block). Nothing of it changes but
    the processors; the attention backend and context parallelism that the old ones had stay set.
    rounding: "once" rounds each element of Q and K once, at the end; "upstream" where the stock
    chain does, for its bits in bf16 and fp16 but for a few ties.

    Returns a `Patched`. Modules that are left as they were are in it by name, with the reason; a
    UserWarning tells of those among them that have a norm of Q and K.
    Raises TypeError for no module, ValueError where there is nothing to set, and for a rounding
    that is neither.
    """
    _refuse_no_module(transformer)
    check_rounding(rounding)
    made: dict[str, Processor] = {}
    left: dict[str, str] = {}
    for name, attn in _attention(transformer):
        stock = attn.processor.stock if isinstance(attn.processor, Processor) else attn.processor
        found = _fitting(attn, stock, rounding)
        if isinstance(found, str):
            left[name] = found
        else:
            made[name] = found
    if not made:
        why = "; ".join(sorted(set(left.values()))) or "no module has an attention processor"
        raise ValueError(
            f"transformer: expected one with attention modules of {_MODELS}, got "
            f"{type(transformer).__name__} ({why})"
        )
    for name, processor in made.items():
        _set(transformer.get_submodule(name), processor)
    hidden = {name: why for name, why in left.items() if why != _NO_NORM}
    if hidden:
        listed = "; ".join(f"{name}: {why}" for name, why in hidden.items())
        warnings.warn(f"left as they were: {listed}", UserWarning, stacklevel=2)
    return Patched(tuple(made), left)


def unpatch(transformer: nn.Module) -> tuple[str, ...]:
    """Put back the processors that `patch` replaced, and return the names of their modules.

    They are the same objects as before, with the attention backend that is set now. A model
    without qkrope's processors stays as it is. Raises TypeError for no module.
    """
    _refuse_no_module(transformer)
    names = []
    for name, attn in _attention(transformer):
        if isinstance(attn.processor, Processor) and attn.processor.stock is not None:
            _set(attn, attn.processor.stock)
            names.append(name)
    return tuple(names)


_NO_NORM = "has no norm of Q and K"


def _fitting(attn: Any, stock: Any, rounding: str) -> Processor | str:
    """Our processor for an attention module, or why there is none."""
    kind = type(stock)
    key = f"{kind.__module__.removeprefix('diffusers.models.transformers.')}.{kind.__name__}"
    if key in _REFUSED:
        return _REFUSED[key]
    if getattr(attn, "norm_q", None) is None and getattr(attn, "norm_k", None) is None:
        return _NO_NORM
    if key not in _PROCESSORS:
        return f"{kind.__name__} is none of the processors that qkrope knows"
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        if hasattr(getattr(attn, name, None), "_hf_hook"):
            return f"{name} is offloaded by a hook, which reading its weight does not call"
    try:
        return _PROCESSORS[key](attn, rounding=rounding, stock=stock)
    except ValueError as error:
        return str(error)


def _attention(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in transformer.named_modules():
        if hasattr(module, "set_processor") and getattr(module, "processor", None) is not None:
            yield name, module


def _set(attn: Any, processor: Any) -> None:
    """Set a processor, which goes on with the backend and parallelism of the one before."""
    for name in ("_attention_backend", "_parallel_config"):
        setattr(processor, name, getattr(attn.processor, name, None))
    attn.set_processor(processor)


def _refuse_no_module(transformer: Any) -> None:
    if not isinstance(transformer, nn.Module):
        raise TypeError(
            f"transformer: expected a torch module, such as pipe.transformer, got "
            f"{type(transformer).__name__}"
        )
