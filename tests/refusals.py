"""What test_errors.py and test_overlap.py share: a good call, and the check of a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import qkrope
from cases import bits
from qkrope.spec import Norm, Rope, Spec

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
I16, I32, I64 = torch.int16, torch.int32, torch.int64
SPEC = Spec(2, 1, 8, rope=Rope(dim=4))
NO_NORM = replace(SPEC, norm=Norm(kind="none"))
NO_ROPE = replace(SPEC, rope=None)
ROW = replace(SPEC, norm=Norm(scope="row"))
PART = replace(SPEC, norm=Norm(dim=6))
V_NORM = replace(SPEC, v_norm=Norm())
AXES = replace(SPEC, rope=Rope(dim=4, mrope_section=(1, 1)))
UNPACKED = pytest.mark.parametrize("call", [qkrope.qk_norm_rope, qkrope.qk_norm_rope_])

Args = dict[str, Any]


def maker(device: str) -> Callable[..., Tensor]:
    """n(*shape, dtype): random floats, or integers that count from 0, on a device."""

    def n(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            drawn = torch.complex64 if dtype.is_complex else FP32
            return torch.randn(shape, dtype=drawn).to(device, dtype)
        return torch.arange(torch.Size(shape).numel()).view(shape).to(device, dtype)

    return n


def fake(*shape: int) -> Tensor:
    with FakeTensorMode():
        return torch.empty(*shape, dtype=BF16)


def good(n: Callable[..., Tensor]) -> Args:
    """The arguments of a call without a fault."""
    return {
        "q": n(3, 2, 8),
        "k": n(3, 1, 8),
        "q_weight": n(8),
        "k_weight": n(8),
        "positions": n(3, dtype=I64),
        "spec": SPEC,
    }


def packed(args: Args, qkv: Any) -> Args:
    """The same arguments for the packed call."""
    return {"qkv": qkv, **{name: x for name, x in args.items() if name not in ("q", "k")}}


@dataclass(frozen=True)
class Row:
    """One fault: ``change | error | argument | text | text ...`` of a table.

    change: the arguments that differ from a good call's, as the arguments of dict(); n makes
    tensors. error: V for ValueError, T for TypeError. The message is "argument: ...", with each
    text in it.
    """

    change: str
    error: type[Exception]
    name: str
    texts: tuple[str, ...]

    def apply(self, n: Callable[..., Tensor]) -> Args:
        names = {**globals(), "n": n, "Norm": Norm, "replace": replace, "torch": torch}
        return dict(eval(f"dict({self.change})", names))


def table(text: str) -> Any:
    """A parametrization of ``row`` by the lines of a table."""
    rows = []
    for line in text.strip().splitlines():
        change, error, name, *texts = (cell.strip() for cell in line.split("|"))
        rows.append(Row(change, {"V": ValueError, "T": TypeError}[error], name, tuple(texts)))
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.change)


def snapshot(value: Any) -> list[Tensor]:
    """The bits of every tensor in the arguments that has any."""
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and value.layout is torch.strided
        plain = plain and value.device.type in ("cpu", "cuda") and not value.dtype.is_complex
        return [bits(value.resolve_neg()).clone()] if plain else []
    items = value.values() if isinstance(value, dict) else value
    return (
        [t for item in items for t in snapshot(item)]
        if isinstance(value, tuple | list | dict)
        else []
    )


def refuses(
    call: Callable[..., Any], args: Args, error: type[Exception], name: str, *texts: str
) -> None:
    """``call(**args)`` raises ``error``: "name: ..." with each text in it; and no bit changes.

    With a Spec that was never used, and with one that keeps its plan from an earlier call.
    """
    before = snapshot(args)
    given = args["spec"]
    for spec in (replace(given) if isinstance(given, Spec) else given, given):
        with pytest.raises(Exception) as raised:
            call(**{**args, "spec": spec})
        message = str(raised.value)
        assert type(raised.value) is error, f"{raised.type.__name__}: {message}"
        assert message.startswith(f"{name}: "), message
        assert "expected" in message and "\n" not in message and len(message) < 300, message
        for text in texts:
            assert text in message, f"{text!r} is not in {message!r}"
        for was, now in zip(before, snapshot(args), strict=True):
            assert torch.equal(was, now), "something was written"


def keep_plans() -> None:
    """Run each Spec here once: a packed call then takes its short way."""
    n = maker("cpu")
    for spec in (SPEC, NO_NORM, NO_ROPE):
        weights = (None, None) if spec is NO_NORM else (n(8), n(8))
        qkrope.qkv_norm_rope_(n(1, 32), *weights, n(1, dtype=I64), spec)
        assert spec.__dict__["_plan"] is not None
