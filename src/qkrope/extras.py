"""The keyword arguments that the public calls share, from their Python forms to native ones."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from ._limits import integer, real
from .plan import refuse_no_spec
from .scaling import MAX_LENGTH
from .spec import Spec

__all__ = ["GRADIENTS", "NAMES", "OPERANDS", "PLAIN", "Angles", "Extras", "native_operands", "pair"]

Tensor = torch.Tensor
CosSin = tuple[Tensor, Tensor]


class Angles(TypedDict, total=False):
    """Keywords that say by what angles, and which tokens turn; None is not given, nor is 0 of
    rotate_from.
    """

    cos_sin: CosSin | tuple[CosSin | None, CosSin | None] | None
    cos_sin_cache: Tensor | None
    inv_freq: Tensor | None
    seq_len: int | None
    rotate_from: int
    rotate_to: int | None


class Extras(Angles, total=False):
    """Keywords of `qkrope.qk_norm_rope` and its forms."""

    q_bias: Tensor | None
    k_bias: Tensor | None
    q_scale: float | Tensor | None
    k_scale: float | Tensor | None
    v: Tensor | None
    v_weight: Tensor | None
    out: tuple[Tensor | None, ...] | None


# What native/bindings.c takes after the plan and its flags, by the names that errors have. The
# first PLAIN are all that a call without keywords needs.
PLAIN = 6
OPERANDS = (
    *("qkv", "q", "k", "q_weight", "k_weight", "positions"),
    *("positions[1]", "cos", "sin", "cos_sin_cache", "inv_freq", "out[0]", "out[1]"),
    *("q_bias", "k_bias", "k cos", "k sin", "v", "v_weight", "out[2]", "q_scale", "k_scale"),
    *("rotate_from", "rotate_to"),
)
# What a call has gradients of.
NAMES = ("q", "k", "v", "q_weight", "k_weight", "v_weight", "q_bias", "k_bias")
# And what native code takes after those where it is a backward.
GRADIENTS = (
    *("dq_out", "dk_out", "dv_out", "dq_weight", "dk_weight", "dv_weight", "dq_bias", "dk_bias"),
    "workspace",
)


def pair(name: str, value: Any, count: int = 2) -> tuple[Any, ...]:
    """The items of a tuple or list of so many."""
    expected = "a pair" if count == 2 else "three tensors (q, k, v)"
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if len(value) != count:
        raise TypeError(
            f"{name}: expected {expected}, got a {type(value).__name__} of {len(value)}"
        )
    return tuple(value)


def native_operands(
    spec: Spec, extras: dict[str, Any], sides: tuple[bool, bool], packed: bool
) -> dict[str, Any]:
    """The operands by native name, in native order after "positions[1]"; seq_len is not one.

    ``sides`` says whether the call has q and k, ``packed`` whether V is in one tensor with them.
    Raises where the combination makes no sense; shapes and dtypes are checked in native code.
    """
    if unknown := sorted(extras.keys() - Extras.__annotations__.keys()):
        raise TypeError(f"{unknown[0]}: expected a keyword of qkrope.qk_norm_rope, got this one")
    refuse_no_spec(spec)
    get = extras.get
    start = integer("rotate_from", get("rotate_from", 0), 0, MAX_LENGTH)
    stop = get("rotate_to")
    stop = -1 if stop is None else integer("rotate_to", stop, 0, MAX_LENGTH)
    angles = ("cos_sin", "cos_sin_cache", "inv_freq")
    given = [name for name in angles if get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected None beside {given[0]}: they exclude each other")
    given += ["rotate_from"] if start else []
    given += ["rotate_to"] if stop >= 0 else []
    if given and spec.rope is None:
        raise ValueError(f"{given[0]}: expected None since spec.rope is None, got a value")
    cos, sin, k_cos, k_sin = _tables(get("cos_sin"), sides)
    with_v = get("v") is not None or (packed and spec.v_norm is not None)
    out = get("out")
    outs = (None,) * 3 if out is None else pair("out", out, 3 if with_v else 2)
    found = (
        *(cos, sin, get("cos_sin_cache"), get("inv_freq"), *outs[:2]),
        *(get("q_bias"), get("k_bias"), k_cos, k_sin, get("v"), get("v_weight")),
        *(outs[2] if len(outs) > 2 else None, _scale("q_scale", get("q_scale"))),
        *(_scale("k_scale", get("k_scale")), start, stop),
    )
    operands = dict(zip(OPERANDS[PLAIN + 1 :], found, strict=True))
    for name, value in operands.items():
        # The sine of a conjugated table: its memory holds the opposite of its values.
        if isinstance(value, Tensor) and value.is_neg():
            refuse_negated(name)
    return operands


def refuse_negated(name: str) -> None:
    """ValueError for a tensor whose memory holds the opposite of its values."""
    raise ValueError(
        f"{name}: expected a tensor whose memory holds its values, got one that torch negates when "
        "it is read (the imag of a conj?); call resolve_neg() on it"
    )


def _scale(name: str, value: Any) -> Any:
    return value if value is None or isinstance(value, Tensor) else real(name, value)


def _tables(cos_sin: Any, sides: tuple[bool, bool]) -> tuple[Any, Any, Any, Any]:
    """cos and sin of both sides, or of q and then of k where each has its own."""
    if cos_sin is None:
        return (None,) * 4
    first, second = pair("cos_sin", cos_sin)
    if not any(isinstance(item, tuple | list) for item in (first, second)):
        if first is None or second is None:
            raise TypeError("cos_sin: expected two tensors (cos, sin), got None among them")
        return first, second, None, None
    both: list[Any] = []
    for i, item in enumerate((first, second)):
        table = (None, None) if item is None else pair(f"cos_sin[{i}]", item)
        if (sides[i] or item is not None) and (table[0] is None or table[1] is None):
            raise TypeError(f"cos_sin[{i}]: expected two tensors (cos, sin), got None among them")
        both += table
    return both[0], both[1], both[2], both[3]
