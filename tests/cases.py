"""The data recipe and the acceptance check of every test that runs the op.

What the recipe insists on, because a test without it passes broken kernels: random distinct q and k
weights, rotary dim below head_dim, rows so small that eps decides, strided views of larger buffers,
q heads != kv heads, positions across the whole range, and guard bytes around every buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkrope import reference
from qkrope.accuracy import error_over_bound, round_once, ulp
from qkrope.spec import Norm, Spec

__all__ = [
    "ANGLES",
    "LAYOUTS",
    "POSITIONS",
    "Call",
    "Guarded",
    "Recipe",
    "assert_criterion",
    "assert_same_bits",
    "bits",
    "fraction_correctly_rounded",
    "round_once",
    "ulp",
]

POSITIONS = (0, 1, 40, 4095, 2**15, 131071, 2**20, 2**24 + 1, 2**31 - 1, -1, -(2**31))

# A row's size. 1e-3 makes the mean square equal eps, so a wrong eps shows.
ROW_SCALES = (1.0, 1e-3, 30.0, 0.05)

_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- checks -----------------------------------------------------------------------------------


def assert_criterion(
    y: Tensor, ref: Tensor, terms: Tensor, dtype: torch.dtype, what: str = "y"
) -> None:
    """Every element is within qkrope.accuracy's bound; NaN and infinity are where ref has them."""
    ratio = error_over_bound(y, ref, terms, dtype)
    if ratio.numel() == 0 or bool((ratio <= 1).all()):
        return
    flat = int(torch.where(ratio.isnan(), torch.inf, ratio).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
    raise AssertionError(
        f"{what}{list(at)} = {float(y[at])!r}, exact {float(ref[at])!r}: "
        f"{float(ratio[at]):.4g} times the bound; {int((ratio > 1).sum())} of {ratio.numel()} "
        f"elements exceed it"
    )


def fraction_correctly_rounded(y: Tensor, ref: Tensor) -> float:
    """Share of the elements of y that are ref rounded once to y's dtype."""
    best = round_once(ref, y.dtype)
    return float(((y == best) | (y.isnan() & best.isnan())).double().mean()) if y.numel() else 1.0


def bits(x: Tensor) -> Tensor:
    """The same memory read as integers, so that -0 != 0 and NaN == NaN."""
    return x.detach().contiguous().view(_INT[x.element_size()])


def assert_same_bits(a: Tensor, b: Tensor, what: str = "y") -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    unequal = bits(a) != bits(b)
    assert not bool(unequal.any()), f"{what}: {int(unequal.sum())} of {a.numel()} differ in bits"


# ---- buffers ----------------------------------------------------------------------------------

Shape = tuple[int, ...]
_CANARY = -77.0


class Guarded:
    """Tensors inside one larger buffer of canaries, to show that nothing else is written."""

    def __init__(self, size: int, dtype: torch.dtype, device: str) -> None:
        self.storage = torch.full((size + 64,), _CANARY, dtype=dtype, device=device)
        self.views: list[Tensor] = []

    def place(self, shape: Shape, strides: Shape, offset: int) -> Tensor:
        view = self.storage.as_strided(shape, strides, offset)
        self.views.append(view)
        return view

    def fill(self, view: Tensor, data: Tensor) -> None:
        """Write data to one of the views, in one copy of the whole buffer from the host.

        A strided copy on the device would be a kernel of torch's, whose writes compute-sanitizer's
        initcheck does not see where it is limited to our kernels.
        """
        host = self.storage.cpu()
        host.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(data)
        self.storage.copy_(host)

    def outside(self) -> Tensor:
        """Bits of the buffer with the tensors blanked out."""
        copy = self.storage.clone()
        for view in self.views:
            copy.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
        return bits(copy)


def packed_strides(shape: Shape) -> Shape:
    """Strides of a contiguous tensor."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides))


def _rows(lead: Shape, row: int) -> Shape:
    """Strides of leading dimensions over rows of so many elements."""
    return tuple(s * row for s in packed_strides((*lead, 1))[:-1])


def _contiguous(lead: Shape, heads: int, dim: int) -> tuple[Shape, int]:
    return (*_rows(lead, heads * dim), dim, 1), 64


def _odd(lead: Shape, heads: int, dim: int) -> tuple[Shape, int]:
    """A base address that is aligned to one element only."""
    return (*_rows(lead, heads * dim), dim, 1), 65


def _padded(lead: Shape, heads: int, dim: int) -> tuple[Shape, int]:
    """Rows one element longer than their data: every token has another alignment."""
    return (*_rows(lead, heads * dim + 1), dim, 1), 64


def _gated(lead: Shape, heads: int, dim: int) -> tuple[Shape, int]:
    """[q | gate] in each head, as Qwen3-Next packs it."""
    return (*_rows(lead, 2 * heads * dim), 2 * dim, 1), 64


def _transposed(lead: Shape, heads: int, dim: int) -> tuple[Shape, int]:
    """[B, H, S, D] memory seen as [B, S, H, D]."""
    return (*_rows(lead[:-1], heads * lead[-1] * dim), dim, lead[-1] * dim, 1), 64


def _permuted(lead: Shape, heads: int, dim: int) -> tuple[Shape, int]:
    """Leading dimensions in memory in reverse order, as a sequence-first model has them."""
    return (*reversed(_rows(tuple(reversed(lead)), heads * dim)), dim, 1), 64


LAYOUTS: dict[str, Callable[[Shape, int, int], tuple[Shape, int]]] = {
    "contiguous": _contiguous,
    "odd": _odd,
    "padded": _padded,
    "gated": _gated,
    "transposed": _transposed,
    "permuted": _permuted,
}


def guarded(
    lead: Shape, heads: int, dim: int, layout: str, dtype: torch.dtype, device: str
) -> tuple[Guarded, Tensor]:
    """A canary-guarded [*lead, heads, dim] tensor in one of the LAYOUTS."""
    strides, offset = LAYOUTS[layout](lead, heads, dim)
    shape = (*lead, heads, dim)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if 0 not in shape)
    buffer = Guarded(offset + last + 1, dtype, device)
    return buffer, buffer.place(shape, strides, offset)


# ---- calls ------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call's tensors, and what the oracle says about them."""

    spec: Spec
    buffers: list[Guarded]
    q: Tensor | None
    k: Tensor | None
    qkv: Tensor | None  # the packed tensor that q and k are views of, if they are
    q_weight: Tensor | None
    k_weight: Tensor | None
    positions: Any
    extras: dict[str, Any]

    def __post_init__(self) -> None:
        self.inputs = tuple(
            None if x is None else x.detach().cpu().clone() for x in (self.q, self.k)
        )
        self.outside = [buffer.outside() for buffer in self.buffers]
        self.others = [bits(t).clone() for t in _tensors(self.rest(), self.extras)]

    def rest(self) -> tuple[Any, ...]:
        """The positional arguments after q and k."""
        return self.q_weight, self.k_weight, self.positions, self.spec

    def args(self) -> tuple[Any, ...]:
        """The positional arguments of `qk_norm_rope` and `qk_norm_rope_`."""
        return (self.q, self.k, *self.rest())

    def expected(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Exact (q, k) in float64 and their criterion terms, from the inputs before the call."""
        args = (*self.inputs, *_to_cpu(self.rest()))
        extras = _to_cpu(self.extras)
        return reference.qk_norm_rope(*args, **extras), reference.criterion_terms(*args, **extras)

    def check(self, q2: Tensor | None, k2: Tensor | None) -> None:
        """Both outputs meet the criterion, and >= 99.9 % of bfloat16 ones are correctly rounded."""
        refs, terms = self.expected()
        norms = (self.spec.q_norm, self.spec.k_norm_resolved)
        for name, y, ref, term, norm in zip("qk", (q2, k2), refs, terms, norms, strict=True):
            if ref is None or term is None:
                assert y is None, f"{name}: expected None"
                continue
            assert y is not None
            y = y.detach().cpu()
            assert_criterion(y, ref, term, y.dtype, name)
            # Only where 0.1 % is several elements, and values are as good as random: without a norm
            # x times an attention factor of 1.25 is a tie, which the last bit of cos decides.
            if y.dtype == torch.bfloat16 and y.numel() >= 4000 and norm.kind != "none":
                share = fraction_correctly_rounded(y, ref)
                assert share >= 0.999, f"{name}: only {share:.4%} correctly rounded"

    def assert_guards(self) -> None:
        """No byte but q and k changed; in a packed tensor that includes all of v."""
        for buffer, before in zip(self.buffers, self.outside, strict=True):
            assert torch.equal(buffer.outside(), before), "bytes outside the tensors changed"
        for t, before in zip(_tensors(self.rest(), self.extras), self.others, strict=True):
            assert torch.equal(bits(t), before), "a weight, position or table changed"

    def assert_inputs_unchanged(self) -> None:
        self.assert_guards()
        for x, before in zip((self.q, self.k), self.inputs, strict=True):
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
    other_heads: int = 2  # of the packed tensor, after q and k
    seed: int = 0

    def make(self, device: str = "cpu") -> Call:
        """Draw the tensors on the CPU and put them where the layout says, on ``device``."""
        spec, draw = self.spec, torch.Generator().manual_seed(self.seed)
        k_lead = self.lead if self.k_lead is None else self.k_lead
        q_data = self._rows(self.lead, spec.num_q_heads, draw)
        k_data = self._rows(k_lead, spec.num_kv_heads, draw)
        weights = [self._weight(norm, draw) for norm in (spec.q_norm, spec.k_norm_resolved)]
        qkv = None
        if self.layout == "packed":
            heads = spec.num_q_heads + spec.num_kv_heads + self.other_heads
            buffer, whole = guarded(
                self.lead, heads, spec.head_dim, "contiguous", self.dtype, device
            )
            qkv = whole.flatten(-2)
            buffer.fill(whole, torch.randn(whole.shape, generator=draw))
            buffers, ends = [buffer], (spec.num_q_heads, spec.num_q_heads + spec.num_kv_heads)
            q, k = whole[..., : ends[0], :], whole[..., ends[0] : ends[1], :]
            buffer.views = [q, k]
        else:
            q_buffer, q = guarded(*_dims(q_data), self.layout, self.dtype, device)
            k_buffer, k = guarded(*_dims(k_data), self.layout, self.dtype, device)
            buffers = [q_buffer, k_buffer]
        buffers[0].fill(q, q_data)
        buffers[-1].fill(k, k_data)
        positions, extras = self._angle(k_lead, draw)
        return Call(
            spec,
            buffers,
            q if self.sides in ("both", "q") else None,
            k if self.sides in ("both", "k") else None,
            qkv,
            *(None if w is None else w.to(device) for w in self._choose(weights)),
            _to(positions, device),
            _to(extras, device),
        )

    def but(self, **changes: Any) -> Recipe:
        return replace(self, **changes)

    def _rows(self, lead: Shape, heads: int, draw: torch.Generator) -> Tensor:
        x = torch.randn(*lead, heads, self.spec.head_dim, generator=draw)
        row = torch.arange(x.numel() // self.spec.head_dim).view(*lead, heads, 1)
        return x * torch.tensor(ROW_SCALES)[(row + self.seed) % len(ROW_SCALES)]

    def _weight(self, norm: Norm, draw: torch.Generator) -> Tensor | None:
        w = torch.randn(self.spec.head_dim, generator=draw)
        if norm.kind == "none":
            return None
        return ((0.3 if norm.weight_offset else 1.0) * w).to(self.weight_dtype or self.dtype)

    def _choose(self, weights: list[Tensor | None]) -> list[Tensor | None]:
        given = "qk" if self.weights == "both" else self.weights
        return [w if side in given else None for side, w in zip("qk", weights, strict=True)]

    def _angle(self, k_lead: Shape, draw: torch.Generator) -> tuple[Any, dict[str, Any]]:
        spec = self.spec
        if spec.rope is None:
            return None, {}
        pairs, rot = spec.rotary_dim // 2, spec.rotary_dim
        if self.angle in ("pair", "channel", "complex"):
            width = rot if self.angle == "channel" else pairs
            table = self._table((*self._shape(self.lead), width), draw)
            if self.angle == "complex":  # (cos, sin) side by side, as torch.view_as_real has them
                both = torch.stack(table, -1)
                return None, {"cos_sin": (both[..., 0], both[..., 1])}
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

    def _table(self, shape: Shape, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cosines and sines of random angles, of a length that is not 1."""
        turn = 6.3 * torch.rand(shape, generator=draw)
        return (1.25 * turn.cos()).to(self.table_dtype), (1.25 * turn.sin()).to(self.table_dtype)

    def _shape(self, lead: Shape) -> Shape:
        return {"full": lead, "last": lead[-1:], "one": (1, *lead[-1:])}[self.position_shape]

    def _positions(self, lead: Shape, draw: torch.Generator, rows: int | None) -> Tensor:
        shape = self._shape(lead)
        if rows is not None:
            return torch.randint(rows, shape, generator=draw).to(self.position_dtype)
        count = torch.Size(shape).numel()
        which = (torch.arange(count) + self.seed) % len(POSITIONS)
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
