"""Diffusion transformers for video, with text that does not turn (test_upstream_diffusers.py)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkrope.grid import grid_positions
from upstream import Call
from upstream_modules import (
    ADDED,
    BATCH,
    GRID,
    HEADS,
    IMAGE,
    QK,
    TEXT,
    VIDEO,
    WIDTH,
    Adapter,
    D,
    Run,
    call_of,
    first_half,
    load,
    pairs,
    rows,
)

LATENT = torch.zeros(BATCH, 4, *GRID)


def wan(
    dtype: torch.dtype, model: str, file: str, block: str, embed: str, step: int = 1
) -> list[Call]:
    """The row of all heads is normalised; cross attention does not turn.

    ``step`` is the position of the second of two frames.
    """
    made = load(f"{file}.{block}")(WIDTH, 64, HEADS, added_kv_proj_dim=WIDTH)
    run = Run(made.attn1, dtype, D)
    table = load(f"{file}.{embed}")(D, (1, 1, 1), 32)(LATENT)
    run(run.normal(BATCH, IMAGE, WIDTH), None, None, table)
    flat = pairs(tuple(t.reshape(IMAGE, D) for t in table))
    at = VIDEO * torch.tensor([[step], [1], [1]])
    calls = [call_of(run, model, 0, QK, table=flat, positions=at)]
    cross = Run(made.attn2, dtype, D)
    cross(cross.normal(BATCH, IMAGE, WIDTH), cross.normal(BATCH, 512 + TEXT, WIDTH), None, None)
    image = 0 if cross.calls[0].k.shape[1] == TEXT else 1
    calls.append(call_of(cross, model, 1, QK, source=1 - image))
    calls.append(call_of(cross, model, 2, (None, "norm_added_k"), source=image))
    return calls


def helios(dtype: torch.dtype) -> list[Call]:
    """Keys of the history are scaled after the rotation."""
    block = load("transformer_helios.HeliosTransformerBlock")(
        WIDTH, 64, HEADS, is_amplify_history=True
    )
    run = Run(block.attn1, dtype, D)
    embed = load("transformer_helios.HeliosRotaryPosEmbed")([44, 42, 42], 10000.0)
    frames, height, width = GRID
    table = embed(torch.arange(frames)[None], height, width, torch.device("cpu"))
    table = table.flatten(2).transpose(1, 2)  # [1, tokens, cos | sin]
    history = 4
    x = run.normal(BATCH, IMAGE, WIDTH)
    run(x, None, None, table, original_context_length=IMAGE - history)
    cos, sin = table[0].chunk(2, dim=-1)
    flat = pairs((cos, sin))
    module = run.module
    scale = 1.0 + torch.sigmoid(module.history_key_scale) * (module.max_scale - 1.0)
    q = call_of(run, "Helios-14B", 0, (QK[0], None), table=flat, positions=VIDEO)
    raw = run.raw("norm_k", HEADS, D)
    calls = [q]
    for index, part in ((1, slice(0, history)), (0, slice(history, None))):
        call = call_of(
            run,
            "Helios-14B",
            index,
            (None, QK[1]),
            (part, part),
            table=rows(flat, part),
            positions=VIDEO[:, part],
            raw=(None, raw[:, part]),
        )
        if index and dtype == torch.float32:
            call.extras["k_scale"] = scale.detach().reshape(HEADS, 1)
        elif index:  # a rounding of its own after the rotation
            call.after_k = lambda k: k * scale.reshape(1, 1, -1, 1).to(k.dtype)
        calls.append(call)
    return calls


def ltx2(dtype: torch.dtype, rope: str, cross: bool) -> list[Call]:
    """Tables by head; between video and audio q and k have tables of their own."""
    cls = load("transformer_ltx2.LTX2Attention")
    run = Run(cls(WIDTH, HEADS, HEADS, D, cross_attention_dim=WIDTH, rope_type=rope), dtype, D)
    embed = load("transformer_ltx2.LTX2AudioVideoRotaryPosEmbed")(
        WIDTH, rope_type=rope, num_attention_heads=HEADS
    )
    coords = embed.prepare_video_coords(BATCH, *GRID, device=torch.device("cpu"))
    q_table = embed(coords)
    k_table = embed(1.7 * coords + 0.3) if cross else None
    x = run.normal(BATCH, IMAGE, WIDTH)
    other = run.normal(BATCH, IMAGE, WIDTH) if cross else None
    run(x, other, None, q_table, k_table)

    def by_head(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if rope == "split":  # [B, H, S, D / 2]
            return tuple(t.transpose(1, 2) for t in table)
        return pairs(tuple(t.unflatten(-1, (HEADS, D)) for t in table))

    table = by_head(q_table)
    if cross:
        table = table, by_head(k_table)
    index = {("split", False): 0, ("interleaved", False): 1, ("split", True): 2}[rope, cross]
    return [call_of(run, "LTX-2 video", index, QK, table=table)]


def mochi(dtype: torch.dtype) -> list[Call]:
    """A learned table by head; [video, text] of which the text does not turn."""
    block = load("transformer_mochi.MochiTransformerBlock")(WIDTH, HEADS, D, WIDTH)
    run = Run(block.attn1, dtype, D)
    frequencies = torch.randn(3, HEADS, D // 2, generator=run.generator)
    table = load("transformer_mochi.MochiRoPE")()(frequencies, *GRID, dtype=torch.float32)
    run(
        run.normal(BATCH, IMAGE, WIDTH),
        encoder_hidden_states=run.normal(BATCH, TEXT, WIDTH),
        attention_mask=torch.ones(BATCH, TEXT, dtype=torch.bool),
        image_rotary_emb=table,
    )
    both = type(run.calls[0])(*(torch.cat([getattr(c, n) for c in run.calls]) for n in "qkv"))
    run.calls = [both]
    image, text = slice(0, IMAGE), slice(IMAGE, None)
    spread = tuple(t.expand(BATCH, *t.shape) for t in table)
    return [
        call_of(run, "Mochi-1", 0, QK, image, table=spread),
        call_of(run, "Mochi-1", 1, ADDED, text),
    ]


def cogvideox(dtype: torch.dtype) -> list[Call]:
    """[text, video]: LayerNorm with a bias, the text does not turn."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    block = load("cogvideox_transformer_3d.CogVideoXBlock")(HEADS * 64, HEADS, 64, 64)
    run = Run(block.attn1, dtype, 64)
    frames, height, width = GRID
    table = get_3d_rotary_pos_embed(64, ((0, 0), (6, 4)), (height, width), frames)
    run(
        run.normal(BATCH, IMAGE, HEADS * 64),
        encoder_hidden_states=run.normal(BATCH, TEXT, HEADS * 64),
        image_rotary_emb=table,
    )
    extras = {"rotate_from": TEXT}
    return [call_of(run, "CogVideoX-5B", 0, QK, table=pairs(table), extras=extras)]


def cogview(
    dtype: torch.dtype, model: str, file: str, name: str, sizes: tuple[Any, ...]
) -> list[Call]:
    """[text, image]: LayerNorm without a weight, the text does not turn; halves over two axes."""
    block = load(f"{file}.{name}TransformerBlock")(WIDTH, HEADS, D, 64)
    run = Run(block.attn1, dtype, D)
    table = load(f"{file}.{name}RotaryPosEmbed")(D, 1, *sizes)(torch.zeros(1, 4, 3, 4))
    run(
        hidden_states=run.normal(BATCH, 12, WIDTH),
        encoder_hidden_states=run.normal(BATCH, TEXT, WIDTH),
        image_rotary_emb=table,
    )
    grid = grid_positions(None, 3, 4)
    if sizes:
        grid = grid * torch.tensor(sizes[0])[:, None] // torch.tensor([[3], [4]])
    positions = torch.cat((torch.zeros(2, TEXT, dtype=torch.long), grid), dim=1)
    extras = {"rotate_from": TEXT}
    return [call_of(run, model, 0, QK, table=first_half(table), positions=positions, extras=extras)]


def easyanimate(dtype: torch.dtype) -> list[Call]:
    """[text, video] with weights and biases of their own."""
    block = load("transformer_easyanimate.EasyAnimateTransformerBlock")(HEADS * 64, HEADS, 64, 64)
    run = Run(block.attn1, dtype, 64)
    embed = load("transformer_easyanimate.EasyAnimateRotaryPosEmbed")(1, 64)
    table = embed(LATENT)
    run(
        run.normal(BATCH, IMAGE, HEADS * 64),
        encoder_hidden_states=run.normal(BATCH, TEXT, HEADS * 64),
        image_rotary_emb=table,
    )
    return [
        call_of(run, "EasyAnimate", 0, QK, slice(TEXT, None), table=pairs(table)),
        call_of(run, "EasyAnimate", 1, ADDED, slice(0, TEXT)),
    ]


def cosmos(dtype: torch.dtype) -> list[Call]:
    """Halves over three axes with a theta of their own each; cross attention does not turn."""
    block = load("transformer_cosmos.CosmosTransformerBlock")(HEADS, D, WIDTH)
    model = "Cosmos-Predict2-2B/14B"
    run = Run(block.attn1, dtype, D)
    embed = load("transformer_cosmos.CosmosRotaryPosEmbed")(D, (8, 8, 8), (1, 1, 1))
    table = embed(LATENT, fps=16)
    run(run.normal(BATCH, IMAGE, WIDTH), image_rotary_emb=table)
    cross = Run(block.attn2, dtype, D)
    cross(cross.normal(BATCH, IMAGE, WIDTH), cross.normal(BATCH, TEXT, WIDTH))
    return [
        call_of(run, model, 0, QK, table=first_half(table)),
        call_of(cross, model, 1, QK),
    ]


def cosmos3(dtype: torch.dtype, keys: bool) -> list[Call]:
    """Two streams; with ``keys`` the first one's keys are normalised for the second one only."""
    cls = load("transformer_cosmos3.Cosmos3PackedMoTAttention")
    module = cls(
        WIDTH, D, 4, 2, False, 1e-6, qk_norm_for_text=not keys, use_und_k_norm_for_gen=keys
    )
    run = Run(module, dtype, D)
    embed = load("transformer_cosmos3.Cosmos3VLTextRotaryEmbedding")(D, 5e6, (24, 20, 20))
    text = torch.arange(TEXT).expand(3, 1, TEXT)
    image = VIDEO[:, None] + TEXT
    tables = [tuple(t[0] for t in embed(p, "cpu", dtype)) for p in (text, image)]
    run(run.normal(TEXT, WIDTH), run.normal(IMAGE, WIDTH), (*tables[0], *tables[1]))
    (und, gen), n, model = [first_half(t) for t in tables], (4, 2), "Cosmos3"
    at = [text, image]
    calls = [
        call_of(
            run,
            model,
            1,
            ADDED,
            (slice(None), slice(TEXT, None)),
            heads=n,
            source=1,
            table=gen,
            positions=at[1],
        )
    ]
    if keys:
        name, part = (None, "k_norm_und_for_gen"), (slice(0, TEXT), slice(0, TEXT))
        calls.append(
            call_of(run, model, 2, name, part, heads=n, source=1, table=und, positions=at[0])
        )
    else:
        calls.append(call_of(run, model, 0, QK, heads=n, table=und, positions=at[0]))
    return calls


def _wan(model: str, file: str, prefix: str, embed: str, step: int = 1) -> Adapter:
    block = f"{prefix}TransformerBlock"
    return partial(wan, model=model, file=file, block=block, embed=embed, step=step)


_WAN = "Wan2.1/2.2-14B"
ADAPTERS: dict[str, Adapter] = {
    _WAN: _wan(_WAN, "transformer_wan", "Wan", "WanRotaryPosEmbed"),
    "SkyReels-V2": _wan(
        "SkyReels-V2", "transformer_skyreels_v2", "SkyReelsV2", "SkyReelsV2RotaryPosEmbed"
    ),
    "ChronoEdit": _wan(_WAN, "transformer_chronoedit", "Wan", "ChronoEditRotaryPosEmbed", 7),
    "Helios-14B": helios,
    "LTX-2 video": partial(ltx2, rope="split", cross=False),
    "LTX-2 interleaved": partial(ltx2, rope="interleaved", cross=False),
    "LTX-2 cross": partial(ltx2, rope="split", cross=True),
    "Mochi-1": mochi,
    "CogVideoX-5B": cogvideox,
    "CogView4-6B": partial(
        cogview,
        model="CogView4-6B",
        file="transformer_cogview4",
        name="CogView4",
        sizes=((16, 16),),
    ),
    "GLM-Image": partial(
        cogview, model="GLM-Image", file="transformer_glm_image", name="GlmImage", sizes=()
    ),
    "EasyAnimate": easyanimate,
    "Cosmos-Predict2-2B/14B": cosmos,
    "Cosmos3": partial(cosmos3, keys=False),
    "Cosmos3 keys": partial(cosmos3, keys=True),
}
