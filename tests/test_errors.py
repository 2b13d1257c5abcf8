"""Every wrong argument raises by name, says what it got and what it expected, and writes nothing.

Here: one wrong argument at a time, devices, position values. What overlaps what, and out=, is in
test_overlap.py; what requires grad in test_grad.py; what a Spec refuses at construction (an
odd rotary dim, one above head_dim, ...) in test_spec.py; what CUDA does with a position out of
range in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkrope
from cases import bits
from qkrope.spec import DynamicNTK, Rope
from refusals import (
    FP64,
    I64,
    NO_ROPE,
    SPEC,
    UNPACKED,
    Row,
    good,
    keep_plans,
    maker,
    packed,
    refuses,
    snapshot,
    table,
)


@pytest.fixture(autouse=True)
def warm() -> None:
    keep_plans()


def test_the_good_call_is_good(device: str) -> None:
    """Without this the refusals below would prove nothing."""
    args = good(maker(device))
    before = snapshot(args)
    q2, k2 = qkrope.qk_norm_rope(**args)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(args), strict=True))
    qkrope.qk_norm_rope_(**args)
    assert torch.equal(args["q"], q2) and torch.equal(args["k"], k2)
    assert not torch.equal(bits(args["q"]), before[0])


SHAPES = """
q=n(3, 3, 8)            | V | q | [..., 2 heads, 8 head_dim] | got [3, 3, 8]
q=n(3, 2, 6)            | V | q | [..., 2 heads, 8 head_dim] | got [3, 2, 6]
q=n(3, 16)              | V | q | [..., 2 heads, 8 head_dim] | got [3, 16]
q=torch._neg_view(n(3, 2, 8))       | V | q | memory holds its values | resolve_neg()
q=n(8)                  | V | q | [..., 2 heads, 8 head_dim] | got [8]
q=n()                   | V | q | [..., 2 heads, 8 head_dim] | got []
q=n(*[1] * 11, 2, 8)    | V | q | at most 12 | got 13 dimensions
k=n(3, 2, 8)            | V | k | [..., 1 heads, 8 head_dim] | got [3, 2, 8]
k=n(3, 1, 16)           | V | k | [..., 1 heads, 8 head_dim] | got [3, 1, 16]
k=n(4, 1, 8)            | V | k | leading dimensions of q, [3], got [4] | positions=(
k=n(1, 3, 1, 8)         | V | k | leading dimensions of q, [3], got [1, 3]
q=None, k=None          | V | q, k | a tensor for at least one | None for both
q=n(3, 2, 16)[..., ::2] | V | q | stride 1 in the last dimension | got 2
q=n(3, 8, 2).mT         | V | q | stride 1 in the last dimension | got 2
k=n(3, 1, 24)[..., ::3] | V | k | stride 1 in the last dimension | got 3
"""

DTYPES = """
q=n(3, 2, 8, dtype=FP64)            | T | q | float32, bfloat16 or float16 | got float64
q=n(3, 2, 8, dtype=I32)             | T | q | float32, bfloat16 or float16 | got int32
q=n(3, 2, 8, dtype=torch.bool)      | T | q | float32, bfloat16 or float16 | got bool
q=n(3, 2, 8, dtype=torch.uint8)     | T | q | float32, bfloat16 or float16 | got uint8
q=n(3, 2, 8, dtype=torch.complex64) | T | q | float32, bfloat16 or float16 | got complex64
q=n(3, 2, 8).to(torch.float8_e5m2)  | T | q | float32, bfloat16 or float16 | got a float8
k=n(3, 1, 8, dtype=FP32)            | T | k | the dtype of q (bfloat16) | got float32
k=n(3, 1, 8, dtype=I16)             | T | k | the dtype of q (bfloat16) | got int16
"""

WEIGHTS = """
q_weight=n(4)                   | V | q_weight | shape [8] or [2, 8], got [4]
q_weight=n(1, 8)                | V | q_weight | shape [8] or [2, 8], got [1, 8]
q_weight=n(2, 4)                | V | q_weight | shape [8] or [2, 8], got [2, 4]
q_weight=torch._neg_view(n(8))     | V | q_weight | memory holds its values | resolve_neg()
q_weight=n(2, 1, 8)             | V | q_weight | shape [8] or [2, 8], got [2, 1, 8]
q_weight=n(16)                  | V | q_weight | shape [8] or [2, 8], got [16]
k_weight=n(2, 8)                | V | k_weight | shape [8] or [1, 8], got [2, 8]
k_weight=n()                    | V | k_weight | shape [8] or [1, 8], got []
q_weight=n(2, 16)[:, ::2]       | V | q_weight | stride 1, got 2
spec=ROW, q_weight=n(8)[:4]     | V | q_weight | shape [8], [16] or [2, 8], got [4]
spec=ROW, k_weight=n(16)        | V | k_weight | shape [8], [8] or [1, 8], got [16]
spec=PART                       | V | q_weight | shape [6] or [2, 6], got [8]
spec=PART, q_weight=n(6)        | V | k_weight | shape [6] or [1, 6], got [8]
q_weight=n(8, dtype=FP64)       | T | q_weight | float32, bfloat16 or float16 | got float64
k_weight=n(8, dtype=I64)        | T | k_weight | float32, bfloat16 or float16 | got int64
q_weight=n(16)[::2]             | V | q_weight | stride 1, got 2
k_weight=n(1).expand(8)         | V | k_weight | stride 1, got 0
spec=NO_NORM, k_weight=None     | V | q_weight | expected None | "none"
spec=NO_NORM, q_weight=None     | V | k_weight | expected None | "none"
spec=replace(SPEC, k_norm=Norm(kind="none")) | V | k_weight | expected None | "none"
"""

POSITIONS = """
positions=None                          | V | positions | int32 or int64 tensor | got None
positions=n(3, dtype=FP32)              | T | positions | int32 or int64, got float32
positions=n(3, dtype=I16)               | T | positions | int32 or int64, got int16
positions=n(3, dtype=torch.uint8)       | T | positions | int32 or int64, got uint8
positions=n(3, dtype=torch.bool)        | T | positions | int32 or int64, got bool
positions=n(4, dtype=I32)               | V | positions | broadcast to [3] of q | got shape [4]
positions=n(0, dtype=I32)               | V | positions | broadcast to [3] of q | got shape [0]
positions=n(1, 3, dtype=I32)            | V | positions | broadcast to [3] of q | got shape [1, 3]
positions=n(3, 2, dtype=I64)            | V | positions | broadcast to [3] of q | got shape [3, 2]
positions=[0, 1, 2]                     | T | positions | a pair | a list of 3
positions=(n(3, dtype=I64),) * 3        | T | positions | a pair | a tuple of 3
positions=(None, n(3, dtype=I64))       | T | positions | (q_positions, k_positions) | got None
positions=(n(3, dtype=I64), None)       | T | positions | (q_positions, k_positions) | got None
positions=(n(3), n(3, dtype=I64))       | T | positions[0] | int32 or int64, got bfloat16
positions=(n(3, dtype=I64), n(3))       | T | positions[1] | int32 or int64, got bfloat16
positions=(n(3, dtype=I64), n(4, dtype=I64)) | V | positions[1] | to [3] of k | got shape [4]
"""

TABLES = """
cos_sin=n(2, 3, 2)                           | T | cos_sin | a pair, got Tensor
cos_sin=(n(3, 2),) * 3                       | T | cos_sin | a pair | a tuple of 3
cos_sin=(n(3, 2), None)                      | T | cos_sin | two tensors | got None
cos_sin=(None, None)                         | T | cos_sin | two tensors | got None
cos_sin=(n(3, 8), n(3, 8))                   | V | cos | of 2 (one value a pair) or 4 | [3, 8]
cos_sin=(n(), n())                           | V | cos | a last dimension of 2 | got shape []
cos_sin=(n(4, 2), n(4, 2))                   | V | cos | broadcast to [3] of q | got shape [4, 2]
cos_sin=(n(3, 4, 2), n(3, 4, 2))             | V | cos | each of the 2 heads of q | [3, 4, 2]
cos_sin=(n(3, 2, 2), n(3, 2, 2))             | V | cos | each of the 1 heads of k | [3, 2, 2]
cos_sin=(n(4, 1, 2), n(4, 1, 2))             | V | cos | broadcast to [3] of q | got shape [4, 1, 2]
cos_sin=(n(1, 3, 1, 2), n(3, 1, 2))          | V | cos | broadcast to [3] of q | [1, 3, 1, 2]
cos_sin=((n(3, 2),) * 2, None)               | T | cos_sin[1] | two tensors | got None
cos_sin=((n(3, 2),) * 2, n(3, 2))            | T | cos_sin[1] | a pair, got Tensor
cos_sin=((n(3, 2), None), (n(3, 2),) * 2)    | T | cos_sin[0] | two tensors | got None
cos_sin=((n(3, 2),) * 2, (n(3, 2), n(2, 2))) | V | k sin | broadcast to [3] of k | got shape [2, 2]
cos_sin=((n(3, 2),) * 2, (n(3, 3),) * 2)     | V | k cos | of 2 (one value a pair) or 4 | [3, 3]
cos_sin=((n(3, 2),) * 3, (n(3, 2),) * 2)     | T | cos_sin[0] | a pair | a tuple of 3
cos_sin=(n(3, 2), n(2, 2))                   | V | sin | broadcast to [3] of q | got shape [2, 2]
cos_sin=(n(3, 4), n(3, 2))                   | V | sin | of 4 like cos, got 2
cos_sin=(n(3, 2, dtype=FP64),) * 2           | T | cos | float32 or the dtype of q | got float64
cos_sin=(n(3, 2, dtype=FP16),) * 2           | T | cos | float32 or the dtype of q | got float16
cos_sin=(n(3, 2, dtype=FP32), n(3, 2))       | T | sin | the dtype of cos | got bfloat16
cos_sin=(n(3, 2), torch._neg_view(n(3, 2)))  | V | sin | memory holds its values | resolve_neg()
cos_sin_cache=n(4)                           | V | cos_sin_cache | [max_position, 4] | got [4]
cos_sin_cache=n(9, 8)                        | V | cos_sin_cache | [max_position, 4] | got [9, 8]
cos_sin_cache=n(1, 9, 4)                     | V | cos_sin_cache | [max_position, 4] | got [1, 9, 4]
cos_sin_cache=n(0, 4)                        | V | cos_sin_cache | [max_position, 4] | got [0, 4]
cos_sin_cache=n(9, 4, dtype=FP64)            | T | cos_sin_cache | the dtype of q | got float64
inv_freq=n(1, dtype=FP32)                    | V | inv_freq | shape [2], got [1]
inv_freq=n(1, 2, dtype=FP32)                 | V | inv_freq | shape [2], got [1, 2]
inv_freq=n(2)                                | T | inv_freq | float32 or float64, got bfloat16
inv_freq=n(2, dtype=I64)                     | T | inv_freq | float32 or float64, got int64
cos_sin=(n(3, 2),) * 2, cos_sin_cache=n(9, 4)  | V | cos_sin_cache | expected None beside cos_sin
cos_sin_cache=n(9, 4), inv_freq=n(2, dtype=FP32) | V | inv_freq | expected None beside cos_sin_cache
cos_sin=(n(3, 2),) * 2, inv_freq=n(2, dtype=FP32) | V | inv_freq | expected None beside cos_sin
spec=NO_ROPE, cos_sin=(n(3, 2),) * 2         | V | cos_sin | expected None | spec.rope is None
spec=NO_ROPE, cos_sin_cache=n(9, 4)          | V | cos_sin_cache | expected None | spec.rope is None
spec=NO_ROPE, inv_freq=n(2, dtype=FP32)      | V | inv_freq | expected None | spec.rope is None
"""

THE_REST = """
seq_len=0                           | V | seq_len | an int in [1, 2147483648] | got 0
seq_len=-5                          | V | seq_len | an int in [1, 2147483648] | got -5
seq_len=8.0                         | T | seq_len | an int | got 8.0
seq_len=n()                         | T | seq_len | an int | got tensor
seq_len=True                        | T | seq_len | an int | got True
seq_len=2**40                       | V | seq_len | an int in [1, 2147483648] | got 1099511627776
spec=None                           | T | spec | a qkrope.Spec, got NoneType
spec=dict()                         | T | spec | a qkrope.Spec, got dict
spec=Norm()                         | T | spec | a qkrope.Spec, got Norm
spec=dict(), inv_freq=n(2, dtype=FP32) | T | spec | a qkrope.Spec, got dict
q=n(3, 2, 8).to_sparse()            | T | q | dense | got layout torch.sparse_coo
k=n(3, 1, 8).to_sparse()            | T | k | dense | got layout torch.sparse_coo
q_weight=n(8).to_sparse()           | T | q_weight | dense | got layout torch.sparse_coo
q=fake(3, 2, 8)                     | T | q | memory of its own | got FakeTensor
k=fake(9, 1, 8)[3:6]                | T | k | memory of its own | got FakeTensor
"""


@UNPACKED
@table(SHAPES + DTYPES.lstrip() + WEIGHTS.lstrip() + POSITIONS.lstrip())
def test_a_wrong_argument(device: str, call: Callable[..., Any], row: Row) -> None:
    n = maker(device)
    refuses(call, {**good(n), **row.apply(n)}, row.error, row.name, *row.texts)


@UNPACKED
@table(TABLES + THE_REST.lstrip())
def test_a_wrong_keyword(device: str, call: Callable[..., Any], row: Row) -> None:
    n = maker(device)
    refuses(call, {**good(n), **row.apply(n)}, row.error, row.name, *row.texts)


@table("""
qkv=n(3, 30)                  | V | qkv | multiple of head_dim 8 | got 30
qkv=n(3, 16)                  | V | qkv | at least (2 + 1) * 8 = 24 | got 16
qkv=n(3, 4, 8)                | V | qkv | at least (2 + 1) * 8 = 24 | got 8
qkv=n()                       | V | qkv | 1 to 11 dimensions, got 0
qkv=n(*[1] * 11, 32)          | V | qkv | 1 to 11 dimensions, got 12
qkv=n(3, 64)[:, ::2]          | V | qkv | stride 1 in the last dimension | got 2
qkv=n(3, 32, dtype=FP64)      | T | qkv | float32, bfloat16 or float16 | got float64
qkv=n(1, 32).expand(3, 32)    | V | qkv | share memory | expected memory of its own
qkv=n(99).as_strided((3, 32), (31, 1)) | V | qkv | share memory | expected memory of its own
qkv=None                      | T | qkv | a torch tensor, got NoneType
qkv=[1.0]                     | T | qkv | a torch tensor, got list
qkv=n(3, 32).to("meta")       | V | qkv | a cpu or cuda tensor, got meta
qkv=fake(3, 32)               | T | qkv | memory of its own, got FakeTensor
q_weight=n(6)                 | V | q_weight | shape [8] or [2, 8], got [6]
q_weight="x"                  | T | q_weight | a tensor or None, got a str
k_weight=2.5                  | T | k_weight | a tensor or None, got a float
positions=None                | V | positions | int32 or int64 tensor, got None
positions=n(4, dtype=I64)     | V | positions | broadcast to [3] of q | got shape [4]
positions=(None, n(3, dtype=I64)) | T | positions | (q_positions, k_positions) | got None
spec="x"                      | T | spec | a qkrope.Spec, got str
q_bias=n(4)                   | V | q_bias | shape [8] or [2, 8], got [4]
v=n(3, 1, 8)                  | V | v | expected None in a packed call | got a tensor
spec=V_NORM                   | V | qkv | of (2 + 1 + 1) * 8 = 32 | has a v_norm, got 40
spec=V_NORM, qkv=n(3, 24)     | V | qkv | of (2 + 1 + 1) * 8 = 32 | has a v_norm, got 24
v_weight=n(8)                 | V | v_weight | expected None | without a v
out=(n(3, 2, 8), n(3, 2, 8))  | V | out[1] | shape [3, 1, 8] of k, got [3, 2, 8]
""")
def test_a_wrong_argument_of_the_packed_call(device: str, row: Row) -> None:
    n = maker(device)
    args = packed({**good(n), **row.apply(n)}, n(3, 40))
    refuses(qkrope.qkv_norm_rope_, {**args, **row.apply(n)}, row.error, row.name, *row.texts)


def test_a_fake_weight_beside_real_tensors() -> None:
    """Its address is null, and reading there would end the process."""
    n = maker("cpu")
    args = {**good(n), **Row("q_weight=fake(8)", ValueError, "", ()).apply(n)}
    for call in (qkrope.qk_norm_rope, qkrope.qk_norm_rope_):
        refuses(call, args, ValueError, "q_weight", "expected a tensor with memory")


NONSENSE = {"str": "x", "int": 3, "float": 1.5, "object": object(), "dict": {}, "bool": True}
TENSORS = ("q", "k", "q_weight", "k_weight", "positions", "cos_sin_cache", "inv_freq")


@UNPACKED
@pytest.mark.parametrize("kind", NONSENSE)
@pytest.mark.parametrize("name", TENSORS)
def test_an_argument_that_is_no_tensor(call: Callable[..., Any], name: str, kind: str) -> None:
    args = {**good(maker("cpu")), name: NONSENSE[kind]}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            refuses(call, args, TypeError, name, "tensor", "got")


@UNPACKED
@pytest.mark.parametrize("name", ["cos", "sin", "out[0]", "out[1]", "positions[1]"])
def test_a_pair_with_something_that_is_no_tensor(call: Callable[..., Any], name: str) -> None:
    n = maker("cpu")
    args = good(n)
    argument, value = {
        "cos": ("cos_sin", ("x", n(3, 2))),
        "sin": ("cos_sin", (n(3, 2), "x")),
        "out[0]": ("out", ("x", n(3, 1, 8))),
        "out[1]": ("out", (n(3, 2, 8), "x")),
        "positions[1]": ("positions", (args["positions"], "x")),
    }[name]
    args[argument] = value
    refuses(call, args, TypeError, name, "expected a tensor or None, got a str")


def test_warmup_arguments() -> None:
    for args, error, text in (
        ({"spec": {}}, TypeError, "spec: expected a qkrope.Spec, got dict"),
        ({"dtype": FP64}, TypeError, "dtype: expected one of float32, .*, got torch.float64"),
        ({"weight_dtype": torch.int8}, TypeError, "weight_dtype: expected one of float32"),
        ({"device": "meta"}, ValueError, "device: expected cpu or cuda, got meta"),
    ):
        with pytest.raises(error, match=f"^{text}"):
            qkrope.warmup(**{"spec": SPEC, "device": "cpu", **args})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="^device: got cuda, expected one that is here"):
            qkrope.warmup(SPEC)


# ---- devices ----------------------------------------------------------------------------------

EACH_TENSOR = """
q=n(3, 2, 8)                     | V | q
k=n(3, 1, 8)                     | V | k
q_weight=n(8)                    | V | q_weight
k_weight=n(8)                    | V | k_weight
positions=n(3, dtype=I64)        | V | positions
cos_sin=(n(3, 2), n(3, 2))       | V | cos
cos_sin_cache=n(9, 4)            | V | cos_sin_cache
inv_freq=n(2, dtype=FP32)        | V | inv_freq
out=(n(3, 2, 8), n(3, 1, 8))     | V | out[0]
"""


@UNPACKED
@table(EACH_TENSOR)
def test_a_device_that_no_kernel_runs_on(device: str, call: Callable[..., Any], row: Row) -> None:
    args = {**good(maker(device)), **row.apply(maker("meta"))}
    refuses(call, args, ValueError, row.name, "expected a cpu or cuda tensor, got meta")


@pytest.mark.gpu
@UNPACKED
@pytest.mark.parametrize("home", ["cpu", "cuda"])
@table(EACH_TENSOR)
def test_another_device(cuda: str, call: Callable[..., Any], home: str, row: Row) -> None:
    away, name = "cpu" if home == "cuda" else "cuda", row.name
    args = {**good(maker(home)), **row.apply(maker(away))}
    if name == "q":  # the others are measured by the first tensor
        name, home, away = "k", away, home
    refuses(call, args, ValueError, name, f"expected device {home}:0", f"got {away}:0")


# ---- position values on a CPU -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [2**31, -(2**31) - 1, 2**40 + 5, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("at", [0, 2])
def test_a_position_beyond_int32(bad: int, at: int) -> None:
    args = good(maker("cpu"))
    args["positions"][at] = bad
    texts = ("[-2147483648, 2147483647]", f"got {bad}")
    for call in (qkrope.qk_norm_rope, qkrope.qk_norm_rope_):
        refuses(call, args, ValueError, "positions", *texts)
    qkv = packed(args, torch.randn(3, 32))
    refuses(qkrope.qkv_norm_rope_, qkv, ValueError, "positions", *texts)
    pair = {**args, "positions": (torch.arange(3), args["positions"])}
    refuses(qkrope.qk_norm_rope_, pair, ValueError, "positions[1]", *texts)


def test_only_positions_that_are_used_count() -> None:
    """Gaps of a strided tensor are not read, and without tokens or rotation nothing is."""
    n = maker("cpu")
    args, far = good(n), torch.full((3,), 2**40)
    gaps = torch.tensor([0, 2**40, 1, 2**40, 2, 2**40])
    qkrope.qk_norm_rope(**{**args, "positions": gaps[::2]})
    qkrope.qk_norm_rope(**{**args, "positions": far, "spec": NO_ROPE})
    none = {"q": n(0, 2, 8), "k": n(0, 1, 8)}
    qkrope.qk_norm_rope(**{**args, **none, "positions": far[:1]})
    for positions in (far, far[:1], far[0]):
        wrong = {**args, "positions": positions}
        refuses(qkrope.qk_norm_rope, wrong, ValueError, "positions", "got 1099511627776")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1, -(2**31)])
def test_a_row_outside_the_cache(dtype: torch.dtype, bad: int) -> None:
    n = maker("cpu")
    args = {**good(n), "cos_sin_cache": n(9, 4)}
    args["positions"] = torch.tensor([0, 8, bad], dtype=dtype)
    texts = ("values in [0, 8]", "rows of cos_sin_cache", f"got {bad}")
    for call in (qkrope.qk_norm_rope, qkrope.qk_norm_rope_):
        refuses(call, args, ValueError, "positions", *texts)
    args["positions"][2] = 8
    qkrope.qk_norm_rope(**args)


# ---- the rest -----------------------------------------------------------------------------------


def test_functorch_is_refused(device: str) -> None:
    """A batched tensor has no memory of its own."""
    args = good(maker(device))

    def one(q: Tensor) -> Tensor:
        return qkrope.qk_norm_rope(**{**args, "q": q})[0]

    with pytest.raises(TypeError, match="^q: expected a dense tensor with memory of its own, got"):
        torch.func.vmap(one)(torch.stack([args["q"], args["q"]]))


def test_a_length_beyond_the_limit_of_a_scaling_that_uses_it() -> None:
    scaling = DynamicNTK(factor=2.0, original_max_position_embeddings=4)
    args = {**good(maker("cpu")), "spec": replace(SPEC, rope=Rope(dim=4, scaling=scaling))}
    qkrope.qk_norm_rope(**args, seq_len=5)
    wrong = {**args, "seq_len": 2**40, "positions": torch.arange(3, dtype=I64)}
    refuses(qkrope.qk_norm_rope, wrong, ValueError, "seq_len", "got 1099511627776")
