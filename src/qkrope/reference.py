"""The oracle: what qkrope computes, in float64 and in as few steps as the formulas have.

For the channels x of one head that share a statistic (all, or those before ``Norm.dim``; with scope
"row", all heads of one token at once)::

    normalise   n = ((x - mean) * rstd * w + bias) * scale
                                                    w = weight + weight_offset, 1 without a weight
      rms       mean = 0                              rstd = 1 / sqrt(average(x^2) + eps)
      layer     mean = average(x)                     rstd = 1 / sqrt(average((x - mean)^2) + eps)
      l2        mean = 0                              rstd = 1 / max(sqrt(sum(x^2)), eps)
      none      n = x * scale
    rotate      a pair of channels (a, b) becomes (a cos - b sin, b cos + a sin) * attention_factor
      pairs     `qkrope.Rope.pairs`; other channels and tokens outside rotate_from, rotate_to stay
      angle     position * inv_freq[i], reduced modulo a turn in exact integers, with the position
                of the pair's axis; its opposite with ``reverse``

``order="norm_first"`` rotates n, ``order="rope_first"`` normalises (and scales) the rotated x. The
result is float64; ``round_to=`` rounds it once. Another ``rounding`` than "once" is the exception:
it repeats the casts of an unfused chain (`qkrope.reference_rounded`) and returns the dtype of x.

`criterion_terms` is the scale of the acceptance criterion in `qkrope.accuracy`. The steps are in
`qkrope.reference_steps`, what a call's arguments mean in `qkrope.reference_side`, angles in
`qkrope.reference_angles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from .accuracy import error_over_bound, round_once, ulp
from .groups import Group, check_groups
from .reference_angles import CosSin, Positions
from .reference_rounded import rounded
from .reference_side import Extras, Scale, Side, Span, sides
from .reference_steps import each_span, effective_weight, normalise, pair_sizes, rotate, statistics
from .spec import Spec

__all__ = [
    "criterion_terms",
    "error_over_bound",
    "norm_rope_groups",
    "qk_norm_rope",
    "qkv_norm_rope",
    "round_once",
    "ulp",
]


def qk_norm_rope(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v: Tensor | None = None,
    v_weight: Tensor | None = None,
    cos_sin: CosSin = None,
    cos_sin_cache: Tensor | None = None,
    inv_freq: Tensor | None = None,
    seq_len: int | None = None,
    rotate_from: int = 0,
    rotate_to: int | None = None,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Normalise and rotate q and k (and normalise v): the formulas at the top of this file.

    Args:
        q: [..., num_q_heads, head_dim], any strides, or None.
        k: [..., num_kv_heads, head_dim], any strides, or None.
        q_weight: [D], [heads, D], with scope "row" also [heads * D], or None; D is head_dim, or the
            normalised channels where ``Norm.dim`` leaves the others as they are.
        k_weight: the same for k.
        positions: integers that broadcast to q's (and k's) leading dimensions, or (q's, k's), in
            [-2^31, 2^31); [A, ...] with an axis first where the rope has several. Needed unless
            ``spec.rope`` is None or ``cos_sin`` is given.
        spec: any Spec at all; no value is left out here.
        q_bias: added after the weight; shaped like a weight.
        k_bias: the same for k.
        q_scale: a number, or float32 or q's dtype broadcasting to [..., heads, head_dim]: what the
            normalised q is multiplied by, before the rotation with norm_first.
        k_scale: the same for k.
        v: [..., num_kv_heads, head_dim], normalised by ``spec.v_norm`` and not rotated, or None.
        v_weight: as q_weight.
        cos_sin: (cos, sin) in place of angles, any attention factor inside; or one such pair for q
            and one for k. The last dimension is rotary_dim / 2 (one value a pair) or rotary_dim
            (one a rotated channel, in the order of the output's channels). The others broadcast to
            the leading dimensions, or, with as many dimensions as q, to these and the heads.
        cos_sin_cache: [max_position, rotary_dim], a row is cos of all pairs, then sin of all pairs.
        inv_freq: [rotary_dim / 2] frequencies in radians a position, in place of the Spec's.
        seq_len: the length that length-dependent scalings see.
        rotate_from: tokens with a smaller index along the last leading dimension are not rotated.
        rotate_to: nor are those from this index on; None: all further ones are. A ``cos_sin`` then
            holds the rotated tokens only, while positions keep q's shape.
        round_to: dtype of the result; None means float64 (x's with another rounding than "once").

    Returns:
        (q2, k2), contiguous, None where the input was None; (q2, k2, v2) where v is given.

    Raises:
        ValueError: an argument of a wrong shape, missing, excess or out of range.
        TypeError: positions that are not int32 or int64; a scale of another dtype.
    """
    found = sides(
        q,
        k,
        q_weight,
        k_weight,
        positions,
        spec,
        q_bias=q_bias,
        k_bias=k_bias,
        q_scale=q_scale,
        k_scale=k_scale,
        v=v,
        v_weight=v_weight,
        cos_sin=cos_sin,
        cos_sin_cache=cos_sin_cache,
        inv_freq=inv_freq,
        seq_len=seq_len,
        rotate_from=rotate_from,
        rotate_to=rotate_to,
    )
    return tuple(None if s is None else _finish(_run(s, spec.order), round_to) for s in found)


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    *,
    round_to: torch.dtype | None = None,
    **extras: Unpack[Extras],
) -> Tensor:
    """Return a new packed tensor: `qk_norm_rope` of its q and k columns, the rest copied.

    Args:
        qkv: [..., (num_q_heads + num_kv_heads + any) * head_dim], columns q, k, then v; with
            ``spec.v_norm`` exactly num_kv_heads heads of v, which are normalised too.
        q_weight: as in `qk_norm_rope`.
        k_weight: as in `qk_norm_rope`.
        positions: integers that broadcast to qkv's leading dimensions, with an axis first where
            the rope has several.
        spec: any Spec.
        round_to: dtype of the result; None means float64 (qkv's with another rounding than "once").
        extras: the other keywords of `qk_norm_rope` but v.
    """
    nq, nk, dim, columns = spec.num_q_heads, spec.num_kv_heads, spec.head_dim, qkv.shape[-1]
    least = nq + nk * (1 if spec.v_norm is None else 2)
    if (
        columns % dim
        or columns < least * dim
        or (spec.v_norm is not None and columns > least * dim)
    ):
        form = "a multiple of head_dim {} of at least {}" if spec.v_norm is None else "{1}"
        raise ValueError(f"qkv: last dimension {columns}, expected {form.format(dim, least * dim)}")
    heads = qkv.unflatten(-1, (columns // dim, dim))
    q, k, v = heads[..., :nq, :], heads[..., nq : nq + nk, :], heads[..., nq + nk :, :]
    if spec.v_norm is not None:
        extras["v"] = v
    q2, k2, *rest = qk_norm_rope(
        q, k, q_weight, k_weight, positions, spec, round_to=round_to, **extras
    )
    assert q2 is not None and k2 is not None
    v2 = rest[0] if rest and rest[0] is not None else v.to(q2.dtype)
    return torch.cat((q2, k2, v2), dim=-2).flatten(-2)


def norm_rope_groups(
    x: Tensor,
    groups: Sequence[Group],
    positions: Tensor | None,
    *,
    round_to: torch.dtype | None = None,
    **angles: Any,
) -> Tensor:
    """Return a copy of x in which each group of heads is normalised and rotated.

    Args:
        x: packed, [..., columns].
        groups: what the columns hold; those of no group are copied.
        positions: as in `qk_norm_rope`, for the groups that rotate and have none of their own.
        round_to: dtype of the result; None means float64.
        angles: cos_sin, cos_sin_cache, inv_freq, seq_len, rotate_from, rotate_to of `qk_norm_rope`,
            for the groups that rotate.
    """
    y = x.double().clone()
    for group in check_groups(x.shape[-1], groups):
        own = positions if group.positions is None else group.positions
        result, _ = qk_norm_rope(
            group.view(x),
            None,
            group.weight,
            None,
            own,
            group.spec,
            q_bias=group.bias,
            q_scale=group.scale,
            **(angles if group.rope is not None else {}),
        )
        assert result is not None
        group.view(y).copy_(result)
    return _finish(y, round_to)


def criterion_terms(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> tuple[Tensor | None, ...]:
    """Return |a| + |b| of every output element: the formula with absolute values as its summands.

    norm_first: own = ((|x| + |mean|) * rstd * |w| + |bias|) * |scale|, of both channels of the pair
    together, times the gain.
    rope_first: ((own + average(own)) * rstd * |w_i| + |bias_i|) * |scale_i| with own = (|x_a| +
    |x_b|) * gain and the channel's own w, bias and scale; the average is a LayerNorm's alone: its
    mean is a sum of products of the rotation, which may nearly cancel.

    The gain is max(1, attention factor), or max(1, |cos|, |sin|) with a caller's table. A channel
    or token that is not rotated has its own term alone, and a channel outside every norm |x|.
    Arguments as in `qk_norm_rope`.
    """
    found = sides(q, k, q_weight, k_weight, positions, spec, **extras)
    return tuple(None if s is None else _terms(s, spec.order) for s in found)


def _run(side: Side, order: str) -> Tensor:
    if side.rounding is not None:
        return rounded(side, side.rounding, order)
    x = side.x.double()
    if order == "rope_first":
        return normalise(rotate(x, side), side)
    return rotate(normalise(x, side), side)


def _finish(y: Tensor, round_to: torch.dtype | None) -> Tensor:
    return (y if round_to is None else round_once(y, round_to)).contiguous()


def _terms(side: Side, order: str) -> Tensor:
    x, turn = side.x.double(), side.turn
    turned = rotate(x, side) if order == "rope_first" else x

    def normed(x: Tensor, span: Span) -> Tensor:
        mean, rstd = statistics(turned[..., span.channels], span.norm)
        size = mean.abs()
        if order == "rope_first" and span.norm.kind == "layer":
            size = x.mean((-2, -1) if span.norm.scope == "row" else -1, keepdim=True)
        y, w = (x + size) * rstd, effective_weight(span)
        y = y if w is None else y * w.abs()
        return y if span.bias is None else y + span.bias.double().abs()

    def scaled(x: Tensor) -> Tensor:
        y = each_span(x, side, normed)
        return y if side.scale is None else y * side.scale.double().abs()

    if order == "rope_first":
        return scaled(pair_sizes(x.abs(), turn))
    return pair_sizes(scaled(x.abs()), turn)
