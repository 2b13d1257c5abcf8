"""``Spec.from_config``: one attention layer of a Hugging Face config as a Spec.

`qkrope.config_families` maps a model_type to what that architecture does to Q and K. A model_type,
rope type or rope field that is not known raises ValueError: nothing is guessed. Where a key is
absent the value is the one the architecture's own config class would use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ._limits import choice, integer, refuse
from .config_families import FAMILIES
from .config_fields import REQUIRED, Config
from .config_layers import Family, Layer
from .norm import Norm
from .rounding import Rounding
from .spec import Spec

__all__ = ["FAMILIES", "PARTS", "TEXT_PARTS", "spec_from_config"]

PARTS = ("attention", "query", "indexer", "output")

# Wrappers: where their text part is, and its model_type where the file leaves that out.
_NESTED = ("text_config",)
TEXT_PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "qwen3_vl": (_NESTED, "qwen3_vl_text"),
    "qwen3_vl_moe": (_NESTED, "qwen3_vl_moe_text"),
    "qwen3_omni_moe": (("thinker_config", "text_config"), "qwen3_omni_moe_text"),
    "qwen3_omni_moe_thinker": (_NESTED, "qwen3_omni_moe_text"),
    "qwen3_asr": (_NESTED, "qwen3"),
    "qwen3_5": (_NESTED, "qwen3_5_text"),
    "qwen3_5_moe": (_NESTED, "qwen3_5_moe_text"),
    "qwen4_exp": (_NESTED, "qwen4_exp_text"),
    "gemma3": (_NESTED, "gemma3_text"),
    "gemma3n": (_NESTED, "gemma3n_text"),
    "gemma4": (_NESTED, "gemma4_text"),
    "gemma4_unified": (_NESTED, "gemma4_unified_text"),
    "diffusion_gemma": (_NESTED, "diffusion_gemma_text"),
    "embedding_gemma2": (_NESTED, "embedding_gemma2_text"),
    "t5gemma2": (("decoder",), "t5gemma2_decoder"),
    "t5gemma2_encoder": (_NESTED, "t5gemma2_text"),
    "minimax_m3_vl": (_NESTED, "minimax_m3_vl_text"),
    "llama4": (_NESTED, "llama4_text"),
    "hunyuan_vl": (_NESTED, "hunyuan_vl_text"),
    "exaone4_5": (_NESTED, "exaone4"),
    "lfm2_vl": (_NESTED, "lfm2"),
    "lfm3_vl": (_NESTED, "lfm3"),
    "muse_spark": (_NESTED, "muse_spark_text"),
    "muse_glimmer": (_NESTED, "muse_glimmer_text"),
    "molmo2": (_NESTED, "molmo2_text"),
    "kimi_k25": (_NESTED, "deepseek_v3"),
    "dots3_note": (_NESTED, "dots3_note_text"),
    "mistral_large4": (_NESTED, "mistral_large4_text"),
}


def spec_from_config(
    config: Any,
    layer_idx: int | None = None,
    *,
    rounding: Rounding = "once",
    part: str = "attention",
) -> Spec:
    """The Spec of layer ``layer_idx`` of a config.

    ``config`` is a ``transformers`` config object, a dict, or the path of a config.json or of its
    folder; the text part of a vision-language config is taken. ``layer_idx=None`` is the first
    layer that has attention (layer 0 of most models). Layers differ where a model mixes local and
    global attention. ``rounding="upstream"`` is the model's own chain of casts.

    ``part`` is "attention", or in models that have more than Q, K and V heads::

        "query"    latent attention: the query as it is projected, [nope | pe]; "attention" is then
                   the row [latent | k_pe], with Q as it is absorbed into that row
        "indexer"  the heads that choose tokens for sparse attention, Q and K
        "output"   DeepSeek-V4: the rotation back that its attention output takes

    Positions of models with ``mrope_section`` are [A, ...]; text has the same on each axis. What a
    model multiplies onto q or k is no part of a Spec: see the calls' ``q_scale``, ``k_scale``.

    Raises ValueError naming what is missing or not known, TypeError for another kind of object.
    """
    c = _open(config)
    family = FAMILIES[c.model_type]
    choice("part", part, PARTS)
    layer = _layer(c, family, layer_idx)
    if part == "attention":
        return _attention(layer, rounding)
    if part == "query" and family.latent is not None:
        return _query(layer, rounding)
    if part == "indexer" and family.indexer is not None:
        return _indexer(layer, rounding)
    if part == "output" and c.model_type == "deepseek_v4":
        spec = _attention(layer, rounding)
        assert spec.rope is not None
        rope = replace(spec.rope, reverse=True)
        return replace(spec, norm=Norm("none"), k_norm=None, rope=rope)
    c.refuse("a part that the model has", repr(part))


def _attention(layer: Layer, rounding: Rounding) -> Spec:
    family, c = layer.family, layer.config
    if family.latent is None:
        return _spec(layer, family.norm(layer), None, rounding)
    rank = c.integer("kv_lora_rank")
    eps = c.get("rms_norm_eps") if family.latent.eps is None else family.latent.eps
    rest = Norm(eps=eps) if family.latent.rest else None
    k_norm = Norm(eps=eps, dim=rank, rest=rest)
    layer = replace(_latent_layer(layer, rank), num_kv_heads=1)
    if family.rope(layer) is None:  # then no channels are set aside to turn
        layer, k_norm = replace(layer, head_dim=rank), Norm(eps=eps)
    return _spec(layer, Norm("none"), k_norm, rounding)


def _query(layer: Layer, rounding: Rounding) -> Spec:
    layer = _latent_layer(layer, layer.config.integer("qk_nope_head_dim"))
    layer = replace(layer, num_kv_heads=layer.num_q_heads)
    return _spec(layer, Norm("none"), None, rounding)


def _latent_layer(layer: Layer, width: int) -> Layer:
    """The head [``width`` channels | those that turn]."""
    c, latent = layer.config, layer.family.latent
    assert latent is not None
    pairing, rotary = latent.pairing, c.integer("qk_rope_head_dim")
    if pairing == "flag":
        pairing = "interleaved" if c.get("rope_interleave", True) else "half"
    nope = c.integer("qk_nope_head_dim")
    return replace(
        layer,
        head_dim=width + rotary,
        rotary=rotary,
        shared=(rotary, nope + rotary, c.get("head_dim", None) or rotary),
        trailing=True,
        pairing=pairing,
        output_pairing=latent.output_pairing if pairing == "interleaved" else None,
    )


def _indexer(layer: Layer, rounding: Rounding) -> Spec:
    c, indexer = layer.config, layer.family.indexer
    assert indexer is not None
    heads, kv_heads, head_dim = indexer.keys
    if indexer.rotary is not None:
        rotary, shared = c.integer(indexer.rotary), _latent_layer(layer, 0).shared
    else:  # the table of the attention heads, whatever the indexer's own head_dim
        rope = layer.family.rope(layer)
        rotary, shared = layer.head_dim, (layer.head_dim,)
        rotary = rotary if rope is None or rope.dim is None else rope.dim
    layer = replace(
        layer,
        num_q_heads=c.integer(heads),
        num_kv_heads=1 if kv_heads is None else c.integer(kv_heads),
        head_dim=c.integer(head_dim),
        rotary=rotary,
        shared=shared,
        trailing=indexer.trailing,
        pairing=indexer.pairing,
        output_pairing="half" if indexer.pairing == "interleaved" else None,
    )
    k_norm = None if indexer.k_norm is None else indexer.k_norm(layer)
    return _spec(layer, indexer.norm(layer), k_norm, rounding, indexer.rounding)


def _spec(
    layer: Layer,
    norm: Norm,
    k_norm: Norm | None,
    rounding: Rounding,
    upstream: Rounding | None = None,
) -> Spec:
    family = layer.family
    if rounding == "upstream":
        rounding = upstream or family.roundings.get(layer.kind, family.rounding)
    return Spec(
        num_q_heads=layer.num_q_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        norm=norm,
        k_norm=k_norm,
        rope=family.rope(layer),
        order=family.order,
        rounding=rounding,
        max_position_embeddings=layer.config.get("max_position_embeddings", None),
        v_norm=None if family.v_norm is None else family.v_norm(layer),
    )


def _open(config: Any) -> Config:
    """The text part of any accepted form of config."""
    if isinstance(config, str | os.PathLike):
        if Path(config).is_dir():
            config = Path(config) / "config.json"
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    config = _plain(config)
    model_type = config.get("model_type")
    if model_type in TEXT_PARTS:
        path, default = TEXT_PARTS[model_type]
        inner: Any = config
        for key in path:
            inner = None if inner is None else _plain(inner).get(key)
        if inner is not None:
            config = _plain(inner)
            model_type = config.get("model_type", default)
    if model_type not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *TEXT_PARTS}))
        refuse(ValueError, "config.model_type", f"one of {known}", model_type)
    return Config(model_type, config, FAMILIES[model_type].defaults)


def _plain(config: Any) -> Mapping[str, Any]:
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        refuse(TypeError, "config", "a transformers config, a dict or a path", config)
    return config


def _layer(c: Config, family: Family, layer_idx: int | None) -> Layer:
    """One layer, which must have attention, with the heads it has there."""
    types = family.layer_types(c)
    first = next((i for i, kind in enumerate(types) if kind in family.attention), None)
    if layer_idx is None:
        layer_idx = first or 0
    num_layers = len(types) or c.get("num_hidden_layers", None) or 1 << 16
    index = integer("layer_idx", layer_idx, 0, num_layers - 1)
    kind = types[index] if types else "full_attention"
    if kind not in family.attention:
        c.refuse(f"layer_idx of an attention layer (the first is {first})", f"{index}: {kind!r}")
    c = c.over(family.overrides(c, index, kind))
    num_q_heads = c.integer("num_attention_heads")
    optional = family.kv_optional or family.latent is not None
    num_kv_heads = c.get("num_key_value_heads", None if optional else REQUIRED)
    head_dim = c.get("head_dim", family.head_dim)
    if head_dim is None:
        head_dim = c.integer("hidden_size") // num_q_heads
    return Layer(
        config=c,
        family=family,
        index=index,
        kind=kind,
        num_q_heads=num_q_heads,
        num_kv_heads=num_q_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        pairing=family.pairing,
        reverse=family.reverse,
        trailing=family.trailing,
    )
