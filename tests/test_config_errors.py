"""Configs that Spec.from_config refuses, each by the name of what is wrong or missing."""

from __future__ import annotations

import json

import pytest

from qkrope.spec import Spec

HEADS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 3e-6,
}


def refused(**changes):
    return {"model_type": "qwen3", **HEADS, "head_dim": 16, "rope_theta": 1e6, **changes}


@pytest.mark.parametrize(
    ("config", "layer", "error", "message"),
    [
        (None, None, TypeError, "config"),
        (3, None, TypeError, "config"),
        ({}, None, ValueError, "model_type: expected one of afmoe, .*, got None"),
        (refused(model_type="gpt_neox"), None, ValueError, "model_type.*'gpt_neox'"),
        (refused(model_type="qwen3_vl"), None, ValueError, "model_type.*'qwen3_vl'"),
        (refused(), 8, ValueError, r"layer_idx: expected an int in \[0, 7\], got 8"),
        (refused(), -1, ValueError, "layer_idx"),
        (refused(), True, TypeError, "layer_idx"),
        (refused(layer_types=["full_attention", "chunked"]), 1, ValueError, "'chunked'"),
        (refused(head_dim=15), None, ValueError, "Spec.head_dim"),
        (refused(rms_norm_eps="tiny"), None, TypeError, "Norm.eps"),
        (refused(rope_theta=-1.0), None, ValueError, "Rope.theta"),
        (refused(rope_scaling=[2]), None, TypeError, "rope_parameters"),
        (refused(rope_scaling={"type": "su"}), None, ValueError, "rope_type one of .*'su'"),
        (refused(rope_scaling={"type": "mrope"}), None, ValueError, "'mrope'"),
        (refused(rope_scaling={"type": "linear"}), None, ValueError, "'factor'"),
        (
            refused(rope_scaling={"type": "linear", "factor": 2.0, "beta": 1}),
            None,
            ValueError,
            "with rope_type 'linear', got 'beta'",
        ),
        (
            refused(rope_scaling={"type": "default", "mrope_section": [4, 2, 2]}),
            None,
            ValueError,
            "'mrope_section'",
        ),
        (
            refused(
                rope_scaling={
                    "type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 9,
                }
            ),
            None,
            ValueError,
            "of 4096 with 'dynamic', got 9",
        ),
        (
            refused(rope_parameters={"full_attention": {"rope_type": "default"}}),
            None,
            ValueError,
            "'full_attention'",
        ),
        (refused(partial_rotary_factor=0.5), None, ValueError, "partial_rotary_factor"),
        (refused(model_type="glm4_moe", partial_rotary_factor=0.2), None, ValueError, "Rope.dim"),
        (refused(model_type="olmoe", clip_qkv=8.0), None, ValueError, "clip_qkv"),
        (refused(rope_scaling={"type": "proportional"}), None, ValueError, "'proportional'"),
        (refused(model_type="molmo2_text", qk_norm_type="t5"), None, ValueError, "qk_norm_type"),
        (
            refused(model_type="gemma4_text", rope_scaling={"type": "linear", "factor": 8.0}),
            None,
            ValueError,
            "ignores rope_scaling",
        ),
        (
            refused(
                model_type="qwen3_vl_text",
                rope_scaling={"mrope_section": [4, 2, 2], "mrope_interleaved": False},
            ),
            None,
            ValueError,
            "mrope_interleaved of True",
        ),
        (refused(model_type="hunyuan_vl_text"), None, ValueError, "'mrope_section'"),
        (
            refused(
                model_type="hunyuan_vl_text",
                rope_scaling={"type": "xdrope", "alpha": 9.0, "mrope_section": [2, 2, 2]},
            ),
            None,
            ValueError,
            "mrope_section: expected a sum of dim / 2 = 8",
        ),
        (
            refused(model_type="muse_spark_text", layer_rope_theta=[1e4, 2e4, 0, 0, 0, 0, 0, 0]),
            None,
            ValueError,
            "layer_rope_theta",
        ),
        (
            refused(model_type="deepseek_v4", compress_ratios=[4, 7, 128, 0, 0, 0, 0, 0]),
            None,
            ValueError,
            "compress_ratios",
        ),
        (
            refused(
                model_type="deepseek_v3",
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=12,
                partial_rotary_factor=0.3,
            ),
            None,
            ValueError,
            "partial_rotary_factor that gives 8 channels",
        ),
    ],
)
def test_what_is_not_known_is_refused(config, layer, error, message):
    Spec.from_config(refused())
    with pytest.raises(error, match=message):
        Spec.from_config(config, layer)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("qwen3", "num_attention_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "rms_norm_eps"),
        ("qwen3_moe", "hidden_size"),
        ("lfm2", "norm_eps"),
        ("qwen3_next", "num_hidden_layers"),
    ],
)
def test_a_missing_key_is_named(name, key):
    data = {"model_type": name, **HEADS, "norm_eps": 1e-6}
    del data[key]
    with pytest.raises(ValueError, match=f"config of '{name}': expected the key '{key}', got none"):
        Spec.from_config(data)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Spec.from_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(TypeError, match="config"):
        Spec.from_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(refused()))
    assert Spec.from_config(tmp_path) == Spec.from_config(refused())
