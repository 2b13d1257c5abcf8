"""qkrope: QK-norm and rotary embedding, fused, for any model, exact at every position."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .errors import CompileError
from .spec import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Norm, Rope, Spec, YaRN

if TYPE_CHECKING:  # what _LAZY finds, for type checkers, editors and the documentation
    from . import reference
    from .compat import can_use_fused_qk_norm_rope, fused_qk_norm_rope, fused_qk_norm_rope_out
    from .grid import grid_positions
    from .groups import Group
    from .module import QKNormRope
    from .ops import qk_norm_rope, qk_norm_rope_, qkv_norm_rope_, warmup
    from .ops_groups import norm_rope_groups_

    __version__: str
    """The version of the installed package."""

# Names that need torch are found on first use, so that `import qkrope` costs nothing.
_LAZY = {
    "qk_norm_rope": "ops",
    "qk_norm_rope_": "ops",
    "qkv_norm_rope_": "ops",
    "norm_rope_groups_": "ops_groups",
    "QKNormRope": "module",
    "warmup": "ops",
    "Group": "groups",
    "grid_positions": "grid",
    "fused_qk_norm_rope": "compat",
    "fused_qk_norm_rope_out": "compat",
    "can_use_fused_qk_norm_rope": "compat",
}
_MODULES = (
    "reference",
    "ops",
    "compat",
    "angles",
    "bench",
    "config",
    "models",
    "torch_op",
    "module",
)

__all__ = [
    "NTK",
    "CompileError",
    "DynamicNTK",
    "Linear",
    "Llama3",
    "LongRoPE",
    "Norm",
    "Rope",
    "Spec",
    "YaRN",
    "__version__",
    *_LAZY,
    "reference",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    elif name == "__version__":
        value = metadata.version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
