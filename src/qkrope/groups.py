"""Groups of heads inside one packed tensor, each with a norm and a rotation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ._limits import MAX_COLUMNS, instance, integer, refuse
from .norm import Norm
from .rope import Rope
from .rounding import Rounding
from .spec import MAX_HEADS, Spec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Group", "check_groups"]


@dataclass(frozen=True, eq=False)
class Group:
    """``heads`` heads of a packed tensor: head h is columns
    ``[start + h * head_stride, start + h * head_stride + head_dim)``.

    ``head_stride=None`` is head_dim, heads without gaps. ``[q | gate]`` in each head has a stride
    of 2 * head_dim; ``[H, 3, D]`` is three groups of stride 3 * D. ``norm``, ``rope`` (None: no
    rotation), ``order``, ``rounding`` and ``max_position_embeddings`` are as in `Spec`; ``weight``
    and ``bias`` as ``q_weight``, ``scale`` as ``q_scale`` of `qkrope.qk_norm_rope`. ``positions``
    replace those of the call.
    """

    start: int
    heads: int
    head_dim: int
    norm: Norm = Norm()
    rope: Rope | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    head_stride: int | None = None
    positions: Tensor | None = None
    scale: Tensor | float | None = None
    order: str = "norm_first"
    rounding: Rounding = "once"
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "start", integer("Group.start", self.start, 0, MAX_COLUMNS))
        put(self, "heads", integer("Group.heads", self.heads, 1, MAX_HEADS))
        # The Spec checks what the group shares with it; this group is its Q.
        spec = Spec(
            num_q_heads=self.heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            norm=self.norm,
            rope=self.rope,
            order=self.order,
            rounding=self.rounding,
            max_position_embeddings=self.max_position_embeddings,
        )
        put(self, "_spec", spec)
        put(self, "head_dim", spec.head_dim)
        if self.head_stride is not None:
            stride = integer("Group.head_stride", self.head_stride, spec.head_dim, MAX_COLUMNS)
            put(self, "head_stride", stride)

    @property
    def spec(self) -> Spec:
        """The Spec whose Q this group is."""
        spec: Spec = self.__dict__["_spec"]
        return spec

    @property
    def stride(self) -> int:
        """Columns from one head to the next."""
        return self.head_dim if self.head_stride is None else self.head_stride

    @property
    def stop(self) -> int:
        """The column after the last one of this group."""
        return self.start + (self.heads - 1) * self.stride + self.head_dim

    def view(self, x: Tensor) -> Tensor:
        """This group's heads of a packed tensor: a view ``[..., heads, head_dim]``."""
        return x[..., self.start : self.stop].unfold(-1, self.head_dim, self.stride)


def check_groups(width: int, groups: Any) -> Sequence[Group]:
    """The groups, none of which leaves a row of ``width`` columns or shares one with another."""
    if not isinstance(groups, list | tuple):
        refuse(TypeError, "groups", "a list or tuple of Group", groups)
    for n, group in enumerate(groups):
        instance(f"groups[{n}]", group, Group)
    _check_columns(width, tuple((g.start, g.heads, g.head_dim, g.stride) for g in groups))
    return groups


@lru_cache(maxsize=1024)
def _check_columns(width: int, layouts: tuple[tuple[int, int, int, int], ...]) -> None:
    heads = sorted(
        (start + head * stride, start + head * stride + head_dim, n)
        for n, (start, count, head_dim, stride) in enumerate(layouts)
        for head in range(count)
    )
    if heads and heads[-1][1] > width:
        n, stop = heads[-1][2], heads[-1][1]
        refuse(ValueError, f"groups[{n}]", f"columns within the {width} of x", stop)
    for (_, stop, other), (start, _, n) in pairwise(heads):
        if start < stop:
            refuse(ValueError, f"groups[{n}]", f"no column of groups[{other}]", start)
