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

from qkrope.spec import Spec
from upstream import Call, Seen, randomize, watched

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
    "vocab_size_per_layer_input": 32,
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
    axes: int = 0
    norms: tuple[str, str] = ("q_norm", "k_norm")
    heads: Callable[[Seen, Spec], tuple[Tensor, Tensor, Tensor | None]] | None = None
    calls: Callable[[Seen, Any, int, str], list[Call]] | None = None
    extras: Callable[[Seen, Any], dict[str, Any]] | None = None
    forward: Callable[[nn.Module, Tensor, Tensor], Any] | None = None
    exact: bool = True
    own_angles: bool = True
    counted: bool = False  # positions are the tokens' indices
    same_axes: bool = False  # every axis has the same positions, as in text
    wide_table: bool = False  # the two channels of a pair have angles of their own
    note: str = ""

    @property
    def id(self) -> str:
        """A name for a test."""
        return self.model_type + (f"-{self.note}" if self.note else "")


def configure(family: Family) -> Any:
    """A small config of a family."""
    cls = CONFIG_MAPPING[family.model_type]
    names = {*vars(cls()), *cls.attribute_map}
    small = {key: value for key, value in SMALL.items() if key in names}
    config = cls(**copy.deepcopy({**small, **family.fields}))
    config._attn_implementation = "eager"
    return config


def build(family: Family) -> tuple[Any, nn.Module]:
    """The config and the model, in float32, with random weights."""
    config = configure(family)
    if family.model:
        path = type(config).__module__.replace("configuration_", "modeling_")
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
            result = function(module, query, key, value, *args, **kw)
            if record is not None:
                record.out = result[0].clone()
            return result

        return attention

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original


@contextmanager
def multiplied(seen: Mapping[nn.Module, Seen]) -> Iterator[None]:
    """The factors of every matmul in a module's indexer go into ``seen``."""
    original, running, handles = torch.matmul, [], []

    def matmul(a: Tensor, b: Tensor, *args: Any, **kw: Any) -> Tensor:
        if running:
            running[-1].products.append((a.clone(), b.clone()))
        return original(a, b, *args, **kw)

    for module, record in seen.items():
        if (indexer := getattr(module, "indexer", None)) is not None:
            start = lambda m, args, record=record: running.append(record)  # noqa: E731
            handles.append(indexer.register_forward_pre_hook(start))
            handles.append(
                indexer.register_forward_hook(lambda m, args, out: running.pop() and None)
            )
    torch.matmul = matmul
    try:
        yield
    finally:
        torch.matmul = original
        for handle in handles:
            handle.remove()


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
    if family.counted:
        positions = torch.arange(TOKENS).expand_as(positions)
    if family.same_axes:
        positions = positions[:1].expand_as(positions)
    with torch.no_grad(), watched(modules) as seen, captured(seen), multiplied(seen):
        if family.forward is not None:
            family.forward(model, ids, positions)
        else:
            model(input_ids=ids, position_ids=positions, use_cache=False)
    for record in seen.values():
        record.positions = positions
    return config, [seen[module] for module in modules], positions


def table_of(seen: Seen, spec: Spec, wide: bool = False) -> tuple[Tensor, Tensor] | None:
    """The model's own cos and sin, one value a pair or, ``wide``, one a channel."""
    table = seen.kwargs.get("position_embeddings")
    if table is None and len(seen.args) > 1:
        table = seen.args[1]
    if spec.rope is None or table is None:
        return None
    if isinstance(table, dict):  # by the type of rope
        table = table["main" if seen.module.layer_type == "sliding_attention" else "compress"]
    if isinstance(table, Tensor):  # complex
        return table.real, table.imag
    cos, sin = table
    pairs = spec.rotary_dim // 2
    if wide:
        return cos, sin
    if cos.shape[-1] == pairs:
        return cos, sin
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
            value = attribute(seen.module, f"{name}.{kind}")
            if (heads := attribute(seen.module, f"{name}.norms")) is not None and kind == "weight":
                value = torch.stack([norm.weight for norm in heads])  # a norm for each head
            found[f"{side}_{kind}"] = value
    return found


def calls_of(family: Family, seen: Seen, config: Any, layer: int, rounding: str) -> list[Call]:
    """Q and K (and V where it is normalised) of one layer in one call."""
    spec = Spec.from_config(config, layer, rounding=rounding)
    q, k, v = (family.heads or projections)(seen, spec)
    weights = weights_of(family, seen, spec)
    extras: dict[str, Any] = {f"{s}_bias": weights[f"{s}_bias"] for s in "qk"}
    got: tuple[Tensor | None, ...] = (seen.q, seen.k)
    if spec.v_norm is not None and v is not None:
        extras["v"], got = v, (*got, seen.v)
    if family.extras is not None:
        extras |= family.extras(seen, config)
    return [
        Call(
            spec,
            q,
            k,
            weights["q_weight"],
            None if k is None else weights["k_weight"],
            extras=extras,
            table=table_of(seen, spec, family.wide_table),
            own_angles=family.own_angles,
            got=got,
        )
    ]
