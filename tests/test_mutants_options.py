"""Planted bugs in every option of a Spec and of a call: the recipe and the criterion catch each.

A mutant is the oracle with one mistake, as in test_mutants.py. Beside it stands the recipe of a
call that uses the option; on that same call the oracle without the mistake passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from cases import Call, Recipe, assert_chain, round_once
from mutants import DTYPES, Outputs, judge, oracle, with_spec
from qkrope import reference, reference_steps
from qkrope.spec import Linear, Norm, Rope, Spec

Patch = pytest.MonkeyPatch
Mutant = Callable[[Call, Patch], Outputs]

MUTANTS: dict[str, tuple[Recipe, Mutant]] = {}


def spec(rope: Rope | None = Rope(dim=12, theta=1e6), **changes: object) -> Spec:
    return Spec(**{"num_q_heads": 5, "num_kv_heads": 2, "head_dim": 32, "rope": rope, **changes})


def planted(given: Spec, **recipe: object) -> Callable[[Mutant], Mutant]:
    """Enter a mutant, which is caught on a call of this Spec and Recipe."""

    def enter(mutant: Mutant) -> Mutant:
        MUTANTS[mutant.__name__] = (Recipe(given, **{"lead": (23,), **recipe}), mutant)
        return mutant

    return enter


def both(call: Call, change: Callable[[Tensor], Tensor], what: str) -> dict[str, Tensor]:
    """The q and k forms of one argument, changed."""
    given = {"q_weight": call.q_weight, "k_weight": call.k_weight, **call.extras}
    return {f"{side}_{what}": change(given[f"{side}_{what}"]) for side in "qk"}


def tables(call: Call, change: Callable[[Tensor], Tensor]) -> dict[str, object]:
    changed = tuple(tuple(change(t) for t in pair) for pair in call.extras["cos_sin"])
    return {"cos_sin": changed}


# ---- which channels ---------------------------------------------------------------------------


@planted(spec(Rope(12, 1e6, offset=20)))
def offset_dropped(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, offset=0)


@planted(spec(Rope(12, 1e6, "interleaved", offset=20)))
def offset_short_by_a_pair(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, offset=18)


@planted(spec(Rope(12, 1e6, pair_distance=16)))
def distance_taken_for_half_of_dim(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, pair_distance=None)


@planted(spec(Rope(12, 1e6, freq_dim=32)))
def exponent_over_the_rotary_dim(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, freq_dim=None)


@planted(spec(Rope(12, 1e6, "block_half")))
def blocks_ignored(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, pairing="half")


@planted(spec(Rope(12, 1e6, "interleaved", output_pairing="half")))
def output_left_interleaved(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, output_pairing=None)


@planted(spec(Rope(12, 1e6, "interleaved", output_pairing="half")), angle="channel")
def table_read_in_the_order_of_the_input(call: Call, patch: Patch) -> Outputs:
    def reorder(t: Tensor) -> Tensor:
        return torch.stack(t.chunk(2, -1), -1).flatten(-2)

    return oracle(call, cos_sin=tuple(reorder(t) for t in call.extras["cos_sin"]))


# ---- which angle ------------------------------------------------------------------------------


@planted(spec(Rope(12, 1e6, reverse=True)))
def turned_forwards(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, reverse=False)


@planted(spec(Rope(12, 1e6, reverse=True)), angle="cache")
def cache_turned_forwards(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, reverse=False)


@planted(spec(Rope(12, 1e6, mrope_section=(2, 2, 2), mrope_interleaved=True)))
def sections_in_chunks(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, mrope_interleaved=False)


@planted(spec(Rope(12, 1e6, mrope_section=(2, 2, 2))))
def sections_interleaved(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, mrope_interleaved=True)


@planted(spec(Rope(12, 1e6, mrope_section=(1, 3, 2))))
def section_ends_shifted(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, mrope_section=(2, 2, 2))


@planted(spec(Rope(12, 1e6, "interleaved", mrope_section=(2, 4))), angle="cache")
def cache_row_of_the_first_axis(call: Call, patch: Patch) -> Outputs:
    return oracle(call, positions=call.positions[:1].expand_as(call.positions))


@planted(spec(Rope(12, 1e6, "interleaved", axes_dim=(4, 2, 6))))
def axes_in_reverse(call: Call, patch: Patch) -> Outputs:
    return oracle(call, positions=call.positions.flip(0))


@planted(spec(Rope(12, 1e6, "interleaved", axes_dim=(4, 2, 6))))
def one_set_of_frequencies_for_all_axes(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, axes_dim=None, mrope_section=(2, 1, 3))


@planted(spec(Rope(12, 1e6, scaling=Linear(4.0))), k_lead=(9,))
def k_at_the_positions_of_q(call: Call, patch: Patch) -> Outputs:
    q_positions, _ = call.positions
    return oracle(call, positions=(q_positions, q_positions[:9].roll(1)))


@planted(spec(), angle="pair", tables="separate")
def k_turned_by_the_table_of_q(call: Call, patch: Patch) -> Outputs:
    return oracle(call, cos_sin=call.extras["cos_sin"][0])


@planted(spec(), angle="pair", tables="head")
def table_of_the_next_head(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **tables(call, lambda t: t.roll(1, -2)))


@planted(spec(), angle="channel", tables="head", lead=(2, 11))
def table_of_the_first_head(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **tables(call, lambda t: t[..., :1, :].expand_as(t)))


@planted(spec(), angle="channel")
def one_angle_for_both_channels_of_a_pair(call: Call, patch: Patch) -> Outputs:
    cos, sin = (t[..., :6] for t in call.extras["cos_sin"])
    return oracle(call, cos_sin=(cos, sin))


# ---- which tokens -----------------------------------------------------------------------------


@planted(spec(), rotate=(5, 20))
def rotation_begins_a_token_late(call: Call, patch: Patch) -> Outputs:
    return oracle(call, rotate_from=6)


@planted(spec(), rotate=(0, 20))
def suffix_rotated(call: Call, patch: Patch) -> Outputs:
    return oracle(call, rotate_to=None)


@planted(spec(), rotate=(5, None), lead=(2, 11))
def prefix_of_the_first_sequence_alone(call: Call, patch: Patch) -> Outputs:
    outputs, rotated = oracle(call), oracle(call, rotate_from=0)
    return tuple(torch.cat((y[:1], z[1:])) for y, z in zip(outputs, rotated, strict=True))


@planted(spec(), rotate=(5, None))
def prefix_not_normalised(call: Call, patch: Patch) -> Outputs:
    outputs = oracle(call)
    for y, x in zip(outputs, call.inputs, strict=True):
        y[:5] = x[:5]
    return outputs


@planted(spec(), rotate=(5, None), angle="pair", tables="separate")
def table_read_from_the_first_token(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **tables(call, lambda t: t.roll(1, 0)))


@planted(spec(Rope(12, 1e6, "interleaved", output_pairing="half")), rotate=(5, None))
def prefix_keeps_the_order_of_its_channels(call: Call, patch: Patch) -> Outputs:
    outputs, normed = oracle(call), oracle(call, spec=replace(call.spec, rope=None), rotate_from=0)
    for y, n in zip(outputs, normed, strict=True):
        y[:5] = n[:5]
    return outputs


# ---- the norm ---------------------------------------------------------------------------------

PARTIAL = Norm(dim=20)
WITH_REST = Norm(weight_offset=1.0, dim=20, rest=Norm(eps=1e-3))


@planted(spec(Rope(12, 1e6, offset=20), norm=PARTIAL))
def mean_over_all_channels(call: Call, patch: Patch) -> Outputs:
    ones = torch.ones(12, dtype=call.q_weight.dtype)
    whole = replace(call.spec, norm=Norm())
    wrong = oracle(call, spec=whole, **both(call, lambda w: torch.cat((w, ones)), "weight"))
    return tuple(
        torch.cat((bad[..., :20], good[..., 20:]), -1)
        for bad, good in zip(wrong, oracle(call), strict=True)
    )


@planted(spec(norm=WITH_REST))
def rest_left_as_it_is(call: Call, patch: Patch) -> Outputs:
    norm = replace(WITH_REST, rest=None)
    first = both(call, lambda w: w[..., :20], "weight")
    return oracle(call, spec=replace(call.spec, norm=norm), **first)


@planted(spec(norm=WITH_REST))
def rest_with_the_first_norms_offset(call: Call, patch: Patch) -> Outputs:
    norm = replace(WITH_REST, rest=replace(WITH_REST.rest, weight_offset=1.0))
    return oracle(call, spec=replace(call.spec, norm=norm))


@planted(spec(), weight_shape="head")
def weight_of_the_next_head(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **both(call, lambda w: w.roll(1, 0), "weight"))


@planted(spec(norm=Norm(scope="row")), weight_shape="row")
def row_weight_of_the_first_head(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **both(call, lambda w: w[:32], "weight"))


@planted(spec(norm=Norm(scope="row")), weight_shape="head")
def row_normalised_by_head(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, norm={"scope": "head"})


@planted(spec(norm=Norm(), k_norm=Norm("layer", eps=1e-5)))
def k_normalised_as_q(call: Call, patch: Patch) -> Outputs:
    return oracle(call, spec=replace(call.spec, k_norm=None))


@planted(spec(norm=Norm("layer")), bias=True)
def mean_not_subtracted(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, norm={"kind": "rms"})


@planted(spec(norm=Norm("layer")), bias=True)
def bias_before_the_weight(call: Call, patch: Patch) -> Outputs:
    sides = zip(("q", "k"), (call.q_weight, call.k_weight), strict=True)
    inside = {f"{s}_bias": call.extras[f"{s}_bias"].double() * w.double() for s, w in sides}
    return oracle(call, **inside)


@planted(spec(norm=Norm("layer")), bias=True, weight_shape="head")
def bias_of_the_next_head(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **both(call, lambda b: b.roll(1, 0), "bias"))


@planted(spec(norm=Norm("l2", eps=1e-2)))
def l2_divided_by_the_mean(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, norm={"kind": "rms"})


@planted(spec(norm=Norm("l2", eps=1e-2)))
def l2_without_its_floor(call: Call, patch: Patch) -> Outputs:
    return with_spec(call, norm={"eps": 0.0})


@planted(spec(order="rope_first"))
def normalised_before_the_rotation(call: Call, patch: Patch) -> Outputs:
    return oracle(call, spec=replace(call.spec, order="norm_first"))


# ---- scales and v -----------------------------------------------------------------------------


@planted(spec(), scale="channel")
def scaled_after_the_rotation(call: Call, patch: Patch) -> Outputs:
    outputs = oracle(call, q_scale=None, k_scale=None)
    scales = call.extras["q_scale"], call.extras["k_scale"]
    return tuple(y * scale for y, scale in zip(outputs, scales, strict=True))


@planted(spec(order="rope_first"), scale="channel")
def scaled_before_the_norm(call: Call, patch: Patch) -> Outputs:
    right = reference_steps.normalise
    patch.setattr(
        reference, "normalise", lambda x, s: right(x * s.scale.double(), replace(s, scale=None))
    )
    return oracle(call)


@planted(spec(norm=Norm("none")), scale="number")
def scale_dropped_without_a_norm(call: Call, patch: Patch) -> Outputs:
    return oracle(call, q_scale=None, k_scale=None)


@planted(spec(), scale="token")
def scale_of_the_next_token(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **both(call, lambda s: s.roll(1, 0), "scale"))


@planted(spec(), scale="head")
def scale_of_the_next_head(call: Call, patch: Patch) -> Outputs:
    return oracle(call, **both(call, lambda s: s.roll(1, 0), "scale"))


@planted(spec(), scale="number")
def k_scaled_as_q(call: Call, patch: Patch) -> Outputs:
    return oracle(call, k_scale=call.extras["q_scale"])


@planted(spec(v_norm=Norm("none")))
def v_normalised(call: Call, patch: Patch) -> Outputs:
    return oracle(call, spec=replace(call.spec, v_norm=Norm()))


@planted(spec(v_norm=Norm()))
def v_left_as_it_is(call: Call, patch: Patch) -> Outputs:
    return oracle(call, spec=replace(call.spec, v_norm=Norm("none")), v_weight=None)


@planted(spec(v_norm=Norm()), layout="packed")
def v_with_the_weight_of_k(call: Call, patch: Patch) -> Outputs:
    return oracle(call, v_weight=call.k_weight)


@planted(spec(v_norm=Norm(eps=1e-3)))
def v_rotated(call: Call, patch: Patch) -> Outputs:
    as_k = replace(call.spec, k_norm=call.spec.v_norm, v_norm=None)
    _, turned = reference.qk_norm_rope(
        None, call.v_input, None, call.extras["v_weight"], call.positions, as_k
    )
    assert turned is not None
    return (*oracle(call)[:2], turned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_of_an_option_is_caught(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, mutant = MUTANTS[name]
    call = recipe.but(dtype=dtype).make()
    right = oracle(call)
    assert max(judge(call, right, dtype)) == 0.0
    call.check(*(round_once(y, dtype) for y in right))
    with monkeypatch.context() as patch:
        wrong = mutant(call, patch)
    assert max(judge(call, wrong, dtype)) > 0


# ---- chains of casts --------------------------------------------------------------------------

CHAINS = [f"{norm}/{rotation}" for norm in "ABC" for rotation in "bhf"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
def test_a_chain_is_told_from_every_other(kind: str, dtype: torch.dtype) -> None:
    given = spec(norm=Norm(kind))
    call = Recipe(given, dtype=dtype, lead=(64,), angle="pair", bias=kind == "layer").make()
    found = {}
    for name in ["once", *CHAINS]:
        call.spec = replace(given, rounding=name)
        outputs = oracle(call, round_to=dtype)
        call.check(*outputs)  # a chain is itself
        found[name] = outputs
    _, terms = call.expected()
    for one, two in combinations(found, 2):
        for y, ref, term in zip(found[one], found[two], terms, strict=True):
            with pytest.raises(AssertionError, match="differ from the chain"):
                assert_chain(y, ref, term, table=True)


@pytest.mark.parametrize("side", [0, 1])
def test_q_and_k_round_each_as_it_is_told(side: int) -> None:
    call = Recipe(spec(rounding=("C/h", "B/h")), lead=(64,), angle="pair").make()
    outputs = oracle(call)
    call.check(*outputs)
    for word in ("C/h", "B/h"):
        alone = oracle(call, spec=replace(call.spec, rounding=word))[side]
        assert torch.equal(outputs[side], alone) == (word == call.spec.rounding[side])
