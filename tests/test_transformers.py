"""`qkrope.integrations.transformers`: tokens and logits, what a patch leaves alone and refuses.

test_transformers_families.py holds q and k of every family to the model's own.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qkrope.integrations.transformers import Report, patch, patched, unpatch
from transformers_models import NAMED, OTHERS, generate, model_of, prompt, watched_calls
from transformers_vl import qwen3_vl

pytestmark = pytest.mark.filterwarnings("ignore:qkrope leaves as they are")


def logits(model: nn.Module, device: str = "cpu") -> Tensor:
    """Of a padded batch."""
    with torch.no_grad():
        return model(**prompt(device), use_cache=False).logits


# ---- the same tokens ----------------------------------------------------------------------------


def same_tokens(model: nn.Module, inputs: dict[str, Tensor], logits_of: Any) -> None:
    """float32 logits within 1e-4 and 64 greedy tokens, then bfloat16 tokens, by the cache."""
    for dtype, rounding in ((torch.float32, "once"), (torch.bfloat16, "upstream")):
        model = model.to(dtype)
        want, tokens = logits_of(), generate(model, inputs)
        with patched(model, rounding=rounding) as report, watched_calls() as calls:
            got, found = logits_of(), generate(model, inputs)
        assert calls[0] == 65 * sum(text.count(",") + 1 for text in report.patched.values())
        assert torch.equal(found, tokens)
        if dtype == torch.float32:
            assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
            with patched(model), watched_calls(4.0):  # what the comparison is worth
                assert not torch.equal(generate(model, inputs), tokens)
        assert torch.equal(logits_of(), want)


@pytest.mark.parametrize(
    "name", [*NAMED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_tokens(name: str, device: str) -> None:
    model = model_of(name).to(device)
    same_tokens(model, prompt(device), lambda: logits(model, device))


def test_tokens_of_text_and_image(device: str) -> None:
    """Qwen3-VL: positions on three axes, with an image among the tokens."""
    model, inputs = qwen3_vl(device)

    def logits_of() -> Tensor:
        given = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
        with torch.no_grad():
            return model(**given, use_cache=False).logits

    same_tokens(model, inputs, logits_of)
    with patched(model) as report:
        assert all("language_model" in name for name in report.patched)
        assert report.left and all("visual" in name for name in report.left)


@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_rounding_is_that_of_the_call(rounding: str) -> None:
    """Olmo2's own casts are neither: with them alone the bits are the model's."""
    model = model_of("olmo2").to(torch.bfloat16)
    want = logits(model)
    with patched(model, rounding="upstream"):
        assert torch.equal(logits(model), want)
    with patched(model, rounding=rounding):
        assert not torch.equal(logits(model), want)


# ---- all that stays as it is --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_attention_functions_stay_selectable(name: str) -> None:
    """After the patch too."""
    model, other = model_of("qwen3"), model_of("qwen3")
    with patched(model):
        for each in (model, other):
            each.set_attn_implementation(name)
        got, want = logits(model), logits(other)
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_attentions_and_hidden_states_are_still_given() -> None:
    model, keywords = model_of("qwen3"), {"output_attentions": True, "output_hidden_states": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(**prompt("cpu"), **keywords)
        with patched(model):
            got = model(**prompt("cpu"), **keywords)
    for name in ("attentions", "hidden_states"):
        for y, x in zip(getattr(got, name), getattr(want, name), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


def test_static_cache() -> None:
    model = model_of("qwen3")
    want = generate(model, {**prompt("cpu"), "cache_implementation": "static"}, 8)
    with patched(model):
        assert torch.equal(
            generate(model, {**prompt("cpu"), "cache_implementation": "static"}, 8), want
        )


@pytest.mark.parametrize("name", ["qwen3", "exaone4", "gemma3_text", "deepseek_v3"])
def test_compile(name: str) -> None:
    """The whole graph, with a call's node for each call."""
    model = model_of(name)
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch.compiler.reset()
    with patched(model) as report:
        want = logits(model)
        got = logits(torch.compile(model, fullgraph=True, backend=backend))
    assert torch.equal(got, want)
    calls = sum(text.count(",") + 1 for text in report.patched.values())
    assert nodes.count("qkrope.qk_norm_rope.default") == calls
    torch.compiler.reset()


def test_a_compiled_model_follows() -> None:
    """Patched and unpatched after it was compiled."""
    model = model_of("qwen3")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    want = logits(compiled)
    with patched(model):
        assert torch.equal(logits(compiled), logits(model))
        assert not torch.equal(logits(compiled), want)
    assert torch.equal(logits(compiled), want)
    torch.compiler.reset()


def test_two_models_side_by_side() -> None:
    """Nothing of the class changes."""
    model, other = model_of("qwen3"), model_of("qwen3")
    want = logits(other)
    with patched(model), watched_calls() as calls:
        assert torch.equal(logits(other), want) and calls == [0]
        logits(model)
        assert calls[0] > 0


def test_state_is_not_touched() -> None:
    model = model_of("gemma3_text")
    before = {name: p for name, p in model.named_parameters()}
    modules = [name for name, _ in model.named_modules()]
    with patched(model):
        assert [*model.state_dict()] == [*model_of("gemma3_text").state_dict()]
        assert all(p is before[name] for name, p in model.named_parameters())
        assert [name for name, _ in model.named_modules()] == modules
        # Weights are those of the moment.
        first = logits(model)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_norm.weight.add_(1.0)
        assert not torch.equal(logits(model), first)


def test_a_copy_has_its_own_weights() -> None:
    model = model_of("qwen3")
    want = logits(model)
    with patched(model):
        ours = logits(model)
        other = copy.deepcopy(model)
        assert torch.equal(logits(other), ours)
        with torch.no_grad():
            other.model.layers[0].self_attn.q_norm.weight.mul_(3.0)
        assert torch.equal(logits(model), ours) and not torch.equal(logits(other), ours)
    assert unpatch(other) == 1
    assert torch.equal(logits(model), want)


def test_a_pickled_model_comes_back_as_the_original() -> None:
    model = model_of("qwen3")
    want, file = logits(model), io.BytesIO()
    with patched(model):
        ours = logits(model)
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), want)
    with patched(loaded):
        assert torch.equal(logits(loaded), ours)
    assert torch.equal(logits(loaded), want)


def test_an_exception_in_the_block_restores() -> None:
    model = model_of("qwen3")
    want = logits(model)
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert not {"forward", "_qkrope"} & {*vars(model.model.layers[0].self_attn)}
    assert torch.equal(logits(model), want)
    assert unpatch(model) == 0


def test_signature_and_traceback_are_the_originals() -> None:
    import inspect

    model = model_of("qwen3")
    attention = model.model.layers[0].self_attn
    want = inspect.signature(attention.forward)
    with patched(model):
        assert inspect.signature(attention.forward) == want
        with pytest.raises(TypeError) as caught:
            attention(torch.zeros(1, 2, 32), position_embeddings=None, attention_mask=None)
    frames = [(e.path.name, e.lineno) for e in caught.traceback]
    first = type(attention).forward.__code__.co_firstlineno
    assert any(f == "modeling_qwen3.py" and first < line < first + 30 for f, line in frames)


# ---- what it says, and what it refuses ----------------------------------------------------------


def test_report() -> None:
    model = model_of("exaone4")
    report = patch(model)
    assert isinstance(report, Report) and report.left == {}
    assert report.patched == {
        "model.layers.0.self_attn": "q_norm + k_norm + rotation",
        "model.layers.1.self_attn": "q_norm, k_norm",
    }
    assert "2 attention modules patched, 0 left" in str(report)


def test_what_is_left_is_said_by_name() -> None:
    model = model_of("deepseek_v4")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = patch(model)
    (message,) = [str(w.message) for w in caught if "qkrope" in str(w.message)]
    assert "DeepseekV4Indexer: not the attention itself" in message
    assert any(name.endswith("indexer") for name in report.left)
    assert "left: model.layers" in str(report)


def test_patch_twice() -> None:
    model = model_of("qwen3")
    patch(model)
    ours = logits(model)
    with pytest.raises(
        ValueError, match=r"^model: expected one that is not patched, got model\.la"
    ):
        patch(model, rounding="eager")
    assert torch.equal(logits(model), ours)


def test_nothing_to_patch() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32)
    for model in (nn.Linear(2, 2), transformers.GPT2Model(config)):
        with pytest.raises(ValueError, match=r"^model: expected attention layers .*no module"):
            patch(model)
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ValueError, match="'gpt_neox' is no text model that Spec.from_config knows"):
        patch(transformers.GPTNeoXModel(config))
    with pytest.raises(TypeError, match="^model: expected a torch module, got str"):
        patch("Qwen/Qwen3-8B")
    with pytest.raises(ValueError, match='^rounding: expected "once"'):
        patch(model_of("qwen3"), rounding="bf16")


class Doubled(nn.Module):
    """Not what a config calls a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * self.weight


def spoil(attention: Any, how: str) -> str:
    """Make a module differ from its config; the reason that must be given."""
    norm = attention.q_norm
    if how == "eps":
        norm.variance_epsilon = 1e-5
        return "q_norm (Qwen3RMSNorm) does not normalise as the config says"
    if how == "class":
        attention.q_norm = Doubled(norm)
        return "q_norm (Doubled) does not normalise as the config says"
    if how == "shape":
        attention.k_norm.weight = nn.Parameter(attention.k_norm.weight[:8].clone())
        return "k_norm: expected (16,) for the weight, got [(8,)]"
    if how == "hook":
        norm.register_forward_hook(lambda module, args, out: out + 1)
        return "q_norm has hooks"
    if how == "norm's forward":
        norm.forward = lambda x: x
        return "q_norm has hooks, or a forward of its own"
    if how == "forward":
        attention.forward = lambda *args, **keywords: None
        return "something else has replaced its forward"
    if how == "no norm":
        attention.q_norm = None
        return "q_norm is no module"
    del attention.layer_idx
    return "it does not know its layer_idx"


@pytest.mark.parametrize(
    "how",
    ["eps", "class", "shape", "hook", "norm's forward", "forward", "no norm", "layer_idx"],
)
def test_a_module_that_differs_is_left(how: str) -> None:
    model = model_of("qwen3", layers=2)
    reason = spoil(model.model.layers[1].self_attn, how)
    before = {**vars(model.model.layers[1].self_attn)}
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.self_attn"):
        report = patch(model)
    assert [*report.patched] == ["model.layers.0.self_attn"]
    assert reason in report.left["model.layers.1.self_attn"]
    assert vars(model.model.layers[1].self_attn) == before


def test_a_config_that_disagrees_is_seen() -> None:
    """Each of these would be another model."""
    for name, field, value, reason in (
        ("qwen3", "rms_norm_eps", 1e-3, "does not normalise"),
        ("qwen3", "head_dim", 8, "expected (8,) for the weight"),
        ("glm4_moe", "use_qk_norm", False, "its code normalises k and q, the config does not"),
        ("olmoe", "clip_qkv", 8.0, "clip_qkv"),
        ("minimax_m2", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, "frequenc"),
    ):
        model = model_of(name)
        setattr(model.config, field, value)
        with pytest.raises(ValueError, match="expected attention layers") as caught:
            patch(model)
        assert reason in str(caught.value), name


def test_a_table_of_another_width_is_refused_at_the_call() -> None:
    model = model_of("qwen3")
    patch(model)
    attention = model.model.layers[0].self_attn
    tables = (torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
    with torch.no_grad(), pytest.raises(ValueError, match="^position_embeddings: expected a last"):
        attention(torch.zeros(1, 2, 32), position_embeddings=tables, attention_mask=None)


def test_meta() -> None:
    """Before weights are loaded: shapes are checked, values cannot be."""
    with torch.device("meta"):
        model = model_of("qwen3")
    assert len(patch(model).patched) == 1
    model.to_empty(device="cpu")
    assert unpatch(model) == 1
