"""qkrope behind SGLang's ``fused_qk_norm_rope``.

    import qkrope.integrations.sglang
    qkrope.integrations.sglang.install()     # before a model is built

or, in each process that SGLang starts, with ``SGLANG_PLUGINS=qkrope`` in its environment (releases
that have plugins). SGLang calls it for models that take it with ``--enable-fused-qk-norm-rope``.
Three modules of released wheels define the call, with one signature:

    sgl_kernel                                          sgl-kernel 0.3, sglang-kernel 0.4
    sglang.jit_kernel.fused_qknorm_rope                 sglang 0.5.10, 0.5.13
    sglang.kernels.ops.attention.fused_qknorm_rope      sglang 0.5.17, 0.5.21, 0.5.23

`install` puts ours in place of each name there, and of each name that a loaded module of SGLang has
imported from there; what is imported later finds ours. What it cannot reach: a function that was
stored elsewhere (in a list, an attribute of an object, a closure), ``torch.ops.sgl_kernel``, and
what a model asked `can_use_fused_qk_norm_rope` before.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from .. import compat

__all__ = ["install", "plugin", "uninstall"]

_MODULES = (
    "sgl_kernel",
    "sglang.jit_kernel.fused_qknorm_rope",
    "sglang.kernels.ops.attention.fused_qknorm_rope",
)
_PACKAGES = ("sglang", "sgl_kernel")  # in whose modules imported names are looked for
_NAMES = ("fused_qk_norm_rope", "fused_qk_norm_rope_out", "can_use_fused_qk_norm_rope")
_Function = Callable[..., Any]
_replaced: list[tuple[_Function, _Function]] = []  # SGLang's function and ours in its place


def install() -> tuple[str, ...]:
    """Put qkrope's functions in place of SGLang's, in every loaded module that names them.

    Returns the names that were replaced; a second call replaces what was loaded meanwhile.
    Raises ImportError where none of the modules that define them is there, with the reason for
    each, and where one is there and does not load; RuntimeError where one has another signature.
    Nothing is changed then.
    """
    known = {id(theirs) for theirs, _ in _replaced} | {id(ours) for _, ours in _replaced}
    found: list[tuple[str, _Function]] = []
    missing = []
    for path in _MODULES:
        try:
            module = importlib.import_module(path)
        except Exception as error:  # a library that does not load raises what it likes
            said = f"{path} ({type(error).__name__}: {error})"
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent is None or not f"{path}.".startswith(f"{absent}."):
                raise ImportError(f"SGLang: expected a module that loads, got {said}") from error
            missing.append(said)
            continue
        functions = {name: getattr(module, name, None) for name in _NAMES}
        if functions[_NAMES[0]] is None:
            missing.append(f"{path} (without {_NAMES[0]})")
            continue
        for name, function in functions.items():
            if function is not None and id(function) not in known:
                _check_signature(f"{path}.{name}", name, function)
                found.append((name, function))
    if len(missing) == len(_MODULES):
        raise ImportError("SGLang: expected one of its modules, got " + "; ".join(missing))
    _replaced.extend((function, _replacement(name)) for name, function in found)
    return tuple(_replace({id(theirs): ours for theirs, ours in _replaced}))


def uninstall() -> tuple[str, ...]:
    """Put SGLang's functions back, also where ours were imported since; returns the names."""
    names = tuple(_replace({id(ours): theirs for theirs, ours in _replaced}))
    _replaced.clear()
    return names


def plugin() -> None:
    """`install` where ``SGLANG_PLUGINS`` names qkrope: the entry point that SGLang calls."""
    if "qkrope" in os.environ.get("SGLANG_PLUGINS", "").replace(" ", "").split(","):
        install()


def _check_signature(path: str, name: str, function: Any) -> None:
    """Raise RuntimeError where a call could mean something else to ours."""
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    expected = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if isinstance(function, torch._ops.OpOverloadPacket):
        got = [argument.name for argument in function.default._schema.arguments]
    else:
        got = list(inspect.signature(function).parameters)
    if got != expected:
        raise RuntimeError(
            f"{path}: expected the parameters ({', '.join(expected)}), got ({', '.join(got)})"
        )


def _replacement(name: str) -> _Function:
    """One of ours: a function of its own for each of SGLang's, so that each finds its way back."""
    function = getattr(compat, name)
    op: Any = None if name.startswith("can") else _op(name)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        # A traced call is one node, whose Spec is not made in the graph.
        if op is not None and torch.compiler.is_compiling():
            return op(*args, **keywords)
        return function(*args, **keywords)

    return call


@functools.cache
def _op(name: str) -> Any:
    """A function of ``qkrope.compat`` as ``torch.ops.qkrope``'s, registered once a process."""
    function = getattr(compat, name)
    _library.define(name + torch.library.infer_schema(function, mutates_args=["qkv"]))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkrope::{name}", lambda *args, **keywords: None, lib=_library)
    return getattr(torch.ops.qkrope, name).default


_library = torch.library.Library("qkrope", "FRAGMENT")


def _replace(by: dict[int, _Function]) -> Iterator[str]:
    """Replace functions, by their id, wherever a loaded module of SGLang names them; say where."""
    for path, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and path.partition(".")[0] in _PACKAGES:
            for name, value in list(vars(module).items()):
                if (new := by.get(id(value))) is not None:
                    setattr(module, name, new)
                    yield f"{path}.{name}"
