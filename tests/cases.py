"""The data recipe and the acceptance check of every test that runs the op.

What the recipe insists on, because a test without it passes broken kernels: random distinct q and k
weights, rotary dim below head_dim, rows so small that eps decides, strided views of larger buffers,
q heads != kv heads, positions across the whole range, and guard bytes around every buffer.
Options draw after the rest: q's and k's weights, biases, scales and tables are all distinct, and so
are those of any two heads and axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from buffers import LAYOUTS, Guarded, Shape, bits, guarded
from checks import (
    assert_chain,
    assert_criterion,
    assert_same_bits,
    fraction_correctly_rounded,
    round_once,
    ulp,
)
from qkrope import reference
from qkrope.spec import Norm, Spec

__all__ = [
    "ANGLES",
    "LAYOUTS",
    "POSITIONS",
    "Call",
    "Guarded",
    "Recipe",
    "Shape",
    "assert_chain",
    "assert_criterion",
    "assert_same_bits",
    "bits",
    "fraction_correctly_rounded",
    "guarded",
    "round_once",
    "ulp",
]

POSITIONS = (0, 1, 40, 4095, 2**15, 131071, 2**20, 2**24 + 1, 2**31 - 1, -1, -(2**31))

# A row's size. 1e-3 makes the mean square equal eps, so a wrong eps shows.
ROW_SCALES = (1.0, 1e-3, 30.0, 0.05)


# ---- calls ------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call's tensors, and what the oracle says about them."""

    spec: Spec
    buffers: list[Guarded]
    q: Tensor | None
    k: Tensor | None
    qkv: Tensor | None  # the packed tensor that q and k (and v) are views of, if they are
    q_weight: Tensor | None
    k_weight: Tensor | None
    positions: Any
    extras: dict[str, Any]  # with "v" and "v_weight" where the call normalises v

    def __post_init__(self) -> None:
        self.inputs = tuple(
            None if x is None else x.detach().cpu().clone() for x in (self.q, self.k)
        )
        v = self.extras.get("v")
        self.v_input = None if v is None else v.detach().cpu().clone()
        self.outside = [buffer.outside() for buffer in self.buffers]
        self.others = [bits(t).clone() for t in _tensors(self.rest(), self.packed_extras())]

    def rest(self) -> tuple[Any, ...]:
        """The positional arguments after q and k."""
        return self.q_weight, self.k_weight, self.positions, self.spec

    def args(self) -> tuple[Any, ...]:
        """The positional arguments of `qk_norm_rope` and `qk_norm_rope_`."""
        return (self.q, self.k, *self.rest())

    def packed_extras(self) -> dict[str, Any]:
        """The keywords of `qkv_norm_rope_`, whose v is in qkv."""
        return {name: value for name, value in self.extras.items() if name != "v"}

    def oracle_args(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `reference.qk_norm_rope`, with the inputs before the call."""
        extras = _to_cpu(self.packed_extras())
        if self.v_input is not None:
            extras["v"] = self.v_input
        return (*self.inputs, *_to_cpu(self.rest())), extras

    def expected(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Exact (q, k) or (q, k, v) in float64 and their criterion terms; a chain in its dtype."""
        args, extras = self.oracle_args()
        return reference.qk_norm_rope(*args, **extras), reference.criterion_terms(*args, **extras)

    def check(self, *outputs: Tensor | None) -> None:
        """Each output meets the criterion, and >= 99.9 % of bfloat16 ones are correctly rounded.

        With another rounding than "once" it is the chain of casts (`assert_chain`); in float32 a
        chain is one more float32 evaluation, so there the criterion holds as well.
        """
        refs, terms = self.expected()
        if self.spec.rounding != "once":
            args, extras = self.oracle_args()
            once = replace(self.spec, rounding="once")
            exact = reference.qk_norm_rope(*args[:-1], once, **extras)
        norms = (self.spec.q_norm, self.spec.k_norm_resolved, self.spec.v_norm)
        chains = (*self.spec.roundings, self.spec.roundings[1])
        for i, (y, ref, term) in enumerate(zip(outputs, refs, terms, strict=True)):
            name, norm, chain = "qkv"[i], norms[i], chains[i]
            if ref is None or term is None:
                assert y is None, f"{name}: expected None"
                continue
            assert y is not None
            y = y.detach().cpu()
            if chain is not None and y.dtype != torch.float32:
                table = "cos_sin" in self.extras or "cos_sin_cache" in self.extras
                assert_chain(y, ref, term, table, name)
                continue
            ref = ref if chain is None else exact[i]
            assert_criterion(y, ref, term, y.dtype, name)
            # Only where 0.1 % is several elements, and values are as good as random: without a norm
            # x times an attention factor of 1.25 is a tie, which the last bit of cos decides, and
            # x times a scale of 13 / 5 one that the last bit of the scale does.
            normed = all(p.norm.kind != "none" for p in norm.parts(self.spec.head_dim))
            if y.dtype == torch.bfloat16 and y.numel() >= 4000 and normed:
                share = fraction_correctly_rounded(y, ref)
                assert share >= 0.999, f"{name}: only {share:.4%} correctly rounded"

    def assert_guards(self) -> None:
        """No byte but q and k (and a normalised v) changed; in a packed tensor all of v counts."""
        for buffer, before in zip(self.buffers, self.outside, strict=True):
            assert torch.equal(buffer.outside(), before), "bytes outside the tensors changed"
        now = _tensors(self.rest(), self.packed_extras())
        for t, before in zip(now, self.others, strict=True):
            assert torch.equal(bits(t), before), "a weight, position or table changed"

    def assert_inputs_unchanged(self) -> None:
        self.assert_guards()
        inputs = (*self.inputs, self.v_input)
        for x, before in zip((self.q, self.k, self.extras.get("v")), inputs, strict=True):
            if x is not None and before is not None:
                assert_same_bits(x.cpu(), before, "input")


def _tensors(*values: Any) -> list[Tensor]:
    """Every tensor in tuples and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | dict):
            found += _tensors(*(value.values() if isinstance(value, dict) else value))
    return found


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, tuple):
        return tuple(_to_cpu(item) for item in value)
    if isinstance(value, dict):
        return {name: _to_cpu(item) for name, item in value.items()}
    return value


ANGLES = ("spec", "pair", "channel", "complex", "cache", "inv_freq32", "inv_freq64")


@dataclass(frozen=True)
class Recipe:
    """What a Call is made of; the same Recipe makes the same bits on every device."""

    spec: Spec
    dtype: torch.dtype = torch.bfloat16
    lead: Shape = (7,)
    layout: str = "contiguous"  # one of LAYOUTS, or "packed"
    weight_dtype: torch.dtype | None = None  # None: dtype
    weights: str = "both"  # or "q", "k", "-"
    sides: str = "both"  # or "q", "k"
    k_lead: Shape | None = None  # k's own leading dimensions, and so its own positions
    position_shape: str = "full"  # lead; "last": [S]; "one": [1, S]
    position_dtype: torch.dtype = torch.int64
    angle: str = "spec"  # one of ANGLES
    table_dtype: torch.dtype = torch.float32
    other_heads: int = 2  # of the packed tensor, after q and k (and a normalised v)
    seed: int = 0
    weight_shape: str = "channel"  # [D]; "head": [heads, D]; "row": [heads * D]
    bias: bool = False
    scale: str | None = None  # "number", or a tensor: "token", "head", "channel"
    tables: str = "shared"  # "separate": one for q and one for k; "head": and one for each head
    rotate: tuple[int, int | None] | None = None  # rotate_from, rotate_to

    def make(self, device: str = "cpu") -> Call:
        """Draw the tensors on the CPU and put them where the layout says, on ``device``."""
        spec, draw = self.spec, torch.Generator().manual_seed(self.seed)
        k_lead = self.lead if self.k_lead is None else self.k_lead
        q_data = self._rows(self.lead, spec.num_q_heads, draw)
        k_data = self._rows(k_lead, spec.num_kv_heads, draw)
        weights = [self._weight(side, draw) for side in "qk"]
        qkv = v = None
        if self.layout == "packed":
            ends = [spec.num_q_heads, spec.num_q_heads + spec.num_kv_heads]
            others = self.other_heads if spec.v_norm is None else spec.num_kv_heads
            buffer, whole = guarded(
                self.lead, ends[1] + others, spec.head_dim, "contiguous", self.dtype, device
            )
            qkv = whole.flatten(-2)
            buffer.fill(whole, torch.randn(whole.shape, generator=draw))
            buffers = [buffer]
            q, k, v = (t for t in whole.tensor_split(ends, dim=-2))
            buffer.views = [q, k] if spec.v_norm is None else [q, k, v]
        else:
            q_buffer, q = guarded(*_dims(q_data), self.layout, self.dtype, device)
            k_buffer, k = guarded(*_dims(k_data), self.layout, self.dtype, device)
            buffers = [q_buffer, k_buffer]
        buffers[0].fill(q, q_data)
        buffers[-1].fill(k, k_data)
        positions, extras = self._angle(k_lead, draw)
        self._options(k_lead, extras, draw)
        extras = _to(extras, device)
        if spec.v_norm is not None:
            v_data = self._rows(k_lead, spec.num_kv_heads, draw)
            if v is None:
                v_buffer, v = guarded(*_dims(v_data), self.layout, self.dtype, device)
                buffers.append(v_buffer)
            buffers[-1].fill(v, v_data)
            extras["v"] = v
        return Call(
            spec,
            buffers,
            q if self.sides in ("both", "q") else None,
            k if self.sides in ("both", "k") else None,
            qkv,
            *(None if w is None else w.to(device) for w in self._choose(weights)),
            _to(positions, device),
            extras,
        )

    def but(self, **changes: Any) -> Recipe:
        return replace(self, **changes)

    def _heads(self, side: str) -> int:
        return self.spec.num_q_heads if side == "q" else self.spec.num_kv_heads

    def _norm(self, side: str) -> Norm | None:
        return {"q": self.spec.q_norm, "k": self.spec.k_norm_resolved, "v": self.spec.v_norm}[side]

    def _rows(self, lead: Shape, heads: int, draw: torch.Generator) -> Tensor:
        x = torch.randn(*lead, heads, self.spec.head_dim, generator=draw)
        row = torch.arange(x.numel() // self.spec.head_dim).view(*lead, heads, 1)
        return x * torch.tensor(ROW_SCALES)[(row + self.seed) % len(ROW_SCALES)]

    def _per_channel(self, side: str, draw: torch.Generator) -> Tensor:
        """Random values in the shape of a weight or bias of this recipe."""
        norm, heads = self._norm(side), self._heads(side)
        assert norm is not None
        width = norm.weight_dim(self.spec.head_dim)
        shape = {"channel": (width,), "head": (heads, width), "row": (heads * width,)}
        return torch.randn(shape[self.weight_shape], generator=draw)

    def _weight(self, side: str, draw: torch.Generator) -> Tensor | None:
        w, norm = self._per_channel(side, draw), self._norm(side)
        if norm is None or norm.kind == "none":
            return None
        return ((0.3 if norm.weight_offset else 1.0) * w).to(self.weight_dtype or self.dtype)

    def _choose(self, weights: list[Tensor | None]) -> list[Tensor | None]:
        given = "qk" if self.weights == "both" else self.weights
        return [w if side in given else None for side, w in zip("qk", weights, strict=True)]

    def _options(self, k_lead: Shape, extras: dict[str, Any], draw: torch.Generator) -> None:
        """The keywords beside the angles."""
        for side, lead in (("q", self.lead), ("k", k_lead)):
            norm, heads, dim = self._norm(side), self._heads(side), self.spec.head_dim
            if self.bias and norm is not None and norm.kind != "none":
                bias = self._per_channel(side, draw)
                extras[f"{side}_bias"] = bias.to(self.weight_dtype or self.dtype)
            if self.scale == "number":
                extras[f"{side}_scale"] = {"q": 0.37, "k": -2.6}[side]
            elif self.scale is not None:
                shape = {"token": (*lead, 1, 1), "head": (heads, 1), "channel": (dim,)}[self.scale]
                extras[f"{side}_scale"] = torch.randn(shape, generator=draw)
        if (norm := self._norm("v")) is not None and norm.kind != "none" and self.weights != "-":
            extras["v_weight"] = self._weight("v", draw)
        if self.rotate is not None:
            extras["rotate_from"], extras["rotate_to"] = self.rotate

    def _angle(self, k_lead: Shape, draw: torch.Generator) -> tuple[Any, dict[str, Any]]:
        spec = self.spec
        if spec.rope is None:
            return None, {}
        pairs = spec.rotary_dim // 2
        if self.angle in ("pair", "channel", "complex"):
            table = self._caller_table("q", self.lead, draw)
            if self.tables != "shared":
                table = table, self._caller_table("k", k_lead, draw)
            return None, {"cos_sin": table}
        rows = 50 if self.angle == "cache" else None
        positions = self._positions(self.lead, draw, rows)
        if self.k_lead is not None:
            positions = (positions, self._positions(k_lead, draw, rows))
        if rows is not None:
            return positions, {"cos_sin_cache": torch.cat(self._table((rows, pairs), draw), -1)}
        if self.angle == "spec":
            return positions, {}
        dtype = torch.float64 if self.angle == "inv_freq64" else torch.float32
        frequencies = 10.0 ** (-4 * torch.rand(pairs, generator=draw, dtype=torch.float64))
        return positions, {"inv_freq": frequencies.to(dtype)}

    def _caller_table(self, side: str, lead: Shape, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotated tokens, where asked with a row for each head."""
        if self.rotate is not None:
            lead = (*lead[:-1], len(range(lead[-1])[slice(*self.rotate)]))
        shape = self._shape(lead) + ((self._heads(side),) if self.tables == "head" else ())
        width = self.spec.rotary_dim // (1 if self.angle == "channel" else 2)
        table = self._table((*shape, width), draw)
        if self.angle != "complex":
            return table
        both = torch.stack(table, -1)  # side by side, as torch.view_as_real has them
        return both[..., 0], both[..., 1]

    def _table(self, shape: Shape, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cosines and sines of random angles, of a length that is not 1."""
        turn = 6.3 * torch.rand(shape, generator=draw)
        return (1.25 * turn.cos()).to(self.table_dtype), (1.25 * turn.sin()).to(self.table_dtype)

    def _shape(self, lead: Shape) -> Shape:
        return {"full": lead, "last": lead[-1:], "one": (1, *lead[-1:])}[self.position_shape]

    def _positions(self, lead: Shape, draw: torch.Generator, rows: int | None) -> Tensor:
        """[lead], or [A, lead] with another order of the positions on each axis."""
        axes = self.spec.position_axes
        shape = (*([axes] if axes else []), *self._shape(lead))
        if rows is not None:
            return torch.randint(rows, shape, generator=draw).to(self.position_dtype)
        count = torch.Size(self._shape(lead)).numel()
        which = torch.arange(count) + self.seed + 3 * torch.arange(axes or 1)[:, None]
        which = which % len(POSITIONS)
        return torch.tensor(POSITIONS)[which].view(shape).to(self.position_dtype)


def _dims(x: Tensor) -> tuple[Shape, int, int]:
    return tuple(x.shape[:-2]), x.shape[-2], x.shape[-1]


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        if device == "cpu":
            return value
        if value.is_contiguous():
            return value.to(device)
        base = value._base if value._base is not None else value
        return base.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return value
