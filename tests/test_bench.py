"""The benchmark's own parts: what it measures must be what it says."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

import qkrope
from qkrope import accuracy, reference
from qkrope.bench import (
    baselines,
    data,
    decades,
    errors,
    machine,
    records,
    runner,
    shapes,
    sweep,
    timing,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SMALL = (
    shapes.find_shapes(["Qwen3-0.6B"])[0],  # half pairing, whole head
    shapes.find_shapes(["Qwen3-Next-80B-A3B"])[0],  # rotary dim < head_dim, weight_offset 1
    shapes.find_shapes(["FLUX.1"])[0],  # interleaved
)
ids = pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)


def record(**changes: object) -> records.Record:
    shape = SMALL[0]
    made = records.Record(
        op=runner.OP,
        shape=shape.name,
        spec=shape.spec.canonical(),
        heads=shape.heads,
        rotary_dim=128,
        pairing="half",
        tokens=64,
        dtype="bfloat16",
        cache="same",
        device="cpu",
        device_name="a processor (2 cores)",
        driver=None,
        isa="avx2",
        threads=2,
        torch="2.13.0",
        qkrope="0.1.0",
        commit="0123456789ab",
        bytes=786432,
        us=10.0,
        us_best=9.0,
        gbps=78.6,
        sweep_us=5.0,
        sweep_pdl=None,
        ratio=2.0,
        worst_error=0.999,
        worst_ulp=0.5,
        correct=0.9999,
        passed=True,
        oracle_rows=64,
        repeats=28,
        launches=None,
        baselines={"eager": {"us": 500.0, "speedup": 50.0, "repeats": 3}},
        time="2026-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


# ---- shapes -----------------------------------------------------------------------------------


def test_production_shapes_cover_the_families() -> None:
    names = [shape.name for shape in shapes.PRODUCTION_SHAPES]
    assert len(names) == len(set(names))
    wanted = "Qwen3-0.6B Qwen3-8B Qwen3-32B Qwen3-30B Qwen3-235B Qwen3-VL Qwen3-Next GLM-4.5 Gemma3"
    for start in [*wanted.split(), "FLUX.1", "Qwen-Image", "Z-Image"]:
        assert any(name.startswith(start) for name in names), start
    assert shapes.FULL_TOKENS[0] == 1 and shapes.FULL_TOKENS[-1] == 16384
    assert set(shapes.DEFAULT_TOKENS) <= set(shapes.FULL_TOKENS)


def test_bytes_are_q_and_k_once_each_way() -> None:
    # 16 + 8 heads of 128 bf16 values, read and written; V is not touched.
    assert SMALL[0].bytes_moved(10, 2) == 10 * 24 * 128 * 2 * 2
    assert SMALL[0].width == 32 * 128


def test_unknown_shape_names_the_choices() -> None:
    with pytest.raises(ValueError, match="nonsense.*Qwen3-8B"):
        shapes.find_shapes(["Qwen3-8B", "nonsense"])


# ---- timing -----------------------------------------------------------------------------------


def test_samples() -> None:
    samples = timing.Samples(tuple(float(n) for n in range(20, 0, -1)))
    assert samples.median == 10.5
    assert samples.best_decile == 2.0
    # Round by round, not median by median: here every round has the ratio 2.
    assert samples.ratio(timing.Samples(tuple(n / 2 for n in samples.us))) == 2.0


def test_rounds_take_turns_and_the_budget_stops_only_the_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count()
    order: list[str] = []

    def make(name: str) -> timing.Measure:
        return lambda: (order.append(name), 1.0)[1]

    # Every look at the clock is a second later, so a sample costs one second.
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = timing.interleaved(
        {"a": make("a"), "b": make("b")}, rounds=10, budget_s=4.5, min_rounds=3
    )
    assert order[:4] == ["a", "b", "a", "b"]
    assert [len(found[name].us) for name in "ab"] == [5, 5]
    order.clear()
    found = timing.interleaved({"a": make("a")}, rounds=10, budget_s=0.0, min_rounds=3)
    assert len(found["a"].us) == 3


def test_host_measure_counts_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 25e-6

    assert timing.host_measure(call)() == pytest.approx(25.0)


@pytest.mark.parametrize(("buffers", "us"), [(2, 0.1), (2, 8.0), (30, 7.0), (29, 7.0), (2, 900.0)])
def test_a_graph_holds_whole_turns_and_40_launches(buffers: int, us: float) -> None:
    launches = timing.launches_for(buffers, us)
    assert launches >= 40 and launches % buffers == 0


def test_cache_states() -> None:
    cuda = torch.device("cuda")  # a name: nothing is allocated
    assert [runner.cache_states(cuda, n) for n in (1, 256, 1024, 4096)] == [
        ("hot",),
        ("hot",),
        ("hot", "cold"),
        ("cold",),
    ]
    assert runner.cache_states(CPU, 4096) == ("same",)


# ---- inputs, sweep, baselines -----------------------------------------------------------------


@ids
def test_timed_values_neither_die_nor_grow(shape: shapes.Shape) -> None:
    inputs = data.stationary(data.make_inputs(shape, 3, BF16, CPU))
    call = runner.call(inputs)
    call()
    before = float(inputs.q.float().square().mean())
    for _ in range(300):
        call()
    after = float(inputs.q.float().square().mean())
    # rms 1 and weights of magnitude 1; what is left is the rounding of 300 calls.
    assert after == pytest.approx(before, rel=0.05)
    smallest = float(inputs.q.float().abs().quantile(0.01))
    assert smallest > 1e-6


def test_inputs_see_both_ends_of_the_positions() -> None:
    inputs = data.make_inputs(SMALL[0], 5, BF16, CPU)
    assert int(inputs.positions[0]) == 0
    assert int(inputs.positions[-1]) == data.MAX_POSITION - 1
    assert not torch.equal(inputs.q_weight, inputs.k_weight)
    other = data.another_buffer(inputs)
    assert other.qkv.data_ptr() != inputs.qkv.data_ptr() and torch.equal(other.qkv, inputs.qkv)


@pytest.mark.parametrize("head_dim", [128, 6])
def test_the_host_sweep_touches_q_and_k_alone(head_dim: int) -> None:
    spec = qkrope.Spec(num_q_heads=3, num_kv_heads=1, head_dim=head_dim)
    inputs = data.make_inputs(shapes.Shape("odd", spec, 1), 4, BF16, CPU)
    before = inputs.qkv.view(torch.int16).clone()
    call = sweep.host_sweep(inputs)
    call()
    after = inputs.qkv.view(torch.int16)
    columns = inputs.shape.columns
    assert torch.equal(after[:, columns:], before[:, columns:])
    assert int((after != before).sum()) in {4 * columns // n for n in (1, 2, 4)}  # a bit a word
    assert not torch.isnan(inputs.qkv).any()
    call()
    assert torch.equal(inputs.qkv.view(torch.int16), before)


@pytest.mark.parametrize("vec", sweep.WIDTHS)
@pytest.mark.parametrize("pdl", [0, 1, 2])
def test_the_device_sweep_compiles_without_a_gpu(pdl: int, vec: int) -> None:
    pytest.importorskip("cuda.core", reason="the extra qkrope[cuda] is not installed")
    assert sweep.compile_sweep("sm_90", 640, vec, pdl)[:4] == b"\x7fELF"


@ids
def test_eager_baseline_computes_the_same_thing(shape: shapes.Shape) -> None:
    inputs = data.make_inputs(shape, 9, BF16, CPU)
    got = baselines.eager([inputs])[0]()
    arguments = (inputs.q, inputs.k, inputs.q_weight, inputs.k_weight, inputs.positions)
    exact = reference.qk_norm_rope(*arguments, shape.spec)
    u = 2.0**-8
    for y, ref in zip(got, exact, strict=True):
        assert y.shape == ref.shape
        # Four roundings a product and one addition, and a float32 angle (position and frequency
        # rounded, 2^-24 each): 5 u and 2^-23 |position| of the pair's length.
        length = errors._pair_length(ref, shape.spec)
        angle = 2.0**-23 * inputs.positions.double()[:, None, None]
        bound = (5 * u + angle) * length + 0.5 * accuracy.ulp(y, BF16)
        assert bool(((y.double() - ref).abs() <= bound).all())


@pytest.mark.slow
def test_compiled_baseline_matches_eager() -> None:
    inputs = data.make_inputs(SMALL[1], 4, torch.float32, CPU)
    fast, slow = baselines.compiled([inputs])[0](), baselines.eager([inputs])[0]()
    for a, b in zip(fast, slow, strict=True):
        # A mean of 256 squares in another order, 2^-24 a term, halved by the root.
        torch.testing.assert_close(a, b, rtol=128 * 2.0**-24, atol=128 * 2.0**-24)


# ---- errors and the oracle --------------------------------------------------------------------


@ids
def test_check_passes_ours_and_catches_a_wrong_one(
    shape: shapes.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, rows = runner.check(data.make_inputs(shape, 7, BF16, CPU), 5)
    assert rows == 5 and found.passed
    assert found.pair_ulp <= 0.501  # half an ulp and the criterion's slack, 2^-19 of the pair
    assert found.correct >= 0.999

    def next_position(qkv, q_weight, k_weight, positions, spec):  # type: ignore[no-untyped-def]
        right(qkv, q_weight, k_weight, positions + 1, spec)

    right = qkrope.qkv_norm_rope_
    monkeypatch.setattr(qkrope, "qkv_norm_rope_", next_position)
    wrong, _ = runner.check(data.make_inputs(shape, 7, BF16, CPU), 5)
    assert not wrong.passed and wrong.pair_ulp > 10


def test_check_sees_the_last_row_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    right = qkrope.qkv_norm_rope_

    def forgets_the_last(qkv, q_weight, k_weight, positions, spec):  # type: ignore[no-untyped-def]
        right(qkv[:-1], q_weight, k_weight, positions[:-1], spec)

    monkeypatch.setattr(qkrope, "qkv_norm_rope_", forgets_the_last)
    assert not runner.check(data.make_inputs(SMALL[0], 300, BF16, CPU), 256)[0].passed

    def spills(qkv, q_weight, k_weight, positions, spec):  # type: ignore[no-untyped-def]
        right(qkv, q_weight, k_weight, positions, spec)
        qkv[-1, -1] += 1

    monkeypatch.setattr(qkrope, "qkv_norm_rope_", spills)
    with pytest.raises(RuntimeError, match="V columns"):
        runner.check(data.make_inputs(SMALL[0], 300, BF16, CPU), 256)


def test_check_in_chunks_is_check(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner.check(data.make_inputs(SMALL[0], 9, BF16, CPU), None)
    monkeypatch.setattr(runner, "ORACLE_CHUNK", 4)
    parts = runner.check(data.make_inputs(SMALL[0], 9, BF16, CPU), None)
    assert whole[1] == parts[1] == 9
    assert whole[0].worst == parts[0].worst
    assert whole[0].correct == pytest.approx(parts[0].correct)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_pair_length(pairing: str) -> None:
    spec = qkrope.Spec(
        num_q_heads=1, num_kv_heads=1, head_dim=6, rope=qkrope.Rope(dim=4, pairing=pairing)
    )
    ref = torch.tensor([3.0, 5.0, 4.0, 12.0, -7.0, 2.0]).double()
    if pairing == "interleaved":
        ref = ref[[0, 2, 1, 3, 4, 5]]
    expected = torch.tensor([5.0, 13.0, 5.0, 13.0, 7.0, 2.0]).double()
    if pairing == "interleaved":
        expected = expected[[0, 2, 1, 3, 4, 5]]
    assert torch.allclose(errors._pair_length(ref, spec), expected)


def test_a_stray_nan_fails_and_shows_as_null() -> None:
    spec = qkrope.Spec(num_q_heads=1, num_kv_heads=1, head_dim=4)
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    bad = x.to(BF16)
    bad[0, 0, 0] = float("nan")
    found = errors.compare((bad, None), (x, None), (x.abs(), None), spec, BF16)
    assert not found.passed
    assert found.plain()["worst"] is None
    json.dumps(found.plain(), allow_nan=False)


def test_decades_cover_every_position_once() -> None:
    ranges = sorted(decades.ranges())
    assert ranges[0][0] == -(2**31) and ranges[-1][1] == 2**31 - 1
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(ranges))


# ---- records, tables, plots -------------------------------------------------------------------


def test_run_makes_records_that_survive_a_file(tmp_path: Path) -> None:
    plan = runner.Plan(
        shapes=SMALL[:1], tokens=(1, 3), dtype=BF16, device=CPU, baselines=("eager",), rounds=1
    )
    notes: list[str] = []
    found = list(runner.run(plan, notes.append))
    assert notes == []
    assert [r.tokens for r in found] == [1, 3]
    for r in found:
        assert r.passed and r.us > 0 and r.sweep_us > 0 and r.ratio > 0
        assert r.gbps == pytest.approx(r.bytes / r.us * 1e-3)
        assert r.baselines["eager"]["speedup"] > 0
        assert r.isa == machine.cpu_isa() and r.threads == torch.get_num_threads()
        assert qkrope.Spec.from_canonical(r.spec) == SMALL[0].spec
    path = tmp_path / "deep" / "r.jsonl"
    records.append(path, found[:1])
    records.append(path, found[1:])
    assert records.read(path) == found


def test_a_baseline_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(buffers: object) -> list:
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setitem(baselines.BASELINES, "eager", broken)
    plan = runner.Plan(SMALL[:1], (1,), BF16, CPU, baselines=("eager",), rounds=1)
    notes: list[str] = []
    (found,) = runner.run(plan, notes.append)
    assert found.baselines == {"eager": {"error": "RuntimeError: no such thing"}}
    assert len(notes) == 1 and "eager not measured: RuntimeError: no such thing" in notes[0]


def test_commit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKROPE_COMMIT", "feedface")
    records.commit.cache_clear()
    assert records.commit() == "feedface"
    monkeypatch.delenv("QKROPE_COMMIT")
    records.commit.cache_clear()
    assert records.commit()
    records.commit.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 1024])
def test_cuda_records(cuda: str, tokens: int) -> None:
    device = machine.pick_device(cuda)
    plan = runner.Plan(SMALL[:1], (tokens,), BF16, device, baselines=("eager",), rounds=1)
    notes: list[str] = []
    for r in runner.run(plan, notes.append):
        assert r.passed and r.sweep_us > 0 and r.launches >= 40
        assert r.cache in ("hot", "cold") and r.driver and r.isa.startswith("sm_")
        assert 0.5 < r.ratio  # a kernel well below the sweep's time would be a broken sweep
    assert notes == []


@pytest.mark.gpu
@pytest.mark.parametrize("vec", sweep.WIDTHS)
@pytest.mark.parametrize("pdl", [0, 1, 2])
def test_the_device_sweep_touches_q_and_k_alone(cuda: str, pdl: int, vec: int) -> None:
    device = machine.pick_device(cuda)
    if pdl and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    inputs = data.make_inputs(SMALL[0], 37, BF16, device)
    before = inputs.qkv.view(torch.int16).clone()
    call = sweep.device_sweep(inputs, pdl=pdl, vec=vec)
    call()
    after = inputs.qkv.view(torch.int16)
    columns = inputs.shape.columns
    assert torch.equal(after[:, columns:], before[:, columns:])
    assert int((after != before).sum()) == 37 * columns // 8  # one bit in each 16 bytes
    call()
    assert torch.equal(inputs.qkv.view(torch.int16), before)
