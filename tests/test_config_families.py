"""Every family of Spec.from_config: forms of a config, parts, and what a file may leave out.

That the Specs are what the models compute is for test_upstream_transformers.py.
"""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

import upstream_families
import upstream_latent
from qkrope.config import FAMILIES, PARTS, TEXT_PARTS
from qkrope.scaling import Llama3
from qkrope.spec import Spec
from upstream_transformers import Family, configure

TESTED = [*upstream_families.FAMILIES, *upstream_latent.FAMILIES]
# Of these only the rotation is ours; kimi_k2 is the model_type of files whose code is deepseek_v3;
# the assistant runs in test_upstream_transformers.test_module.
OTHERS = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "kimi_k2", "muse_glimmer_assistant"}
# Keys without a default of ours: a file always has them.
ESSENTIAL = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "norm_eps",
    "layer_norm_eps",
    "max_position_embeddings",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "index_n_heads",
    "index_head_dim",
    "use_qk_norm",
    "qk_layernorm",
)


def specs(config: object, num_layers: int) -> dict[tuple[int, str], Spec]:
    """The Spec of every layer and part that has one."""
    found = {}
    for part in PARTS:
        for layer in range(num_layers):
            try:
                found[layer, part] = Spec.from_config(config, layer, part=part)
            except ValueError as error:
                if "layer_idx" not in str(error) and "a part that" not in str(error):
                    raise
    assert found
    return found


def test_every_family_is_tested_upstream() -> None:
    assert {family.model_type for family in TESTED} == set(FAMILIES) - OTHERS


@pytest.mark.parametrize("family", TESTED, ids=lambda family: family.id)
def test_forms_of_a_config(family: Family, tmp_path) -> None:
    """An object, its dict, and the file that save_pretrained writes."""
    config = configure(family)
    expected = specs(config, config.num_hidden_layers)
    assert specs(config.to_dict(), config.num_hidden_layers) == expected
    config.save_pretrained(tmp_path)
    assert specs(tmp_path / "config.json", config.num_hidden_layers) == expected
    casts = {Spec.from_config(config, i, rounding="upstream", part=p) for i, p in expected}
    assert "once" not in {spec.rounding for spec in casts}


# Defaults that no model has: head_dim 73, 21 rotated channels; sections that must be named.
NO_DEFAULTS = {"qwen3_omni_moe_text", "glm4_moe", "hunyuan_vl_text"}


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"kimi_k2"} - NO_DEFAULTS))
def test_what_a_file_leaves_out_is_what_the_config_class_has(name: str) -> None:
    # dots3-note's local rows have 1088 channels, more than a Spec may: `test_a_row_too_wide`.
    own = {"swa_kv_lora_rank": 512} if name == "dots3_note_text" else {}
    config = CONFIG_MAPPING[name](**own)
    full = json.loads(json.dumps(config.to_dict()))
    sparse = {key: full[key] for key in ESSENTIAL if key in full} | own
    if name == "qwen4_exp_text":  # the class has no sizes for its indexer
        sizes = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256}
        full, sparse = full | sizes, sparse | sizes
    if name == "longcat_flash":  # two of its layers are one of the file's
        sparse["num_hidden_layers"] = full["num_hidden_layers"] = 4
    layers = sparse["num_hidden_layers"]
    assert specs(sparse, layers) == specs(full, layers)


@pytest.mark.parametrize("name", TEXT_PARTS)
def test_wrappers(name: str) -> None:
    """The nested text part, with and without a model_type of its own."""
    path, default = TEXT_PARTS[name]
    if name in CONFIG_MAPPING:
        inner = CONFIG_MAPPING[name]().to_dict()
        for key in path:
            inner = inner[key]
        assert inner["model_type"] == default
    fields = next((dict(f.fields) for f in TESTED if f.model_type == default), {})
    config = configure(next(f for f in TESTED if f.model_type == default))
    text = json.loads(json.dumps(config.to_dict()))
    layers = text["num_hidden_layers"]
    expected = specs({**text, "model_type": default}, layers)
    del text["model_type"]
    nested: object = text
    for key in reversed(path):
        nested = {key: nested}
    assert fields is not None and specs({"model_type": name, **nested}, layers) == expected  # type: ignore[dict-item]


def test_llama4_layers() -> None:
    """Every fourth layer has no positions, and then no norm; the scaling of Scout has no ramp."""
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    data = {
        "model_type": "llama4",
        "text_config": {
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_hidden_layers": 48,
            "rope_theta": 5e5,
            "rope_scaling": scaling,
        },
    }
    spec = Spec.from_config(data, 0)
    assert spec.rope is not None and spec.rope.scaling == Llama3(16, 1, 1, 8192)
    assert spec.norm.kind == "rms" and spec.order == "rope_first"
    nope = Spec.from_config(data, 3)
    assert nope.rope is None and nope.norm.kind == "none"
    data["text_config"]["no_rope_layers"] = [0] * 47 + [1]
    assert Spec.from_config(data, 0).rope is None and Spec.from_config(data, 47).rope is not None


def test_gemma4_as_the_released_files_have_it() -> None:
    """Keys of full layers beside those of all layers; transformers saves them by layer."""
    text = {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 30,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
    }
    data = {"model_type": "gemma4", "text_config": text}
    local, full = Spec.from_config(data, 0), Spec.from_config(data, 5)
    assert (local.num_kv_heads, local.head_dim, local.rotary_dim) == (8, 256, 256)
    assert (full.num_kv_heads, full.head_dim, full.rotary_dim) == (2, 512, 128)
    assert full.pairs[:2] == ((0, 256), (1, 257))
    config = CONFIG_MAPPING["gemma4_text"](**text)
    assert Spec.from_config(config, 5) == full
    text["attention_k_eq_v"] = False
    assert Spec.from_config(data, 5).num_kv_heads == 8


def test_deepseek_v4_as_the_released_files_have_it() -> None:
    """compress_ratios say which layers have a compressor: these rotate by their own theta."""
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 65536}
    data = {
        "model_type": "deepseek_v4",
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-6,
        "compress_ratios": [0, 4, 128, 0],
        "qk_rope_head_dim": 64,
        "rope_theta": 10000,
        "rope_scaling": yarn,
    }
    ropes = [Spec.from_config(data, layer).rope for layer in range(4)]
    assert ropes[0] == ropes[3] and ropes[1] == ropes[2]
    assert ropes[0] is not None and ropes[1] is not None
    assert (ropes[0].theta, ropes[0].scaling, ropes[0].offset) == (1e4, None, 448)
    assert ropes[1].theta == 1.6e5 and ropes[1].scaling.attention_factor == 1.0  # type: ignore[union-attr]


def test_a_row_too_wide() -> None:
    config = CONFIG_MAPPING["dots3_note_text"]()
    assert Spec.from_config(config, 0).head_dim == 576
    with pytest.raises(ValueError, match="Norm.dim: expected an even int in .*, got 1024"):
        Spec.from_config(config, 2)
    assert Spec.from_config(config, 2, part="query").num_q_heads == 64


def test_a_part_that_is_not_there() -> None:
    data = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64}
    for part in ("query", "indexer", "output"):
        with pytest.raises(ValueError, match=f"a part that the model has, got '{part}'"):
            Spec.from_config(data, part=part)
    with pytest.raises(ValueError, match="part: expected one of 'attention'"):
        Spec.from_config(data, part="attn")
