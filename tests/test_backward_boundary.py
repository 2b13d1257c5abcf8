"""Gradients of calls on CUDA tensors as far as they go without a GPU: see test_cuda_boundary.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qkrope import _native
from qkrope.cuda.launch import slot_key
from qkrope.spec import Norm, Spec
from qkrope.variant import Variant
from test_cuda_boundary import BF16, FP32, SPEC, native, noted, operands

NO_DRIVER = pytest.mark.skipif(torch.cuda.is_available(), reason="the real driver is loaded here")


def gradients(
    spec: Spec = SPEC,
    tokens: int = 5,
    *,
    shift: int = 0,
    weights: bool = True,
    k_tokens: int = 0,
    room: int = 0,
    dtype: torch.dtype = BF16,
) -> list[Any]:
    """A good call: x, dy and dx `shift` elements into their memory, whose weights want sums or not.

    k_tokens: k has so many tokens, and positions of its own. room: of the workspace.
    """
    call = operands(spec, dtype)
    sides = []
    for heads, length in ((spec.num_q_heads, tokens), (spec.num_kv_heads, k_tokens or tokens)):
        shape = (length, heads, spec.head_dim)
        count = torch.Size(shape).numel()
        sides.append(
            [torch.zeros(count + shift, dtype=dtype)[shift:].view(shape) for _ in range(3)]
        )
    (q, dq, dy_q), (k, dk, dy_k) = sides
    call[3], call[4] = q, k
    call[7] = torch.arange(tokens) if spec.rope else None
    call += [torch.arange(k_tokens) if k_tokens else None, *(None,) * 4, dq, dk]
    call += [*(None,) * 7, None, None, 0, -1]
    sums = [torch.zeros(spec.head_dim) for _ in "qk"] if weights else [None, None]
    rows = _native.lib().backward_partials(call[0], max(tokens, k_tokens), 132)
    workspace = torch.zeros(room or rows * 2 * spec.head_dim) if weights else None
    return [*call, dy_q, dy_k, None, *sums, None, None, None, workspace]


def key(spec: Spec = SPEC, general: bool = False, dtype: torch.dtype = BF16) -> int:
    return slot_key(Variant.of(spec, str(dtype)[6:], None, None, "phase", general, True), 0)


def backward(call: list[Any]) -> int | None:
    return native(call, "qk_norm_rope_backward")


def test_a_call_asks_for_its_kernel() -> None:
    assert backward(gradients()) == key()
    assert backward(gradients(weights=False)) == key()
    layer = Spec(3, 2, 64, norm=Norm("layer"))
    assert backward(gradients(layer)) == key(layer)


def test_what_makes_a_call_general() -> None:
    for at, value in ((22, torch.ones(5, 3, 1, dtype=BF16)), (24, 1)):
        call = gradients()
        call[at] = value
        assert backward(call) == key(general=True), at
    call = gradients()
    call[5] = call[6] = torch.ones(3, 64, dtype=BF16)
    call[6] = call[6][:2]
    call[29], call[30] = torch.zeros(3, 64), torch.zeros(2, 64)
    call[-1] = torch.zeros(1000 * 5 * 64)
    assert backward(call) == key(general=True)


def test_what_is_refused() -> None:
    """Nothing else than good calls of above: the checks of both backends are one code."""
    for at, value in (
        (13, None),  # nowhere for dq
        (26, None),  # no gradient of q's result
        (26, torch.zeros(5, 3, 64, dtype=FP32)),
        (26, torch.zeros(5, 2, 64, dtype=BF16)),
        (29, torch.zeros(64, dtype=BF16)),
        (29, torch.zeros(3, 64)),
        (-1, None),
        (-1, torch.zeros(64 * 4, dtype=BF16)),
    ):
        call = gradients()
        call[at] = value
        assert backward(call) is None, (at, value)


LAUNCH = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import torch
from qkrope import _native
from qkrope.spec import Norm, Rope, Spec
from test_backward_boundary import backward, gradients, key
kernels = _native.lib().cuda_load(0, id(sys))
for spec, tokens, more in eval(sys.argv[2]):
    call = gradients(spec, tokens, **more)
    dtype = more.get("dtype", torch.bfloat16)
    _native.lib().cuda_bind(call[0], key(spec, dtype=dtype), 0, kernels)
    sys.stdout.flush()
    print("answer", backward(call), flush=True)
"""


@NO_DRIVER
def test_launches(tmp_path: Path) -> None:
    """The kernel of the gradients, then that of the sums; a large call has more blocks than the
    device holds; each part of a call on its own; nothing for no tokens.
    """
    calls = """[
        (Spec(32, 8, 128), 1, {}),
        (Spec(32, 8, 128), 1024, {}),
        (Spec(32, 8, 128), 1024, {"weights": False}),
        (Spec(32, 8, 128), 4096, {"weights": False}),
        (Spec(32, 8, 128), 100000, {}),
        (Spec(32, 8, 128), 0, {}),
        (Spec(8, 2, 512), 4096, {}),
        (Spec(3, 2, 64, rope=Rope(32)), 9, {"k_tokens": 12}),
        (Spec(32, 8, 128), 64, {"shift": 1}),
        (Spec(3, 2, 90), 64, {}),
        (Spec(32, 8, 128, norm=Norm("layer")), 4096, {}),
        (Spec(48, 8, 128, norm=Norm(scope="row")), 4096, {}),
        (Spec(32, 8, 128), 64, {"room": 255}),
        (Spec(32, 8, 128, norm=Norm("layer")), 64, {"room": 15 * 256}),
        (Spec(32, 8, 128, norm=Norm("layer")), 64, {"room": 16 * 256}),
    ]"""
    assert noted(tmp_path, LAUNCH, calls) == [
        "qkrope_vector2 2 1 1 32 8 0",
        "qkrope_sums 64 2 1 32 8 0",
        "answer 0",
        "qkrope_vector2 257 1 1 32 8 0",
        "qkrope_sums 64 2 1 32 8 0",
        "answer 0",
        "qkrope_vector2 640 1 1 32 4 0",
        "answer 0",
        "qkrope_vector2 5120 1 1 32 4 0",
        "answer 0",
        "qkrope_vector2 1052 1 1 32 8 0",
        "qkrope_sums 64 2 1 32 8 0",
        "answer 0",
        "answer 0",
        "qkrope_vector1 257 1 1 32 8 0",
        "qkrope_sums 256 2 1 32 8 0",
        "answer 0",
        "qkrope_vector2 1 1 1 32 8 0",
        "qkrope_sums 32 1 1 32 8 0",
        "qkrope_vector2 1 1 1 32 8 0",
        "qkrope_sums 32 1 1 32 8 0",
        "answer 0",
        "qkrope_scalar 160 1 1 32 8 0",
        "qkrope_sums 64 2 1 32 8 0",
        "answer -1",
        "qkrope_scalar 20 1 1 32 8 0",
        "qkrope_sums 45 2 1 32 8 0",
        "answer 0",
        "qkrope_vector1 520 1 1 32 4 0",
        "qkrope_sums 64 2 1 32 8 0",
        "answer 0",
        "qkrope_vector1 130 1 1 32 12 0",
        "qkrope_sums 64 2 1 32 8 0",
        "answer 0",
        "answer None",
        "answer None",
        "qkrope_vector1 32 1 1 32 4 0",
        "qkrope_sums 64 2 1 32 8 0",
        "answer 0",
    ]


@NO_DRIVER
def test_a_large_call_with_sums_has_rounds_of_blocks(tmp_path: Path) -> None:
    """From 40 steps of a warp on, 16 bits wide, or 20 of 32 bits: the same bytes."""
    calls = """[
        (Spec(32, 8, 128), 8448, {}),
        (Spec(32, 8, 128), 8449, {}),
        (Spec(32, 8, 128), 4224, {"dtype": torch.float32}),
        (Spec(32, 8, 128), 4225, {"dtype": torch.float32}),
    ]"""
    launches = noted(tmp_path, LAUNCH, calls)
    blocks = [int(line.split()[1]) for line in launches if line.startswith("qkrope_vector2")]
    most = 132 * 16 // 8
    assert len(blocks) == 4
    assert all(most // 2 < few <= most for few in blocks[::2])
    assert all(2 * most < many <= 4 * most for many in blocks[1::2])
