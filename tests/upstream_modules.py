"""Running one attention module and turning what it did into calls of the catalogue."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkrope.grid import grid_positions
from qkrope.models import find
from upstream import Call, Seen, randomize, watched

DIFFUSERS, TRANSFORMERS = "diffusers.models.transformers.", "transformers.models."
HEADS, BATCH, TEXT = 2, 2, 3
GRID = (2, 3, 2)  # frames, height, width
IMAGE = 12
VIDEO = grid_positions(*GRID)  # [3, IMAGE]
D = 128
WIDTH = HEADS * D
QK, ADDED = ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")


@dataclass(frozen=True)
class Attention:
    """What the attention function got: [batch, tokens, heads, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


def load(path: str, package: str = DIFFUSERS) -> Any:
    """``file.Name`` below a package."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(package + module), name)


@contextmanager
def attention() -> Iterator[list[Attention]]:
    """Every call of scaled_dot_product_attention, through which all of diffusers' backends go."""
    original, calls = F.scaled_dot_product_attention, []

    def function(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
        calls.append(Attention(*(x.transpose(1, 2).clone() for x in (query, key, value))))
        kw.pop("enable_gqa", None)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        wide = (x.float() for x in (query, key, value))
        return original(*wide, scale=kw.get("scale")).to(value.dtype)

    F.scaled_dot_product_attention = function
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


class Run:
    """One call of one module in one dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, head_dim: int) -> None:
        self.module, self.dtype = module, dtype
        randomize(module, [module], head_dim)
        self.module.to(dtype).eval()
        self.generator = torch.Generator().manual_seed(5)
        self.seen, self.calls = Seen(module), []

    def normal(self, *shape: int) -> Tensor:
        """Random activations."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def __call__(self, *args: Any, **keywords: Any) -> None:
        """Run it and keep what it did."""
        with torch.no_grad(), watched([self.module]) as seen, attention() as calls:
            self.module(*args, **keywords)
        self.seen, self.calls = seen[self.module], calls

    def raw(self, name: str, heads: int, head_dim: int) -> Tensor:
        """What a norm was given, as [batch, tokens, heads, head_dim]."""
        x = self.seen.inputs[name]
        if x.shape[-1] == heads * head_dim and x.shape[-1] != head_dim:
            return x.unflatten(-1, (heads, head_dim))
        x = x if x.ndim == 4 else x.unsqueeze(0)
        return x if x.shape[-2] == heads else x.transpose(1, 2)


def call_of(
    run: Run,
    model: str,
    index: int,
    norms: Sequence[str | None],
    tokens: slice | Sequence[slice] = slice(None),
    *,
    heads: tuple[int, int] = (HEADS, HEADS),
    table: Any = None,
    positions: Tensor | None = None,
    source: int = 0,
    groups: int = 1,
    v_norm: str | None = None,
    extras: dict[str, Any] | None = None,
    raw: tuple[Tensor | None, Tensor | None] | None = None,
) -> Call:
    """Call ``index`` of a model's catalogue entry on what a run did, with few heads.

    ``norms`` are the names of q's and k's norm modules, None where a side is absent; ``tokens`` are
    the stream's tokens among those that attention call ``source`` got; ``table`` is upstream's.
    """
    own = find(model).calls[index]
    bits = run.dtype == torch.bfloat16
    spec = replace(
        own.spec,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        rounding=own.rounding if bits else "once",
    )
    slices = (tokens, tokens) if isinstance(tokens, slice) else tokens
    got = run.calls[source]
    sides: list[Any] = []
    results, keywords = [], dict(extras or {})
    for side, name, n, part in zip("qk", norms, heads, slices, strict=True):
        if name is None:
            sides.append((None, None))
            results.append(None)
            continue
        norm = getattr(run.module, name)
        x = run.raw(name, n, spec.head_dim) if raw is None else raw["qk".index(side)]
        sides.append((x, getattr(norm, "weight", None)))
        if side in own.bias:
            keywords[f"{side}_bias"] = norm.bias
        y = got.q if side == "q" else got.k[:, :, ::groups]
        results.append(y[:, part].to(run.dtype))
    if v_norm is not None:
        keywords["v"] = run.raw(v_norm, heads[1], spec.head_dim)
        results.append(got.v.to(run.dtype))
    (q, q_weight), (k, k_weight) = sides
    return Call(
        spec,
        q,
        k,
        q_weight,
        k_weight,
        positions,
        keywords,
        own_angles=positions is not None,
        table=table,
        got=tuple(results),
        once=own.rounding == "once",
    )


def pairs(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One value a pair of a table that repeats each."""
    cos, sin = table
    return cos[..., ::2], sin[..., ::2]


def first_half(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One value a pair of a table of two equal halves."""
    cos, sin = table
    n = cos.shape[-1] // 2
    return cos[..., :n], sin[..., :n]


def real(table: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of complex numbers."""
    return table.real, table.imag


def rows(table: tuple[Tensor, Tensor], part: slice) -> tuple[Tensor, Tensor]:
    """The tokens of one stream."""
    return table[0][part], table[1][part]


Adapter = Callable[[torch.dtype], list[Call]]
