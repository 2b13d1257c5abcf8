"""The catalogue and the oracle against the attention modules of diffusers.

For every diffusion transformer a block's real attention module runs, with random weights and few
heads of the real size; what its norms were given and what attention got are read by hooks. float32:
`qkrope.reference` with the catalogue's Spec and plain positions gives the same to 1e-5 of the terms
(with the module's own table where positions are no integers). bfloat16: with the entry's rounding
and the module's own table it gives the same bits.
"""

from __future__ import annotations

import pytest
import torch

from upstream_dits import ADAPTERS as DITS
from upstream_joint import ADAPTERS as JOINT
from upstream_videos import ADAPTERS as VIDEOS

ADAPTERS = {**JOINT, **VIDEOS, **DITS}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_module(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for call in ADAPTERS[name](dtype):
        call.check(bits=dtype == torch.bfloat16)
