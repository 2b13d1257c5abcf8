"""The CUDA kernels without a GPU: compiled by g++ for an emulator, run on CPU tensors.

`emulate` stands in for the CPU backend: what a call on CUDA would launch is laid out by the
launcher, from the same checked arguments, and every block of it is run (tests/emulate).
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qkrope import _native
from qkrope.cuda import compile as compiling
from qkrope.cuda.launch import variant_of
from qkrope.ops import CHECK_ONLY
from qkrope.variant import Variant

HERE = Path(__file__).parent / "emulate"
NAMES = ("vector1", "vector2", "vector4", "scalar", "sums")  # by the numbers of plan.h
# -fsanitize=alignment: a GPU faults where a CPU does not mind.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-shared", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    *("-w", *(("-mfma", "-mf16c") if platform.machine() == "x86_64" else ())),
)
NUM_SMS = 2  # so few that small calls reach every number of rows
MOST_PARTS = 3


def source(variant: Variant) -> str:
    """The translation unit of a variant with the emulator around it."""
    text = compiling.source(variant)
    ptx = _native.resource("native", "ptx.cuh").read_text()
    assert ptx in text and "asm" not in text.replace(ptx, "")
    parts = {name: (HERE / name).read_text() for name in ("device.h", "ptx.h", "run.h")}
    launch = "qk_launch" if variant.options is None else "qk_launch_general"
    if variant.backward:
        launch = f"qk_launch_backward_{'plain' if variant.options is None else 'general'}"
    launches = {name: "qk_launch_sums" if name == "sums" else launch for name in NAMES}
    table = ", ".join(
        f"call<{launches[name]}, qkrope_{name}>" if name in variant.kernels else "nullptr"
        for name in NAMES
    )
    return "\n".join(
        (
            parts["device.h"],
            text.replace(ptx, parts["ptx.h"]),
            f"#define KERNELS {table}",
            parts["run.h"],
        )
    )


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qkrope-emulate-")


@cache
def kernels(variant: Variant) -> Any:
    """`qk_emulate` of a variant, compiled once a process."""
    return compiled(source(variant))


def compiled(text: str) -> Any:
    """`qk_emulate` of a source."""
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed, as it is to build the package"
    path = Path(_folder().name) / f"{hashlib.sha256(text.encode()).hexdigest()}.so"
    command = [compiler, *FLAGS, "-o", path, "-"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
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


class _Step(ctypes.Structure):
    """qk_backward_step of native/backward.h."""

    _fields_ = (("grid", _Grid), ("launch", ctypes.c_char * _native.lib().backward_launch_bytes()))


@dataclass
class Launch:
    """One launch of a call: the kernel's number in NAMES may be changed before it runs."""

    variant: Variant
    prepared: _Prepared | _Step
    keep: Any = None  # what the launch points at

    def run(self, kernels: Callable[[Variant], Any] = kernels) -> str | None:
        """None, or what a GPU would not have borne."""
        grid = self.prepared.grid
        address = ctypes.addressof(self.prepared) + type(self.prepared).launch.offset
        run = kernels(self.variant)
        problem = run(grid.function, grid.grid, grid.block, ctypes.c_void_p(address))
        return problem if problem is None else problem.decode()


def launches(
    plan: Any, *operands: Any, num_sms: int = NUM_SMS, backward: bool = False
) -> list[Launch]:
    """What a call on CUDA would launch; the arguments of `qkrope.cpu.qk_norm_rope`."""
    lib = _native.lib()
    prepare = lib.backward_prepare if backward else lib.cuda_prepare
    key = prepare(0, 0, num_sms, plan.handle, *operands)
    variant = variant_of(plan.spec, key)
    mask = sum(1 << i for i, name in enumerate(NAMES) if name in variant.kernels)
    found = ((_Step if backward else _Prepared) * (2 * MOST_PARTS))()
    count = prepare(ctypes.addressof(found), mask, num_sms, plan.handle, *operands)
    return [Launch(variant, one) for one in found[:count]]


class Sum(ctypes.Structure):
    """qk_sum of native/backward.h."""

    _fields_ = (
        ("parts", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("columns", ctypes.c_longlong),
        ("rows", ctypes.c_int),
    )


def sums_of(launch: Launch) -> list[Sum]:
    """What the launch of "sums" adds."""
    assert NAMES[launch.prepared.grid.function] == "sums"
    at = ctypes.addressof(launch.prepared) + type(launch.prepared).launch.offset
    return [*(Sum * launch.prepared.grid.grid[1]).from_address(at)]


def emulate_backward(
    plan: Any, *operands: Any, num_sms: int = NUM_SMS, into: list[Launch] | None = None
) -> None:
    """The same, in the place of `qkrope.cpu.qk_norm_rope_backward`, with CUDA's workspace.

    into: where the launches go, which then do not run.
    """
    if operands[-1] is not None:
        sums = [t for t in operands[-6:-1] if t is not None]
        given = [t for t in operands[2:4] if t is not None]
        tokens = max(t.shape[:-2].numel() for t in given)
        rows = _native.lib().backward_partials(plan.handle, tokens, num_sms)
        room = torch.full((rows * sum(t.numel() for t in sums),), torch.nan)
        operands = (*operands[:-1], room)
    if into is None:
        emulate(plan, *operands, num_sms=num_sms, backward=True)
    else:
        into += launches(plan, *operands, num_sms=num_sms, backward=True)
        for launch in into:
            launch.keep = operands


def emulate(plan: Any, *operands: Any, num_sms: int = NUM_SMS, backward: bool = False) -> None:
    """Run a call as CUDA would, in the place of `qkrope.cpu.qk_norm_rope`."""
    found = launches(plan, *operands, num_sms=num_sms, backward=backward)
    for launch in () if operands[0] & CHECK_ONLY else found:
        problem = launch.run()
        assert problem is None, f"{NAMES[launch.prepared.grid.function]}: {problem}"
