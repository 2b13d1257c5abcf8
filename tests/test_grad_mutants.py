"""Planted bugs in the gradients: the recipe and the criterion catch each of them.

`by_hand` is the backward pass in float64, written down after the formulas of `qkrope.ops_backward`.
Without a bug it is autograd through the reference; with one it must break the criterion, in every
dtype, on the call that stands beside the bug.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Recipe, round_once
from checks import error_over_bound
from grads import Gradients
from mutants import DTYPES
from qkrope.reference_side import Side, Span, sides
from qkrope.reference_steps import effective_weight, move_pairs, quarter_turn, rotate, statistics
from qkrope.spec import Norm, Rope, Spec

ROPE = Rope(dim=12, theta=1e6)


def recipe(rope: Rope | None = ROPE, given: dict[str, Any] | None = None, **how: Any) -> Recipe:
    return Recipe(Spec(5, 2, 32, rope=rope, **(given or {})), **{"lead": (23,), **how})


PLAIN = recipe()
LAYER = recipe(given={"norm": Norm("layer")})
BIASED = recipe(bias=True)
SCALED = recipe(scale="channel", bias=True)
OFFSET = recipe(given={"norm": Norm(weight_offset=1.0)})
FIRST = recipe(given={"order": "rope_first"})
FIRST_LAYER = recipe(given={"order": "rope_first", "norm": Norm("layer")})  # turning moves a mean
L2 = recipe(given={"norm": Norm("l2", eps=2.0)})
ROW = recipe(given={"norm": Norm(scope="row")})
PARTS = recipe(given={"norm": Norm(dim=20, rest=Norm(eps=1e-3))})
LATENT = recipe(Rope(8, offset=20, pairing="interleaved"), given={"norm": Norm(dim=20)})
MOVED = recipe(Rope(12, 1e6, "interleaved", output_pairing="half"))
SOME = recipe(rotate=(5, 19))
HEADS = recipe(weight_shape="head")
TABLE = recipe(angle="channel")
V = recipe(given={"v_norm": Norm()})

BUGS = {
    "turned forwards": PLAIN,
    "not turned": PLAIN,
    "sine of its own channel": TABLE,
    "left where outputs are": MOVED,
    "all tokens turned": SOME,
    "no average along n": PLAIN,
    "average without gx": PLAIN,
    "average over the rotated channels": PLAIN,
    "average of dy times n": PLAIN,
    "no mean of gx": LAYER,
    "mean of gx everywhere": PLAIN,
    "x not centred": LAYER,
    "rstd once less": PLAIN,
    "eps times ten": PLAIN,
    "weight dropped": PLAIN,
    "offset dropped": OFFSET,
    "scale dropped": SCALED,
    "scale dropped in the bias": SCALED,
    "weight in its own gradient": PLAIN,
    "weight's and bias's swapped": BIASED,
    "bias's before the turn": BIASED,
    "last token not summed": PLAIN,
    "first head not summed": PLAIN,
    "a token summed twice": PLAIN,
    "heads summed together": HEADS,
    "x for n in the sum": PLAIN,
    "average for the sum of l2": L2,
    "eps not clamped in l2": L2,
    "each head alone": ROW,
    "one statistic for both parts": PARTS,
    "channels outside the norm normalised": LATENT,
    "channels outside the norm dropped": LATENT,
    "statistic before the turn": FIRST_LAYER,
    "not turned back at the end": FIRST,
    "v turned": V,
    "k by the weight of q": PLAIN,
}


def back(dy: Tensor, side: Side, bug: str) -> Tensor:
    """R^T dy."""
    if (turn := side.turn) is None:
        return dy
    swapped = replace(turn, read=turn.write, write=turn.read)
    if bug == "left where outputs are":
        swapped = replace(swapped, write=turn.write)
    if bug == "all tokens turned":
        cos, sin = (
            torch.cat((t[:1].expand(5, *t.shape[1:]), t, t[:4])) for t in (turn.cos, turn.sin)
        )
        swapped = replace(swapped, tokens=None, cos=cos, sin=sin)
    turn = swapped
    sin = turn.sin if bug == "sine of its own channel" else turn.sin.flip(-1)
    sign = 1 if bug == "turned forwards" else -1
    return move_pairs(dy, turn, lambda ab: ab * turn.cos + sign * quarter_turn(ab) * sin)


def average(x: Tensor, norm: Norm, bug: str) -> Tensor:
    row = norm.scope == "row" and bug != "each head alone"
    return x.mean((-2, -1) if row else -1, keepdim=True)


def by_hand(grads: Gradients, bug: str = "") -> dict[str, Tensor]:
    args, extras = grads.call.oracle_args()
    if bug == "k by the weight of q":
        args = (*args[:3], args[2], *args[4:])
    found: dict[str, Tensor] = {}
    order = grads.call.spec.order
    for name, side, dy in zip("qkv", sides(*args, **extras), grads.dy, strict=False):
        if bug == "v turned" and name == "v":
            side = replace(side, turn=sides(*args, **extras)[1].turn)
        found |= {
            f"{name}{what}": value
            for what, value in side_by_hand(side, dy.double(), order, bug).items()
        }
    return {name: value for name, value in found.items() if name in grads.named()}


def side_by_hand(side: Side, dy: Tensor, order: str, bug: str) -> dict[str, Tensor]:
    first = order == "rope_first"
    x = side.x.double()
    turned = rotate(x, side) if first else x
    dn = dy if first or bug == "not turned" else back(dy, side, bug)
    g = dn if side.scale is None or bug == "scale dropped" else dn * side.scale.double()
    dx, products = [], []
    spans = side.spans
    if bug == "one statistic for both parts":
        spans = tuple(replace(span, norm=spans[0].norm) for span in spans)
    for span in spans:
        one, product = span_by_hand(span, x, turned, g, dy, bug)
        dx.append(one), products.append(product)
    made = torch.cat(dx, -1)
    if first and bug != "not turned back at the end":
        made = back(made, side, bug)
    plain = {"scale dropped in the bias": dn, "bias's before the turn": dy}.get(bug, g)
    sums = {"_weight": torch.cat(products, -1), "_bias": plain}
    if bug == "weight's and bias's swapped":
        sums = {"_weight": sums["_bias"], "_bias": sums["_weight"]}
    return {"": made, **{name: summed(t, side, bug) for name, t in sums.items()}}


def span_by_hand(
    span: Span, x: Tensor, turned: Tensor, g: Tensor, dy: Tensor, bug: str
) -> tuple[Tensor, Tensor]:
    """dx (before the last turn) and the summands of dweight of some channels."""
    channels, norm, w = span.channels, span.norm, effective_weight(span)
    x, turned, g, dy = (t[..., channels] for t in (x, turned, g, dy))
    if bug == "channels outside the norm normalised" and norm.kind == "none":
        norm = Norm()
    if norm.kind == "none":
        return (torch.zeros_like(g) if bug == "channels outside the norm dropped" else g), g
    if bug == "eps times ten":
        norm = replace(norm, eps=10 * norm.eps)
    if bug == "each head alone":
        norm = replace(norm, scope="head")
    mean, rstd = statistics(x if bug == "statistic before the turn" else turned, norm)
    n = (turned if bug == "x not centred" else turned - mean) * rstd
    if w is not None and bug == "offset dropped":
        w = w - norm.weight_offset
    gx = g if w is None or bug == "weight dropped" else g * w
    other = {"average without gx": n, "average of dy times n": dy}.get(bug, gx)
    along = average(other * n, norm, bug)
    if bug == "average over the rotated channels":
        along = average((gx * n)[..., :12], norm, bug)
    if norm.kind == "l2":
        clamped = turned.square().sum(-1, keepdim=True).sqrt() < norm.eps
        along = along * (1 if bug == "average for the sum of l2" else x.shape[-1])
        along = along * (1 if bug == "eps not clamped in l2" else ~clamped)
    if bug == "no average along n":
        along = 0 * along
    dx = gx - n * along
    if (norm.kind == "layer" and bug != "no mean of gx") or bug == "mean of gx everywhere":
        dx = dx - average(gx, norm, bug)
    dx = dx if bug == "rstd once less" else dx * rstd
    product = (gx if bug == "weight in its own gradient" else g) * n
    return dx, g * turned if bug == "x for n in the sum" else product


def summed(summands: Tensor, side: Side, bug: str) -> Tensor:
    """Over tokens, and heads where they share a weight."""
    flat = summands.flatten(0, -3)
    if bug == "last token not summed":
        flat = flat[:-1]
    if bug == "a token summed twice":
        flat = torch.cat((flat, flat[3:4]))
    if bug == "first head not summed":
        flat = flat[:, 1:]
    weight = side.spans[0].weight
    if weight is not None and weight.ndim == 2:
        total = flat.sum(0)
        return total.sum(0).expand_as(total) if bug == "heads summed together" else total
    total = flat.sum((0, 1))
    return (
        total[: side.spans[0].channels.stop]
        if len(side.spans) > 1 and side.spans[1].norm.kind == "none"
        else total
    )


def judge(grads: Gradients, found: dict[str, Tensor], dtype: torch.dtype) -> float:
    """The worst error of any gradient as a share of the bound, each rounded once."""
    exact, terms = grads.expected()
    worst = 0.0
    for name, ref in exact.items():
        own = dtype if name in "qkv" else torch.float32  # sums are made in float32
        ratio = error_over_bound(round_once(found[name], own), ref, terms[name], own)
        worst = max(worst, float(ratio.max()))
    return worst


@pytest.mark.parametrize("which", dict.fromkeys(BUGS.values()), ids=lambda r: str(r.spec.norm)[:40])
def test_the_hand_without_a_bug(which: Recipe) -> None:
    grads = Gradients(which)
    exact, _ = grads.expected()
    found = by_hand(grads)
    assert found.keys() == exact.keys()
    for name, ref in exact.items():
        torch.testing.assert_close(
            found[name], ref, rtol=1e-11, atol=1e-11 * float(ref.abs().max())
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug: str, dtype: torch.dtype) -> None:
    grads = Gradients(BUGS[bug].but(dtype=dtype))
    assert judge(grads, by_hand(grads), dtype) <= 1
    assert judge(grads, by_hand(grads, bug), dtype) > 2, bug
