"""The SGLang / TensorRT-LLM calls: their signatures, and what they compute, against the oracle."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from typing import Any

import pytest
import torch

import qkrope
from cases import assert_criterion, assert_same_bits, fraction_correctly_rounded, guarded
from qkrope import compat, ops, reference
from qkrope.spec import Norm, Rope, Spec, YaRN

SIGNATURES = {
    "fused_qk_norm_rope": (
        "(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, base, "
        "is_neox, position_ids, factor, low, high, attention_factor, rotary_dim=None)"
    ),
    "fused_qk_norm_rope_out": (
        "(qkv, q_weight, k_weight, position_ids, num_heads_q, num_heads_k, num_heads_v, head_dim, "
        "eps, base, is_neox, factor, low, high, attention_factor, rotary_dim)"
    ),
    "can_use_fused_qk_norm_rope": (
        "(head_dim, is_neox, dtype, yarn=False, *, rotary_dim=None, device=None)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(qkrope, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    assert text == SIGNATURES[name]


# (head_dim, rotary_dim): what the originals take, and what they refuse.
DIMS = [(64, None), (128, None), (256, 64), (128, 64), (128, 96), (80, 20), (96, None), (18, 6)]
PLAIN = (1.0, 0.0, 0.0, 1.0)
# factor, low, high, attention factor: a ramp inside the pairs, one of no width, cos and sin alone.
TRIPLES = [PLAIN, (4.0, 2.0, 7.0, 1.1386), (0.5, 3.0, 3.0, 0.7), (1.0, 0.0, 0.0, 1.5)]
HEADS = (5, 2, 3)


def make(head_dim, dtype, device, lead=(6,), heads=HEADS, seed=0) -> dict[str, Any]:
    """The tensors of a call: random weights that differ, rows down to where eps decides."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(heads)
    x = torch.randn(*lead, total, head_dim, generator=draw)
    row = torch.arange(math.prod(lead) * total).view(*lead, total, 1)
    x = x * torch.tensor([1.0, 1e-3, 30.0])[row % 3]
    buffer, view = guarded(lead, total, head_dim, "contiguous", dtype, device)
    view.copy_(x)
    weights = (torch.randn(head_dim, generator=draw).to(dtype) for _ in range(2))
    q_weight, k_weight = (w.to(device) for w in weights)
    positions = torch.tensor([0, -1, 4095, 131071, 2**24 + 1, 2**31 - 1, 1]).repeat(50)
    positions = positions[: math.prod(lead)].view(lead)
    return {
        "buffer": buffer,
        "qkv": view.flatten(-2),
        "q_weight": q_weight,
        "k_weight": k_weight,
        "positions": positions.to(device),
    }


def call(tensors, head_dim, is_neox, triple, rotary_dim=None, eps=1e-6, base=1e6, heads=HEADS):
    return qkrope.fused_qk_norm_rope(
        tensors["qkv"],
        *heads,
        head_dim,
        eps,
        tensors["q_weight"],
        tensors["k_weight"],
        base,
        is_neox,
        tensors["positions"],
        *triple,
        rotary_dim,
    )


def check(before, tensors, head_dim, is_neox, triple, rotary_dim, eps=1e-6, base=1e6, heads=HEADS):
    """qkv holds the oracle's result for the Spec that the arguments spell out; V is as before."""
    factor, low, high, attention_factor = triple
    yarn = YaRN.from_ramp(factor, low, high, attention_factor)
    spec = Spec(
        heads[0],
        heads[1],
        head_dim,
        norm=Norm(eps=eps),
        rope=Rope(
            dim=head_dim if rotary_dim is None else rotary_dim,
            theta=base,
            pairing="half" if is_neox else "interleaved",
            scaling=None if triple == PLAIN else yarn,
        ),
    )
    split = [n * head_dim for n in heads]
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in before.split(split, -1))
    q2, k2, v2 = (x.unflatten(-1, (-1, head_dim)) for x in tensors["qkv"].cpu().split(split, -1))
    weights = [tensors[name].cpu() for name in ("q_weight", "k_weight", "positions")]
    refs = reference.qk_norm_rope(q, k, *weights, spec)
    terms = reference.criterion_terms(q, k, *weights, spec)
    for name, y, ref, term in zip("qk", (q2, k2), refs, terms, strict=True):
        assert_criterion(y, ref, term, y.dtype, name)
    assert_same_bits(v2, v, "v")


@pytest.mark.parametrize("triple", TRIPLES, ids=str)
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), DIMS)
def test_bfloat16(head_dim, rotary_dim, is_neox, triple, device):
    tensors = make(head_dim, torch.bfloat16, device)
    before = tensors["qkv"].cpu().clone()
    outside = tensors["buffer"].outside()
    assert call(tensors, head_dim, is_neox, triple, rotary_dim) is None
    check(before, tensors, head_dim, is_neox, triple, rotary_dim)
    assert torch.equal(tensors["buffer"].outside(), outside)


@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(0,), (1,), (13,), (2, 3)])
def test_types_and_shapes_that_the_originals_refuse(lead, dtype, positions, device):
    triple = (8.0, 4.0, 20.0, 1.2)
    tensors = make(128, dtype, device, lead)
    tensors["positions"] = tensors["positions"].to(positions)
    before = tensors["qkv"].cpu().clone()
    call(tensors, 128, True, triple, 64, eps=1e-5, base=1e4)
    check(before, tensors, 128, True, triple, 64, eps=1e-5, base=1e4)


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
def test_bfloat16_results_are_the_correctly_rounded_ones(is_neox, device):
    """At least 99.9 % of them; 300 tokens x 7 heads x 128 leave 260 elements for chance."""
    tensors = make(128, torch.bfloat16, device, (300,))
    tensors["positions"] = torch.arange(1_000_000, 1_000_300, device=device)
    before = tensors["qkv"].cpu().clone()
    call(tensors, 128, is_neox, PLAIN)
    spec = Spec(5, 2, 128, rope=Rope(theta=1e6, pairing="half" if is_neox else "interleaved"))
    weights = [tensors[name].cpu() for name in ("q_weight", "k_weight", "positions")]
    ref = reference.qkv_norm_rope(before, *weights, spec)[:, : 7 * 128]
    share = fraction_correctly_rounded(tensors["qkv"].cpu()[:, : 7 * 128], ref)
    assert share >= 0.999, share


@pytest.mark.parametrize("heads", [(1, 1, 0), (8, 1, 1), (1, 4, 2)])
def test_head_counts(heads, device):
    tensors = make(64, torch.bfloat16, device, heads=heads)
    before = tensors["qkv"].cpu().clone()
    call(tensors, 64, True, PLAIN, heads=heads)
    check(before, tensors, 64, True, PLAIN, None, heads=heads)


def test_out_is_in_place_with_its_own_argument_order(device):
    triple = (4.0, 2.0, 7.0, 1.1386)
    one, two = (make(128, torch.bfloat16, device, seed=5) for _ in range(2))
    call(one, 128, False, triple, 96)
    result = qkrope.fused_qk_norm_rope_out(
        two["qkv"], two["q_weight"], two["k_weight"], two["positions"], *HEADS, 128, 1e-6, 1e6,
        False, *triple, 96,
    )  # fmt: skip
    assert result is None
    assert_same_bits(one["qkv"], two["qkv"])


def test_arguments_go_by_name_too(device):
    one, two = (make(64, torch.float32, device) for _ in range(2))
    call(one, 64, True, PLAIN)
    qkrope.fused_qk_norm_rope(
        qkv=two["qkv"], num_heads_q=5, num_heads_k=2, num_heads_v=3, head_dim=64, eps=1e-6,
        q_weight=two["q_weight"], k_weight=two["k_weight"], base=1000000, is_neox=True,
        position_ids=two["positions"], factor=1, low=0, high=0, attention_factor=1,
    )  # fmt: skip
    assert_same_bits(one["qkv"], two["qkv"])


def test_a_plain_call_ignores_the_ramp_and_an_equal_factor_is_plain():
    plain, ramp = (make(64, torch.float32, "cpu") for _ in range(2))
    call(plain, 64, True, PLAIN)
    call(ramp, 64, True, (1.0, 3.0, 9.0, 1.0))
    assert_same_bits(plain["qkv"], ramp["qkv"])


GOOD: dict[str, Any] = {
    "num_heads_q": 5,
    "num_heads_k": 2,
    "num_heads_v": 3,
    "head_dim": 64,
    "eps": 1e-6,
    "base": 1e6,
    "is_neox": True,
    "factor": 4.0,
    "low": 2.0,
    "high": 7.0,
    "attention_factor": 1.1,
    "rotary_dim": None,
}
NAN = float("nan")
BAD = [
    *((name, value, ValueError) for name in ("num_heads_q", "num_heads_k") for value in (0, -1)),
    ("num_heads_v", -1, ValueError),
    *(("head_dim", value, ValueError) for value in (0, 63, 1026)),
    *(("rotary_dim", value, ValueError) for value in (0, 31, 66, -2)),
    *(("eps", value, ValueError) for value in (-1e-6, NAN)),
    *(("base", value, ValueError) for value in (0.0, -1.0, NAN)),
    *(("factor", value, ValueError) for value in (0.0, -2.0, NAN)),
    *(("attention_factor", value, ValueError) for value in (0.0, NAN)),
    *((name, value, ValueError) for name in ("low", "high") for value in (NAN, math.inf)),
    *((name, "3", TypeError) for name in GOOD),
    *((name, [3], TypeError) for name in GOOD),
    *((name, torch.tensor(3), TypeError) for name in GOOD),
]


@pytest.mark.parametrize(
    ("name", "value", "error"), BAD, ids=[f"{name}-{value}" for name, value, _ in BAD]
)
def test_a_bad_argument_is_named_and_nothing_is_written(name, value, error):
    tensors = make(64, torch.bfloat16, "cpu")
    before = tensors["qkv"].clone()
    numbers = {**GOOD, name: value}
    operands = {"qkv": tensors["qkv"], "position_ids": tensors["positions"]}
    operands |= {key: tensors[key] for key in ("q_weight", "k_weight")}
    for function in (qkrope.fused_qk_norm_rope, qkrope.fused_qk_norm_rope_out):
        with pytest.raises(error, match=f"{name}: expected .*, got"):
            function(**operands, **numbers)
    assert_same_bits(tensors["qkv"], before)


@pytest.mark.parametrize(
    ("name", "value"), [("num_heads_q", 6), ("num_heads_v", 2), ("head_dim", 32)]
)
def test_the_packed_width_is_checked_by_name(name, value):
    tensors = make(64, torch.bfloat16, "cpu")
    before = tensors["qkv"].clone()
    numbers = {**GOOD, name: value}
    expected = numbers["head_dim"] * sum(numbers[f"num_heads_{side}"] for side in "qkv")
    with pytest.raises(ValueError, match=rf"num_heads_v\) \* head_dim = {expected}, got 640"):
        qkrope.fused_qk_norm_rope(
            qkv=tensors["qkv"],
            position_ids=tensors["positions"],
            q_weight=tensors["q_weight"],
            k_weight=tensors["k_weight"],
            **numbers,
        )
    assert_same_bits(tensors["qkv"], before)


@pytest.mark.parametrize("qkv", [None, [1.0], 3.0, torch.tensor(1.0)], ids=repr)
def test_qkv_that_is_no_packed_tensor(qkv):
    tensors = make(64, torch.bfloat16, "cpu")
    tensors["qkv"] = qkv
    with pytest.raises((TypeError, ValueError), match="expected"):
        call(tensors, 64, True, PLAIN)


def test_a_repeated_call_makes_no_new_spec(monkeypatch):
    tensors = make(64, torch.bfloat16, "cpu")
    call(tensors, 64, True, PLAIN, eps=1.5e-6)
    seen = []
    monkeypatch.setattr(compat, "_make", lambda *key: pytest.fail("built a Spec again"))
    monkeypatch.setattr(ops, "qkv_norm_rope_", lambda *args: seen.append(args[-1]))
    call(tensors, 64, True, PLAIN, eps=1.5e-6)
    call(tensors, 64, True, PLAIN, eps=1.5e-6)
    assert seen[0] is seen[1] and seen[0].norm.eps == 1.5e-6


def test_the_specs_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(compat, "_MAX_SPECS", 3)
    monkeypatch.setattr(ops, "qkv_norm_rope_", lambda *args: None)
    monkeypatch.setattr(compat, "_specs", {})
    tensors = make(64, torch.bfloat16, "cpu")
    for eps in range(1, 9):
        call(tensors, 64, True, PLAIN, eps=float(eps))
        assert 1 <= len(compat._specs) <= 3


# ---- can_use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), DIMS)
def test_can_use_on_the_cpu(head_dim, rotary_dim, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for is_neox, yarn in itertools.product((True, False), repeat=2):
            options = {"rotary_dim": rotary_dim, "device": "cpu"}
            assert qkrope.can_use_fused_qk_norm_rope(head_dim, is_neox, dtype, yarn, **options)


REASONS = [
    ((63, True, torch.bfloat16), {}, "head_dim: expected an even int"),
    ((2048, True, torch.bfloat16), {}, "head_dim: expected an even int"),
    ((64, True, torch.bfloat16), {"rotary_dim": 128}, "rotary_dim: expected an even int"),
    ((64, True, torch.bfloat16), {"rotary_dim": 31}, "rotary_dim: expected an even int"),
    ((64, True, torch.float64), {}, "dtype: expected one of float32, bfloat16, float16"),
    ((64, True, torch.int8), {}, "dtype: expected one of float32, bfloat16, float16"),
    ((64, True, torch.bfloat16), {"device": "meta"}, "device: expected cpu or cuda"),
]


@pytest.mark.parametrize(("args", "options", "reason"), REASONS, ids=[r[2] for r in REASONS])
def test_can_use_says_why_not(args, options, reason):
    with pytest.warns(UserWarning, match=reason) as caught:
        assert qkrope.can_use_fused_qk_norm_rope(*args, **{"device": "cpu", **options}) is False
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("64", True, torch.bfloat16), "head_dim"),
        ((64, 1, torch.bfloat16), "is_neox"),
        ((64, True, "bfloat16"), "dtype"),
        ((64, True, torch.bfloat16, 4.0), "yarn"),
    ],
)
def test_can_use_raises_for_a_wrong_type(args, name):
    with pytest.raises(TypeError, match=f"{name}: expected"):
        qkrope.can_use_fused_qk_norm_rope(*args, device="cpu")


def test_can_use_picks_the_device_it_finds(monkeypatch):
    built = []
    monkeypatch.setattr(ops, "build_variant", lambda *args: built.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert qkrope.can_use_fused_qk_norm_rope(128, True, torch.bfloat16, rotary_dim=64)
    ((spec, device, dtype, weight_dtype),) = built
    assert device == torch.device("cuda") and dtype is weight_dtype is torch.bfloat16
    assert (spec.head_dim, spec.rotary_dim, spec.rope.pairing) == (128, 64, "half")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert qkrope.can_use_fused_qk_norm_rope(128, True, torch.bfloat16)
    assert len(built) == 1
    with pytest.warns(UserWarning, match="device: expected a CUDA device"):
        assert not qkrope.can_use_fused_qk_norm_rope(128, True, torch.bfloat16, device="cuda")


def test_a_compile_error_is_raised(monkeypatch):
    def fail(*args):
        raise qkrope.CompileError("no compiler")

    monkeypatch.setattr(ops, "build_variant", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(qkrope.CompileError, match="no compiler"):
        qkrope.can_use_fused_qk_norm_rope(128, True, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("triple", TRIPLES[:2], ids=str)
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
def test_after_can_use_no_call_compiles(is_neox, triple, cuda, monkeypatch):
    from qkrope.cuda import launch

    dims = (176, 44)  # of no other test, so that can_use itself has to build them
    assert qkrope.can_use_fused_qk_norm_rope(dims[0], is_neox, torch.bfloat16, rotary_dim=dims[1])
    monkeypatch.setattr(launch, "compile_variant", lambda *args: pytest.fail("compiled again"))
    tensors = make(dims[0], torch.bfloat16, cuda)
    before = tensors["qkv"].cpu().clone()
    call(tensors, dims[0], is_neox, triple, dims[1])
    check(before, tensors, dims[0], is_neox, triple, dims[1])
