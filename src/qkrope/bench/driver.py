"""Kernels from machine code, launched through the CUDA driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def ok(result: tuple[Any, ...]) -> Any:
    """The value of a driver call; RuntimeError for any result but success."""
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA driver: got {result[0]!r}, expected CUDA_SUCCESS")
    return result[1] if len(result) > 1 else None


def load(device: int, cubin: bytes) -> Any:
    """A module of machine code in the context of `device`."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes torch's context current
        return ok(driver.cuModuleLoadData(cubin))


def function(module: Any, name: str) -> Any:
    """A kernel of a module, by its (mangled) name."""
    from cuda.bindings import driver

    return ok(driver.cuModuleGetFunction(module, name.encode()))


def launcher(
    kernel: Any,
    grid: int,
    block: int,
    arguments: tuple[Sequence[Any], Sequence[type]],
    *,
    shared: int = 0,
    pdl: bool = False,
    keep: object = None,
) -> Callable[[], None]:
    """A call that launches `kernel` on torch's current stream, everything packed beforehand.

    arguments: the values and their ctypes, in the kernel's order; `keep` lives as long as the call
    (pointers do not keep their tensors).
    """
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared
    if pdl:
        attribute = driver.CUlaunchAttribute()
        ids = driver.CUlaunchAttributeID
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs = [attribute]
        config.numAttrs = 1
    packed = (tuple(arguments[0]), tuple(arguments[1]))

    def call(keep: object = keep) -> None:
        config.hStream = torch.cuda.current_stream().cuda_stream
        ok(driver.cuLaunchKernelEx(config, kernel, packed, 0))

    return call
