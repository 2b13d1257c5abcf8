"""out= and memory that tensors share: what is written is written once, and read by nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import qkrope
from qkrope.spec import Spec
from refusals import FP32, SPEC, UNPACKED, Row, good, keep_plans, maker, refuses, table

SEPARATE = "expected separate memory"
SAME = "expected the same view or separate memory"


@pytest.fixture(autouse=True)
def warm() -> None:
    keep_plans()


# ---- out= -------------------------------------------------------------------------------------


@UNPACKED
@table("""
out=n(2, 3, 2, 8)                                 | T | out | a pair, got Tensor
out=(n(3, 2, 8),) * 3                             | T | out | a pair | a tuple of 3
out=(n(3, 1, 8), n(3, 1, 8))                      | V | out[0] | shape [3, 2, 8] of q, got [3, 1, 8]
out=(n(3, 16), n(3, 1, 8))                        | V | out[0] | shape [3, 2, 8] of q, got [3, 16]
out=(n(3, 2, 8), n(4, 1, 8))                      | V | out[1] | shape [3, 1, 8] of k, got [4, 1, 8]
out=(n(3, 2, 8, dtype=FP32), n(3, 1, 8))          | T | out[0] | the dtype of q, got float32
out=(n(3, 2, 8), n(3, 1, 8, dtype=FP16))          | T | out[1] | the dtype of k, got float16
out=(n(3, 2, 8), n(3, 1, 8, dtype=I16))           | T | out[1] | bfloat16 or float16, got int16
out=(n(3, 2, 16)[..., ::2], n(3, 1, 8))           | V | out[0] | stride 1 | got 2
out=(n(1, 2, 8).expand(3, 2, 8), n(3, 1, 8))      | V | out[0] | share memory
out=(n(3, 1, 8).expand(3, 2, 8), n(3, 1, 8))      | V | out[0] | share memory
out=(n(3, 2, 8), n(30).as_strided((3, 1, 8), (7, 8, 1))) | V | out[1] | share memory
q=None, out=(n(3, 2, 8), n(3, 1, 8))              | V | out[0] | expected None, since q is None
k=None, out=(n(3, 2, 8), n(3, 1, 8))              | V | out[1] | expected None, since k is None
""")
def test_a_wrong_out(device: str, call: Callable[..., Any], row: Row) -> None:
    n = maker(device)
    refuses(call, {**good(n), **row.apply(n)}, row.error, row.name, *row.texts)


def test_out_of_place_needs_both_outs(device: str) -> None:
    args = good(maker(device))
    for out, name in (((None, args["k"]), "out[0]"), ((args["q"], None), "out[1]")):
        wrong = {**args, "out": out}
        refuses(qkrope.qk_norm_rope, wrong, TypeError, name, "expected a tensor, got None")


def rows(b: Tensor, at: int, heads: int, strides: tuple[int, int] | None = None) -> Tensor:
    """[3, heads, 8] in a buffer."""
    return b.as_strided((3, heads, 8), (*(strides or (8 * heads, 8)), 1), at)


# Where q, k, out[0] and out[1] begin in one buffer, dense unless strides are given; then what is
# refused: the first, over the second.
WRONG_PLACES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "out[0] eight elements into q": ({"q": 0, "out[0]": 8}, "out[0]", "q", SAME),
    "out[0] one element into q": ({"q": 0, "out[0]": 1}, "out[0]", "q", SAME),
    "out[0] in the last element of q": ({"q": 0, "out[0]": 47}, "out[0]", "q", SAME),
    "out[0] before q": ({"q": 47, "out[0]": 0}, "out[0]", "q", SAME),
    "out[0] at q, other strides": (
        {"q": 0, "out[0]": (0, (24, 8))}, "out[0]", "q", SAME,
    ),
    "out[0] over k": ({"k": 40, "out[0]": 0}, "out[0]", "k", SEPARATE),
    "out[1] over k": ({"k": 0, "out[1]": 1}, "out[1]", "k", SAME),
    "out[1] over q": ({"q": 0, "out[1]": 24}, "out[1]", "q", SEPARATE),
    "out[1] between the tokens of q and in one": (
        {"q": (0, (32, 8)), "out[1]": (16, (31, 8))}, "out[1]", "q", SEPARATE,
    ),
    "outs over each other": ({"out[0]": 0, "out[1]": 47}, "out[0]", "out[1]", SEPARATE),
    "outs one over the other": ({"out[0]": 8, "out[1]": 16}, "out[0]", "out[1]", SEPARATE),
}  # fmt: skip
RIGHT_PLACES: dict[str, dict[str, Any]] = {
    "the inputs": {"q": 0, "k": 48, "out[0]": 0, "out[1]": 48},
    "packed, in place": {
        "q": (0, (40, 8)), "k": (16, (40, 8)), "out[0]": (0, (40, 8)), "out[1]": (16, (40, 8)),
    },
    "touching": {"q": 0, "k": 48, "out[0]": 72, "out[1]": 120},
    "between the tokens": {
        "q": (0, (48, 8)), "k": (16, (48, 8)), "out[0]": (24, (48, 8)), "out[1]": (40, (48, 8)),
    },
    "between the heads": {
        "q": (0, (48, 24)), "k": (8, (48, 8)), "out[0]": (16, (48, 24)), "out[1]": (32, (48, 8)),
    },
    "q in place, k not": {"q": 0, "k": 48, "out[0]": 0, "out[1]": 72},
}  # fmt: skip


def placed(n: Callable[..., Tensor], places: dict[str, Any]) -> dict[str, Any]:
    b, args = n(400), good(n)
    found = {}
    for name, place in places.items():
        at, strides = place if isinstance(place, tuple) else (place, None)
        found[name] = rows(b, at, 2 if name in ("q", "out[0]") else 1, strides)
    out = (found.pop("out[0]", n(3, 2, 8)), found.pop("out[1]", n(3, 1, 8)))
    return {**args, **found, "out": out}


@UNPACKED
@pytest.mark.parametrize("which", WRONG_PLACES)
def test_out_over_something(device: str, call: Callable[..., Any], which: str) -> None:
    places, name, other, hint = WRONG_PLACES[which]
    args = placed(maker(device), places)
    refuses(call, args, ValueError, name, f"overlaps the memory of {other}", hint)


@UNPACKED
@pytest.mark.parametrize("which", RIGHT_PLACES)
def test_out_beside_everything(device: str, call: Callable[..., Any], which: str) -> None:
    args = placed(maker(device), RIGHT_PLACES[which])
    apart = {**args, "q": args["q"].clone(), "k": args["k"].clone(), "out": None}
    expected = qkrope.qk_norm_rope(**apart)
    call(**args)
    for y, want in zip(args["out"], expected, strict=True):
        assert torch.equal(y, want)


# ---- memory that q and k share ----------------------------------------------------------------

OVERLAP = {
    "k is q's first head": (None, 0, (16, 8)),
    "k is q's last head": (None, 8, (16, 8)),
    "the last element": (None, 47, (8, 8)),
    "one channel": ((32, 8), 15, (32, 8)),
    "rows cross": ((20, 8), 16, (21, 8)),
    "k inside q": (None, 4, (9, 8)),
}
APART = {
    "packed": ((32, 8), 16, (32, 8)),
    "packed, a row of V between": ((40, 8), 24, (40, 8)),
    "k between q's heads": ((24, 16), 8, (24, 8)),
    "halves of a row": ((32, 16), 8, (32, 16)),
    "rows of other lengths": ((100, 8), 24, (24, 8)),
    "touching": (None, 48, None),
}


def shared(n: Callable[..., Tensor], place: tuple[Any, int, Any]) -> dict[str, Any]:
    b = n(400)
    return {**good(n), "q": rows(b, 0, 2, place[0]), "k": rows(b, place[1], 1, place[2])}


@pytest.mark.parametrize("which", OVERLAP)
def test_overlapping_q_and_k(device: str, which: str) -> None:
    args = shared(maker(device), OVERLAP[which])
    texts = ("overlaps the memory of k", SEPARATE)
    refuses(qkrope.qk_norm_rope_, args, ValueError, "q", *texts)
    # Only what is written must be apart: out of place the same tensors are fine.
    both = qkrope.qk_norm_rope(**args)
    clones = qkrope.qk_norm_rope(**{**args, "q": args["q"].clone(), "k": args["k"].clone()})
    assert all(torch.equal(a, b) for a, b in zip(both, clones, strict=True))


@pytest.mark.parametrize("which", APART)
def test_q_and_k_among_each_other(device: str, which: str) -> None:
    args = shared(maker(device), APART[which])
    expected = qkrope.qk_norm_rope(**args)
    qkrope.qk_norm_rope_(**args)
    assert torch.equal(args["q"], expected[0]) and torch.equal(args["k"], expected[1])


def test_the_same_tensor_twice(device: str) -> None:
    n = maker(device)
    q = n(3, 2, 8)
    args = {**good(n), "q": q, "k": q, "spec": replace(SPEC, num_kv_heads=2)}
    refuses(qkrope.qk_norm_rope_, args, ValueError, "q", "overlaps the memory of k", SEPARATE)


@pytest.mark.parametrize("side", ["q", "k"])
def test_a_tensor_whose_own_elements_overlap(device: str, side: str) -> None:
    args = good(maker(device))
    x = args[side]
    for folded in (x[:1].expand(x.shape), x.as_strided(x.shape, (7, 8, 1))):
        wrong = {**args, side: folded}
        refuses(qkrope.qk_norm_rope_, wrong, ValueError, side, "share memory with each other")
        # Reading it is fine.
        got = qkrope.qk_norm_rope(**wrong)
        want = qkrope.qk_norm_rope(**{**args, side: folded.contiguous()})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


READ = ("q_weight", "k_weight", "positions", "positions[0]", "positions[1]")
READ = (*READ, "cos", "sin", "cos_sin_cache", "inv_freq")


@pytest.mark.parametrize("side", ["q", "k", "out[0]", "out[1]"])
@pytest.mark.parametrize("other", READ)
def test_writing_over_what_is_read(device: str, side: str, other: str) -> None:
    n = maker(device)
    b = n(64).zero_()
    args = good(n)
    heads = 2 if side in ("q", "out[0]") else 1
    target, end = rows(b, 0, heads), b[24 * heads - 8 :][:16]  # its last row and as much again
    if side in args:
        args[side] = target
    else:
        args["out"] = (target, n(3, 1, 8)) if heads == 2 else (n(3, 2, 8), target)
    count = end[:12].view(torch.int32)[::2]
    args |= {
        "q_weight": {"q_weight": end[4:12]},
        "k_weight": {"k_weight": end[4:12]},
        "positions": {"positions": count},
        "positions[0]": {"positions": (count, args["positions"])},
        "positions[1]": {"positions": (args["positions"], count)},
        "cos": {"cos_sin": (end[:6].view(3, 2), n(3, 2))},
        "sin": {"cos_sin": (n(3, 2), end[6:12].view(3, 2))},
        "cos_sin_cache": {"cos_sin_cache": end.view(4, 4)},
        "inv_freq": {"inv_freq": end[:4].view(FP32)},
    }[other]
    texts = (f"overlaps the memory of {other}", SEPARATE)
    refuses(qkrope.qk_norm_rope_, args, ValueError, side, *texts)


# ---- any views at all, against sets of addresses ----------------------------------------------

View = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset


@st.composite
def views(draw: st.DrawFn, tokens: int, heads: int) -> View:
    strides = (draw(st.integers(0, 9)), draw(st.integers(0, 9)), 1)
    return (tokens, heads, 2), strides, draw(st.integers(0, 12))


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[int, int], dict[str, View]]:
    tokens, heads = draw(st.integers(1, 3)), (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    found: dict[str, View] = {}
    for x, out, count in (("q", "out[0]", heads[0]), ("k", "out[1]", heads[1])):
        found[x] = draw(views(tokens, count))
        if draw(st.booleans()):
            found[out] = found[x] if draw(st.integers(0, 3)) == 0 else draw(views(tokens, count))
    if draw(st.booleans()):
        found["q_weight"] = ((2,), (1,), draw(st.integers(0, 40)))
    return heads, found


def addresses(view: View) -> list[int]:
    """Of each element, in order."""
    shape, strides, offset = view
    indices = itertools.product(*map(range, shape))
    return [offset + sum(i * s for i, s in zip(at, strides, strict=True)) for at in indices]


def nests(view: View) -> bool:
    """Rows of rows: what slicing and permuting make of a dense tensor."""
    extent = 1
    for stride, size in sorted((s, n) for n, s in zip(view[0], view[1], strict=True) if n > 1):
        if stride < extent:
            return False
        extent += stride * (size - 1)
    return True


@settings(max_examples=500, deadline=None)
@given(calls())
def test_overlap_is_found_exactly(call: tuple[tuple[int, int], dict[str, View]]) -> None:
    """Refused where an element is written twice, or written and read elsewhere; else computed."""
    heads, found = call
    at = {name: set(addresses(view)) for name, view in found.items()}
    written, wrong = {}, False
    for x, other, out in (("q", "k", "out[0]"), ("k", "q", "out[1]")):
        y = found.get(out, found[x])
        written[x] = set(addresses(y))
        wrong |= len(written[x]) < len(addresses(y))
        wrong |= addresses(y) != addresses(found[x]) and bool(written[x] & at[x])
        wrong |= bool(written[x] & (at[other] | at.get("q_weight", set())))
    wrong |= bool(written["q"] & written["k"])

    memory = torch.randn(64)
    before = memory.clone()
    x = {name: memory.as_strided(*view) for name, view in found.items()}
    apart = {name: t.clone() for name, t in x.items()}
    spec, out = Spec(*heads, 2, rope=None), (x.get("out[0]"), x.get("out[1]"))
    try:
        qkrope.qk_norm_rope_(x["q"], x["k"], x.get("q_weight"), None, None, spec, out=out)
    except ValueError as error:
        assert torch.equal(memory, before)
        # A lattice that no slicing makes may be taken for one that overlaps itself.
        outs = (found.get("out[0]", found["q"]), found.get("out[1]", found["k"]))
        assert wrong or not all(map(nests, outs)), f"refused without need: {error}"
        return
    assert not wrong, "an overlap was not found"
    weight = apart.get("q_weight")
    expected = qkrope.qk_norm_rope(apart["q"], apart["k"], weight, None, None, spec)
    for y, want in zip((x.get("out[0]", x["q"]), x.get("out[1]", x["k"])), expected, strict=True):
        assert torch.equal(y, want)
    untouched = sorted(set(range(64)) - written["q"] - written["k"])
    assert torch.equal(memory[untouched], before[untouched])
