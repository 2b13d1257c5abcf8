"""Two peers whose kernels are taken as sm_90 machine code out of their wheels.

Here is what their own host code knows: the names, the order of the arguments, the grid. Sources
read for it: sgl_kernel 0.3.21 (`sgl-kernel/csrc/moe/fused_qknorm_rope_kernel.cu`), vLLM 0.33.0
(`csrc/libtorch_stable/fused_qknorm_rope_kernel.cu`). Each function has its package's signature.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import driver
from .baselines import Call

Op = Callable[..., Call]  # the arguments of one call in, the call out
HEAD_DIMS = (64, 128, 256)
BLOCK = 256
_WARPS = BLOCK // 32
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}

# One letter an argument, as the mangled name has them.
SGL_KERNEL_ARGUMENTS = "piiifppfpiffffi"
VLLM_ARGUMENTS = "piiifppppii"


def sgl_kernel_symbol(head_dim: int, interleaved: bool) -> str:
    """The mangled name of one instance."""
    return (
        f"_ZN12tensorrt_llm7kernels21fusedQKNormRopeKernelILi{head_dim}ELb{interleaved:d}EEE"
        "vP13__nv_bfloat16iiifPKS2_S5_fPKiiffffi"
    )


def vllm_symbol(dtype: torch.dtype, head_dim: int, interleaved: bool, heads: int) -> str:
    """The mangled name of one instance, its table in the dtype of its activations."""
    scalar = {torch.bfloat16: "8BFloat16", torch.float16: "4Half"}[dtype]
    kernel = "21fusedQKNormRopeKernel" if heads == 1 else "32fusedQKNormRopeKernelNTokenHeads"
    many = "" if heads == 1 else f"Li{heads}E"
    return (
        f"_ZN12tensorrt_llm7kernels{kernel}IN3c10{scalar}ES3_Li{head_dim}ELb{interleaved:d}E{many}"
        "EEvPviiifPKvS6_S6_PKlii"
    )


SGL_KERNEL_SYMBOLS = tuple(
    sgl_kernel_symbol(d, pairs) for d in HEAD_DIMS for pairs in (False, True)
)
VLLM_SYMBOLS = tuple(
    vllm_symbol(dtype, head_dim, pairs, heads)
    for dtype in (torch.bfloat16, torch.float16)
    for head_dim in HEAD_DIMS
    for pairs in (False, True)
    for heads in ((1, 2, 4) if head_dim == 256 else (1, 4, 8))
)


@dataclass(frozen=True)
class Grid:
    """How a launch is laid out."""

    heads: int  # a warp
    blocks: int
    shared: int = 0
    pdl: bool = False


def sgl_kernel_grid(tokens: int, heads: int) -> Grid:
    """One warp a head of a token; no programmatic dependent launch."""
    return Grid(1, -(-tokens * heads // _WARPS))


def vllm_grid(tokens: int, heads: int, head_dim: int, rotary_dim: int) -> Grid:
    """The op's own choice on sm_90, table of 2-byte values."""
    units = tokens * heads
    steps = ((4096, 1), (8192, 2)) if head_dim >= 256 else ((10240, 1), (40960, 4))
    a_warp = next((n for below, n in steps if units < below), 4 if head_dim >= 256 else 8)
    if rotary_dim * 2 % 16:
        a_warp = 1
    shared = 0 if a_warp == 1 else _WARPS * 2 * (rotary_dim + a_warp * head_dim)
    return Grid(a_warp, -(-tokens * -(-heads // a_warp) // _WARPS), shared, pdl=tokens <= 16)


def types(letters: str) -> tuple[type, ...]:
    """The ctypes of an argument list."""
    return tuple(_C_TYPES[letter] for letter in letters)


@cache
def _kernel(device: int, path: Path, symbol: str) -> Any:
    return driver.function(_module(device, path), symbol)


@cache
def _module(device: int, path: Path) -> Any:
    return driver.load(device, path.read_bytes())


def sgl_kernel(path: Path) -> Op:
    """Takes what `sgl_kernel.fused_qk_norm_rope` takes; gives a call that launches it."""

    def prepare(qkv: torch.Tensor, *rest: Any) -> Callable[[], None]:
        nq, nk, nv, head_dim, eps, qw, kw, base, neox, positions, *yarn_and_rotary = rest
        grid = sgl_kernel_grid(len(qkv), nq + nk)
        values = [qkv.data_ptr(), nq, nk, nv, eps, qw.data_ptr(), kw.data_ptr(), base]
        values += [positions.data_ptr(), len(qkv), *yarn_and_rotary]
        kernel = _kernel(qkv.device.index or 0, path, sgl_kernel_symbol(head_dim, not neox))
        return _launcher(kernel, grid, values, SGL_KERNEL_ARGUMENTS, (qkv, qw, kw, positions))

    return prepare


def vllm(path: Path) -> Op:
    """Takes what `torch.ops._C.fused_qk_norm_rope` takes; gives a call that launches it."""

    def prepare(qkv: torch.Tensor, *rest: Any) -> Callable[[], None]:
        nq, nk, nv, head_dim, eps, qw, kw, table, neox, positions = rest
        grid = vllm_grid(len(qkv), nq + nk, head_dim, table.shape[1])
        values = [qkv.data_ptr(), nq, nk, nv, eps, qw.data_ptr(), kw.data_ptr()]
        values += [table.data_ptr(), positions.data_ptr(), len(qkv), table.shape[1]]
        symbol = vllm_symbol(qkv.dtype, head_dim, not neox, grid.heads)
        kernel = _kernel(qkv.device.index or 0, path, symbol)
        return _launcher(kernel, grid, values, VLLM_ARGUMENTS, (qkv, qw, kw, table, positions))

    return prepare


def _launcher(
    kernel: Any, grid: Grid, values: list[Any], letters: str, keep: object
) -> Callable[[], None]:
    arguments = (values, types(letters))
    return driver.launcher(
        kernel, grid.blocks, BLOCK, arguments, shared=grid.shared, pdl=grid.pdl, keep=keep
    )
