"""The diffusion transformers that test_upstream_diffusers.py runs, one adapter a module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from upstream import Call
from upstream_diffusers import (
    BATCH,
    GRID,
    HEADS,
    IMAGE,
    TEXT,
    Adapter,
    Attention,
    Run,
    call_of,
    first_half,
    load,
    pairs,
    real,
    rows,
)

from qkrope.grid import grid_positions

D = 128
WIDTH = HEADS * D
QK, ADDED = ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")
VIDEO = grid_positions(*GRID)  # [3, IMAGE]
LATENT = torch.zeros(BATCH, 4, *GRID)


def joint_ids(axes: int) -> Tensor:
    """FLUX ids [tokens, axes]: text at zero, then the grid."""
    ids = torch.zeros(TEXT + IMAGE, axes, dtype=torch.long)
    ids[TEXT:, :3] = VIDEO.T
    if axes == 4:
        ids[:TEXT, 3] = torch.arange(TEXT)
    return ids


def flux(
    dtype: torch.dtype, model: str, file: str, block: str, embed: str, theta: float, axes: Any
) -> list[Call]:
    """Two streams with weights of their own, [text, image] under one table."""
    run = Run(load(f"{file}.{block}")(WIDTH, HEADS, D).attn, dtype, D)
    ids = joint_ids(len(axes))
    table = load(embed)(theta, list(axes))(ids)
    run(run.normal(BATCH, IMAGE, WIDTH), run.normal(BATCH, TEXT, WIDTH), image_rotary_emb=table)
    table, text, image = pairs(table), slice(0, TEXT), slice(TEXT, None)
    return [
        call_of(run, model, i, names, part, table=rows(table, part), positions=ids[part].T)
        for i, names, part in ((0, QK, image), (1, ADDED, text))
    ]


def flux2_single(dtype: torch.dtype) -> list[Call]:
    """[q | k | v | mlp] of one projection."""
    run = Run(load("transformer_flux2.Flux2SingleTransformerBlock")(WIDTH, HEADS, D).attn, dtype, D)
    ids = joint_ids(4)
    table = load("transformer_flux2.Flux2PosEmbed")(2000, [32] * 4)(ids)
    run(run.normal(BATCH, TEXT + IMAGE, WIDTH), image_rotary_emb=table)
    return [call_of(run, "FLUX.2-dev", 2, QK, table=pairs(table), positions=ids.T)]


def flux3(dtype: torch.dtype) -> list[Call]:
    """float32 from the norm to the end of the rotation."""
    run = Run(load("transformer_flux3.Flux3SingleTransformerBlock")(WIDTH, HEADS, D).attn, dtype, D)
    ids = joint_ids(4)
    table = load("transformer_flux3.Flux3PosEmbed")(10000, [32] * 4)(ids)
    run(run.normal(BATCH, TEXT + IMAGE, WIDTH), image_rotary_emb=table)
    return [call_of(run, "FLUX.3", 0, QK, table=pairs(table), positions=ids.T)]


def qwen_image(dtype: torch.dtype) -> list[Call]:
    """Centred image positions; text goes on after the image's extent."""
    block = load("transformer_qwenimage.QwenImageTransformerBlock")(WIDTH, HEADS, D)
    run = Run(block.attn, dtype, D)
    embed = load("transformer_qwenimage.QwenEmbedRope")(10000, [16, 56, 56], scale_rope=True)
    image, text = embed([GRID], torch.device("cpu"), TEXT)
    run(
        run.normal(BATCH, IMAGE, WIDTH),
        run.normal(BATCH, TEXT, WIDTH),
        image_rotary_emb=(image, text),
    )
    frames, height, width = GRID
    grid = grid_positions(*GRID, start=(0, -(height - height // 2), -(width - width // 2)))
    after = (max(height // 2, width // 2) + torch.arange(TEXT)).expand(3, TEXT)
    return [
        call_of(run, "Qwen-Image", 0, QK, slice(TEXT, None), table=real(image), positions=grid),
        call_of(run, "Qwen-Image", 1, ADDED, slice(0, TEXT), table=real(text), positions=after),
    ]


def qwen_image21(dtype: torch.dtype) -> list[Call]:
    """One stream of text and image tokens."""
    block = load("transformer_qwenimage21.QwenImage21TransformerBlock")(WIDTH, HEADS, D)
    run = Run(block.attn, dtype, D)
    embed = load("transformer_qwenimage21.QwenImage21Rope")(10000, [16, 56, 56])
    mask = torch.tensor([False] * TEXT + [True] * 6)
    table = embed([(1, 3, 2)], mask, torch.device("cpu"))
    run(run.normal(BATCH, TEXT + 6, WIDTH), rotary_emb=table)
    text = torch.arange(TEXT).expand(3, TEXT)
    grid = grid_positions(1, 3, 2, start=(TEXT, -2, -1))
    positions = torch.cat((text, grid), dim=1)
    return [call_of(run, "Qwen-Image-2.1", 0, QK, table=real(table), positions=positions)]


def z_image(dtype: torch.dtype, model: str, block: Any, embed: str) -> list[Call]:
    """One stream, complex tables."""
    run = Run(block().attention, dtype, D)
    ids = joint_ids(3)
    table = load(embed)(theta=256.0, axes_dims=[32, 48, 48], axes_lens=[64, 64, 64])(ids)
    table = table.expand(BATCH, *table.shape)
    run(run.normal(BATCH, TEXT + IMAGE, WIDTH), freqs_cis=table)
    return [call_of(run, model, 0, QK, table=real(table), positions=ids.T)]


def z_block() -> Any:
    """A block of Z-Image."""
    return load("transformer_z_image.ZImageTransformerBlock")(0, WIDTH, HEADS, HEADS, 1e-5, True)


def fibo2_block() -> Any:
    """A block of FIBO 2."""
    return load("transformer_bria_fibo2.BriaFibo2TransformerBlock")(WIDTH, HEADS, 1e-5)


def hunyuan(
    dtype: torch.dtype, model: str, file: str, name: str, image: bool = False
) -> list[Call]:
    """[image, text]: the text is normalised by weights of its own and does not turn."""
    run = Run(load(f"{file}.{name}TransformerBlock")(HEADS, D, 4.0).attn, dtype, D)
    table, positions = hunyuan_table(file, name, image)
    tokens = positions.shape[1]
    mask = torch.ones(BATCH, TEXT) if name == "HunyuanVideo15" else None
    run(
        run.normal(BATCH, tokens, WIDTH),
        run.normal(BATCH, TEXT, WIDTH),
        attention_mask=mask,
        image_rotary_emb=table,
    )
    part = slice(0, tokens), slice(tokens, None)
    return [
        call_of(run, model, 0, QK, part[0], table=pairs(table), positions=positions),
        call_of(run, model, 1, ADDED, part[1]),
    ]


def hunyuan_single(
    dtype: torch.dtype, model: str, file: str, name: str, image: bool = False
) -> list[Call]:
    """One set of weights over [image, text], of which the image turns."""
    run = Run(load(f"{file}.{name}SingleTransformerBlock")(HEADS, D).attn, dtype, D)
    table, positions = hunyuan_table(file, name, image)
    tokens = positions.shape[1]
    run(run.normal(BATCH, tokens, WIDTH), run.normal(BATCH, TEXT, WIDTH), image_rotary_emb=table)
    positions = torch.cat((positions, torch.zeros(len(positions), TEXT, dtype=torch.long)), 1)
    extras = {"rotate_to": tokens}
    return [call_of(run, model, 2, QK, table=pairs(table), positions=positions, extras=extras)]


def hunyuan_table(file: str, name: str, image: bool) -> tuple[Any, Tensor]:
    """The embedding's table and the positions it stands for."""
    if image:  # two axes
        embed = load(f"{file}.{name}RotaryPosEmbed")((1, 1), (64, 64))
        return embed(torch.zeros(1, 4, 3, 4)), grid_positions(None, 3, 4)
    cls = load(f"{file}.{name}RotaryPosEmbed")
    return cls(1, 1, [16, 56, 56])(LATENT), VIDEO


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


AXES = (16, 56, 56)
FLUX1 = "transformer_flux.FluxPosEmbed"
HUNYUAN = "transformer_hunyuan_video", "HunyuanVideo"
HUNYUAN_IMAGE = "transformer_hunyuanimage", "HunyuanImage"
MOTIF = "transformer_motif_video", "MotifVideo"
ADAPTERS: dict[str, Adapter] = {
    "FLUX.1": partial(
        flux,
        model="FLUX.1",
        file="transformer_flux",
        block="FluxTransformerBlock",
        embed=FLUX1,
        theta=10000,
        axes=AXES,
    ),
    "Chroma": partial(
        flux,
        model="Chroma",
        file="transformer_chroma",
        block="ChromaTransformerBlock",
        embed=FLUX1,
        theta=10000,
        axes=AXES,
    ),
    "FIBO": partial(
        flux,
        model="FIBO",
        file="transformer_bria_fibo",
        block="BriaFiboTransformerBlock",
        embed=FLUX1,
        theta=10000,
        axes=AXES,
    ),
    "Bria": partial(
        flux,
        model="FIBO",
        file="transformer_bria",
        block="BriaTransformerBlock",
        embed="transformer_bria.BriaPosEmbed",
        theta=10000,
        axes=AXES,
    ),
    "LongCat-Image": partial(
        flux,
        model="FLUX.1",
        file="transformer_longcat_image",
        block="LongCatImageTransformerBlock",
        embed="transformer_longcat_image.LongCatImagePosEmbed",
        theta=10000,
        axes=AXES,
    ),
    "Ovis-Image": partial(
        flux,
        model="FLUX.1",
        file="transformer_ovis_image",
        block="OvisImageTransformerBlock",
        embed="transformer_ovis_image.OvisImagePosEmbed",
        theta=10000,
        axes=AXES,
    ),
    "FLUX.2-dev": partial(
        flux,
        model="FLUX.2-dev",
        file="transformer_flux2",
        block="Flux2TransformerBlock",
        embed="transformer_flux2.Flux2PosEmbed",
        theta=2000,
        axes=(32,) * 4,
    ),
    "FLUX.2-dev single": flux2_single,
    "FLUX.3": flux3,
    "Qwen-Image": qwen_image,
    "Qwen-Image-2.1": qwen_image21,
    "Z-Image": partial(
        z_image, model="Z-Image", block=z_block, embed="transformer_z_image.RopeEmbedder"
    ),
    "FIBO-2": partial(
        z_image, model="FIBO-2", block=fibo2_block, embed="transformer_bria_fibo2.RopeEmbedder"
    ),
    "HunyuanVideo": partial(hunyuan, model="HunyuanVideo", file=HUNYUAN[0], name=HUNYUAN[1]),
    "HunyuanVideo single": partial(
        hunyuan_single, model="HunyuanVideo", file=HUNYUAN[0], name=HUNYUAN[1]
    ),
    "HunyuanImage-2.1": partial(
        hunyuan, model="HunyuanImage-2.1", file=HUNYUAN_IMAGE[0], name=HUNYUAN_IMAGE[1], image=True
    ),
    "HunyuanImage-2.1 single": partial(
        hunyuan_single,
        model="HunyuanImage-2.1",
        file=HUNYUAN_IMAGE[0],
        name=HUNYUAN_IMAGE[1],
        image=True,
    ),
    "Motif-Video": partial(hunyuan, model="Motif-Video", file=MOTIF[0], name=MOTIF[1]),
    "Motif-Video single": partial(
        hunyuan_single, model="Motif-Video", file=MOTIF[0], name=MOTIF[1]
    ),
    "HunyuanVideo-1.5": partial(
        hunyuan, model="HunyuanVideo-1.5", file="transformer_hunyuan_video15", name="HunyuanVideo15"
    ),
    "Wan": partial(
        wan,
        model="Wan2.1/2.2-14B",
        file="transformer_wan",
        block="WanTransformerBlock",
        embed="WanRotaryPosEmbed",
    ),
    "SkyReels-V2": partial(
        wan,
        model="SkyReels-V2",
        file="transformer_skyreels_v2",
        block="SkyReelsV2TransformerBlock",
        embed="SkyReelsV2RotaryPosEmbed",
    ),
    "ChronoEdit": partial(
        wan,
        model="Wan2.1/2.2-14B",
        file="transformer_chronoedit",
        block="WanTransformerBlock",
        embed="ChronoEditRotaryPosEmbed",
        step=7,
    ),
    "Helios-14B": helios,
    "LTX-2 split": partial(ltx2, rope="split", cross=False),
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
