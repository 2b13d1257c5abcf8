"""Without a backward: a call that would need a gradient is refused, and never detaches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qkrope
from refusals import FP32, Args, good, keep_plans, maker, packed, refuses


@pytest.fixture(autouse=True)
def warm() -> None:
    keep_plans()


GRAD = ("q", "k", "q_weight", "k_weight", "cos", "sin", "cos_sin_cache", "inv_freq")
GRAD = (*GRAD, "out[0]", "out[1]")


def with_grad(n: Callable[..., Tensor], name: str) -> Args:
    """A good call in which one tensor requires grad; every second one is no leaf."""
    args = good(n)

    def of(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return leaf * 1 if GRAD.index(name) % 2 else leaf

    if name in ("cos", "sin"):
        args["cos_sin"] = tuple(of(n(3, 2)) if s == name else n(3, 2) for s in ("cos", "sin"))
    elif name in ("cos_sin_cache", "inv_freq"):
        args[name] = of(n(9, 4) if name == "cos_sin_cache" else n(2, dtype=FP32))
    elif name.startswith("out"):
        plain = (("out[0]", n(3, 2, 8)), ("out[1]", n(3, 1, 8)))
        args["out"] = tuple(of(x) if s == name else x for s, x in plain)
    else:
        args[name] = of(args[name])
    return args


@pytest.mark.parametrize("name", GRAD)
def test_out_of_place_never_detaches(device: str, name: str) -> None:
    args = with_grad(maker(device), name)
    texts = ("without requires_grad", "got one with it", "qkrope.reference.qk_norm_rope")
    refuses(qkrope.qk_norm_rope, args, ValueError, name, *texts)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            results = qkrope.qk_norm_rope(**args)
        if not name.startswith("out"):
            assert not any(y.requires_grad for y in results)


@pytest.mark.parametrize("name", GRAD)
def test_in_place_refuses_what_requires_grad(device: str, name: str) -> None:
    args = with_grad(maker(device), name)
    texts = ("without requires_grad in an in-place call", "got one with it", "torch.no_grad()")
    refuses(qkrope.qk_norm_rope_, args, ValueError, name, *texts)
    qkv = torch.cat([args["q"], args["k"], args["k"].detach()], 1).flatten(1)
    whole = packed(args, qkv)
    refuses(qkrope.qkv_norm_rope_, whole, ValueError, "qkv" if name in "qk" else name, *texts)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            want = qkrope.qk_norm_rope(**{**args, "out": None})
            fresh = {**args, "out": None, "q": args["q"].clone(), "k": args["k"].clone()}
            qkrope.qk_norm_rope_(**fresh)
            whole = {**whole, "out": None, "qkv": qkv.clone()}
            qkrope.qkv_norm_rope_(**whole)
        assert torch.equal(fresh["q"], want[0]) and torch.equal(fresh["k"], want[1])
        assert torch.equal(whole["qkv"][:, :16], want[0].flatten(1))


def test_tensors_made_in_inference_mode_work(device: str) -> None:
    with torch.inference_mode():
        args = good(maker(device))
        q2, _ = qkrope.qk_norm_rope(**args)
    assert torch.equal(qkrope.qk_norm_rope(**args)[0], q2)
