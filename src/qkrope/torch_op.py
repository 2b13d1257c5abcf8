"""The public calls as torch ops: what torch.compile, torch.export and ``torch.ops.qkrope`` run.

Importing this module registers the ops, once a process. A traced call of ``qkrope.qk_norm_rope``,
``qk_norm_rope_`` or ``qkv_norm_rope_`` does it by itself; a process that loads an exported program
says ``import qkrope.torch_op`` first. An op takes its Spec as text, ``Spec.canonical()``, which
means the same in every process. Pairs come apart: cos_sin as cos and sin, out as q_out and k_out,
positions as positions and k_positions. Everything else, results and errors too, is as in the
public calls, which are what the ops run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import cpu, ops
from .plan import refuse_no_spec
from .spec import Spec

__all__ = ["qk_norm_rope", "qk_norm_rope_", "qkv_norm_rope_"]

Tensor = torch.Tensor
_Op = Callable[..., Any]

_PAIRS = {"cos_sin": ("cos", "sin"), "out": ("q_out", "k_out")}
_SHOWN = {"q_out": "out[0]", "k_out": "out[1]"}  # what errors call them
_spec = cache(Spec.from_canonical)


# ---- what a traced call becomes ---------------------------------------------------------------


def qk_norm_rope(
    q: Tensor | None, k: Tensor | None, *rest: Any, **extras: Any
) -> tuple[Tensor | None, Tensor | None]:
    """``qkrope.qk_norm_rope`` as one node of a graph: same arguments, result and errors."""
    ops._first(q, k)
    args, more = _flat(*rest, **extras)
    if (out := extras["out"]) is not None:
        torch.ops.qkrope.qk_norm_rope.out(q, k, *args, **more)
        return out[0], out[1]
    q2, k2 = torch.ops.qkrope.qk_norm_rope.default(q, k, *args, **more)
    return None if q is None else q2, None if k is None else k2


def qk_norm_rope_(q: Tensor | None, k: Tensor | None, *rest: Any, **extras: Any) -> None:
    """``qkrope.qk_norm_rope_`` as one node of a graph."""
    ops._first(q, k)
    args, more = _flat(*rest, **extras)
    if extras["out"] is None:
        torch.ops.qkrope.qk_norm_rope_.default(q, k, *args, **more)
    else:
        torch.ops.qkrope.qk_norm_rope.out(q, k, *args, **more)


def qkv_norm_rope_(qkv: Tensor, *rest: Any, **extras: Any) -> None:
    """``qkrope.qkv_norm_rope_`` as one node of a graph."""
    args, more = _flat(*rest, **extras)
    if extras["out"] is not None:
        torch.ops.qkrope.qkv_norm_rope_.out(qkv, *args, **more)
    elif more:
        torch.ops.qkrope.qkv_norm_rope_.more(qkv, *args, **more)
    else:
        torch.ops.qkrope.qkv_norm_rope_.default(qkv, *args)


def _flat(
    q_weight: Any, k_weight: Any, positions: Any, spec: Spec, **extras: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pairs taken apart, as a schema wants them, and what is not given left out."""
    refuse_no_spec(spec)
    more = {name: value for name, value in extras.items() if name not in _PAIRS}
    for name, (first, second) in _PAIRS.items():
        if extras[name] is not None:
            more[first], more[second] = ops._pair(name, extras[name])
    if isinstance(positions, tuple | list):
        positions, more["k_positions"] = ops._pair("positions", positions)
    given = {name: value for name, value in more.items() if value is not None}
    return (q_weight, k_weight, positions, spec.canonical()), given


# ---- what an op runs --------------------------------------------------------------------------


def _whole(function: _Op) -> _Op:
    """A public call behind an op: the Spec of its text, and pairs put together again."""

    def run(*args: Any, **more: Any) -> Any:
        *inputs, positions, text = args
        if (k_positions := more.pop("k_positions", None)) is not None:
            positions = (positions, k_positions)
        for name, (first, second) in _PAIRS.items():
            pair = more.pop(first, None), more.pop(second, None)
            if pair[0] is not None or pair[1] is not None:
                more[name] = pair
        return function(*inputs, positions, _spec(text), **more)

    return run


def _into(function: _Op) -> _Op:
    """The same for calls with ``out``. None in it would mean the input, which the schema denies."""
    whole = _whole(function)

    def run(*args: Any, **more: Any) -> None:
        for i, name in enumerate(("q_out", "k_out")):
            if more.get(name) is None and (function is ops.qkv_norm_rope_ or args[i] is not None):
                raise TypeError(f"out[{i}]: expected a tensor, got None")
        whole(*args, **more)

    return run


def _qk_norm_rope(q: Tensor | None, k: Tensor | None, *rest: Any, **more: Any) -> Any:
    q2, k2 = _whole(ops.qk_norm_rope)(q, k, *rest, **more)
    return (k2.new_empty(0) if q2 is None else q2), (q2.new_empty(0) if k2 is None else k2)


def _qkv_norm_rope_(
    qkv: Tensor, q_weight: Any, k_weight: Any, positions: Tensor | None, text: str
) -> None:
    spec = _spec(text)
    if (plan := spec._plan) is None or torch.is_grad_enabled():
        ops.qkv_norm_rope_(qkv, q_weight, k_weight, positions, spec)
        return
    run = (ops._cuda or ops._load_cuda()) if qkv.is_cuda else cpu.qk_norm_rope
    run(plan, ops._UNWRITTEN_WEIGHTS, qkv, None, None, q_weight, k_weight, positions)


def _fake(result: str, *names: str) -> _Op:
    """What tracing takes an op for. Here, since traced tensors know it, no gradient is lost."""

    def fake(*args: Any, **more: Any) -> Any:
        if torch.is_grad_enabled():
            named = {**dict(zip((*names, "q_weight", "k_weight"), args, strict=False)), **more}
            ops._refuse_grad(result == "in place", {_SHOWN.get(n, n): x for n, x in named.items()})
        if result != "new":
            return None
        q, k = args[:2]
        return (
            k.new_empty(0) if q is None else q.new_empty(q.shape),
            q.new_empty(0) if k is None else k.new_empty(k.shape),
        )

    return fake


_REST = "Tensor? q_weight, Tensor? k_weight, Tensor? positions, str spec"
_MORE = f"{_REST}, *, Tensor? k_positions=None, Tensor? q_bias=None, Tensor? k_bias=None"
_MORE += ", Tensor? cos=None, Tensor? sin=None, Tensor? cos_sin_cache=None, Tensor? inv_freq=None"
_MORE += ", SymInt? seq_len=None"
_OUT = f"{_MORE}, Tensor(a!)? q_out=None, Tensor(b!)? k_out=None"
_PACKED = _fake("in place", "qkv")
_OPS: dict[str, tuple[_Op, _Op]] = {
    # The result of an absent side is an empty tensor: a schema has no other word for None.
    f"qk_norm_rope(Tensor? q, Tensor? k, {_MORE}) -> (Tensor, Tensor)":
        (_qk_norm_rope, _fake("new", "q", "k")),
    f"qk_norm_rope.out(Tensor? q, Tensor? k, {_OUT}) -> ()":
        (_into(ops.qk_norm_rope_), _fake("out", "q", "k")),
    f"qk_norm_rope_(Tensor(a!)? q, Tensor(b!)? k, {_MORE}) -> ()":
        (_whole(ops.qk_norm_rope_), _fake("in place", "q", "k")),
    # The plain call has a schema of its own: ten more arguments would cost each call 0.5 us.
    f"qkv_norm_rope_(Tensor(a!) qkv, {_REST}) -> ()": (_qkv_norm_rope_, _PACKED),
    f"qkv_norm_rope_.more(Tensor(a!) qkv, {_MORE}) -> ()": (_whole(ops.qkv_norm_rope_), _PACKED),
    f"qkv_norm_rope_.out(Tensor qkv, {_OUT}) -> ()": (_into(ops.qkv_norm_rope_), _PACKED),
}  # fmt: skip
_library = torch.library.Library("qkrope", "DEF")
for _schema, (_run, _traced) in _OPS.items():
    # Strides stay as the model made them: any will do, and to change them would be a copy.
    _tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=_tags)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"qkrope::{_name}", _traced, lib=_library)
