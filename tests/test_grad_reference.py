"""The oracle of gradients: finite differences, the formulas by hand, and the criterion's terms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import Recipe
from grads import NAMES, Gradients
from qkrope import reference, reference_grad
from qkrope.accuracy import SLACK, sum_units
from qkrope.spec import Norm, Rope, Spec
from small import counts, draw, heads, spec

KINDS = [
    Norm(),
    Norm("layer", eps=1e-3),
    Norm("l2"),
    Norm("none"),
    Norm(scope="row"),
    Norm("layer", scope="row"),
    Norm("l2", scope="row"),
    Norm(dim=10, weight_offset=1.0),
    Norm(dim=6, rest=Norm("layer", eps=1e-2)),
]
ROPES = [Rope(8), Rope(8, pairing="interleaved"), Rope(8, pairing="block_half"), None]


@pytest.mark.parametrize("order", ["norm_first", "rope_first"])
@pytest.mark.parametrize("norm", KINDS, ids=str)
def test_gradcheck(norm: Norm, order: str) -> None:
    """Autograd through the reference is what finite differences say, in float64."""
    q, k = heads()
    q, k = q[:1, :3].requires_grad_(), k[:1, :3].requires_grad_()
    width = norm.weight_dim(16)
    given = [draw(width, seed=n).requires_grad_() for n in range(4)] if norm.kind != "none" else []
    for rope in ROPES:
        one = spec(rope, norm=norm, order=order)
        positions = counts()[:1, :3] if rope else None

        def run(q: Tensor, k: Tensor, *more: Tensor, one: Spec = one, p: object = positions):
            w, b = (more[:2], more[2:]) if more else ((None, None), (None, None))
            return reference.qk_norm_rope(q, k, *w, p, one, q_bias=b[0], k_bias=b[1], k_scale=0.37)

        assert torch.autograd.gradcheck(run, (q, k, *given), fast_mode=True)


def test_gradcheck_of_output_pairing_and_tables() -> None:
    q, k = heads()
    q, k = q[:1, :3].requires_grad_(), k[:1, :3].requires_grad_()
    table = draw(3, 8, seed=4), draw(3, 8, seed=5)
    one = spec(Rope(8, pairing="interleaved", output_pairing="half", offset=4))

    def run(q: Tensor, k: Tensor) -> object:
        return reference.qk_norm_rope(q, k, None, None, None, one, cos_sin=table)

    assert torch.autograd.gradcheck(run, (q, k))


def test_l2_below_eps() -> None:
    """Where eps is the length, a row's gradient is that of a division by it."""
    x = 1e-3 * draw(2, 3, 16)
    one = Spec(3, 2, 16, norm=Norm("l2", eps=0.5), rope=None)
    dy = draw(2, 3, 16, seed=3)
    found = reference_grad.qk_norm_rope_backward((dy, None), x, None, None, None, None, one)
    torch.testing.assert_close(found["q"], dy / 0.5, rtol=1e-14, atol=0)


RECIPE = Recipe(
    Spec(3, 2, 32, norm=Norm(weight_offset=1.0), rope=Rope(12, 1e6)), lead=(11,), bias=True
)


@pytest.mark.parametrize("order", ["norm_first", "rope_first"])
@pytest.mark.parametrize("kind", ["rms", "layer", "l2", "none"])
@pytest.mark.parametrize("scope", ["head", "row"])
def test_terms_are_no_less_than_the_gradient(kind: str, scope: str, order: str) -> None:
    """Every summand counts by its size: no gradient is larger than its terms, in units of one."""
    one = replace(RECIPE.spec, norm=Norm(kind, scope=scope, weight_offset=1.0), order=order)
    grads = Gradients(RECIPE.but(spec=one, scale="channel", bias=kind != "none"))
    exact, terms = grads.expected()
    assert exact.keys() == terms.keys() == grads.named().keys()
    for name, ref in exact.items():
        assert bool((ref.abs() <= terms[name] * (1 + 1e-12)).all()), name


def test_terms_of_a_plain_head_by_hand() -> None:
    """Of one head that does not turn, G = |dy w| and N = |x| rstd."""
    one = Spec(1, 1, 16, rope=None)
    x, w, dy = draw(5, 1, 16), draw(16, seed=1), draw(5, 1, 16, seed=2)
    terms = reference_grad.gradient_terms((dy, None), x, None, w, None, None, one)
    rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    n, g = x.abs() * rstd, (dy * w).abs()
    dx = rstd * (g + n * (g * n).mean(-1, keepdim=True))
    torch.testing.assert_close(terms["q"], 2.25 * dx, rtol=1e-13, atol=0)
    total = (dy.abs() * n).sum((0, 1))
    torch.testing.assert_close(terms["q_weight"], sum_units(5) * total, rtol=1e-13, atol=0)


def test_the_bound_of_a_sum() -> None:
    """1.25 of the slack for the summands, and 2^-24 for each addition of the longest chain."""
    for count, chain in ((0, 0), (1, 1), (64, 64), (160, 74), (16000, 1064)):
        assert sum_units(count) * SLACK == pytest.approx(1.25 * SLACK + chain * 2.0**-24, rel=1e-14)


def test_names() -> None:
    """A gradient for each of the named, nothing for what is absent."""
    grads = Gradients(RECIPE.but(sides="q", weights="-"))
    exact, _ = grads.expected()
    assert set(exact) < set(NAMES)
    assert "k" not in exact and "q_weight" not in exact
