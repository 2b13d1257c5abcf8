"""Variant -> cubin, by NVRTC, which is imported only on a cache miss."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from .. import _native
from ..errors import CompileError
from ..variant import Variant
from . import cache as disk

SCHEMA = 1
STANDARD = "c++17"
_COMMON = ("params.h", "math.h", "ptx.cuh", "lanes.cuh")
_PLAIN = (*_COMMON, "rows.cuh", "turns.cuh", "kernel.cu")
_BACKWARD = (*_COMMON, "rows.cuh", "turns.cuh", "backward.h", "sums.cuh", "backward.cu")
_OPTIONS = (*_COMMON, "channels.cuh", "options.cuh", "angles.cuh", "heads.cuh")
_GENERAL = (*_OPTIONS, "place.cuh", "team.cuh", "general.cu")
_BACKWARD_GENERAL = (*_OPTIONS, "slopes.cuh", "backward.h", "sums.cuh", "backward_general.cu")
_COMPILERS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
_INSTALL = "pip install qkrope[cuda]"


# Named tuples here and in cache.py: five times as fast to define as dataclasses, at each start.


class Resources(NamedTuple):
    """What ptxas reports of one kernel."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


class CompiledVariant(NamedTuple):
    """A cubin for one architecture; ``path`` is its cache entry, None where none could be kept."""

    variant: Variant
    arch: str
    cubin: bytes
    log: str
    cached: bool
    path: Path | None

    @property
    def resources(self) -> dict[str, Resources]:
        """Registers, stack frame and spills of each kernel, by its layout."""
        return parse_log(self.log)


@cache
def _body(names: tuple[str, ...]) -> str:
    """The device sources as one text without includes: what is hashed is what is compiled."""
    texts = (_native.resource("native", name).read_text() for name in names)
    return "".join(re.sub(r'^#include ".*"\n', "", text, flags=re.MULTILINE) for text in texts)


def source(variant: Variant) -> str:
    """The complete translation unit of a variant."""
    sources = {
        (False, False): _PLAIN,
        (True, False): _GENERAL,
        (False, True): _BACKWARD,
        (True, True): _BACKWARD_GENERAL,
    }[variant.options is not None, variant.backward]
    return variant.macros() + _body(sources)


@cache
def compiler() -> str:
    """Name and version of the NVRTC that would be used."""
    for name in _COMPILERS:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    try:  # not from PyPI: ask the library itself
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:
        raise CompileError(f"NVRTC is missing ({error}); {_INSTALL}") from error
    return f"nvrtc {major}.{minor}"


def key(variant: Variant, arch: str) -> str:
    """The cache key: sources by content, options, architecture, compiler, schema."""
    parts = (str(SCHEMA), STANDARD, arch, compiler(), source(variant))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def arch_name(major: int, minor: int) -> str:
    """The architecture of a device's compute capability, as NVRTC names it."""
    return f"sm_{major}{minor}"


def compile_variant(variant: Variant, arch: str, *, use_cache: bool = True) -> CompiledVariant:
    """The cubin of ``variant`` for ``arch`` ("sm_90"), from the cache or from NVRTC.

    Raises CompileError with the compiler's log where NVRTC refuses or is missing.
    """
    name = key(variant, arch)
    if use_cache:
        found = disk.read(name)
        if found is not None:
            kept = disk.directory() / f"{name}.cubin"
            return CompiledVariant(variant, arch, found.cubin, found.log, True, kept)
    cubin, log = _nvrtc(source(variant), arch)
    path = disk.write(name, disk.Entry(cubin, log)) if use_cache else None
    return CompiledVariant(variant, arch, cubin, log, False, path)


def _nvrtc(text: str, arch: str) -> tuple[bytes, str]:
    # NVIDIA's cuda.core, on top of these bindings, would say the same in fewer lines; but its
    # import costs a first call 60 to 190 ms.
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(
            f"cuda.bindings is missing, and no compiled kernel is cached ({error}); {_INSTALL}"
        ) from error
    log = ""

    def call(name: str, *arguments: Any) -> Any:
        code, *values = getattr(nvrtc, f"nvrtc{name}")(*arguments)
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"nvrtc{name}: {code.name}")
        return values[0] if values else None

    def read(what: str) -> bytes:
        data = bytes(call(f"Get{what}Size", program))
        call(f"Get{what}", program, data)
        return data

    options = [f"--gpu-architecture={arch}", f"--std={STANDARD}", "--minimal", "--ptxas-options=-v"]
    try:
        program = call("CreateProgram", text.encode(), b"qkrope.cu", 0, [], [])
        try:
            call("CompileProgram", program, len(options), [o.encode() for o in options])
            return read("CUBIN"), read("ProgramLog").rstrip(b"\0").decode()
        except RuntimeError:
            log = read("ProgramLog").rstrip(b"\0").decode()
            raise
        finally:
            call("DestroyProgram", program)
    except Exception as error:
        raise CompileError(f"compiling for {arch} failed: {error}\n{log}") from error


_ENTRY = (
    r"Function properties for qkrope_(\w+)\s*\n[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill "
    r"stores, (\d+) bytes spill loads\s*\n[^\n]*?Used (\d+) registers"
)


def parse_log(log: str) -> dict[str, Resources]:
    """ptxas -v output as a table."""
    return {
        layout: Resources(int(registers), int(stack), int(stores), int(loads))
        for layout, stack, stores, loads, registers in re.findall(_ENTRY, log)
    }
