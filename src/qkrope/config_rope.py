"""What a layer of a Hugging Face config rotates: rope_parameters, or the keys of older files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ._limits import integers, real
from .config_fields import SCALINGS, RopeFields
from .rope import MAX_AXES, Rope
from .scaling import Linear, Scaling

if TYPE_CHECKING:
    from .config_layers import Layer

__all__ = ["compressed", "flat", "nested", "scaled_layers", "unless"]

RopeOf = Callable[["Layer"], Rope | None]


def flat(layer: Layer) -> Rope | None:
    """One set of rope_parameters (rope_scaling in older files) for all layers."""
    c, family = layer.config, layer.family
    old, new = c.get("rope_scaling", None) or {}, c.get("rope_parameters", None) or {}
    if old and new and dict(old) != dict(new):
        c.refuse("rope_scaling or rope_parameters, or both alike", "two that differ")
    fields = RopeFields(c, old or new or family.ropes.get("", {}))
    theta = fields.get("rope_theta", c.get("rope_theta", None) or family.theta)
    return finish(layer, fields, theta, _partial(layer, fields))


def nested(layer: Layer) -> Rope | None:
    """Its own parameters for each layer type. A layer type whose parameters are null does not
    rotate. Files that are older than this form scale the full layers alone.
    """
    c, family = layer.config, layer.family
    old, new = c.get("rope_scaling", None) or {}, c.get("rope_parameters", None) or {}
    if old and (family.ropes or family.latent):
        c.refuse("rope_parameters, as the model ignores rope_scaling", old)
    if new and not {*new} <= {*family.attention}:
        c.refuse("rope_parameters with keys " + " and ".join(family.attention), sorted(new))
    data = new[layer.kind] if layer.kind in new else family.ropes.get(layer.kind, {})
    if data is None:
        return None
    theta = c.get("rope_theta", None) or family.theta
    if layer.kind != "sliding_attention":
        data = {**data, **old}
    elif family.local_theta:
        named = c.get("rope_local_base_freq", c.get("swa_rope_theta", None))
        theta = named or family.local_theta
    fields = RopeFields(c, data)
    return finish(layer, fields, fields.get("rope_theta", theta), _partial(layer, fields))


def compressed(layer: Layer) -> Rope | None:
    """DeepSeek-V4: "main" for sliding layers, "compress" (scaled) for those with a compressor."""
    c = layer.config
    old, new = c.get("rope_scaling", None) or {}, dict(c.get("rope_parameters", None) or {})
    label = "main" if layer.kind == "sliding_attention" else "compress"
    if isinstance(new.get("main"), dict) and isinstance(new.get("compress"), dict):
        fields = RopeFields(c, new[label])
        theta = fields.get("rope_theta")
    else:
        data = dict(old or new) if label == "compress" else {}
        data.pop("rope_theta", None)
        if data.get("rope_type", data.get("type")) == "yarn":
            data.setdefault("attention_factor", 1.0)  # cos and sin are not scaled
        fields = RopeFields(c, data)
        key, default = ("rope_theta", 1e4) if label == "main" else ("compress_rope_theta", 1.6e5)
        theta = c.get(key, default)
    share = fields.get("partial_rotary_factor", c.get("partial_rotary_factor", None))
    if share is None:
        share = c.get("qk_rope_head_dim", 64) / layer.head_dim
    return finish(layer, fields, theta, share)


def unless(condition: Callable[[Layer], bool], rope: RopeOf = flat) -> RopeOf:
    """The rope of a layer, None where ``condition`` says that it has no positions."""
    return lambda layer: None if condition(layer) else rope(layer)


def scaled_layers(layer: Layer) -> Rope | None:
    """Molmo2: layers outside rope_scaling_layers keep theta and drop the scaling."""
    rope = flat(layer)
    scaled = layer.config.get("rope_scaling_layers", None)
    if rope is None or scaled is None or layer.index in scaled:
        return rope
    return replace(rope, scaling=None)


def _partial(layer: Layer, fields: RopeFields) -> Any:
    c, family = layer.config, layer.family
    share = fields.get("partial_rotary_factor", c.get("partial_rotary_factor", None))
    if share is None and family.partial is not None:
        share = family.partial(layer)
    return share


def finish(layer: Layer, fields: RopeFields, theta: Any, share: Any) -> Rope:
    """The Rope of a layer; every field that nobody read is refused."""
    c, family = layer.config, layer.family
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "proportional":
        return _proportional(layer, fields, theta, share)
    dim = _rotary_dim(layer, share)
    section = _section(layer, fields, dim)
    for name in family.unused:
        fields.get(name, None)
    kind = family.aliases.get(kind, kind)
    if kind not in SCALINGS:
        known = ", ".join(sorted({*SCALINGS, "proportional"}))
        c.refuse(f"rope_type one of {known}", repr(kind))
    scaling = SCALINGS[kind](fields, c.get("original_max_position_embeddings", None))
    fields.close(kind)
    return Rope(
        dim=None if dim == layer.head_dim else dim,
        theta=theta,
        pairing=layer.pairing,
        scaling=scaling,
        offset=layer.head_dim - dim if layer.trailing else 0,
        reverse=layer.reverse,
        output_pairing=layer.output_pairing,
        mrope_section=section,
        mrope_interleaved=section is not None and family.mrope == "interleaved",
    )


def _rotary_dim(layer: Layer, share: Any) -> int:
    c = layer.config
    share = 1.0 if share is None else real("partial_rotary_factor", share, above=0.0)
    if layer.rotary is not None:  # a width of its own; the share then only repeats it
        if share != 1 and layer.rotary not in {int(width * share) for width in layer.shared}:
            c.refuse(f"a partial_rotary_factor that gives {layer.rotary} channels", share)
        return layer.rotary
    if share != 1 and layer.family.partial is None:
        c.refuse("partial_rotary_factor of 1, as the model ignores it", share)
    return int(layer.head_dim * share)


def _proportional(layer: Layer, fields: RopeFields, theta: Any, share: Any) -> Rope:
    """Frequencies of the whole head for its first pairs; the distance of a pair stays half a head.

    What transformers calls "proportional": pair i < int(share * head_dim / 2) turns, the others
    have frequency 0.
    """
    head_dim = layer.head_dim
    if not layer.family.proportional:
        layer.config.refuse("a rope_type that the model knows", repr("proportional"))
    share = 1.0 if share is None else real("partial_rotary_factor", share, above=0.0)
    factor = fields.get("factor", 1.0)
    scaling: Scaling | None = None if factor == 1 else Linear(factor)
    fields.close("proportional")
    dim = 2 * int(share * head_dim // 2)
    if dim == head_dim:
        return Rope(theta=theta, scaling=scaling)
    return Rope(dim, theta, scaling=scaling, pair_distance=head_dim // 2, freq_dim=head_dim)


def _section(layer: Layer, fields: RopeFields, dim: int) -> tuple[int, ...] | None:
    """Pairs of each axis. Interleaved layouts give axis 0 whatever the others leave."""
    family = layer.family
    if not family.mrope:
        return None
    for name in ("mrope_interleaved", "interleaved"):
        if fields.get(name, expected := family.mrope == "interleaved") is not expected:
            layer.config.refuse(f"{name} of {expected}, as the model is built", not expected)
    section = fields.get("mrope_section", fields.get("xdrope_section", None) or family.axes)
    if not section:
        fields.get("mrope_section")  # says that it is missing
    section = [int(n) if isinstance(n, float) and n == int(n) else n for n in section]
    section = integers("mrope_section", section, (2, MAX_AXES), 1 << 12)
    if family.mrope == "chunked":
        return section
    n, pairs = len(section), dim // 2
    others = [len(range(a, min(n * section[a], pairs), n)) for a in range(1, n)]
    return (pairs - sum(others), *others)
