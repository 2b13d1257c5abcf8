"""The oracle and Spec.from_config against the attention modules of transformers.

For every family a small model with random weights runs; what its projections gave and what its
attention function got are read by hooks. float32: `qkrope.reference` with the Spec of the config
and plain positions gives the same to 1e-5 of the terms. bfloat16: with rounding="upstream" and the
model's own cos and sin it gives the same bits.
"""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_module(name: str, dtype: torch.dtype) -> None:
    """Encoders, by the catalogue's Specs."""
    torch.manual_seed(3)
    for call in ADAPTERS[name](dtype):
        call.check(bits=dtype == torch.bfloat16)
