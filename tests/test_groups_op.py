"""norm_rope_groups_ against the oracle: what it computes, what it leaves, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkrope
from cases import assert_criterion, bits
from qkrope import reference
from qkrope.groups import Group
from qkrope.spec import Norm, Rope

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
D, NQ, NK = 40, 5, 2
ROPE = Rope(dim=24, theta=1e6)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layouts(dtype: torch.dtype) -> dict[str, tuple[int, list[Group]]]:
    """Width of a row, and the groups in it."""
    w, u = draw(D, seed=1, dtype=dtype), draw(NK, D, seed=2, dtype=FP32)
    gate, k = NQ * 2 * D, NK * D
    return {
        # [q | gate] in each head, then k, then v
        "gated": (
            gate + 2 * k,
            [
                Group(0, NQ, D, Norm(weight_offset=1.0), ROPE, w, head_stride=2 * D),
                Group(gate, NK, D, Norm(eps=1e-5), ROPE, u),
            ],
        ),
        # [q | k | v | mlp], an odd one
        "mlp": (
            (NQ + 2 * NK) * D + 37,
            [
                Group(0, NQ, D, Norm(scope="row"), ROPE, w),
                Group(NQ * D, NK, D, Norm("layer"), None, u, draw(D, seed=3)),
            ],
        ),
        # [H, 3, D]: q, k and a normalised v of each head
        "thirds": (
            NK * 3 * D,
            [
                Group(0, NK, D, Norm(), ROPE, w, head_stride=3 * D),
                Group(D, NK, D, Norm("l2"), ROPE, None, head_stride=3 * D, scale=0.25),
                Group(2 * D, NK, D, Norm("layer"), None, None, head_stride=3 * D),
            ],
        ),
        # an indexer's head with positions and a rotation of its own beside q
        "indexer": (
            NQ * D + 16 + 3,
            [
                Group(0, NQ, D, Norm(), replace(ROPE, pairing="interleaved"), w),
                Group(
                    *(NQ * D, 1, 16, Norm("layer"), Rope(dim=8, offset=8)),
                    weight=draw(16, seed=4, dtype=dtype),
                    bias=draw(16, seed=5, dtype=dtype),
                    positions=torch.arange(18).view(2, 9) - 7,
                ),
            ],
        ),
    }


def on(group: Group, device: str) -> Group:
    """The group with its tensors on a device."""
    tensors = {name: getattr(group, name) for name in ("weight", "bias", "positions")}
    return replace(group, **{n: None if t is None else t.to(device) for n, t in tensors.items()})


def exact(x: Tensor, groups: list[Group], positions: Tensor, **angles: Any) -> Tensor:
    """Criterion terms in the place of each group's heads; elsewhere |x|."""
    terms = x.double().abs()
    for group in groups:
        own = positions if group.positions is None else group.positions
        extras = {"q_bias": group.bias, "q_scale": group.scale}
        extras |= angles if group.rope is not None else {}
        term, _ = reference.criterion_terms(
            group.view(x), None, group.weight, None, own, group.spec, **extras
        )
        group.view(terms).copy_(term)
    return terms


@DTYPES
@pytest.mark.parametrize("name", ["gated", "mlp", "thirds", "indexer"])
def test_groups(backend: str, name: str, dtype: torch.dtype) -> None:
    """The groups by the criterion; not a bit of the other columns, nor of the row's gaps."""
    width, groups = layouts(dtype)[name]
    there = [on(group, backend) for group in groups]
    before = draw(2, 9, width + 5, seed=6, dtype=dtype)
    positions = torch.arange(18).view(2, 9) * 7919
    for angles in ({}, {"rotate_from": 2, "rotate_to": 8}):
        buffer = before.to(backend, copy=True)
        given, x = before[..., 2:-3], buffer[..., 2:-3]
        assert qkrope.norm_rope_groups_(x, there, positions.to(backend), **angles) is None
        buffer = buffer.cpu()
        ref = reference.norm_rope_groups(given, groups, positions, **angles)
        terms = exact(given, groups, positions, **angles)
        assert_criterion(buffer[..., 2:-3], ref, terms, dtype)
        changed = bits(buffer) != bits(before)
        for group in groups:
            assert bool(group.view(changed[..., 2:-3]).any())
            group.view(changed[..., 2:-3]).zero_()
        assert not bool(changed.any())


def test_angles_are_of_the_groups_that_turn(isa: str) -> None:
    """A table for those; a group without a rotation takes no offence at it."""
    width, groups = layouts(BF16)["mlp"]
    x = draw(4, width, seed=7)
    before, table = x.clone(), (draw(4, 12, seed=8, dtype=FP32), draw(4, 12, seed=9, dtype=FP32))
    qkrope.norm_rope_groups_(x, groups, None, cos_sin=table)
    ref = reference.norm_rope_groups(before, groups, None, cos_sin=table)
    assert_criterion(x, ref, exact(before, groups, None, cos_sin=table), BF16)


def test_no_groups_and_no_tokens() -> None:
    x = draw(3, 8)
    before = x.clone()
    qkrope.norm_rope_groups_(x, [], None)
    assert torch.equal(x, before)
    qkrope.norm_rope_groups_(draw(0, 8), [Group(0, 2, 4)], None)


GOOD = Group(0, 2, 8, Norm(), Rope(dim=4))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": None}, TypeError, "x: expected a torch tensor, got NoneType"),
        ({"x": draw()}, ValueError, "x: expected at least 1 dimension, got 0"),
        ({"x": draw(3, 64)[:, ::2]}, ValueError, "x: expected stride 1 in the last dimension"),
        ({"x": draw(3, 32).double()}, TypeError, "x: expected float32, bfloat16 or float16"),
        ({"x": draw(32).expand(3, 32)}, ValueError, "x: elements share memory"),
        ({"x": draw(3, 32).requires_grad_()}, ValueError, "x: expected a tensor without requires"),
        ({"groups": GOOD}, TypeError, "groups: expected a list or tuple of Group, got Group"),
        ({"groups": [GOOD, GOOD]}, ValueError, r"groups\[1\]: expected no column of groups\[0\]"),
        ({"positions": None}, ValueError, "positions: expected an int32 or int64 tensor, got None"),
        ({"theta": 2.0}, TypeError, "theta: expected a keyword among cos_sin, .*, got this one"),
        ({"weight": draw(4)}, ValueError, r"groups\[1\].weight: expected shape \[8\] or \[1, 8\]"),
        ({"bias": draw(4)}, ValueError, r"groups\[1\].bias: expected shape \[8\] or \[1, 8\]"),
        ({"scale": draw(4)}, ValueError, r"groups\[1\].scale: expected a shape that broadcasts"),
        ({"scale": "x"}, TypeError, r"groups\[1\].scale: expected a finite number, got 'x'"),
        (
            {"rope": Rope(dim=4), "positions": torch.arange(4)},
            ValueError,
            r"groups\[1\].positions: expected leading dimensions that broadcast to \[3\]",
        ),
    ],
    ids=str,
)
def test_a_wrong_group(change: dict[str, Any], error: type[Exception], text: str) -> None:
    """Nothing is written, to no group: the first one, without a fault, keeps its bits too."""
    args: dict[str, Any] = {"x": draw(3, 32), "groups": [GOOD], "positions": torch.arange(3)}
    if own := change.keys() & {"weight", "bias", "scale", "rope"}:
        args["groups"] = [GOOD, replace(Group(24, 1, 8), **change)]
    args |= {} if own else change
    before = args["x"].detach().clone() if isinstance(args["x"], Tensor) else None
    with pytest.raises(error, match=f"^{text}"):
        qkrope.norm_rope_groups_(**args)
    if before is not None:
        assert torch.equal(args["x"], before)
