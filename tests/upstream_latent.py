"""Multi-head latent attention, its indexers, and DeepSeek-V4 (test_upstream_transformers.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkrope.spec import Spec
from upstream import Call, Seen
from upstream_transformers import Family, attribute, table_of

MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
DSA = {
    **MLA,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 2,
    "layer_types": ["indexed_attention"],
}


def latent(family: Family, seen: Seen, config: Any, layer: int, rounding: str) -> list[Call]:
    """The query [nope | pe] and the row [latent | k_pe]; then the indexer, where there is one."""
    module = seen.module
    query = Spec.from_config(config, layer, rounding=rounding, part="query")
    row = Spec.from_config(config, layer, rounding=rounding)
    q = seen.outputs.get("q_b_proj", seen.outputs.get("q_proj", seen.outputs.get("q_gate_proj")))
    q = q.unflatten(-1, (query.num_q_heads, -1))[..., : query.head_dim]  # [q | gate] in A.X-K2
    raw = seen.outputs["kv_a_proj_with_mqa"].unsqueeze(-2)
    normed = seen.inputs["kv_b_proj"].flatten(1, -2).unsqueeze(-2)  # [B, S, 1, latent]
    turned = row.head_dim - config_of(config, layer).kv_lora_rank  # none in a NoPE layer
    got = torch.cat((normed, seen.k[..., :1, seen.k.shape[-1] - turned :]), -1)
    weight = module.kv_a_layernorm.weight
    if (own := attribute(module, "k_rope_only_layernorm.weight")) is not None:
        weight = torch.cat((weight, own))
    scales = scales_of(seen, config, row.head_dim)
    calls = [
        Call(query, q, None, table=table_of(seen, query), got=(seen.q, None)),
        Call(row, None, raw, None, weight, table=table_of(seen, row), got=(None, got)),
    ]
    calls[0].extras |= {k: v for k, v in scales.items() if k == "q_scale"}
    calls[1].extras |= {k: v for k, v in scales.items() if k == "k_scale"}
    if getattr(module, "indexer", None) is not None and seen.products:
        calls.append(indexer(seen, config, layer, rounding))
    if family.own_angles is False:
        for call in calls:
            call.own_angles = False
    return calls


def config_of(config: Any, layer: int) -> Any:
    """The config of a layer of a model whose layers differ."""
    per_layer = getattr(config, "per_layer_config", None)
    return config if not per_layer else per_layer[layer]


def scales_of(seen: Seen, config: Any, width: int) -> dict[str, Any]:
    """LongCat and dots3-note scale the normed latent (and LongCat q)."""
    module, scales = seen.module, {}
    if (scale := getattr(module, "mla_scale_q_lora", None)) is not None:
        scales["q_scale"] = scale
    scale = getattr(module, "mla_scale_kv_lora", getattr(module, "kv_lora_scale", None))
    if scale is not None:
        scales["k_scale"] = torch.ones(width)
        scales["k_scale"][: module.kv_lora_rank] = scale
    return scales


def indexer(seen: Seen, config: Any, layer: int, rounding: str) -> Call:
    """Q and K of a sparse-attention indexer, as its scores multiply them."""
    spec = Spec.from_config(config, layer, rounding=rounding, part="indexer")
    q = seen.outputs["indexer.wq_b"].unflatten(-1, (spec.num_q_heads, -1))
    k = seen.outputs["indexer.wk"].unsqueeze(-2)
    norm = seen.module.indexer.k_norm
    a, b = seen.products[0]
    dtype = q.dtype
    got = a.to(dtype), b.squeeze(1).transpose(-1, -2).unsqueeze(-2).to(dtype)
    extras = {"k_bias": norm.bias}
    return Call(spec, q, k, None, norm.weight, extras=extras, table=table_of(seen, spec), got=got)


def minimax_m3(family: Family, seen: Seen, config: Any, layer: int, rounding: str) -> list[Call]:
    """The indexer's own four and one heads, beside those of attention."""
    from upstream_transformers import calls_of

    calls = calls_of(family, seen, config, layer, rounding)
    spec = Spec.from_config(config, layer, rounding=rounding, part="indexer")
    q = seen.outputs["indexer.q_proj"].unflatten(-1, (spec.num_q_heads, -1))
    k = seen.outputs["indexer.k_proj"].unsqueeze(-2)
    a, b = seen.products[0]
    got = a.transpose(1, 2).to(q.dtype), b.transpose(-1, -2).transpose(1, 2).to(q.dtype)
    weights = seen.module.indexer.q_norm.weight, seen.module.indexer.k_norm.weight
    return [*calls, Call(spec, q, k, *weights, table=table_of(seen, spec), got=got)]


def mistral4(family: Family, seen: Seen, config: Any, layer: int, rounding: str) -> list[Call]:
    """q is scaled by its position after the rotation: in bfloat16 that is a step of its own."""
    calls = latent(family, seen, config, layer, rounding)
    rope = config.rope_parameters
    floor = torch.floor(seen.kwargs["position_ids"] / rope["original_max_position_embeddings"])
    scale = (1 + rope["llama_4_scaling_beta"] * torch.log(1 + floor))[..., None, None]
    return after(calls, scale)


def after(calls: list[Call], scale: Tensor) -> list[Call]:
    """The query's call with a scale on its result."""
    query = calls[0]
    if query.q.dtype == torch.float32:
        query.extras["q_scale"] = scale.float()
    else:
        query.after = lambda q: q * scale.to(q.dtype)
    return calls


def mistral_large4(
    family: Family, seen: Seen, config: Any, layer: int, rounding: str
) -> list[Call]:
    """Frequencies with a learned factor; q scaled by head and position after the rotation."""
    calls = latent(family, seen, config, layer, rounding)
    scaling, positions = seen.module.softmax_scaling, seen.kwargs["position_ids"]
    dtype = seen.q.dtype
    log = (positions + 1).float().log().to(dtype)[..., None]
    scale = (scaling.scale.to(dtype) * log + scaling.bias.to(dtype))[..., None]
    calls = after(calls, scale)
    if len(calls) > 2:
        own = seen.module.indexer.softmax_scaling
        scale = own.scale.to(dtype) * log + own.bias.to(dtype)
        calls[2].extras["q_scale"] = scale[..., None]
    return calls


def deepseek_v4(family: Family, seen: Seen, config: Any, layer: int, rounding: str) -> list[Call]:
    """Q without a weight, the one head that is K and V, and the output turned back."""
    spec = Spec.from_config(config, layer, rounding=rounding)
    q = seen.outputs["q_b_proj"].unflatten(-1, (spec.num_q_heads, -1))
    k = seen.outputs["kv_proj"].unsqueeze(-2)
    table = table_of(seen, spec)
    tokens = k.shape[1]
    got = seen.q, seen.k[:, :tokens]  # compressed entries follow
    weight = seen.module.kv_norm.weight
    back = Spec.from_config(config, layer, rounding=rounding, part="output")
    out = seen.inputs["o_a_proj"].flatten(2).unflatten(-1, (spec.num_q_heads, -1))
    return [
        Call(spec, q, k, None, weight, table=table, got=got),
        Call(back, seen.out, None, table=table, got=(out, None)),
    ]


def qwen4(family: Family, seen: Seen, config: Any, layer: int, rounding: str) -> list[Call]:
    """The indexer's q of every token, and its pooled k of the last one."""
    from upstream_transformers import calls_of

    calls = calls_of(family, seen, config, layer, rounding)
    spec = Spec.from_config(config, layer, rounding=rounding, part="indexer")
    raw = seen.outputs["indexer.index_qk_proj"].unflatten(-1, (-1, spec.head_dim))
    q = raw[-1:, -1:, : spec.num_q_heads]  # the last token of the last row
    k = seen.inputs["indexer.k_layernorm"][None, :, None]
    a, b = seen.products[-1]
    dtype = q.dtype
    got = a[None, None].to(dtype), b.transpose(-1, -2)[None, :, None].to(dtype).squeeze(3)
    weights = seen.module.indexer.q_layernorm.weight, seen.module.indexer.k_layernorm.weight
    cos, sin = table_of(seen, spec)
    starts = torch.arange(k.shape[1]) * config.indexer_compress_ratio
    table = tuple((t[-1:, -1:], t[-1:, starts]) for t in (cos, sin))
    table = tuple(zip(*table, strict=True))
    positions = seen.positions
    own = positions[:, -1:, -1:], positions[:, -1:, starts]
    return [*calls, Call(spec, q, k, *weights, positions=own, table=table, got=got)]


def dots3_fields() -> dict[str, Any]:
    """A local and an indexed layer, whose latents differ."""
    local = {
        "swa_num_attention_heads": 2,
        "swa_kv_lora_rank": 24,
        "swa_q_lora_rank": 24,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 12,
        "swa_num_key_value_heads": 2,
    }
    types = ["indexed_attention", "sliding_attention"]
    return {**DSA, **local, "head_dim": 20, "num_hidden_layers": 2, "layer_types": types}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 4,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
QWEN4 = {
    "head_dim": 64,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 2,
    "indexer_compress_ratio": 2,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "indexed_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
FAMILIES = [
    Family("deepseek_v2", "DeepseekV2Attention", MLA, calls=latent),
    Family("deepseek_v3", "DeepseekV3Attention", {**MLA, "rope_parameters": YARN}, calls=latent),
    Family(
        "deepseek_v3",
        "DeepseekV3Attention",
        {**MLA, "rope_interleave": False},
        calls=latent,
        note="half",
    ),
    Family(
        "mistral4",
        "Mistral4Attention",
        {**MLA, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        calls=mistral4,
    ),
    Family("glm4_moe_lite", "Glm4MoeLiteAttention", MLA, calls=latent),
    Family(
        "longcat_flash",
        "LongcatFlashMLA",
        {
            **MLA,
            "head_dim": 8,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "expert_ffn_hidden_size": 16,
        },
        calls=latent,
    ),
    Family("axk1", "AXK1Attention", MLA, calls=latent),
    Family("youtu", "YoutuAttention", MLA, calls=latent),
    Family("minicpm3", "MiniCPM3Attention", MLA, calls=latent),
    Family(
        "bailing_hybrid",
        "BailingHybridAttention",
        {
            **MLA,
            "head_dim": 8,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        (1,),
        calls=latent,
    ),
    Family("deepseek_v32", "DeepseekV32Attention", DSA, calls=latent),
    Family("glm_moe_dsa", "GlmMoeDsaAttention", DSA, calls=latent),
    Family("axk2", "AXK2Attention", DSA, calls=latent),
    Family("hy_v4", "HYV4Attention", DSA, calls=latent),
    Family("dots3_note_text", "Dots3NoteTextAttention", dots3_fields(), (0, 1), calls=latent),
    Family(
        "mistral_large4_text",
        "MistralLarge4TextAttention",
        {**DSA, "num_hidden_layers": 4, "layer_types": ["indexed_attention"] * 4},
        (0, 3),
        calls=mistral_large4,
        own_angles=False,
    ),
    Family(
        "deepseek_v4",
        "DeepseekV4Attention",
        {
            "head_dim": 32,
            "q_lora_rank": 24,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "partial_rotary_factor": 0.25,
            "layer_types": ["sliding_attention", "compressed_sparse_attention"],
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        (0, 1),
        calls=deepseek_v4,
    ),
    Family(
        "minimax_m3_vl_text",
        "MiniMaxM3VLAttention",
        {
            "head_dim": 16,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_block_size": 2,
            "layer_types": ["minimax_m3_sparse"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
        },
        calls=minimax_m3,
        counted=True,
        note="sparse",
    ),
    Family("qwen4_exp_text", "Qwen4ExpTextAttention", QWEN4, (1,), axes=3, calls=qwen4),
    Family(
        "qwen4_exp_text",
        "Qwen4ExpTextAttention",
        {
            **QWEN4,
            "indexer_head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [4, 2, 2],
            },
        },
        (1,),
        axes=3,
        calls=qwen4,
        note="partial",
    ),
]
