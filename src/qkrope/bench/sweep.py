"""The measured memory sweep: the same Q and K columns of the same packed tensor, in place.

What a kernel that only moves the bytes needs; `ratio` in a record is our time over its time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from statistics import median
from typing import Any

import torch

from . import driver
from .data import Inputs
from .timing import Measure, graph_measure

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))
_BLOCK = 128  # twin of the launch bounds in sweep.cu
WIDTHS = (1, 2, 4)  # 16-byte words a thread


def _columns(inputs: Inputs) -> torch.Tensor:
    """The Q and K columns as the widest integers that tile them."""
    itemsize = inputs.qkv.element_size()
    used, width = inputs.shape.columns * itemsize, inputs.shape.width * itemsize
    for size, dtype in _WORDS:
        if used % size == 0 and width % size == 0:
            return inputs.qkv.view(dtype)[:, : used // size]
    raise ValueError(f"qkv: got rows of {width} bytes, expected whole 16-bit words")


def host_sweep(inputs: Inputs) -> Callable[[], object]:
    """CPU: `bitwise_xor_` with 1, on all threads torch uses. Flips one lowest bit a word."""
    columns = _columns(inputs)
    return lambda: columns.bitwise_xor_(1)


def compile_sweep(arch: str, row_words: int, vec: int, pdl: int) -> bytes:
    """The cubin of sweep.cu for `arch` ("sm_90"); needs NVRTC but no GPU."""
    from cuda.core import Program, ProgramOptions

    source = resources.files("qkrope").joinpath("bench", "sweep.cu").read_text()
    define = [("VEC", str(vec)), ("ROW_WORDS", str(row_words)), ("PDL", str(pdl))]
    program = Program(source, "c++", ProgramOptions(arch=arch, define_macro=define))
    return bytes(program.compile("cubin").code)


@cache
def _kernel(device: int, row_words: int, vec: int, pdl: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compile_sweep(f"sm_{major}{minor}", row_words, vec, pdl)
    return driver.function(driver.load(device, cubin), "qk_sweep")


def device_sweep(inputs: Inputs, *, pdl: int, vec: int = 2) -> Callable[[], object]:
    """CUDA: sweep.cu with `vec` 16-byte words a thread; `pdl` as the macro of sweep.cu.

    ValueError where the columns are no whole 16-byte words, or more than 2^32 of them.
    """
    qkv = inputs.qkv
    itemsize = qkv.element_size()
    row_bytes, used = inputs.shape.width * itemsize, inputs.shape.columns * itemsize
    if row_bytes % 16 or used % 16 or qkv.data_ptr() % 16:
        raise ValueError(f"sweep: got {used} of {row_bytes} bytes a row, expected multiples of 16")
    words = inputs.tokens * (used // 16)
    if words >= 2**32:
        raise ValueError(f"sweep: got {words} words, expected fewer than 2^32")
    kernel = _kernel(qkv.device.index or 0, used // 16, vec, pdl)
    values = (qkv.data_ptr(), row_bytes // 16, words)
    types = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_uint)
    blocks = -(-words // (_BLOCK * vec))
    return driver.launcher(kernel, blocks, _BLOCK, (values, types), pdl=bool(pdl), keep=qkv)


def device_sweep_measure(buffers: Sequence[Inputs], launches: int, *, pdl: bool) -> Measure:
    """The fastest form of the sweep on these buffers, as a graph: a slow yardstick flatters."""
    candidates = [
        graph_measure([device_sweep(b, pdl=mode, vec=vec) for b in buffers], launches)
        for vec in WIDTHS
        for mode in ((1, 2) if pdl else (0,))
    ]
    return min(candidates, key=lambda measure: median(measure() for _ in range(5)))
