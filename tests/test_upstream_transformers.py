"""The oracle and Spec.from_config against the attention modules of transformers.

For every family a small model with random weights runs; what its projections gave and what its
attention function got are read by hooks. float32: `qkrope.reference` with the Spec of the config
and plain positions gives the same to 1e-5 of the terms. bfloat16: with rounding="upstream" and the
model's own cos and sin it gives the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qkrope.spec import Spec
from upstream_encoders import ADAPTERS
from upstream_families import FAMILIES as PLAIN
from upstream_latent import FAMILIES as LATENT
from upstream_transformers import Family, calls_of, run


@pytest.mark.parametrize("family", [*PLAIN, *LATENT], ids=lambda f: f.id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_family(family: Family, dtype: torch.dtype) -> None:
    bits = dtype == torch.bfloat16
    config, layers, positions = run(family, dtype)
    for index, seen in zip(family.layers, layers, strict=True):
        make = family.calls or calls_of
        for call in make(family, seen, config, index, "upstream" if bits else "once"):
            if call.positions is None:
                call.positions = positions
            call.check(bits=bits, exact=family.exact)


def planted(spec: Spec, bug: str) -> Spec:
    """A Spec with one thing wrong."""
    if bug == "eps":
        k_norm = spec.k_norm and replace(spec.k_norm, eps=10 * spec.k_norm.eps)
        return replace(spec, norm=replace(spec.norm, eps=10 * spec.norm.eps), k_norm=k_norm)
    if bug == "offset":
        return replace(spec, norm=replace(spec.norm, weight_offset=0.5 + spec.norm.weight_offset))
    if bug == "order":
        other = {"norm_first": "rope_first", "rope_first": "norm_first"}
        return replace(spec, order=other[spec.order])
    assert spec.rope is not None
    if bug == "theta":
        return replace(spec, rope=replace(spec.rope, theta=1.1 * spec.rope.theta))
    if bug == "reverse":
        return replace(spec, rope=replace(spec.rope, reverse=not spec.rope.reverse))
    letters = {"A": "B", "B": "A"}[spec.roundings[1][0]], {"b": "h", "f": "b"}[spec.roundings[1][1]]
    norm, rotation = spec.roundings[1]
    words = {"norm cast": (letters[0], rotation), "rotation cast": (norm, letters[1])}
    return replace(spec, rounding="/".join(words[bug]))


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "olmo2", "hunyuan_v1_dense", "lfm3"])
@pytest.mark.parametrize(
    "bug", ["eps", "offset", "order", "theta", "reverse", "norm cast", "rotation cast"]
)
def test_a_planted_bug_is_seen(name: str, bug: str) -> None:
    """What these comparisons are worth."""
    family = next(f for f in PLAIN if f.model_type == name)
    bits = "cast" in bug
    config, layers, positions = run(family, torch.bfloat16 if bits else torch.float32)
    rounding = "upstream" if bits else "once"
    (call,) = calls_of(family, layers[0], config, family.layers[0], rounding)
    call.positions = positions
    call.check(bits=bits)
    with pytest.raises(AssertionError):
        replace(call, spec=planted(call.spec, bug)).check(bits=bits)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_module(name: str, dtype: torch.dtype) -> None:
    """Encoders, by the catalogue's Specs."""
    torch.manual_seed(3)
    for call in ADAPTERS[name](dtype):
        call.check(bits=dtype == torch.bfloat16)
