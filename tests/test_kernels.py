"""The public ops against the oracle: what they compute, on every backend.

Tests that take ``device`` run on the CPU at its best instruction set and on CUDA; those that take
``backend`` run on the CPU at each instruction set too. What must hold whatever the numbers are
(who sees a NaN, which bits may depend on what) is in test_kernel_rules.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkrope
from cases import LAYOUTS, Call, Recipe, Shape, assert_same_bits, guarded
from qkrope.spec import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Norm, Rope, Spec, YaRN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
PAIRINGS = pytest.mark.parametrize("pairing", ["half", "interleaved"])

# (head_dim, rotary_dim): every shape of a released model, the largest, the smallest, and odd ones
# that leave tails on every vector width.
SHAPES = (
    (128, 128),
    (256, 64),
    (128, 96),
    (72, 72),
    (80, 80),
    (96, 96),
    (112, 112),
    (64, 64),
    (64, 32),
    (192, 64),
    (512, 128),
    (1024, 1024),
    (2, 2),
    (6, 4),
    (90, 90),
    (34, 10),
)
HEADS = ((3, 2), (32, 8), (1, 1), (5, 1))
TOKENS = (7, 0, 64, 1, 129, 3)


def spec_of(
    head_dim: int = 64,
    rotary: int | None = 32,
    pairing: str = "half",
    heads: tuple[int, int] = (3, 2),
    norm: Norm = Norm(),
    **changes: Any,
) -> Spec:
    rope = None if rotary is None else Rope(dim=rotary, theta=1e6, pairing=pairing)
    return Spec(*heads, head_dim, norm=norm, rope=rope, **changes)


def run_every_form(recipe: Recipe, device: str) -> tuple[Tensor | None, Tensor | None]:
    """Out of place, in place and (where there is one) packed: right, and all the same bits."""
    call = recipe.make(device)
    q2, k2 = qkrope.qk_norm_rope(*call.args(), **call.extras)
    for x, y in ((call.q, q2), (call.k, k2)):
        assert (x is None) == (y is None)
        if x is not None:
            assert y.is_contiguous() and (y.shape, y.dtype) == (x.shape, x.dtype)
            assert y.device == x.device
    call.assert_inputs_unchanged()
    call.check(q2, k2)

    call = recipe.make(device)
    assert qkrope.qk_norm_rope_(*call.args(), **call.extras) is None
    same_as(call, q2, k2)
    if recipe.layout == "packed" and recipe.sides == "both":
        call = recipe.make(device)
        assert qkrope.qkv_norm_rope_(call.qkv, *call.rest(), **call.extras) is None
        same_as(call, q2, k2)
    return q2, k2


def same_as(call: Call, q2: Tensor | None, k2: Tensor | None) -> None:
    for x, y in ((call.q, q2), (call.k, k2)):
        if x is not None:
            assert_same_bits(x, y)
    call.assert_guards()


# ---- shapes -----------------------------------------------------------------------------------


@PAIRINGS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape(backend: str, shape: tuple[int, int], dtype: torch.dtype, pairing: str) -> None:
    """Each shape with another number of heads and tokens, and so with another mix of them."""
    turn = SHAPES.index(shape) + 2 * (pairing == "half")
    heads = HEADS[turn % 4] if shape[0] < 1024 else (3, 2)
    lead = (TOKENS[2 * (turn // 2) % 6] if heads[0] < 32 else 33,)
    recipe = Recipe(spec_of(*shape, pairing, heads), dtype=dtype, lead=lead, layout="packed")
    run_every_form(recipe, backend)


CORE = (
    Recipe(spec_of(128, 128, heads=(5, 2)), lead=(37,), layout="packed"),
    Recipe(spec_of(128, 64, "interleaved"), lead=(2, 11), layout="transposed", weights="q"),
    Recipe(spec_of(256, 64, norm=Norm(weight_offset=1.0)), lead=(9,), layout="gated"),
    Recipe(spec_of(72, 72), lead=(3, 5), layout="odd", weight_dtype=FP32),
    Recipe(spec_of(34, 10), lead=(23,), layout="padded", angle="channel"),
    Recipe(spec_of(96, 96, "interleaved"), lead=(13,), angle="pair"),
    Recipe(spec_of(2, 2), lead=(4,), layout="odd"),
    Recipe(spec_of(6, 4, "interleaved"), lead=(3, 4), layout="permuted"),
    Recipe(spec_of(90, 90, k_norm=Norm(kind="none")), lead=(6,), angle="cache"),
    Recipe(spec_of(80, None), lead=(11,), layout="packed"),
    Recipe(spec_of(64, 32), lead=(0,)),
    Recipe(spec_of(64, 48), lead=(12,), angle="inv_freq32", position_dtype=torch.int32),
    Recipe(spec_of(1024, 1024, heads=(2, 1)), lead=(3,)),
)


@pytest.mark.sanitize
@DTYPES
@pytest.mark.parametrize("which", range(len(CORE)))
def test_core(backend: str, which: int, dtype: torch.dtype) -> None:
    """One of everything on each instruction set and on CUDA."""
    run_every_form(CORE[which].but(dtype=dtype, seed=which), backend)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_and_tokens(device: str, heads: tuple[int, int], tokens: int) -> None:
    recipe = Recipe(spec_of(128, 64, heads=heads), lead=(tokens,), layout="packed", seed=tokens)
    run_every_form(recipe, device)


# ---- norm and weights -------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weights", ["both", "q", "k", "-"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16), (FP32, FP32), (BF16, FP16)],
    ids=lambda t: str(t).removeprefix("torch."),
)
def test_weights(
    device: str, dtype: torch.dtype, weight_dtype: torch.dtype, weights: str, offset: float
) -> None:
    spec = spec_of(norm=Norm(weight_offset=offset))
    recipe = Recipe(spec, dtype=dtype, lead=(17,), weight_dtype=weight_dtype, weights=weights)
    run_every_form(recipe, device)


def test_weights_of_two_dtypes(device: str) -> None:
    call = Recipe(spec_of(), lead=(17,)).make(device)
    assert call.q_weight is not None
    call.q_weight = call.q_weight.float()
    call.check(*qkrope.qk_norm_rope(*call.args()))


@pytest.mark.parametrize(
    "norms",
    [
        (Norm(kind="none"), None),
        (Norm(), Norm(kind="none")),
        (Norm(kind="none"), Norm(weight_offset=1.0)),
        (Norm(eps=1e-6), Norm(eps=1e-2)),
        (Norm(eps=0.0), None),
        (Norm(weight_offset=1.0), Norm(weight_offset=0.25)),
    ],
    ids=str,
)
@pytest.mark.parametrize("rotary", [32, None])
@DTYPES
def test_norms(
    backend: str, norms: tuple[Norm, Norm | None], rotary: int | None, dtype: torch.dtype
) -> None:
    spec = spec_of(rotary=rotary, norm=norms[0], k_norm=norms[1])
    run_every_form(Recipe(spec, dtype=dtype, lead=(17,)), backend)


# ---- layouts and positions --------------------------------------------------------------------

LEADS: tuple[Shape, ...] = ((7,), (2, 5), (3, 1), (2, 3, 4))


@pytest.mark.parametrize("position_shape", ["full", "last", "one"])
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "packed"])
def test_layouts(device: str, layout: str, lead: Shape, position_shape: str) -> None:
    if position_shape == "one" and len(lead) == 1:
        lead = (1, *lead)
    index = LEADS.index(lead) if lead in LEADS else 0
    recipe = Recipe(
        spec_of(pairing=("half", "interleaved")[index % 2]),
        dtype=(BF16, FP32)[index // 2],
        lead=lead,
        layout=layout,
        position_shape=position_shape,
        position_dtype=(torch.int32, torch.int64)[index % 2],
        seed=index,
    )
    run_every_form(recipe, device)


def test_no_leading_dimensions(device: str) -> None:
    """q of [heads, head_dim] with a position that is a scalar."""
    run_every_form(Recipe(spec_of(), lead=(), layout="packed", seed=3), device)


def test_many_leading_dimensions(device: str) -> None:
    """Dimensions that coalesce do not count against the limit of those that do not."""
    run_every_form(Recipe(spec_of(), lead=(2, 1, 2, 1, 2, 1, 2), layout="packed"), device)
    run_every_form(Recipe(spec_of(), lead=(2, 2, 2, 2, 2), layout="permuted"), device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_positions(device: str, dtype: torch.dtype) -> None:
    """Every other element of a larger tensor, one value for all, and a column of a matrix."""
    call = Recipe(spec_of(), lead=(2, 6), position_dtype=dtype).make(device)
    wide = torch.arange(-20, 28, dtype=dtype, device=device).view(2, 24)
    for positions in (wide[:, ::4], wide[1, 3], wide[:, 5:6], wide[0, 2:14:2].expand(2, 6)):
        call.positions = positions
        call.check(*qkrope.qk_norm_rope(*call.args()))


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", [*LAYOUTS])
@DTYPES
def test_out(device: str, layout: str, dtype: torch.dtype) -> None:
    """Results go where the caller says, in any layout, and nowhere else."""
    recipe = Recipe(spec_of(), dtype=dtype, lead=(2, 9), layout="packed")
    call = recipe.make(device)
    expected = qkrope.qk_norm_rope(*call.args())
    places = [guarded((2, 9), heads, 64, layout, dtype, device) for heads in (3, 2)]
    before = [buffer.outside() for buffer, _ in places]
    out = tuple(view for _, view in places)
    result = qkrope.qk_norm_rope(*call.args(), out=out)
    for (buffer, view), outside, want, got in zip(places, before, expected, result, strict=True):
        assert_same_bits(view, want)
        assert got.data_ptr() == view.data_ptr()
        assert torch.equal(buffer.outside(), outside)
    call.assert_inputs_unchanged()


def test_out_may_be_the_input(device: str) -> None:
    recipe = Recipe(spec_of(), lead=(9,), layout="packed")
    call = recipe.make(device)
    q2, k2 = qkrope.qk_norm_rope(*call.args())
    qkrope.qk_norm_rope(*call.args(), out=(call.q, call.k))
    same_as(call, q2, k2)


@pytest.mark.parametrize("sides", ["q", "k"])
@pytest.mark.parametrize("layout", ["contiguous", "packed", "transposed"])
def test_one_side_alone(device: str, sides: str, layout: str) -> None:
    recipe = Recipe(spec_of(), lead=(2, 9), layout=layout)
    both = run_every_form(recipe, device)
    alone = run_every_form(recipe.but(sides=sides), device)
    assert_same_bits(alone["qk".index(sides)], both["qk".index(sides)])


@pytest.mark.parametrize("angle", ["spec", "cache", "inv_freq64"])
@pytest.mark.parametrize("k_lead", [(2, 4), (2, 0), (2, 31), (2, 9), (5,)], ids=str)
def test_q_and_k_of_different_lengths(device: str, k_lead: Shape, angle: str) -> None:
    run_every_form(Recipe(spec_of(), lead=(2, 9), k_lead=k_lead, angle=angle), device)


# ---- angles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("position_shape", ["full", "last", "one"])
@pytest.mark.parametrize("angle", ["pair", "channel", "complex", "cache"])
@PAIRINGS
@DTYPES
def test_tables(
    backend: str, angle: str, pairing: str, dtype: torch.dtype, position_shape: str
) -> None:
    spec = spec_of(64, 40, pairing)
    # A table has the attention factor inside: the one of the Spec must not be applied again.
    spec = replace(spec, rope=replace(spec.rope, scaling=YaRN.from_ramp(4.0, 1.0, 5.0, 1.25)))
    recipe = Recipe(spec, dtype=dtype, lead=(2, 9), angle=angle, layout="packed")
    recipe = recipe.but(position_shape=position_shape)
    run_every_form(recipe, backend)
    if angle != "complex":
        run_every_form(recipe.but(table_dtype=dtype, seed=1), backend)


@pytest.mark.parametrize("angle", ["inv_freq32", "inv_freq64"])
@DTYPES
def test_inv_freq(device: str, angle: str, dtype: torch.dtype) -> None:
    run_every_form(Recipe(spec_of(128, 96), dtype=dtype, lead=(23,), angle=angle), device)


SCALINGS = {
    "linear": Linear(factor=4.0),
    "ntk": NTK(factor=4.0),
    "dynamic": DynamicNTK(factor=2.0, original_max_position_embeddings=4096),
    "yarn": YaRN(factor=4.0, original_max_position_embeddings=32768),
    "yarn-mscale": YaRN(
        factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=1.0
    ),
    "trt": YaRN.from_ramp(8.0, 4.0, 11.0, 1.21),
    "llama3": Llama3(8.0, 1.0, 4.0, 8192),
    "longrope": LongRoPE([1.0 + i / 8 for i in range(16)], [2.0 + i for i in range(16)], 4096),
}


@pytest.mark.parametrize("name", SCALINGS)
@DTYPES
def test_scalings(device: str, name: str, dtype: torch.dtype) -> None:
    """Every scaling at every position of the list, at its lengths, with its attention factor."""
    spec = spec_of(64, 32, max_position_embeddings=131072)
    spec = replace(spec, rope=replace(spec.rope, scaling=SCALINGS[name]))
    for seq_len in (None, 1000, 100000):
        call = Recipe(spec, dtype=dtype, lead=(22,)).make(device)
        call.extras = {"seq_len": seq_len}
        call.check(*qkrope.qk_norm_rope(*call.args(), seq_len=seq_len))


@pytest.mark.parametrize("theta", [1.0, 100.0, 1e4, 1e7, 5e8])
def test_thetas(device: str, theta: float) -> None:
    spec = replace(spec_of(128, 128), rope=Rope(theta=theta))
    for dtype in (BF16, FP32):
        run_every_form(Recipe(spec, dtype=dtype, lead=(22,)), device)
