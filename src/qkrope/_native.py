"""The native library: found once, loaded on first use, never at import."""

from __future__ import annotations

import importlib.resources
from functools import cache
from pathlib import Path
from typing import Any

LIBRARY = "libqkrope.so"


def resource(*parts: str) -> Path:
    """A file of the package; in an editable install built files are not beside this one."""
    found = importlib.resources.files("qkrope").joinpath(*parts)
    return Path(str(found))


@cache
def lib() -> Any:
    """The library's functions as a tvm-ffi module (see native/bindings.c)."""
    # torch first: its libgomp is then the one our OpenMP regions share.
    import torch  # noqa: F401
    import tvm_ffi

    path = resource(LIBRARY)
    if not path.is_file():
        raise ImportError(f"{path} is missing: qkrope was not built; run `pip install .`")
    return tvm_ffi.load_module(str(path))


@cache
def entry(release_gil: bool, name: str = "qk_norm_rope") -> Any:
    """The op itself. A CPU call lets other threads run; a launch is too short for that to pay."""
    function = lib().get_function(name)
    function.release_gil = release_gil
    return function


def refuse_foreign(operands: tuple[Any, ...], error: RuntimeError) -> None:
    """Names the tensor, if there is one, that torch could not describe to native code."""
    import torch

    from .extras import GRADIENTS, OPERANDS

    for name, x in zip((*OPERANDS, *GRADIENTS), operands[1:], strict=False):
        if not isinstance(x, torch.Tensor):
            continue
        if x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected a cpu or cuda tensor, got {x.device}") from error
        got = f"layout {x.layout}" if x.layout is not torch.strided else ""
        got = got or ("a nested one" if x.is_nested else str(x.dtype) if x.is_quantized else "")
        try:
            x.data_ptr()
        except RuntimeError:
            got = got or f"a {type(x).__name__} without (under torch.func?)"
        if got:
            raise TypeError(
                f"{name}: expected a dense tensor with memory of its own, got {got}"
            ) from error
