"""Positions of the tokens of images and videos, for ropes with several axes."""

from __future__ import annotations

from typing import Any

import torch

from ._limits import flag, integer, refuse
from .scaling import MAX_LENGTH

__all__ = ["grid_positions"]


def grid_positions(
    frames: int | None,
    height: int,
    width: int,
    *,
    start: int | tuple[int, ...] = 0,
    text: int = 0,
    text_counts: bool = False,
    device: Any = None,
) -> torch.Tensor:
    """Positions ``[A, T]`` of a grid of tokens, for `Rope.axes_dim` or `Rope.mrope_section`.

    The token of frame f, row h, column w is number ``(f * height + h) * width + w`` and has the
    positions ``(f, h, w) + start``; with ``frames=None`` the axes are (h, w) alone. ``text`` tokens
    precede the grid: at position 0 of every axis (FLUX), or with ``text_counts`` at 0, 1, 2, ... of
    every axis (Qwen2-VL, whose grid then has ``start=text``). Where text follows the grid, call
    with ``text=0`` and concatenate.

    Args:
        frames: frames of a video, >= 1, or None for two axes.
        height: rows of tokens, >= 1.
        width: columns of tokens, >= 1.
        start: added to the grid's positions: one int, or one an axis; negative ones centre a grid.
        text: tokens before the grid, >= 0.
        text_counts: whether those tokens count up.
        device: where the result lies.

    Returns:
        int64 ``[3, text + frames * height * width]``, or ``[2, text + height * width]``.

    Raises:
        ValueError, TypeError: an argument out of its limits.
    """
    sizes = [] if frames is None else [integer("frames", frames, 1, MAX_LENGTH)]
    sizes += [integer("height", height, 1, MAX_LENGTH), integer("width", width, 1, MAX_LENGTH)]
    text = integer("text", text, 0, MAX_LENGTH)
    starts = start if isinstance(start, tuple | list) else (start,) * len(sizes)
    if len(starts) != len(sizes):
        refuse(ValueError, "start", f"an int, or {len(sizes)} of them", start)
    counts = [
        torch.arange(n, device=device) + integer("start", first, -MAX_LENGTH, MAX_LENGTH - 1)
        for n, first in zip(sizes, starts, strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*counts, indexing="ij")).flatten(1)
    before = torch.arange(text, device=device) * int(flag("text_counts", text_counts))
    return torch.cat((before.expand(len(sizes), text), grid), dim=1)
