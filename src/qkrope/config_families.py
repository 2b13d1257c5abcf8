"""What each architecture of Hugging Face transformers does to Q, K and V, by model_type.

An entry holds the defaults of the architecture's config class and how a layer of its attention
module normalises, rotates and rounds. tests/test_upstream_transformers.py runs each entry against
that module.
"""

from __future__ import annotations

from dataclasses import replace

from .config_layers import (
    COMPRESSED,
    INDEXED,
    Family,
    Indexer,
    Latent,
    beam_layers,
    dots3_layers,
    dots3_shape,
    every,
    exaone4_layers,
    gemma4_shape,
    laguna_heads,
    layer_norm,
    lfm2_layers,
    llama4_norm,
    minimax_share,
    molmo2_norm,
    muse_nope,
    no_norm,
    no_rope,
    no_theta,
    norm_if,
    not_local,
    olmoe_norm,
    pattern,
    qwen4_layers,
    rms,
    share,
    v4_layers,
    whole_of_hybrid,
)
from .config_rope import compressed, nested, scaled_layers, unless

__all__ = ["FAMILIES"]

_ONE_PLUS = rms(weight_offset=1.0)
_ROW = rms(scope="row")
_LOCAL, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"

_QWEN3_VL = Family(rms(), mrope="interleaved", axes=(24, 20, 20))
_QWEN3_NEXT = Family(
    _ONE_PLUS,
    "B/b",
    head_dim=256,
    partial=share(0.25),
    layer_types=every("full_attention_interval", 4, _LINEAR),
)
_QWEN3_5 = replace(_QWEN3_NEXT, mrope="interleaved", axes=(11, 11, 10))
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 26,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
}
_GEMMA3 = Family(
    _ONE_PLUS,
    "B/b",
    head_dim=256,
    theta=1e6,
    local_theta=1e4,
    rope=nested,
    layer_types=every("sliding_window_pattern", 6, _LOCAL),
    defaults=_GEMMA3_DEFAULTS,
)
_GEMMA4_ROPES = {
    _LOCAL: {"rope_type": "default", "rope_theta": 1e4},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_GEMMA4 = Family(
    rms(),
    "B/b",
    v_norm=rms(),
    head_dim=256,
    rope=nested,
    ropes=_GEMMA4_ROPES,
    proportional=True,
    layer_types=every(None, 6, _LOCAL, last=_FULL),
    overrides=gemma4_shape(None, always=False),
    defaults={**_GEMMA3_DEFAULTS, "num_hidden_layers": 30},
)
_EXAONE4 = Family(rms(), rope=unless(whole_of_hybrid), layer_types=exaone4_layers)
_HUNYUAN = Family(
    rms(),
    order="rope_first",
    kv_optional=True,
)
_MUSE = Family(
    rms(),
    "B/b",
    rope=unless(muse_nope),
    layer_types=pattern(lambda i, n: _LOCAL if (n - 1 - i) % 4 else _FULL),
)
_MISTRAL4_ROPE = {
    "rope_type": "yarn",
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_MISTRAL_LARGE4_ROPE = {
    "rope_type": "yarn",
    "factor": 2048.0,
    "original_max_position_embeddings": 512,
    "attention_factor": 1.0,
}
_DEEPSEEK_V3 = Family(no_norm, latent=Latent())
_DSA_INDEXER = Indexer(
    ("index_n_heads", None, "index_head_dim"), norm=no_norm, k_norm=layer_norm(1e-6)
)
_DSA = Family(
    no_norm,
    latent=Latent(pairing="interleaved"),
    attention=INDEXED,
    indexer=_DSA_INDEXER,
)
_INTERLEAVED_INDEXER = replace(_DSA_INDEXER, pairing="interleaved")

FAMILIES: dict[str, Family] = {
    "llama": Family(no_norm, kv_optional=True),
    "mistral": Family(no_norm),
    "mixtral": Family(no_norm, theta=1e6),
    "qwen2": Family(no_norm),
    "qwen2_moe": Family(no_norm),
    "qwen3": Family(rms(), head_dim=128),
    "qwen3_moe": Family(rms()),
    "qwen3_vl_text": replace(_QWEN3_VL, head_dim=128, theta=5e5),
    "qwen3_vl_moe_text": replace(_QWEN3_VL, theta=5e5),
    "qwen3_omni_moe_text": replace(_QWEN3_VL, theta=1e6),
    "qwen3_omni_moe_talker_text": _QWEN3_VL,
    "qwen3_omni_moe_talker_code_predictor": Family(rms(), head_dim=128),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen4_exp_text": replace(
        _QWEN3_5,
        partial=share(1.0),
        attention=("indexed_attention",),
        layer_types=qwen4_layers,
        indexer=Indexer(
            ("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim"),
            norm=_ONE_PLUS,
            rotary=None,
            rounding="B/b",
        ),
    ),
    "dots1": Family(rms()),
    "glm4_moe": Family(norm_if("use_qk_norm", False, rms()), partial=share(0.5)),
    "gemma3_text": _GEMMA3,
    "t5gemma2_text": _GEMMA3,
    "t5gemma2_decoder": _GEMMA3,
    "gemma3n_text": Family(
        rms(),
        "B/b",
        v_norm=rms(),
        head_dim=256,
        theta=1e6,
        local_theta=1e4,
        rope=nested,
        layer_types=every(None, 5, _LOCAL),
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_hidden_layers": 35,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
        },
    ),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": replace(
        _GEMMA4, defaults={**_GEMMA4.defaults, "max_position_embeddings": 262144}
    ),
    "diffusion_gemma_text": replace(_GEMMA4, overrides=gemma4_shape(None, always=True)),
    "embedding_gemma2_text": replace(
        _GEMMA4,
        layer_types=every("sliding_window_pattern", 6, _LOCAL, last=_FULL),
        ropes={**_GEMMA4_ROPES, _FULL: {"rope_type": "default", "rope_theta": 1e6}},
        overrides=gemma4_shape(1, always=True),
        defaults={
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 24,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
        },
    ),
    "olmo2": Family(_ROW, "B/f", kv_optional=True),
    "olmo3": Family(
        _ROW,
        "B/f",
        kv_optional=True,
        theta=5e5,
        rope=nested,
        layer_types=every(None, 4, _LOCAL),
    ),
    "flex_olmo": Family(_ROW, "B/f", kv_optional=True, theta=5e5),
    "olmo_hybrid": Family(
        _ROW,
        "B/f",
        kv_optional=True,
        rope=unless(no_theta),
        layer_types=every(None, 4, _LINEAR),
    ),
    "olmoe": Family(olmoe_norm, kv_optional=True),
    "minimax_m2": Family(_ROW, head_dim=128, theta=5e6, partial=minimax_share),
    "minimax_m3_vl_text": Family(
        _ONE_PLUS,
        "B/b",
        head_dim=128,
        theta=5e6,
        partial=share(1.0),
        attention=(_FULL, "minimax_m3_sparse"),
        indexer=Indexer(("index_n_heads", None, "index_head_dim"), norm=_ONE_PLUS, rotary=None),
    ),
    "llama4_text": Family(
        llama4_norm,
        "B/f",
        order="rope_first",
        pairing="interleaved",
        head_dim=128,
        theta=5e5,
        rope=unless(no_rope),
        attention=("chunked_attention", _FULL),
    ),
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "hunyuan_vl_text": replace(
        _HUNYUAN, rounding="A/h", mrope="chunked", aliases={"xdrope": "dynamic"}
    ),
    "hy_v3": Family(rms(), head_dim=128, theta=11_158_840.0),
    "exaone4": _EXAONE4,
    "exaone_moe": _EXAONE4,
    "kolibri1": replace(
        _EXAONE4,
        head_dim=128,
        layer_types=pattern(lambda i, n: _LOCAL if (i + 1) % 5 else _FULL),
    ),
    "cohere": Family(
        norm_if("use_qk_norm", False, layer_norm("layer_norm_eps")),
        "B/h",
        pairing="interleaved",
        kv_optional=True,
        theta=5e5,
    ),
    "stablelm": Family(
        norm_if("qk_layernorm", False, layer_norm("layer_norm_eps")), "B/b", partial=share(0.25)
    ),
    "lfm2": Family(rms("norm_eps"), theta=1e6, layer_types=lfm2_layers),
    "lfm2_moe": Family(rms("norm_eps"), theta=1e6, layer_types=lfm2_layers),
    "lfm3": Family(
        rms("norm_eps"),
        "A/f",
        head_dim=128,
        theta=1e6,
        rope=nested,
        ropes={
            _LOCAL: {"rope_type": "default", "rope_theta": 1e4},
            _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        },
        proportional=True,
        layer_types=pattern(
            lambda i, n: _FULL if i % 4 == 2 else "conv" if i % 4 or i == 0 else _LOCAL
        ),
    ),
    "afmoe": Family(
        rms(),
        "B/b",
        head_dim=128,
        kv_optional=True,
        rope=unless(lambda layer: layer.kind != _LOCAL),
        layer_types=every("global_attn_every_n_layers", 4, _LOCAL),
    ),
    "laguna": Family(
        rms(),
        head_dim=128,
        partial=share(1.0),
        rope=nested,
        ropes={
            _FULL: {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
            _LOCAL: {"rope_theta": 1e4},
        },
        overrides=laguna_heads,
    ),
    "mellum": Family(
        rms(),
        head_dim=128,
        rope=nested,
        ropes={_FULL: {"rope_theta": 5e5}, _LOCAL: {"rope_theta": 1e4}},
    ),
    "beam": Family(
        rms(),
        "B/f",
        head_dim=128,
        rope=nested,
        ropes={_LOCAL: {"rope_theta": 1e4}, _FULL: None},
        layer_types=beam_layers,
    ),
    "flint": Family(
        rms(),
        "B/b",
        head_dim=128,
        rope=unless(not_local),
        layer_types=pattern(lambda i, n: _FULL if i < 2 or i % 4 == 1 or i == n - 1 else _LOCAL),
    ),
    "muse_spark_text": replace(_MUSE, head_dim=64, theta=5e5),
    "muse_glimmer_text": replace(_MUSE, head_dim=128),
    "muse_glimmer_assistant": Family(rms(), head_dim=128, theta=5e5),
    "doge": Family(rms(), kv_optional=True),
    "nanochat": Family(rms(), "B/b", order="rope_first", reverse=True, kv_optional=True),
    "molmo2_text": Family(molmo2_norm, head_dim=128, rope=scaled_layers),
    "deepseek_v2": Family(
        no_norm,
        "A/f",
        latent=Latent(pairing="interleaved", output_pairing=None),
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "mistral4": replace(
        _DEEPSEEK_V3,
        ropes={"": _MISTRAL4_ROPE},
        unused=("llama_4_scaling_beta", "max_position_embeddings"),
    ),
    "glm4_moe_lite": _DEEPSEEK_V3,
    "axk1": _DEEPSEEK_V3,
    "youtu": _DEEPSEEK_V3,
    "longcat_flash": Family(no_norm, theta=1e7, latent=Latent(pairing="interleaved")),
    "minicpm3": Family(no_norm, latent=Latent(pairing="half")),
    "bailing_hybrid": Family(
        no_norm,
        theta=6e6,
        latent=Latent(pairing="interleaved"),
        layer_types=every("layer_group_size", 6, _LINEAR),
    ),
    "deepseek_v32": _DSA,
    "axk2": _DSA,
    "glm_moe_dsa": replace(_DSA, indexer=_INTERLEAVED_INDEXER),
    "hy_v4": replace(
        _DSA,
        latent=Latent(pairing="half"),
        indexer=replace(_DSA_INDEXER, k_norm=layer_norm("rms_norm_eps"), trailing=True),
    ),
    "dots3_note_text": replace(
        _DSA,
        roundings={"indexed_attention": "A/f"},  # tables in float32 there
        theta=8e7,
        local_theta=5e4,
        latent=Latent(eps=None, pairing="interleaved", rest=True),
        indexer=replace(_INTERLEAVED_INDEXER, rounding="B/f"),
        rope=nested,
        layer_types=dots3_layers,
        overrides=dots3_shape,
    ),
    "mistral_large4_text": replace(
        _DSA,
        latent=Latent(eps=None, pairing="interleaved"),
        indexer=_INTERLEAVED_INDEXER,
        rope=unless(no_rope),
        ropes={"": _MISTRAL_LARGE4_ROPE},
    ),
    "deepseek_v4": Family(
        rms(),
        ("C/h", "B/h"),
        head_dim=512,
        pairing="interleaved",
        trailing=True,
        partial=share(1.0),
        rope=compressed,
        attention=COMPRESSED,
        layer_types=v4_layers,
    ),
}
