"""How to read each transformers attention module: one small adapter a family."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import AttentionInterface
from upstream import Call, Seen, randomize, watched

from qkrope.spec import Spec

BATCH, TOKENS = 2, 5
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 4,
}
RopeOf = Callable[[Seen], Any]


@dataclass(frozen=True)
class Family:
    """One architecture: a small config and where its module keeps things."""

    model_type: str
    attention: str  # class name, without the prefix that all of a model's classes share
    fields: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = (0,)
    model: str = ""  # class name; empty: what AutoModel builds
    module: str = ""  # the modeling module; empty: the config's own
    axes: int = 0
    norms: tuple[str, str] = ("q_norm", "k_norm")
    heads: Callable[[Seen, Spec], tuple[Tensor, Tensor, Tensor | None]] | None = None
    calls: Callable[[Seen, Any, int, str], list[Call]] | None = None
    exact: bool = True
    reason: str = ""  # why the bits may differ

    @property
    def id(self) -> str:
        """A name for a test."""
        return self.model_type


def build(family: Family) -> tuple[Any, nn.Module]:
    """The config and the model, in float32, with random weights."""
    cls = CONFIG_MAPPING[family.model_type]
    probe = cls()
    small = {key: value for key, value in SMALL.items() if hasattr(probe, key)}
    config = cls(**copy.deepcopy({**small, **family.fields}))
    config._attn_implementation = "eager"
    if family.model:
        path = family.module or type(config).__module__.replace("configuration_", "modeling_")
        model = getattr(importlib.import_module(path), family.model)(config)
    else:
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    return config, model.float().eval()


def modules_of(family: Family, model: nn.Module) -> list[nn.Module]:
    """The attention modules of the wanted layers."""
    found = {m.layer_idx: m for m in model.modules() if type(m).__name__ == family.attention}
    return [found[layer] for layer in family.layers]


@contextmanager
def captured(seen: Mapping[nn.Module, Seen]) -> Iterator[None]:
    """q, k and v of every attention call go into ``seen``."""
    original = AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        function = original(self, name, default)

        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kw):
            if (record := seen.get(module)) is not None:
                record.q, record.k, record.v = (
                    x.transpose(1, 2).clone() for x in (query, key, value)
                )
            return function(module, query, key, value, *args, **kw)

        return attention

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original


def positions_of(axes: int) -> Tensor:
    """Small positions (float32 angles are right to 1e-6 there), another row for each batch."""
    rows = torch.tensor([[0, 1, 3, 8, 17], [2, 3, 4, 11, 20]])
    if not axes:
        return rows
    return torch.stack([(rows * (a + 2)) // 2 + a for a in range(axes)])


def run(family: Family, dtype: torch.dtype) -> tuple[Any, list[Seen], Tensor]:
    """One forward pass of the model; its config, what its layers did, the positions."""
    torch.manual_seed(7)
    config, model = build(family)
    modules = modules_of(family, model)
    head_dim = getattr(modules[0], "head_dim", None) or modules[0].qk_head_dim
    randomize(model, modules, head_dim)
    model = model.to(dtype)
    ids = torch.randint(3, 30, (BATCH, TOKENS))
    positions = positions_of(family.axes)
    with torch.no_grad(), watched(modules) as seen, captured(seen):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    return config, [seen[module] for module in modules], positions


def table_of(seen: Seen, spec: Spec) -> tuple[Tensor, Tensor] | None:
    """The model's own cos and sin, one value a pair."""
    table = seen.kwargs.get("position_embeddings")
    if table is None and len(seen.args) > 1:
        table = seen.args[1]
    if spec.rope is None or table is None:
        return None
    if isinstance(table, Tensor):  # complex
        return table.real, table.imag
    cos, sin = table
    pairs = spec.rotary_dim // 2
    if spec.rope.pairing == "interleaved" and spec.rope.output_pairing is None:
        return cos[..., 0 : 2 * pairs : 2], sin[..., 0 : 2 * pairs : 2]
    return cos[..., :pairs], sin[..., :pairs]


def projections(seen: Seen, spec: Spec) -> tuple[Tensor, Tensor, Tensor | None]:
    """q_proj, k_proj and v_proj as heads."""
    q, k, v = (seen.outputs.get(f"{name}_proj") for name in "qkv")
    q = q.unflatten(-1, (spec.num_q_heads, -1))[..., : spec.head_dim]  # [q | gate] in some
    k = k.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
    v = k if v is None else v.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
    return q, k, v


def attribute(module: nn.Module, path: str) -> Any:
    """A dotted attribute, None where a part of it is missing or is None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def weights_of(family: Family, seen: Seen, spec: Spec) -> dict[str, Tensor | None]:
    """Weights and biases of the two norms."""
    found: dict[str, Tensor | None] = {}
    for side, name in zip("qk", family.norms, strict=True):
        for kind in ("weight", "bias"):
            found[f"{side}_{kind}"] = attribute(seen.module, f"{name}.{kind}")
    return found


def default_calls(family: Family, seen: Seen, config: Any, layer: int, rounding: str) -> list[Call]:
    """Q and K (and V where it is normalised) of one layer in one call."""
    spec = Spec.from_config(config, layer, rounding=rounding)
    q, k, v = (family.heads or projections)(seen, spec)
    weights = weights_of(family, seen, spec)
    extras: dict[str, Any] = {f"{s}_bias": weights[f"{s}_bias"] for s in "qk"}
    got: tuple[Tensor | None, ...] = (seen.q, seen.k)
    if spec.v_norm is not None:
        extras["v"], got = v, (*got, seen.v)
    return [Call(spec, q, k, weights["q_weight"], weights["k_weight"], extras=extras, got=got)]
