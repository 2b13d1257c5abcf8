"""Gradients and the rest of torch: compiled graphs, checkpoints, autocast, transforms, ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
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
    q, k, *rest = RECIPE.make(device).args()
    with (
        torch.autocast(device, dtype=BF16),
        pytest.raises(TypeError, match="k: expected the dtype"),
    ):
        qkrope.qk_norm_rope(q.requires_grad_(), k.to(BF16), *rest)


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
    batched = r"^q: expected a dense tensor, got one under torch\.func\.vmap"
    with pytest.raises(TypeError, match=batched):
        torch.func.vmap(torch.func.grad(of_q))(torch.stack((q, q)))
    weight = named["q_weight"].clone().requires_grad_()
    with pytest.raises(TypeError, match=batched):
        torch.func.vmap(lambda q: loss({**named, "q": q, "q_weight": weight}))(torch.stack((q, q)))
    for transform in (
        lambda f: torch.func.jvp(f, (q,), (q,)),
        lambda f: torch.func.jvp(torch.func.grad(f), (q,), (q,)),
        lambda f: torch.func.hessian(f)(q),
    ):
        with pytest.raises(ValueError, match="^q: " + TANGENT):
            transform(of_q)
    with pytest.raises(Exception, match="q: " + TANGENT):  # which Dynamo makes one of its own
        torch.compile(lambda q: torch.func.jvp(of_q, (q,), (q,)), backend="aot_eager")(q)


# ---- forward mode -----------------------------------------------------------------------------

TANGENT = "expected a tensor without a tangent of forward-mode AD, got one with it; pass"


@pytest.fixture
def dual() -> Iterator[Callable[[Tensor], Tensor]]:
    """The same tensor with a tangent, inside a dual level."""
    with forward_ad.dual_level():
        yield lambda x: forward_ad.make_dual(x, torch.ones_like(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_tangent_is_refused(name: str, mode: Any, dual: Any, device: str) -> None:
    """By the eager calls and the ops, whether a gradient is wanted too; nothing is written."""
    grads = Gradients(RECIPE, device)
    call, named = grads.call, {n: x.detach().clone() for n, x in grads.named().items()}
    before = {n: x.clone() for n, x in named.items()}
    args = {**named, name: dual(named[name])}
    trained = {n: x if n == name else x.clone().requires_grad_() for n, x in args.items()}
    first = {"positions": call.positions, "spec": call.spec}
    as_op = {**first, "spec": call.spec.canonical()}
    with mode():
        for run, given in (
            (qkrope.qk_norm_rope, {**args, **first}),
            (qkrope.qk_norm_rope, {**trained, **first}),
            (qkrope.qk_norm_rope_, {**args, **first}),
            (OPS.qk_norm_rope, {**args, **as_op}),
            (OPS.qk_norm_rope, {**trained, **as_op}),
            (OPS.qk_norm_rope_, {**args, **as_op}),
        ):
            with pytest.raises(ValueError, match=f"^{name}: {TANGENT}"):
                run(**given)
    for n, x in before.items():
        assert_same_bits(named[n], x, n)


@pytest.mark.parametrize("name", ["qkv", "q_weight", "k_weight"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_packed_call_refuses_a_tangent(name: str, mode: Any, dual: Any, device: str) -> None:
    """The plain one, which has ways of its own; inside a level it takes tensors without one."""
    one = Spec(2, 1, 8, rope=Rope(dim=4))
    torch.manual_seed(0)
    qkv, q_weight, k_weight = (x.to(device) for x in torch.randn(3, 3, 32).unbind())
    weights = {"q_weight": q_weight[0, :8], "k_weight": k_weight[0, :8]}
    positions, want = torch.arange(3, device=device), qkv.clone()
    with mode():
        qkrope.qkv_norm_rope_(want, **weights, positions=positions, spec=one)  # keeps a plan
        given = {"qkv": qkv, **weights}
        before = qkv.clone()
        for run, spec in ((qkrope.qkv_norm_rope_, one), (OPS.qkv_norm_rope_, one.canonical())):
            with pytest.raises(ValueError, match=f"^{name}: {TANGENT}"):
                run(**{**given, name: dual(given[name])}, positions=positions, spec=spec)
            assert_same_bits(qkv, before)
            y = qkv.clone()
            run(**{**given, "qkv": y}, positions=positions, spec=spec)
            assert_same_bits(y, want)


def test_other_tangents(dual: Any) -> None:
    """Of a result's place, of the gradient of a result; and what the error tells to do."""
    one, (q, k) = Spec(2, 1, 8, rope=Rope(dim=4)), (torch.randn(3, n, 8) for n in (2, 1))
    rest = (None, None, torch.arange(3), one)
    with pytest.raises(ValueError, match=rf"^out\[1\]: {TANGENT}"):
        qkrope.qk_norm_rope(q, k, *rest, out=(q.clone(), dual(k.clone())))
    leaf = q.clone().requires_grad_()
    y, _ = qkrope.qk_norm_rope(leaf, k, *rest)
    with pytest.raises(ValueError, match=f"^dq_out: {TANGENT}"):
        torch.autograd.grad(y, leaf, dual(q))
    got, _ = qkrope.qk_norm_rope(forward_ad.unpack_dual(dual(q)).primal, k, *rest)
    assert_same_bits(got, y.detach())
    want, _ = qkrope.reference.qk_norm_rope(dual(q), k, *rest)
    assert forward_ad.unpack_dual(want).tangent.any()


def test_a_function_with_a_jvp_of_its_own(dual: Any) -> None:
    """Inside one torch takes tensors without their tangents, and so does a call."""
    one, k = Spec(2, 1, 8, rope=None), torch.randn(3, 1, 8)

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor) -> Tensor:
            return qkrope.qk_norm_rope(q, k, None, None, None, one)[0]

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return 2 * tangent

    found = forward_ad.unpack_dual(Own.apply(dual(torch.randn(3, 2, 8)))).tangent
    assert torch.equal(found, torch.full((3, 2, 8), 2.0))


def test_compiled_calls_inside_a_level(dual: Any) -> None:
    """Tensors without tangents pass; a graph that has run refuses the others as eager calls do."""
    one, q, k = Spec(2, 1, 8, rope=None), torch.randn(3, 2, 8), torch.randn(3, 1, 8)

    def plain(q: Tensor) -> Tensor:
        return qkrope.qk_norm_rope(q, k, None, None, None, one)[0]

    def in_place(q: Tensor) -> Tensor:
        y = q.clone()
        qkrope.qk_norm_rope_(y, None, None, None, None, one)
        return y

    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(q), plain(q))
    with pytest.raises(ValueError, match=f"^q: {TANGENT}"):
        compiled(dual(q))
    with pytest.raises(Exception, match="q: expected no dual level of forward-mode AD"):
        torch.compile(in_place, backend="aot_eager", fullgraph=True)(q)


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
