"""examples/transformers_qwen3.py in a short form: on random weights, on a checkpoint's folder."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

SCRIPT = Path(__file__).parents[1] / "examples" / "transformers_qwen3.py"
SHORT = "--prompt 8 --new 4 --steps 2 --length 16 --batch 2 --device cpu".split()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SHORT, *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def check(text: str) -> None:
    assert len(re.findall(r"^(transformers|qkrope) +(generate|train) .* tokens/s", text, re.M)) == 4
    assert "q_norm + k_norm + rotation" in text and "the same 4 tokens: True" in text
    (worst,) = re.findall(r"losses over 2 steps differ by at most (\S+) of themselves", text)
    assert float(worst) <= 1e-5


def test_random_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--layers", "1")
    check(capsys.readouterr().out)


def test_a_checkpoint_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    run(monkeypatch, "--checkpoint", str(tmp_path))
    text = capsys.readouterr().out
    check(text)
    assert "3 attention modules patched" in text
