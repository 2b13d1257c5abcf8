"""Further diffusion transformers (test_upstream_diffusers.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from qkrope.grid import grid_positions
from upstream import Call
from upstream_modules import (
    BATCH,
    GRID,
    HEADS,
    IMAGE,
    QK,
    TEXT,
    VIDEO,
    WIDTH,
    Adapter,
    Attention,
    D,
    Run,
    call_of,
    first_half,
    load,
    pairs,
    real,
    rows,
)

LATENT = torch.zeros(BATCH, 4, *GRID)


def hidream(dtype: torch.dtype) -> list[Call]:
    """[image, text]: rows of all heads, two streams."""
    block = load("transformer_hidream_image.HiDreamImageTransformerBlock")(WIDTH, HEADS, D)
    run = Run(block.attn1, dtype, D)
    ids = torch.zeros(1, IMAGE + TEXT, 3, dtype=torch.long)
    ids[0, :IMAGE] = VIDEO.T
    matrices = load("transformer_hidream_image.HiDreamImageEmbedND")(10000, (64, 32, 32))(ids)
    run(
        run.normal(BATCH, IMAGE, WIDTH),
        norm_encoder_hidden_states=run.normal(BATCH, TEXT, WIDTH),
        image_rotary_emb=matrices,
    )
    table = matrices[0, :, 0, :, 0, 0], matrices[0, :, 0, :, 1, 0]
    image, text = slice(0, IMAGE), slice(IMAGE, None)
    names = ("q_rms_norm", "k_rms_norm"), ("q_rms_norm_t", "k_rms_norm_t")
    return [
        call_of(run, "HiDream-I1", i, names[i], p, table=rows(table, p), positions=ids[0, p].T)
        for i, p in enumerate((image, text))
    ]


def ideogram(dtype: torch.dtype) -> list[Call]:
    """Halves, three interleaved axes, float32 tables."""
    run = Run(load("transformer_ideogram4.Ideogram4Attention")(HEADS * 256, HEADS), dtype, 256)
    table = load("transformer_ideogram4.Ideogram4MRoPE")(256, 5_000_000, (24, 20, 20))(
        VIDEO.T[None]
    )
    run(run.normal(BATCH, IMAGE, HEADS * 256), None, table)
    flat = first_half(tuple(t[0] for t in table))
    return [call_of(run, "Ideogram-4", 0, QK, table=flat, positions=VIDEO)]


def krea2(dtype: torch.dtype) -> list[Call]:
    """Weights of one plus w in float32; three times as many query heads."""
    run = Run(load("transformer_krea2.Krea2Attention")(4 * D, 4, 2), dtype, D)
    for norm in (run.module.norm_q, run.module.norm_k):
        norm.float()
    table = load("transformer_krea2.Krea2RotaryPosEmbed")(1000, [32, 48, 48])(VIDEO.T)
    run(run.normal(BATCH, IMAGE, 4 * D), None, table)
    flat = pairs(table)
    return [call_of(run, "Krea-2", 0, QK, heads=(4, 2), groups=2, table=flat, positions=VIDEO)]


def minimax_h3(dtype: torch.dtype) -> list[Call]:
    """Halves in the first 96 of 128 channels, three axes."""
    run = Run(load("transformer_minimax_h3.MiniMaxH3Attention")(WIDTH, HEADS, D), dtype, D)
    table = load("transformer_minimax_h3.MiniMaxH3RotaryPosEmbed")()(VIDEO.T)
    run(run.normal(BATCH, IMAGE, WIDTH), table)
    return [call_of(run, "MiniMax-H3", 0, QK, table=first_half(table), positions=VIDEO)]


def joyimage(dtype: torch.dtype) -> list[Call]:
    """[image, text], packed projections and a table each."""
    run = Run(load("transformer_joyimage.JoyImageAttention")(WIDTH, HEADS, D), dtype, D)
    embed = load("transformer_flux.FluxPosEmbed")(256, [16, 56, 56])
    text = torch.arange(TEXT).expand(3, TEXT)
    tables = embed(VIDEO.T), embed(text.T)
    run(run.normal(BATCH, IMAGE, WIDTH), run.normal(BATCH, TEXT, WIDTH), image_rotary_emb=tables)
    names = [tuple(f"{s}_attn_{x}_norm" for x in "qk") for s in ("img", "txt")]
    parts, at = (slice(0, IMAGE), slice(IMAGE, None)), (VIDEO, text)
    return [
        call_of(run, "JoyImage", i, names[i], parts[i], table=pairs(tables[i]), positions=at[i])
        for i in range(2)
    ]


def ace_step(dtype: torch.dtype) -> list[Call]:
    """Halves with fewer key heads; cross attention does not turn."""
    block = load("ace_step_transformer.AceStepTransformerBlock")(4 * D, 4, 2, D, 64)
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    run = Run(block.self_attn, dtype, D)
    at = torch.arange(IMAGE)
    table = get_1d_rotary_pos_embed(D, at, 1e6, use_real=True, repeat_interleave_real=False)
    run(run.normal(BATCH, IMAGE, 4 * D), image_rotary_emb=table)
    cross = Run(block.cross_attn, dtype, D)
    cross(cross.normal(BATCH, IMAGE, 4 * D), cross.normal(BATCH, TEXT, 4 * D))
    heads = (4, 2)
    flat = first_half(table)
    return [
        call_of(run, "ACE-Step", 0, QK, heads=heads, table=flat, positions=at),
        call_of(cross, "ACE-Step", 1, QK, heads=heads),
    ]


def prx(dtype: torch.dtype) -> list[Call]:
    """[text keys, image]: the text has keys alone, which do not turn."""
    run = Run(load("transformer_prx.PRXBlock")(HEADS * 64, HEADS).attention, dtype, 64)
    ids = grid_positions(None, 3, 4).T[None]
    matrices = load("transformer_prx.PRXEmbedND")(64, 10000, [32, 32])(ids)
    run(
        run.normal(BATCH, 12, HEADS * 64),
        encoder_hidden_states=run.normal(BATCH, TEXT, HEADS * 64),
        image_rotary_emb=matrices,
    )
    table = matrices[0, 0, :, :, 0, 0], matrices[0, 0, :, :, 1, 0]
    parts = slice(None), slice(TEXT, None)
    text = slice(0, TEXT)
    return [
        call_of(run, "PRX", 0, QK, parts, table=table, positions=ids[0].T),
        call_of(run, "PRX", 1, (None, "norm_added_k"), (text, text)),
    ]


def nucleus(dtype: torch.dtype) -> list[Call]:
    """[image, text keys], with a table each."""
    cls = load("transformer_nucleusmoe_image.NucleusMoEImageTransformerBlock")
    run = Run(cls(WIDTH, HEADS, D, joint_attention_dim=WIDTH).attn, dtype, D)
    embed = load("transformer_nucleusmoe_image.NucleusMoEEmbedRope")(10000, [16, 56, 56])
    image, text = embed([GRID], torch.device("cpu"), TEXT)
    run(
        run.normal(BATCH, IMAGE, WIDTH),
        encoder_hidden_states=run.normal(BATCH, TEXT, WIDTH),
        image_rotary_emb=(image, text),
    )
    after = (max(GRID[1:]) + torch.arange(TEXT)).expand(3, TEXT)
    parts, model = (slice(None), slice(0, IMAGE)), "NucleusMoE-Image"
    keys, name = slice(IMAGE, None), (None, "norm_added_k")
    return [
        call_of(run, model, 0, QK, parts, table=real(image), positions=VIDEO),
        call_of(run, model, 1, name, (keys, keys), table=real(text), positions=after),
    ]


def sana(dtype: torch.dtype) -> list[Call]:
    """Linear attention: a relu between the norm and the rotation."""
    heads, width = 2, 112
    block = load("transformer_sana_video.SanaVideoTransformerBlock")(
        heads * width,
        heads,
        width,
        0.0,
        heads,
        width,
        heads * width,
        qk_norm="rms_norm_across_heads",
    )
    run = Run(block.attn1, dtype, width)
    table = load("transformer_sana_video.WanRotaryPosEmbed")(width, (1, 1, 1), 32)(LATENT)
    products, original = [], torch.matmul

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        products.append((a, b))
        return original(a, b)

    torch.matmul = matmul
    try:
        run(run.normal(BATCH, IMAGE, heads * width), rotary_emb=table)
    finally:
        torch.matmul = original
    (_, k), (_, q) = products  # [B, H, S, D] and [B, H, D, S]
    turned = Attention(q.permute(0, 3, 1, 2), k.permute(0, 2, 1, 3), k)
    normed = [run.seen.outputs[name].unflatten(-1, (heads, width)) for name in QK]
    run.calls = [Attention(*normed, normed[0]), turned]
    flat = pairs(tuple(t.reshape(IMAGE, width) for t in table))
    after = tuple(x.relu() for x in normed)
    model = "SANA-Video"
    rotation = call_of(run, model, 1, QK, source=1, raw=after, table=flat, positions=VIDEO)
    rotation.q_weight = rotation.k_weight = None
    return [call_of(run, model, 0, QK), rotation]


ADAPTERS: dict[str, Adapter] = {
    "HiDream-I1": hidream,
    "Ideogram-4": ideogram,
    "Krea-2": krea2,
    "MiniMax-H3": minimax_h3,
    "JoyImage": joyimage,
    "ACE-Step": ace_step,
    "PRX": prx,
    "SANA-Video": sana,
    "NucleusMoE-Image": nucleus,
}
