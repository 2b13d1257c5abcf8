"""`qkrope.QKNormRope`: its parameters, and all else that a module of torch can do."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkrope
from cases import assert_same_bits
from qkrope.spec import Norm, Rope, Spec

SPEC = Spec(6, 2, 16, norm=Norm(eps=1e-5), rope=Rope(dim=8))
GEMMA = replace(SPEC, norm=Norm(weight_offset=1.0))
ROW = replace(SPEC, norm=Norm(scope="row"))
LAYER = replace(SPEC, norm=Norm("layer"))
LATENT = replace(SPEC, norm=Norm("none"), k_norm=Norm(dim=8))


def inputs(spec: Spec, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and positions of an odd number of tokens, q a strided view."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, spec.num_q_heads, 7, spec.head_dim, generator=generator).transpose(1, 2)
    k = torch.randn(2, 7, spec.num_kv_heads, spec.head_dim, generator=generator)
    return [q.to(device, dtype), k.to(device, dtype), torch.arange(7, device=device) * 1001]


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Distinct values for every parameter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 + torch.rand(p.shape, generator=generator))
    return module


@pytest.mark.parametrize(
    "spec, keywords, shapes",
    [
        (SPEC, {}, {"q_norm.weight": (16,), "k_norm.weight": (16,)}),
        (ROW, {}, {"q_norm.weight": (96,), "k_norm.weight": (32,)}),
        (SPEC, {"per_head": True}, {"q_norm.weight": (6, 16), "k_norm.weight": (2, 16)}),
        (SPEC, {"weight": (False, True)}, {"k_norm.weight": (16,)}),
        (SPEC, {"weight": False}, {}),
        (
            LAYER,
            {"bias": True},
            {f"{s}_norm.{n}": (16,) for s in "qk" for n in ("weight", "bias")},
        ),
        (LATENT, {"bias": (True, False)}, {"k_norm.weight": (8,)}),
    ],
)
def test_parameters_and_the_call(
    spec: Spec, keywords: dict[str, Any], shapes: dict[str, tuple[int, ...]], device: str
) -> None:
    module = randomized(qkrope.QKNormRope(spec, **keywords)).to(device)
    state = module.state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == shapes
    q, k, positions = inputs(spec, device)
    given = {f"{s}_bias": state[f"{s}_norm.bias"] for s in "qk" if f"{s}_norm.bias" in state}
    weights = state.get("q_norm.weight"), state.get("k_norm.weight")
    with torch.no_grad():
        got = module(q, k, positions)
        want = qkrope.qk_norm_rope(q, k, *weights, positions, spec, **given)
        for y, expected in zip(got, want, strict=True):
            assert_same_bits(y, expected)
        alone = module(None, k, positions)
    assert alone[0] is None
    assert_same_bits(alone[1], want[1])


def test_the_start_changes_no_scale() -> None:
    for spec, first in ((SPEC, 1.0), (GEMMA, 0.0)):
        for name, p in qkrope.QKNormRope(spec, bias=True).named_parameters():
            assert torch.equal(p, torch.full_like(p, 0.0 if "bias" in name else first)), name


def test_a_checkpoint_of_a_model_loads_unchanged() -> None:
    """The entries of an attention module that belong to the two norms, and no others."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    config = Qwen3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, layer_types=None
    )
    attention = randomized(Qwen3Attention(config, 0))
    module = qkrope.QKNormRope(Spec.from_config(config))
    wanted = {n: p for n, p in attention.state_dict().items() if n.startswith(("q_norm", "k_norm"))}
    module.load_state_dict(wanted)
    assert torch.equal(module.q_norm.weight, attention.q_norm.weight)
    assert torch.equal(module.k_norm.weight, attention.k_norm.weight)


def test_a_checkpoint_of_layers() -> None:
    """As a submodule its entries have its prefix; those of an attention module go in without."""
    layer = torch.nn.Module()
    layer.norm_rope = module = qkrope.QKNormRope(SPEC)
    assert list(layer.state_dict()) == ["norm_rope.q_norm.weight", "norm_rope.k_norm.weight"]
    prefix = "layers.0.self_attn."
    checkpoint = {f"{prefix}{side}_norm.weight": torch.randn(16) for side in "qk"}
    checkpoint[f"{prefix}o_proj.weight"] = torch.randn(3, 3)
    own = {name: checkpoint[prefix + name] for name in module.state_dict()}
    module.load_state_dict(own)
    for name, p in module.state_dict().items():
        assert torch.equal(p, checkpoint[prefix + name])


def test_the_default_dtype_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    with pytest.raises(TypeError, match=r"^dtype: expected one of .*, got torch\.float64"):
        qkrope.QKNormRope(SPEC)


def test_copies_and_files_compute_the_same() -> None:
    module = randomized(qkrope.QKNormRope(SPEC, bias=True))
    with torch.no_grad():
        want = module(*inputs(SPEC))
        copied = copy.deepcopy(module)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        filled = qkrope.QKNormRope(SPEC, bias=True)
        filled.load_state_dict(torch.load(file, weights_only=True))
        for other in (copied, loaded, filled):
            assert other is not module and other.spec == SPEC
            for y, expected in zip(other(*inputs(SPEC)), want, strict=True):
                assert_same_bits(y, expected)
        copied.q_norm.weight.zero_()  # its own, not the first one's
        assert_same_bits(module(*inputs(SPEC))[0], want[0])


def test_meta() -> None:
    module = qkrope.QKNormRope(SPEC, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    with torch.no_grad():
        q, k = module(*(x.to("meta") for x in inputs(SPEC)))
    assert q.is_meta and k.is_meta and q.shape == (2, 7, 6, 16) and k.shape == (2, 7, 2, 16)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.q_norm.weight, torch.ones(16, dtype=torch.bfloat16))
    with torch.device("meta"):
        assert qkrope.QKNormRope(SPEC).k_norm.weight.is_meta


def test_export_and_compile_are_one_node() -> None:
    module = randomized(qkrope.QKNormRope(SPEC, bias=True))
    given = tuple(inputs(SPEC))
    with torch.no_grad():
        want = module(*given)
        program = torch.export.export(module, given)
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        assert [str(n.target) for n in calls if "qkrope" in str(n.target)] == [
            "qkrope.qk_norm_rope.default"
        ]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for got in (program.module()(*given), compiled(*given)):
            for y, expected in zip(got, want, strict=True):
                assert_same_bits(y, expected)


def test_repr_shows_the_spec() -> None:
    text = repr(qkrope.QKNormRope(SPEC, weight=(True, False)))
    assert repr(SPEC) in text
    assert "(q_norm): _Affine(16, weight)" in text and "16, no parameters" in text


def test_errors() -> None:
    with pytest.raises(TypeError, match="^spec: expected a Spec"):
        qkrope.QKNormRope({"head_dim": 16})
    with pytest.raises(TypeError, match="^weight: expected a bool"):
        qkrope.QKNormRope(SPEC, weight=1)
    with pytest.raises(ValueError, match="^bias: expected a bool or a pair"):
        qkrope.QKNormRope(SPEC, bias=(True, True, True))
    for dtype in (torch.int32, torch.float64, torch.complex64):
        text = f"^dtype: expected one of float32, bfloat16, float16, got {dtype}"
        with pytest.raises(TypeError, match=text):
            qkrope.QKNormRope(SPEC, dtype=dtype)
    with pytest.raises(TypeError, match="^dtype: expected a dtype or None, got 'bfloat16'"):
        qkrope.QKNormRope(SPEC, dtype="bfloat16")
    module = qkrope.QKNormRope(SPEC, bias=True)
    with torch.no_grad(), pytest.raises(ValueError, match="^q_bias: expected None"):
        module(*inputs(SPEC), q_bias=torch.zeros(16))


def test_gradients_reach_the_parameters(device: str) -> None:
    """Those of the call itself; its own tests hold them to the oracle."""
    module = randomized(qkrope.QKNormRope(LAYER, bias=True)).to(device)
    q, k, positions = inputs(LAYER, device)
    weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    bias = {f"{s}_bias": weights[f"{s}_norm.bias"] for s in "qk"}
    for y in module(q, k, positions):
        y.square().sum().backward(retain_graph=True)
    args = weights["q_norm.weight"], weights["k_norm.weight"], positions, LAYER
    for y in qkrope.qk_norm_rope(q, k, *args, **bias):
        y.square().sum().backward(retain_graph=True)
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.any()
        assert_same_bits(p.grad, weights[name].grad)
