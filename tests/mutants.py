"""What the tests of mutants share: the oracle with a mistake, and the judge of its outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cases import Call, round_once
from checks import error_over_bound
from qkrope import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Outputs = tuple[Tensor, ...]


def oracle(call: Call, **changes: object) -> Outputs:
    """The reference on a call's inputs, with some of its arguments replaced."""
    args, extras = call.oracle_args()
    names = ("q", "k", "q_weight", "k_weight", "positions", "spec")
    given = {**dict(zip(names, args, strict=True)), **extras, **changes}
    outputs = reference.qk_norm_rope(**given)
    assert all(y is not None for y in outputs)
    return outputs


def with_spec(call: Call, norm: dict[str, object] | None = None, **rope: object) -> Outputs:
    spec = replace(call.spec, norm=replace(call.spec.norm, **(norm or {})))
    if rope and spec.rope is not None:
        spec = replace(spec, rope=replace(spec.rope, **rope))
    return oracle(call, spec=spec)


def judge(call: Call, outputs: Outputs, dtype: torch.dtype) -> list[float]:
    """Share of the elements of each output, rounded once, that break the criterion."""
    refs, terms = call.expected()
    shares = []
    for y, ref, term in zip(outputs, refs, terms, strict=True):
        ratio = error_over_bound(round_once(y, dtype), ref, term, dtype)
        shares.append(float((ratio > 1).double().mean()))
    return shares
