"""A small Spec and its tensors, for the tests of the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from qkrope.spec import Rope, Spec

B, S, NQ, NK, D = 2, 9, 3, 2, 16
FP64, BF16 = torch.float64, torch.bfloat16

# Two float64 formulas of a dozen operations each, values of order one to ten.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def spec(rope: Rope | None = None, **changes: object) -> Spec:
    return Spec(**{"num_q_heads": NQ, "num_kv_heads": NK, "head_dim": D, "rope": rope, **changes})


def draw(*shape: int, dtype: torch.dtype = FP64, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=FP64).to(dtype)


def heads(dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor]:
    return draw(B, S, NQ, D, dtype=dtype), draw(B, S, NK, D, dtype=dtype, seed=1)


def counts(*axes: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 300, (*axes, B, S), generator=torch.Generator().manual_seed(seed))


def ladder(theta: float, dim: int) -> Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=FP64) / dim)
