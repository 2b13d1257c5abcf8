"""The CPU backend: one native call, which checks, computes the angles and runs the kernel."""

from __future__ import annotations

from typing import Any

from .._native import entry


def qk_norm_rope(plan: Any, *operands: Any) -> None:
    """Run one checked call; ``operands`` as native/bindings.c lists them after the plan."""
    entry(True)(plan.handle, *operands)
