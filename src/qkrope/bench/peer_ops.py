"""Where a peer's operation comes from: the folder of fetch_peers.py, or an installed package.

An `Op` takes the arguments of one call and gives the call, ready to run: nothing is looked up or
converted in a timed region.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .baselines import Call, Unmeasured
from .peer_cubins import Op


def _bound(function: Callable[..., object]) -> Op:
    """A package's function as an `Op`: the arguments now, the call later."""
    return lambda *arguments: partial(function, *arguments)


def cubin(name: str, make: Callable[[Path], Op]) -> Callable[[Path], Op | None]:
    """A kernel in machine code: `NAME.cubin` in the folder."""
    return lambda folder: make(path) if (path := folder / f"{name}.cubin").is_file() else None


@cache
def _library(path: Path) -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


def carried_sglang(folder: Path) -> Op | None:
    """One library for each head_dim and pairing, as SGLang compiles them at run time."""
    if not any(folder.glob("sglang_[0-9]*.so")):
        return None

    def prepare(qkv: torch.Tensor, *rest: Any) -> Call:
        nq, nk, nv, head_dim, eps, qw, kw, base, neox, positions, *more = rest
        name = f"sglang_{head_dim}_{'half' if neox else 'interleaved'}.so"
        function = _library(folder / name).fused_qk_norm_rope
        norm = (nq, nk, nv, head_dim, eps, base, int(neox))
        return partial(function, qkv, qw, kw, positions, *norm, *more)

    return prepare


def carried_diffusion(folder: Path) -> Op | None:
    """One library, a function for each head_dim, rotary dim and pairing."""
    path = folder / "sglang_diffusion.so"
    if not path.is_file():
        return None

    def prepare(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Call:
        qw, kw, table, positions, half, eps = rest
        pairing = "half" if half else "interleaved"
        name = f"qknorm_rope_{q.shape[-1]}_{table.shape[-1]}_{pairing}"
        try:
            function = getattr(_library(path), name)
        except AttributeError:
            raise Unmeasured(f"{name} was not built by fetch_peers.py") from None
        return partial(function, q, k, qw, kw, table, positions, eps)

    return prepare


def imported_diffusion() -> Op:
    """The installed one; its own compiler picks the variant."""
    module = import_module("sglang.kernels.ops.diffusion.rope.qknorm_rope_jit")

    def prepare(*arguments: Any) -> Call:
        *tensors, half, eps = arguments
        return partial(module.fused_inplace_qknorm_rope, *tensors, is_neox=half, eps=eps)

    return prepare


def _flashinfer(norm: Callable[..., object], rope: Callable[..., object]) -> Op:
    def prepare(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Call:
        qw, kw, table, positions, half, eps = rest

        def call() -> None:
            norm(q, qw, eps)
            norm(k, kw, eps)
            rope(q, k, table, positions, not half)

        return call

    return prepare


def carried_flashinfer(folder: Path) -> Op | None:
    """The CUDA form of FlashInfer: its newer one needs a package of its own."""
    path = folder / "flashinfer.so"
    if not path.is_file():
        return None
    library = _library(path)
    return _flashinfer(library.rmsnorm, library.rope)


def imported_flashinfer() -> Op:
    """The installed one: RMS norm of q, of k, then one rotation of both, in place."""
    norm, rope = import_module("flashinfer.norm"), import_module("flashinfer.rope")

    def turn(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> None:
        table, positions, interleaved = rest
        rope.apply_rope_with_cos_sin_cache_inplace(
            positions, q, k, q.shape[-1], table, is_neox=not interleaved
        )

    return _flashinfer(lambda x, w, eps: norm.rmsnorm(x, w, eps, out=x), turn)


def carried_liger(folder: Path) -> Op | None:
    """Triton kernels: the package itself, put on the path."""
    site = folder / "site"
    if not (site / "liger_kernel").is_dir():
        return None
    if str(site) not in sys.path:
        sys.path.append(str(site))
    return imported_liger()


def imported_liger() -> Op:
    """RMS norm of q and of k, out of place, then one rotation of both in place."""

    def prepare(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Call:
        ops = import_module("liger_kernel.ops")  # needs Triton
        qw, kw, cos, sin, norm = rest
        mode = "gemma" if norm.weight_offset else "llama"

        def side(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            found = ops.LigerRMSNormFunction.apply(
                x, weight, norm.eps, norm.weight_offset, mode, False
            )
            return found[None].transpose(1, 2)  # [1, heads, tokens, head_dim], not moved

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            turned = ops.LigerRopeFunction.apply(side(q, qw), side(k, kw), cos, sin)
            q_out, k_out = (x.transpose(1, 2)[0] for x in turned)
            return q_out, k_out

        return call

    return prepare


def function(module: str, name: str) -> Callable[[], Op]:
    """A function of an installed package."""
    return lambda: _bound(getattr(import_module(module), name))
