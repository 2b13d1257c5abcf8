"""``Spec.from_config``: one attention layer of a Hugging Face config as a Spec.

``FAMILIES`` maps a model_type to what that architecture does to Q and K. A model_type, rope type
or rope field that is not known raises ValueError: nothing is guessed. Where a key is absent the
value is the one the architecture's own config class would use.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ._limits import integer, real, refuse
from .config_fields import REQUIRED, SCALINGS, Config, RopeFields
from .spec import Norm, Rope, Spec

__all__ = ["FAMILIES", "spec_from_config"]


def spec_from_config(config: Any, layer_idx: int | None = None, *, rounding: str = "once") -> Spec:
    """The Spec of layer ``layer_idx`` of a config.

    ``config`` is a ``transformers`` config object, a dict, or the path of a config.json or of its
    folder; the text part of a vision-language config is taken. ``layer_idx=None`` is the first
    layer that has attention (layer 0 of most models). Layers differ where a model mixes local and
    global attention.

    Models whose positions have several axes (Qwen3-VL, Qwen3.5) give the Spec of one axis, with a
    UserWarning: it is exact for text, where the axes agree; for image and video tokens pass the
    model's own table as ``cos_sin``.

    Raises ValueError naming what is missing or not known, TypeError for another kind of object.
    """
    c = _open(config)
    family = FAMILIES[c.model_type]
    layer = _attention_layer(c, family, layer_idx)
    num_q_heads = c.integer("num_attention_heads")
    num_kv_heads = c.get("num_key_value_heads", None if family.kv_optional else REQUIRED)
    head_dim = c.get("head_dim", family.head_dim)
    if head_dim is None:
        head_dim = c.integer("hidden_size") // num_q_heads
    return Spec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_q_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        norm=family.norm(c),
        rope=family.rope(c, family, layer, head_dim),
        order=family.order,
        rounding=rounding,
        max_position_embeddings=c.get("max_position_embeddings", None),
    )


def _open(config: Any) -> Config:
    """The text part of any accepted form of config."""
    if isinstance(config, str | os.PathLike):
        if Path(config).is_dir():
            config = Path(config) / "config.json"
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        refuse(TypeError, "config", "a transformers config, a dict or a path", config)
    model_type = config.get("model_type")
    if model_type in _TEXT_PARTS and config.get("text_config") is not None:
        config = config["text_config"]
        config = config.to_dict() if hasattr(config, "to_dict") else config
        model_type = config.get("model_type", _TEXT_PARTS[model_type])
    if model_type not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *_TEXT_PARTS}))
        refuse(ValueError, "config.model_type", f"one of {known}", model_type)
    return Config(model_type, config, FAMILIES[model_type].defaults)


def _attention_layer(c: Config, family: _Family, layer_idx: int | None) -> str:
    """The type of a layer, which must have attention."""
    types = family.layer_types(c)
    first = next((i for i, kind in enumerate(types) if kind in _ATTENTION), None)
    if layer_idx is None:
        layer_idx = first or 0
    num_layers = len(types) or c.get("num_hidden_layers", None) or 1 << 16
    layer = integer("layer_idx", layer_idx, 0, num_layers - 1)
    kind = types[layer] if types else "full_attention"
    if kind not in _ATTENTION:
        c.refuse(f"layer_idx of an attention layer (the first is {first})", f"{layer}: {kind!r}")
    return kind


_ATTENTION = ("full_attention", "sliding_attention")


# Layer types: the config's own list, else the pattern its class would fill in.


def _listed(c: Config) -> list[str]:
    return list(c.get("layer_types", None) or ())


def _every(interval_key: str | None, interval: int, other: str) -> Callable[[Config], list[str]]:
    """Full attention on every n-th layer, ``other`` on the rest."""

    def types(c: Config) -> list[str]:
        if listed := _listed(c):
            return listed
        n = interval
        if interval_key is not None and c.get(interval_key, None) is not None:
            n = c.integer(interval_key)
        layers = range(1, c.integer("num_hidden_layers") + 1)
        return [other if i % n else "full_attention" for i in layers]

    return types


def _exaone4_layers(c: Config) -> list[str]:
    if c.get("sliding_window", 4096) is None:
        return []
    return _every("sliding_window_pattern", 4, "sliding_attention")(c)


def _lfm2_layers(c: Config) -> list[str]:
    listed, full = _listed(c), c.get("full_attn_idxs", None)
    if listed or full is None:
        return listed
    layers = range(c.integer("num_hidden_layers"))
    return ["full_attention" if i in full else "conv" for i in layers]


# Norms.


def _rms(eps_key: str = "rms_norm_eps", **fields: Any) -> Callable[[Config], Norm]:
    return lambda c: Norm(eps=c.get(eps_key), **fields)


def _no_norm(c: Config) -> Norm:
    return Norm(kind="none")


def _glm4_moe_norm(c: Config) -> Norm:
    return _rms()(c) if c.get("use_qk_norm", False) else Norm(kind="none")


def _olmoe_norm(c: Config) -> Norm:
    if c.get("clip_qkv", None) is not None:
        c.refuse("clip_qkv of null", c.get("clip_qkv"))
    return _rms(scope="row")(c)


# Ropes: what a layer rotates, from rope_parameters (rope_scaling in older files).


def _rope(c: Config, family: _Family, layer: str, head_dim: int) -> Rope | None:
    old, new = c.get("rope_scaling", None) or {}, c.get("rope_parameters", None) or {}
    if old and new and dict(old) != dict(new):
        c.refuse("rope_scaling or rope_parameters, or both alike", "two that differ")
    fields = RopeFields(c, old or new)
    theta = fields.get("rope_theta", c.get("rope_theta", None) or family.theta)
    partial = fields.get("partial_rotary_factor", c.get("partial_rotary_factor", None))
    if partial is None:
        partial = family.partial(c, head_dim) if family.partial else None
    trained = c.get("original_max_position_embeddings", None)
    return _finish(family, fields, theta, partial, trained, head_dim)


def _rope_by_layer(c: Config, family: _Family, layer: str, head_dim: int) -> Rope | None:
    """Its own parameters for each layer type; older files scale the full layers alone."""
    old, new = c.get("rope_scaling", None) or {}, c.get("rope_parameters", None) or {}
    if new and not {*new} <= {*_ATTENTION}:
        c.refuse("rope_parameters with keys " + " and ".join(_ATTENTION), sorted(new))
    data = dict(new.get(layer) or {})
    theta = c.get("rope_theta", None) or family.theta
    if layer == "full_attention":
        data |= old
    elif family.local_theta:
        theta = c.get("rope_local_base_freq", None) or family.local_theta
    fields = RopeFields(c, data)
    theta = fields.get("rope_theta", theta)
    return _finish(family, fields, theta, fields.get("partial_rotary_factor", None), None, head_dim)


def _exaone4_rope(c: Config, family: _Family, layer: str, head_dim: int) -> Rope | None:
    hybrid = c.get("sliding_window", 4096) is not None
    return None if hybrid and layer == "full_attention" else _rope(c, family, layer, head_dim)


def _finish(
    family: _Family, fields: RopeFields, theta: Any, partial: Any, trained: Any, head_dim: int
) -> Rope:
    dim = None
    if partial is not None and (partial := real("partial_rotary_factor", partial, above=0.0)) != 1:
        if family.partial is None:
            fields.config.refuse("partial_rotary_factor of 1, as the model ignores it", partial)
        dim = int(head_dim * partial)
    kind = fields.get("type", "default")
    kind = fields.get("rope_type", kind)
    if family.axes:
        fields.get("mrope_interleaved", None)
        sections = fields.get("mrope_section", family.axes)
        warnings.warn(
            f"{fields.config.model_type} positions have {len(sections)} axes (mrope_section "
            f"{list(sections)}); this Spec takes one position a token: right for text, not for "
            "image or video tokens (pass their table as cos_sin)",
            UserWarning,
            stacklevel=5,
        )
    if kind not in SCALINGS:
        fields.config.refuse("rope_type one of " + ", ".join(sorted(SCALINGS)), repr(kind))
    scaling = SCALINGS[kind](fields, trained)
    fields.close(kind)
    return Rope(dim=dim, theta=theta, scaling=scaling)


@dataclass(frozen=True)
class _Family:
    """What one architecture does, with the defaults of its config class."""

    norm: Callable[[Config], Norm]
    order: str = "norm_first"
    head_dim: int | None = None  # None: hidden_size // num_attention_heads
    kv_optional: bool = False  # no num_key_value_heads: as many as query heads
    theta: float = 1e4
    local_theta: float | None = None
    partial: Callable[[Config, int], float] | None = None  # None: the whole head turns
    axes: tuple[int, ...] = ()  # default mrope_section
    rope: Callable[[Config, _Family, str, int], Rope | None] = _rope
    layer_types: Callable[[Config], list[str]] = _listed
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _share(factor: float) -> Callable[[Config, int], float]:
    return lambda c, head_dim: factor


def _minimax_share(c: Config, head_dim: int) -> float:
    rotary_dim = c.get("rotary_dim", None)
    return 1.0 if rotary_dim is None else rotary_dim / head_dim


_QWEN3_NEXT = _Family(
    _rms(weight_offset=1.0),
    head_dim=256,
    partial=_share(0.25),
    layer_types=_every("full_attention_interval", 4, "linear_attention"),
)
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 26,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
}

FAMILIES: dict[str, _Family] = {
    "llama": _Family(_no_norm, kv_optional=True),
    "mistral": _Family(_no_norm),
    "mixtral": _Family(_no_norm, theta=1e6),
    "qwen2": _Family(_no_norm),
    "qwen2_moe": _Family(_no_norm),
    "qwen3": _Family(_rms(), head_dim=128),
    "qwen3_moe": _Family(_rms()),
    "qwen3_vl_text": _Family(_rms(), head_dim=128, theta=5e5, axes=(24, 20, 20)),
    "qwen3_vl_moe_text": _Family(_rms(), theta=5e5, axes=(24, 20, 20)),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": replace(_QWEN3_NEXT, axes=(11, 11, 10)),
    "qwen3_5_moe_text": replace(_QWEN3_NEXT, axes=(11, 11, 10)),
    "dots1": _Family(_rms()),
    "glm4_moe": _Family(_glm4_moe_norm, partial=_share(0.5)),
    "gemma3_text": _Family(
        _rms(weight_offset=1.0),
        head_dim=256,
        theta=1e6,
        local_theta=1e4,
        rope=_rope_by_layer,
        layer_types=_every("sliding_window_pattern", 6, "sliding_attention"),
        defaults=_GEMMA3_DEFAULTS,
    ),
    "olmo2": _Family(_rms(scope="row"), kv_optional=True),
    "olmo3": _Family(
        _rms(scope="row"),
        kv_optional=True,
        theta=5e5,
        rope=_rope_by_layer,
        layer_types=_every(None, 4, "sliding_attention"),
    ),
    "olmoe": _Family(_olmoe_norm, kv_optional=True),
    "minimax_m2": _Family(_rms(scope="row"), head_dim=128, theta=5e6, partial=_minimax_share),
    "exaone4": _Family(_rms(), rope=_exaone4_rope, layer_types=_exaone4_layers),
    "hunyuan_v1_dense": _Family(_rms(), order="rope_first", kv_optional=True),
    "hunyuan_v1_moe": _Family(_rms(), order="rope_first", kv_optional=True),
    "hy_v3": _Family(_rms(), head_dim=128, theta=11_158_840.0),
    "lfm2": _Family(_rms("norm_eps"), theta=1e6, layer_types=_lfm2_layers),
    "lfm2_moe": _Family(_rms("norm_eps"), theta=1e6, layer_types=_lfm2_layers),
}

# Wrappers whose text_config is one of the families, with the text model_type of older files.
_TEXT_PARTS = {
    "gemma3": "gemma3_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
