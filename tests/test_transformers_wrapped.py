"""A forward that something else wraps between patch and unpatch, as accelerate's hooks do."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch

from qkrope.integrations.transformers import patch, patched, unpatch
from test_transformers import logits
from transformers_models import model_of


def hook(module: Any) -> Any:
    """As accelerate's add_hook_to_module does; what is returned undoes it."""
    old = module.forward
    module.forward = functools.update_wrapper(functools.partial(old), old)
    return lambda: setattr(module, "forward", old)


def test_a_forward_wrapped_since_is_named() -> None:
    model = model_of("qwen3", layers=3)
    want = logits(model)
    patch(model)
    layers = [layer.self_attn for layer in model.model.layers]
    removes = [hook(layers[0]), hook(layers[2])]
    before, ours = [{**vars(layer)} for layer in layers], logits(model)
    names = r"got another in model\.layers\.0\.self_attn, model\.layers\.2\.self_attn: remove the"
    for call in (unpatch, patch):
        with pytest.raises(ValueError, match=names):
            call(model)
    assert [vars(layer) for layer in layers] == before
    for remove in removes:
        remove()
    assert torch.equal(logits(model), ours) and unpatch(model) == 3
    assert torch.equal(logits(model), want)


def test_the_end_of_a_block_says_what_it_cannot_restore() -> None:
    model = model_of("qwen3")
    with pytest.raises(ValueError, match="remove the hook") as caught, patched(model):
        hook(model.model.layers[0].self_attn)
        raise KeyError
    assert isinstance(caught.value.__context__, KeyError)


def test_a_pickled_model_is_not_taken_for_a_wrapped_one() -> None:
    """It has our plan, and its class's forward."""
    model, file = model_of("qwen3"), io.BytesIO()
    patch(model)
    torch.save(model, file)
    file.seek(0)
    assert unpatch(torch.load(file, weights_only=False)) == 0
