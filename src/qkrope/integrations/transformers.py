"""Hugging Face transformers: the norm and rotation of every attention layer through qkrope.

    from qkrope.integrations.transformers import patch, unpatch, patched

    report = patch(model)              # model.generate, training, torch.compile: as before
    unpatch(model)                     # the model as it was
    with patched(model, rounding="upstream"): ...

`patch` gives each attention *instance* a forward of its own: the source of the model's, where
what norms q and k and what rotates them is one call of `qkrope.qk_norm_rope` with the model's own
cos and sin. Weights, state_dict, the KV cache and the choice of attention function stay as they
are, as do other models of the same class. What each instance does comes from
``Spec.from_config(model.config, layer)``, is found in its source and checked against its modules by
numbers; where anything does not agree the module stays as it was and is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qkrope.config import FAMILIES
from qkrope.rounding import Rounding, canonical_rounding

from .report import Report, block, grouped, warn_left
from .transformers_flow import Refused, is_ours, rewrite, rotations
from .transformers_layer import Layer, plan_of
from .transformers_plan import Plan

__all__ = ["Report", "patch", "patched", "unpatch"]

_PLAN = "_qkrope"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def patch(model: nn.Module, *, rounding: Rounding = "once") -> Report:
    """Put qkrope's fused norm and rotation into the attention layers of a model.

    model: a transformers model, or any module that holds one; text families are those of
    ``Spec.from_config``. Nothing is copied or moved: weights are read where they are, at each call.
    rounding: as in `qkrope.Spec`; "once" is nearest to the exact value, "upstream" repeats the
    casts of the model's own code (the same bits but for ties), "eager" those of Llama's.

    Returns a `Report`. Modules of text families that are left are named in a UserWarning too.
    Raises ValueError where a module is patched already, or where there is nothing to patch, and for
    a rounding that is none; TypeError for something else than a module. Until all is planned
    nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    if rounding != "upstream":
        canonical_rounding("rounding", rounding)
    plans: list[tuple[nn.Module, Plan, FunctionType]] = []
    done: dict[str, str] = {}
    left: dict[str, str] = {}
    warned: dict[str, str] = {}
    made: dict[Any, Any] = {}
    if ours := _ours(model):
        name = next(iter(ours))
        raise ValueError(f"model: expected one that is not patched, got {name} patched already")
    for name, module, owner, config in _candidates(model):
        text = getattr(config, "model_type", None) in FAMILIES
        try:
            plan, flow = plan_of(_layer(module, owner, config, text, rounding, made))
            if not (plan.turns or plan.norms):
                left[name] = "a layer without norm and rotation"
                continue
            plans.append((module, plan, rewrite(flow)))
            done[name] = _said(plan)
        except Refused as reason:
            left[name] = str(reason)
            if text:
                warned[name] = left[name]
    if not plans:
        found = "; ".join(grouped(left)) or "no module that rotates q and k"
        raise ValueError(f"model: expected attention layers that qkrope can run, got {found}")
    for module, plan, function in plans:
        setattr(module, _PLAN, plan)
        module.forward = MethodType(function, module)
    warn_left(warned)
    return Report(done, left)


def unpatch(model: nn.Module) -> int:
    """Give every patched module of the model its class's forward back; returns how many were.

    Raises ValueError, and changes nothing, where something else has wrapped or replaced a forward
    since the patch.
    """
    found = _ours(model)
    for module in found.values():
        del module.forward
        delattr(module, _PLAN)
    return len(found)


def patched(model: nn.Module, *, rounding: Rounding = "once") -> AbstractContextManager[Report]:
    """`patch` for the length of a ``with`` block, whatever ends it."""
    return block(patch, unpatch, model, rounding)


def _ours(model: nn.Module) -> dict[str, nn.Module]:
    """The patched modules by name; ValueError where another forward stands before ours."""
    found: dict[str, nn.Module] = {}
    covered = []
    for name, module in model.named_modules():
        own = vars(module).get("forward")
        function = getattr(own, "__func__", None)
        if is_ours(function):
            found[name] = module
        elif _PLAN in vars(module) and own is not None and function is not type(module).forward:
            covered.append(name or "the model itself")
    if covered:
        raise ValueError(
            f"model: expected qkrope's own forward where it was patched, got another in "
            f"{', '.join(covered)}: remove the hook (accelerate's, for one) that wraps it first"
        )
    return found


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, Any]]:
    """Modules that call a rotation, each with the innermost model that it is of and the config."""
    owners: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        if not rotations(type(module).forward):
            continue
        within = [m for outer, m in owners.items() if not outer or name.startswith(outer + ".")]
        config = within[-1].config if within else None
        if getattr(config, "model_type", None) not in FAMILIES:
            config = getattr(module, "config", config)
        yield name, module, within[-1] if within else module, config


def _layer(
    module: Any,
    owner: nn.Module,
    config: Any,
    text: bool,
    rounding: Rounding,
    made: dict[Any, Any],
) -> Layer:
    """The layer that a module is, or Refused."""
    kind = type(module).__name__
    if not text:
        model_type = getattr(config, "model_type", None)
        raise Refused(f"{kind}: {model_type!r} is no text model that Spec.from_config knows")
    if _INTERFACE not in type(module).forward.__code__.co_names:
        raise Refused(f"{kind}: not the attention itself; its own heads stay with the model")
    own = vars(module).get("forward")  # its class's, where a patched model has been pickled
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise Refused(f"{kind}: something else has replaced its forward")
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise Refused(f"{kind}: it does not know its layer_idx")
    if id(config) not in made:
        made[id(config)] = config.to_dict()
    lengths = {b.numel() for n, b in owner.named_buffers() if n.endswith("inv_freq")}
    values = made[id(config)], config.model_type, rounding
    return Layer(module, *values, frozenset(lengths), made)


def _said(plan: Plan) -> str:
    """What a forward calls."""
    turned = []
    for turn in plan.turns:
        names = [n.name for n in turn.norms if n is not None]
        turned.append(" + ".join([*names, "rotation"]))
    return ", ".join([*turned, *(n for n in plan.apart)])
