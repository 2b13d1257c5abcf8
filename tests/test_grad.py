"""Who gets a gradient, what it costs, and which calls have none: on the eager path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import qkrope
from cases import LAYOUTS, Recipe, assert_same_bits
from grads import NAMES, Gradients, check_gradients
from qkrope.spec import Norm, Rope, Spec
from refusals import FP32, Args, good, keep_plans, maker, packed, refuses


@pytest.fixture(autouse=True)
def warm() -> None:
    keep_plans()


SPEC = Spec(5, 2, 48, rope=Rope(32, 1e6))
ALL = Recipe(replace(SPEC, v_norm=Norm(eps=1e-3)), lead=(2, 9), bias=True)

# ---- calls that have no gradient --------------------------------------------------------------

WITHOUT = ("cos", "sin", "cos_sin_cache", "inv_freq", "out[0]", "out[1]")
GRAD = ("q", "k", "q_weight", "k_weight", *WITHOUT)


def with_grad(n: Callable[..., Tensor], name: str) -> Args:
    """A good call in which one tensor requires grad; every second one is no leaf."""
    args = good(n)

    def of(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return leaf * 1 if GRAD.index(name) % 2 else leaf

    if name in ("cos", "sin"):
        args["cos_sin"] = tuple(of(n(3, 2)) if s == name else n(3, 2) for s in ("cos", "sin"))
    elif name in ("cos_sin_cache", "inv_freq"):
        args[name] = of(n(9, 4) if name == "cos_sin_cache" else n(2, dtype=FP32))
    elif name.startswith("out"):
        plain = (("out[0]", n(3, 2, 8)), ("out[1]", n(3, 1, 8)))
        args["out"] = tuple(of(x) if s == name else x for s, x in plain)
    else:
        args[name] = of(args[name])
    return args


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("q_too", [False, True])
def test_what_has_no_gradient_is_refused(device: str, name: str, q_too: bool) -> None:
    args = with_grad(maker(device), name)
    if q_too:
        args["q"].requires_grad_()
    texts = ("without requires_grad", "got one with it", "qkrope.reference.qk_norm_rope")
    refused = "q" if q_too and name.startswith("out") else name
    refuses(qkrope.qk_norm_rope, args, ValueError, refused, *texts)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            results = qkrope.qk_norm_rope(**args)
        if not name.startswith("out"):
            assert not any(y.requires_grad for y in results)


def test_a_scale_that_requires_grad_is_refused(device: str) -> None:
    args = good(maker(device))
    args["k_scale"] = torch.ones(1, 8, device=device, requires_grad=True)
    refuses(qkrope.qk_norm_rope, args, ValueError, "k_scale", "without requires_grad")


@pytest.mark.parametrize("name", ["q", "k", "q_weight", "k_weight"])
def test_no_gradient_goes_to_out(device: str, name: str) -> None:
    n = maker(device)
    args = with_grad(n, name)
    args["out"] = n(3, 2, 8), n(3, 1, 8)
    refuses(qkrope.qk_norm_rope, args, ValueError, name, "none with out=")


@pytest.mark.parametrize("name", GRAD)
def test_in_place_refuses_what_requires_grad(device: str, name: str) -> None:
    args = with_grad(maker(device), name)
    texts = ("without requires_grad in an in-place call", "got one with it", "torch.no_grad()")
    refuses(qkrope.qk_norm_rope_, args, ValueError, name, *texts)
    qkv = torch.cat([args["q"], args["k"], args["k"].detach()], 1).flatten(1)
    whole = packed(args, qkv)
    refuses(qkrope.qkv_norm_rope_, whole, ValueError, "qkv" if name in "qk" else name, *texts)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            want = qkrope.qk_norm_rope(**{**args, "out": None})
            fresh = {**args, "out": None, "q": args["q"].clone(), "k": args["k"].clone()}
            qkrope.qk_norm_rope_(**fresh)
            whole = {**whole, "out": None, "qkv": qkv.clone()}
            qkrope.qkv_norm_rope_(**whole)
        assert torch.equal(fresh["q"], want[0]) and torch.equal(fresh["k"], want[1])
        assert torch.equal(whole["qkv"][:, :16], want[0].flatten(1))


def test_errors_of_a_call_with_gradients_are_those_without(device: str) -> None:
    """The same argument, expectation and type: the call goes through no schema."""
    for change in (
        {"q_weight": [1.0]},
        {"positions": torch.zeros(3, device=device)},
        {"spec": "a Spec"},
        {"q_bias": torch.zeros(7, device=device)},
    ):
        errors = []
        for grad in (False, True):
            args = {**good(maker(device)), **change}
            args["k"].requires_grad_(grad)
            with pytest.raises((TypeError, ValueError)) as error:
                qkrope.qk_norm_rope(**args)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


def test_tensors_made_in_inference_mode_work(device: str) -> None:
    with torch.inference_mode():
        args = good(maker(device))
        q2, _ = qkrope.qk_norm_rope(**args)
    assert torch.equal(qkrope.qk_norm_rope(**args)[0], q2)


# ---- who gets one -----------------------------------------------------------------------------


def test_results_are_those_without_gradients(device: str) -> None:
    """Same bits, contiguous, and all require grad where one input does."""
    call = ALL.make(device)
    plain = qkrope.qk_norm_rope(*call.args(), **call.extras)
    assert not any(y.requires_grad for y in plain)
    call.q.requires_grad_()
    for y, want in zip(qkrope.qk_norm_rope(*call.args(), **call.extras), plain, strict=True):
        assert y.requires_grad and y.is_contiguous()
        assert_same_bits(y.detach(), want)


@pytest.mark.parametrize("needs", [*([n] for n in NAMES), ["q", "k_weight"], ["v", "q_bias"]])
def test_only_what_needs_one(device: str, needs: list[str]) -> None:
    grads = Gradients(ALL, device)
    found, every = grads.run(needs), grads.run()
    assert found.keys() == set(needs)
    for name, y in found.items():
        assert_same_bits(y, every[name])


@pytest.mark.parametrize("without", ["q", "k", "v", "qk", "qv", "kv"])
def test_a_result_that_is_not_used(device: str, without: str) -> None:
    """Its side has no gradient at all; the others have theirs."""
    grads = Gradients(ALL, device, without=without)
    found, every = grads.run(), Gradients(ALL, device).run()
    grads.check(found)
    for name, y in found.items():
        assert (y is None) == (name[0] in without), name
        if y is not None:
            assert_same_bits(y, every[name])


def test_no_result_is_used(device: str) -> None:
    q, k, *rest = Recipe(SPEC).make(device).args()
    q2, _ = qkrope.qk_norm_rope(q.requires_grad_(), k, *rest)
    (none,) = torch.autograd.grad(k.sum() + 0 * k.sum().requires_grad_(), [q], allow_unused=True)
    assert none is None and q2.requires_grad


@pytest.mark.parametrize("sides", ["q", "k"])
def test_one_side_alone(device: str, sides: str) -> None:
    both = check_gradients(ALL.but(spec=SPEC), device)
    alone = check_gradients(ALL.but(spec=SPEC, sides=sides), device)
    for name, y in alone.items():
        if name[0] in sides:
            assert_same_bits(y, both[name])


def test_one_tensor_for_two_arguments(device: str) -> None:
    """A weight of q and of k gets the sum of both gradients."""
    grads = Gradients(Recipe(SPEC, dtype=FP32), device)
    call = grads.call
    apart = {"q_weight": call.q_weight, "k_weight": call.q_weight.clone()}
    apart = {name: w.requires_grad_() for name, w in apart.items()}
    shared = call.q_weight.detach().clone().requires_grad_()

    def total(q_weight: Tensor, k_weight: Tensor) -> Tensor:
        two = qkrope.qk_norm_rope(call.q, call.k, q_weight, k_weight, call.positions, call.spec)
        return sum((y * dy).sum() for y, dy in zip(two, grads.dy, strict=False))

    a, b = torch.autograd.grad(total(**apart), list(apart.values()))
    (both,) = torch.autograd.grad(total(shared, shared), shared)
    torch.testing.assert_close(both, a + b, rtol=0, atol=0)


# ---- layouts and counts -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dy_layout", LAYOUTS)
def test_strided_inputs_and_gradients(device: str, layout: str, dy_layout: str) -> None:
    check_gradients(Recipe(SPEC, lead=(2, 5), layout=layout), device, layout=dy_layout)


def test_expanded_gradients(device: str) -> None:
    """As sum() makes them: one element for all, or one row for every token."""
    call = Recipe(SPEC, dtype=FP32).make(device)
    for reduce in (
        lambda y: y.sum(),
        lambda y: y.sum(0).square().sum(),
        lambda y: y[:, :, :1].sum(),
    ):
        leaf = call.q.detach().clone().requires_grad_()
        y, _ = qkrope.qk_norm_rope(leaf, *call.args()[1:])
        (found,) = torch.autograd.grad(reduce(y), leaf)
        y = y.detach().requires_grad_()
        (dy,) = torch.autograd.grad(reduce(y), y)
        z, _ = qkrope.qk_norm_rope(leaf, *call.args()[1:])
        (want,) = torch.autograd.grad(z, leaf, dy.contiguous())
        assert_same_bits(found, want)


@pytest.mark.parametrize("lead", [(0,), (3, 0), (1,), (), (8,), (9,), (129,)], ids=str)
def test_numbers_of_tokens(device: str, lead: tuple[int, ...]) -> None:
    """None at all give zeros for weights; others fill blocks of them or do not."""
    found = check_gradients(ALL.but(lead=lead), device)
    if 0 in lead:
        assert not any(bool(found[name].any()) for name in NAMES)


@pytest.mark.parametrize("k_lead", [(0,), (4,), (31,)], ids=str)
def test_two_lengths(device: str, k_lead: tuple[int, ...]) -> None:
    check_gradients(Recipe(SPEC, lead=(9,), k_lead=k_lead), device)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, FP32], ids=str)
def test_weights_of_another_dtype(device: str, weight_dtype: torch.dtype) -> None:
    """Their gradients have it too."""
    for dtype in (torch.bfloat16, torch.float16, FP32):
        check_gradients(ALL.but(dtype=dtype, weight_dtype=weight_dtype, seed=2), device)


# ---- bits, memory and what autograd promises --------------------------------------------------


@pytest.mark.parametrize("shape", ["channel", "head"])
def test_the_same_bits_again(device: str, shape: str) -> None:
    """Whatever the schedule of threads, and on a CPU whatever their number."""
    grads = Gradients(ALL.but(lead=(701,), weight_shape=shape), device)
    first, threads = grads.run(), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2) if device == "cpu" else (threads,) * 10:
            torch.set_num_threads(count)
            for name, y in grads.run().items():
                assert_same_bits(y, first[name], name)
    finally:
        torch.set_num_threads(threads)


def test_dx_does_not_depend_on_the_batch(device: str) -> None:
    whole = Gradients(Recipe(SPEC, lead=(301,)), device)
    found = whole.run()
    some = slice(17, 40)
    call = whole.call
    call.q, call.k, call.positions = call.q[some], call.k[some], call.positions[some]
    whole.dy = [None if dy is None else dy[some] for dy in whole.dy]
    part = whole.run()
    for name in "qk":
        assert_same_bits(part[name], found[name][some])


def test_only_inputs_are_kept() -> None:
    """The graph of a call keeps alive the tensors that were given, and makes none of its own."""
    call = ALL.make()
    call.q.requires_grad_(), call.q_weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        qkrope.qk_norm_rope(*call.args(), **call.extras)
    given = {x.data_ptr() for x in (*call.args(), *call.extras.values()) if isinstance(x, Tensor)}
    assert kept and {x.data_ptr() for x in kept} == given


@pytest.mark.parametrize("name", ["q", "k_weight", "positions", "cos"])
def test_an_input_changed_before_the_backward(name: str) -> None:
    """torch's own error, and no wrong gradient."""
    call = Recipe(SPEC, angle="pair" if name == "cos" else "spec").make()
    q = call.q.detach().clone().requires_grad_()
    inner = q * 1
    y, _ = qkrope.qk_norm_rope(inner, *call.args()[1:], **call.extras)
    changed = {"q": inner, "k_weight": call.k_weight, "positions": call.positions}
    with torch.no_grad():
        (call.extras["cos_sin"][0] if name == "cos" else changed[name]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_is_used_once_or_kept() -> None:
    call = Recipe(SPEC, dtype=FP32).make()
    call.q.requires_grad_()
    y, _ = qkrope.qk_norm_rope(*call.args())
    (first,) = torch.autograd.grad(y.sum(), call.q, retain_graph=True)
    (again,) = torch.autograd.grad(y.sum(), call.q)
    assert_same_bits(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), call.q)
