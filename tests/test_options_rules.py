"""What must hold of the general kernel whatever the numbers are, and its long rows.

As test_kernel_rules.py, on the CPU: which inputs reach which bits, from which thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import qkrope
from cases import Recipe, assert_criterion, assert_same_bits
from qkrope.spec import Norm, Rope, Spec
from test_options import run_every_form

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])

GENERAL = {
    "layer": Recipe(Spec(5, 2, 64, Norm("layer"), rope=Rope(32)), bias=True),
    "row": Recipe(Spec(5, 2, 64, Norm(scope="row"), rope=Rope(24, offset=8)), weight_shape="row"),
    "rope_first": Recipe(Spec(5, 2, 58, rope=Rope(20), order="rope_first"), scale="head"),
    "eager": Recipe(Spec(5, 2, 64, rope=Rope(32), rounding="eager", v_norm=Norm())),
    "heads": Recipe(Spec(5, 2, 72, rope=Rope(36)), angle="channel", tables="head"),
}
EACH = pytest.mark.parametrize("name", GENERAL)


@EACH
@DTYPES
def test_bits_do_not_depend_on_the_batch(isa: str, name: str, dtype: torch.dtype) -> None:
    call = GENERAL[name].but(dtype=dtype, lead=(300,)).make()
    whole = qkrope.qk_norm_rope(*call.args(), **call.extras)

    def cut(value: object, rows: slice) -> object:
        if isinstance(value, tuple):
            return tuple(cut(item, rows) for item in value)
        of_tokens = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 300
        return value[rows] if of_tokens else value

    for rows in (slice(0, 1), slice(299, 300), slice(3, 8), slice(100, 229)):
        args = [cut(value, rows) for value in call.args()]
        extras = {key: cut(value, rows) for key, value in call.extras.items()}
        for y, want in zip(qkrope.qk_norm_rope(*args, **extras), whole, strict=True):
            assert_same_bits(y, want[rows])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH
def test_bits_do_not_depend_on_threads(isa: str, name: str, threads: None) -> None:
    call = GENERAL[name].but(lead=(3, 401)).make()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(qkrope.qk_norm_rope(*call.args(), **call.extras))
    for other in results[1:]:
        for y, want in zip(other, results[0], strict=True):
            assert_same_bits(y, want)


@EACH
@pytest.mark.parametrize("layout", ["odd", "padded", "gated", "transposed"])
def test_bits_do_not_depend_on_the_layout(isa: str, name: str, layout: str) -> None:
    recipe = GENERAL[name].but(lead=(2, 9))
    call, other = recipe.make(), recipe.but(layout=layout).make()
    want = qkrope.qk_norm_rope(*call.args(), **call.extras)
    for y, x in zip(qkrope.qk_norm_rope(*other.args(), **other.extras), want, strict=True):
        assert_same_bits(y, x)


@EACH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_stays_in_its_head(isa: str, name: str, bad: float) -> None:
    """In its token, where that is one row."""
    recipe = GENERAL[name].but(lead=(9,))
    call = recipe.make()
    clean = qkrope.qk_norm_rope(*call.args(), **call.extras)
    call = recipe.make()
    call.q[4, 2, 11] = bad
    call.k[8, 1, -1] = bad
    dirty = qkrope.qk_norm_rope(*call.args(), **call.extras)
    for y, want, (token, head) in zip(dirty, clean, ((4, 2), (8, 1)), strict=False):
        assert not bool(y[token, head].isfinite().all())
        if call.spec.norm.scope == "row":
            y[token] = want[token]
        y[token, head] = want[token, head]
        assert_same_bits(y, want)


@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
@pytest.mark.parametrize("heads", [(40, 40), (48, 8), (96, 2)], ids=str)
@DTYPES
def test_long_rows(isa: str, heads: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """One statistic of up to 12288 channels is as good as that of a head."""
    spec = Spec(*heads, 128, Norm(kind, scope="row"), rope=Rope(128, 1e6))
    run_every_form(Recipe(spec, dtype=dtype, lead=(5,), layout="packed", weight_shape="row"), "cpu")


@pytest.mark.parametrize("scope", ["head", "row"])
@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
@pytest.mark.parametrize("size", [1e25, 1e-25, 3e-30])
def test_values_whose_squares_leave_float32(isa: str, kind: str, size: float, scope: str) -> None:
    spec = Spec(3, 2, 64, Norm(kind, eps=0.0, scope=scope), rope=Rope(32), order="rope_first")
    if (kind, scope) == ("layer", "row"):
        spec = replace(spec, order="norm_first")
    call = Recipe(spec, dtype=FP32, lead=(7,)).make()
    call.q.mul_(size)
    call.k.mul_(size)
    call.inputs = (call.q.clone(), call.k.clone())
    outputs = qkrope.qk_norm_rope(*call.args())
    for y, ref, terms in zip(outputs, *call.expected(), strict=True):
        assert bool(ref.isfinite().all())
        assert_criterion(y, ref, terms, FP32)
