"""What only a GPU shows of the general kernel: compiles, capture, the launches of rows, memory.

Its results are those of test_options.py and test_groups_op.py on CUDA; without a GPU,
test_emulated.py and test_option_compile.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import qkrope
from cases import Recipe, assert_same_bits
from qkrope.spec import Norm, Rope, Spec
from test_emulated import SHAPES
from test_options import OPTIONS, run_every_form

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
ROW = Norm(scope="row")


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape(cuda: str, name: str) -> None:
    run_every_form(SHAPES[name], cuda)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "name",
    (
        *("layer", "row", "v_row", "rest", "rope_first", "output_half", "axes", "offset"),
        *("distance", "bias", "scale_token", "weight_heads", "weight_row", "table_full_heads"),
        *("cache", "rotate"),
    ),
)
@pytest.mark.parametrize("head_dim", [58, 64])
def test_memory(cuda: str, name: str, head_dim: int) -> None:
    recipe = OPTIONS[name].make(head_dim, lead=(2, 9), layout="padded")
    assert recipe is not None
    run_every_form(recipe, cuda)


@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 40), (48, 8), (3, 1), (130, 2)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_row_in_any_batch(cuda: str, heads: int, kv_heads: int, kind: str) -> None:
    """By the criterion, and each token with the bits it has alone."""
    spec = Spec(heads, kv_heads, 128, norm=Norm(kind, scope="row"))
    call = Recipe(spec, lead=(613,), weight_shape="row").make(cuda)
    whole = qkrope.qk_norm_rope(*call.args())
    call.check(*whole)
    for first, last in ((0, 1), (7, 9), (100, 613)):
        q, k = call.q[first:last], call.k[first:last]
        rest = call.q_weight, call.k_weight, call.positions[first:last], spec
        for y, part in zip(whole, qkrope.qk_norm_rope(q, k, *rest), strict=True):
            assert_same_bits(y[first:last], part)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(5, 2, 128),
        Spec(5, 2, 128, norm=Norm("layer"), order="rope_first", rounding="A/f"),
        Spec(5, 2, 128, k_norm=ROW, v_norm=Norm(), rope=Rope(reverse=True)),
        Spec(5, 2, 128, rope=Rope(axes_dim=(32, 48, 48))),
    ],
    ids=["plain", "layer", "row", "axes"],
)
def test_after_warmup_no_option_compiles(
    cuda: str, monkeypatch: pytest.MonkeyPatch, spec: Spec
) -> None:
    from qkrope.cuda import launch

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a compile after warmup")

    # Weights of any dtype: the general kernel reads each as it is.
    qkrope.warmup(spec, device=cuda, dtype=BF16)
    monkeypatch.setattr(launch, "compile_variant", refuse)
    for more in (
        {},
        {"bias": spec.q_norm.kind != "none", "weight_dtype": FP32},
        {"scale": "token"},
        {"weight_shape": "head"},
        {"angle": "pair", "tables": "head"},
        {"angle": "inv_freq64", "rotate": (1, 4), "lead": (3, 6)},
        {"angle": "cache", "layout": "odd"},
    ):
        recipe = replace(Recipe(spec, lead=(9,)), **more)
        run_every_form(recipe, cuda)


def test_capture(cuda: str) -> None:
    """A captured call of rows, replayed on other inputs."""
    spec = Spec(9, 2, 128, norm=ROW)
    call, other = (Recipe(spec, lead=(33,), seed=seed).make(cuda) for seed in (0, 1))
    qkrope.warmup(spec, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = qkrope.qk_norm_rope(*call.args())
    for mine, theirs in zip(call.args()[:5], other.args()[:5], strict=True):
        mine.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    for y, direct in zip(outputs, qkrope.qk_norm_rope(*other.args()), strict=True):
        assert_same_bits(y, direct)
