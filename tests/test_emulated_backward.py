"""The CUDA kernels of the gradients on an emulator, held to the oracle as they are on a GPU.

What it shows and what it does not is said in test_emulated.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import emulated
from cases import LAYOUTS, Recipe, assert_same_bits
from grads import Gradients, check_gradients
from qkrope import _native, cpu
from qkrope.spec import Norm, Rope, Spec
from qkrope.variant import Variant
from test_emulated import BF16, FP16, FP32, SHAPES, option_recipe
from test_kernels import CORE
from test_options import OPTIONS, PAIRS


@pytest.fixture(autouse=True)
def a_small_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """So few warps that a group of lanes goes through several units of a small call; in every other
    test blocks of four whatever the call, which have half the groups.
    """
    _native.lib().force_backward(4 * (len(request.node.name) % 2), 4, -1)
    yield
    _native.lib().force_backward(0, 0, -1)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's tensors, the CUDA kernels of the gradients."""
    monkeypatch.setattr(cpu, "qk_norm_rope_backward", emulated.emulate_backward)
    return "cpu"


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(device: str, name: str) -> None:
    turn = list(OPTIONS).index(name)
    recipe = option_recipe(OPTIONS, name, turn)
    assert recipe is not None
    check_gradients(recipe, device, layout=list(LAYOUTS)[turn % len(LAYOUTS)])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(12))
def test_two_options(device: str, first: int) -> None:
    for turn, name in list(enumerate(PAIRS))[first::36]:
        recipe = option_recipe(PAIRS, name, turn)
        if recipe is not None:
            check_gradients(recipe, device, layout=list(LAYOUTS)[turn % len(LAYOUTS)])


@pytest.mark.parametrize("which", range(len(CORE)))
def test_core(device: str, which: int) -> None:
    dtype = (BF16, FP32, FP16)[which % 3]
    check_gradients(CORE[which].but(dtype=dtype, seed=which), device, layout="odd")
    check_gradients(CORE[which].but(dtype=dtype, seed=which), device)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape(device: str, name: str) -> None:
    check_gradients(SHAPES[name], device)


# ---- bits -------------------------------------------------------------------------------------

SAME = {
    "plain": Recipe(Spec(5, 3, 64, rope=Rope(dim=32)), lead=(2, 9)),
    "plain 512": Recipe(Spec(2, 3, 512, rope=Rope(dim=128)), lead=(5,), dtype=FP32),
    "layer": Recipe(Spec(5, 3, 64, norm=Norm("layer")), lead=(2, 9), bias=True),
    "row": Recipe(Spec(9, 2, 64, norm=Norm("layer", scope="row")), lead=(2, 9), weight_shape="row"),
}


def found_on(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, num_sms: int) -> dict[str, Any]:
    run = partial(emulated.emulate_backward, num_sms=num_sms)
    monkeypatch.setattr(cpu, "qk_norm_rope_backward", run)
    grads = Gradients(recipe, layout=recipe.layout)
    found = grads.run()
    grads.check(found)
    return found


@pytest.mark.parametrize("name", SAME)
def test_bits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A call repeats to the bit. The number of multiprocessors, the alignment of rows and the other
    tokens of the batch do not change a bit of dx.
    """
    recipe = SAME[name]
    first = found_on(monkeypatch, recipe, 1)
    for y, other in zip(first.values(), found_on(monkeypatch, recipe, 1).values(), strict=True):
        assert_same_bits(y, other)
    for other in (
        *(found_on(monkeypatch, recipe, n) for n in (2, 3, 40)),
        found_on(monkeypatch, recipe.but(layout="odd"), 2),
    ):
        for side in "qk":
            assert_same_bits(first[side], other[side])
    at = tuple(n - 1 for n in recipe.lead)
    alone = Gradients(recipe)
    call = alone.call
    call.positions = call.positions[at].view(1)
    call.q, call.k = call.q[at][None], call.k[at][None]
    alone.dy = [None if g is None else g[at][None] for g in alone.dy]
    one = alone.run()
    for side in "qk":
        assert_same_bits(first[side][at][None], one[side])


def test_one_row_of_nan_spoils_no_other(device: str) -> None:
    for name in ("plain", "layer"):
        grads = Gradients(SAME[name])
        clean = grads.run()
        grads.call.q[1, 3, 2, 5] = torch.nan
        grads.dy[1][0, 2, 1, 7] = torch.inf
        found = grads.run()
        for side, at in (("q", (1, 3, 2)), ("k", (0, 2, 1))):
            bad = torch.zeros(clean[side].shape[:-1], dtype=torch.bool)
            bad[at] = True
            assert found[side][bad].isnan().any()
            assert_same_bits(found[side][~bad], clean[side][~bad])


@pytest.mark.parametrize("scale", [None, 1.5], ids=["plain", "general"])
def test_what_is_not_a_position_turns_to_nan(
    monkeypatch: pytest.MonkeyPatch, device: str, scale: float | None
) -> None:
    monkeypatch.setattr(cpu, "qk_norm_rope", emulated.emulate)  # the CPU's refuses it
    grads = Gradients(Recipe(Spec(2, 1, 64, rope=Rope(dim=32)), lead=(6,)))
    extras = {} if scale is None else {"q_scale": scale, "k_scale": scale}
    want = grads.run(**extras)
    bad = torch.zeros(6, dtype=torch.bool)
    bad[[1, 4]] = True
    grads.call.positions = grads.call.positions.where(~bad, torch.tensor(2**31))
    found = grads.run(**extras)
    for side in "qk":
        assert found[side][bad].isnan().all()
        assert_same_bits(found[side][~bad], want[side][~bad])


def test_sums_are_skipped_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, and neither workspace nor sums."""
    found: list[emulated.Launch] = []
    run = partial(emulated.emulate_backward, into=found)
    monkeypatch.setattr(cpu, "qk_norm_rope_backward", run)
    for name in ("plain", "layer"):
        Gradients(SAME[name]).run(needs="qk")
        (launch,) = found
        assert emulated.NAMES[launch.prepared.grid.function] != "sums"
        found.clear()


@pytest.mark.parametrize("name", SAME)
def test_zero_tokens(device: str, name: str) -> None:
    found = Gradients(SAME[name].but(lead=(0,))).run()
    assert found["q"].shape[0] == 0 and not found["q_weight"].any()


# ---- faults that the tests above would see ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("plain", "work.token += side.step_tokens, ", "work.token += side.step_tokens + 1, "),
        ("plain", "if (there) sum =", "if (!there) sum ="),
        ("plain", "row < sum.rows;", "row < sum.rows - 1;"),
        ("plain", "warp < (int)blockDim.y;", "warp < (int)blockDim.y - 1;"),
        ("layer", "+ step * work.step_tokens", "+ step * work.step_tokens - step"),
        ("layer", "to.level = qk::mul(sums.g, share);", ""),
        ("layer", "biases = qk::add(biases, g)", "biases = g"),
        (
            "row",
            "chunk * kRows + i) * work.step;\n      const int stride",
            "chunk * kRows);\n      const int stride",
        ),
    ],
)
def test_a_fault_shows(monkeypatch: pytest.MonkeyPatch, name: str, right: str, wrong: str) -> None:
    def broken(variant: Variant) -> Any:
        text = emulated.source(variant)
        assert right in text
        return emulated.compiled(text.replace(right, wrong))

    def run(plan: Any, *operands: Any) -> None:
        found: list[emulated.Launch] = []
        emulated.emulate_backward(plan, *operands, into=found)
        for launch in found:
            assert launch.run(broken) is None

    monkeypatch.setattr(cpu, "qk_norm_rope_backward", run)
    with pytest.raises(AssertionError):
        check_gradients(SAME[name], "cpu")
