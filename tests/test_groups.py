"""Groups of heads in one packed row, and positions of grids."""

from __future__ import annotations

import pytest
import torch

from cases import assert_same_bits
from qkrope import reference
from qkrope.grid import grid_positions
from qkrope.groups import Group
from qkrope.spec import Norm, Rope, Spec
from small import BF16, FP64, NK, NQ, B, D, S, counts, draw, spec


def test_groups_are_the_heads_of_a_packed_row() -> None:
    """[q | gate] in each head, k, then an indexer head with a norm and positions of its own."""
    width = NQ * 2 * D + NK * D + 8 + 3
    x, positions = draw(B, S, width, dtype=torch.float32), counts()
    w, u, i = (draw(n, dtype=torch.float32, seed=n) for n in (D, D, 8))
    bias = draw(8, dtype=torch.float32, seed=4)
    rope, small = Rope(dim=8), Rope(dim=4, offset=4, pairing="interleaved")
    groups = [
        Group(0, NQ, D, Norm(), rope, w, head_stride=2 * D),
        Group(NQ * 2 * D, NK, D, Norm(), None, u, scale=0.5),
        Group(width - 11, 1, 8, Norm("layer"), small, i, bias, positions=positions + 1),
    ]
    y = reference.norm_rope_groups(x, groups, positions)
    assert y.shape == x.shape and y.dtype == FP64
    q = x[..., : NQ * 2 * D].unflatten(-1, (NQ, 2 * D))[..., :D]
    k = x[..., NQ * 2 * D : -11].unflatten(-1, (NK, D))
    q2, k2 = (
        reference.qk_norm_rope(q, None, w, None, positions, spec(rope))[0],
        reference.qk_norm_rope(None, k, None, u, None, spec(), k_scale=0.5)[1],
    )
    index = Spec(1, 1, 8, Norm("layer"), rope=small)
    i2, _ = reference.qk_norm_rope(
        x[..., -11:-3, None].mT, None, i, None, positions + 1, index, q_bias=bias
    )
    got_q, gate = y[..., : NQ * 2 * D].unflatten(-1, (NQ, 2 * D)).split(D, -1)
    assert torch.equal(got_q, q2)
    assert torch.equal(gate, x[..., : NQ * 2 * D].unflatten(-1, (NQ, 2 * D))[..., D:].double())
    assert torch.equal(y[..., NQ * 2 * D : -11], k2.flatten(-2))
    assert torch.equal(y[..., -11:-3], i2.flatten(-2))
    assert torch.equal(y[..., -3:], x[..., -3:].double())
    once = reference.norm_rope_groups(x, groups, positions, round_to=BF16)
    assert_same_bits(once, reference.round_once(y, BF16))


def test_a_group_of_the_thirds_of_each_head_is_a_view() -> None:
    x = draw(S, NQ * 3 * D)
    for third in range(3):
        view = Group(third * D, NQ, D, head_stride=3 * D).view(x)
        assert torch.equal(view, x.view(S, NQ, 3, D)[:, :, third])
        assert view.data_ptr() == x.data_ptr() + third * D * x.element_size()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"start": -2}, ValueError, "Group.start"),
        ({"heads": 0}, ValueError, "Group.heads"),
        ({"head_dim": 7}, ValueError, "head_dim"),
        ({"head_stride": 4}, ValueError, "Group.head_stride"),
        ({"norm": "rms"}, TypeError, "norm"),
        ({"rope": Rope(dim=16)}, ValueError, "Rope.dim"),
        ({"start": 60}, ValueError, r"groups\[1\]: expected columns within the 64 of x, got 68"),
        ({"start": 30}, ValueError, r"groups\[1\]: expected no column of groups\[0\], got 30"),
    ],
)
def test_a_group_refuses(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        group = Group(**{"start": 40, "heads": 1, "head_dim": 8, **change})
        reference.norm_rope_groups(draw(S, 64), [Group(0, 4, 8), group], None)
    with pytest.raises(TypeError, match="groups"):
        reference.norm_rope_groups(draw(S, 64), Group(0, 4, 8), None)


def test_a_grid_counts_frames_then_rows_then_columns() -> None:
    grid = grid_positions(2, 3, 4, start=(5, -1, 0), text=2)
    assert grid.shape == (3, 2 + 24) and grid.dtype == torch.int64
    assert grid[:, :2].eq(0).all()
    for f, h, w in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        assert grid[:, 2 + (f * 3 + h) * 4 + w].tolist() == [5 + f, h - 1, w]
    flat = grid_positions(None, 2, 2, text=3, text_counts=True, start=3)
    assert flat.tolist() == [[0, 1, 2, 3, 3, 4, 4], [0, 1, 2, 3, 4, 3, 4]]
    for wrong, error in (
        ({"frames": 0}, ValueError),
        ({"height": 1.0}, TypeError),
        ({"text": -1}, ValueError),
        ({"start": (1, 2)}, ValueError),
        ({"text_counts": 1}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(wrong))):
            grid_positions(**{"frames": 1, "height": 2, "width": 2, **wrong})
