"""The families of transformers that test_upstream_transformers.py runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkrope.spec import Spec
from upstream import Call, Seen
from upstream_transformers import TOKENS, Family, calls_of, projections


def beam_scale(seen: Seen, config: Any) -> dict[str, Any]:
    """Full layers scale q by the token's position."""
    scale = seen.kwargs["attention_scaling"]
    return {} if scale is None else {"q_scale": scale.transpose(1, 2)}


def muse_scale(seen: Seen, config: Any) -> dict[str, Any]:
    """A constant on q."""
    return {"q_scale": config.qk_scale_factor}


def llama4_scale(seen: Seen, config: Any) -> dict[str, Any]:
    """Layers without rotation scale q by the token's index."""
    if seen.module.use_rope:
        return {}
    index = torch.arange(TOKENS).float() + 1
    scale = torch.log1p(torch.floor(index / config.floor_scale)) * config.attn_scale + 1
    return {"q_scale": scale[:, None, None]}


def t5gemma2_decoder(
    family: Family, seen: Seen, config: Any, layer: int, rounding: str
) -> list[Call]:
    """The encoder's keys follow the decoder's: the same norm, no rotation."""
    (call,) = calls_of(family, seen, config, layer, rounding)
    own = call.k.shape[1]
    call.k, call.got = (
        seen.first["k_proj"].unflatten(-1, call.k.shape[2:]),
        (seen.q, seen.k[:, :own]),
    )
    spec = replace(call.spec, rope=None)
    k = seen.outputs["k_proj"].unflatten(-1, call.k.shape[2:])
    cross = Call(spec, None, k, None, call.k_weight, got=(None, seen.k[:, own:]))
    return [call, cross]


def t5gemma2_forward(model: Any, ids: Tensor, positions: Tensor) -> None:
    """A decoder that attends to an encoder's states."""
    states = torch.randn(*ids.shape, model.config.hidden_size).to(model.dtype)
    model(input_ids=ids, position_ids=positions, encoder_hidden_states=states, use_cache=False)


def embedded(model: Any, ids: Tensor, positions: Tensor) -> None:
    """A model that takes embeddings."""
    x = torch.randn(*ids.shape, model.config.hidden_size).to(model.dtype)
    model(inputs_embeds=x, position_ids=positions, use_cache=False)


def shared(seen: Seen, spec: Spec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Layers that take K and V from an earlier one have only Q."""
    if seen.module.is_kv_shared_layer:
        return seen.outputs["q_proj"].unflatten(-1, (spec.num_q_heads, -1)), None, None
    return projections(seen, spec)


FULL, LOCAL = "full_attention", "sliding_attention"
H16 = {"head_dim": 16}
LAYER_NORMS = ("q_layernorm", "k_layernorm")
HUNYUAN_NORMS = ("query_layernorm", "key_layernorm")
HYBRID = {"num_hidden_layers": 2, "layer_types": [LOCAL, FULL]}
LINEAR = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", FULL],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
HUNYUAN_VL = {
    **H16,
    "rope_parameters": {
        "rope_type": "dynamic",
        "factor": 1.0,
        "alpha": 10.0,
        "rope_theta": 1e4,
        "mrope_section": [2, 2, 2, 2],
    },
}

FAMILIES = [
    Family("qwen3", "Qwen3Attention", H16),
    Family("qwen3_moe", "Qwen3MoeAttention", H16),
    Family(
        "qwen3_vl_text",
        "Qwen3VLTextAttention",
        {**H16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        axes=3,
    ),
    Family(
        "qwen3_vl_moe_text",
        "Qwen3VLMoeTextAttention",
        {**H16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        axes=3,
    ),
    Family(
        "qwen3_omni_moe_text",
        "Qwen3OmniMoeThinkerTextAttention",
        {**H16, "rope_parameters": MROPE},
        model="Qwen3OmniMoeThinkerTextModel",
        axes=3,
    ),
    Family(
        "qwen3_omni_moe_talker_text",
        "Qwen3OmniMoeThinkerTextAttention",
        {**H16, "rope_parameters": MROPE, "shared_expert_intermediate_size": 16},
        model="Qwen3OmniMoeTalkerModel",
        forward=embedded,
        axes=3,
    ),
    Family(
        "qwen3_omni_moe_talker_code_predictor",
        "Qwen3OmniMoeTalkerCodePredictorAttention",
        H16,
        model="Qwen3OmniMoeTalkerCodePredictorModel",
        forward=embedded,
    ),
    Family("qwen3_next", "Qwen3NextAttention", {**LINEAR, "head_dim": 32}, (1,)),
    Family("qwen3_5_text", "Qwen3_5Attention", {**LINEAR, "head_dim": 256}, (1,), axes=3),
    Family("qwen3_5_moe_text", "Qwen3_5MoeAttention", {**LINEAR, "head_dim": 256}, (1,), axes=3),
    Family("gemma3_text", "Gemma3Attention", {**H16, **HYBRID}, (0, 1)),
    Family(
        "t5gemma2_text",
        "T5Gemma2SelfAttention",
        {**H16, **HYBRID, "dropout_rate": 0.0},
        (0, 1),
        model="T5Gemma2TextEncoder",
    ),
    Family(
        "t5gemma2_decoder",
        "T5Gemma2MergedAttention",
        {**H16, **HYBRID, "dropout_rate": 0.0},
        (0, 1),
        model="T5Gemma2Decoder",
        forward=t5gemma2_forward,
        calls=t5gemma2_decoder,
    ),
    Family(
        "diffusion_gemma_text",
        "DiffusionGemmaEncoderTextAttention",
        {**H16, **HYBRID, "global_head_dim": 32, "top_k_experts": 2},
        (0, 1),
        model="DiffusionGemmaEncoderTextModel",
    ),
    Family(
        "gemma3n_text",
        "Gemma3nTextAttention",
        {
            **H16,
            "num_hidden_layers": 4,
            "layer_types": [LOCAL, FULL] * 2,
            "num_kv_shared_layers": 2,
        },
        (0, 1, 2, 3),
        heads=shared,
    ),
    Family("gemma4_text", "Gemma4TextAttention", {**H16, **HYBRID, "global_head_dim": 32}, (0, 1)),
    Family(
        "gemma4_unified_text",
        "Gemma4UnifiedTextAttention",
        {
            **H16,
            **HYBRID,
            "global_head_dim": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
        (0, 1),
    ),
    Family(
        "embedding_gemma2_text",
        "EmbeddingGemma2Attention",
        {**H16, **HYBRID, "global_head_dim": 32},
        (0, 1),
    ),
    Family("olmo2", "Olmo2Attention"),
    Family("olmo3", "Olmo3Attention", HYBRID, (0, 1)),
    Family("flex_olmo", "FlexOlmoAttention"),
    Family("olmo_hybrid", "OlmoHybridAttention", LINEAR, (1,)),
    Family(
        "olmo_hybrid",
        "OlmoHybridAttention",
        {**LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
        (1,),
        note="released",
    ),
    Family("olmoe", "OlmoeAttention"),
    Family("minimax_m2", "MiniMaxM2Attention", {"head_dim": 16, "rotary_dim": 8}),
    Family(
        "minimax_m3_vl_text",
        "MiniMaxM3VLAttention",
        {
            **H16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    Family("glm4_moe", "Glm4MoeAttention", {**H16, "use_qk_norm": True}),
    Family(
        "llama4_text",
        "Llama4TextAttention",
        {**H16, "num_hidden_layers": 4, "floor_scale": 2},
        (0, 3),
        norms=("", ""),
        extras=llama4_scale,
    ),
    Family("hunyuan_v1_dense", "HunYuanDenseV1Attention", H16, norms=HUNYUAN_NORMS),
    Family("hunyuan_v1_moe", "HunYuanMoEV1Attention", H16, norms=HUNYUAN_NORMS),
    # Where axes differ this code gives the two channels of a pair different axes (its sections are
    # doubled, not repeated), which is no rotation; in text they agree. vLLM's sections are pairs.
    Family(
        "hunyuan_vl_text",
        "HunYuanVLDenseV1Attention",
        HUNYUAN_VL,
        axes=4,
        norms=HUNYUAN_NORMS,
        same_axes=True,
    ),
    Family(
        "hunyuan_vl_text",
        "HunYuanVLDenseV1Attention",
        HUNYUAN_VL,
        axes=4,
        norms=HUNYUAN_NORMS,
        own_angles=False,
        wide_table=True,
        note="images",
    ),
    Family("hy_v3", "HYV3Attention", H16),
    Family("exaone4", "Exaone4Attention", HYBRID, (0, 1)),
    Family("exaone_moe", "ExaoneMoeAttention", HYBRID, (0, 1)),
    Family("kolibri1", "Kolibri1Attention", {**H16, **HYBRID}, (0, 1)),
    Family("cohere", "CohereAttention", {"use_qk_norm": True}),
    Family(
        "stablelm",
        "StableLmAttention",
        {"qk_layernorm": True, "hidden_size": 64},
        norms=LAYER_NORMS,
    ),
    Family("dots1", "Dots1Attention"),
    Family("lfm2", "Lfm2Attention", {"layer_types": [FULL]}, norms=LAYER_NORMS),
    Family("lfm2_moe", "Lfm2MoeAttention", {"layer_types": [FULL]}, norms=LAYER_NORMS),
    Family("lfm3", "Lfm3Attention", {**H16, **HYBRID}, (0, 1)),
    Family("afmoe", "AfmoeAttention", {**H16, **HYBRID}, (0, 1)),
    Family(
        "laguna",
        "LagunaAttention",
        {**H16, **HYBRID, "num_attention_heads_per_layer": [6, 4]},
        (0, 1),
    ),
    Family("mellum", "MellumAttention", {**H16, **HYBRID}, (0, 1)),
    Family("beam", "BeamAttention", {**H16, **HYBRID}, (0, 1), extras=beam_scale),
    Family("flint", "FlintAttention", {**H16, **HYBRID}, (0, 1)),
    Family(
        "muse_spark_text",
        "MuseSparkTextAttention",
        {**H16, **HYBRID, "layer_rope_theta": [5e5, 0]},
        (0, 1),
        norms=("", ""),
        extras=muse_scale,
    ),
    Family(
        "muse_glimmer_text",
        "MuseGlimmerTextAttention",
        {**H16, **HYBRID},
        (0, 1),
        norms=("", ""),
        extras=muse_scale,
    ),
    Family("doge", "DogeAttention"),
    Family("nanochat", "NanoChatAttention", norms=("", "")),
    Family("molmo2_text", "Molmo2Attention", H16),
    Family("molmo2_text", "Molmo2Attention", {**H16, "qk_norm_type": "olmo"}, note="row"),
]
