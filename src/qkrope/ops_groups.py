"""``norm_rope_groups_``: heads of several kinds inside one packed tensor, each by its own Spec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .extras import Angles, Tensor
from .groups import Group, check_groups
from .ops import CHECK_ONLY, _plain, _prepare, _run, qk_norm_rope_

__all__ = ["norm_rope_groups_"]

# What an error of a group's call names, and whose it is.
_OWN = {"q_weight": "weight", "q_bias": "bias", "q_scale": "scale"}


def norm_rope_groups_(
    x: Tensor,
    groups: Sequence[Group],
    positions: Tensor | None,
    **angles: Any,
) -> None:
    """Normalise and rotate, in place, each group of heads inside a packed tensor.

    x: ``[..., columns]``, last stride 1; what no group names is not touched. Each group is one
    native call on a view of x, without a copy: ``[q | gate]`` in each head, ``[q | k | v | mlp]``,
    ``[H, 3, D]``, indexer heads with weights of their own.
    groups: a list or tuple of `qkrope.Group`, none of which shares a column with another.
    positions: as in `qk_norm_rope`, for the groups that rotate and have none of their own.
    angles: cos_sin, cos_sin_cache, inv_freq, seq_len, rotate_from and rotate_to of `qk_norm_rope`,
    for the groups that rotate.

    Raises TypeError and ValueError naming group and argument, expected and got, before anything is
    written to any group.
    """
    if unknown := sorted(angles.keys() - Angles.__annotations__.keys()):
        known = ", ".join(Angles.__annotations__)
        raise TypeError(f"{unknown[0]}: expected a keyword among {known}, got this one")
    if torch.compiler.is_compiling():  # a node of the graph for each group
        for group in check_groups(x.shape[-1], groups):
            own = positions if group.positions is None else group.positions
            extras = {**(angles if group.rope is not None else {}), "q_bias": group.bias}
            rest = (group.weight, None, own, group.spec)
            qk_norm_rope_(group.view(x), None, *rest, **extras, q_scale=group.scale)
        return
    _plain("x", x)
    if not x.ndim:
        raise ValueError("x: expected at least 1 dimension, got 0")
    calls = []
    for n, group in enumerate(check_groups(x.shape[-1], groups)):
        own = positions if group.positions is None else group.positions
        extras = dict(angles) if group.rope is not None else {}
        extras |= {"q_bias": group.bias, "q_scale": group.scale}
        with _naming(n, group):
            plan, (flags, *operands) = _prepare(
                True, None, group.view(x), None, group.weight, None, own, group.spec, extras
            )
            _run(x.is_cuda, plan, flags | CHECK_ONLY, *operands)
        calls.append((plan, flags, operands))
    for plan, flags, operands in calls:
        _run(x.is_cuda, plan, flags, *operands)


@contextmanager
def _naming(n: int, group: Group) -> Iterator[None]:
    """Errors of a group's call in the words of the group's caller."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, text = str(error).partition(": ")
        if name in _OWN:
            name = f"groups[{n}].{_OWN[name]}"
        elif name == "positions" and group.positions is not None:
            name = f"groups[{n}].positions"
        elif name == "q":
            name = "x"
        elif name == "spec":
            name = f"groups[{n}]"
        raise type(error)(f"{name}{colon}{text}") from error
