"""The CUDA kernels on an emulator (tests/emulate), held to the oracle as they are on a GPU.

It shows what they compute, that lanes meet at every shuffle and barrier, that vectors are aligned.
It does not show what a GPU's memory model, its own sine or its clock bring in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch

import emulated
import qkrope
import test_groups_op
import test_models_kernels
from cases import Call, Recipe, assert_same_bits
from qkrope import _native, cpu
from qkrope.models import Entry
from qkrope.spec import Norm, Rope, Spec
from qkrope.variant import Variant
from test_models_kernels import ENTRIES
from test_options import LAYOUTS, OPTIONS, PAIRS, run_every_form

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = (BF16, FP32, FP16)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's tensors, the CUDA kernels."""
    monkeypatch.setattr(cpu, "qk_norm_rope", emulated.emulate)
    return "cpu"


def option_recipe(options: dict[str, Any], name: str, turn: int) -> Recipe | None:
    """An option in the layout, dtype and head_dim of its turn; heads of 58 fill no vector."""
    option = options[name]
    layout = LAYOUTS[turn % 3] if "k_lead" not in option.recipe else "odd"
    head_dim, dtype = (48, 128, 58, 64)[turn % 4], TYPES[turn // 3 % 3]
    return option.make(head_dim, dtype=dtype, lead=(2, 9), layout=layout, seed=turn)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(device: str, name: str) -> None:
    recipe = option_recipe(OPTIONS, name, list(OPTIONS).index(name))
    assert recipe is not None
    run_every_form(recipe, device)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(12))
def test_two_options(device: str, first: int) -> None:
    for turn, name in list(enumerate(PAIRS))[first::36]:
        recipe = option_recipe(PAIRS, name, turn)
        if recipe is not None:
            run_every_form(recipe, device)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.model)
def test_every_model(device: str, entry: Entry) -> None:
    test_models_kernels.test_what_is_covered_computes_the_entry(entry, device)
    test_models_kernels.test_the_casts_of_the_models_own_code(entry, device)


MLA = Rope(dim=64, offset=512, pairing="interleaved", output_pairing="half")
ROW = Norm(scope="row")
SHAPES = {
    "plain 128": Recipe(Spec(5, 2, 128, norm=Norm(weight_offset=1.0))),
    "plain 256 of 64": Recipe(Spec(3, 1, 256, rope=Rope(dim=64))),
    "plain 512": Recipe(Spec(2, 1, 512, rope=Rope(dim=128)), dtype=FP32),
    "plain 72": Recipe(Spec(3, 2, 72, rope=Rope(pairing="interleaved")), dtype=FP16),
    "Gemma 4": Recipe(Spec(3, 2, 512, rope=Rope(dim=128, pair_distance=256), v_norm=Norm())),
    "MLA": Recipe(Spec(3, 1, 576, norm=Norm(dim=512), rope=MLA)),
    "MLA, rest": Recipe(Spec(2, 1, 576, norm=Norm(dim=512, rest=Norm()), rope=MLA), dtype=FP16),
    "DeepSeek V4": Recipe(
        Spec(
            *(3, 1, 512),
            rope=Rope(dim=64, offset=448, pairing="interleaved"),
            rounding=("C/h", "B/h"),
        ),
        weights="k",
        angle="pair",
    ),
    "block_half": Recipe(Spec(3, 3, 64, rope=Rope(pairing="block_half")), angle="channel"),
    "layer of 1024": Recipe(Spec(2, 1, 1024, norm=Norm("layer")), dtype=FP32, bias=True),
    "eager, float32 weight": Recipe(
        Spec(3, 2, 64, norm=Norm("layer", weight_offset=1.0), rounding="A/f"),
        weight_dtype=FP32,
        bias=True,
        scale="token",
    ),
    "head of 2": Recipe(Spec(3, 2, 2, norm=Norm("layer"), order="rope_first")),
    "row": Recipe(Spec(24, 24, 128, norm=ROW), weight_shape="row"),
    "rows, long and short": Recipe(
        Spec(20, 3, 64, norm=ROW, order="rope_first"), lead=(2, 9), weight_shape="row"
    ),
    "row, a bias": Recipe(Spec(9, 5, 128, norm=ROW), lead=(5,), weight_shape="row", bias=True),
    "short rows by a table": Recipe(
        Spec(48, 3, 64, norm=ROW, rope=Rope(dim=32)), lead=(2, 19), weight_shape="row", angle="pair"
    ),
    "row of float32": Recipe(
        Spec(28, 6, 72, norm=Norm(scope="row", weight_offset=1.0)), dtype=FP32, lead=(3,)
    ),
    "row of 131 heads": Recipe(Spec(131, 2, 128, norm=ROW), lead=(2,), weight_shape="head"),
    "layer of 33 heads": Recipe(
        Spec(33, 17, 512, norm=Norm("layer", scope="row"), rope=None), lead=(2,), bias=True
    ),
    "row of 1024": Recipe(Spec(9, 2, 1024, norm=ROW, k_norm=Norm("l2")), lead=(2,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape(device: str, name: str) -> None:
    """What models have: wide heads, rows longer than a block holds at once, aligned maps."""
    run_every_form(SHAPES[name], device)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_phases_without_a_conversion(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As sm_75 and sm_80 take them, at every position of the recipe."""

    @cache
    def kernels(variant: Variant) -> Any:
        return emulated.compiled("#define __CUDA_ARCH__ 800\n" + emulated.source(variant))

    def emulate(plan: Any, *operands: Any) -> None:
        for launch in emulated.launches(plan, *operands):
            assert launch.run(kernels) is None

    monkeypatch.setattr(cpu, "qk_norm_rope", emulate)
    for spec in (Spec(5, 2, 128), Spec(3, 2, 64, rope=Rope(dim=32, pairing="interleaved"))):
        call = Recipe(spec, dtype=dtype, lead=(37,)).make()
        call.check(*qkrope.qk_norm_rope(*call.args()))


@pytest.mark.parametrize("name", ["gated", "mlp", "thirds", "indexer"])
def test_groups(device: str, name: str) -> None:
    test_groups_op.test_groups(device, name, BF16)


def outputs(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, run: Callable[..., None]
) -> tuple[Call, tuple[Any, ...]]:
    monkeypatch.setattr(cpu, "qk_norm_rope", run)
    call = recipe.make()
    return call, qkrope.qk_norm_rope(*call.args(), **call.extras)


SAME = {
    "plain": Recipe(Spec(5, 3, 64, rope=Rope(dim=32)), lead=(2, 9)),
    "plain 512": Recipe(Spec(2, 3, 512, rope=Rope(dim=128)), lead=(3,)),
    "layer": Recipe(Spec(5, 3, 64, norm=Norm("layer")), lead=(2, 9), bias=True),
    "rest": Recipe(Spec(5, 3, 64, norm=Norm("l2", dim=32, rest=Norm())), lead=(2, 9)),
    "row": Recipe(Spec(9, 2, 64, norm=Norm("layer", scope="row")), lead=(2, 9)),
}


@pytest.mark.parametrize("name", SAME)
def test_one_tree(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The number of heads a group serves, the size of blocks, the alignment of rows and the other
    tokens of the batch do not change a bit.
    """
    recipe = SAME[name]
    call, first = outputs(monkeypatch, recipe, partial(emulated.emulate, num_sms=1000))
    call.check(*first)
    seen = set()

    def run(*operands: Any, num_sms: int = 1) -> None:
        for launch in emulated.launches(*operands, num_sms=num_sms):
            seen.add(emulated.NAMES[launch.prepared.grid.function])
            assert launch.run() is None

    def same(recipe: Recipe, run: Callable[..., None]) -> None:
        again = outputs(monkeypatch, recipe, run)[1]
        for y, other in zip(first, again, strict=True):
            assert_same_bits(y, other)

    for sms in (1, 2, 4):
        same(recipe, partial(run, num_sms=sms))
    same(recipe.but(layout="odd"), run)
    for rows, warps in ((1, 3), (2, 1), (4, 8)) if name == "plain" else ():
        _native.lib().force_grid(rows, warps)
        try:
            same(recipe, run)
        finally:
            _native.lib().force_grid(0, 0)
    assert seen >= {"scalar", "vector1"} if name == "row" else {"scalar", "vector4"} & seen
    alone = recipe.make()
    at = tuple(n - 1 for n in recipe.lead)
    positions = alone.positions[at].view(1)
    q, k, *_ = (None if x is None else x[at][None].clone() for x in (alone.q, alone.k))
    monkeypatch.setattr(cpu, "qk_norm_rope", emulated.emulate)
    weights = alone.q_weight, alone.k_weight
    one = qkrope.qk_norm_rope(q, k, *weights, positions, recipe.spec, **alone.extras)
    for y, other in zip(first, one, strict=True):
        assert_same_bits(y[at][None], other)


@pytest.mark.parametrize("scale", [None, 1.5], ids=["plain", "general"])
@pytest.mark.parametrize("angle", ["spec", "cache", "inv_freq64"])
def test_what_is_not_a_position_turns_to_nan(device: str, angle: str, scale: float | None) -> None:
    """CUDA cannot look before it runs: the rotated channels of such a token, and no others."""
    spec = Spec(2, 1, 64, rope=Rope(dim=32))
    call = Recipe(spec, lead=(6,), angle=angle).make()
    extras = {**call.extras, **({} if scale is None else {"q_scale": scale, "k_scale": scale})}
    want = qkrope.qk_norm_rope(*call.args(), **extras)
    positions, bad = call.positions.clone(), torch.zeros(6, 64, dtype=torch.bool)
    if angle == "inv_freq64":
        extras["inv_freq"][3] = torch.inf
        bad[:, [3, 19]] = True
    else:
        wrong = [50, -1] if angle == "cache" else [2**31, -(2**31) - 1]
        positions[1], positions[4] = wrong
        bad[1, :32] = bad[4, :32] = True
    rest = call.q_weight, call.k_weight, positions, spec
    for y, before in zip(qkrope.qk_norm_rope(call.q, call.k, *rest, **extras), want, strict=True):
        is_bad = bad[:, None].expand(y.shape)
        assert y[is_bad].isnan().all()
        assert_same_bits(y[~is_bad], before[~is_bad])


# ---- the emulator ------------------------------------------------------------------------------


OneLaunch = Callable[[Recipe], emulated.Launch]


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneLaunch]:
    """The only launch of a recipe's call, not run yet; its tensors live as long as the test."""
    alive = []

    def make(recipe: Recipe) -> emulated.Launch:
        found: list[emulated.Launch] = []
        alive.append(outputs(monkeypatch, recipe, lambda *c: found.extend(emulated.launches(*c))))
        (launch,) = found
        return launch

    yield make


def test_it_sees_what_is_not_aligned(one_launch: OneLaunch) -> None:
    launch = one_launch(Recipe(SAME["plain"].spec, layout="odd"))
    assert emulated.NAMES[launch.prepared.grid.function] == "scalar" and launch.run() is None
    launch.prepared.grid.function = 0
    assert launch.run() == "a load or store that is not aligned to its type"


@pytest.mark.parametrize(
    ("name", "fault", "word"),
    [
        ("plain", "if (threadIdx.x == 3) return;", "the lanes of a warp"),
        ("row", "if (threadIdx.y == 1) return;", "a barrier"),
    ],
)
def test_it_sees_who_is_missing(one_launch: OneLaunch, name: str, fault: str, word: str) -> None:
    launch = one_launch(SAME[name])
    text = emulated.source(launch.variant)
    assert "  release_next();\n" in text
    broken = text.replace("  release_next();\n", f"  release_next();\n  {fault}\n")
    problem = launch.run(lambda variant: emulated.compiled(broken))
    assert problem is not None and word in problem
