"""Calls on CUDA tensors as far as they go without a GPU: the checks, and the kernel they ask for.

The native call is made on descriptors of tensors that say device cuda and whose memory nothing
reads: it checks them all, finds no kernel loaded and answers with the key of the one to build.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qkrope import _native
from qkrope.cuda.launch import slot_key
from qkrope.plan import plan_of
from qkrope.spec import Norm, Rope, Spec
from qkrope.variant import Variant

BF16, FP32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
SPEC = Spec(3, 2, 64, rope=Rope(32, 1e6))
_NONE, _INT, _TENSOR = 0, 1, 7  # kTVMFFINone, kTVMFFIInt, kTVMFFIDLTensorPtr
_CUDA = 2  # kDLCUDA
_CODES = {BF16: (4, 16), torch.float16: (2, 16), FP32: (2, 32), I32: (0, 32), I64: (0, 64)}


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Any_(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("pad", ctypes.c_uint32), ("value", ctypes.c_int64))


def native(operands: list[Any], name: str = "qk_norm_rope") -> int | None:
    """The answer of a native op on tensors taken for CUDA ones; None where it raised."""
    library = ctypes.CDLL(str(_native.resource(_native.LIBRARY)))
    function = library[f"__tvm_ffi_{name}"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    kept: list[Any] = []
    args = (Any_ * len(operands))()
    for arg, operand in zip(args, operands, strict=True):
        if operand is None:
            arg.type = _NONE
        elif isinstance(operand, int):
            arg.type, arg.value = _INT, operand
        else:
            shape = (ctypes.c_int64 * max(operand.ndim, 1))(*operand.shape)
            strides = (ctypes.c_int64 * max(operand.ndim, 1))(*operand.stride())
            code, bits = _CODES[operand.dtype]
            at = ctypes.addressof
            tensor = DLTensor(
                operand.data_ptr(), _CUDA, 0, operand.ndim, code, bits, 1, at(shape), at(strides), 0
            )
            kept += [shape, strides, tensor, operand]
            arg.type, arg.value = _TENSOR, at(tensor)
    result = Any_()
    status = function(None, ctypes.addressof(args), len(operands), ctypes.addressof(result))
    return None if status else result.value


def operands(
    spec: Spec = SPEC, dtype: torch.dtype = BF16, *, packed: bool = False, sides: str = "qk"
) -> list[Any]:
    """A good call of five tokens, as far as its positions."""
    dim, (nq, nk) = spec.head_dim, (spec.num_q_heads, spec.num_kv_heads)
    qkv = torch.zeros(5, (nq + nk + 1) * dim, dtype=dtype) if packed else None
    q = torch.zeros(5, nq, dim, dtype=dtype) if not packed and "q" in sides else None
    k = torch.zeros(5, nk, dim, dtype=dtype) if not packed and "k" in sides else None
    weight = torch.ones(dim, dtype=dtype)
    given = [weight if side in sides else None for side in "qk"]
    positions = torch.arange(5) if spec.rope else None
    return [plan_of(spec).handle, 1, qkv, q, k, *given, positions]


def key(spec: Spec = SPEC, dtype: str = "bfloat16", angle: str = "phase") -> int:
    return slot_key(Variant.of(spec, dtype, None, None, angle), 0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
def test_a_plain_call_asks_for_its_kernel(dtype: torch.dtype, packed: bool) -> None:
    assert native(operands(dtype=dtype, packed=packed)) == key(dtype=str(dtype)[6:])


@pytest.mark.parametrize("sides", ["q", "k"])
def test_one_side(sides: str) -> None:
    assert native(operands(sides=sides)) == key()


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, norm=Norm(weight_offset=1.0)),
        replace(SPEC, k_norm=Norm(eps=1e-3)),
        replace(SPEC, rope=Rope(64, 1e4, "interleaved")),
        replace(SPEC, rope=None),
        Spec(32, 8, 128, rope=Rope(theta=1e6)),
    ],
    ids=lambda spec: spec.canonical()[:40],
)
def test_specs_that_the_kernels_always_ran(spec: Spec) -> None:
    assert native(operands(spec)) == key(spec)


def test_every_angle_source() -> None:
    base = operands()
    table, cache = torch.zeros(5, 16), torch.zeros(9, 32)
    nothing = [None] * 7
    for at, value, angle in (
        ((1, 2), table, "table"),
        ((3,), cache, "table"),
        ((4,), torch.zeros(16, dtype=FP32), "inv_freq"),
    ):
        extras: list[Any] = list(nothing)
        for i in at:
            extras[i] = value
        call = base + extras
        if at == (1, 2):
            call[7] = None
        assert native(call) == key(angle=angle), angle


def test_out_and_positions_of_both_sides() -> None:
    base = operands()
    out = [torch.zeros_like(base[3]), torch.zeros_like(base[4])]
    for dtype in (I32, I64):
        k_positions = torch.arange(5, dtype=dtype) + 1
        assert native([*base, k_positions, None, None, None, None, *out]) == key()


# ---- compiling ahead --------------------------------------------------------------------------


def test_what_is_compiled_ahead_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from qkrope.cuda import launch

    variants = [Variant.of(SPEC, "bfloat16", None, None, angle) for angle in ("phase", "table")]
    compiled: list[Variant] = []
    loaded: list[bytes] = []

    def compile_variant(variant: Variant, arch: str) -> SimpleNamespace:
        compiled.append(variant)
        return SimpleNamespace(cubin=f"{variant.angle} {arch}".encode())

    def cuda_load(device: int, address: int) -> int:
        loaded.append(ctypes.string_at(address))
        return len(loaded)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "compile_variant", compile_variant)
    monkeypatch.setattr(launch, "lib", lambda: SimpleNamespace(cuda_load=cuda_load))
    monkeypatch.setattr(launch, "_loaded", {})
    launch.compile_ahead([*variants, variants[0]], 0)
    assert sorted(v.angle for v in compiled) == ["phase", "table"] and not loaded
    assert [launch.load(v, 0) for v in variants] == [1, 2]
    assert loaded == [b"phase sm_90", b"table sm_90"] and len(compiled) == 2
    launch.compile_ahead(variants, 0)
    assert launch.load(variants[0], 0) == 1 and len(compiled) == 2


# ---- the launch, through a driver that only takes notes ----------------------------------------

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned grid[3], block[3], shared; void *stream, *list; unsigned n; } config;
int cuGetErrorName(int e, const char** s) { *s = "?"; return 0; }
int cuGetErrorString(int e, const char** s) { *s = "?"; return 0; }
int cuCtxGetDevice(int* d) { *d = 0; return 0; }
int cuCtxPushCurrent_v2(void* c) { return 0; }
int cuCtxPopCurrent_v2(void** c) { return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = "context"; return 0; }
int cuDeviceGetAttribute(int* value, int which, int d) {  // of an H100
  *value = which == 16 ? 132 : which == 75 ? 9 : which == 81 ? 233472 : which == 111 ? 1024 : -1;
  return 0;
}
int cuFuncSetAttribute(void* f, int which, int value) { return which != 8 || value != 116736; }
int cuLibraryLoadData(void** l, const void* d, void* a, void* b, unsigned c, void* e, void* f,
                      unsigned g) { *l = "library"; return 0; }
int cuLibraryGetKernel(void** k, void* l, const char* name) { *k = (void*)name; return 0; }
int cuKernelGetFunction(void** f, void* k) { *f = k; return 0; }
int cuMemAlloc_v2(void** p, size_t n) { static char memory[65536]; *p = memory; return 0; }
int cuMemcpyHtoD_v2(void* p, const void* from, size_t n) { return 0; }
int cuStreamSynchronize(void* s) { return 0; }
int cuLaunchKernelEx(const config* c, void* f, void** arguments, void** extra) {
  void** at = *arguments;  // x, y, weight of q; of k 72 bytes on; the positions
  if (getenv("POINTERS"))
    printf("%p %p %p %p %p %p %p ", at[0], at[1], at[2], at[9], at[10], at[11], at[18]);
  printf("%s %u %u %u %u %u %u\n", (char*)f, c->grid[0], c->grid[1], c->grid[2], c->block[0],
         c->block[1], c->shared);
  fflush(stdout);
  return 0;
}
"""
LAUNCH = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # found by its soname from here on
import torch
from qkrope import _native
from test_cuda_boundary import Spec, Rope, key, native, operands
import test_cuda_boundary as here
kernels = _native.lib().cuda_load(0, id(sys))
for tokens, heads, dim, shift in eval(sys.argv[2]):
    spec = Spec(*heads, dim, rope=Rope(theta=1e6))
    call = operands(spec)
    buffer = torch.zeros(tokens * sum(heads) * dim + 64, dtype=torch.bfloat16)
    qk = buffer[shift : shift + tokens * sum(heads) * dim].view(tokens, sum(heads), dim)
    call[3], call[4], call[7] = qk[:, : heads[0]], qk[:, heads[0] :], torch.arange(tokens)
    _native.lib().cuda_bind(call[0], key(spec), 0, kernels)
    sys.stdout.flush()
    native(call)
"""


AGAIN = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import torch
from qkrope import _native
from test_cuda_boundary import Spec, Rope, key, native, operands
kernels = _native.lib().cuda_load(0, id(sys))
spec = Spec(32, 8, 128, rope=Rope(theta=1e6))
kept = []
def call(tokens, dtype=torch.int64):
    packed = operands(spec, packed=True)
    packed[2] = torch.zeros(tokens, 48 * 128, dtype=torch.bfloat16)
    packed[5:] = [w.clone() for w in packed[5:7]] + [torch.arange(tokens, dtype=dtype)]
    kept.append(packed)
    _native.lib().cuda_bind(packed[0], key(spec), 0, kernels)
    return packed
def run(packed):
    sys.stdout.flush()
    answer = native(packed)
    if answer is None:
        print("refused", flush=True)
        return
    q, k = packed[2].data_ptr(), packed[2].data_ptr() + 32 * 128 * 2
    given = [0 if t is None else t.data_ptr() for t in packed[5:]]
    addresses = [q, q, given[0], k, k, given[1], given[2]]
    print(*(hex(a) if a else "(nil)" for a in addresses), answer, flush=True)
for tokens in (64, 64, 64, 3, 64):
    run(call(tokens))
run(call(64, torch.int32))
_native.lib().force_grid(4, 8)
run(call(64))
_native.lib().force_grid(0, 0)
one = call(64)
run(one)
one[5] = one[2].view(-1)[:128]  # a weight in the memory that is written over
run(one)
one[5] = None
run(one)
"""


def noted(tmp_path: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """The lines of a script that runs with a driver which takes notes."""
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(DRIVER)
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, "-o", library, source], check=True)
    command = [sys.executable, "-W", "ignore", "-c", script, str(library), *arguments]
    env = {
        **os.environ,
        **environment,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def launches(tmp_path: Path, calls: list[tuple[int, tuple[int, int], int, int]]) -> list[str]:
    """kernel, grid (x, y, z) and block (x, y) of calls of (tokens, heads, head_dim, elements that
    the base is moved by).
    """
    return noted(tmp_path, LAUNCH, repr(calls))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real driver is loaded here")
def test_kernels_and_grids(tmp_path: Path) -> None:
    """More heads a group for more tokens, and no shared memory once they fill the machine."""
    calls = [
        (1, (32, 8), 128, 0),
        (64, (32, 8), 128, 0),
        (256, (32, 8), 128, 0),
        (4096, (32, 8), 128, 0),
        (1_000_000, (32, 8), 128, 0),
        (4096, (5, 1), 128, 0),
        (4096, (8, 2), 512, 0),
        (64, (32, 8), 128, 1),
        (64, (3, 2), 90, 0),
    ]
    assert launches(tmp_path, calls) == [
        "qkrope_vector1 7 1 1 32 3 115712",
        "qkrope_vector2 2 64 1 32 5 115712",
        "qkrope_vector2 2 256 1 32 5 28160",
        "qkrope_vector2 2 4096 1 32 5 0",
        "qkrope_vector2 2 62500 16 32 5 0",
        "qkrope_vector4 1 2048 1 32 3 0",
        "qkrope_vector1 3 4096 1 32 4 0",
        "qkrope_scalar 4 32 1 32 3 115712",
        "qkrope_scalar 1 32 1 32 2 115712",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real driver is loaded here")
def test_a_call_like_the_last_one(tmp_path: Path) -> None:
    """Its checks and layout are not made again; addresses, and whatever differs, are its own."""
    lines = noted(tmp_path, AGAIN, POINTERS="1")
    assert lines.pop(16) == "refused"  # the overlap is seen although the description is the same
    shapes = []
    for launched, expected in zip(lines[::2], lines[1::2], strict=True):
        assert launched.split()[:7] == expected.split()[:7] and expected.split()[7] == "0"
        shapes.append(" ".join(launched.split()[7:]))
    usual, short = "qkrope_vector2 2 64 1 32 5 115712", "qkrope_vector1 7 3 1 32 3 115712"
    forced = "qkrope_vector4 2 32 1 32 5 115712"
    assert shapes == [*[usual] * 3, short, usual, usual, forced, usual, usual]


def test_a_wrong_call_raises() -> None:
    """The control: a weight of another length is refused, so the checks did run."""
    call = operands()
    call[5] = torch.ones(63, dtype=BF16)
    assert native(call) is None
