"""A Spec with its angles resolved, and its twin on the native side."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from . import _native, angles
from ._limits import integer
from .norm import Norm
from .rope import PAIRINGS, Rope
from .scaling import MAX_LENGTH
from .spec import Spec
from .variant import NORM_LETTERS, NORMS, TURN_LETTERS, is_general

_lock = threading.Lock()
_by_value: dict[tuple[Spec, angles.Angles], Plan] = {}


class Plan:
    """A Spec with its angles resolved, and its native twin."""

    __slots__ = ("handle", "spec")

    def __init__(self, spec: Spec, resolved: angles.Angles) -> None:
        ints, floats = _numbers(spec, resolved)
        words = angles.frac_words(resolved.inv_freq)
        pairs = array("h", chain.from_iterable(_pairs(spec)))
        self.spec = spec
        self.handle = _native.lib().plan_new(
            *(numbers.buffer_info()[0] for numbers in (ints, floats, words, pairs))
        )


def _numbers(spec: Spec, resolved: angles.Angles) -> tuple[array[int], array[float]]:
    """What plan_new of native/bindings.c reads, in its order."""
    rope, v_norm = spec.rope or Rope(), spec.v_norm or Norm("none")
    ints = [spec.num_q_heads, spec.num_kv_heads, spec.v_norm is not None]
    ints += [spec.head_dim, spec.rotary_dim, PAIRINGS.index(rope.pairing)]
    ints += [spec.order == "rope_first", rope.reverse, spec.position_axes, is_general(spec)]
    floats = [resolved.attention_factor]
    q_letters, k_letters = spec.roundings
    for norm, letters in (
        (spec.q_norm, q_letters),
        (spec.k_norm_resolved, k_letters),
        (v_norm, k_letters),
    ):
        parts = norm.parts(spec.head_dim)
        rest = parts[-1].norm if len(parts) > 1 else Norm("none")
        norm_letter, turn_letter = letters or ("", "")
        ints += [NORMS.index(norm.kind), norm.scope == "row", parts[0].stop]
        ints += [NORMS.index(rest.kind), norm.weight_dim(spec.head_dim)]
        ints += [NORM_LETTERS.index(norm_letter), TURN_LETTERS.index(turn_letter)]
        floats += [norm.eps, norm.weight_offset, rest.eps, rest.weight_offset]
    return array("i", ints), array("f", floats)


def _pairs(spec: Spec) -> Iterator[tuple[int, ...]]:
    """The qk_pair of native/params.h, pair by pair."""
    written = sorted(chain.from_iterable(spec.output_pairs))
    entry = {channel: i for i, channel in enumerate(written)}  # of a table with one a channel
    for read, write, axis in zip(spec.pairs, spec.output_pairs, spec.pair_axes, strict=True):
        yield (*read, *write, entry[write[0]], entry[write[1]], axis)


def plan_of(spec: Spec, seq_len: int | None = None) -> Plan:
    """The plan of a Spec: by value for equal Specs, and on the instance for its next plain call."""
    refuse_no_spec(spec)
    if seq_len is None and spec._plan is not None:
        return spec._plan
    if seq_len is not None:
        seq_len = integer("seq_len", seq_len, 1, MAX_LENGTH)
    resolved = angles.resolve(spec, seq_len)
    with _lock:
        plan = _by_value.get((spec, resolved))
        if plan is None:
            plan = _by_value[spec, resolved] = Plan(spec, resolved)
        if seq_len is None:
            object.__setattr__(spec, "_plan", plan)
    return plan


def refuse_no_spec(spec: Any) -> None:
    """TypeError for anything that is not a Spec."""
    if not isinstance(spec, Spec):
        raise TypeError(f"spec: expected a qkrope.Spec, got {type(spec).__name__}")


def bare_of(spec: Spec) -> Spec:
    """The Spec without its scaling: what a call with cos/sin tables of its own runs."""
    if spec.rope is None or spec.rope.scaling is None:
        return spec
    if spec._bare is None:
        object.__setattr__(spec, "_bare", replace(spec, rope=replace(spec.rope, scaling=None)))
    return spec._bare


def once_of(spec: Spec) -> Spec:
    """The Spec without casts on the way: what a backward runs, to which they are the identity."""
    if spec.rounding == "once":
        return spec
    if spec._once is None:
        object.__setattr__(spec, "_once", replace(spec, rounding="once"))
    return spec._once
