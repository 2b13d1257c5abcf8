"""Gradients against the float64 oracle: every option, alone and in pairs, and random Specs."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cases import LAYOUTS, Recipe
from grads import Gradients, check_gradients
from qkrope.spec import Norm
from test_kernels import CORE, DTYPES
from test_options import BF16, FP16, FP32, OPTIONS, PAIRS
from test_properties import PLAIN, option_recipes, recipes

OVERLAP = {"packed": "gated"}  # of dy, whose layout is another than x's


@DTYPES
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(backend: str, name: str, dtype: torch.dtype) -> None:
    """Alone, in heads that fill vectors and in heads that do not, packed where it can be."""
    for head_dim, layout in ((48, "packed"), (58, "padded"), (128, "transposed")):
        option = OPTIONS[name]
        if layout == "packed" and "k_lead" in option.recipe:
            layout = "gated"
        recipe = option.make(head_dim, dtype=dtype, lead=(2, 9), layout=layout, seed=head_dim)
        assert recipe is not None, name
        check_gradients(recipe, backend, layout=OVERLAP.get(layout, layout))


@DTYPES
@pytest.mark.parametrize("which", range(len(CORE)))
def test_core(backend: str, which: int, dtype: torch.dtype) -> None:
    """One of every shape, layout and angle of the plain kernels."""
    check_gradients(CORE[which].but(dtype=dtype, seed=which), backend, layout="odd")


def run_pair(name: str, backend: str, turn: int) -> None:
    layout = ("packed", "transposed", "padded")[turn % 3]
    layout = layout if "k_lead" not in PAIRS[name].recipe else "odd"
    dtype, head_dim = (BF16, FP32, FP16)[turn // 3 % 3], (48, 58)[turn % 2]
    recipe = PAIRS[name].make(head_dim, dtype=dtype, lead=(2, 9), layout=layout, seed=turn)
    if recipe is not None:
        check_gradients(recipe, backend, layout=list(LAYOUTS)[turn % len(LAYOUTS)])


@pytest.mark.parametrize("part", range(8))
def test_two_options(device: str, part: int) -> None:
    """Each pair on the best instruction set, in a layout and a dtype of its turn."""
    for turn, name in enumerate(PAIRS):
        if turn % 8 == part:
            run_pair(name, device, turn)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(9))
def test_two_options_everywhere(backend: str, turn: int) -> None:
    """Each pair on every instruction set, in every layout and dtype."""
    for at, name in enumerate(PAIRS):
        run_pair(name, backend, at + turn)


@DTYPES
def test_l2_on_both_sides_of_eps(backend: str, dtype: torch.dtype) -> None:
    """Rows shorter than eps are divided by it: their gradient is gx / eps."""
    recipe = OPTIONS["l2"].make(48, dtype=dtype, lead=(2, 9))
    assert recipe is not None
    spec = replace(recipe.spec, norm=Norm("l2", eps=3.0), k_norm=Norm("l2", eps=0.5))
    grads = Gradients(recipe.but(spec=spec), backend)
    length = grads.call.q.float().norm(dim=-1)
    assert bool((length < 2.9).any()) and bool((length > 3.1).any())
    grads.check(grads.run())


def test_many_tokens(device: str) -> None:
    """Blocks of many tokens, several to a thread, and as many partial sums as there may be."""
    recipe = CORE[0].but(lead=(1301,), weight_dtype=FP32, seed=3)
    check_gradients(recipe, device)
    check_gradients(OPTIONS["weight_heads"].make(48, lead=(1301,), dtype=FP32), device)


# ---- random Specs -----------------------------------------------------------------------------

LAYOUT = st.sampled_from(list(LAYOUTS))


@settings(PLAIN, max_examples=100)
@given(recipe=recipes(), layout=LAYOUT)
def test_random_calls(backend: str, recipe: Recipe, layout: str) -> None:
    check_gradients(recipe, backend, layout=layout)


@settings(PLAIN, max_examples=100)
@given(recipe=option_recipes(), layout=LAYOUT)
def test_random_options(backend: str, recipe: Recipe, layout: str) -> None:
    check_gradients(recipe, backend, layout=layout)


@pytest.mark.slow
@settings(PLAIN, max_examples=2000)
@given(recipe=st.one_of(recipes(), option_recipes()), layout=LAYOUT)
def test_many_random_calls(device: str, recipe: Recipe, layout: str) -> None:
    check_gradients(recipe, device, layout=layout)
