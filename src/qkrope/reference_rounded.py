"""The oracle's chains of casts: what unfused code computes in the dtype T of its activations.

The letters are those of `qkrope.rounding`. Every operation here is one torch operation, float32
where ``wide`` is written, so a chain can be read off the upstream code and compared bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_side import Side, Span
from .reference_steps import each_span, effective_weight, move_pairs, quarter_turn, statistics
from .rounding import Letters

__all__ = ["rounded"]


def rounded(side: Side, letters: Letters, order: str) -> Tensor:
    """Normalise and rotate one side, each step in the casts of its letter; of the side's dtype."""
    norm, rotation = letters
    if order == "rope_first":
        return _normalise(_rotate(side.x, side, rotation), side, norm)
    return _rotate(_normalise(side.x, side, norm), side, rotation)


def _wide(x: Tensor) -> Tensor:
    """To float32, in which torch also computes an operation on 16-bit values; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalise(x: Tensor, side: Side, letter: str) -> Tensor:
    y = each_span(x, side, lambda x, span: _one(x, span, letter))
    if side.scale is None:
        return y
    return (_wide(y) * side.scale.to(_wide(y).dtype)).to(x.dtype)


def _one(x: Tensor, span: Span, letter: str) -> Tensor:
    dtype, wide, norm = x.dtype, _wide(x), span.norm
    if norm.kind == "none":
        return x
    mean, rstd = statistics(wide, norm)
    weight, bias = effective_weight(span), span.bias
    if letter == "B":
        y = (wide - mean) * rstd
        y = y if weight is None else y * weight.to(y.dtype)
        return (y if bias is None else y + bias.to(y.dtype)).to(dtype)
    if letter == "C" and norm.kind == "l2":
        length = wide.square().sum(-1 if norm.scope == "head" else (-2, -1), keepdim=True).sqrt()
        y = x / length.to(dtype).clamp_min(norm.eps)
    elif letter == "C":
        y = ((wide - mean) * _wide(rstd.to(dtype))).to(dtype)
    else:
        y = ((wide - mean) * rstd).to(dtype)
    y = y if weight is None else y * weight.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _rotate(x: Tensor, side: Side, letter: str) -> Tensor:
    if (turn := side.turn) is None:
        return x
    dtype, cos, sin = x.dtype, turn.cos, turn.sin
    if letter != "f":
        cos, sin = cos.to(dtype), sin.to(dtype)
    if letter != "b":
        cos, sin = cos.to(_wide(x).dtype), sin.to(_wide(x).dtype)

    def step(ab: Tensor) -> Tensor:
        if letter != "b":
            ab = _wide(ab)
        return (ab * cos + quarter_turn(ab) * sin).to(dtype)

    return move_pairs(x, turn, step)
