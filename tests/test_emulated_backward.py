"""The CUDA kernels of the gradients on an emulator, held to the oracle as they are on a GPU.

What it shows and what it does not is said in test_emulated.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
from cases import LAYOUTS, Recipe, assert_same_bits
from grads import Gradients, check_gradients
from qkrope import _native, cpu
from qkrope.spec import Norm, Rope, Spec
from test_emulated import BF16, FP16, FP32, SHAPES, option_recipe
from test_kernels import CORE
from test_options import OPTIONS, PAIRS


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
