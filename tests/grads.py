"""What the tests of gradients share: a call with the gradients of its results, run and judged."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

import qkrope
from cases import ROW_SCALES, Call, Guarded, Recipe, assert_criterion, guarded
from checks import fraction_correctly_rounded
from qkrope import reference_grad
from qkrope.extras import NAMES

__all__ = ["NAMES", "Gradients", "check_gradients"]


class Gradients:
    """A call, and gradients of its results: random rows of several sizes, strided like ``layout``.

    ``without``: sides whose result nothing uses, so that autograd gives no gradient for it.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: str = "cpu",
        layout: str = "contiguous",
        without: str = "",
    ) -> None:
        self.call: Call = recipe.make(device)
        self.inputs = (self.call.q, self.call.k, self.call.extras.get("v"))
        self.buffers: list[Guarded] = []
        self.dy: list[Tensor | None] = []
        for side, x in zip("qkv", self.inputs, strict=True):
            if x is None:
                self.dy.append(None)
                continue
            draw = torch.Generator().manual_seed(recipe.seed + 1000 + ord(side))
            *lead, heads, dim = x.shape
            size = torch.arange(x.numel() // dim).view(*lead, heads, 1) % len(ROW_SCALES)
            data = torch.randn(x.shape, generator=draw) * torch.tensor(ROW_SCALES)[size]
            buffer, view = guarded(tuple(lead), heads, dim, layout, x.dtype, device)
            buffer.fill(view, data)
            self.buffers.append(buffer)
            self.dy.append(None if side in without else view)

    def named(self) -> dict[str, Tensor]:
        """The tensors of the call that have gradients."""
        call = self.call
        given = {"q": call.q, "k": call.k, "q_weight": call.q_weight, "k_weight": call.k_weight}
        given |= call.extras
        return {name: given[name] for name in NAMES if given.get(name) is not None}

    def run(self, needs: Collection[str] = NAMES, **extras: Any) -> dict[str, Tensor | None]:
        """The gradients that torch.autograd gives, by name, of those in ``needs``."""
        leaves = {
            name: x.detach().requires_grad_(name in needs) for name, x in self.named().items()
        }
        call = self.call
        given = {"q": None, "k": None, "q_weight": None, "k_weight": None}
        given |= {**call.extras, **extras, **leaves}
        outputs = qkrope.qk_norm_rope(positions=call.positions, spec=call.spec, **given)
        used = [(y, dy) for y, dy in zip(outputs, self.dy, strict=False) if dy is not None]
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        found = torch.autograd.grad(
            [y for y, _ in used], list(wanted.values()), [dy for _, dy in used], allow_unused=True
        )
        return dict(zip(wanted, found, strict=True))

    def expected(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The exact gradients and their criterion terms, by name."""
        args, extras = self.call.oracle_args()
        dy = [None if g is None else g.detach().cpu() for g in self.dy]
        dy = dy if self.inputs[2] is not None else dy[:2]
        exact = reference_grad.qk_norm_rope_backward(tuple(dy), *args, **extras)
        return exact, reference_grad.gradient_terms(tuple(dy), *args, **extras)

    def check(self, found: dict[str, Tensor | None]) -> None:
        """Each gradient meets the criterion, and >= 99.5 % of bfloat16 dx are correctly rounded.

        Of those, that is, which do not cancel: whose terms are at most 16 times the value. An error
        of 9 units of 2^-24 in them, an eighth of the bound, then takes at most
        2 * 9 / 2.25 * 16 * 2^-24 / 2^-8, 0.2 %, over a tie; another rounding to bfloat16 on the way
        takes some 25 %.
        """
        exact, terms = self.expected()
        inputs, spec = self.named(), self.call.spec
        norms = {"q": spec.q_norm, "k": spec.k_norm_resolved, "v": spec.v_norm}
        # Without a norm dy times a scale of 13 / 5 is a tie, as in Call.check.
        normed = {
            side: norm is not None and all(p.norm.kind != "none" for p in norm.parts(spec.head_dim))
            for side, norm in norms.items()
        }
        for name, y in found.items():
            if self.dy["qkv".index(name[0])] is None:  # no result depends on it
                assert y is None, name
                continue
            assert y is not None, name
            x, ref, term = inputs[name], exact[name], terms[name]
            assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), name
            y = y.detach().cpu()
            assert_criterion(y, ref, term, y.dtype, name)
            if name not in "qkv" or y.dtype != torch.bfloat16 or not normed[name]:
                continue
            kept = term <= 16 * ref.abs()
            if int(kept.sum()) >= 4000:
                share = fraction_correctly_rounded(y[kept], ref[kept])
                assert share >= 0.995, f"{name}: only {share:.4%} correctly rounded"

    def assert_unchanged(self) -> None:
        """The call wrote to none of its inputs, and read only."""
        self.call.assert_inputs_unchanged()


def check_gradients(recipe: Recipe, device: str, **how: Any) -> dict[str, Tensor | None]:
    """Every gradient of a recipe's call, judged, and nothing else written."""
    grads = Gradients(recipe, device, **how)
    found = grads.run()
    grads.check(found)
    grads.assert_unchanged()
    return found
