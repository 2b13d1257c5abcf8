"""Configs of every family: transformers objects, dicts as older files hold them, and files."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from qkrope.angles import resolve
from qkrope.spec import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Norm, Rope, Spec, YaRN

HEADS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
}
EPS = {"rms_norm_eps": 3e-6}
RMS = Norm(eps=3e-6)
ROW = Norm(eps=3e-6, scope="row")
ONE_PLUS = Norm(eps=3e-6, weight_offset=1.0)
NONE = Norm(kind="none")

MODELS = {  # the family's own fields, a layer with attention, its norm, its rotary dim
    "llama": ({}, 3, NONE, 16),
    "mistral": ({}, 3, NONE, 16),
    "mixtral": ({}, 3, NONE, 16),
    "qwen2": ({}, 3, NONE, 16),
    "qwen2_moe": ({}, 3, NONE, 16),
    "qwen3": ({"head_dim": 32}, 3, RMS, 32),
    "qwen3_moe": ({}, 3, RMS, 16),
    "qwen3_next": ({}, 3, ONE_PLUS, 64),
    "qwen3_vl_text": ({"head_dim": 16}, 3, RMS, 16),
    "qwen3_vl_moe_text": ({"head_dim": 16}, 3, RMS, 16),
    "qwen3_5_text": ({}, 3, ONE_PLUS, 64),
    "qwen3_5_moe_text": ({}, 3, ONE_PLUS, 64),
    "dots1": ({}, 3, RMS, 16),
    "glm4_moe": ({"head_dim": 32, "use_qk_norm": True}, 3, RMS, 16),
    "olmo2": ({}, 3, ROW, 16),
    "olmoe": ({}, 3, ROW, 16),
    "minimax_m2": ({"head_dim": 32, "rotary_dim": 16}, 3, ROW, 16),
    "exaone4": ({}, 2, RMS, 16),
    "hunyuan_v1_dense": ({"head_dim": 16}, 3, RMS, 16),
    "hunyuan_v1_moe": ({"head_dim": 16}, 3, RMS, 16),
    "hy_v3": ({"head_dim": 16}, 3, RMS, 16),
    "lfm2": ({"norm_eps": 3e-6}, 3, RMS, 16),
    "lfm2_moe": ({"norm_eps": 3e-6, "layer_types": ["conv", "full_attention"] * 4}, 3, RMS, 16),
}
BY_LAYER = {"gemma3_text": ONE_PLUS, "olmo3": ROW}  # rope parameters for each layer type
ORDERS = {"hunyuan_v1_dense": "rope_first", "hunyuan_v1_moe": "rope_first"}


def build(name, **fields):
    """A small config; its class writes into the dicts it is given, so it gets its own."""
    return CONFIG_MAPPING[name](**copy.deepcopy({**HEADS, **EPS, **fields}))


def plain_rope():
    return {"rope_type": "default", "rope_theta": 2e5}


def model_file(config):
    """The module that holds the model of a config: configuration_x -> modeling_x."""
    return importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))


def rotary_module(config):
    """The rotary embedding of a model's text part."""
    classes = [
        value
        for key, value in vars(model_file(config)).items()
        if key.endswith("RotaryEmbedding") and "Vision" not in key
    ]
    (rotary_class,) = classes
    return rotary_class(config)


def assert_same_frequencies(spec, inv_freq, attention_factor=1.0, seq_len=None):
    """To the float32 rounding of the module, as test_angles derives: theta here is at most 5e6, so
    30 roundings of 2^-24 relative; a blend of two frequencies adds the larger's over the smaller's.
    """
    angles = resolve(spec, seq_len)
    assert len(angles.inv_freq) == len(inv_freq)
    ours = torch.tensor(angles.inv_freq, dtype=torch.float64)
    torch.testing.assert_close(ours, inv_freq.double(), rtol=64 * 2.0**-24, atol=0)
    assert angles.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_family(name, tmp_path):
    fields, layer, norm, rotary_dim = MODELS[name]
    config = build(name, rope_parameters=plain_rope(), **fields)
    assert config.model_type == name
    spec = Spec.from_config(config, layer)
    head_dim = getattr(config, "head_dim", None) or 16
    assert (spec.num_q_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, head_dim)
    assert spec.norm == norm and spec.k_norm is None
    assert spec.order == ORDERS.get(name, "norm_first") and spec.rounding == "once"
    assert spec.rope.theta == 2e5 and spec.rope.pairing == "half" and spec.rope.scaling is None
    assert spec.rotary_dim == rotary_dim and spec.max_position_embeddings == 4096
    module = rotary_module(config)
    assert_same_frequencies(spec, module.inv_freq, module.attention_scaling)
    # The same config as a dict, and as the file that save_pretrained writes.
    assert Spec.from_config(config.to_dict(), layer) == spec
    config.save_pretrained(tmp_path)
    assert Spec.from_config(tmp_path / "config.json", layer) == spec
    assert Spec.from_config(str(tmp_path), layer) == spec
    assert Spec.from_config(config, layer, rounding="eager") == Spec.from_config(
        config.to_dict(), layer, rounding="eager"
    )
    assert Spec.from_config(config, layer, rounding="eager").rounding == "eager"


def test_the_norm_of_the_real_modules():
    """Norm, weight_offset, eps and scope are what the models' own norm modules compute."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in ("qwen3", "qwen3_next", "gemma3_text", "olmo2", "glm4_moe", "lfm2", "exaone4"):
        module = model_file(build(name))
        norm_class = next(value for key, value in vars(module).items() if key.endswith("RMSNorm"))
        fields = MODELS[name][0] if name in MODELS else {}
        data = {**HEADS, **EPS, "model_type": name, "head_dim": 64, **fields}
        norm = Spec.from_config(data, 3).norm
        layer = norm_class(64, eps=3e-6)
        weight = torch.linspace(-1, 2, 64)
        layer.weight.data = weight
        rstd = (x.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
        expected = x * rstd * (weight.double() + norm.weight_offset)
        got = layer(x.float()).double()
        # float32 modules: a few roundings, and the 64-term mean, of 2^-24 each.
        torch.testing.assert_close(got, expected, rtol=16 * 2.0**-24, atol=1e-7)


SCALED = [
    ({"rope_type": "linear", "factor": 4.0}, Linear(4)),
    ({"rope_type": "dynamic", "factor": 4.0}, DynamicNTK(4, 4096)),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        YaRN(4, 1024),
    ),
    ({"rope_type": "yarn", "factor": 4.0}, YaRN(4, 4096)),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
        YaRN(4, 1024, 16, 2, 1.0, 0.5, truncate=False),
    ),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        Llama3(8, 1, 4, 512),
    ),
    (
        {
            "rope_type": "longrope",
            "factor": 8.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
            "original_max_position_embeddings": 512,
        },
        LongRoPE(
            [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
            512,
            8.0,
        ),
    ),
]


@pytest.mark.parametrize(("fields", "scaling"), SCALED, ids=lambda value: type(value).__name__)
def test_every_rope_type(fields, scaling):
    config = transformers.LlamaConfig(**HEADS, **EPS, rope_parameters={"rope_theta": 5e5, **fields})
    spec = Spec.from_config(config)
    assert spec.rope == Rope(theta=5e5, scaling=scaling)
    module = rotary_module(config)
    # The module is built without a length, where longrope takes its short factors.
    seq_len = 1 if isinstance(scaling, LongRoPE) else None
    assert_same_frequencies(spec, module.inv_freq, module.attention_scaling, seq_len)
    # The keys of older files: rope_scaling with "type", rope_theta beside it.
    old = {key: value for key, value in fields.items() if key != "rope_type"}
    old = {**old, "type": fields["rope_type"]}
    data = {"model_type": "llama", **HEADS, **EPS, "rope_theta": 500000, "rope_scaling": old}
    assert Spec.from_config(data) == spec


def test_original_length_beside_the_rope_fields_goes_first():
    fields = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    data = {"model_type": "llama", **HEADS, **EPS, "rope_scaling": fields}
    assert Spec.from_config(data).rope.scaling == YaRN(4, 2048)
    data["original_max_position_embeddings"] = 1024
    assert Spec.from_config(data).rope.scaling == YaRN(4, 1024)
    fields["factor"] = None  # then it is the ratio of the lengths
    assert Spec.from_config(data).rope.scaling == YaRN(4096 / 1024, 1024)


@pytest.mark.parametrize("name", BY_LAYER)
def test_rope_parameters_by_layer_type(name):
    norm = BY_LAYER[name]
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
    }
    config = build(name, head_dim=16, rope_parameters=ropes)
    module = rotary_module(config)
    seen = set()
    for layer, kind in enumerate(config.layer_types):
        spec = Spec.from_config(config, layer)
        assert spec.norm == norm and spec.head_dim == 16
        local = kind == "sliding_attention"
        assert spec.rope == (Rope(theta=1e4) if local else Rope(theta=3e5, scaling=Linear(8)))
        assert_same_frequencies(spec, getattr(module, f"{kind}_inv_freq"))
        seen.add(spec)
    assert len(seen) == 2
    # Layer types that the file leaves out follow the family's pattern.
    data = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    for layer in range(8):
        assert Spec.from_config(data, layer) == Spec.from_config(config, layer)


def test_gemma3_as_the_released_files_have_it():
    """Only what differs from the class is there, rope in the older keys, the text part nested."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    data = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    norm = Norm(eps=1e-6, weight_offset=1.0)
    for layer in (0, 4, 5, 6, 11, 33):
        spec = Spec.from_config(data, layer)
        full = layer in (5, 11)
        rope = Rope(theta=1e6, scaling=Linear(8)) if full else Rope(theta=1e4)
        assert spec == Spec(8, 4, 256, norm=norm, rope=rope, max_position_embeddings=131072)
        config = transformers.Gemma3Config(
            text_config={**text, "rope_scaling": dict(text["rope_scaling"])}
        )
        assert Spec.from_config(config, layer) == spec
    del text["model_type"]
    assert Spec.from_config(data, 0).rope.theta == 1e4
    text |= {"rope_theta": 7e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2}
    assert Spec.from_config(data, 0).rope.theta == 2e4
    assert Spec.from_config(data, 1).rope == Rope(theta=7e5, scaling=Linear(8))
    text["rope_parameters"] = {"rope_type": "default"}
    with pytest.raises(ValueError, match="full_attention and sliding_attention"):
        Spec.from_config(data)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "lfm2", "lfm2_moe"])
def test_layers_without_attention(name):
    types = ["full_attention" if i in (2, 5) else "conv" for i in range(8)]
    if name.startswith("qwen"):
        types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
    first = types.index("full_attention")
    data = {"model_type": name, **HEADS, **EPS, "norm_eps": 3e-6, "layer_types": types}
    assert Spec.from_config(data) == Spec.from_config(data, first)
    for layer, kind in enumerate(types):
        if kind == "full_attention":
            assert Spec.from_config(data, layer) == Spec.from_config(data)
            continue
        with pytest.raises(ValueError, match=rf"the first is {first}\), got {layer}: '{kind}'"):
            Spec.from_config(data, layer)


def test_layer_types_that_the_file_leaves_out():
    data = {"model_type": "qwen3_next", **HEADS, **EPS}
    Spec.from_config(data, 3)
    with pytest.raises(ValueError, match="linear_attention"):
        Spec.from_config(data, 4)
    data["full_attention_interval"] = 2
    Spec.from_config(data, 1)
    lfm2 = {"model_type": "lfm2", **HEADS, "norm_eps": 1e-5, "full_attn_idxs": [2, 5]}
    assert Spec.from_config(lfm2) == Spec.from_config(lfm2, 5)
    with pytest.raises(ValueError, match="conv"):
        Spec.from_config(lfm2, 3)


@pytest.mark.parametrize("sliding_window", [4096, None])
def test_exaone4_global_layers_keep_the_norm_and_drop_the_rotation(sliding_window):
    config = transformers.Exaone4Config(
        **HEADS,
        **EPS,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention"] * 4,
    )
    local, full = Spec.from_config(config, 0), Spec.from_config(config, 1)
    assert local.norm == full.norm == RMS and local.rotary_dim == 16
    assert full.rotary_dim == (16 if sliding_window is None else 0)


def test_glm4_moe_without_the_norm():
    data = {"model_type": "glm4_moe", **HEADS, **EPS, "head_dim": 32}
    assert Spec.from_config(data).norm == NONE
    assert Spec.from_config({**data, "use_qk_norm": True}).norm == RMS
    assert Spec.from_config(data).rotary_dim == 16  # half, where the file names no share
    assert Spec.from_config({**data, "partial_rotary_factor": 0.25}).rotary_dim == 8


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_hunyuan_alpha_is_static_ntk(name):
    fields = MODELS[name][0]
    rope = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4}
    config = build(name, **fields, rope_parameters=rope)
    spec = Spec.from_config(config)
    assert spec.rope == Rope(theta=1e4, scaling=NTK(50))
    assert_same_frequencies(spec, rotary_module(config).inv_freq)
    # The released files carry YaRN's numbers along; the model does not read them.
    old = {"type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0}
    data = {"model_type": name, **HEADS, **EPS, **fields, "rope_theta": 1e4, "rope_scaling": old}
    assert Spec.from_config(data) == spec
    with pytest.raises(ValueError, match="alpha"):
        Spec.from_config({**data, "model_type": "llama"})


def test_wrappers_give_their_text_part():
    text = {"model_type": "qwen3_vl_text", **HEADS, **EPS, "head_dim": 16}
    old = {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_type": "default"}
    data = {
        "model_type": "qwen3_vl",
        "text_config": {**text, "rope_theta": 5e6, "rope_scaling": old},
    }
    rope = Rope(theta=5e6, mrope_section=(4, 2, 2), mrope_interleaved=True)
    assert Spec.from_config(data).rope == rope
    config = transformers.Qwen3VLConfig(text_config=data["text_config"])
    assert Spec.from_config(config) == Spec.from_config(data)
