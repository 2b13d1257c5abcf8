"""Small random models of transformers to patch: their q and k at attention, logits and tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from qkrope.integrations import transformers_plan
from upstream import Seen, randomize
from upstream_families import FAMILIES as PLAIN
from upstream_latent import FAMILIES as LATENT
from upstream_transformers import (
    BATCH,
    TOKENS,
    Family,
    build,
    captured,
    configure,
    modules_of,
    positions_of,
)


def assisted(model: nn.Module, ids: Tensor, positions: Tensor) -> None:
    """Fewer queries than keys: the last two of the positions."""
    x = torch.randn(*ids.shape, model.config.hidden_size).to(model.device, model.dtype)
    states = x[:, :-2].repeat_interleave(len(model.config.target_layer_ids), -1)
    model(noise_embeds=x[:, -2:], context_hidden_states=states, position_ids=positions)


# Beside those that test_upstream_transformers.py reads: no norm, or a config of another's class.
MORE = [
    Family("llama", "LlamaAttention"),
    Family("mistral", "MistralAttention", {"head_dim": 16}),
    Family("mixtral", "MixtralAttention"),
    Family("qwen2", "Qwen2Attention"),
    Family("qwen2_moe", "Qwen2MoeAttention"),
    Family(
        "muse_glimmer_assistant",
        "MuseGlimmerAssistantAttention",
        {"head_dim": 16, "target_layer_ids": [0, 1], "layer_types": ["full_attention"]},
        model="MuseGlimmerAssistantModel",
        forward=assisted,
    ),
]
# Its rotary_dim, which says the same, goes unread in older versions of transformers.
SHARE = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
M2 = {"head_dim": 16, "rope_parameters": SHARE}
KNOWN = [replace(f, fields=M2) if f.model_type == "minimax_m2" else f for f in [*PLAIN, *LATENT]]
FAMILIES = [*KNOWN, *MORE]
BY_ID = {family.id: family for family in FAMILIES}
NAMED = (  # issue 5 names these; Qwen3-VL has a test of its own
    *("qwen3", "qwen3_moe", "qwen3_next", "gemma3_text", "olmo2", "olmo3", "glm4_moe", "exaone4"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2", "minimax_m2"),
)
WITH_TOKENS = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SILENT = ("qwen4_exp_text-partial",)  # with these weights it says one token, whatever it attends to
OTHERS = [f.id for f in FAMILIES if f.model_type in WITH_TOKENS and f.id not in (*NAMED, *SILENT)]
# What the older transformers of a machine does differently; rounding="upstream" is of 5.23.
OLDER = {"deepseek_v4": "casts"}


def need(family: Family) -> None:
    """Skip where this transformers is older than the architecture."""
    version = transformers.__version__
    if family.model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version} has no {family.model_type}")
    if tuple(map(int, version.split(".")[:2])) >= (5, 23):
        return
    if (other := OLDER.get(family.model_type)) is not None:
        pytest.skip(f"transformers {version} has other {other} in {family.model_type}")
    try:
        configure(family)
    except Exception as error:
        pytest.skip(f"transformers {version} refuses the config of {family.id}: {error}")


def small(family: Family, dtype: torch.dtype, device: str) -> nn.Module:
    """The model that the other tests of a family run, on a device."""
    need(family)
    torch.manual_seed(7)
    _, model = build(family)
    modules = modules_of(family, model)
    head_dim = getattr(modules[0], "head_dim", None) or modules[0].qk_head_dim
    randomize(model, modules, head_dim)
    return plain_experts(model).to(device, dtype)


def plain_experts(model: nn.Module) -> nn.Module:
    """Experts one by one: grouped products ask for wider matrices than these on some devices."""
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")
    return model


def attend(family: Family, model: nn.Module) -> tuple[list[Seen], Tensor]:
    """One forward pass: what each attention layer got, and the model's result."""
    device = next(model.parameters()).device
    torch.manual_seed(11)
    ids = torch.randint(3, 30, (BATCH, TOKENS), device=device)
    positions = positions_of(family.axes).to(device)
    if family.counted:
        positions = torch.arange(TOKENS, device=device).expand_as(positions)
    seen = {module: Seen(module) for module in modules_of(family, model)}
    results: list[Any] = []
    handle = model.register_forward_hook(lambda m, args, out: results.append(out))
    try:
        with torch.no_grad(), captured(seen):
            if family.forward is not None:
                with torch.device(device):  # of the states that some of them make
                    family.forward(model, ids, positions)
            else:
                model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        handle.remove()
    out = results[-1]
    last = getattr(out, "last_hidden_state", None)
    return list(seen.values()), out[0] if last is None else last


@contextmanager
def watched_calls(factor: float = 1.0) -> Iterator[list[int]]:
    """How many calls of qkrope patched modules make; what they give times ``factor``."""
    original, calls = transformers_plan.qk_norm_rope, [0]

    def call(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        results = original(*args, **keywords)
        return results if factor == 1 else tuple(y if y is None else factor * y for y in results)

    transformers_plan.qk_norm_rope = call
    try:
        yield calls
    finally:
        transformers_plan.qk_norm_rope = original


def scattered(model: nn.Module) -> nn.Module:
    """Weights with which a small model says many different things, rather than repeat its input."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2:
                p.copy_(torch.nan_to_num(p) + 0.3 * noise)
            else:
                whole = "embed" in name or "lm_head" in name
                p.copy_(noise if whole else noise / p.shape[-1] ** 0.5)
    return model


def causal(family: Family, attention: str = "sdpa") -> nn.Module:
    """The family's model with a head for tokens, in float32."""
    need(family)
    torch.manual_seed(0)
    config = configure(family)
    config.tie_word_embeddings = False  # or the last token is the likeliest next one
    make = transformers.AutoModelForCausalLM.from_config
    try:
        model = make(config, attn_implementation=attention)
    except ValueError:  # it has no sdpa
        model = make(config, attn_implementation="eager")
    return scattered(plain_experts(model).float().eval())


def model_of(name: str, layers: int = 0) -> nn.Module:
    """A small model with a head, in float32."""
    family = BY_ID[name]
    if layers:
        family = replace(family, fields={**family.fields, "num_hidden_layers": layers})
    return causal(family)


def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int = 64) -> Tensor:
    """Greedy tokens with the KV cache."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
    return out[:, -steps:]


def prompt(device: str) -> dict[str, Tensor]:
    """Three rows of tokens, the second with padding on its left."""
    torch.manual_seed(2)
    ids, mask = torch.randint(3, 30, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def rows_of(text: str, mark: str) -> list[str]:
    """The rows of a table between two marks of a document."""
    table = text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->", maxsplit=1)[0]
    return [line for line in table.splitlines() if line.startswith("| `")]
