"""The backward's own boundary, and gradients where numbers are none or leave float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qkrope
import qkrope.torch_op
from cases import Recipe, assert_same_bits
from grads import Gradients
from qkrope import _native, cpu, ops_backward
from qkrope.plan import plan_of
from qkrope.spec import Norm, Rope, Spec

FP32 = torch.float32
SPEC = Spec(5, 2, 48, rope=Rope(32, 1e6))

# ---- the op's own boundary --------------------------------------------------------------------


def backward_args() -> dict[str, object]:
    call = Recipe(SPEC, lead=(3,)).make()
    q, k, q_weight, k_weight, positions, spec = call.args()
    return {
        **{"dq_out": q.clone(), "dk_out": k.clone(), "dv_out": None, "q": q, "k": k},
        **{"q_weight": q_weight, "k_weight": k_weight, "positions": positions, "spec": spec},
        "wanted": (True, True, False, False, False),
    }


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"dq_out": torch.zeros(3, 5, 46)}, TypeError, "dq_out: expected the dtype of q"),
        ({"dq_out": torch.zeros(3, 5, 46).bfloat16()}, ValueError, "dq_out: expected shape"),
        ({"dk_out": torch.zeros(4, 2, 48).bfloat16()}, ValueError, "dk_out: expected shape"),
        ({"q": None}, ValueError, "dq_out: expected None, since q is None"),
        ({"dq_out": None, "dk_out": None}, ValueError, "dq_out, dk_out, dv_out: expected a tensor"),
        ({"dv_out": torch.zeros(3, 2, 48)}, ValueError, "dv_out: expected None, since v is None"),
        ({"positions": None}, ValueError, "positions: expected"),
        ({"q_weight": torch.zeros(9)}, ValueError, "q_weight: expected shape"),
        ({"q": torch.zeros(5)}, ValueError, "q: expected .*heads, head_dim"),
        ({"dq_out": torch.tensor(1.0)}, ValueError, "dq_out: expected .*heads, head_dim"),
        ({"dq_out": 3.0}, TypeError, "dq_out: expected a torch tensor"),
        ({"wanted": (True,)}, ValueError, "wanted: expected 5 values, got 1"),
        ({"out": (None, None)}, ValueError, "out: expected None in a backward"),
    ],
)
def test_refusals_of_the_backward(
    change: dict[str, object], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        ops_backward.qk_norm_rope_backward(**{**backward_args(), **change})


def test_a_workspace_that_is_too_small() -> None:
    """The one check of what Python allocates: native code writes no further than it may."""
    call = Recipe(SPEC, lead=(40,)).make()
    q, k, weight, _, positions, spec = call.args()
    plan = plan_of(spec)
    dx, sums = (torch.empty_like(q), torch.empty_like(k)), torch.empty(48)
    rows = _native.lib().backward_partials(plan.handle, 40, 0)
    assert rows == 5
    for size in (rows * 48, rows * 48 - 1):
        workspace = torch.empty(size)
        operands = [None, q, k, weight, None, positions, *(None,) * 5, *dx, *(None,) * 9, 0, -1]
        operands += [q, k, None, sums, *(None,) * 4, workspace]
        if size == rows * 48:
            cpu.qk_norm_rope_backward(plan, 0, *operands)
            continue
        with pytest.raises(ValueError, match=f"workspace: expected {rows * 48} elements"):
            cpu.qk_norm_rope_backward(plan, 0, *operands)


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 1024, 1025, 10**6])
def test_rows_of_the_workspace(tokens: int) -> None:
    """Blocks of at least eight tokens, at most 128 of them; the tokens alone decide."""
    rows = _native.lib().backward_partials(plan_of(SPEC).handle, tokens, 0)
    assert rows == min(-(-tokens // 8), 128)


# ---- numbers that are none, and the ends of float32 -------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("norm", [Norm(), Norm("layer"), Norm(dim=16, rest=Norm())], ids=str)
def test_a_nan_stays_in_its_head(backend: str, norm: Norm, where: str, bad: float) -> None:
    """In dx of its head and in the weight's gradient; every other head has the bits it had."""
    recipe = Recipe(replace(SPEC, norm=norm), lead=(11,), dtype=FP32)
    want = Gradients(recipe, backend).run()
    grads = Gradients(recipe, backend)
    (grads.call.q if where == "x" else grads.dy[0])[5, 2, 40] = bad
    found = grads.run()
    assert not bool(found["q"][5, 2, 40].isfinite())
    if norm.dim is None:
        assert bool(found["q"][5, 2].isnan().any())
    others = torch.ones(11, 5, dtype=torch.bool)
    others[5, 2] = False
    assert_same_bits(found["q"][others], want["q"][others])
    assert not bool(found["q_weight"].isfinite().all())
    assert_same_bits(found["k"], want["k"])
    assert_same_bits(found["k_weight"], want["k_weight"])


@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
@pytest.mark.parametrize("size", [1e-17, 1e-12, 1e12, 1e18])
def test_large_and_small_rows(isa: str, kind: str, size: float) -> None:
    """Squares that float32 has not, and gradients that it has."""
    one = replace(SPEC, norm=Norm(kind, eps=0.0), k_norm=Norm(kind, eps=1e-30))
    recipe = Recipe(one, lead=(11,), dtype=FP32)
    grads = Gradients(recipe)
    with torch.no_grad():
        for x in grads.call.buffers[0].views + grads.call.buffers[1].views:
            x.mul_(size)
        for dy in grads.dy[:2]:
            dy.mul_(min(size, 1.0))
    grads.call.__post_init__()
    grads.check(grads.run())


@pytest.mark.parametrize("dim", [2, 20, 40])
def test_a_nan_of_the_rest_stays_in_its_head(backend: str, dim: int) -> None:
    """Behind a part that ends between two vectors too, and in the heads after it."""
    spec = Spec(8, 1, 48, norm=Norm(dim=dim, rest=Norm()), rope=None)
    q = torch.randn(8, 8, 48, generator=torch.Generator().manual_seed(1)).to(backend)
    q[0, 1, 44] = torch.nan
    leaf = q.requires_grad_()
    y, _ = qkrope.qk_norm_rope(leaf, None, None, None, None, spec)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    bad = dx.isnan().any(-1).nonzero().tolist()
    assert bad == [[0, 1]]


def test_an_op_reads_weights_no_earlier_than_training_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grad mode is off inside a training step's op: that is no promise about its weights."""
    seen = []
    run = cpu.qk_norm_rope
    monkeypatch.setattr(cpu, "qk_norm_rope", lambda plan, *o: (seen.append(o[0]), run(plan, *o)))
    q, k, weight, _, positions, spec = Recipe(SPEC, lead=(3,)).make().args()
    weight = weight.clone().requires_grad_()
    op = torch.ops.qkrope.qk_norm_rope.default
    op(q, k, weight, None, positions, spec.canonical())
    with torch.no_grad():
        op(q, k, weight, None, positions, spec.canonical())
    torch.compile(
        lambda w: qkrope.qk_norm_rope(q, k, w, None, positions, spec), backend="aot_eager"
    )(weight)
    assert seen == [0, 0, 0]
