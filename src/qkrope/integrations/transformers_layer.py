"""From one attention module and its config to the plan of its calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qkrope.config import FAMILIES
from qkrope.config_layers import Latent
from qkrope.norm import Norm
from qkrope.rounding import Rounding
from qkrope.spec import Spec

from .transformers_checks import check_frequencies, check_norm, form_of
from .transformers_flow import NORMS, Flow, NormSite, Refused, TurnSite, read
from .transformers_plan import Norming, Plan, Turn

__all__ = ["Layer", "plan_of"]

_NONE = Norm("none")


@dataclass(frozen=True)
class Layer:
    """One attention module: its layer's config, and what the patch has made already."""

    module: Any
    config: dict[str, Any]
    model_type: str
    rounding: Rounding
    frequencies: frozenset[int]  # lengths of the model's inv_freq
    made: dict[Any, Any]  # equal Specs are one object, and so one plan and one kernel

    @property
    def latent(self) -> Latent | None:
        """What the family's latent attention does, where it has it."""
        return FAMILIES[self.model_type].latent

    def spec(self, part: str = "attention") -> Spec:
        """The Spec of the layer."""
        try:
            return Spec.from_config(
                {**self.config, "model_type": self.model_type},
                self.module.layer_idx,
                rounding=self.rounding,
                part=part,
            )
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from None

    def one(self, spec: Spec) -> Spec:
        """The Spec equal to this one that was made first."""
        return self.made.setdefault(spec, spec)


def plan_of(layer: Layer) -> tuple[Plan, Flow]:
    """The plan of a module and the flow that it is of; Refused where something disagrees."""
    spec = layer.spec("attention" if layer.latent is None else "query")
    flow = read(layer.module, turns=spec.rope is not None)
    if (spec.rope is not None) != bool(flow.turns):
        said, done = (
            ("rotates", "does not") if spec.rope is not None else ("does not rotate", "does")
        )
        raise Refused(
            f"the config says that layer {layer.module.layer_idx} {said}, its code {done}"
        )
    values = _norms_of(layer, spec)
    _check_sides(layer, flow, values, spec)
    norms = {site.name: _norming(layer, site, values, spec) for site in flow.norms}
    turns = tuple(_turn(layer, flow, site, norms, spec) for site in flow.turns)
    apart = [site.name for site in flow.norms if site.met is None]
    return Plan({name: norms[name] for name in apart}, turns, tuple(apart)), flow


def _norms_of(layer: Layer, spec: Spec) -> dict[str, Norm]:
    """The norm of each side that has one."""
    found = {"q": spec.norm, "k": spec.k_norm_resolved, "v": spec.v_norm or _NONE}
    if (latent := layer.latent) is not None:
        eps = layer.config["rms_norm_eps"] if latent.eps is None else latent.eps
        found |= {"latent": Norm(eps=eps), "rest": Norm(eps=eps) if latent.rest else _NONE}
    return {side: norm for side, norm in found.items() if norm.kind != "none"}


def _check_sides(layer: Layer, flow: Flow, values: dict[str, Norm], spec: Spec) -> None:
    """Every norm of the config is called, and no other; each before or after as it says."""
    called = {side for site in flow.norms for side in _sides(site)}
    if extra := called - values.keys():
        raise Refused(f"its code normalises {' and '.join(sorted(extra))}, the config does not")
    missing = values.keys() - called
    if getattr(layer.module, "is_kv_shared_layer", False):
        missing -= {"k", "v", "latent", "rest"}  # an earlier layer's are taken
    if missing:
        raise Refused(f"the config normalises {' and '.join(sorted(missing))}, its code does not")
    first = spec.order == "norm_first"
    if any(site.met is not None and site.first != first for site in flow.norms):
        raise Refused("its code has norm and rotation in another order than the config")


def _sides(site: NormSite) -> tuple[str, ...]:
    side = NORMS[site.name]
    return ("q", "k") if side == "qk" else (side,)


def _norming(layer: Layer, site: NormSite, values: dict[str, Norm], spec: Spec) -> Norming:
    """How a norm runs by itself, after a look at the module."""
    module = getattr(layer.module, site.name, None)
    if not isinstance(module, nn.Module):
        raise Refused(f"{site.name} is no module")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise Refused(f"{site.name} has hooks, or a forward of its own, that would not run")
    side = _sides(site)[0]
    norm, of_q = values[side], side == "q"
    heads = spec.num_q_heads if of_q else spec.num_kv_heads
    head_dim = spec.head_dim
    if side == "latent":
        head_dim = layer.module.kv_lora_rank
    elif side == "rest":
        head_dim = spec.rotary_dim
    own = list(getattr(module, "norms", ())) or [module]
    shapes = {
        name: {tuple(getattr(m, name).shape) for m in own if _has(m, name)} for name in _AFFINE
    }
    shape = "split" if own[0] is not module else "row" if norm.scope == "row" else "last"
    if (heads, head_dim) in shapes["weight"]:
        shape = "heads"
    wanted = {"row": (heads * head_dim,), "heads": (heads, head_dim)}.get(shape, (head_dim,))
    if (shape == "split" and len(own) != heads) or any(s - {wanted} for s in shapes.values()):
        got = sorted({*shapes["weight"], *shapes["bias"]})
        raise Refused(f"{site.name}: expected {wanted} for the weight, got {got}")
    count = 1 if shape == "last" else heads
    rounding = spec.rounding
    if not isinstance(rounding, str):
        rounding = rounding[0 if of_q else 1]
    try:
        alone = Spec(count, count, head_dim, norm=norm, rope=None, rounding=rounding)
    except ValueError as error:
        raise Refused(f"{site.name}: {error}") from None
    step = Norming(site.name, layer.one(alone), shape, *(bool(shapes[n]) for n in _AFFINE))
    check_norm(module, step)
    return step


_AFFINE = ("weight", "bias")


def _has(module: nn.Module, name: str) -> bool:
    return module._parameters.get(name) is not None


def _turn(layer: Layer, flow: Flow, site: TurnSite, norms: dict[str, Norming], spec: Spec) -> Turn:
    """One rotation with the norms that met it."""
    assert spec.rope is not None
    function = flow.function.__globals__[site.name]
    steps = [None if n is None else norms[n.name] for n in site.norms]
    latent = layer.latent is not None
    part = replace(
        spec,
        num_kv_heads=1 if latent else spec.num_kv_heads,
        head_dim=spec.rotary_dim,
        norm=_NONE,
        k_norm=_NONE if steps[1] is None or not latent else steps[1].spec.norm,
        rope=replace(spec.rope, dim=None, offset=0, pair_distance=None),
        v_norm=None,
    )
    try:
        form = form_of(site.name, function, part if latent else spec)
    except Refused:
        if part.head_dim == spec.head_dim or any(steps):
            raise
        form = form_of(site.name, function, part)
    check_frequencies(form, layer.frequencies)
    side = ""
    if form.tensors == 1 and (first := site.norms[0]) is not None:
        side = _sides(first)[0]
        steps = [steps[0], None] if side == "q" else [None, steps[0]]
    whole = replace(
        spec,
        norm=_NONE if steps[0] is None else spec.norm,
        k_norm=_NONE if steps[1] is None else spec.k_norm_resolved,
        v_norm=None,
    )
    if latent:
        whole = part
    return Turn(layer.one(whole), layer.one(part), (steps[0], steps[1]), form, side)
