"""Training with patched attention: loss curves, gradients, gradient checkpointing, autocast.

The noise of a float32 loss curve is what one more rounding of q and k does to it: a run whose
projections are multiplied by 1 or 1 + 2^-23 at random. The model's own chain rounds at most six
times between projection and attention, forward as backward, and qkrope once: their curves may
differ by 6 + 1 of that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkrope.integrations.transformers import patched
from transformers_models import NAMED, OTHERS, model_of, watched_calls
from transformers_vl import IMAGE, qwen3_vl

STEPS, SHORT = 50, ("qwen3", "gemma3_text", "olmo2", "hunyuan_v1_dense")
pytestmark = pytest.mark.filterwarnings("ignore:qkrope leaves as they are")


def rows(generator: torch.Generator, device: str) -> Tensor:
    """Sequences whose second half repeats the first: attention is what learns that."""
    ids = torch.randint(3, 30, (4, 12), generator=generator)
    ids[:, 6:] = ids[:, :6]
    return ids.to(device)


def loss_curve(
    model: nn.Module, device: str = "cpu", also: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Losses of a copy of the model, trained without dropout; an image is the same each time."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(STEPS):
        ids = rows(generator, device)
        given = {}
        if also is not None:
            ids = torch.cat((also["input_ids"], ids.flatten()[None]), 1)
            given = {name: also[name] for name in ("pixel_values", "image_grid_thw")}
            given["mm_token_type_ids"] = (ids == IMAGE).long()
        loss = model(input_ids=ids, labels=ids, **given).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double().cpu())
    return torch.stack(losses)


def difference(a: Tensor, b: Tensor) -> float:
    """Of two curves, the largest."""
    return float((a - b).abs().max())


class OneRounding(nn.Module):
    """A projection whose results are off by one unit of the last place, half of them."""

    def __init__(self, inner: nn.Module, seed: int) -> None:
        super().__init__()
        self.inner, self.generator = inner, torch.Generator().manual_seed(seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> OneRounding:
        return OneRounding(copy.deepcopy(self.inner, memo), 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        up = torch.randint(0, 2, y.shape, generator=self.generator).to(y.device)
        return y * (1 + up * 2.0**-23)


@contextmanager
def rounded_once_more(model: nn.Module) -> Iterator[None]:
    """The model with such projections to q and k."""
    held = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name[:2] in ("q_", "k_", "kv"):
                held.append((module, name, child))
    assert held
    for i, (module, name, child) in enumerate(held):
        setattr(module, name, OneRounding(child, i))
    try:
        yield
    finally:
        for module, name, child in held:
            setattr(module, name, child)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in NAMED],
)
def test_loss_curve(name: str, device: str) -> None:
    model = model_of(name).to(device)
    plain = loss_curve(model, device)
    with rounded_once_more(model):
        noise = difference(loss_curve(model, device), plain)
    with patched(model):
        ours = loss_curve(model, device)
    assert difference(ours, plain) <= 7 * noise
    with patched(model), watched_calls(1.001):  # what the bound is worth
        assert difference(loss_curve(model, device), plain) > 7 * noise


@pytest.mark.slow
def test_loss_curve_of_text_and_image(device: str) -> None:
    model, inputs = qwen3_vl(device)
    plain = loss_curve(model, device, inputs)
    with rounded_once_more(model.model.language_model):
        noise = difference(loss_curve(model, device, inputs), plain)
    with patched(model):
        assert difference(loss_curve(model, device, inputs), plain) <= 7 * noise


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of one batch, by parameter."""
    model.zero_grad()
    ids = rows(torch.Generator().manual_seed(2), "cpu")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


SOME = ("qwen3", "exaone4", "hunyuan_v1_dense", "deepseek_v3", "cohere")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
        for name in dict.fromkeys((*SOME, *NAMED, *OTHERS))
    ],
)
def test_gradients(name: str) -> None:
    """Of every parameter, the norms' too, within 1e-4 of the largest of its tensor. One that
    cancels (a router that a single expert makes idle) keeps the rounding of the model's largest.
    """
    model = model_of(name).train()
    want = gradients(model)
    with patched(model):
        got = gradients(model)
    assert got.keys() == want.keys()
    assert name not in SOME or any("norm" in n and "self_attn" in n for n in want)
    rounding = 2.0**-22 * max(float(grad.abs().max()) for grad in want.values())
    for key, grad in want.items():
        bound = 1e-4 * float(grad.abs().max()) + rounding
        assert float((got[key] - grad).abs().max()) <= bound, key


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # so is 5.17's
def test_gradient_checkpointing() -> None:
    model = model_of("qwen3", layers=2).train()
    with patched(model):
        want = gradients(model)
        model.gradient_checkpointing_enable()
        with watched_calls() as calls:
            got = gradients(model)
    assert calls[0] == 4  # each layer's forward a second time
    assert all(torch.equal(got[key], grad) for key, grad in want.items())


def test_autocast() -> None:
    """bfloat16 activations, float32 weights: the module's type is the activations'."""
    model = model_of("qwen3", layers=2)
    ids = rows(torch.Generator().manual_seed(2), "cpu")
    losses = []
    for context in (nullcontext(), patched(model, rounding="upstream")):
        with context, torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert abs(losses[1] - losses[0]) <= 0.02 * losses[0]  # of the order of bfloat16's steps
