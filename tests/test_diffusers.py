"""The processors of qkrope.integrations.diffusers against the stock ones, in whole small models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed here")

from diffusers.models.normalization import RMSNorm

from diffusers_models import FP32, MODELS, D, cast, equal, figures, made, relative, run
from qkrope import ops
from qkrope.integrations import diffusers as integration
from qkrope.integrations import diffusers_base

# Where q and k round once instead of two or three times, what is left of a bf16 model's error is
# that of everything else: it may not grow, but by what rounding differently makes of a mean over
# 80 and more outputs (1 / sqrt(80) = 11 %, three times that).
ONCE = 1.33


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
def test_the_documents_table(name: str) -> None:
    """Figures that another machine's matrix products change a little, and no more."""
    text = (Path(__file__).parent.parent / "docs/integrations/diffusers.md").read_text()
    table = text.partition("| model | float32: difference")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n")[2:]]
    assert [row[0] for row in rows] == list(MODELS)
    (row,) = (row for row in rows if row[0] == name)
    *errors, same = figures(name)
    for stated, found in zip(row[1:4], errors, strict=True):
        assert found / 2 < float(stated) < found * 2
    assert (row[4] == "the same") is same


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


def test_qwen_image_wants_text_and_makes_its_mask() -> None:
    model, _ = made("Qwen-Image")
    integration.patch(model)
    attn, x = model.transformer_blocks[0].attn, torch.randn(1, 3, 128)
    with pytest.raises(ValueError, match="encoder_hidden_states: expected the text stream"):
        attn(x)
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        attn(x, encoder_hidden_states=x, attention_mask=torch.ones(1, 6))


def without_weight(attn: Any) -> None:
    attn.norm_q = RMSNorm(D, eps=1e-3, elementwise_affine=False)


def with_bias(attn: Any) -> None:
    attn.norm_k = RMSNorm(D, eps=1e-3, bias=True)
    nn.init.normal_(attn.norm_k.bias)


def without_norm(attn: Any) -> None:
    attn.norm_k = None


@pytest.mark.parametrize("change", [without_weight, with_bias, without_norm])
@pytest.mark.parametrize("rounding", ["once", "upstream"])
def test_norms_of_other_forms(change: Callable[[Any], None], rounding: str) -> None:
    dtype = torch.float32 if rounding == "once" else torch.bfloat16
    model, inputs = made("Z-Image", dtype)
    for layer in model.layers:
        change(layer.attention)
    model.to(dtype)
    stock = run(model, inputs)
    integration.patch(model, rounding=rounding)
    got = run(model, inputs)
    assert relative(got, stock) < FP32 if rounding == "once" else equal(got, stock)


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


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Those of every parameter and of the inputs' hidden states, of random multiples of outputs."""
    draw = torch.Generator().manual_seed(3)
    hidden = {
        name: x.clone().requires_grad_()
        for name, x in inputs.items()
        if "hidden_states" in name and x.is_floating_point()
    }
    model.zero_grad()
    with torch.enable_grad():
        outputs = run(model, inputs | hidden)
        scalars = [(y * torch.randn(y.shape, generator=draw)).sum() for y in outputs]
        torch.stack(scalars).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {k: v.grad for k, v in hidden.items()}


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    model, inputs = made(name)
    stock = gradients(model, inputs)
    integration.patch(model)
    got = gradients(model, inputs)
    assert got.keys() == stock.keys()
    assert relative(list(got.values()), list(stock.values())) < FP32
    weights = [n for n in got if n.endswith(("norm_q.weight", "norm_k.weight"))]
    weights += [n for n in got if n.endswith(("norm_added_q.weight", "norm_added_k.weight"))]
    assert len(weights) >= 4
    for weight in weights:
        if stock[weight].any():
            assert relative([got[weight]], [stock[weight]]) < FP32, weight
        else:  # Qwen-Image makes nothing of the last block's text
            assert weight.endswith("1.attn.norm_added_q.weight") and not got[weight].any()


def test_gradients_with_checkpointing() -> None:
    model, inputs = made("FLUX.1")
    integration.patch(model.train())
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    got = gradients(model, inputs)
    assert all(got[name].equal(grad) for name, grad in expected.items())


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
