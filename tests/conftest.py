"""Devices and CPU instruction sets that the tests run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: one thread a worker, or the workers fight for the cores.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ISA_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every backend: the CPU at its best instruction set, and CUDA."""
    if request.param == "cuda":
        _need_cuda()
    return str(request.param)


@pytest.fixture
def cuda() -> str:
    """CUDA or a skip; a test that uses it is marked gpu."""
    _need_cuda()
    return "cuda"


def _level(name: str) -> Iterator[str]:
    from qkrope import _native

    lib = _native.lib()
    if not lib.cpu_supported(name):
        pytest.skip(f"this CPU does not run {name} kernels")
    lib.cpu_select_isa(name)
    assert lib.cpu_isa() == name
    yield name
    lib.cpu_select_isa("")


@pytest.fixture(params=ISA_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels at each instruction set that this machine runs."""
    yield from _level(request.param)


@pytest.fixture(params=[*ISA_LEVELS, pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of each backend: the CPU at each instruction set, and CUDA."""
    if request.param == "cuda":
        _need_cuda()
        yield "cuda"
        return
    for _ in _level(request.param):
        yield "cpu"
