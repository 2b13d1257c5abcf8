"""The oracle: what qkrope computes, in float64 and in as few steps as the formulas have.

For one head x (or, with scope "row", all heads of one token at once)::

    normalise   n = (x - mean) * rstd * w + bias      w = weight + weight_offset, 1 without a weight
      rms       mean = 0                              rstd = 1 / sqrt(average(x^2) + eps)
      layer     mean = average(x)                     rstd = 1 / sqrt(average((x - mean)^2) + eps)
      l2        mean = 0                              rstd = 1 / max(sqrt(sum(x^2)), eps)
      none      n = x
    rotate      a pair of channels (a, b) becomes (a cos - b sin, b cos + a sin) * attention_factor
      half          pairs (i, i + rotary_dim / 2)     channels from rotary_dim on are left alone
      interleaved   pairs (2 i, 2 i + 1)
      angle         position * inv_freq[i], reduced modulo a turn in exact integers

``order="norm_first"`` rotates n, ``order="rope_first"`` normalises the rotated x. The result is
float64; ``round_to=`` rounds it once. ``rounding="eager"`` is the one exception: it repeats the
casts of the unfused chain and returns the dtype of its input.

`criterion_terms` is the scale of the acceptance criterion in `qkrope.accuracy`; angles are in
`qkrope.reference_angles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from .accuracy import error_over_bound, round_once, ulp
from .reference_angles import CosSin, Positions, Source, resolve
from .spec import Norm, Spec

__all__ = [
    "criterion_terms",
    "error_over_bound",
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
    cos_sin: CosSin = None,
    cos_sin_cache: Tensor | None = None,
    inv_freq: Tensor | None = None,
    seq_len: int | None = None,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Normalise and rotate q and k in float64: the formulas at the top of this file.

    Args:
        q: [..., num_q_heads, head_dim], any strides, or None.
        k: [..., num_kv_heads, head_dim], any strides, or None.
        q_weight: [head_dim], [heads, head_dim], with scope "row" also [heads * head_dim], or None.
        k_weight: the same for k.
        positions: integers that broadcast to q's (and k's) leading dimensions, or (q's, k's), in
            [-2^31, 2^31). Needed unless ``spec.rope`` is None or ``cos_sin`` is given.
        spec: any Spec at all; no value is left out here.
        q_bias: added after the weight; shaped like a weight.
        k_bias: the same for k.
        cos_sin: (cos, sin), each broadcasting to [..., rotary_dim / 2] (one value a pair) or
            [..., rotary_dim] (one a channel), in place of angles. Any attention factor is inside.
        cos_sin_cache: [max_position, rotary_dim], a row is cos of all pairs, then sin of all pairs.
        inv_freq: [rotary_dim / 2] frequencies in radians a position, in place of the Spec's.
        seq_len: the length that length-dependent scalings see.
        round_to: dtype of the result; None means float64 (the input's dtype with "eager").

    Returns:
        (q2, k2), contiguous, None where the input was None.

    Raises:
        ValueError: an argument of a wrong shape, missing, excess or out of range.
        TypeError: positions that are not int32 or int64.
    """
    sides = _sides(
        q,
        k,
        q_weight,
        k_weight,
        positions,
        spec,
        q_bias=q_bias,
        k_bias=k_bias,
        cos_sin=cos_sin,
        cos_sin_cache=cos_sin_cache,
        inv_freq=inv_freq,
        seq_len=seq_len,
    )
    form = _eager if spec.rounding == "eager" else _exact
    q2, k2 = (None if side is None else _finish(form(side, spec), round_to) for side in sides)
    return q2, k2


class Extras(TypedDict, total=False):
    """The optional arguments of `qk_norm_rope` that say what is computed."""

    q_bias: Tensor | None
    k_bias: Tensor | None
    cos_sin: CosSin
    cos_sin_cache: Tensor | None
    inv_freq: Tensor | None
    seq_len: int | None


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor | None,
    spec: Spec,
    *,
    round_to: torch.dtype | None = None,
    **extras: Unpack[Extras],
) -> Tensor:
    """Return a new packed tensor: `qk_norm_rope` of its q and k columns, the rest copied.

    Args:
        qkv: [..., (num_q_heads + num_kv_heads + any) * head_dim], columns q, k, then v.
        q_weight: as in `qk_norm_rope`.
        k_weight: as in `qk_norm_rope`.
        positions: integers that broadcast to qkv's leading dimensions.
        spec: any Spec.
        round_to: dtype of the result; None means float64 (the input's dtype with "eager").
        extras: the other keywords of `qk_norm_rope`.
    """
    nq, nk, dim, columns = spec.num_q_heads, spec.num_kv_heads, spec.head_dim, qkv.shape[-1]
    if columns % dim or columns < (nq + nk) * dim:
        expected = f"a multiple of head_dim {dim} of at least {(nq + nk) * dim}"
        raise ValueError(f"qkv: last dimension {columns}, expected {expected}")
    heads = qkv.unflatten(-1, (columns // dim, dim))
    q, k, v = heads[..., :nq, :], heads[..., nq : nq + nk, :], heads[..., nq + nk :, :]
    q2, k2 = qk_norm_rope(q, k, q_weight, k_weight, positions, spec, round_to=round_to, **extras)
    assert q2 is not None and k2 is not None
    return torch.cat((q2, k2, v.to(q2.dtype)), dim=-2).flatten(-2)


def criterion_terms(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> tuple[Tensor | None, Tensor | None]:
    """Return |a| + |b| of every output element: the formula with absolute values as its summands.

    norm_first: own = (|x| + |mean|) * rstd * |w| + |bias|, of both channels of the pair together.
    rope_first: (|x_a| + |x_b| + |mean|) * rstd * |w_i| + |bias_i|, of the channel's own w and bias.
    Either times max(1, attention factor), or times max(1, |cos|, |sin|) with a caller's table.
    A channel that is not rotated has its own term alone. Arguments as in `qk_norm_rope`.
    """
    q_side, k_side = _sides(q, k, q_weight, k_weight, positions, spec, **extras)
    return (
        None if q_side is None else _terms(q_side, spec),
        None if k_side is None else _terms(k_side, spec),
    )


# ---- normalise and rotate ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One of q and k, with everything that broadcasts against it."""

    x: Tensor  # [..., heads, head_dim]
    norm: Norm
    weight: Tensor | None  # [head_dim] or [heads, head_dim]
    bias: Tensor | None
    cos: Tensor | None  # [..., 1, rotary_dim], attention factor inside; None: no rotation
    sin: Tensor | None
    gain: float | Tensor  # the criterion's bound on what a rotation multiplies by


def _sides(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> tuple[_Side | None, _Side | None]:
    table, cache = extras.get("cos_sin"), extras.get("cos_sin_cache")
    source = resolve(spec, positions, table, cache, extras.get("inv_freq"), extras.get("seq_len"))
    return (
        _side(source, "q", q, q_weight, extras.get("q_bias"), spec.q_norm),
        _side(source, "k", k, k_weight, extras.get("k_bias"), spec.k_norm_resolved),
    )


def _side(
    source: Source,
    name: str,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
) -> _Side | None:
    if x is None:
        return None
    spec = source.spec
    heads = spec.num_q_heads if name == "q" else spec.num_kv_heads
    if x.ndim < 2 or tuple(x.shape[-2:]) != (heads, spec.head_dim):
        got = tuple(x.shape)
        raise ValueError(f"{name}: shape {got}, expected (..., {heads}, {spec.head_dim})")
    weight = _per_channel(f"{name}_weight", weight, norm, heads, spec.head_dim)
    bias = _per_channel(f"{name}_bias", bias, norm, heads, spec.head_dim)
    cos = sin = None
    gain: float | Tensor = max(1.0, source.attention_factor)
    if spec.rope is not None:
        positions = source.q_positions if name == "q" else source.k_positions
        cos, sin = source.channel_cos_sin(x.shape[:-2], positions)
        if source.cos_sin is not None or source.cache is not None:
            gain = torch.maximum(cos.abs(), sin.abs()).clamp_min(1.0)
    return _Side(x, norm, weight, bias, cos, sin, gain)


def _per_channel(
    name: str, value: Tensor | None, norm: Norm, heads: int, head_dim: int
) -> Tensor | None:
    """Check a weight or bias and give it a shape that broadcasts to [..., heads, head_dim]."""
    if value is None:
        return None
    if norm.kind == "none":
        raise ValueError(f'{name}: given, but its norm is "none"')
    shape = tuple(value.shape)
    if norm.scope == "row" and shape == (heads * head_dim,):
        return value.view(heads, head_dim)
    if shape in ((head_dim,), (heads, head_dim)):
        return value
    forms = f"({head_dim},), ({heads}, {head_dim})" + (
        f" or ({heads * head_dim},)" if norm.scope == "row" else ""
    )
    raise ValueError(f"{name}: shape {shape}, expected {forms}")


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal scale of each head (scope "head") or token (scope "row")."""
    dims = (-2, -1) if norm.scope == "row" else (-1,)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if norm.kind == "none":
        return zero, zero + 1
    if norm.kind == "l2":
        return zero, 1 / x.square().sum(dims, keepdim=True).sqrt().clamp_min(norm.eps)
    mean = x.mean(dims, keepdim=True) if norm.kind == "layer" else zero
    return mean, ((x - mean).square().mean(dims, keepdim=True) + norm.eps).rsqrt()


def _effective_weight(side: _Side) -> Tensor:
    if side.weight is None:
        return torch.ones((), dtype=torch.float64, device=side.x.device)
    return side.weight.double() + side.norm.weight_offset


def _bias(side: _Side) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=side.x.device)
    return zero if side.bias is None else side.bias.double()


def _normalise(x: Tensor, side: _Side) -> Tensor:
    mean, rstd = _statistics(x, side.norm)
    return (x - mean) * rstd * _effective_weight(side) + _bias(side)


def _partner(x: Tensor, pairing: str) -> Tensor:
    """The other channel of each pair: (a, b) becomes (b, a)."""
    if pairing == "interleaved":
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, dims=-1)


def _quarter_turn(x: Tensor, pairing: str) -> Tensor:
    """Each pair turned by 90 degrees: (a, b) becomes (-b, a)."""
    sign = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    if pairing == "interleaved":
        sign[0::2] = -1
    else:
        sign[: x.shape[-1] // 2] = -1
    return _partner(x, pairing) * sign


def _rotate(x: Tensor, side: _Side, spec: Spec) -> Tensor:
    if spec.rope is None or side.cos is None or side.sin is None:
        return x
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    # In float64 the casts do nothing; in the eager chain every product and the sum round.
    cos, sin = side.cos.to(x.dtype), side.sin.to(x.dtype)
    turned = turned * cos + _quarter_turn(turned, spec.rope.pairing) * sin
    return torch.cat((turned, rest), dim=-1)


def _exact(side: _Side, spec: Spec) -> Tensor:
    x = side.x.double()
    if spec.order == "rope_first":
        return _normalise(_rotate(x, side, spec), side)
    return _rotate(_normalise(x, side), side, spec)


def _eager(side: _Side, spec: Spec) -> Tensor:
    """The unfused chain of Hugging Face's Qwen3 and Llama: each step rounds to the input's dtype.

    The statistic is float32 and so is x * rstd; that product is cast, then multiplied by the
    weight, and cos and sin are cast before the rotation.
    """
    dtype = side.x.dtype

    def normalise(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(dtype, torch.float32))
        mean, rstd = _statistics(wide, side.norm)
        y = ((wide - mean) * rstd).to(dtype)
        if side.weight is not None:
            y = _effective_weight(side).to(dtype) * y
        return y if side.bias is None else y + side.bias.to(dtype)

    if spec.order == "rope_first":
        return normalise(_rotate(side.x, side, spec))
    return _rotate(normalise(side.x), side, spec)


def _finish(y: Tensor, round_to: torch.dtype | None) -> Tensor:
    return (y if round_to is None else round_once(y, round_to)).contiguous()


def _terms(side: _Side, spec: Spec) -> Tensor:
    x = side.x.double()
    rope_first = spec.order == "rope_first"
    mean, rstd = _statistics(_rotate(x, side, spec) if rope_first else x, side.norm)
    scale, bias = rstd * _effective_weight(side).abs(), _bias(side).abs()

    def rotated(own: Tensor) -> Tensor:
        if spec.rope is None:
            return own
        turned, rest = own[..., : spec.rotary_dim], own[..., spec.rotary_dim :]
        return torch.cat((turned + _partner(turned, spec.rope.pairing), rest), dim=-1)

    if rope_first:
        terms = (rotated(x.abs()) + mean.abs()) * scale + bias
    else:
        terms = rotated((x.abs() + mean.abs()) * scale + bias)
    turned, rest = terms[..., : spec.rotary_dim], terms[..., spec.rotary_dim :]
    return torch.cat((turned * side.gain, rest), dim=-1)
