"""What a patched attention module runs: its Specs, and the calls that its forward makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkrope.ops import qk_norm_rope
from qkrope.spec import Spec

__all__ = ["Form", "Norming", "Plan", "Turn"]

_Affine = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Form:
    """How one rotation function of transformers takes its arguments (see transformers_checks.py).

    ``tensors`` is how many it rotates at once. ``axis`` is that of the tokens' neighbour, the
    heads: 1 in [B, H, S, D], 2 in [B, S, H, D]; ``named`` where a call can say so with
    ``unsqueeze_dim``. ``table`` is the layout of cos and sin: "halves", "repeated" (each value
    twice), "pairs", "channels" (the two of a pair may differ), or "complex"; ``width`` is its last
    dimension. ``tail``: a q that has fewer tokens than k takes the table's last rows.
    """

    tensors: int
    axis: int
    named: bool
    table: str
    width: int
    tail: bool


@dataclass(frozen=True)
class Norming:
    """One norm in a call of its own, and how a rotation finds its weight.

    ``shape`` is what the norm is given: "last" ([..., D]), "row" ([..., heads * D]), "heads"
    ([..., heads, D]) or "split" ([B, heads, S, D], a norm module for each head).
    """

    name: str
    spec: Spec
    shape: str
    weight: bool
    bias: bool

    def affine(self, norm: Any) -> _Affine:
        """The weight and bias of the norm module, as they are now."""
        if self.shape == "split":
            weight = torch.stack([n.weight for n in norm.norms]) if self.weight else None
            return weight, torch.stack([n.bias for n in norm.norms]) if self.bias else None
        return norm.weight if self.weight else None, norm.bias if self.bias else None


@dataclass(frozen=True)
class Turn:
    """One rotation, with the norms that it does too. ``part`` is for the rotated slice alone.

    ``side`` is where the one tensor of a form with one goes; empty: where its heads fit.
    """

    spec: Spec
    part: Spec
    norms: tuple[Norming | None, Norming | None]
    form: Form
    side: str = ""


@dataclass(frozen=True)
class Plan:
    """The calls of one attention module, as its attribute ``_qkrope``."""

    norms: dict[str, Norming]
    turns: tuple[Turn, ...]
    apart: tuple[str, ...]  # norms in the order of their own calls

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # a value: copies of a model share it

    def norm(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        """A norm by itself: no rotation follows, or something else reads its result."""
        step = self.norms[name]
        weight, bias = step.affine(getattr(module, name))
        if step.shape == "last":
            heads = x.unsqueeze(-2)
        elif step.shape == "row":
            heads = x.unflatten(-1, (step.spec.num_q_heads, step.spec.head_dim))
        else:
            heads = x.transpose(1, 2) if step.shape == "split" else x
        y, _ = qk_norm_rope(heads, None, weight, None, None, step.spec, q_bias=bias)
        assert y is not None
        return y.transpose(1, 2) if step.shape == "split" else y.view(x.shape)

    def turn(self, module: nn.Module, index: int, *args: Any, **keywords: Any) -> Any:
        """The rotation with its norms, called as the model calls its own function."""
        step = self.turns[index]
        form = step.form
        q: Tensor | None = args[0]
        k: Tensor | None = args[1] if form.tensors == 2 else None
        rest = args[form.tensors :]
        axis = keywords.get("unsqueeze_dim", form.axis) if form.named else form.axis
        if axis == 1:
            q = None if q is None else q.transpose(1, 2)
            k = None if k is None else k.transpose(1, 2)
        if form.tensors == 1 and self._is_k(step, q):
            q, k = None, q
        x: Any = k if q is None else q
        spec = step.spec if x.shape[-1] == step.spec.head_dim else step.part
        (q_weight, q_bias), (k_weight, k_bias) = (
            (None, None) if n is None or x is None else n.affine(getattr(module, n.name))
            for n, x in zip(step.norms, (q, k), strict=True)
        )
        y = qk_norm_rope(
            *(q, k, q_weight, k_weight, None, spec),
            cos_sin=_table(form, rest, spec, q, k),
            q_bias=q_bias,
            k_bias=k_bias,
        )
        turned = [None if t is None else t.transpose(1, 2) if axis == 1 else t for t in y]
        if form.tensors == 1:
            return turned[0] if k is None else turned[1]
        return turned[0], turned[1]

    @staticmethod
    def _is_k(step: Turn, x: Any) -> bool:
        return (step.side or "q") == "k" or (not step.side and x.shape[-2] != step.spec.num_q_heads)


def _table(form: Form, rest: tuple[Any, ...], spec: Spec, q: Any, k: Any) -> Any:
    """cos and sin, one value a pair where that is all there is to know."""
    if rest[0].shape[-1] != form.width:  # the model rotates other channels than its config says
        raise ValueError(
            f"position_embeddings: expected a last dimension of {form.width}, got "
            f"{tuple(rest[0].shape)}; unpatch the model"
        )
    if form.table == "complex":
        cos, sin = torch.view_as_real(rest[0].to((k if q is None else q).device)).unbind(-1)
    else:
        cos, sin = rest[:2]
    if form.table in ("halves", "repeated"):
        rotary, step = spec.rotary_dim, 1
        stop = rotary // 2
        if form.table == "repeated":
            stop, step = rotary, 2
        cos, sin = cos[..., 0:stop:step], sin[..., 0:stop:step]
    if form.tail and q is not None and k is not None and q.shape[1] != k.shape[1]:
        n = q.shape[1]
        return (cos[:, -n:], sin[:, -n:]), (cos, sin)
    return cos, sin
