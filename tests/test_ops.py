"""Combinations of arguments that are none of the kernel's business: plans, tables, lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qkrope
from cases import assert_criterion
from qkrope import DynamicNTK, LongRoPE, Rope, Spec, reference

SPEC = Spec(2, 1, 16, rope=Rope(dim=8))
POSITIONS = torch.tensor([0, 7, 4095])


def tensors() -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(3)
    shapes = ((3, 2, 16), (3, 1, 16), (16,), (16,))
    return tuple(torch.randn(shape, generator=rng) for shape in shapes)


@pytest.mark.parametrize(
    "scaling",
    [
        DynamicNTK(factor=2.0),
        LongRoPE([1.0] * 4, [2.0] * 4, original_max_position_embeddings=64),
    ],
    ids=["DynamicNTK", "LongRoPE"],
)
def test_a_table_needs_no_length(scaling: DynamicNTK | LongRoPE) -> None:
    """The caller's table is the scaling: what the Spec's would need is not asked for."""
    scaled = replace(SPEC, rope=replace(SPEC.rope, scaling=scaling))  # type: ignore[type-var]
    angle = torch.rand(3, 4)
    for more in ({"cos_sin": (angle.cos(), angle.sin())}, {"cos_sin_cache": torch.rand(4096, 8)}):
        want = qkrope.qk_norm_rope(*tensors(), POSITIONS, SPEC, **more)
        for _ in range(2):
            got = qkrope.qk_norm_rope(*tensors(), POSITIONS, scaled, **more)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_each_length_has_its_own_angles() -> None:
    """LongRoPE turns to its long factors past the original length, DynamicNTK with every length."""
    for scaling in (
        LongRoPE([1.0] * 4, [9.0] * 4, original_max_position_embeddings=64, factor=4.0),
        DynamicNTK(factor=2.0, original_max_position_embeddings=64),
    ):
        spec = replace(SPEC, rope=replace(SPEC.rope, scaling=scaling))  # type: ignore[type-var]
        for seq_len in (32, 128, 256, 32):
            args = (*tensors(), POSITIONS, spec)
            got = qkrope.qk_norm_rope(*args, seq_len=seq_len)
            want = reference.qk_norm_rope(*args, seq_len=seq_len)
            terms = reference.criterion_terms(*args, seq_len=seq_len)
            for y, ref, term in zip(got, want, terms, strict=True):
                assert_criterion(y, ref, term, torch.float32)


@pytest.mark.parametrize("scale", [1.0, 2.0**23 + 1, 1e7, 3.3e7, 1e9, 1e12, -5e10])
def test_any_finite_frequency(scale: float) -> None:
    """Whole turns fall away, however many: the angle of a caller's frequency stays exact."""
    inv_freq = torch.tensor([1.0, 0.3, 0.77, 1e-3], dtype=torch.float64) * scale
    args = (*tensors(), POSITIONS, SPEC)
    got = qkrope.qk_norm_rope(*args, inv_freq=inv_freq)
    want = reference.qk_norm_rope(*args, inv_freq=inv_freq)
    terms = reference.criterion_terms(*args, inv_freq=inv_freq)
    for y, ref, term in zip(got, want, terms, strict=True):
        assert_criterion(y, ref, term, torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_frequency_must_be_finite(value: float) -> None:
    inv_freq = torch.tensor([1.0, value, 0.5, 0.1])
    with pytest.raises(ValueError, match="inv_freq: expected finite values"):
        qkrope.qk_norm_rope(*tensors(), POSITIONS, SPEC, inv_freq=inv_freq)


def test_positions_of_an_absent_side_may_be_none() -> None:
    q, k, q_weight, k_weight = tensors()
    want = qkrope.qk_norm_rope(q, k, q_weight, k_weight, POSITIONS, SPEC)
    only_q, _ = qkrope.qk_norm_rope(q, None, q_weight, None, (POSITIONS, None), SPEC)
    _, only_k = qkrope.qk_norm_rope(None, k, None, k_weight, (None, POSITIONS), SPEC)
    assert torch.equal(only_q, want[0]) and torch.equal(only_k, want[1])
    with pytest.raises(TypeError, match="positions"):
        qkrope.qk_norm_rope(q, k, q_weight, k_weight, (POSITIONS, None), SPEC)
