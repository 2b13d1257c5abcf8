#!/usr/bin/env python3
"""Fill a folder with the peers of `qkrope bench --peers DIR`, for a machine that has no index.

    tools/fetch_peers.py [DIR] [--only NAME] [--wheels DIR]        DIR: peers, which git ignores

Run it with an interpreter that has qkrope and pip; it needs nvcc and a C++ compiler for the peers
that compile their kernels at run time. From each peer's wheel on the index it takes one thing:

    sgl_kernel, vllm         the machine code (sm_90) that holds the fused kernel
    sglang, flashinfer       a library compiled from the wheel's own sources and flags, for sm_90a,
                             with the entry points below; the sources stay here
    liger                    the package (Triton kernels)

The wheels are deleted, or kept in --wheels for a second run. manifest.json says what came from
where. Nothing of the peers is part of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qkrope.bench.peer_cubins import SGL_KERNEL_SYMBOLS, VLLM_SYMBOLS

LIMIT = 40 << 20  # bytes; what a GPU machine takes, less the rest of a checkout
CUOBJDUMP = "nvidia-cuda-cuobjdump==13.5.37"
ARCH = ("-gencode=arch=compute_90a,code=sm_90a",)
SGLANG_FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DSGL_CUDA_ARCH=900")
FLASHINFER_FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "-use_fast_math", "-DENABLE_BF16"),
    *("-DFLASHINFER_ENABLE_F16", "-DFLASHINFER_ENABLE_BF16"),
)
# (head_dim, rotary dim) of the diffusion kernel, whose rotary dim is a template argument.
DIFFUSION = ((64, 64), (128, 128), (128, 64), (256, 256), (256, 64))
EXPORT = "#include <tvm/ffi/function.h>\nTVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, ({function}));\n"
# rmsnorm and rope as FlashInfer's Python calls them: in place, PDL where the norm has it.
FLASHINFER = """
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <flashinfer/norm.cuh>
#include <flashinfer/pos_enc.cuh>

using tvm::ffi::TensorView;
using Bf16 = nv_bfloat16;

static Bf16* data(TensorView x) { return static_cast<Bf16*>(x.data_ptr()); }
static cudaStream_t stream(TensorView x) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, x.device().device_id));
}
static void check(cudaError_t code) {
  if (code != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(code);
}

void rmsnorm(TensorView x, TensorView weight, double eps) {
  check(flashinfer::norm::QKRMSNorm<Bf16>(data(x), data(weight), data(x), x.size(0), x.size(1),
                                          x.size(2), x.stride(0), x.stride(1), x.stride(0),
                                          x.stride(1), eps, true, stream(x)));
}
void rope(TensorView q, TensorView k, TensorView table, TensorView positions, bool interleaved) {
  check(flashinfer::BatchQKApplyRotaryPosIdsCosSinCache<Bf16, int64_t>(
      data(q), data(k), data(q), data(k), static_cast<float*>(table.data_ptr()),
      static_cast<int64_t*>(positions.data_ptr()), q.size(0), q.size(1), k.size(1), table.size(1),
      q.size(2), q.stride(0), q.stride(1), k.stride(0), k.stride(1), q.stride(0), q.stride(1),
      k.stride(0), k.stride(1), interleaved, stream(q)));
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rmsnorm, rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope, rope);
"""
# Named by FlashInfer's headers, used by nothing that is compiled here.
UNUSED_HEADERS = ("cublasLt.h", "cublas_v2.h", "curand_kernel.h")


@dataclass(frozen=True)
class Source:
    """A wheel and what to take from it: `take(wheel, scratch folder, folder of the peers)`."""

    requirement: str
    take: Callable[[Path, Path, Path], None]


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """A command that must succeed; its output is shown if it does not."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{words[0]} ended with {done.returncode}:\n{said}")


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, without what it depends on; one already there is taken."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        run(
            *(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "-d", folder, requirement),
        )
    return next(folder.glob(pattern))


def extract(wheel: Path, starts: Sequence[str], into: Path) -> list[Path]:
    """The members of a wheel whose names begin so. LookupError if there are none."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(tuple(starts)) and n[-1] != "/"]
        if not names:
            raise LookupError(f"{wheel.name}: got nothing that begins with {' or '.join(starts)}")
        archive.extractall(into, names)
    return [into / name for name in names]


def pick(cubins: Iterable[Path], symbols: Sequence[str]) -> Path:
    """The one file of machine code that holds every kernel; sm_90a before sm_90.

    LookupError naming the first kernel that is missing from the nearest.
    """
    wanted = [symbol.encode() for symbol in symbols]
    nearest: tuple[int, str] | None = None
    for path in sorted(cubins, key=lambda path: (".sm_90a." not in path.name, path.name)):
        held = path.read_bytes()
        absent = [name.decode() for name in wanted if name + b"\0" not in held]
        if not absent:
            return path
        nearest = min(nearest or (len(wanted) + 1, ""), (len(absent), absent[0]))
    if nearest is None:
        raise LookupError("got no machine code for sm_90")
    raise LookupError(f"no file holds all {len(wanted)} kernels; the nearest lacks {nearest[1]}")


def machine_code(
    library: str, symbols: Sequence[str], name: str
) -> Callable[[Path, Path, Path], None]:
    """Takes the cubin that holds `symbols` out of the shared `library` of a wheel."""

    def take(wheel: Path, scratch: Path, into: Path) -> None:
        (path,) = extract(wheel, [library], scratch)
        dumped = scratch / "cubins"
        dumped.mkdir()
        run(cuobjdump(scratch), "-xelf", "sm_90", path.resolve(), cwd=dumped)
        shutil.copyfile(pick(dumped.glob("*.cubin"), symbols), into / f"{name}.cubin")

    return take


def cuobjdump(scratch: Path) -> Path:
    """NVIDIA's tool: the one on the path, else from its wheel (half a megabyte)."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    (tool,) = extract(download(CUOBJDUMP, scratch), ["nvidia/cu13/bin/cuobjdump"], scratch)
    tool.chmod(0o755)
    return tool


def build(source: str, flags: Sequence[str], includes: Sequence[Path], library: Path) -> None:
    """Compile one translation unit to a library on tvm-ffi's C ABI."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

    unit = library.with_suffix(".cu")
    unit.write_text(source)
    headers = [*includes, Path(find_include_path()), Path(find_dlpack_include_path())]
    ffi = Path(find_libtvm_ffi())
    run(
        *(os.environ.get("NVCC", "nvcc"), "-shared", "-Xcompiler", "-fPIC", *ARCH, *flags),
        *(f"-I{path}" for path in headers),
        *(unit, "-o", library, f"-L{ffi.parent}", f"-l{ffi.stem.removeprefix('lib')}"),
    )
    unit.unlink()


def sglang(wheel: Path, scratch: Path, into: Path) -> None:
    """The optimised kernel for each head_dim and pairing, and the diffusion models' kernel."""
    jit = scratch / "sglang/kernels/jit"
    starts = ["include/sgl_kernel/", "csrc/elementwise/fused_qknorm_rope.cuh"]
    starts.append("csrc/diffusion/qknorm_rope.cuh")
    extract(wheel, [f"sglang/kernels/jit/{start}" for start in starts], scratch)
    includes = [jit / "include", jit / "csrc"]
    export = EXPORT.format(name="fused_qk_norm_rope", function="sglang::fused_qk_norm_rope")
    source = '#include "elementwise/fused_qknorm_rope.cuh"\n' + export
    for head_dim in (64, 128, 256):
        for pairs, pairing in enumerate(("half", "interleaved")):
            numbers = (f"-DJIT_HEAD_DIM={head_dim}", f"-DJIT_INTERLEAVE={pairs}", "-DJIT_YARN=0")
            flags = (*SGLANG_FLAGS, "--use_fast_math", *numbers)
            build(source, flags, includes, into / f"sglang_{head_dim}_{pairing}.so")
    source = '#include "diffusion/qknorm_rope.cuh"\n'
    for head_dim, rotary in DIFFUSION:
        for half in (True, False):
            # PDL; bf16 on a float32 table, half width; no rounding between norm and rotation
            knobs = f"{head_dim}, {rotary}, {str(half).lower()}, true, sglang::bf16_t, "
            knobs += "sglang::fp32_t, false, false"
            pairing = "half" if half else "interleaved"
            source += EXPORT.format(
                name=f"qknorm_rope_{head_dim}_{rotary}_{pairing}",
                function=f"sglang::QKNormRopeKernel<{knobs}>::run",
            )
    build(source, SGLANG_FLAGS, includes, into / "sglang_diffusion.so")


def flashinfer(wheel: Path, scratch: Path, into: Path) -> None:
    """RMS norm by head and rotation from a table: the CUDA forms of both."""
    data = scratch / "flashinfer/data"
    extract(wheel, ["flashinfer/data/include/", "flashinfer/data/cccl/"], scratch)
    unused = scratch / "unused"
    unused.mkdir()
    for name in UNUSED_HEADERS:
        (unused / name).touch()
    cccl = [data / "cccl" / part for part in ("cub", "libcudacxx/include", "thrust")]
    build(FLASHINFER, FLASHINFER_FLAGS, [*cccl, data / "include", unused], into / "flashinfer.so")


def liger(wheel: Path, scratch: Path, into: Path) -> None:
    """The package as it is: Python and Triton."""
    shutil.rmtree(into / "site", ignore_errors=True)
    extract(wheel, ["liger_kernel/"], into / "site")


SOURCES: dict[str, Source] = {
    "sgl_kernel": Source(
        "sgl-kernel==0.3.21",
        machine_code("sgl_kernel/sm90/common_ops.abi3.so", SGL_KERNEL_SYMBOLS, "sgl_kernel"),
    ),
    "vllm": Source(
        "vllm==0.33.0", machine_code("vllm/_C_stable_libtorch.abi3.so", VLLM_SYMBOLS, "vllm")
    ),
    "sglang": Source("sglang==0.5.23", sglang),
    "flashinfer": Source("flashinfer-python==0.7.2.post1", flashinfer),
    "liger": Source("liger-kernel==0.8.5", liger),
}


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, one peer after the other; 1 if one of them could not be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("into", nargs="?", type=Path, default=Path("peers"), metavar="DIR")
    parser.add_argument("--only", action="append", choices=tuple(SOURCES), help="repeatable")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="keep the wheels here")
    args = parser.parse_args(argv)
    args.into.mkdir(parents=True, exist_ok=True)
    listed = args.into / "manifest.json"
    manifest = json.loads(listed.read_text()) if listed.exists() else {}
    failed = 0
    for name in args.only or SOURCES:
        source = SOURCES[name]
        before = size(args.into)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                folder = args.wheels or Path(scratch)
                folder.mkdir(parents=True, exist_ok=True)
                source.take(download(source.requirement, folder), Path(scratch), args.into)
            except (RuntimeError, LookupError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed = 1
                continue
        manifest[name] = source.requirement
        listed.write_text(json.dumps(manifest, indent=2) + "\n")
        print(
            f"{name}: {source.requirement}, {(size(args.into) - before) / 1e6:+.1f} MB", flush=True
        )
    total = size(args.into)
    print(f"{args.into}: {total / 1e6:.1f} MB")
    if total > LIMIT:
        print(f"{args.into}: got {total} bytes, expected at most {LIMIT}", file=sys.stderr)
        failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
