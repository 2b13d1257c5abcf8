"""The gradients of ``qk_norm_rope`` as torch sees them: one autograd.Function around a call.

A call of ``qkrope.qk_norm_rope`` enters it when grad mode is on and a tensor of it requires grad,
and so does the op of ``torch.ops.qkrope`` that torch.compile differentiates. It keeps the call's
inputs and nothing else; the gradients are `qkrope.ops_backward`, run as an op of its own so that in
a compiled backward they are one node too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import ops
from .extras import NAMES

__all__ = ["TENSORS", "apply", "autograd_kernel", "backward_op"]

Tensor = torch.Tensor
Run = Callable[..., Sequence[Tensor]]

# The tensors of a call by the names of the op's schema, then what is none.
FIRST = ("q", "k", "q_weight", "k_weight", "positions")
TENSORS = (
    *(*FIRST, "k_positions", "q_bias", "k_bias", "q_scale", "k_scale", "v", "v_weight"),
    *("cos", "sin", "k_cos", "k_sin", "cos_sin_cache", "inv_freq"),
)
_SHOWN = {"k_cos": "k cos", "k_sin": "k sin", "k_positions": "positions[1]"}


def apply(run: Run, named: dict[str, Any]) -> Sequence[Tensor]:
    """``run(**named)``, differentiable; ``named`` by the schema, "spec" the Spec's text.

    Raises ValueError where a tensor requires grad that the call has no gradient for.
    """
    others = {name: x for name, x in named.items() if name in TENSORS and name not in NAMES}
    ops._refuse_grad(False, {_SHOWN.get(name, name): x for name, x in others.items()})
    _refuse_tangents(named)  # before the call runs; `jvp` would say it after
    rest = {name: x for name, x in named.items() if name not in TENSORS}
    return _QkNormRope.apply(run, rest, *(named.get(name) for name in TENSORS))


def _refuse_tangents(named: dict[str, Any]) -> None:
    if forward_ad._current_level >= 0:
        ops._refuse_tangents({_SHOWN.get(name, name): x for name, x in named.items()})


class _QkNormRope(torch.autograd.Function):
    """A call's results from its tensors; what is no tensor comes first."""

    @staticmethod
    def forward(run: Run, rest: dict[str, Any], *tensors: Any) -> tuple[Tensor, ...]:
        given = {n: x for n, x in zip(TENSORS, tensors, strict=True) if x is not None}
        return tuple(run(**given, **rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.rest, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        named = dict(zip(TENSORS, ctx.saved_tensors, strict=True))
        needs = dict(zip(TENSORS, ctx.needs_input_grad[2:], strict=True))
        with torch.no_grad():
            found = _gradients(named, needs, ctx.rest, grads)
        if torch.is_grad_enabled():  # create_graph=True
            roots = [x for x in (*grads, *named.values()) if x is not None and x.requires_grad]
            if roots:
                made = _Once.apply(len(roots), *roots, *found.values())
                found = dict(zip(found, made, strict=True))
        return (None, None, *(found.get(name) for name in TENSORS))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise ops.no_forward_mode(_first_of(tangents[2:]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        raise TypeError(
            f"{_first_of(in_dims[2:])}: expected a dense tensor, got one under torch.func.vmap; a "
            "call takes any leading dimensions, the batch's too; qkrope.reference.qk_norm_rope "
            "works under vmap"
        )


def _first_of(given: Sequence[Any]) -> str:
    """The name of the first tensor that there is something for."""
    name = next(n for n, x in zip(TENSORS, given, strict=True) if x is not None)
    return _SHOWN.get(name, name)


def _gradients(
    named: dict[str, Any], needs: dict[str, bool], rest: dict[str, Any], grads: Sequence[Any]
) -> dict[str, Tensor]:
    """The gradients that are needed, by name."""
    left = iter(grads)
    outputs = {side: next(left) for side in "qkv" if named[side] is not None}
    dy = [
        outputs.get(side)
        if any(needs.get(f"{side}{what}") for what in ("", "_weight", "_bias"))
        else None
        for side in "qkv"
    ]
    if all(g is None for g in dy):
        return {}
    wanted = [needs[name] for name in NAMES[3:]]
    made = [name for name, g in zip(NAMES, dy, strict=False) if g is not None]
    made += [n for n, want in zip(NAMES[3:], wanted, strict=True) if want and n[0] in made]
    more = {n: x for n, x in named.items() if n not in FIRST and x is not None}
    more |= {n: x for n, x in rest.items() if n != "spec"}
    first = (named[name] for name in FIRST)
    results = torch.ops.qkrope.qk_norm_rope_backward.default(
        *dy, *first, rest["spec"], wanted, **more
    )
    found = dict(zip(made, results, strict=True))
    return {n: x if n in "qkv" else x.to(named[n].dtype) for n, x in found.items() if needs[n]}


class _Once(torch.autograd.Function):
    """Gradients that have none of their own."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "qk_norm_rope: expected to be differentiated once, got a second time; "
            "qkrope.reference.qk_norm_rope has derivatives of every order"
        )


# ---- as ops -----------------------------------------------------------------------------------


def autograd_kernel(keyset: Any, *args: Any, **more: Any) -> list[Tensor]:
    """What ``torch.ops.qkrope.qk_norm_rope`` does under autograd."""

    def below(q: Any = None, k: Any = None, **given: Any) -> list[Tensor]:
        rest = (given.pop(name, None) for name in (*FIRST[2:], "spec"))
        op = torch.ops.qkrope.qk_norm_rope.default
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, q, k, *rest, **given)

    named = {**dict(zip((*FIRST, "spec"), args, strict=True)), **more}
    if forward_ad._current_level >= 0 and forward_ad._is_fwd_grad_enabled():
        _refuse_tangents(named)
        with forward_ad._set_fwd_grad_enabled(False):  # below autograd nobody can ask again
            return autograd_kernel(keyset, *args, **more)
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in named.values()):
        return list(apply(below, named))
    return below(**named)


def backward_op(run: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.ops.qkrope.qk_norm_rope_backward`` runs, and what tracing takes it for."""

    def backward(*args: Any, **more: Any) -> list[Tensor]:
        *inputs, wanted = args
        return [x for x in run(*inputs, wanted=wanted, **more) if x is not None]

    def fake(*args: Any, **more: Any) -> list[Tensor]:
        *dy, q, k, q_weight, k_weight, _, _, wanted = args
        sides = {"q": (q, dy[0]), "k": (k, dy[1]), "v": (more.get("v"), dy[2])}
        of = {"q_weight": q_weight, "k_weight": k_weight, **more}
        made = [x.new_empty(x.shape) for x, g in sides.values() if g is not None]
        for name, want in zip(NAMES[3:], wanted, strict=True):
            if want and sides[name[0]][1] is not None:
                made.append(of[name].new_empty(of[name].shape, dtype=torch.float32))
        return made

    return backward, fake
