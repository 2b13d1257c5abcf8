"""Calls on a GPU: the native call, and the build it asks for when a kernel is missing."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from .._native import entry, lib, refuse_foreign
from ..spec import Spec
from ..variant import ANGLES, DTYPES, Variant
from .compile import arch_name, compile_variant

_lock = threading.Lock()
_loaded: dict[tuple[Variant, int], int] = {}
_ahead: dict[tuple[Variant, int], bytes] = {}  # compiled, not loaded yet
_bound: set[tuple[int, int]] = set()
_native: Any = None
_DEVICES = 1 << 16  # a key has the device in 16 bits, and above them whether it is of a backward


def qk_norm_rope(plan: Any, *operands: Any) -> None:
    """Run one call; ``operands`` as native/bindings.c lists them after the plan."""
    try:
        answer = (_native or _bind_entry())(plan.handle, *operands)
    except RuntimeError as error:
        refuse_foreign(operands, error)
        raise
    if answer > 0:
        build(plan, answer)
        answer = _native(plan.handle, *operands)
        if answer > 0:
            raise RuntimeError("a kernel that was just built is missing (a bug in qkrope)")
    if answer:
        warnings.warn(_SLOW[answer], RuntimeWarning, stacklevel=4)


def qk_norm_rope_backward(plan: Any, *operands: Any) -> None:
    """Run the gradients of one call; ``operands`` likewise."""
    run = entry(False, "qk_norm_rope_backward")
    try:
        answer = run(plan.handle, *operands)
    except RuntimeError as error:
        refuse_foreign(operands, error)
        raise
    if answer > 0:
        build(plan, answer)
        answer = run(plan.handle, *operands)
        if answer > 0:
            raise RuntimeError("a kernel that was just built is missing (a bug in qkrope)")
    if answer:
        warnings.warn(_SLOW[answer], RuntimeWarning, stacklevel=4)


# What the native call says of a slow path, once a process each.
_SLOW = {
    -1: "qkrope: rows that are not aligned to 8 or 16 bytes are read one element at a time; align "
    "pointers and strides for full speed (said once)",
    -2: "qkrope: head_dim and rotary dim of this Spec leave no aligned layout, so its elements are "
    "read one at a time; multiples of 8 run at full speed (said once)",
}


def _bind_entry() -> Any:
    global _native
    _native = entry(False)
    return _native


def build(plan: Any, key: int) -> None:
    """Compile and load what a call of this key runs (see qk_slot_key in native/launcher.c)."""
    if torch.cuda.is_current_stream_capturing():
        more = ", backward=True" if key >> 32 else ""
        raise RuntimeError(
            "qkrope: this call's kernel or angle table is not loaded and cannot be while a CUDA "
            f"graph is being captured; call qkrope.warmup(spec, device, dtype{more}) with the "
            "call's dtypes and seq_len, or make the call once, before the capture"
        )
    variant, device = variant_of(plan.spec, key), key >> 16 & _DEVICES - 1
    with _lock:
        if (plan.handle, key) not in _bound:
            lib().cuda_bind(plan.handle, key, device, load(variant, device))
            _bound.add((plan.handle, key))


def variant_of(spec: Spec, key: int) -> Variant:
    """What runs a Spec's calls of this key."""
    dtype, q_weight, k_weight = (
        DTYPES[key >> at & mask] for at, mask in ((1, 7), (4, 15), (8, 15))
    )
    angle, general, backward = ANGLES[key >> 12 & 7], bool(key >> 15 & 1), bool(key >> 32)
    return Variant.of(spec, dtype, q_weight, k_weight, angle, general, backward)


def slot_key(variant: Variant, device: int) -> int:
    """The key of a variant, as qk_slot_key makes it."""
    numbers = (DTYPES.index(name) for name in (variant.dtype, variant.q_weight, variant.k_weight))
    dtype, q_weight, k_weight = numbers
    angle = ANGLES.index(variant.angle)
    general, backward = variant.options is not None, int(variant.backward)
    weights = q_weight << 4 | k_weight << 8
    return 1 | dtype << 1 | weights | angle << 12 | general << 15 | device << 16 | backward << 32


def compile_ahead(variants: Iterable[Variant], device: int) -> None:
    """Compile what is not loaded yet side by side: NVRTC runs outside the GIL."""
    arch = arch_name(*torch.cuda.get_device_capability(device))
    missing = [v for v in dict.fromkeys(variants) if (v, device) not in _loaded]
    if len(missing) > 1:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor() as pool:
            compiled = pool.map(lambda variant: compile_variant(variant, arch).cubin, missing)
            _ahead.update(zip(((v, device) for v in missing), compiled, strict=True))


def load(variant: Variant, device: int) -> int:
    """The native handle of a variant on a device: compiled and loaded once a process."""
    handle = _loaded.get((variant, device))
    if handle is None:
        arch = arch_name(*torch.cuda.get_device_capability(device))
        cubin = _ahead.pop((variant, device), None) or compile_variant(variant, arch).cubin
        buffer = ctypes.create_string_buffer(cubin, len(cubin))
        handle = lib().cuda_load(device, ctypes.addressof(buffer))
        _loaded[variant, device] = handle
    return handle
