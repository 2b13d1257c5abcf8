"""Where the tensors of a test lie: in larger buffers of canaries, with all kinds of strides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Guarded", "Shape", "bits", "guarded", "packed_strides"]

_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The same memory read as integers, so that -0 != 0 and NaN == NaN."""
    return x.detach().contiguous().view(_INT[x.element_size()])


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
