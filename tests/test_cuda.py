"""What only a GPU shows of the kernels: sizes, grids, alignment, positions out of range.

Compiles, capture and hazards are in test_cuda_calls.py. What the op computes on CUDA is tested with
the CPU, in test_kernels.py (every shape, layout and angle); 64-bit strides and empty batches in
test_catalogue.py; tensors on two devices in test_errors.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkrope
from cases import Recipe, assert_same_bits
from qkrope import _native
from qkrope.spec import Norm, Rope, Spec

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I32, I64 = torch.int32, torch.int64


def spec_of(
    dim: int = 128, rotary: int = 128, pairing: str = "half", heads: tuple[int, int] = (5, 2)
) -> Spec:
    return Spec(*heads, dim, rope=Rope(rotary, 1e6, pairing))


def run(recipe: Recipe, device: str) -> tuple[Tensor, Tensor]:
    call = recipe.make(device)
    return qkrope.qk_norm_rope(*call.args(), **call.extras)


# ---- sizes ------------------------------------------------------------------------------------


def need(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"{gigabytes} GB of device memory are not free")


@pytest.mark.parametrize("dtype", [I32, I64])
def test_more_than_2_31_elements(cuda: str, dtype: torch.dtype) -> None:
    """210715 tokens of 80 heads of 128: rows on both sides of elements 2^30 and 2^31."""
    need(6)
    tokens, spec = 210_715, replace(spec_of(heads=(64, 8)), norm=Norm(eps=1e-5))
    rows = [0, 1, 104_857, 104_858, 209_714, 209_715, 209_716, tokens - 2, tokens - 1]
    small = Recipe(spec, lead=(len(rows),), layout="packed", other_heads=8).make()
    width = small.qkv.shape[-1]
    assert tokens * width > 2**31 and rows[4] * width < 2**31 < rows[6] * width
    qkv = torch.empty(tokens, width, dtype=BF16, device=cuda)
    positions = torch.zeros(tokens, dtype=dtype, device=cuda)
    qkv[rows] = small.qkv.to(cuda)
    positions[rows] = small.positions.to(cuda, dtype)
    weights = (small.q_weight.to(cuda), small.k_weight.to(cuda))
    qkrope.qkv_norm_rope_(qkv, *weights, positions, spec)
    got = qkv[rows].cpu().unflatten(-1, (80, 128))
    small.check(got[:, :64], got[:, 64:72])
    assert_same_bits(got[:, 72:], small.qkv.unflatten(-1, (80, 128))[:, 72:], "v")


def test_more_than_2_31_elements_out_of_place(cuda: str) -> None:
    need(10)
    tokens, spec = 210_715, spec_of(heads=(80, 1))
    rows = [0, 104_858, 209_715, 209_716, tokens - 1]
    small = Recipe(spec, lead=(len(rows),), sides="q").make()
    q = torch.empty(tokens, 80, 128, dtype=BF16, device=cuda)
    positions = torch.zeros(tokens, dtype=I64, device=cuda)
    q[rows], positions[rows] = small.q.to(cuda), small.positions.to(cuda)
    q2, none = qkrope.qk_norm_rope(q, None, small.q_weight.to(cuda), None, positions, spec)
    assert none is None
    small.check(q2[rows].cpu(), None)


@pytest.mark.parametrize(
    ("tokens", "dim", "heads"),
    [
        (3_000_000, 8, (1, 1)),  # tiny heads: 32 to a warp
        (9_000_001, 8, (1, 1)),  # and more than 65535 blocks of four warps
        (300_007, 512, (1, 1)),  # a head to a warp, likewise
        (70_001, 2, (3, 1)),
        (40, 16, (2047, 33)),  # many heads, few tokens
        (1, 64, (4096, 4096)),
    ],
    ids=str,
)
def test_grids(cuda: str, tokens: int, dim: int, heads: tuple[int, int]) -> None:
    """One call is the same as many small ones, to the bit, at sizes a grid might not reach."""
    spec = spec_of(dim, dim, heads=heads)
    draw = torch.Generator(cuda).manual_seed(1)
    q = torch.randn(tokens, heads[0], dim, device=cuda, generator=draw).to(BF16)
    k = torch.randn(tokens, heads[1], dim, device=cuda, generator=draw).to(BF16)
    positions = torch.arange(tokens, device=cuda) * 239 - 2**30
    whole = qkrope.qk_norm_rope(q, k, None, None, positions, spec)
    step = max(1, tokens // 37)
    for begin in range(0, tokens, step):
        rows = slice(begin, begin + step)
        part = qkrope.qk_norm_rope(q[rows], k[rows], None, None, positions[rows], spec)
        for y, want in zip(part, whole, strict=True):
            assert torch.equal(y, want[rows])
    ends = [0, tokens // 2, tokens - 1]
    small = Recipe(spec, lead=(3,), weights="-").make()
    small.q, small.k, small.positions = q[ends].cpu(), k[ends].cpu(), positions[ends].cpu()
    small.inputs = (small.q, small.k)
    small.check(*(y[ends].cpu() for y in whole))


# ---- which bits may depend on what ------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "dtype", "counts"),
    [
        (spec_of(heads=(32, 8)), BF16, range(1, 5001)),
        (spec_of(256, 64, heads=(16, 2)), BF16, range(1, 5001, 61)),
        (spec_of(72, 72, "interleaved"), FP32, range(1, 5001, 59)),
        (spec_of(1024, 512, heads=(3, 1)), FP16, range(1, 5001, 101)),
        (spec_of(34, 10), BF16, range(1, 5001, 53)),
    ],
    ids=["128", "256", "72", "1024", "34"],
)
def test_bits_do_not_depend_on_the_token_count(
    cuda: str, spec: Spec, dtype: torch.dtype, counts: range
) -> None:
    """The grid, the heads a group serves and the block change with the count; the bits do not."""
    call = Recipe(spec, dtype=dtype, lead=(5000,)).make(cuda)
    q, k, qw, kw, positions, _ = call.args()
    whole = qkrope.qk_norm_rope(*call.args())
    wrong = torch.zeros((), dtype=I64, device=cuda)
    for count in counts:
        rows = slice(0, count) if count % 2 else slice(5000 - count, 5000)
        part = qkrope.qk_norm_rope(q[rows], k[rows], qw, kw, positions[rows], spec)
        for y, want in zip(part, whole, strict=True):
            wrong += (y != want[rows]).sum()
    assert int(wrong) == 0


@pytest.fixture
def force() -> Iterator[Callable[..., Any]]:
    """The launcher's grid rule, overridden for a test."""
    function = _native.lib().force_grid
    yield function
    function(0, 0)


@pytest.mark.parametrize("tokens", [1, 3, 64, 333])
@pytest.mark.parametrize(
    "dims", [(128, 128), (64, 32), (80, 80), (512, 128), (1024, 1024)], ids=str
)
def test_every_grid_gives_the_same_bits(
    cuda: str, force: Callable[..., Any], dims: tuple[int, int], tokens: int
) -> None:
    recipe = Recipe(spec_of(*dims, heads=(7, 3)), lead=(tokens,), layout="packed")
    expected = run(recipe, cuda)
    for rows in (1, 2, 4) if dims[0] <= 256 else (1, 2):
        for warps in (1, 3, 4, 8):
            force(rows, warps)
            call = recipe.make(cuda)
            qkrope.qk_norm_rope_(*call.args())
            for y, want in zip((call.q, call.k), expected, strict=True):
                assert_same_bits(y, want, f"{rows}, {warps}")
            call.assert_guards()


# (head_dim, rotary_dim): each has aligned loads; lanes hold one, two and four units.
VECTOR = ((128, 128), (128, 64), (256, 64), (96, 96), (80, 80), (64, 32), (192, 64), (512, 128))
VECTOR = (*VECTOR, (1024, 1024))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("dims", VECTOR, ids=str)
def test_any_alignment_gives_the_same_bits(
    cuda: str, dims: tuple[int, int], pairing: str, dtype: torch.dtype
) -> None:
    """Vector loads and single elements: the base moved by each number of elements."""
    spec = spec_of(*dims, pairing, (3, 2))
    call = Recipe(spec, dtype=dtype, lead=(11,)).make(cuda)
    q, k, qw, kw, positions, _ = call.args()
    q, k = q.contiguous(), k.contiguous()
    assert q.data_ptr() % 16 == 0
    expected = qkrope.qk_norm_rope(q, k, qw, kw, positions, spec)

    def moved(x: Tensor, by: int) -> Tensor:
        """A copy of x that many elements after an aligned address."""
        buffer = torch.zeros(x.numel() + 16, dtype=x.dtype)
        buffer[by : by + x.numel()] = x.flatten().cpu()
        return buffer.to(cuda)[by : by + x.numel()].view(x.shape)

    def check(result: tuple[Tensor, Tensor], what: str) -> None:
        for y, want in zip(result, expected, strict=True):
            assert_same_bits(y, want, what)

    for by in range(1, 9):
        a, b = moved(q, by), moved(k, 8 - by)
        check(qkrope.qk_norm_rope(a, b, qw, kw, positions, spec), f"q and k moved by {by}")
        qkrope.qk_norm_rope_(a, b, qw, kw, positions, spec)
        check((a, b), f"in place, moved by {by}")
        weights = moved(qw, by), moved(kw, by)
        check(qkrope.qk_norm_rope(q, k, *weights, positions, spec), f"weights moved by {by}")
        out = moved(q, by), moved(k, 8 - by)
        check(qkrope.qk_norm_rope(q, k, qw, kw, positions, spec, out=out), f"out moved by {by}")


SLOW = """
import sys, warnings, torch, qkrope
spec = qkrope.Spec(3, 2, int(sys.argv[1]), rope=qkrope.Rope())
dim, at = spec.head_dim, int(sys.argv[2])
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(5):
        q = torch.zeros(33 * dim, dtype=torch.bfloat16, device="cuda")[at : at + 9 * dim]
        k = torch.zeros(3, 2, dim, dtype=torch.bfloat16, device="cuda")
        qkrope.qk_norm_rope_(q.view(3, 3, dim), k, None, None, torch.arange(3).cuda(), spec)
print([str(w.message) for w in said if w.category is RuntimeWarning])
"""


@pytest.mark.parametrize(
    ("dim", "at", "text"),
    [(128, 0, None), (128, 1, "rows that are not aligned"), (90, 0, "no aligned layout")],
)
def test_a_slow_path_says_so_once(cuda: str, dim: int, at: int, text: str | None) -> None:
    command = [sys.executable, "-c", SLOW, str(dim), str(at)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said = eval(done.stdout)
    assert len(said) == (text is not None), said
    assert text is None or text in said[0]


# ---- positions out of range -------------------------------------------------------------------


def check_bad_positions(recipe: Recipe, device: str, bad: dict[int, int]) -> None:
    """Tokens in ``bad`` get those positions: their rotated channels alone become NaN."""
    call = recipe.make(device)
    good = qkrope.qk_norm_rope(*call.args(), **call.extras)
    for token, value in bad.items():
        call.positions[token] = value
    got = qkrope.qk_norm_rope(*call.args(), **call.extras)
    qkrope.qk_norm_rope_(*call.args(), **call.extras)
    rotary, wrong = recipe.spec.rotary_dim, sorted(bad)
    fine = [i for i in range(len(call.positions)) if i not in bad]
    for x, y, want in zip((call.q, call.k), got, good, strict=True):
        assert_same_bits(x.contiguous(), y, "in place")
        assert_same_bits(y[fine], want[fine], "other tokens")
        assert_same_bits(y[wrong][..., rotary:], want[wrong][..., rotary:], "unrotated channels")
        assert bool(y[wrong][..., :rotary].isnan().all())
        assert not bool(want.isnan().any())
    assert torch.equal(call.positions.cpu()[wrong], torch.tensor([bad[i] for i in wrong]))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("layout", ["packed", "odd"])
@pytest.mark.parametrize("dims", [(128, 64, "half"), (128, 128, "interleaved"), (34, 10, "half")])
def test_a_position_beyond_int32(
    cuda: str, dims: tuple[int, int, str], layout: str, dtype: torch.dtype
) -> None:
    """int64 values outside [-2^31, 2^31), also those whose low word is a fine position."""
    recipe = Recipe(spec_of(*dims), dtype=dtype, lead=(11,), layout=layout)
    bad = {0: 2**31, 3: -(2**31) - 1, 4: 2**40 + 5, 7: -(2**63), 8: 2**63 - 1, 10: 2**32}
    for angle in ("spec", "inv_freq32"):
        check_bad_positions(recipe.but(angle=angle), cuda, bad)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [I32, I64])
@pytest.mark.parametrize("dims", [(128, 64, "half"), (128, 128, "interleaved"), (34, 10, "half")])
def test_a_row_outside_the_cache(cuda: str, dims: tuple[int, int, str], dtype: torch.dtype) -> None:
    """The table ends where its memory does (under the sanitizer), and has no NaN of its own."""
    recipe = Recipe(spec_of(*dims), lead=(11,), angle="cache", position_dtype=dtype)
    bad = {0: -1, 2: 50, 5: 2**31 - 1, 9: -(2**31)}
    check_bad_positions(recipe, cuda, bad)
    if dtype == I64:
        check_bad_positions(recipe, cuda, {1: 2**32, 6: 2**32 + 7, 10: -(2**63)})


def test_bad_positions_of_k_alone(cuda: str) -> None:
    recipe = Recipe(spec_of(64, 32), lead=(5,), k_lead=(4,))
    call = recipe.make(cuda)
    good = qkrope.qk_norm_rope(*call.args())
    call.positions[1][2] = 2**35
    q2, k2 = qkrope.qk_norm_rope(*call.args())
    assert_same_bits(q2, good[0])
    assert bool(k2[2, :, :32].isnan().all()) and int(k2.isnan().sum()) == 32 * k2.shape[1]
