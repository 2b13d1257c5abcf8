"""Wrong options of a call, each refused by name.

As test_errors.py, for biases, scales, ranges of tokens, V and axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkrope
from qkrope.extras import NAMES
from refusals import (
    UNPACKED,
    V_NORM,
    Row,
    good,
    maker,
    packed,
    refuses,
    table,
)

OPTIONS = """
q_bias=n(4)                         | V | q_bias | shape [8] or [2, 8], got [4]
k_bias=n(2, 8)                      | V | k_bias | shape [8] or [1, 8], got [2, 8]
q_bias=n(8, dtype=FP64)             | T | q_bias | float32, bfloat16 or float16 | got float64
k_bias=n(16)[::2]                   | V | k_bias | stride 1, got 2
q_bias="x"                          | T | q_bias | a tensor or None, got a str
spec=NO_NORM, q_weight=None, k_weight=None, q_bias=n(8) | V | q_bias | expected None | "none"
q_scale="x"                         | T | q_scale | a finite number | got 'x'
q_scale=True                        | T | q_scale | a finite number | got True
k_scale=float("inf")                | V | k_scale | a finite number | got inf
k_scale=1e39                        | V | k_scale | that float32 can hold | got 1e+39
q_scale=n(3, 1, 1, dtype=FP64)      | T | q_scale | float32 or the dtype of q | got float64
q_scale=n(2, 1, 1, dtype=FP32)      | V | q_scale | broadcasts to [3, 2, 8] of q, got [2, 1, 1]
q_scale=n(1, 3, 1, 1, dtype=FP32)   | V | q_scale | broadcasts to [3, 2, 8] of q, got [1, 3, 1, 1]
k_scale=n(4, dtype=FP32)            | V | k_scale | broadcasts to [3, 1, 8] of k, got [4]
q_scale=torch._neg_view(n(1))       | V | q_scale | memory holds its values | resolve_neg()
rotate_from=-1                      | V | rotate_from | an int in [0, 2147483648], got -1
rotate_from=1.0                     | T | rotate_from | an int | got 1.0
rotate_from=None                    | T | rotate_from | an int | got None
rotate_from=4                       | V | rotate_from, rotate_to | the 3 tokens of q, got [4, 3)
rotate_to=4                         | V | rotate_from, rotate_to | the 3 tokens of q, got [0, 4)
rotate_from=2, rotate_to=1          | V | rotate_from, rotate_to | the 3 tokens of q, got [2, 1)
spec=NO_ROPE, rotate_from=1         | V | rotate_from | expected None | spec.rope is None
spec=NO_ROPE, rotate_to=3           | V | rotate_to | expected None | spec.rope is None
rotate_from=1, cos_sin=(n(3, 2), n(3, 2)) | V | cos | broadcast to [2] of q | got shape [3, 2]
v=n(3, 1, 8)                        | V | v | expected None | no v_norm
v_weight=n(8)                       | V | v_weight | expected None | without a v
spec=V_NORM, v_weight=n(8)          | V | v_weight | expected None | without a v
spec=V_NORM, v=n(3, 2, 8)           | V | v | [..., 1 heads, 8 head_dim] | got [3, 2, 8]
spec=V_NORM, v=n(3, 1, 8, dtype=FP32) | T | v | the dtype of q (bfloat16) | got float32
spec=V_NORM, v=n(3, 1, 8), v_weight=n(4) | V | v_weight | shape [8] or [1, 8], got [4]
spec=V_NORM, v=[1.0]                | T | v | tensor | got
spec=AXES                           | V | positions | shape [2 axes, ...], got [3]
spec=AXES, positions=n(3, 3, dtype=I64) | V | positions | shape [2 axes, ...], got [3, 3]
spec=AXES, positions=n(2, 4, dtype=I64) | V | positions | broadcast to [3] of q | got shape [4]
norm=1                              | T | norm | a keyword of qkrope.qk_norm_rope | got
"""


@UNPACKED
@table(OPTIONS)
def test_a_wrong_option(device: str, call: Callable[..., Any], row: Row) -> None:
    n = maker(device)
    refuses(call, {**good(n), **row.apply(n)}, row.error, row.name, *row.texts)


# ---- memory and gradients ---------------------------------------------------------------------


def options(n: Callable[..., Tensor]) -> dict[str, Any]:
    """A call with every option that takes a tensor, and V."""
    return {
        **good(n),
        "spec": V_NORM,
        "q_bias": n(8),
        "k_bias": n(8),
        "q_scale": n(3, 1, 1),
        "k_scale": n(8),
        "cos_sin": ((n(3, 2), n(3, 2)), (n(3, 1, 2), n(3, 1, 2))),
        "v": n(3, 1, 8),
        "v_weight": n(8),
    }


TABLES = {"q cos": (0, 0), "q sin": (0, 1), "k cos": (1, 0), "k sin": (1, 1)}
EXTRA = ("q_bias", "k_bias", "q_scale", "k_scale", "v_weight", *TABLES)


def exchange(args: dict[str, Any], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with one tensor changed."""
    if name not in TABLES:
        return {**args, name: change(args[name])}
    tables = [list(pair) for pair in args["cos_sin"]]
    side, which = TABLES[name]
    tables[side][which] = change(tables[side][which])
    return {**args, "cos_sin": tuple(tuple(pair) for pair in tables)}


def test_the_call_with_every_option_is_good() -> None:
    args = options(maker("cpu"))
    q2, k2, v2 = qkrope.qk_norm_rope(**args)
    out = tuple(torch.empty_like(x) for x in (q2, k2, v2))
    assert qkrope.qk_norm_rope_(**args, out=out) is None
    assert all(torch.equal(a, b) for a, b in zip(out, (q2, k2, v2), strict=True))
    qkrope.qk_norm_rope_(**args)
    for name, want in zip("qkv", out, strict=True):
        assert torch.equal(args[name], want)


@pytest.mark.parametrize("side", ["q", "k", "v"])
@pytest.mark.parametrize("other", EXTRA)
def test_writing_over_an_option(side: str, other: str) -> None:
    """An argument that begins in the last row of what is written."""
    args = options(maker("cpu"))
    heads = args[side].shape[-2]
    b = torch.zeros(24 * heads + 16, dtype=torch.bfloat16)
    args[side] = b[: 24 * heads].view(3, heads, 8)

    def into(x: Tensor) -> Tensor:
        return b[24 * heads - 4 :][: x.numel()].view(x.shape)

    wrong = exchange(args, other, into)
    refuses(qkrope.qk_norm_rope_, wrong, ValueError, side, f"overlaps the memory of {other}")


@pytest.mark.parametrize("first, second", [("q", "v"), ("k", "v"), ("v", "v")])
def test_writing_over_v(first: str, second: str) -> None:
    args = options(maker("cpu"))
    if first == second:
        args["v"] = args["v"][:1].expand(3, 1, 8)
        return refuses(qkrope.qk_norm_rope_, args, ValueError, "v", "share memory with each other")
    args["v"] = args[first][:, :1]
    refuses(qkrope.qk_norm_rope_, args, ValueError, first, "overlaps the memory of v")


@pytest.mark.parametrize("name", [*EXTRA, "v"])
def test_an_option_that_requires_grad(name: str) -> None:
    args = exchange(options(maker("cpu")), name, lambda x: x.requires_grad_())
    if name in NAMES:  # which have a gradient
        assert all(y.requires_grad for y in qkrope.qk_norm_rope(**args))
    name = name.removeprefix("q ") if name in TABLES else name
    for call in (qkrope.qk_norm_rope, qkrope.qk_norm_rope_)[name in NAMES :]:
        refuses(call, args, ValueError, name, "without requires_grad", "got one with it")
    with torch.no_grad():
        assert not any(y.requires_grad for y in qkrope.qk_norm_rope(**args))


@pytest.mark.parametrize("out", [2, 1, 4])
def test_out_with_v(out: int) -> None:
    """Three places beside v; the pair, which is enough without it, or anything else is refused."""
    n = maker("cpu")
    args = options(n)
    args["out"] = (n(3, 2, 8), n(3, 1, 8), n(3, 1, 8), n(3, 1, 8))[:out]
    for call in (qkrope.qk_norm_rope, qkrope.qk_norm_rope_):
        refuses(call, args, TypeError, "out", "three tensors (q, k, v)")
    whole = {**good(n), "spec": V_NORM, "out": args["out"]}
    refuses(qkrope.qkv_norm_rope_, packed(whole, n(3, 32)), TypeError, "out", "three tensors")


def test_packed_out_with_v() -> None:
    """q, k and v go where the caller says, and the packed tensor stays."""
    n = maker("cpu")
    args, qkv = {**good(n), "spec": V_NORM, "v_weight": n(8)}, n(3, 32)
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in qkv.split([16, 8, 8], -1))
    want = qkrope.qk_norm_rope(**{**args, "q": q, "k": k}, v=v)
    out, before = (n(3, 2, 8), n(3, 1, 8), n(3, 1, 8)), qkv.clone()
    qkrope.qkv_norm_rope_(**packed(args, qkv), out=out)
    assert torch.equal(qkv, before)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
