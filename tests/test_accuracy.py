"""Units in the last place, rounding once, and what the acceptance criterion refuses."""

from __future__ import annotations

import pytest
import torch

from cases import assert_criterion, bits, fraction_correctly_rounded
from qkrope.accuracy import error_over_bound, round_once, ulp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ulp_and_rounding_of_every_16_bit_value(dtype: torch.dtype) -> None:
    every = torch.arange(2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()]
    low, high = every[:-1].double(), every[1:].double()
    assert torch.equal(ulp(low, dtype), high - low)
    middle = (low + high) / 2
    even = torch.where(bits(every[:-1]) % 2 == 0, low, high)
    tiny = middle * 2.0**-50
    for sign in (1, -1):
        assert torch.equal(round_once(sign * low, dtype).double(), sign * low)
        assert torch.equal(round_once(sign * middle, dtype).double(), sign * even)
        assert torch.equal(round_once(sign * (middle + tiny), dtype).double(), sign * high)
        assert torch.equal(round_once(sign * (middle - tiny), dtype).double(), sign * low)


def test_ulp_of_float32() -> None:
    x = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 0.1, 1.0, 1.9, 2.0, 3e38])
    following = (x.view(torch.int32) + 1).view(torch.float32)
    assert torch.equal(ulp(x, torch.float32), following.double() - x.double())


def test_round_once_keeps_nan_and_overflows_to_infinity() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300, -1e300], dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = round_once(x, dtype)
        assert y[0].isnan() and y[1:].tolist() == [torch.inf, -torch.inf, torch.inf, -torch.inf]


def test_criterion_refuses_what_it_must() -> None:
    ref = torch.tensor([1.0, 1.0, torch.nan, torch.inf, 1e-3], dtype=torch.float64)
    terms = torch.ones_like(ref)
    good = round_once(ref, torch.bfloat16)
    assert float(error_over_bound(good, ref, terms, torch.bfloat16).max()) <= 1
    for i, wrong in enumerate((1.008, torch.nan, 0.0, -torch.inf, 1.02e-3)):
        bad = good.clone()
        bad[i] = wrong
        with pytest.raises(AssertionError, match=rf"y\[{i}\]"):
            assert_criterion(bad, ref, terms, torch.bfloat16)
    with pytest.raises(ValueError, match="expected one shape"):
        error_over_bound(good.float(), ref, terms, torch.bfloat16)


def test_fraction_correctly_rounded_counts() -> None:
    ref = torch.tensor([1.0, 1.002, torch.nan, 3.0], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0078125, torch.nan, 3.0]).bfloat16()
    assert fraction_correctly_rounded(y, ref) == 0.75
