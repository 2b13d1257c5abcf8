"""The words of config_families.py: a Family, one Layer of it, and the rules families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_fields import Config
from .config_rope import flat
from .norm import Norm
from .rope import Rope
from .rounding import Rounding

ATTENTION = ("full_attention", "sliding_attention")
INDEXED = (*ATTENTION, "indexed_attention")
COMPRESSED = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)


@dataclass(frozen=True)
class Layer:
    """One layer of one config, with the shape of what is normalised and rotated there."""

    config: Config
    family: Family
    index: int
    kind: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    pairing: str = "half"
    output_pairing: str | None = None
    reverse: bool = False
    rotary: int | None = None  # None: head_dim, or partial_rotary_factor of it
    shared: tuple[int, ...] = ()  # widths that a partial_rotary_factor may be a share of
    trailing: bool = False  # the last channels turn, not the first


NormOf = Callable[[Layer], Norm]


@dataclass(frozen=True)
class Family:
    """What one architecture does, with the defaults of its config class."""

    norm: NormOf
    rounding: Rounding = "A/b"  # what rounding="upstream" stands for
    roundings: Mapping[str, Rounding] = field(default_factory=dict)  # of layer types that differ
    v_norm: NormOf | None = None
    order: str = "norm_first"
    pairing: str = "half"
    reverse: bool = False
    trailing: bool = False  # the last channels turn
    head_dim: int | None = None  # None: hidden_size // num_attention_heads
    kv_optional: bool = False  # no num_key_value_heads: as many as query heads
    theta: float = 1e4
    local_theta: float | None = None
    partial: Callable[[Layer], float] | None = None  # None: the whole head turns
    proportional: bool = False
    mrope: str = ""  # or "interleaved", "chunked"
    axes: tuple[int, ...] = ()  # default mrope_section; none: it must be named
    unused: tuple[str, ...] = ()  # rope fields that the model carries along and does not read here
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of rope types
    # Parameters of a file without any, by layer type ("" is all; None does not rotate).
    ropes: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    rope: Callable[[Layer], Rope | None] = flat
    attention: tuple[str, ...] = ATTENTION
    layer_types: Callable[[Config], list[str]] = lambda c: list(c.get("layer_types", None) or ())
    overrides: Callable[[Config, int, str], Mapping[str, Any]] = lambda c, index, kind: {}
    latent: Latent | None = None
    indexer: Indexer | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: the row [latent | k_pe], the query [nope | pe]."""

    eps: float | None = 1e-6  # None: that of the config
    pairing: str = "flag"  # "flag": rope_interleave says which
    output_pairing: str | None = "half"
    rest: bool = False  # k_pe is normalised too


@dataclass(frozen=True)
class Indexer:
    """A sparse-attention indexer's own heads."""

    keys: tuple[str, str | None, str]  # heads, key heads (None: one), head_dim
    norm: NormOf
    k_norm: NormOf | None = None
    pairing: str = "half"
    trailing: bool = False
    rotary: str | None = "qk_rope_head_dim"
    rounding: Rounding = "B/b"


# Layer types: the config's own list, else the pattern its class would fill in.


def every(
    interval_key: str | None,
    interval: int,
    other: str,
    full: str = "full_attention",
    last: str | None = None,
) -> Callable[[Config], list[str]]:
    """``full`` on every n-th layer, ``other`` on the rest; ``last`` on the last one."""

    def types(c: Config) -> list[str]:
        found = list(c.get("layer_types", None) or ())
        if not found:
            n = interval
            if interval_key is not None and c.get(interval_key, None) is not None:
                n = c.integer(interval_key)
            layers = range(1, c.integer("num_hidden_layers") + 1)
            found = [other if i % n else full for i in layers]
        if last is not None:
            found[-1] = last
        return found

    return types


def pattern(kind: Callable[[int, int], str]) -> Callable[[Config], list[str]]:
    """A rule of the index and the number of layers."""

    def types(c: Config) -> list[str]:
        if found := list(c.get("layer_types", None) or ()):
            return found
        n = c.integer("num_hidden_layers")
        return [kind(i, n) for i in range(n)]

    return types


def exaone4_layers(c: Config) -> list[str]:
    """EXAONE 4: no hybrid where sliding_window is null."""
    if c.get("sliding_window", 4096) is None:
        return []
    return every("sliding_window_pattern", 4, "sliding_attention")(c)


def lfm2_layers(c: Config) -> list[str]:
    """LFM2: older files list the full layers."""
    listed, full = list(c.get("layer_types", None) or ()), c.get("full_attn_idxs", None)
    if listed or full is None:
        return listed
    return [
        "full_attention" if i in full else "conv" for i in range(c.integer("num_hidden_layers"))
    ]


def beam_layers(c: Config) -> list[str]:
    """Beam: a full layer every sixth, and the last."""
    given = c.get("layer_types", None)
    last = None if given else "full_attention"
    return every(None, 6, "sliding_attention", last=last)(c)


def qwen4_layers(c: Config) -> list[str]:
    """Qwen4-Exp: its full layers are indexed."""
    types = every("full_attention_interval", 4, "linear_attention", "indexed_attention")(c)
    return ["indexed_attention" if kind == "full_attention" else kind for kind in types]


def dots3_layers(c: Config) -> list[str]:
    """dots3-note: full layers are indexed unless use_dsa is false."""
    sparse = c.get("use_dsa", None if c.get("per_layer_config", None) else True)
    full = "full_attention" if sparse is False else "indexed_attention"
    local = "sliding_attention" if c.get("use_sliding_window", True) else full
    types = pattern(lambda i, n: full if i < 2 or i % 4 == 1 else local)(c)
    whole = ("full_attention", "indexed_attention")
    return types if sparse is None else [full if kind in whole else kind for kind in types]


def v4_layers(c: Config) -> list[str]:
    """DeepSeek-V4: listed, or from the compress_ratios of older files."""
    ratios = c.get("compress_ratios", None)
    if ratios is not None and not c.get("layer_types", None):
        names = dict(zip((0, 4, 128), COMPRESSED, strict=True))
        if odd := sorted({*ratios} - {*names}):
            c.refuse("compress_ratios of 0, 4 and 128", odd)
        return [names[r] for r in ratios][: c.integer("num_hidden_layers")]
    sparse, heavy = COMPRESSED[1:]
    return pattern(lambda i, n: sparse if i >= 2 and i % 2 else heavy)(c)


# Shapes that differ by layer.


def per_layer(c: Config, index: int, kind: str) -> Mapping[str, Any]:
    """What transformers saves as per_layer_config."""
    saved = c.get("per_layer_config", None) or {}
    return next((value for key, value in saved.items() if int(key) == index), {})


def gemma4_shape(kv_default: int | None, always: bool) -> Callable[..., Mapping[str, Any]]:
    """Gemma 4: full layers have heads of their own size, and number."""

    def overrides(c: Config, index: int, kind: str) -> Mapping[str, Any]:
        if c.get("per_layer_config", None) is not None or kind != "full_attention":
            return per_layer(c, index, kind)
        found = {"head_dim": c.get("global_head_dim", 512)}
        heads = c.get("num_global_key_value_heads", kv_default)
        if heads is not None and (always or c.get("attention_k_eq_v", False)):
            found["num_key_value_heads"] = heads
        return found

    return overrides


_DOTS3_LOCAL = {
    "num_attention_heads": 64,
    "kv_lora_rank": 1024,
    "head_dim": 256,
    "qk_nope_head_dim": 192,
}


def dots3_shape(c: Config, index: int, kind: str) -> Mapping[str, Any]:
    """dots3-note: local layers have latents and heads of their own."""
    if c.get("per_layer_config", None) is not None or kind != "sliding_attention":
        return per_layer(c, index, kind)
    found = {name: c.get(f"swa_{name}", value) for name, value in _DOTS3_LOCAL.items()}
    rope = found["head_dim"] - found["qk_nope_head_dim"]
    return {**found, "qk_rope_head_dim": c.get("swa_qk_rope_head_dim", rope)}


def laguna_heads(c: Config, index: int, kind: str) -> Mapping[str, Any]:
    """Laguna: query heads by layer."""
    heads = c.get("num_attention_heads_per_layer", None)
    return {} if heads is None else {"num_attention_heads": heads[index]}


# Norms.


def rms(eps_key: str = "rms_norm_eps", **fields: Any) -> NormOf:
    """An RMS norm with the config's eps."""
    return lambda layer: Norm(eps=layer.config.get(eps_key), **fields)


def layer_norm(eps: float | str, **fields: Any) -> NormOf:
    """A LayerNorm with an eps of its own, or the config's key of that name."""
    return lambda layer: Norm(
        "layer", layer.config.get(eps) if isinstance(eps, str) else eps, **fields
    )


def no_norm(layer: Layer) -> Norm:
    """Nothing is normalised."""
    return Norm("none")


def norm_if(key: str, default: bool, norm: NormOf) -> NormOf:
    """``norm`` where a flag of the config says so."""
    return lambda layer: norm(layer) if layer.config.get(key, default) else Norm("none")


def olmoe_norm(layer: Layer) -> Norm:
    """OLMoE: over the row; a clip of its output is refused."""
    if (clip := layer.config.get("clip_qkv", None)) is not None:
        layer.config.refuse("clip_qkv of null", clip)
    return rms(scope="row")(layer)


def molmo2_norm(layer: Layer) -> Norm:
    """Molmo2: over a head or over the row."""
    kind = layer.config.get("qk_norm_type", "qwen3")
    if kind not in ("qwen3", "olmo"):
        layer.config.refuse("qk_norm_type 'qwen3' or 'olmo'", repr(kind))
    return rms(scope="head" if kind == "qwen3" else "row")(layer)


def llama4_norm(layer: Layer) -> Norm:
    """Without a weight, and only where the layer rotates."""
    return Norm("none") if no_rope(layer) else norm_if("use_qk_norm", True, rms())(layer)


# Layers without rotation.


def no_rope(layer: Layer) -> bool:
    """Layers that no_rope_layers switches off, every fourth by default."""
    c, flags = layer.config, layer.config.get("no_rope_layers", None)
    if flags:
        return not flags[layer.index]
    return (layer.index + 1) % c.get("no_rope_layer_interval", 4) == 0


def whole_of_hybrid(layer: Layer) -> bool:
    """A full layer of a model that also has local ones."""
    return layer.config.get("sliding_window", 1) is not None and layer.kind == "full_attention"


def not_local(layer: Layer) -> bool:
    """Every layer but the local ones."""
    return layer.kind != "sliding_attention" or layer.config.get("sliding_window", 1) is None


def no_theta(layer: Layer) -> bool:
    """OLMo Hybrid as released: rope_parameters hold rope_theta null."""
    new = layer.config.get("rope_parameters", None) or {}
    return "rope_theta" in new and new["rope_theta"] is None


def muse_nope(layer: Layer) -> bool:
    """Muse: layers whose layer_rope_theta is 0."""
    thetas, n = layer.config.get("layer_rope_theta", None), layer.config.integer
    if thetas is None:
        return (n("num_hidden_layers") - 1 - layer.index) % 4 == 0
    if len({*thetas} - {0}) > 1:
        layer.config.refuse("one layer_rope_theta, the model uses one", thetas)
    return not thetas[layer.index]


def share(factor: float) -> Callable[[Layer], float]:
    """A fixed share of the head, where the file names none."""
    return lambda layer: factor


def minimax_share(layer: Layer) -> float:
    """MiniMax-M2 names channels, not a share."""
    rotary_dim = layer.config.get("rotary_dim", None)
    return 1.0 if rotary_dim is None else rotary_dim / layer.head_dim
