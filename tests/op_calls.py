"""What the tests of the torch ops and of torch.compile share: calls, as a schema has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cases import Call, Recipe
from qkrope.spec import Norm, Rope, Spec

SPEC = Spec(3, 2, 16, rope=Rope(8, 1e6))
Args = tuple[tuple[Any, ...], dict[str, Any]]

RECIPES = {
    "plain": Recipe(SPEC, lead=(2, 3)),
    "packed": Recipe(SPEC, layout="packed", lead=(2, 3)),
    "transposed": Recipe(SPEC, layout="transposed", lead=(2, 3), angle="pair"),
    "cache": Recipe(SPEC, layout="packed", angle="cache", weights="q"),
    "inv_freq": Recipe(SPEC, angle="inv_freq64", weights="-", dtype=torch.float32),
    "one side": Recipe(SPEC, layout="odd", sides="k"),
    "two lengths": Recipe(SPEC, k_lead=(4,)),
    "no rotation": Recipe(replace(SPEC, rope=None), layout="packed"),
}
# What only the CPU kernels run so far.
OPTIONS = {
    "biases": Recipe(SPEC, layout="packed", bias=True, weight_shape="head"),
    "scales": Recipe(SPEC, layout="packed", scale="number"),
    "scale tensors": Recipe(SPEC, scale="token"),
    "two tables": Recipe(SPEC, k_lead=(4,), angle="channel", tables="separate"),
    "some tokens": Recipe(SPEC, layout="packed", lead=(2, 9), rotate=(2, 7)),
    "v": Recipe(replace(SPEC, v_norm=Norm("rms")), layout="packed"),
    "v apart": Recipe(replace(SPEC, v_norm=Norm("rms")), layout="transposed", lead=(2, 3)),
}
CPU = RECIPES | OPTIONS


def views(call: Call) -> tuple[Tensor | None, ...]:
    return (call.q, call.k, *([call.extras["v"]] if "v" in call.extras else []))


def flat(call: Call, *inputs: Tensor | None, **extras: Any) -> Args:
    """A call's arguments as a schema has them."""
    more = {**call.extras, **extras}
    if cos_sin := more.pop("cos_sin", None):
        apart = cos_sin if isinstance(cos_sin[0], Tensor) else (*cos_sin[0], *cos_sin[1])
        more |= dict(zip(("cos", "sin", "k_cos", "k_sin"), apart, strict=False))
    more |= dict(zip(("q_out", "k_out", "v_out"), more.pop("out", ()), strict=False))
    for name in ("q_scale", "k_scale"):
        if isinstance(more.get(name), float):
            more[f"{name}_number"] = more.pop(name)
    if len(inputs) == 1:
        more.pop("v", None)
    positions = call.positions
    if isinstance(positions, tuple):
        positions, more["k_positions"] = positions
    return (*inputs, call.q_weight, call.k_weight, positions, call.spec.canonical()), more


def outputs(call: Call) -> tuple[Tensor | None, ...]:
    return tuple(
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in views(call)
    )
