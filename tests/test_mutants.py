"""Planted bugs: the recipe and the criterion catch each one, and pass what is right.

A mutant is the oracle with one mistake, its result rounded once like a kernel's. The first twelve
are the classic mistakes of this operation; the others are those of kernels that shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import Call, Recipe, round_once
from mutants import DTYPES, Outputs, judge, oracle, with_spec
from qkrope import angles, reference, reference_angles, reference_steps
from qkrope.spec import Norm, Rope, Spec, YaRN

SPEC = Spec(
    5,
    2,
    32,
    norm=Norm(weight_offset=1.0),
    rope=Rope(dim=12, theta=1e6, scaling=YaRN.from_ramp(4.0, 1.0, 4.0, 1.2)),
)

Patch = pytest.MonkeyPatch


# ---- the twelve -------------------------------------------------------------------------------


def weights_swapped(call: Call, patch: Patch) -> Outputs:
    return oracle(call, q_weight=call.k_weight, k_weight=call.q_weight)


def weights_dropped(call: Call, patch: Patch) -> Outputs:
    return oracle(call, q_weight=None, k_weight=None)


def sine_negated(call: Call, patch: Patch) -> Outputs:
    right = reference_steps.quarter_turn
    patch.setattr(reference_steps, "quarter_turn", lambda pairs: -right(pairs))
    return oracle(call)


def other_pairing(call: Call, patch: Patch) -> Outputs:
    other = "half" if call.spec.rope.pairing == "interleaved" else "interleaved"
    return with_spec(call, pairing=other)


def position_plus_one(call: Call, patch: Patch) -> Outputs:
    wrapped = torch.where(call.positions == 2**31 - 1, -(2**31), call.positions + 1)
    return oracle(call, positions=wrapped)


def last_token_skipped(call: Call, patch: Patch) -> Outputs:
    q2, k2 = oracle(call)
    q2[-1], k2[-1] = call.inputs[0][-1], call.inputs[1][-1]
    return q2, k2


def one_k_head_unrotated(call: Call, patch: Patch) -> Outputs:
    q2, k2 = oracle(call)
    _, normed = oracle(call, spec=replace(call.spec, rope=None))
    k2[:, -1] = normed[:, -1]
    return q2, k2


def tail_not_normalised(call: Call, patch: Patch) -> Outputs:
    q2, k2 = oracle(call)
    for y, x in zip((q2, k2), call.inputs, strict=True):
        y[..., call.spec.rotary_dim :] = x[..., call.spec.rotary_dim :]
    return q2, k2


def mean_over_rotary_dim(call: Call, patch: Patch) -> Outputs:
    right = reference_steps.statistics
    rot = call.spec.rotary_dim
    patch.setattr(reference_steps, "statistics", lambda x, norm: right(x[..., :rot], norm))
    return oracle(call)


def eps_times_ten(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, norm={"eps": 10 * call.spec.norm.eps})


def eps_outside_the_root(call: Call, patch: Patch) -> Outputs:
    def wrong(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        return x.new_zeros(()), 1 / (x.square().mean(-1, keepdim=True).sqrt() + norm.eps)

    patch.setattr(reference_steps, "statistics", wrong)
    return oracle(call)


def squares_summed_in_bfloat16(call: Call, patch: Patch) -> Outputs:
    def wrong(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x[..., :1]).bfloat16()
        for i in range(x.shape[-1]):
            total = total + x[..., i : i + 1].square().bfloat16()
        return x.new_zeros(()), (total.double() / x.shape[-1] + norm.eps).rsqrt()

    patch.setattr(reference_steps, "statistics", wrong)
    return oracle(call)


TWELVE = (
    weights_swapped,
    weights_dropped,
    sine_negated,
    other_pairing,
    position_plus_one,
    last_token_skipped,
    one_k_head_unrotated,
    tail_not_normalised,
    mean_over_rotary_dim,
    eps_times_ten,
    eps_outside_the_root,
    squares_summed_in_bfloat16,
)


# ---- bugs that shipped ------------------------------------------------------------------------


def weight_offset_dropped(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, norm={"weight_offset": 0.0})


def attention_factor_dropped(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, scaling=YaRN.from_ramp(4.0, 1.0, 4.0, 1.0))


def ramp_shifted_by_a_pair(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, scaling=YaRN.from_ramp(4.0, 2.0, 5.0, 1.2))


def attention_factor_on_the_tail(call: Call, patch: Patch) -> Outputs:
    q2, k2 = oracle(call)
    for y in (q2, k2):
        y[..., call.spec.rotary_dim :] *= 1.2
    return q2, k2


def angle_in_float32(call: Call, patch: Patch) -> Outputs:
    def wrong(positions: Tensor, inv_freq: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        angle = positions.float()[..., None] * torch.tensor(inv_freq, dtype=torch.float32)
        return angle.double().cos(), angle.double().sin()

    patch.setattr(reference_angles, "cos_sin_of_positions", wrong)
    return oracle(call)


def frequency_in_32_bits(call: Call, patch: Patch) -> Outputs:
    words = [
        round(w * 2.0**-32) << 32
        for w in reference_angles.fractions(angles.resolve(call.spec).inv_freq)
    ]
    patch.setattr(reference_angles, "fractions", lambda inv_freq: tuple(words))
    return oracle(call)


def position_sign_lost(call: Call, patch: Patch) -> Outputs:
    """The sign lost on the way."""
    right = reference_angles.cos_sin_of_positions
    patch.setattr(reference_angles, "cos_sin_of_positions", lambda p, f: right(p.long().abs(), f))
    return oracle(call)


def rounded_between_norm_and_rotation(call: Call, patch: Patch) -> Outputs:
    right, dtype = reference.normalise, call.inputs[0].dtype
    patch.setattr(
        reference, "normalise", lambda x, side: round_once(right(x, side), dtype).double()
    )
    return oracle(call)


def eager_chain(call: Call, patch: Patch) -> Outputs:
    q2, k2 = oracle(call, spec=replace(call.spec, rounding="eager"))
    return q2.double(), k2.double()


SHIPPED = (
    weight_offset_dropped,
    attention_factor_dropped,
    attention_factor_on_the_tail,
    ramp_shifted_by_a_pair,
    angle_in_float32,
    frequency_in_32_bits,
    position_sign_lost,
    rounded_between_norm_and_rotation,
    eager_chain,
)


@pytest.fixture(params=["half", "interleaved"])
def spec(request: pytest.FixtureRequest) -> Iterator[Spec]:
    yield replace(SPEC, rope=replace(SPEC.rope, pairing=request.param))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutant", [*TWELVE, *SHIPPED], ids=lambda m: m.__name__)
def test_every_mutant_is_caught(
    mutant: Callable[[Call, Patch], Outputs],
    dtype: torch.dtype,
    spec: Spec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = Recipe(spec, dtype=dtype, lead=(23,)).make()
    with monkeypatch.context() as patch:
        outputs = mutant(call, patch)
    seen = judge(call, outputs, dtype)
    if mutant in (rounded_between_norm_and_rotation, eager_chain) and dtype == torch.float32:
        # In float32 these round as a float32 kernel may; the bound must not refuse that.
        assert seen == [0.0, 0.0]
    else:
        assert max(seen) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "packed"])
def test_what_is_right_passes(dtype: torch.dtype, layout: str, spec: Spec) -> None:
    call = Recipe(spec, dtype=dtype, lead=(23,), layout=layout).make()
    assert judge(call, oracle(call), dtype) == [0.0, 0.0]
    call.check(*(round_once(y, dtype) for y in oracle(call)))


def test_a_recipe_without_its_rules_misses_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit weights, full rotation and rows of order one: what the recipe is there to prevent."""
    plain = Spec(5, 2, 32, rope=Rope(theta=1e6))
    call = Recipe(plain, lead=(23,)).make()
    ones = torch.ones(32, dtype=torch.bfloat16)
    poor = replace(call, q=torch.randn(23, 5, 32).bfloat16(), k=torch.randn(23, 2, 32).bfloat16())
    poor.q_weight = poor.k_weight = ones
    missed = []
    for mutant in (weights_swapped, weights_dropped, mean_over_rotary_dim, tail_not_normalised):
        with monkeypatch.context() as patch:
            if judge(poor, mutant(poor, patch), torch.bfloat16) == [0.0, 0.0]:
                missed.append(mutant)
    assert missed == [weights_swapped, weights_dropped, mean_over_rotary_dim, tail_not_normalised]
