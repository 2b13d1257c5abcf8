"""The bench of the gradients, as far as it goes without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkrope import ops_backward
from qkrope.bench import bars, gradients, training
from qkrope.bench.shapes import Shape
from qkrope.spec import Norm, Rope, Spec

BF16, CPU = torch.bfloat16, torch.device("cpu")
SHAPE = Shape("small", Spec(3, 2, 64, norm=Norm(weight_offset=1.0), rope=Rope(32)))


@pytest.mark.parametrize("weights", [True, False])
def test_a_call_is_that_of_the_op(weights: bool) -> None:
    one, two = gradients.make_rows(SHAPE, 9, BF16, CPU, 2)
    assert one.x.data_ptr() != two.x.data_ptr() and torch.equal(one.x, two.x)
    assert not torch.equal(one.x, one.dy)
    one.dx.fill_(torch.nan)
    gradients.call(one, weights)()
    given = (one.q_weight, one.k_weight, one.positions, SHAPE.spec)
    expected = ops_backward.qk_norm_rope_backward(
        *one.sides(one.dy), None, *one.sides(one.x), *given, wanted=(weights,) * 2 + (False,) * 3
    )
    for got, want in zip(one.sides(one.dx), expected, strict=False):
        assert torch.equal(got, want)


@pytest.mark.parametrize("pdl", [1, 2])
@pytest.mark.parametrize("vec", [1, 2, 4])
def test_the_sweep_compiles(vec: int, pdl: int) -> None:
    pytest.importorskip("cuda.core", reason="the extra qkrope[cuda] is not installed")
    assert gradients.compile_sweep("sm_90", vec, pdl)[:4] == b"\x7fELF"


def test_the_bars_of_the_issue() -> None:
    asked = {bar.name: bar.ratio for bar in bars.BARS if bar.backward and bar.ratio}
    assert asked == {
        "backward 1024 cold": 1.35,
        "backward 4096 cold": 1.14,
        "backward 16384 cold": 1.06,
    }
    one = next(bar for bar in bars.BARS if bar.backward)
    assert bars._bytes_of(one) == 3 * 1024 * 40 * 128 * 2
    plain = next(bar for bar in bars.BARS if bar.name == "1024 cold")
    assert bars._bytes_of(plain) == 2 * 1024 * 40 * 128 * 2


def test_steps_compute_the_same_gradients() -> None:
    """Each way but Liger's: within what float32 tables and casts on the way may differ."""
    given = training.steps(SHAPE, 33, torch.float32, CPU)
    found = {name: given[0].run(training.BUILDS[name](given)[0]) for name in ("qkrope", "eager")}
    for ours, theirs in zip(found["qkrope"], found["eager"], strict=True):
        scale = theirs.abs().max()
        assert float((ours - theirs).abs().max()) < 0.02 * scale  # positions to 131071


def test_training_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "SHAPE", SHAPE)
    keep = {name: build for name, build in training.builds().items() if name != "compile"}
    monkeypatch.setattr(training, "builds", lambda folder=None: keep)
    out = tmp_path / "training.jsonl"
    arguments = ["--device", "cpu", "--tokens", "17", "--out", str(out)]
    assert training.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["liger", "qkrope", "eager"]
    assert "not installed" in lines[0] or "needs CUDA" in lines[0]
    assert "times ours" in lines[2] and out.read_text().count("\n") == 1
