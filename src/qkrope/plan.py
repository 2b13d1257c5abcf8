"""A Spec with its angles resolved, and its twin on the native side."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from . import _native, angles
from ._limits import integer
from .scaling import MAX_LENGTH
from .spec import Spec
from .variant import NORMS, PAIRINGS, unsupported

_lock = threading.Lock()
_by_value: dict[tuple[Spec, angles.Angles], Plan] = {}


class Plan:
    """A Spec with its angles resolved, and its native twin."""

    __slots__ = ("handle", "spec")

    def __init__(self, spec: Spec, resolved: angles.Angles) -> None:
        reason = unsupported(spec)
        if reason is not None:
            raise ValueError(
                f"spec: {reason} is not run by the cpu or cuda kernels of this release; "
                "qkrope.reference runs every Spec"
            )
        q, k = spec.q_norm, spec.k_norm_resolved
        words = angles.frac_words(resolved.inv_freq)
        pairing = PAIRINGS.index(spec.rope.pairing) if spec.rope else 0
        self.spec = spec
        self.handle = _native.lib().plan_new(
            spec.num_q_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.rotary_dim,
            pairing,
            NORMS.index(q.kind),
            NORMS.index(k.kind),
            float(q.eps),
            float(q.weight_offset),
            float(k.eps),
            float(k.weight_offset),
            float(resolved.attention_factor),
            words.buffer_info()[0],
        )


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
