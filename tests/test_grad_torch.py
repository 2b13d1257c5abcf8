"""Gradients and the rest of torch: compiled graphs, checkpoints, autocast, transforms, ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkrope
from cases import Recipe, assert_same_bits
from grads import NAMES, Gradients
from op_calls import CPU, SPEC, flat
from qkrope import torch_op  # noqa: F401  registers the ops
from qkrope.spec import Norm, Rope, Spec

OPS = torch.ops.qkrope
BF16, FP32 = torch.bfloat16, torch.float32
RECIPE = Recipe(replace(SPEC, v_norm=Norm(eps=1e-3)), lead=(2, 9), bias=True, dtype=FP32)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def losses(grads: Gradients) -> Callable[..., Tensor]:
    """A call's results times the gradients they are to have, summed, from its named tensors."""
    call = grads.call
    rest = {name: x for name, x in call.extras.items() if name not in NAMES}

    def loss(named: dict[str, Tensor]) -> Tensor:
        given = {"q": None, "k": None, "q_weight": None, "k_weight": None, **rest, **named}
        outputs = qkrope.qk_norm_rope(positions=call.positions, spec=call.spec, **given)
        pairs = zip(outputs, grads.dy, strict=False)
        return sum((y.float() * dy.float()).sum() for y, dy in pairs if dy is not None)

    return loss


def leaves(grads: Gradients) -> dict[str, Tensor]:
    """Of the sides that the call has."""
    return {
        name: x.detach().clone().requires_grad_()
        for name, x in grads.named().items()
        if grads.dy["qkv".index(name[0])] is not None
    }


def gradients(function: Callable[..., Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(function(named), list(named.values()))
    return dict(zip(named, found, strict=True))


# ---- torch.compile ----------------------------------------------------------------------------


class Graphs:
    """The forward and backward graphs that AOTAutograd makes, run as they are."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            self.calls.append([str(n.target) for n in graph.graph.nodes if n.op[:4] == "call"])
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    def ours(self) -> list[list[str]]:
        return [[name for name in graph if name.startswith("qkrope.")] for graph in self.calls]


@pytest.mark.parametrize("case", CPU)
def test_a_compiled_backward_is_one_node(case: str) -> None:
    """One op forward, one backward, no break; gradients as eager ones, bit for bit."""
    grads = Gradients(CPU[case])
    graphs, named = Graphs(), leaves(grads)
    found = gradients(torch.compile(losses(grads), backend=graphs, fullgraph=True), named)
    assert graphs.ours() == [
        ["qkrope.qk_norm_rope.default"],
        ["qkrope.qk_norm_rope_backward.default"],
    ]
    grads.check(found)
    for name, y in gradients(losses(grads), named).items():
        assert_same_bits(y, found[name], name)


def test_dynamic_lengths_compile_once() -> None:
    graphs = Graphs()
    one = Spec(3, 2, 16, rope=Rope(8))
    weight = torch.randn(16, requires_grad=True)

    @torch.compile(backend=graphs, fullgraph=True, dynamic=True)
    def total(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        q2, k2 = qkrope.qk_norm_rope(q, k, weight, None, positions, one)
        return q2.square().sum() + k2.sum()

    for tokens in (5, 9, 12, 40):
        q, k = torch.randn(tokens, 3, 16, requires_grad=True), torch.randn(tokens, 2, 16)
        positions = torch.arange(tokens)
        found = torch.autograd.grad(total(q, k, positions), (q, weight))
        q2, k2 = qkrope.qk_norm_rope(q, k, weight, None, positions, one)
        want = torch.autograd.grad(q2.square().sum() + k2.sum(), (q, weight))
        for a, b in zip(found, want, strict=True):
            assert_same_bits(a, b)
    assert len(graphs.calls) == 2


@pytest.mark.slow
def test_inductor_trains_a_block(device: str) -> None:
    """Projection, qkrope and a loss in one graph of the default backend."""
    one = Spec(2, 1, 16)
    torch.manual_seed(0)
    proj = torch.nn.Linear(32, 48).to(device)
    weight = torch.nn.Parameter(torch.rand(16, device=device))
    x, positions = torch.randn(7, 32, device=device), torch.arange(7, device=device)

    def total(x: Tensor) -> Tensor:
        qk = proj(x).unflatten(-1, (3, 16))
        q, k = qkrope.qk_norm_rope(qk[:, :2], qk[:, 2:], weight, weight, positions, one)
        return (q.sum(1) * k[:, 0]).square().sum()

    parameters = (*proj.parameters(), weight)
    want = torch.autograd.grad(total(x), parameters)
    found = torch.autograd.grad(torch.compile(total, fullgraph=True)(x), parameters)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # Inductor sums in its own order


# ---- the ops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CPU)
def test_opcheck(case: str, device: str) -> None:
    """Schema, fake, autograd registration, and AOT with dynamic shapes, of both ops."""
    grads = Gradients(CPU[case], device)
    call, named = grads.call, leaves(grads)
    args, more = flat(call, named.get("q"), named.get("k"))
    args = (*args[:2], named.get("q_weight"), named.get("k_weight"), *args[4:])
    more |= {name: x for name, x in named.items() if name in more}
    torch.library.opcheck(OPS.qk_norm_rope.default, args, more)
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    more = {name: x.detach() if isinstance(x, Tensor) else x for name, x in more.items()}
    wanted = [name in named for name in NAMES[3:]]
    torch.library.opcheck(OPS.qk_norm_rope_backward.default, (*grads.dy, *detached, wanted), more)


def test_the_op_is_differentiable(device: str) -> None:
    grads = Gradients(RECIPE, device)
    named = leaves(grads)
    want = gradients(losses(grads), named)

    def by_op(named: dict[str, Tensor]) -> Tensor:
        more = {name: named[name] for name in ("q_bias", "k_bias", "v", "v_weight")}
        first = (named[name] for name in ("q", "k", "q_weight", "k_weight"))
        call = grads.call
        made = OPS.qk_norm_rope(*first, call.positions, call.spec.canonical(), **more)
        return sum((y * dy).sum() for y, dy in zip(made, grads.dy, strict=True))

    for name, y in gradients(by_op, named).items():
        assert_same_bits(y, want[name], name)


# ---- transforms and contexts ------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device: str, reentrant: bool) -> None:
    grads = Gradients(RECIPE, device)
    named = leaves(grads)
    order = list(named)

    def flat_loss(*values: Tensor) -> Tensor:
        return losses(grads)(dict(zip(order, values, strict=True)))

    def again(named: dict[str, Tensor]) -> Tensor:
        return checkpoint(flat_loss, *named.values(), use_reentrant=reentrant)

    for name, x in named.items():
        (want,) = torch.autograd.grad(losses(grads)(named), x)
        again(named).backward()
        assert_same_bits(x.grad, want, name)
        for leaf in named.values():
            leaf.grad = None


def test_autocast_changes_nothing(device: str) -> None:
    """Inputs are taken as they come, float32 weights too, and results have the dtype of q."""
    for dtype in (BF16, FP32):
        grads = Gradients(RECIPE.but(dtype=dtype, weight_dtype=FP32), device)
        want = grads.run()
        with torch.autocast(device, dtype=BF16):
            call = grads.call
            q2, *_ = qkrope.qk_norm_rope(*call.args(), **call.extras)
            found = grads.run()
        assert q2.dtype == dtype
        grads.check(found)
        for name, y in found.items():
            assert_same_bits(y, want[name], name)


def test_func_grad(device: str) -> None:
    grads = Gradients(RECIPE, device)
    named = leaves(grads)
    found = torch.func.grad(losses(grads))({name: x.detach() for name, x in named.items()})
    for name, y in gradients(losses(grads), named).items():
        assert_same_bits(found[name].detach(), y, name)


def test_func_vjp() -> None:
    grads = Gradients(RECIPE)
    call, named = grads.call, grads.named()

    def outputs(q: Tensor, w: Tensor) -> Any:
        extras = {**call.extras}
        return qkrope.qk_norm_rope(q, call.k, w, call.k_weight, call.positions, call.spec, **extras)

    made, back = torch.func.vjp(outputs, named["q"], named["q_weight"])
    dq, dw = back(tuple(grads.dy))
    want = grads.run(("q", "q_weight"))
    assert_same_bits(dq, want["q"])
    assert_same_bits(dw, want["q_weight"])
    assert len(made) == 3


def test_no_second_derivative(device: str) -> None:
    """Gradients may be part of a graph; to differentiate them is refused by name."""
    grads = Gradients(RECIPE, device)
    named = leaves(grads)
    found = torch.autograd.grad(losses(grads)(named), list(named.values()), create_graph=True)
    for name, y in gradients(losses(grads), named).items():
        assert_same_bits(found[list(named).index(name)].detach(), y, name)
    for y in found:
        with pytest.raises(RuntimeError, match="qk_norm_rope: expected to be differentiated once"):
            torch.autograd.grad(y.sum(), named["q"], retain_graph=True)


def test_transforms_that_are_refused() -> None:
    grads = Gradients(RECIPE)
    loss, named = losses(grads), {name: x.detach() for name, x in grads.named().items()}

    def of_q(q: Tensor) -> Tensor:
        return loss({**named, "q": q})

    q = named["q"]
    with pytest.raises(TypeError, match=r"q: expected a dense tensor .*torch\.func"):
        torch.func.vmap(of_q)(torch.stack((q, q)))
    with pytest.raises(TypeError, match=r"q: expected a dense tensor .*torch\.func"):
        torch.func.jvp(of_q, (q,), (q,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.hessian(of_q)(q)


def test_backward_hooks_and_accumulation(device: str) -> None:
    """As a parameter of a model has them: .grad sums over calls, hooks see each gradient."""
    grads = Gradients(RECIPE, device)
    named = leaves(grads)
    seen: list[Tensor] = []
    named["q_weight"].register_hook(seen.append)
    for _ in range(2):
        losses(grads)(named).backward()
    want = gradients(losses(grads), leaves(grads))
    for name, x in named.items():
        torch.testing.assert_close(x.grad, 2 * want[name], rtol=0, atol=0)
    assert len(seen) == 2
