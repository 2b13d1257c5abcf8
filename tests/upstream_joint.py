"""Diffusion transformers with text and image streams (test_upstream_diffusers.py)."""

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
    load,
    pairs,
    real,
    rows,
)

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


def _flux(model: str, file: str, prefix: str, embed: str, axes: Any = (16, 56, 56)) -> Adapter:
    theta = 10000 if len(axes) == 3 else 2000
    block = f"{prefix}TransformerBlock"
    return partial(flux, model=model, file=file, block=block, embed=embed, theta=theta, axes=axes)


def _both(model: str, file: str, prefix: str, image: bool = False) -> dict[str, Adapter]:
    words = {"model": model, "file": file, "name": prefix, "image": image}
    return {model: partial(hunyuan, **words), f"{model} single": partial(hunyuan_single, **words)}


_EMBED = "transformer_flux.FluxPosEmbed"
_BRIA = "transformer_bria.BriaPosEmbed"
_LONGCAT = "transformer_longcat_image.LongCatImagePosEmbed"
_OVIS = "transformer_ovis_image.OvisImagePosEmbed"
_FLUX2 = "transformer_flux2.Flux2PosEmbed"
_Z, _FIBO2 = "transformer_z_image.RopeEmbedder", "transformer_bria_fibo2.RopeEmbedder"
ADAPTERS: dict[str, Adapter] = {
    "FLUX.1": _flux("FLUX.1", "transformer_flux", "Flux", _EMBED),
    "Chroma": _flux("Chroma", "transformer_chroma", "Chroma", _EMBED),
    "FIBO": _flux("FIBO", "transformer_bria_fibo", "BriaFibo", _EMBED),
    "Bria": _flux("FIBO", "transformer_bria", "Bria", _BRIA),
    "LongCat-Image": _flux("FLUX.1", "transformer_longcat_image", "LongCatImage", _LONGCAT),
    "Ovis-Image": _flux("FLUX.1", "transformer_ovis_image", "OvisImage", _OVIS),
    "FLUX.2-dev": _flux("FLUX.2-dev", "transformer_flux2", "Flux2", _FLUX2, (32,) * 4),
    "FLUX.2-dev single": flux2_single,
    "FLUX.3": flux3,
    "Qwen-Image": qwen_image,
    "Qwen-Image-2.1": qwen_image21,
    "Z-Image": partial(z_image, model="Z-Image", block=z_block, embed=_Z),
    "FIBO-2": partial(z_image, model="FIBO-2", block=fibo2_block, embed=_FIBO2),
    **_both("HunyuanVideo", "transformer_hunyuan_video", "HunyuanVideo"),
    **_both("HunyuanImage-2.1", "transformer_hunyuanimage", "HunyuanImage", image=True),
    **_both("Motif-Video", "transformer_motif_video", "MotifVideo"),
    "HunyuanVideo-1.5": partial(
        hunyuan,
        model="HunyuanVideo-1.5",
        file="transformer_hunyuan_video15",
        name="HunyuanVideo15",
    ),
}
