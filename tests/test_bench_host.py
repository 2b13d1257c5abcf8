"""bench.host: the table, and what can be shown of its measurements without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qkrope
from qkrope.bench import first_call, host
from qkrope.bench.timing import Samples
from qkrope.cuda import cache
from qkrope.cuda.compile import _nvrtc


def test_differences_are_taken_round_by_round() -> None:
    """A machine that slows down in one round slows both sides of a difference."""
    driver, eager, op, add = (
        (5.0, 50.0, 5.0),
        (6.5, 51.5, 6.5),
        (12.0, 57.0, 12.0),
        (6.0, 60.0, 6.4),
    )
    names = (host.DRIVER, host.DRIVER_PDL, host.EAGER, host.OP, host.IDLE_OP, host.ADD)
    values = (driver, driver, eager, op, op, add)
    bars = host.host_bars({name: Samples(us) for name, us in zip(names, values, strict=True)})
    assert [bar.value for bar in bars[:6]] == [5.0, 5.0, 6.5, 12.0, 12.0, 6.4]
    above_driver, above_add, op_above = bars[6:]
    assert (above_driver.value, above_driver.bar, above_driver.met) == (1.5, 2.0, True)
    assert above_add.value == pytest.approx(0.1) and above_add.bar == 0.0 and not above_add.met
    assert (op_above.value, op_above.bar, op_above.met) == (7.0, 6.0, False)


def test_a_line_says_what_was_met() -> None:
    assert host.Bar("x", 2.0, "us", 2.0).line().split() == ["x", "2.000", "us", "bar", "2", "met"]
    assert host.Bar("x", 2.001, "us", 2.0).line().endswith("MISSED")
    assert "bar" not in host.Bar("x", 2.0, "us").line() and host.Bar("x", 2.0, "us").met


@torch.no_grad()
def test_the_timed_calls_run_and_are_the_same_call() -> None:
    calls = host.torch_calls("cpu")
    samples = host.host_samples(calls, "cpu", rounds=3)
    assert set(samples) == {host.EAGER, host.OP, host.IDLE_OP, host.ADD}
    assert all(us > 0 for found in samples.values() for us in found.us)
    eager, op = (host.torch_calls("cpu")[name] for name in (host.EAGER, host.OP))
    eager(), op()
    qkv = eager.args[0]  # type: ignore[attr-defined]
    assert qkv.shape == (1, 48 * 128)
    assert torch.equal(qkv, op.args[0])  # type: ignore[attr-defined]
    assert not torch.equal(qkv, first_call.inputs("cpu")["qkv"][:1])


def test_the_kernel_that_does_nothing_compiles() -> None:
    pytest.importorskip("cuda.bindings", reason="the extra qkrope[cuda] is not installed")
    cubin, _ = _nvrtc(host.NOTHING, "sm_90")
    assert cubin[:4] == b"\x7fELF" and b"nothing" in cubin


def right() -> torch.Tensor:
    given = first_call.inputs("cpu")
    spec = qkrope.Spec(32, 8, 128, rope=qkrope.Rope(theta=first_call.THETA))
    qkrope.qkv_norm_rope_(**given, spec=spec)
    return given["qkv"]


def test_a_wrong_result_is_seen() -> None:
    """In q, in k, in v; and the inputs themselves."""
    assert host.is_right({"qkv": right()})
    assert not host.is_right({"qkv": first_call.inputs("cpu")["qkv"]})
    for column in (5, 33 * 128, 47 * 128):
        wrong = right()
        wrong[16, column] += 1
        assert not host.is_right({"qkv": wrong})


def test_broken_entries_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.broken_entries(tmp_path / "nothing") == 0
    monkeypatch.setenv("QKROPE_CACHE_DIR", str(tmp_path / "cache"))
    for key in ("a", "b", "c"):
        path = cache.write(key, cache.Entry(b"cubin" * 9, "log"))
        assert path is not None
    assert host.broken_entries(path.parent) == 0
    path.write_bytes(path.read_bytes()[:-1])
    (path.parent / ".staging-x").touch()
    assert host.broken_entries(path.parent) == 2


@pytest.mark.slow
def test_processes_start_together(tmp_path: Path) -> None:
    """No clock runs before every process is ready; each gets the right result."""
    results = host.first_calls("cpu", tmp_path / "cache", 2)
    assert len(results) == 2 and all(host.is_right(result) for result in results)
    for result in results:
        assert 0 < result["import_seconds"] < result["seconds"] and not result["compiled"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_process_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a process ended before its first call"):
        host.first_calls("nonsense", tmp_path / "cache", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what it needs")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.slow
def test_every_figure_is_measured(cuda: str, tmp_path: Path) -> None:
    assert host.main(["--out", str(tmp_path / "host.jsonl")]) in (0, 1)
    assert len((tmp_path / "host.jsonl").read_text().splitlines()) == 15
