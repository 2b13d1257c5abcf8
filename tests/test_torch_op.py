"""The torch ops: schemas, fakes, bits, errors, gradients that are not lost, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkrope
from cases import Recipe, assert_same_bits
from op_calls import CPU, OPTIONS, RECIPES, SPEC, flat, outputs
from qkrope import torch_op  # noqa: F401  registers the ops
from qkrope.spec import Rope, Spec

OPS = torch.ops.qkrope
BF16 = torch.bfloat16


# ---- the ops ----------------------------------------------------------------------------------


def test_schemas_say_what_is_written() -> None:
    written = {
        f"{packet}.{overload}": [
            a.name
            for a in getattr(getattr(OPS, packet), overload)._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        for packet, overload in (
            ("qk_norm_rope", "default"),
            ("qk_norm_rope", "out"),
            ("qk_norm_rope_", "default"),
            ("qkv_norm_rope_", "default"),
            ("qkv_norm_rope_", "more"),
            ("qkv_norm_rope_", "out"),
        )
    }
    assert written == {
        "qk_norm_rope.default": [],
        "qk_norm_rope.out": ["q_out", "k_out", "v_out"],
        "qk_norm_rope_.default": ["q", "k", "v"],
        "qkv_norm_rope_.default": ["qkv"],
        "qkv_norm_rope_.more": ["qkv"],
        "qkv_norm_rope_.out": ["q_out", "k_out", "v_out"],
    }


@pytest.mark.parametrize("case", CPU)
def test_opcheck(case: str, device: str) -> None:
    """Mutation as the schema says, the fake as the op, the same under AOT with dynamic shapes."""
    if device != "cpu" and case in OPTIONS:
        pytest.skip("only the CPU kernels run this option")
    call = CPU[case].make(device)
    out = {"out": outputs(call)}
    ops = [
        (OPS.qk_norm_rope.default, flat(call, call.q, call.k)),
        (OPS.qk_norm_rope.out, flat(call, call.q, call.k, **out)),
        (OPS.qk_norm_rope_.default, flat(call, call.q, call.k)),
    ]
    if call.qkv is not None:
        args, more = flat(call, call.qkv)
        ops.append((OPS.qkv_norm_rope_.more, (args, more)))
        ops.append((OPS.qkv_norm_rope_.out, flat(call, call.qkv, **out)))
        if not more:
            ops.append((OPS.qkv_norm_rope_.default, (args, {})))
    for op, (args, more) in ops:
        torch.library.opcheck(op, args, more)


def test_an_op_has_the_bits_of_the_call(device: str) -> None:
    recipe = RECIPES["packed"]
    want = recipe.make(device)
    qkrope.qkv_norm_rope_(want.qkv, *want.rest())
    for grad in (False, True):
        call = recipe.make(device)
        with torch.set_grad_enabled(grad):
            OPS.qkv_norm_rope_(*flat(call, call.qkv)[0])
        assert_same_bits(call.qkv, want.qkv)
        call.assert_guards()
        q, k = OPS.qk_norm_rope(*flat(*(c := recipe.make(device), c.q, c.k))[0])
        assert_same_bits(q, want.q)
        assert_same_bits(k, want.k)


def test_an_absent_side_has_no_result(device: str) -> None:
    call = Recipe(SPEC, sides="k").make(device)
    (k,) = OPS.qk_norm_rope(*flat(call, call.q, call.k)[0])
    call.check(None, k)


def test_an_out_without_a_tensor_is_refused() -> None:
    """None there would mean the input itself, which these schemas say is not written."""
    call = RECIPES["packed"].make()
    q_out, k_out = outputs(call)
    for op, inputs in (
        (OPS.qk_norm_rope.out, (call.q, call.k)),
        (OPS.qkv_norm_rope_.out, (call.qkv,)),
    ):
        for given, name in (((None, k_out), "out[0]"), ((q_out, None), "out[1]"), ((), "out[0]")):
            args, more = flat(call, *inputs, out=given)
            with pytest.raises(TypeError, match=rf"^{name[:3]}\[{name[4]}\]: expected a tensor"):
                op(*args, **more)
    call.assert_inputs_unchanged()
    call = OPTIONS["v"].make()
    *two, _ = outputs(call)
    for op, inputs in (
        (OPS.qk_norm_rope.out, (call.q, call.k)),
        (OPS.qkv_norm_rope_.out, (call.qkv,)),
    ):
        args, more = flat(call, *inputs, out=two)
        with pytest.raises(TypeError, match=r"^out\[2\]: expected a tensor"):
            op(*args, **more)
    call.assert_inputs_unchanged()


def test_a_text_that_is_no_spec_is_refused() -> None:
    call = RECIPES["packed"].make()
    args, _ = flat(call, call.qkv)
    for text in ("", "{}", args[-1].replace("head_dim", "head_size")):
        with pytest.raises(ValueError, match="^text: expected"):
            OPS.qkv_norm_rope_(*args[:-1], text)
    call.assert_inputs_unchanged()


# ---- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inv_freq", "cos"])
def test_no_gradient_is_lost(name: str) -> None:
    """A traced call, and an op called by itself, raise where the eager call does."""
    call = Recipe(SPEC, angle="inv_freq32" if name == "inv_freq" else "pair").make()
    q, k, w, _, p, _ = call.args()

    def public(q: Tensor, leaf: Tensor) -> Tensor:
        angle = {"inv_freq": leaf} if name == "inv_freq" else {"cos_sin": (leaf, leaf.detach())}
        return qkrope.qk_norm_rope(q * 1, k, w, w, p, SPEC, **angle)[0]

    def raw(q: Tensor, leaf: Tensor) -> Tensor:
        angle = {"inv_freq": leaf} if name == "inv_freq" else {"cos": leaf, "sin": leaf.detach()}
        return OPS.qk_norm_rope(q * 1, k, w, w, p, SPEC.canonical(), **angle)[0]

    leaf = call.extras["inv_freq"] if name == "inv_freq" else call.extras["cos_sin"][0]
    leaf.requires_grad_()
    text = f"{name}: expected a tensor without requires_grad"
    for function in (public, raw):
        for q_too in (False, True):
            with pytest.raises(ValueError, match=text):
                function(q.requires_grad_(q_too), leaf)
        for fullgraph in (False, True):
            compiled = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)
            with pytest.raises((ValueError, RuntimeError), match=text):
                compiled(q, leaf)
        with torch.no_grad():
            assert torch.equal(compiled(q, leaf), public(q, leaf))


def test_in_place_refuses_what_requires_grad() -> None:
    call = RECIPES["packed"].make()
    weight = call.q_weight.requires_grad_()

    @torch.compile(backend="eager")
    def packed() -> None:
        qkrope.qkv_norm_rope_(call.qkv, *call.rest())

    @torch.compile(backend="eager")
    def apart() -> None:
        qkrope.qk_norm_rope_(*call.args())

    for function in (packed, apart):
        with pytest.raises(
            (ValueError, RuntimeError), match="q_weight: expected .* in an in-place call"
        ):
            function()
    weight.requires_grad_(False)
    call.assert_inputs_unchanged()


# ---- CUDA graphs ------------------------------------------------------------------------------


@pytest.mark.gpu
@torch.no_grad()
def test_an_op_in_a_cuda_graph(cuda: str) -> None:
    recipe = Recipe(Spec(4, 2, 64, rope=Rope(48)), layout="packed", lead=(9,))
    call = recipe.make(cuda)
    qkrope.warmup(call.spec, cuda, BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.qkv_norm_rope_(*flat(call, call.qkv)[0])
    graph.replay()
    call.check(call.q, call.k)
    call.assert_guards()


@pytest.mark.gpu
@torch.no_grad()
def test_a_first_call_of_an_op_while_capturing(cuda: str) -> None:
    call = Recipe(Spec(4, 2, 58, rope=Rope(46)), layout="packed", lead=(9,)).make(cuda)
    args = flat(call, call.qkv)[0]
    x = torch.ones(8, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(RuntimeError, match=r"call qkrope.warmup\(spec, device, dtype\)"):
            OPS.qkv_norm_rope_(*args)
    torch.cuda.synchronize()
    call.assert_inputs_unchanged()
    OPS.qkv_norm_rope_(*args)
    call.check(call.q, call.k)
