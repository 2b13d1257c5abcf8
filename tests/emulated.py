"""The CUDA kernels without a GPU: compiled by g++ for an emulator, run on CPU tensors.

`emulate` stands in for the CPU backend: what a call on CUDA would launch is laid out by the
launcher, from the same checked arguments, and every block of it is run (tests/emulate).
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from qkrope import _native
from qkrope.cuda import compile as compiling
from qkrope.variant import ANGLES, DTYPES, Variant

HERE = Path(__file__).parent / "emulate"
NAMES = ("vector1", "vector2", "vector4", "scalar")  # by the numbers of plan.h
# -fsanitize=alignment: a GPU faults where a CPU does not mind.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-shared", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    *("-Wno-unknown-pragmas", "-w", "-mfma", "-mf16c"),
)
NUM_SMS = 2  # so few that small calls reach every number of rows
MOST_PARTS = 3


def source(variant: Variant) -> str:
    """The translation unit of a variant with the emulator around it."""
    text = compiling.source(variant)
    ptx = _native.resource("native", "ptx.cuh").read_text()
    assert ptx in text and "asm" not in text.replace(ptx, "")
    parts = {name: (HERE / name).read_text() for name in ("device.h", "ptx.h", "run.h")}
    table = ", ".join(f"qkrope_{name}" if name in variant.kernels else "nullptr" for name in NAMES)
    launch = "qk_launch" if variant.options is None else "qk_launch_general"
    return "\n".join(
        (
            parts["device.h"],
            text.replace(ptx, parts["ptx.h"]),
            f"#define KERNELS {table}\nusing Launch = {launch};",
            parts["run.h"],
        )
    )


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qkrope-emulate-")


@cache
def kernels(variant: Variant) -> Any:
    """`qk_emulate` of a variant, compiled once a process."""
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed, as it is to build the package"
    text = source(variant)
    path = Path(_folder().name) / f"{hashlib.sha256(text.encode()).hexdigest()}.so"
    done = subprocess.run(
        [compiler, *FLAGS, "-o", path, "-"], input=text, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[:4000]
    run = ctypes.CDLL(str(path)).qk_emulate
    run.restype = ctypes.c_char_p
    return run


class _Grid(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("_", ctypes.c_int),
    )


class _Prepared(ctypes.Structure):
    """`prepared` of native/bindings.c; the launch is as large as qk_launch_general."""

    _fields_ = (("grid", _Grid), ("launch", ctypes.c_char * _native.lib().cuda_launch_bytes()))


def emulate(plan: Any, *operands: Any, num_sms: int = NUM_SMS) -> None:
    """Run a call as CUDA would; the arguments of `qkrope.cpu.qk_norm_rope`."""
    prepare = _native.lib().cuda_prepare
    key = prepare(0, 0, num_sms, plan.handle, *operands)
    names = (DTYPES[key >> at & mask] for at, mask in ((1, 7), (4, 15), (8, 15)))
    angle, general = ANGLES[key >> 12 & 7], bool(key >> 15 & 1)
    variant = Variant.of(plan.spec, *names, angle, general)
    mask = sum(1 << i for i, name in enumerate(NAMES) if name in variant.kernels)
    launches = (_Prepared * MOST_PARTS)()
    address = ctypes.addressof(launches)
    count = prepare(address, mask, num_sms, plan.handle, *operands)
    for one in launches[:count]:
        grid = one.grid
        launch = ctypes.addressof(one) + _Prepared.launch.offset
        problem = kernels(variant)(grid.function, grid.grid, grid.block, ctypes.c_void_p(launch))
        assert problem is None, f"{NAMES[grid.function]} of {variant}: {problem.decode()}"
