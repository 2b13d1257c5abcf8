"""The public calls as torch ops: what torch.compile, torch.export and ``torch.ops.qkrope`` run.

Importing this module registers the ops, once a process. A traced call of ``qkrope.qk_norm_rope``,
``qk_norm_rope_`` or ``qkv_norm_rope_`` does it by itself; a process that loads an exported program
says ``import qkrope.torch_op`` first. An op takes its Spec as text, ``Spec.canonical()``, which
means the same in every process. What holds several values comes apart: cos_sin as cos, sin, k_cos
and k_sin, out as q_out, k_out and v_out, positions as positions and k_positions; a scale that is a
number is q_scale_number or k_scale_number. Everything else, errors too, is as in the public calls,
which are what the ops run. ``qk_norm_rope_backward`` is the gradient of ``qk_norm_rope``
(`qkrope.torch_grad`); the other ops have none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.autograd import forward_ad

from . import cpu, ops, ops_backward, torch_grad
from .extras import Extras, _tables, pair
from .plan import refuse_no_spec
from .spec import Spec

__all__ = ["qk_norm_rope", "qk_norm_rope_", "qkv_norm_rope_"]

Tensor = torch.Tensor
_Op = Callable[..., Any]

_TABLES = ("cos", "sin", "k_cos", "k_sin")
_OUT = ("q_out", "k_out", "v_out")
_SCALES = ("q_scale", "k_scale")
# What errors call them.
_SHOWN = {"k_cos": "k cos", "k_sin": "k sin"} | {name: f"out[{i}]" for i, name in enumerate(_OUT)}
_spec = cache(Spec.from_canonical)


# ---- what a traced call becomes ---------------------------------------------------------------


def qk_norm_rope(
    q: Tensor | None, k: Tensor | None, *rest: Any, **extras: Any
) -> tuple[Tensor | None, ...]:
    """``qkrope.qk_norm_rope`` as one node of a graph: same arguments, results and errors."""
    args, more = _flat((q, k), *rest, **extras)
    if (out := extras.get("out")) is not None:
        torch.ops.qkrope.qk_norm_rope.out(q, k, *args, **more)
        return tuple(out)
    made = iter(torch.ops.qkrope.qk_norm_rope.default(q, k, *args, **more))
    given = (q, k) if extras.get("v") is None else (q, k, extras["v"])
    return tuple([None if x is None else next(made) for x in given])


def qk_norm_rope_with_gradients(
    q: Tensor | None, k: Tensor | None, *rest: Any, **extras: Any
) -> tuple[Tensor | None, ...]:
    """``qkrope.qk_norm_rope`` of tensors that require grad, eagerly: the call's own errors."""
    args, more = _flat((q, k), *rest, **extras)
    named = {"q": q, "k": k, **dict(zip(_POSITIONAL, args, strict=True)), **more}
    made = iter(torch_grad.apply(_with_gradients, named))
    given = (q, k) if extras.get("v") is None else (q, k, extras["v"])
    return tuple([None if x is None else next(made) for x in given])


def qk_norm_rope_(q: Tensor | None, k: Tensor | None, *rest: Any, **extras: Any) -> None:
    """``qkrope.qk_norm_rope_`` as one node of a graph."""
    args, more = _flat((q, k), *rest, **extras)
    if extras.get("out") is None:
        torch.ops.qkrope.qk_norm_rope_.default(q, k, *args, **more)
    else:
        torch.ops.qkrope.qk_norm_rope.out(q, k, *args, **more)


def qkv_norm_rope_(qkv: Tensor, *rest: Any, **extras: Any) -> None:
    """``qkrope.qkv_norm_rope_`` as one node of a graph."""
    args, more = _flat((qkv,), *rest, **extras)
    if extras.get("out") is not None:
        torch.ops.qkrope.qkv_norm_rope_.out(qkv, *args, **more)
    elif more:
        torch.ops.qkrope.qkv_norm_rope_.more(qkv, *args, **more)
    else:
        torch.ops.qkrope.qkv_norm_rope_.default(qkv, *args)


def _flat(
    inputs: tuple[Any, ...], q_weight: Any, k_weight: Any, positions: Any, spec: Spec, **extras: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments as a schema wants them, without those that are not given."""
    refuse_no_spec(spec)
    if all(x is None for x in inputs):
        ops._first(*inputs)  # raises
    for name in extras:
        if name not in Extras.__annotations__:
            raise TypeError(f"{name}: expected a keyword of qkrope.qk_norm_rope, got this one")
    more = {name: value for name, value in extras.items() if name not in ("cos_sin", "out")}
    sides = (True, True) if len(inputs) == 1 else (inputs[0] is not None, inputs[1] is not None)
    more.update(zip(_TABLES, _tables(extras.get("cos_sin"), sides), strict=True))
    if (out := extras.get("out")) is not None:
        more.update(zip(_OUT, pair("out", out, 3 if len(out) == 3 else 2), strict=False))
    for name in _SCALES:
        if name in more and not isinstance(more[name], Tensor):
            more[f"{name}_number"] = more.pop(name)
    if isinstance(positions, tuple | list):
        positions, more["k_positions"] = pair("positions", positions)
    given = {name: value for name, value in more.items() if value is not None}
    return (q_weight, k_weight, positions, spec.canonical()), given


# ---- what an op runs --------------------------------------------------------------------------


def _whole(function: _Op) -> _Op:
    """A public call behind an op: the Spec of its text, and what came apart put together."""

    def run(*args: Any, **more: Any) -> Any:
        *inputs, positions, text = args
        if (k_positions := more.pop("k_positions", None)) is not None:
            positions = (positions, k_positions)
        cos, sin, k_cos, k_sin = (more.pop(name, None) for name in _TABLES)
        if k_cos is not None or k_sin is not None:
            first = None if cos is None and sin is None else (cos, sin)
            more["cos_sin"] = (first, (k_cos, k_sin))
        elif cos is not None or sin is not None:
            more["cos_sin"] = (cos, sin)
        outs = tuple(more.pop(name, None) for name in _OUT)
        if any(out is not None for out in outs):
            more["out"] = outs if outs[2] is not None else outs[:2]
        for name in _SCALES:
            if (number := more.pop(f"{name}_number", None)) is not None:
                more[name] = number
        return function(*inputs, positions, _spec(text), **more)

    return run


def _into(function: _Op) -> _Op:
    """The same for calls with ``out``. None in it would mean the input, which the schema denies."""
    whole = _whole(function)

    def run(*args: Any, **more: Any) -> None:
        if function is ops.qkv_norm_rope_:
            needed: tuple[bool, ...] = (True, True, _spec(args[-1]).v_norm is not None)
        else:
            needed = tuple(x is not None for x in (*args[:2], more.get("v")))
        for i, name in enumerate(_OUT):
            if needed[i] and more.get(name) is None:
                raise TypeError(f"out[{i}]: expected a tensor, got None")
        whole(*args, **more)

    return run


def _qk_norm_rope(*args: Any, **more: Any) -> list[Tensor]:
    # In a compiled training step grad mode is off: whoever runs this may have written the weights.
    made = _whole(partial(ops._qk_norm_rope, None))(*args, **more)
    return [y for y in made if y is not None]


def _with_gradients(q: Any = None, k: Any = None, **more: Any) -> list[Tensor]:
    rest = (more.pop(name, None) for name in _POSITIONAL)
    return _qk_norm_rope(q, k, *rest, **more)


def _qkv_norm_rope_(
    qkv: Tensor, q_weight: Any, k_weight: Any, positions: Tensor | None, text: str
) -> None:
    spec = _spec(text)
    if (plan := spec._plan) is None or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        ops.qkv_norm_rope_(qkv, q_weight, k_weight, positions, spec)
        return
    run = (ops._cuda or ops._load_cuda()) if qkv.is_cuda else cpu.qk_norm_rope
    run(plan, ops._UNWRITTEN_WEIGHTS, qkv, None, None, q_weight, k_weight, positions)


def _fake(result: str, *names: str) -> _Op:
    """What tracing takes an op for. Here, since traced tensors know it, no gradient is lost."""

    def fake(*args: Any, **more: Any) -> list[Tensor] | None:
        if result != "new" and forward_ad._current_level >= 0 and forward_ad._is_fwd_grad_enabled():
            raise ValueError(  # nobody can ask a fake tensor for its tangent
                f"{names[0]}: expected no dual level of forward-mode AD (torch.func.jvp) around a "
                "traced call in place or with out=, got one; trace qk_norm_rope, or call "
                "qkrope.reference.qk_norm_rope, which has derivatives in forward mode"
            )
        if torch.is_grad_enabled():
            named = {**dict(zip((*names, "q_weight", "k_weight"), args, strict=False)), **more}
            ops._refuse_grad(result == "in place", {_SHOWN.get(n, n): x for n, x in named.items()})
        if result != "new":
            return None
        return [x.new_empty(x.shape) for x in (*args[:2], more.get("v")) if x is not None]

    return fake


def _schema(inputs: str, v: str = "", out: str = "", last: str = "") -> str:
    optional = f"k_positions q_bias k_bias q_scale k_scale {v} v_weight".split()
    optional += [*_TABLES, "cos_sin_cache", "inv_freq"]
    tensors = ", ".join(f"Tensor? {name}=None" for name in optional)
    tensors = tensors.replace("Tensor? v!", "Tensor(c!)? v")
    numbers = "float? q_scale_number=None, float? k_scale_number=None, SymInt? seq_len=None"
    numbers += ", SymInt rotate_from=0, SymInt? rotate_to=None"
    return f"({inputs}, {_REST}{last}, *, {tensors}, {numbers}{out})"


_REST = "Tensor? q_weight, Tensor? k_weight, Tensor? positions, str spec"
_POSITIONAL = ("q_weight", "k_weight", "positions", "spec")
_GRADS = "Tensor? dq_out, Tensor? dk_out, Tensor? dv_out, Tensor? q, Tensor? k"
_OUTS = ", Tensor(a!)? q_out=None, Tensor(b!)? k_out=None, Tensor(c!)? v_out=None"
_APART, _PACKED = _fake("in place", "q", "k"), _fake("in place", "qkv")
_OPS: dict[str, tuple[_Op, _Op]] = {
    # The results of the inputs that are given, in the order q, k, v.
    f"qk_norm_rope{_schema('Tensor? q, Tensor? k', 'v')} -> Tensor[]":
        (_qk_norm_rope, _fake("new", "q", "k")),
    f"qk_norm_rope.out{_schema('Tensor? q, Tensor? k', 'v', _OUTS)} -> ()":
        (_into(ops.qk_norm_rope_), _fake("out", "q", "k")),
    f"qk_norm_rope_{_schema('Tensor(a!)? q, Tensor(b!)? k', 'v!')} -> ()":
        (_whole(ops.qk_norm_rope_), _APART),
    # The plain call has a schema of its own: the other arguments would cost each call 0.5 us.
    f"qkv_norm_rope_(Tensor(a!) qkv, {_REST}) -> ()": (_qkv_norm_rope_, _PACKED),
    f"qkv_norm_rope_.more{_schema('Tensor(a!) qkv')} -> ()": (_whole(ops.qkv_norm_rope_), _PACKED),
    f"qkv_norm_rope_.out{_schema('Tensor qkv', out=_OUTS)} -> ()":
        (_into(ops.qkv_norm_rope_), _PACKED),
    # Those made, in the order of ops_backward.NAMES; wanted: of its last five.
    f"qk_norm_rope_backward{_schema(_GRADS, 'v', last=', bool[] wanted')} -> Tensor[]":
        torch_grad.backward_op(_whole(ops_backward.qk_norm_rope_backward)),
}  # fmt: skip
_library = torch.library.Library("qkrope", "DEF")
for _text, (_run, _traced) in _OPS.items():
    # Strides stay as the model made them: any will do, and to change them would be a copy.
    _tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    _name = _text.partition("(")[0]
    _library.define(_text, tags=_tags)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    if _name == "qk_norm_rope":
        _library.impl(_name, torch_grad.autograd_kernel, "Autograd", with_keyset=True)
    else:
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"qkrope::{_name}", _traced, lib=_library)
