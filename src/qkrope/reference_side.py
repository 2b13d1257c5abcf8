"""One of q, k and v as the oracle sees it: its tensor and all that broadcasts against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from ._limits import real
from .norm import Norm
from .reference_angles import CosSin, Positions, Source, resolve
from .rounding import Letters
from .spec import Spec

__all__ = ["Extras", "Scale", "Side", "Span", "Turn", "sides"]

Scale = float | Tensor | None


class Extras(TypedDict, total=False):
    """The optional arguments of `qkrope.reference.qk_norm_rope` that say what is computed."""

    q_bias: Tensor | None
    k_bias: Tensor | None
    q_scale: Scale
    k_scale: Scale
    v: Tensor | None
    v_weight: Tensor | None
    cos_sin: CosSin
    cos_sin_cache: Tensor | None
    inv_freq: Tensor | None
    seq_len: int | None
    rotate_from: int
    rotate_to: int | None


@dataclass(frozen=True)
class Span:
    """Channels of every head that share a statistic."""

    channels: slice
    norm: Norm
    weight: Tensor | None  # of these channels: [n] or [heads, n]
    bias: Tensor | None


@dataclass(frozen=True)
class Turn:
    """The rotation of pairs of channels (a, b)."""

    read: Tensor  # [pairs, 2]: channels of a head
    write: Tensor  # [pairs, 2]
    tokens: slice | None  # the rotated ones, of the last leading dimension; None: all
    cos: Tensor  # [..., 1 or heads, pairs, 2], attention factor inside
    sin: Tensor
    gain: float | Tensor  # the criterion's bound on what a rotation multiplies by


@dataclass(frozen=True)
class Side:
    """One of q, k and v."""

    x: Tensor  # [..., heads, head_dim]
    spans: tuple[Span, ...]
    scale: Tensor | None  # broadcasts against x
    turn: Turn | None
    rounding: Letters | None  # None: once


def sides(
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Positions,
    spec: Spec,
    **extras: Unpack[Extras],
) -> list[Side | None]:
    """Check the arguments of a call: q's and k's sides, and v's where v is given."""
    v, v_weight = extras.pop("v", None), extras.pop("v_weight", None)
    biases = extras.pop("q_bias", None), extras.pop("k_bias", None)
    scales = extras.pop("q_scale", None), extras.pop("k_scale", None)
    source = resolve(spec, positions, **extras)  # type: ignore[misc]  # the angles' keywords
    found = [
        None if q is None else _side("q", q, q_weight, biases[0], scales[0], source),
        None if k is None else _side("k", k, k_weight, biases[1], scales[1], source),
    ]
    if v is not None:
        found.append(_side("v", v, v_weight, None, None, source))
    elif v_weight is not None:
        raise ValueError("v_weight: given without v")
    return found


def _side(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Scale,
    source: Source,
) -> Side:
    spec = source.spec
    norms = {"q": spec.q_norm, "k": spec.k_norm_resolved, "v": spec.v_norm}
    norm, heads = norms[name], spec.num_q_heads if name == "q" else spec.num_kv_heads
    if norm is None:
        raise ValueError("v: given, but the spec has v_norm=None")
    if x.ndim < 2 or tuple(x.shape[-2:]) != (heads, spec.head_dim):
        got = tuple(x.shape)
        raise ValueError(f"{name}: shape {got}, expected (..., {heads}, {spec.head_dim})")
    weight = _per_channel(f"{name}_weight", weight, norm, heads, spec.head_dim)
    bias = _per_channel(f"{name}_bias", bias, norm, heads, spec.head_dim)
    spans = []
    for part in norm.parts(spec.head_dim):
        channels = slice(part.start, part.stop)
        own = (
            None if t is None or part.norm.kind == "none" else t[..., channels]
            for t in (weight, bias)
        )
        spans.append(Span(channels, part.norm, *own))
    turn = None if name == "v" or spec.rope is None else _turn(name, x, source)
    rounding = spec.roundings[0 if name == "q" else 1]
    return Side(x, tuple(spans), _scale(f"{name}_scale", scale, x), turn, rounding)


def _per_channel(
    name: str, value: Tensor | None, norm: Norm, heads: int, head_dim: int
) -> Tensor | None:
    """Check a weight or bias and give it a shape that broadcasts to [..., heads, channels]."""
    if value is None:
        return None
    if norm.kind == "none":
        raise ValueError(f'{name}: given, but its norm is "none"')
    shape, width = tuple(value.shape), norm.weight_dim(head_dim)
    if norm.scope == "row" and shape == (heads * width,):
        return value.view(heads, width)
    if shape in ((width,), (heads, width)):
        return value
    forms = f"({width},), ({heads}, {width})" + (
        f" or ({heads * width},)" if norm.scope == "row" else ""
    )
    raise ValueError(f"{name}: shape {shape}, expected {forms}")


def _scale(name: str, value: Scale, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.tensor(real(name, value), dtype=torch.float64, device=x.device)
    if value.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name}: {value.dtype}, expected float32 or {x.dtype}")
    try:
        return torch.broadcast_to(value, x.shape)
    except RuntimeError:
        got, expected = tuple(value.shape), tuple(x.shape)
        raise ValueError(f"{name}: shape {got} does not broadcast to {expected}") from None


def _turn(name: str, x: Tensor, source: Source) -> Turn:
    spec = source.spec
    cos, sin = source.cos_sin(name, x.shape)
    gain: float | Tensor = max(1.0, source.attention_factor)
    if source.has_table:
        gain = torch.maximum(cos.abs(), sin.abs()).clamp_min(1.0)
    read, write = (
        torch.tensor(pairs, device=x.device) for pairs in (spec.pairs, spec.output_pairs)
    )
    return Turn(read, write, source.tokens(name, x.shape[:-2]), cos, sin, gain)
