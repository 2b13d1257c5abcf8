"""The CPU backend: one native call, which checks, computes the angles and runs the kernel."""

from __future__ import annotations

from typing import Any

from .._native import entry, refuse_foreign

_native: Any = None
_native_backward: Any = None


def qk_norm_rope(plan: Any, *operands: Any) -> None:
    """Run one call; ``operands`` as native/bindings.c lists them after the plan."""
    global _native
    if _native is None:
        _native = entry(True)
    try:
        _native(plan.handle, *operands)
    except RuntimeError as error:
        refuse_foreign(operands, error)
        raise


def qk_norm_rope_backward(plan: Any, *operands: Any) -> None:
    """Run the gradients of one call; ``operands`` likewise."""
    global _native_backward
    if _native_backward is None:
        _native_backward = entry(True, "qk_norm_rope_backward")
    try:
        _native_backward(plan.handle, *operands)
    except RuntimeError as error:
        refuse_foreign(operands, error)
        raise
