"""The oracle's two steps in float64: normalise a side, rotate it; formulas: `qkrope.reference`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .norm import Norm
from .reference_side import Side, Span, Turn

__all__ = [
    "effective_weight",
    "each_span",
    "move_pairs",
    "normalise",
    "pair_sizes",
    "quarter_turn",
    "rotate",
    "statistics",
]


def statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal scale of each head (scope "head") or token (scope "row")."""
    dims = (-2, -1) if norm.scope == "row" else (-1,)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if norm.kind == "none":
        return zero, zero + 1
    if norm.kind == "l2":
        return zero, 1 / x.square().sum(dims, keepdim=True).sqrt().clamp_min(norm.eps)
    mean = x.mean(dims, keepdim=True) if norm.kind == "layer" else zero
    return mean, ((x - mean).square().mean(dims, keepdim=True) + norm.eps).rsqrt()


def effective_weight(span: Span) -> Tensor | None:
    """weight + weight_offset in float64; without a weight nothing multiplies, offset or not."""
    return None if span.weight is None else span.weight.double() + span.norm.weight_offset


def each_span(x: Tensor, side: Side, step: Callable[[Tensor, Span], Tensor]) -> Tensor:
    """Apply ``step`` to the channels of each span."""
    return torch.cat([step(x[..., span.channels], span) for span in side.spans], dim=-1)


def normalise(x: Tensor, side: Side) -> Tensor:
    """((x - mean) * rstd * w + bias) * scale."""

    def one(x: Tensor, span: Span) -> Tensor:
        mean, rstd = statistics(x, span.norm)
        y, w = (x - mean) * rstd, effective_weight(span)
        y = y if w is None else y * w
        return y if span.bias is None else y + span.bias.double()

    y = each_span(x, side, one)
    return y if side.scale is None else y * side.scale.double()


def move_pairs(x: Tensor, turn: Turn, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``step`` to the pairs [..., pairs, 2] of the rotated tokens, and write all pairs."""
    pairs = x[..., turn.read]
    if turn.tokens is None:
        pairs = step(pairs)
    else:
        turned = step(pairs[..., turn.tokens, :, :, :])
        pairs = pairs.clone()
        pairs[..., turn.tokens, :, :, :] = turned
    return x.index_copy(-1, turn.write.flatten(), pairs.flatten(-2))


def pair_sizes(x: Tensor, turn: Turn | None, *, back: bool = False) -> Tensor:
    """|a| + |b| on both channels of each pair, times the gain: no rotation gives more.

    x: sizes, not negative. back: of the transposed rotation, from what pairs write to what they
    read.
    """
    if turn is None:
        return x
    gain = turn.gain
    if back:
        turn = replace(turn, read=turn.write, write=turn.read)
        gain = gain.amax(-1, keepdim=True) if isinstance(gain, Tensor) else gain
    return move_pairs(x, turn, lambda ab: ab.sum(-1, keepdim=True).expand_as(ab) * gain)


def quarter_turn(pairs: Tensor) -> Tensor:
    """Each pair turned by 90 degrees: (a, b) becomes (-b, a)."""
    a, b = pairs.unbind(-1)
    return torch.stack((-b, a), dim=-1)


def rotate(x: Tensor, side: Side) -> Tensor:
    """(a, b) becomes (a cos - b sin, b cos + a sin), each with its own channel's cos and sin."""
    if (turn := side.turn) is None:
        return x
    return move_pairs(x, turn, lambda ab: ab * turn.cos + quarter_turn(ab) * turn.sin)
