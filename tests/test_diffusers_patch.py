"""patch and unpatch of qkrope.integrations.diffusers: what they set, leave and refuse."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed here")

from diffusers_models import FP32, MODELS, D, equal, made, relative, run
from qkrope.integrations import diffusers as integration
from qkrope.integrations import diffusers_base


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_bits_and_objects(name: str) -> None:
    model, inputs = made(name, torch.bfloat16)
    processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "set_processor")}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    stock = run(model, inputs)
    done = integration.patch(model)
    assert done.patched and {*done.patched, *done.left} == {*processors}
    assert model.state_dict().keys() == state.keys()
    run(model, inputs)
    with pytest.raises(ValueError, match="model: expected one that is not patched"):
        integration.patch(model)
    assert integration.unpatch(model) == len(done.patched)
    assert all(model.get_submodule(n).processor is p for n, p in processors.items())
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert equal(run(model, inputs), stock)
    assert integration.unpatch(model) == 0


def test_one_processor_for_all_modules() -> None:
    model, inputs = made("Wan")
    stock = run(model, inputs)
    model.set_attn_processor(integration.WanProcessor())
    assert relative(run(model, inputs), stock) < FP32


def test_one_processor_tells_the_modules_apart() -> None:
    model, inputs = made("LTX-2")  # of several head sizes
    for n, module in enumerate(m for m in model.modules() if hasattr(m, "set_processor")):
        module.norm_q.eps = 10.0 ** -(n % 5)
    stock = run(model, inputs)
    model.set_attn_processor(integration.LTX2Processor())
    assert relative(run(model, inputs), stock) < FP32


def test_processors_by_name() -> None:
    model, inputs = made("FLUX.2")
    stock = run(model, inputs)
    ours = {}
    for name in model.attn_processors:
        single = name.startswith("single")
        kind = integration.Flux2SingleProcessor if single else integration.Flux2Processor
        ours[name] = kind(model.get_submodule(name.removesuffix(".processor")))
    model.set_attn_processor(ours)
    assert relative(run(model, inputs), stock) < FP32
    assert integration.unpatch(model) == 0  # there is nothing to put back


def test_the_attention_backend_stays_selectable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("HunyuanVideo")
    used, dispatch = [], diffusers_base.dispatch_attention_fn

    def spy(*args: Any, **keywords: Any) -> Tensor:
        used.append((keywords["backend"], keywords["parallel_config"]))
        return dispatch(*args, **keywords)

    monkeypatch.setattr(diffusers_base, "dispatch_attention_fn", spy)
    model.set_attention_backend("_native_math")
    done = integration.patch(model)
    run(model, inputs)
    assert len(used) == 3 and {str(backend.value) for backend, _ in used} == {"_native_math"}
    model.set_attention_backend("native")
    integration.unpatch(model)
    for name in done.patched:
        assert model.get_submodule(name).processor._attention_backend.value == "native"


def test_the_report_is_that_of_transformers() -> None:
    from qkrope.integrations import report, transformers

    assert integration.Report is transformers.Report is report.Report
    model, _ = made("FLUX.2")
    for block in model.transformer_blocks:
        block.attn.norm_k = nn.LayerNorm(D)
    reason = "norm_k: expected an RMSNorm of torch or diffusers, got LayerNorm"
    with pytest.warns(UserWarning) as caught:
        done = integration.patch(model)
    (warning,) = caught
    assert warning.filename == __file__
    left, patched = len(done.left), len(done.patched)
    more = f" and {left - 1} more" if left > 1 else ""
    text = f"transformer_blocks.0.attn{more}: {reason}"
    assert str(warning.message).startswith(f"qkrope leaves as they are: {text}")
    assert str(done).startswith(f"{patched} attention modules patched, {left} left\n  patched: ")
    assert f"\n  left: {text}" in str(done)


def test_token_refiners_are_left_by_name() -> None:
    model, _ = made("HunyuanVideo")
    left = integration.patch(model).left
    assert list(left.values()) == ["no norm of Q and K"]
    assert next(iter(left)).startswith("context_embedder.token_refiner")


def test_patched_ends_with_the_block() -> None:
    model, inputs = made("FLUX.1")
    stock = run(model, inputs)
    with pytest.raises(ZeroDivisionError), integration.patched(model, rounding="B/f") as report:
        assert len(report.patched) == 3 and set(report.patched.values()) == {"FluxProcessor"}
        run(model, inputs)
        raise ZeroDivisionError
    assert equal(run(model, inputs), stock) and integration.unpatch(model) == 0


def test_a_hook_on_the_module_does_not_keep_the_processor() -> None:
    """A wrapped forward, as accelerate makes it, asks the module for its processor at each call."""
    model, inputs = made("FLUX.1")
    stock = run(model, inputs)
    done = integration.patch(model)
    for name in done.patched:
        attn = model.get_submodule(name)
        attn.forward = functools.partial(lambda old, *a, **k: old(*a, **k), attn.forward)
    assert not equal(run(model, inputs), stock)
    assert integration.unpatch(model) == len(done.patched)
    assert equal(run(model, inputs), stock)


def test_deepcopy() -> None:
    model, inputs = made("FLUX.1")
    integration.patch(model)
    expected = run(model, inputs)
    other = copy.deepcopy(model)
    integration.unpatch(model)
    assert equal(run(other, inputs), expected)
    assert integration.unpatch(other)


def test_ip_adapter_and_kv_cache_are_refused_by_name() -> None:
    from diffusers.models.transformers import transformer_flux as flux
    from diffusers.models.transformers import transformer_flux2 as flux2

    model, _ = made("FLUX.1")
    adapter = flux.FluxIPAdapterAttnProcessor(128, 128)
    model.transformer_blocks[0].attn.set_processor(adapter)
    with pytest.warns(UserWarning, match="transformer_blocks.0.attn: FluxIPAdapterAttnProcessor"):
        done = integration.patch(model)
    assert list(done.left) == ["transformer_blocks.0.attn"]
    assert model.transformer_blocks[0].attn.processor is adapter

    model, _ = made("FLUX.2")
    model.transformer_blocks[0].attn.set_processor(flux2.Flux2KVAttnProcessor())
    single = model.single_transformer_blocks[0].attn
    single.set_processor(flux2.Flux2KVParallelSelfAttnProcessor())
    with pytest.warns(UserWarning, match="keeps keys and values of reference images"):
        assert len(integration.patch(model).left) == 2


def test_a_subclass_of_a_stock_processor_is_left() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Mine(FluxAttnProcessor):
        pass

    model, _ = made("FLUX.1")
    model.transformer_blocks[0].attn.set_processor(Mine())
    with pytest.warns(UserWarning, match="Mine is none of the processors that qkrope knows"):
        assert "transformer_blocks.0.attn" in integration.patch(model).left


def test_copies_are_the_same_code() -> None:
    """One of ours stands in for both, and parity is shown for the one in the model's own file."""
    sources: dict[tuple[type, str], set[str]] = {}
    for path, ours in integration._PROCESSORS.items():
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(f"diffusers.models.{module}"), name)
        sources.setdefault((ours, name), set()).add(ast.dump(ast.parse(inspect.getsource(kind))))
    assert len(sources) == 9 and len(integration._PROCESSORS) == 12
    assert all(len(found) == 1 for found in sources.values())


def layer_norm(attn: Any) -> None:
    attn.norm_k = nn.LayerNorm(D)


def no_eps(attn: Any) -> None:
    attn.norm_k = nn.RMSNorm(D)


def half_a_head(attn: Any) -> None:
    attn.norm_k = nn.RMSNorm(D // 2, eps=1e-6)


def offloaded(attn: Any) -> None:
    attn.norm_k._hf_hook = object()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (layer_norm, "norm_k: expected an RMSNorm of torch or diffusers, got LayerNorm"),
        (no_eps, "norm_k.eps: expected a number, got None"),
        (half_a_head, r"norm_k: expected a norm over \[64\] or \[128\], got \[32\]"),
        (offloaded, "norm_k is offloaded by a hook"),
    ],
)
def test_a_norm_that_no_spec_describes(change: Callable[[Any], None], text: str) -> None:
    model, _ = made("FLUX.1")
    attn = model.single_transformer_blocks[1].attn
    stock = attn.processor
    change(attn)
    with pytest.warns(UserWarning, match=rf"single_transformer_blocks\.1\.attn: {text}"):
        done = integration.patch(model)
    assert len(done.patched) == 2 and attn.processor is stock


def test_refusals() -> None:
    with pytest.raises(TypeError, match="model: expected a torch module.*got dict"):
        integration.patch({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a torch module"):
        integration.unpatch(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got Linear .no module has an attention processor"):
        integration.patch(nn.Linear(2, 2))
    model, _ = made("FLUX.1")
    with pytest.raises(ValueError, match="rounding: expected"):
        integration.patch(model, rounding="downstream")
    with pytest.raises(ValueError, match="rounding: expected"):
        integration.FluxProcessor(rounding="A/z")
