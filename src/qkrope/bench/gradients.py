"""The backward kernel in the bench: its inputs, its calls, and the sweep that reads x and dy and
writes dx.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median
from typing import Any

import torch

from .. import _native, ops, ops_backward
from . import driver
from .data import make_inputs
from .shapes import Shape
from .timing import Measure, graph_measure

__all__ = ["GRIDS", "Rows", "call", "compile_sweep", "forced", "make_rows", "sweep_measure"]

_BLOCK = 128  # twin of the launch bounds in sweep_two.cu
_WIDTHS = (1, 2, 4)  # 16-byte words a thread


@dataclass(frozen=True)
class Rows:
    """x, the gradient of the results and that of x, each q's rows and then k's."""

    shape: Shape
    x: torch.Tensor
    dy: torch.Tensor
    dx: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    positions: torch.Tensor

    def sides(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[tokens, heads, head_dim]`` of q and of k in one of the tensors."""
        spec, tokens = self.shape.spec, self.positions.shape[0]
        q_rows = tokens * spec.num_q_heads
        heads = (spec.num_q_heads, spec.num_kv_heads)
        parts = rows[:q_rows], rows[q_rows:]
        q, k = (x.view(tokens, n, spec.head_dim) for x, n in zip(parts, heads, strict=True))
        return q, k


def make_rows(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, count: int
) -> list[Rows]:
    """So many buffers of a call, which share weights and positions."""
    inputs = make_inputs(Shape(shape.name, shape.spec), tokens, dtype, device)
    x = inputs.qkv.view(-1, shape.spec.head_dim)
    shared = inputs.q_weight, inputs.k_weight, inputs.positions
    made = [Rows(shape, x.clone(), x.flip(0), torch.empty_like(x), *shared) for _ in range(count)]
    return made


def call(rows: Rows, weights: bool = True) -> Callable[[], object]:
    """The gradients of one call, everything allocated and looked up beforehand."""
    spec = rows.shape.spec
    x, dy, dx = (rows.sides(t) for t in (rows.x, rows.dy, rows.dx))
    given = rows.q_weight, rows.k_weight
    plan, (_, *operands) = ops._prepare(None, None, *x, *given, rows.positions, spec, {"out": dx})
    operands += ops_backward._ABSENT[len(operands) :]
    sums = [
        None if w is None or not weights else torch.empty_like(w, dtype=torch.float32)
        for w in given
    ]
    columns = sum(s.numel() for s in sums if s is not None)
    workspace = ops_backward._workspace(plan, list(x), columns) if columns else None
    run = _backend(rows.x.is_cuda)
    rest = (*dy, None, *sums, None, None, None, workspace)
    return lambda: run(plan, 0, *operands, *rest)


def _backend(is_cuda: bool) -> Callable[..., None]:
    if is_cuda:
        from ..cuda.launch import qk_norm_rope_backward as on_cuda

        return on_cuda
    from ..cpu import qk_norm_rope_backward as on_cpu

    return on_cpu


# ---- the sweep --------------------------------------------------------------------------------


def compile_sweep(arch: str, vec: int, pdl: int) -> bytes:
    """The cubin of sweep_two.cu for ``arch`` ("sm_90"); needs NVRTC but no GPU."""
    from cuda.core import Program, ProgramOptions

    source = resources.files("qkrope").joinpath("bench", "sweep_two.cu").read_text()
    define = [("VEC", str(vec)), ("PDL", str(pdl))]
    program = Program(source, "c++", ProgramOptions(arch=arch, define_macro=define))
    return bytes(program.compile("cubin").code)


@cache
def _kernel(device: int, vec: int, pdl: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    module = driver.load(device, compile_sweep(f"sm_{major}{minor}", vec, pdl))
    return driver.function(module, "qk_sweep_two")


def _sweep(rows: Rows, vec: int, pdl: int) -> Callable[[], object]:
    words = rows.x.numel() * rows.x.element_size() // 16
    values = (rows.x.data_ptr(), rows.dy.data_ptr(), rows.dx.data_ptr(), words)
    types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    kernel = _kernel(rows.x.device.index or 0, vec, pdl)
    blocks = -(-words // (_BLOCK * vec))
    return driver.launcher(kernel, blocks, _BLOCK, (values, types), pdl=True, keep=rows)


def sweep_measure(buffers: Sequence[Rows], launches: int) -> Measure:
    """The fastest form of the sweep on these buffers, as a graph: a slow yardstick flatters."""
    candidates = [
        graph_measure([_sweep(b, vec, pdl) for b in buffers], launches)
        for vec in _WIDTHS
        for pdl in (1, 2)
    ]
    return min(candidates, key=lambda measure: median(measure() for _ in range(5)))


# ---- grids ------------------------------------------------------------------------------------

# Warps a block and a multiprocessor, and what is asked for before the wait: nothing, or x and dy.
GRIDS = [
    (block, warps, prefetch)
    for block in (4, 8)
    for warps in (16, 20, 32, 48, 64, 80, 128, 160)
    for prefetch in (0, 3)
]


@contextmanager
def forced(grid: tuple[int, int, int]) -> Iterator[None]:
    """In which a grid takes the place of the rules, for the calls that are made and captured."""
    _native.lib().force_backward(*grid)
    try:
        yield
    finally:
        _native.lib().force_backward(0, 0, -1)
