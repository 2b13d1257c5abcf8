"""What only a GPU shows about calls: compiles, capture, hazards on a stream, errors of the driver.

Replays with new inputs, streams, a device that is not current, and the writers of q, positions,
cos_sin and inv_freq are in test_kernel_rules.py; without a GPU, test_cuda_compile.py and
test_cuda_cache.py.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qkrope
from cases import ANGLES, LAYOUTS, Recipe, assert_same_bits, bits
from qkrope import _native
from qkrope.cuda.compile import compile_variant
from qkrope.spec import DynamicNTK, Norm, Rope, Spec
from qkrope.variant import Variant

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
I32, I64 = torch.int32, torch.int64


def spec_of(
    dim: int = 128, rotary: int = 128, pairing: str = "half", heads: tuple[int, int] = (5, 2)
) -> Spec:
    return Spec(*heads, dim, rope=Rope(rotary, 1e6, pairing))


def run(recipe: Recipe, device: str) -> tuple[Tensor, Tensor]:
    call = recipe.make(device)
    return qkrope.qk_norm_rope(*call.args(), **call.extras)


# ---- compiles and capture ---------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every compile (or read from the disk cache) from here on."""
    from qkrope.cuda import launch

    asked: list[tuple[Any, ...]] = []
    compile_variant = launch.compile_variant

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return compile_variant(*args, **kwargs)

    monkeypatch.setattr(launch, "compile_variant", spy)
    return asked


@pytest.mark.parametrize("weight_dtype", [None, FP32])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_after_warmup_nothing_compiles(
    cuda: str, compiled: list[Any], pairing: str, weight_dtype: torch.dtype | None
) -> None:
    """In any layout, for any angle source, with and without weights, for other eps and theta."""
    spec = spec_of(44, 20, pairing)
    qkrope.warmup(spec, device=cuda, dtype=BF16, weight_dtype=weight_dtype)
    assert compiled
    compiled.clear()
    qkrope.warmup(spec, device="cuda:0", dtype=BF16, weight_dtype=weight_dtype)
    base = Recipe(spec, lead=(2, 5), weight_dtype=weight_dtype)
    for layout in (*LAYOUTS, "packed"):
        for angle in ANGLES:
            for weights in ("both", "q", "-"):
                run(base.but(layout=layout, angle=angle, weights=weights), cuda)
    for dtype in (I32, I64):
        for shape in ("full", "last", "one"):
            run(base.but(position_dtype=dtype, position_shape=shape), cuda)
    for sides in ("q", "k"):
        run(base.but(sides=sides), cuda)
    run(base.but(k_lead=(2, 3)), cuda)
    run(base.but(angle="pair", table_dtype=BF16), cuda)
    for other in (
        replace(spec, norm=Norm(eps=1e-3, weight_offset=1.0)),
        replace(spec, num_q_heads=3, num_kv_heads=1),
        replace(spec, rope=replace(spec.rope, theta=7e3)),
        replace(spec, rope=replace(spec.rope, scaling=qkrope.YaRN.from_ramp(4.0, 1.0, 5.0, 1.2))),
        replace(spec, rope=replace(spec.rope, scaling=qkrope.Linear(factor=3.0))),
    ):
        run(base.but(spec=other), cuda)
    assert not compiled, compiled


def test_a_new_length_compiles_nothing(cuda: str, compiled: list[Any]) -> None:
    scaling = DynamicNTK(factor=2.0, original_max_position_embeddings=512)
    spec = replace(spec_of(44, 24), rope=Rope(24, scaling=scaling))
    qkrope.warmup(spec, device=cuda, dtype=BF16, seq_len=512)
    compiled.clear()
    call = Recipe(spec, lead=(9,)).make(cuda)
    for length in (512, 700, 4096):
        qkrope.qk_norm_rope(*call.args(), seq_len=length)
    assert not compiled


def test_a_first_call_from_many_threads(cuda: str, compiled: list[Any]) -> None:
    recipe = Recipe(spec_of(52, 20), lead=(9,))
    calls = [recipe.make(cuda) for _ in range(6)]
    start, results = threading.Barrier(len(calls)), []

    def work(index: int) -> None:
        start.wait()
        results.append(qkrope.qk_norm_rope(*calls[index].args()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(calls) and len(compiled) == 1
    for result in results:
        calls[0].check(*result)


@pytest.mark.parametrize("packed", [True, False])
def test_a_first_call_while_capturing(cuda: str, packed: bool) -> None:
    """It raises, with the way out, and what else is captured can be used."""
    spec = spec_of(46, 22 if packed else 18)
    call = Recipe(spec, lead=(9,), layout="packed").make(cuda)
    x = torch.ones(8, device=cuda)
    before = bits(call.qkv).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(RuntimeError, match=r"call qkrope.warmup\(spec, device, dtype\) with"):
            if packed:
                qkrope.qkv_norm_rope_(call.qkv, *call.rest())
            else:
                qkrope.qk_norm_rope_(*call.args())
        x *= 3
    graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == [6.0] * 8
    assert torch.equal(bits(call.qkv), before)

    qkrope.warmup(spec, device=cuda, dtype=BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = qkrope.qk_norm_rope(*call.args())
    graph.replay()
    torch.cuda.synchronize()
    call.check(*outputs)


@pytest.mark.parametrize("angle", ANGLES)
def test_each_angle_in_a_graph_after_warmup(cuda: str, angle: str) -> None:
    """Many launches in one graph: each kernel node waits for the one before."""
    spec = spec_of(56, 24)
    qkrope.warmup(spec, device=cuda, dtype=BF16)
    recipe = Recipe(spec, lead=(33,), angle=angle)
    call, eager = recipe.make(cuda), recipe.make(cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            qkrope.qk_norm_rope_(*call.args(), **call.extras)
    graph.replay()
    for _ in range(10):
        qkrope.qk_norm_rope_(*eager.args(), **eager.extras)
        torch.cuda.synchronize()
    assert_same_bits(call.q, eager.q)
    assert_same_bits(call.k, eager.k)


# ---- hazards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["weights", "cos_sin_cache", "out"])
@pytest.mark.parametrize("calls", [1, 2])
def test_reads_what_the_previous_kernel_wrote(cuda: str, writer: str, calls: int) -> None:
    """As in test_kernel_rules.py, for weights in training (grad mode on, no gradient needed).

    With two calls the second starts while the writer before the first may still run.
    """
    recipe = Recipe(spec_of(), lead=(64,), angle="cache" if writer == "cos_sin_cache" else "spec")
    call, seeds = recipe.make(cuda), [recipe.but(seed=s).make(cuda) for s in (1, 2)]
    assert torch.is_grad_enabled()

    def written(source: Any) -> Iterator[tuple[Tensor, Tensor]]:
        if writer == "weights":
            yield call.q_weight, source.q_weight
            yield call.k_weight, source.k_weight
        elif writer == "cos_sin_cache":
            yield call.extras["cos_sin_cache"], source.extras["cos_sin_cache"]
        else:  # what is written over: the older writer must not win
            yield out[0], source.q
            yield out[1], source.k

    out = torch.empty_like(call.q), torch.empty_like(call.k)
    expected = []
    for source in seeds:
        for target, value in written(source):
            target.copy_(value)
        torch.cuda.synchronize()
        expected.append([t.clone() for t in qkrope.qk_norm_rope(*call.args(), **call.extras)])
    wrong = torch.zeros((), dtype=I64, device=cuda)
    for step in range(2000):
        for target, value in written(seeds[step % 2]):
            target.copy_(value)
        for _ in range(calls):
            qkrope.qk_norm_rope(*call.args(), **call.extras, out=out)
        for y, want in zip(out, expected[step % 2], strict=True):
            wrong += (y != want).sum()
    assert int(wrong) == 0


@pytest.mark.parametrize("tokens", [1, 64, 700])
@pytest.mark.parametrize("grad", [True, False])
def test_a_chain_in_place(cuda: str, tokens: int, grad: bool) -> None:
    """Each call is launched before the last one ends, and reads what it wrote."""
    recipe = Recipe(spec_of(heads=(32, 8)), lead=(tokens,), layout="packed", weights="-")
    with torch.set_grad_enabled(grad):
        for seed in range(20):
            chained, waited = (recipe.but(seed=seed).make(cuda) for _ in range(2))
            torch.cuda.synchronize()
            for _ in range(100):
                qkrope.qkv_norm_rope_(chained.qkv, *chained.rest())
            for _ in range(100):
                qkrope.qkv_norm_rope_(waited.qkv, *waited.rest())
                torch.cuda.synchronize()
            assert_same_bits(chained.qkv, waited.qkv)


def test_a_call_reads_what_the_call_before_wrote(cuda: str) -> None:
    recipe = Recipe(spec_of(), lead=(300,))
    call = recipe.make(cuda)
    a = (torch.empty_like(call.q), torch.empty_like(call.k))
    b = (torch.empty_like(call.q), torch.empty_like(call.k))
    rest = call.rest()
    qkrope.qk_norm_rope(call.q, call.k, *rest, out=a)
    torch.cuda.synchronize()
    qkrope.qk_norm_rope(*a, *rest, out=b)
    torch.cuda.synchronize()
    expected = [t.clone() for t in b]
    wrong = torch.zeros((), dtype=I64, device=cuda)
    for _ in range(2000):
        for t in (*a, *b):
            t.zero_()
        qkrope.qk_norm_rope(call.q, call.k, *rest, out=a)
        qkrope.qk_norm_rope(*a, *rest, out=b)
        for y, want in zip(b, expected, strict=True):
            wrong += (y != want).sum()
    assert int(wrong) == 0


# ---- errors of the driver ---------------------------------------------------------------------


@pytest.fixture
def force() -> Iterator[Callable[..., Any]]:
    """The launcher's grid rule, overridden for a test."""
    function = _native.lib().force_grid
    yield function
    function(0, 0)


def test_a_launch_that_the_driver_refuses(cuda: str, force: Callable[..., Any]) -> None:
    """45 warps are no block: the error is raised at the call, and the next call is fine."""
    call = Recipe(Spec(80, 10, 128), lead=(500,)).make(cuda)
    expected = qkrope.qk_norm_rope(*call.args())
    before = bits(call.q).clone()
    force(1, 64)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx.* failed: CUDA_ERROR_INVALID_VALUE"):
        qkrope.qk_norm_rope_(*call.args())
    force(0, 0)
    torch.cuda.synchronize()
    assert torch.equal(bits(call.q), before)
    for y, want in zip(qkrope.qk_norm_rope(*call.args()), expected, strict=True):
        assert_same_bits(y, want)


def test_a_cubin_that_the_driver_refuses(cuda: str) -> None:
    """One for another architecture; and a device that is not there."""
    load, major = _native.lib().cuda_load, torch.cuda.get_device_capability()[0]
    variant = Variant.of(spec_of(), "bfloat16", None, None, "phase")
    other = compile_variant(variant, "sm_75" if major != 7 else "sm_80", use_cache=False).cubin
    buffer = ctypes.create_string_buffer(other, len(other))
    with pytest.raises(RuntimeError, match="failed: CUDA_ERROR_|a cubin that is not ours"):
        load(torch.cuda.current_device(), ctypes.addressof(buffer))
    with pytest.raises(RuntimeError, match="failed: CUDA_ERROR_INVALID_DEVICE"):
        load(63, ctypes.addressof(buffer))
    with pytest.raises(ValueError, match="got cuda:99, expected one below cuda:64"):
        load(99, ctypes.addressof(buffer))


def test_a_compile_error_is_raised_and_leaves_no_half(
    cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkrope.cuda import launch

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise qkrope.CompileError("no compiler today")

    call = Recipe(spec_of(58, 26), lead=(9,)).make(cuda)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "compile_variant", refuse)
        for _ in range(2):
            with pytest.raises(qkrope.CompileError, match="no compiler today"):
                qkrope.qk_norm_rope_(*call.args())
    call.assert_inputs_unchanged()
    call.check(*qkrope.qk_norm_rope(*call.args()))
