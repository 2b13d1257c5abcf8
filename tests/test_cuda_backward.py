"""The CUDA kernels of the gradients where only a GPU can say: many units a warp, repeatability,
graphs, what earlier kernels on the stream write, and memory beyond 2^31 elements.

What they compute is in test_grad_options.py, for a few tokens each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import qkrope
from cases import Recipe, assert_same_bits
from grads import Gradients, check_gradients
from qkrope.spec import Norm, Rope, Spec

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROW = Norm(scope="row")
CASES = {
    "plain": Recipe(Spec(5, 2, 128), lead=(4001,), weight_dtype=FP32),
    "plain, interleaved": Recipe(
        Spec(7, 3, 64, rope=Rope(32, pairing="interleaved")), lead=(3, 1333), dtype=FP16
    ),
    "plain, float32": Recipe(Spec(5, 2, 128), lead=(2003,), dtype=FP32),
    "plain, table": Recipe(Spec(5, 2, 128), lead=(2003,), angle="pair"),
    "plain, odd rows": Recipe(Spec(5, 2, 128), lead=(2003,), layout="odd", weight_dtype=FP32),
    "plain 512": Recipe(Spec(3, 2, 512, rope=Rope(128)), lead=(1501,), weight_dtype=FP32),
    "layer, bias": Recipe(
        Spec(9, 3, 64, norm=Norm("layer")), lead=(3001,), bias=True, weight_dtype=FP32
    ),
    "a weight a head": Recipe(
        Spec(5, 2, 128), lead=(2003,), weight_shape="head", weight_dtype=FP32
    ),
    "row": Recipe(Spec(40, 8, 128, norm=ROW), lead=(701,), weight_shape="row", weight_dtype=FP32),
    "long rows": Recipe(Spec(131, 2, 128, norm=ROW), lead=(301,), weight_shape="row"),
    "v": Recipe(Spec(4, 4, 128, v_norm=Norm("layer")), lead=(2003,), weight_dtype=FP32),
}


@pytest.mark.parametrize("name", CASES)
def test_many_units_a_warp(cuda: str, name: str) -> None:
    check_gradients(CASES[name], cuda)


@pytest.mark.parametrize("name", CASES)
def test_bits_repeat(cuda: str, name: str) -> None:
    """Whatever else runs beside it; and dx of a part of the tokens is the part of dx."""
    grads = Gradients(CASES[name], cuda)
    first = grads.run()
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=cuda)
    for turn in range(50):
        with torch.cuda.stream(side):
            for _ in range(turn % 4):
                noise = noise @ noise / 50
        for y, other in zip(first.values(), grads.run().values(), strict=True):
            assert_same_bits(y, other)
    torch.cuda.synchronize()
    recipe, call = CASES[name], grads.call
    if len(recipe.lead) > 1 or recipe.angle != "spec":
        return
    few = slice(recipe.lead[0] - 3, recipe.lead[0])
    dy = [None if g is None else g[few] for g in grads.dy]
    q, k = (x[few].detach().requires_grad_() for x in (call.q, call.k))
    v = call.extras.get("v")
    more = dict(call.extras) | ({} if v is None else {"v": v[few]})
    outputs = qkrope.qk_norm_rope(
        q, k, call.q_weight, call.k_weight, call.positions[few], call.spec, **more
    )
    found = torch.autograd.grad(outputs[:2], (q, k), dy[:2])
    for y, part in zip((first["q"], first["k"]), found, strict=True):
        assert_same_bits(y[few], part)


SPECS = {
    "plain": Spec(5, 2, 116, rope=Rope(48)),
    "casts": Spec(5, 2, 116, rope=Rope(40), rounding="eager"),
    "layer": Spec(5, 2, 116, norm=Norm("layer")),
    "row": Spec(5, 2, 128, k_norm=ROW, rope=Rope(40)),
}


@pytest.mark.parametrize("name", SPECS)
def test_after_warmup_nothing_compiles(
    cuda: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from qkrope.cuda import launch

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a compile after warmup")

    spec = SPECS[name]
    qkrope.warmup(spec, cuda, BF16, backward=True)
    monkeypatch.setattr(launch, "compile_variant", refuse)
    base = Recipe(spec, lead=(9,))
    for more in (
        {},
        {"layout": "odd"},
        {"weights": "q"},
        {"angle": "pair"},
        {"angle": "inv_freq64"},
        {"scale": "token"},
        {"weight_shape": "head"},
    ):
        check_gradients(replace(base, **more), cuda)


@pytest.mark.parametrize("name", SPECS)
def test_a_step_in_a_graph(cuda: str, name: str) -> None:
    """Forward and backward, replayed on other inputs; a first backward while capturing says what
    to do.
    """
    spec = replace(SPECS[name], num_q_heads=6)
    one, two = (Gradients(Recipe(spec, lead=(333,), seed=seed), cuda) for seed in (0, 1))
    want = two.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = one.run()
    mine = (*one.named().values(), *one.dy, one.call.positions)
    theirs = (*two.named().values(), *two.dy, two.call.positions)
    for to, x in zip(mine, theirs, strict=True):
        if to is not None:
            to.copy_(x)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for y, direct in zip(found.values(), want.values(), strict=True):
        assert_same_bits(y, direct)


def test_a_first_backward_while_capturing(cuda: str) -> None:
    spec = Spec(3, 2, 108, rope=Rope(44))
    grads = Gradients(Recipe(spec, lead=(9,)), cuda)
    qkrope.warmup(spec, cuda, BF16)
    x = torch.ones(8, device=cuda)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1
        with pytest.raises(RuntimeError, match="backward=True"):
            grads.run()
    qkrope.warmup(spec, cuda, BF16, backward=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = grads.run()
    graph.replay()
    torch.cuda.synchronize()
    grads.check(found)


@pytest.mark.parametrize("name", ["plain", "layer, bias", "row"])
@pytest.mark.parametrize("writer", ["q", "dy", "q_weight", "positions"])
def test_what_was_just_written_is_read(cuda: str, name: str, writer: str) -> None:
    """Each input written by the kernel before, hundreds of times: nothing is read too early, nor is
    a line that was asked for before it was written.
    """
    recipe = CASES[name].but(lead=(257,))
    grads = [Gradients(recipe.but(seed=seed), cuda) for seed in (0, 1)]
    target = grads[0]

    def tensor(g: Gradients) -> Any:
        return g.call.positions if writer == "positions" else {**g.named(), "dy": g.dy[0]}[writer]

    values = [tensor(g).clone() for g in grads]
    want = []
    for value in values:
        tensor(target).copy_(value)
        torch.cuda.synchronize()
        want.append(target.run())
        torch.cuda.synchronize()
    for turn in range(400):
        tensor(target).copy_(values[turn % 2])
        for y, other in zip(want[turn % 2].values(), target.run().values(), strict=True):
            assert torch.equal(y, other), turn


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda: str) -> None:
    """Offsets are 64 bits wide: the last token's gradient is that of the token alone."""
    tokens, heads = 2**31 // (8 * 128) + 1000, 8
    q = torch.zeros(tokens, heads, 128, dtype=BF16, device=cuda)
    q[-1].normal_()
    dy = torch.zeros_like(q)
    dy[-1].normal_()
    weight = torch.ones(128, dtype=FP32, device=cuda).requires_grad_()
    positions = torch.arange(tokens, device=cuda)
    spec = Spec(heads, 1, 128)
    found = []
    for part in (slice(0, None), slice(tokens - 1, None)):
        x = q[part].detach().requires_grad_()
        y, _ = qkrope.qk_norm_rope(x, None, weight, None, positions[part], spec)
        found.append(torch.autograd.grad(y, (x, weight), dy[part]))
    assert_same_bits(found[0][0][-1:], found[1][0])
    assert not found[0][0][:-1].any()
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
