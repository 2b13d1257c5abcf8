"""Encoders of transformers, and modules that take more than one stream: one adapter a module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qkrope.grid import grid_positions
from qkrope.spec import Spec
from upstream import Call
from upstream_modules import (
    BATCH,
    HEADS,
    TRANSFORMERS,
    Adapter,
    Run,
    call_of,
    first_half,
    load,
)

QK = ("q_norm", "k_norm")
HEIGHT, WIDE = 3, 4
PATCHES = HEIGHT * WIDE
GRID = grid_positions(None, HEIGHT, WIDE)  # [2, PATCHES]


def load_hf(path: str) -> Any:
    """``model.Name`` of transformers: a config or a class of its modeling file."""
    model, name = path.rsplit(".", 1)
    kind = "configuration" if name.endswith("Config") else "modeling"
    return load(f"{model}.{kind}_{model}.{name}", TRANSFORMERS)


def config_of(path: str, **fields: Any) -> Any:
    """A small config that uses scaled_dot_product_attention."""
    config = load_hf(path)(**fields)
    config._attn_implementation = "sdpa"
    return config


def axial(
    dtype: torch.dtype, model: str, path: str, heads: dict[str, int], kv: int = HEADS
) -> list[Call]:
    """Packed patches, halves over two axes, float32 tables."""
    config = config_of(f"{path}VisionConfig", hidden_size=HEADS * 64, **heads)
    cls = load_hf(f"{path}VisionAttention")
    run = Run(cls(config, 2) if model == "LFM3-VL ViT" else cls(config), dtype, 64)
    table = load_hf(f"{path}VisionRotaryEmbedding")(config)(torch.zeros(1, dtype=dtype), GRID.T)
    x = run.normal(PATCHES, HEADS * 64)
    lengths = torch.tensor([0, PATCHES])
    if model == "LFM3-VL ViT":
        run(x, lengths, position_embeddings=table)
    else:
        run(x, cu_seqlens=lengths, position_embeddings=table)
    return [
        call_of(
            run,
            model,
            0,
            QK,
            heads=(HEADS, kv),
            groups=run.calls[0].k.shape[2] // kv,
            table=first_half(table),
            positions=GRID,
        )
    ]


def gemma4(dtype: torch.dtype) -> list[Call]:
    """Halves in each half of the head, an axis each; V is normalised too."""
    config = config_of(
        "gemma4.Gemma4VisionConfig",
        hidden_size=HEADS * 64,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=64,
    )
    run = Run(load_hf("gemma4.Gemma4VisionAttention")(config, 0), dtype, 64)
    x, ids = run.normal(BATCH, PATCHES, HEADS * 64), GRID.T.expand(BATCH, -1, -1)
    cos, sin = load_hf("gemma4.Gemma4VisionRotaryEmbedding")(config)(x, ids)
    run(x, position_embeddings=(cos, sin), attention_mask=None, position_ids=ids)
    table = tuple(torch.cat((t[0, :, :16], t[0, :, 32:48]), dim=-1) for t in (cos, sin))
    call = call_of(run, "Gemma4-E2B ViT", 0, QK, v_norm="v_norm", table=table, positions=GRID)
    return [call]


def perception(dtype: torch.dtype) -> list[Call]:
    """Pairs of neighbours through 2 x 2 matrices."""
    config = config_of(
        "pe_audio.PeAudioEncoderConfig",
        hidden_size=HEADS * 128,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=128,
    )
    run = Run(load_hf("pe_audio.PeAudioEncoderAttention")(config, 0), dtype, 128)
    positions = torch.arange(7)
    x = run.normal(BATCH, 7, HEADS * 128)
    table = load_hf("pe_audio.PeAudioEncoderRotaryEmbedding")(config)(x, positions[None])
    run(x, position_embeddings=table)
    flat = first_half(tuple(t[0] for t in table))
    return [call_of(run, "pe-av-large", 0, QK, table=flat, positions=positions)]


def sapiens(dtype: torch.dtype) -> list[Call]:
    """Class and register tokens come first and do not turn."""
    config = config_of(
        "sapiens2.Sapiens2Config",
        hidden_size=HEADS * 64,
        num_attention_heads=HEADS,
        num_key_value_heads_per_layer=[HEADS],
        num_hidden_layers=1,
        patch_size=16,
    )
    run = Run(load_hf("sapiens2.Sapiens2Attention")(config, 0), dtype, 64)
    pixels = torch.zeros(1, 3, 16 * HEIGHT, 16 * WIDE, dtype=dtype)
    table = load_hf("sapiens2.Sapiens2RopePositionEmbedding")(config).eval()(pixels)
    run(run.normal(BATCH, 2 + PATCHES, HEADS * 64), attention_mask=None, position_embeddings=table)
    extras = {"rotate_from": 2}
    return [call_of(run, "Sapiens2-0.4B", 0, QK, table=first_half(table), extras=extras)]


def nemotron(dtype: torch.dtype) -> list[Call]:
    """LayerNorm with weight and bias over heads of 80."""
    path = "nemotron3_5_transcribe.Nemotron3_5Transcribe"
    config = config_of(
        f"{path}WordTimestampConfig",
        hidden_size=HEADS * 80,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    run = Run(load_hf(f"{path}Attention")(config, 0), dtype, 80)
    positions = torch.arange(7)
    x = run.normal(BATCH, 7, HEADS * 80)
    table = load_hf(f"{path}RotaryEmbedding")(config)(x, positions[None])
    run(x, position_embeddings=table, attention_mask=None)
    flat = first_half(tuple(t[0] for t in table))
    return [call_of(run, "Nemotron3.5-Transcribe", 0, QK, table=flat, positions=positions)]


def esmc(dtype: torch.dtype) -> list[Call]:
    """LayerNorm over the row of all heads, without a bias."""
    config = config_of(
        "esmc.EsmcConfig", hidden_size=HEADS * 64, num_attention_heads=HEADS, num_hidden_layers=1
    )
    run = Run(load_hf("esmc.EsmcAttention")(config, 0), dtype, 64)
    positions = torch.arange(7)
    x = run.normal(BATCH, 7, HEADS * 64)
    table = load_hf("esmc.EsmcRotaryEmbedding")(config)(x, positions[None])
    run(x, position_embeddings=table, attention_mask=None)
    flat = first_half(tuple(t[0] for t in table))
    return [call_of(run, "ESMC-6B", 0, QK, table=flat, positions=positions)]


def esmfold(dtype: torch.dtype) -> list[Call]:
    """RMS norm of a head without a weight; angles from coordinates in space."""
    config = config_of("esmfold2.EsmFold2AtomEncoderConfig", hidden_size=64, num_attention_heads=2)
    run = Run(load_hf("esmfold2.EsmFold2AtomAttention")(config, config), dtype, 32)
    x = run.normal(BATCH, 7, 64)
    places = 5 * torch.randn(BATCH, 7, 3, generator=run.generator)
    residues = torch.arange(7).expand(BATCH, 7)
    table = load_hf("esmfold2.EsmFold2RotaryEmbedding")(config)(places, residues, dtype)
    run(x, position_embeddings=table, attention_mask=None)
    return [call_of(run, "ESMFold2-atom", 0, QK, table=first_half(table))]


def assistant(dtype: torch.dtype) -> list[Call]:
    """q has the last tokens of those that k has."""
    config = config_of(
        "muse_glimmer_assistant.MuseGlimmerAssistantConfig",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        num_hidden_layers=1,
    )
    path = "muse_glimmer_assistant.MuseGlimmerAssistant"
    run = Run(load_hf(f"{path}Attention")(config, 0), dtype, 128)
    context, x = run.normal(BATCH, 5, 64), run.normal(BATCH, 3, 64)
    positions = torch.tensor([0, 1, 2, 5, 9, 10, 11, 12])
    table = load_hf(f"{path}RotaryEmbedding")(config)(x, positions[None])
    run(x, context, table)
    flat = first_half(tuple(t[0] for t in table))
    both = tuple(t[-3:] for t in flat), flat
    call = call_of(
        run,
        "Muse-Glimmer-assistant",
        0,
        QK,
        heads=(4, 2),
        groups=run.calls[0].k.shape[2] // 2,
        table=both,
    )
    call.positions, call.own_angles = (positions[-3:], positions), True
    assert call.spec.rope == Spec.from_config(config).rope
    return [call]


ADAPTERS: dict[str, Adapter] = {
    "GLM-OCR ViT": partial(
        axial, model="GLM-OCR ViT", path="glm_ocr.GlmOcr", heads={"num_heads": HEADS}
    ),
    "GLM-5.3-Flash ViT": partial(
        axial, model="GLM-OCR ViT", path="glm5_next.Glm5Next", heads={"num_heads": HEADS}
    ),
    "dots3-note ViT": partial(
        axial,
        model="dots3-note ViT",
        path="dots3_note.Dots3Note",
        heads={"num_attention_heads": HEADS, "adapter_in_dim": HEADS * 64},
    ),
    "LFM3-VL ViT": partial(
        axial,
        model="LFM3-VL ViT",
        path="lfm3_vl.Lfm3Vl",
        heads={"num_attention_heads": HEADS, "num_key_value_heads": 1},
        kv=1,
    ),
    "Gemma4-E2B ViT": gemma4,
    "pe-av-large": perception,
    "Sapiens2-0.4B": sapiens,
    "Nemotron3.5-Transcribe": nemotron,
    "ESMC-6B": esmc,
    "ESMFold2-atom": esmfold,
    "Muse-Glimmer-assistant": assistant,
}
