"""The processors of qkrope.integrations.diffusers against the stock ones, in whole small models."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed here")

import diffusers_models as models
from diffusers_models import MODELS, cast, made, run
from qkrope import ops
from qkrope.integrations import diffusers as integration
from qkrope.integrations import diffusers_base

# Two float32 chains of the same formula differ by a few units of 2^-24 in q and k; a dozen
# attention modules, of which some amplify (small rows under an epsilon), stay well below 2^-17,
# and are a hundredth of what the mistakes of `test_the_bound_notices` make.
FP32 = 2.0**-17
# Where q and k round once instead of two or three times, what is left of a bf16 model's error is
# that of everything else: it may not grow, but by what rounding differently makes of a mean over
# 80 and more outputs (1 / sqrt(80) = 11 %, three times that).
ONCE = 1.33


def relative(got: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference, of all outputs, by that of the expected ones."""
    a, b = (torch.cat([x.double().flatten() for x in side]) for side in (got, expected))
    return float((a - b).norm() / b.norm())


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(got, expected, strict=True))


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", MODELS)
def test_float32(name: str, device: str) -> None:
    model, inputs = made(name, device=device)
    stock = run(model, inputs)
    integration.patch(model)
    assert 0 < relative(run(model, inputs), stock) < FP32


@pytest.mark.parametrize("name", MODELS)
def test_upstream_rounding_has_the_bits(name: str) -> None:
    model, inputs = made(name, torch.bfloat16)
    stock = run(model, inputs)
    integration.patch(model, rounding="upstream")
    assert equal(run(model, inputs), stock)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_one_rounding_is_no_further_from_float32(
    name: str, dtype: torch.dtype, device: str
) -> None:
    model, inputs = made(name, dtype, device)
    wide = run(copy.deepcopy(model).float(), cast(inputs, torch.float32, device))
    stock = relative(run(model, inputs), wide)
    integration.patch(model)
    assert relative(run(model, inputs), wide) < ONCE * stock


def swapped(args: Any, extras: Any) -> None:
    """The weights of q and k."""
    args[2], args[3] = args[3], args[2]


def shifted(args: Any, extras: Any) -> None:
    """The table of the token before."""
    if (table := extras.get("cos_sin")) is not None:
        sides = table if isinstance(table[0], tuple) else (table,)
        # Tokens are along the first dimension, or the second of more than two.
        rolled = [tuple(t.roll(1, 0 if t.ndim == 2 else 1) for t in side) for side in sides]
        extras["cos_sin"] = rolled[0] if len(rolled) == 1 else tuple(rolled)


def unlimited(args: Any, extras: Any) -> None:
    """Text turns too, by the table of whichever video token."""
    if (stop := extras.pop("rotate_to", None)) is not None:
        more = args[0].shape[1] - stop
        extras["cos_sin"] = tuple(torch.cat([t, t[:more]]) for t in extras["cos_sin"])


@pytest.mark.parametrize(
    ("mistake", "names"),
    [(swapped, list(MODELS)), (shifted, list(MODELS)), (unlimited, ["HunyuanVideo"])],
)
def test_the_bound_notices(
    mistake: Callable[[Any, Any], None], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = diffusers_base.Processor._call

    def wrong(self: Any, attn: Any, part: Any) -> Any:
        args, extras = call(self, attn, part)
        changed = list(args)
        mistake(changed, extras)
        return tuple(changed), extras

    monkeypatch.setattr(diffusers_base.Processor, "_call", wrong)
    for name in names:
        model, inputs = made(name)
        stock = run(model, inputs)
        integration.patch(model)
        assert relative(run(model, inputs), stock) > 100 * FP32, name


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


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "Wan", "Wan, image"])
def test_fused_projections_are_read_where_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(name)
    model.fuse_qkv_projections()
    stock = run(model, inputs)
    integration.patch(model)
    together = []
    for call in ("qk_norm_rope", "qk_norm_rope_"):
        function = getattr(ops, call)

        def spy(q: Any, k: Any, *args: Any, function: Any = function, **extras: Any) -> Any:
            if q is not None and k is not None:
                storages = [x.untyped_storage().data_ptr() for x in (q, k)]
                together.append(storages[0] == storages[1])
            return function(q, k, *args, **extras)

        monkeypatch.setattr(ops, call, spy)
    assert relative(run(model, inputs), stock) < FP32
    # Every pair but those of Wan's attention to text, whose q is of other tokens than its k.
    assert together.count(False) == (2 if name.startswith("Wan") else 0) < len(together)


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
    attn.norm_k = nn.LayerNorm(models.D)


def no_eps(attn: Any) -> None:
    attn.norm_k = nn.RMSNorm(models.D)


def half_a_head(attn: Any) -> None:
    attn.norm_k = nn.RMSNorm(models.D // 2, eps=1e-6)


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


def test_qwen_image_wants_text_and_makes_its_mask() -> None:
    model, _ = made("Qwen-Image")
    integration.patch(model)
    attn, x = model.transformer_blocks[0].attn, torch.randn(1, 3, 128)
    with pytest.raises(ValueError, match="encoder_hidden_states: expected the text stream"):
        attn(x)
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        attn(x, encoder_hidden_states=x, attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "HunyuanVideo"])
def test_image_tokens_alone(name: str) -> None:
    """The attention modules take one stream too."""
    model, _ = made(name)
    x, angles = torch.randn(2, 5, 128), torch.randn(5, 32).repeat_interleave(2, dim=1)
    table = angles.cos(), angles.sin()
    attn = model.transformer_blocks[0].attn
    if name != "HunyuanVideo":
        attn.added_kv_proj_dim = None
    stock = attn(x, image_rotary_emb=table)
    integration.patch(model)
    got = attn(x, image_rotary_emb=table)
    if name == "HunyuanVideo":
        (stock, text), (got, ours) = stock, got
        assert text is None and ours is None
    assert relative([got], [stock]) < FP32


def test_values_stand_for_attention_where_all_is_perturbed() -> None:
    model, _ = made("LTX-2, perturbed")
    attn, x = model.transformer_blocks[0].attn1, torch.randn(2, 5, 128)
    mask = torch.zeros(2, 1, 1)
    for keywords in ({"perturbation_mask": mask}, {"all_perturbed": True}):
        stock = attn(x, **keywords)
        integration.patch(model)
        assert attn(x, **keywords).equal(stock)
        integration.unpatch(model)


@pytest.mark.parametrize(
    "name", [n if n == "FLUX.2" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_blocks_compile_without_a_graph_break(name: str) -> None:
    if name == "LTX-2, perturbed":
        pytest.skip("diffusers asks the mask's values, which no graph can, stock processor or not")
    model, inputs = made(name)
    stock = run(model, inputs)
    integration.patch(model)
    torch._dynamo.reset()
    blocks = [m for m in model.modules() if type(m).__name__ in model._repeated_blocks]
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert blocks and relative(run(model, inputs), stock) < FP32
