"""What must hold whatever the numbers are: which inputs reach which bits, and from which thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import qkrope
from cases import Recipe, assert_same_bits, fraction_correctly_rounded
from qkrope import reference
from qkrope.accuracy import SLACK, ulp
from qkrope.spec import Norm, Rope, Spec

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
PAIRINGS = pytest.mark.parametrize("pairing", ["half", "interleaved"])


def spec_of(dim: int = 128, rotary: int | None = 128, pairing: str = "half") -> Spec:
    return Spec(5, 2, dim, rope=None if rotary is None else Rope(rotary, 1e6, pairing))


# ---- rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "least"), [(BF16, 0.999), (FP16, 0.995)], ids=["bf16", "fp16"])
@PAIRINGS
def test_outputs_are_correctly_rounded(
    backend: str, dtype: torch.dtype, least: float, pairing: str
) -> None:
    """A second rounding inside would halve the share; 28k values make 0.1 % more than noise."""
    spec = replace(spec_of(pairing=pairing), num_q_heads=4, num_kv_heads=1)
    call = Recipe(spec, dtype=dtype, lead=(55,)).make(backend)
    outputs = qkrope.qk_norm_rope(*call.args())
    refs, _ = call.expected()
    y = torch.cat([t.cpu().flatten() for t in outputs])
    assert fraction_correctly_rounded(y, torch.cat([t.flatten() for t in refs])) >= least


@PAIRINGS
@DTYPES
def test_position_zero_is_the_norm_alone(backend: str, dtype: torch.dtype, pairing: str) -> None:
    """cos 0 is 1 and sin 0 is 0, exactly, so a rotation by nothing changes no bit.

    Against a table of ones and zeros on every backend, and against the norm alone on the CPU. On
    CUDA the sum of squares follows the pairs of the rotation, so the norm alone may differ there in
    the last bit of float32; the criterion bounds it.
    """
    for dim, rotary in ((128, 128), (64, 32), (34, 10)):
        call = Recipe(spec_of(dim, rotary, pairing), dtype=dtype, lead=(9,)).make(backend)
        call.positions = torch.zeros_like(call.positions)
        rotated = qkrope.qk_norm_rope(*call.args())
        ones = torch.ones(rotary // 2, device=call.positions.device)
        still = qkrope.qk_norm_rope(*call.args(), cos_sin=(ones, torch.zeros_like(ones)))
        wanted = [still]
        if backend != "cuda":
            call.spec = replace(call.spec, rope=None)
            wanted.append(qkrope.qk_norm_rope(*call.args()))
        for want in wanted:
            for y, x in zip(rotated, want, strict=True):
                # Adding b * 0 turns -0 into +0 where the norm underflows; values are what counts.
                assert torch.equal(y, x)


@PAIRINGS
def test_negative_positions_rotate_back(backend: str, pairing: str) -> None:
    """There and back again is the identity within twice the criterion: one bound a rotation."""
    spec = replace(spec_of(64, 32, pairing), norm=Norm(kind="none"))
    call = Recipe(spec, dtype=FP32, lead=(20,)).make(backend)
    positions = call.positions.clamp_min(-(2**31) + 1)
    q2, k2 = qkrope.qk_norm_rope(call.q, call.k, None, None, positions, spec)
    q3, k3 = qkrope.qk_norm_rope(q2, k2, None, None, -positions, spec)
    terms = reference.criterion_terms(q2, k2, None, None, positions, spec)
    for x, y, term in zip((call.q, call.k), (q3, k3), terms, strict=True):
        # The first error, at most bound per channel, is rotated with its pair: sqrt(2) < 2 times.
        bound = 0.5 * ulp(term, FP32) + SLACK * term
        assert bool(((y - x).double().abs() <= 3 * bound).all())


# ---- what reaches what ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["packed", "transposed"])
@PAIRINGS
def test_a_bad_value_stays_in_its_head(backend: str, layout: str, bad: float, pairing: str) -> None:
    recipe = Recipe(spec_of(64, 32, pairing), lead=(1, 9), layout=layout)
    clean = qkrope.qk_norm_rope(*recipe.make(backend).args())
    call = recipe.make(backend)
    call.q[0, 4, 2, 11] = bad
    call.k[0, 8, 1, 63] = bad
    dirty = qkrope.qk_norm_rope(*call.args())
    for y, want, (token, head) in zip(dirty, clean, ((4, 2), (8, 1)), strict=True):
        assert not bool(y[0, token, head].isfinite().all())
        y[0, token, head] = want[0, token, head]
        assert_same_bits(y, want)


def test_a_bad_position_reaches_no_other_token(device: str) -> None:
    """Each token reads its own position only: the others keep their bits."""
    recipe = Recipe(spec_of(), lead=(9,), layout="packed")
    clean = qkrope.qk_norm_rope(*recipe.make(device).args())
    call = recipe.make(device)
    call.positions[4] = 77
    moved = qkrope.qk_norm_rope(*call.args())
    keep = torch.arange(9, device=device) != 4
    for y, want in zip(moved, clean, strict=True):
        assert_same_bits(y[keep], want[keep])
        assert not torch.equal(y[4], want[4])


@pytest.mark.parametrize("other_layout", ["odd", "padded", "gated", "transposed", "packed"])
@DTYPES
def test_bits_do_not_depend_on_the_layout(
    backend: str, other_layout: str, dtype: torch.dtype
) -> None:
    for dim, rotary in ((128, 128), (80, 80), (64, 40)):
        recipe = Recipe(spec_of(dim, rotary), dtype=dtype, lead=(2, 9))
        expected = qkrope.qk_norm_rope(*recipe.make(backend).args())
        call = recipe.but(layout=other_layout).make(backend)
        # The packed recipe draws v too, so give it the same numbers.
        plain = recipe.make(backend)
        call.q.copy_(plain.q)
        call.k.copy_(plain.k)
        got = qkrope.qk_norm_rope(*call.args())
        for y, want in zip(got, expected, strict=True):
            assert_same_bits(y, want, other_layout)


@DTYPES
def test_bits_do_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    """A token gives the same bits alone, in a part of the batch and in a large one."""
    for dim, rotary, pairing in ((128, 128, "half"), (128, 64, "interleaved"), (72, 72, "half")):
        recipe = Recipe(spec_of(dim, rotary, pairing), dtype=dtype, lead=(700,))
        call = recipe.make(backend)
        whole = qkrope.qk_norm_rope(*call.args())
        for rows in (slice(0, 1), slice(699, 700), slice(3, 8), slice(100, 229)):
            q, k, qw, kw, positions, spec = call.args()
            part = qkrope.qk_norm_rope(q[rows], k[rows], qw, kw, positions[rows], spec)
            for y, want in zip(part, whole, strict=True):
                assert_same_bits(y, want[rows])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@DTYPES
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype, threads: None) -> None:
    call = Recipe(spec_of(128, 64), dtype=dtype, lead=(1501,)).make()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(qkrope.qk_norm_rope(*call.args()))
    for other in results[1:]:
        for y, want in zip(other, results[0], strict=True):
            assert_same_bits(y, want)


def test_the_same_call_twice_gives_the_same_bits(device: str) -> None:
    call = Recipe(spec_of(), lead=(300,), layout="packed").make(device)
    for y, want in zip(
        qkrope.qk_norm_rope(*call.args()), qkrope.qk_norm_rope(*call.args()), strict=True
    ):
        assert_same_bits(y, want)


# ---- processes and threads --------------------------------------------------------------------

FORK = """
import os, signal, sys, torch, qkrope
torch.set_num_threads(2)
spec = qkrope.Spec(8, 2, 128)
q, k, w = torch.randn(3000, 8, 128), torch.randn(3000, 2, 128), torch.randn(128)
positions = torch.arange(3000)
def call():
    q2, k2 = qkrope.qk_norm_rope(q, k, w, w, positions, spec)
    return q2.numpy().tobytes() + k2.numpy().tobytes()
before = call() if sys.argv[1] == "used" else None
if os.fork() == 0:
    signal.alarm(40)  # a child that hangs must not outlive the test
    child = call()
    os._exit(before is not None and child != before)
os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("state", ["fresh", "used"])
def test_fork(state: str) -> None:
    """A forked child computes: after the import alone, and after the parent computed too."""
    done = subprocess.run([sys.executable, "-c", FORK, state], timeout=60, check=False)
    assert done.returncode == 0


def test_two_python_threads_at_once(backend: str) -> None:
    """Calls with different specs, from threads that start together; none sees the other's state."""
    calls = [
        Recipe(spec_of(64, 32), lead=(65,), seed=1).make(backend),
        Recipe(spec_of(128, 128, "interleaved"), dtype=FP32, lead=(33,), seed=2).make(backend),
    ]
    expected = [qkrope.qk_norm_rope(*call.args()) for call in calls]
    start, failures = threading.Barrier(2), []

    def work(index: int) -> None:
        try:
            start.wait()
            for _ in range(50):
                got = qkrope.qk_norm_rope(*calls[index].args())
                for y, want in zip(got, expected[index], strict=True):
                    assert_same_bits(y, want)
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


# ---- CUDA -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_in_a_cuda_graph(cuda: str) -> None:
    """Captured once, replayed with new inputs and positions: nothing of the first call is kept."""
    recipe = Recipe(spec_of(), lead=(65,), layout="packed")
    call = recipe.make(cuda)
    qkrope.warmup(call.spec, device=cuda, dtype=BF16, weight_dtype=BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = qkrope.qk_norm_rope(*call.args())
    for seed in (1, 2):
        other = recipe.but(seed=seed).make(cuda)
        for x, value in zip(call.args()[:5], other.args()[:5], strict=True):
            x.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        other.check(*outputs)


@pytest.mark.gpu
def test_on_a_stream_that_is_not_the_default(cuda: str) -> None:
    """The launch waits for the stream's work, which here is slow, and only for that stream."""
    recipe = Recipe(spec_of(), lead=(65,), layout="packed")
    call, other = recipe.make(cuda), recipe.but(seed=5).make(cuda)
    qkrope.qk_norm_rope(*call.args())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for x, value in zip(call.args()[:5], other.args()[:5], strict=True):
            x.copy_(value)
        outputs = qkrope.qk_norm_rope(*call.args())
    stream.synchronize()
    other.check(*outputs)


@pytest.mark.gpu
def test_on_a_device_that_is_not_current(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here")
    with torch.cuda.device(0):
        call = Recipe(spec_of(), lead=(65,), layout="packed").make("cuda:1")
        outputs = qkrope.qk_norm_rope(*call.args())
        assert torch.cuda.current_device() == 0
        call.check(*outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("writer", ["q", "positions", "cos_sin", "inv_freq"])
def test_reads_what_the_previous_kernel_wrote(cuda: str, writer: str) -> None:
    """Thousands of writer-then-call pairs: an argument read before its writer ended would show."""
    angle = {"cos_sin": "pair", "inv_freq": "inv_freq32"}.get(writer, "spec")
    recipe = Recipe(spec_of(), lead=(64,), angle=angle)
    call, seeds = recipe.make(cuda), [recipe.but(seed=s).make(cuda) for s in (1, 2)]

    def written(source: object) -> Iterator[tuple[Tensor, Tensor]]:
        if writer == "q":
            yield call.q, source.q
        elif writer == "positions":
            yield call.positions, source.positions
        elif writer == "cos_sin":
            yield from zip(call.extras["cos_sin"], source.extras["cos_sin"], strict=True)
        else:
            yield call.extras["inv_freq"], source.extras["inv_freq"]

    expected = []
    for source in seeds:
        for target, value in written(source):
            target.copy_(value)
        torch.cuda.synchronize()
        expected.append(qkrope.qk_norm_rope(*call.args(), **call.extras))
    wrong = torch.zeros((), dtype=torch.int64, device=cuda)
    for step in range(2000):
        for target, value in written(seeds[step % 2]):
            target.copy_(value)
        for y, want in zip(
            qkrope.qk_norm_rope(*call.args(), **call.extras), expected[step % 2], strict=True
        ):
            wrong += (y != want).sum()
    assert int(wrong) == 0


FIRST_CALL = """
import torch, qkrope
q = torch.zeros(1, 1, 8)
qkrope.qk_norm_rope_(q, None, None, None, torch.zeros(1, dtype=torch.int64), qkrope.Spec(1, 1, 8))
"""


def test_a_level_that_is_not_here() -> None:
    """QKROPE_ISA beyond the machine raises at the first call, naming what there is."""
    env = {**os.environ, "QKROPE_ISA": "avx1024"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], timeout=60, check=False, capture_output=True, env=env
    )
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("ValueError: QKROPE_ISA: expected one of") and "'avx1024'" in last
