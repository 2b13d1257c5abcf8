"""The command line: exit codes, one JSON document and nothing else, tables that lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkrope
from qkrope.bench import decades, records
from qkrope.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EXAMPLE = EXAMPLES / "qwen3_attention.safetensors"
CONFIG = EXAMPLES / "qwen3_config.json"
SMALL = ["--q-heads", "2", "--kv-heads", "1", "--head-dim", "16"]
BENCH = ["bench", "--device", "cpu", "--shape", "Qwen3-0.6B", "--tokens", "1,2"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKROPE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def run_json(capsys: Capture) -> Callable[..., Any]:
    """Run a command with --json; the whole of stdout must be one document."""

    def run(*argv: str, code: int = 0) -> Any:
        assert main([*argv, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def _shift_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with a bug: every position is off by one."""
    packed, split = qkrope.qkv_norm_rope_, qkrope.qk_norm_rope
    monkeypatch.setattr(qkrope, "qkv_norm_rope_", lambda x, a, b, p, s: packed(x, a, b, p + 1, s))
    monkeypatch.setattr(
        qkrope, "qk_norm_rope", lambda q, k, a, b, p, s: split(q, k, a, b, p ^ 1, s)
    )


# ---- the command itself -----------------------------------------------------------------------


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom qkrope.cli import main\n"
        "assert main(['--help']) == 0\nassert main(['bench', '--help']) == 0\n"
        "assert not {'torch', 'rich', 'numpy', 'tvm_ffi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "qkrope", "cache", "path", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert set(json.loads(done.stdout)) == {"path"}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["bench", "--tokens", "0"],
        ["bench", "--dtype", "int8"],
        ["bench", "--device", "tpu"],
        ["bench", "--device", "cpu", "--shape", "nonsense"],
        ["bench", "--device", "cpu", "--baselines", "nonsense"],
        ["bench", "--device", "cpu", "--config", "missing.json"],
        ["check", "--device", "cpu", "--rows", "1"],
        ["check", "--device", "cpu", "--head-dim", "7"],
        ["check", "--device", "cpu", "--scaling", "YaRN(4.0)"],
        ["check", "--device", "cpu", "--scaling", "open(file='x')"],
        ["check", "--device", "cpu", "--shape", "Qwen3-8B", "--spec", "{}"],
        ["run", "missing.safetensors"],
        ["build", "--arch", "ninety"],
        ["build", "--arch", "sm_90", "--jobs", "0"],
        ["cache", "burn"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2_with_a_reason(argv: list[str], capsys: Capture) -> None:
    assert main(argv) == 2
    caught = capsys.readouterr()
    assert caught.out == "" and len(caught.err) > 10


def test_an_error_with_json_is_a_document(run_json: Callable[..., Any]) -> None:
    assert "nonsense" in run_json(*BENCH, "--shape", "nonsense", code=2)["error"]


def test_info(run_json: Callable[..., Any], capsys: Capture) -> None:
    facts = run_json("info")
    assert (
        facts["cpu"]["isa"] in facts["cpu"]["available"] and "scalar" in facts["cpu"]["available"]
    )
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        facts["versions"]["torch"] == torch.__version__
    )
    assert facts["cache"]["entries"] == 0
    assert "QKROPE_ISA" in facts["environment"]
    assert main(["info"]) == 0
    assert facts["cache"]["path"] in capsys.readouterr().out


# ---- bench ------------------------------------------------------------------------------------


def test_bench_json_and_records(run_json: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    got = run_json(*BENCH, "--baselines", "eager", "--out", str(out))
    assert got["passed"] is True
    assert [r["tokens"] for r in got["records"]] == [1, 2]
    assert [records.to_dict(r) for r in records.read(out)] == got["records"]


def test_bench_table_is_whole_where_there_is_no_terminal(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    plot = tmp_path / "p.png"
    extra = ["--shape", "Qwen3-Next-80B-A3B", "--baselines", "none", "--plot", str(plot)]
    assert main([*BENCH, *extra]) == 0
    text = capsys.readouterr().out
    for cell in ("Qwen3-Next-80B-A3B", "16/2/2 x 256", "of the bound", "of sweep", "vs compile"):
        assert cell in text
    assert "…" not in text
    assert plot.stat().st_size > 10000


def test_bench_takes_a_config(run_json: Callable[..., Any]) -> None:
    argv = ("bench", "--device", "cpu", "--tokens", "1", "--baselines", "none")
    (record,) = run_json(*argv, "--config", str(CONFIG))["records"]
    assert record["shape"] == "qwen3_config" and record["heads"] == "4/2/2 x 64"


def test_bench_fails_where_the_result_is_wrong(
    run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _shift_positions(monkeypatch)
    got = run_json(*BENCH, "--baselines", "none", code=1)
    assert got["passed"] is False
    assert all(r["passed"] is False and r["worst_error"] > 1 for r in got["records"])


# ---- check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_check(run_json: Callable[..., Any], dtype: str) -> None:
    got = run_json("check", "--device", "cpu", "--rows", "8", "--dtype", dtype, *SMALL)
    assert got["passed"] is True and len(got["decades"]) == len(decades.ranges())
    for decade in got["decades"]:
        assert decade["methods"]["qkrope"]["worst"] <= 1
    # What the report is for: at long positions the others are lost.
    last = got["decades"][-2]["methods"]
    assert last["chain"]["pair_ulp"] > 50 and last["fp32 angle"]["pair_ulp"] > 50


def test_check_fails_where_the_result_is_wrong(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _shift_positions(monkeypatch)
    assert main(["check", "--device", "cpu", "--rows", "4", *SMALL]) == 1
    text = capsys.readouterr().out
    assert "MISSED by qkrope" in text and "2^31-1" in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--rotary-dim", "8", "--pairing", "interleaved", "--weight-offset", "1"],
        ["--rotary-dim", "0"],
        ["--norm", "none"],
        ["--scaling", "YaRN(factor=4.0, original_max_position_embeddings=4096)"],
        ["--scaling", "DynamicNTK(factor=2.0)", "--max-positions", "8192"],
    ],
    ids=lambda flags: flags[1],
)
def test_spec_flags(run_json: Callable[..., Any], flags: list[str]) -> None:
    got = run_json("check", "--device", "cpu", "--rows", "3", *SMALL, *flags)
    spec = qkrope.Spec.from_canonical(got["spec"])
    assert spec.head_dim == 16 and spec.num_q_heads == 2
    again = run_json("check", "--device", "cpu", "--rows", "3", "--spec", got["spec"])
    assert again["decades"] == got["decades"]


# ---- run --------------------------------------------------------------------------------------


def test_run_the_shipped_example(run_json: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    argv = ("run", str(EXAMPLE), str(out), "--config", str(CONFIG), "--device", "cpu")
    got = run_json(*argv, "--tolerance", "4")
    assert got["passed"] is True and got["oracle"]["worst"] <= 1
    # The unfused chain in bf16: up to 3.5 ulps of the pair from exact, half of it not equal.
    assert 0 < got["expected"]["max_pair_ulp"] < 4
    assert 0.4 < got["expected"]["equal"] < 0.8
    tensors = load_file(EXAMPLE)
    spec = qkrope.Spec.from_canonical(got["spec"])
    names = ("q", "k", "q_weight", "k_weight", "positions")
    q, k = qkrope.qk_norm_rope(*(tensors[name] for name in names), spec)
    written = load_file(out)
    assert torch.equal(written["q"], q) and torch.equal(written["k"], k)


def test_run_tolerance_decides(run_json: Callable[..., Any]) -> None:
    argv = ("run", str(EXAMPLE), "--config", str(CONFIG), "--device", "cpu")
    assert run_json(*argv, "--tolerance", "0.5", code=1)["passed"] is False


def test_run_with_the_wrong_spec_shows_in_the_expected_outputs(
    run_json: Callable[..., Any], tmp_path: Path
) -> None:
    config = json.loads(CONFIG.read_text()) | {"rope_theta": 5e5}
    other = tmp_path / "config.json"
    other.write_text(json.dumps(config))
    argv = ("run", str(EXAMPLE), "--config", str(other), "--device", "cpu")
    got = run_json(*argv)
    assert got["oracle"]["worst"] <= 1  # right for the Spec it was given
    assert got["expected"]["max_pair_ulp"] > 10  # which is not the model's


def test_run_packed_equals_split(run_json: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(5, 5 * 16)
    weights = {"q_weight": torch.rand(16) + 0.5, "k_weight": torch.rand(16) + 0.5}
    rest = weights | {"positions": torch.arange(5)}
    save_file({"qkv": qkv, **rest}, tmp_path / "packed")
    heads = qkv.view(5, 5, 16)
    split = {"q": heads[:, :2].contiguous(), "k": heads[:, 2:3].contiguous()}
    save_file(split | rest, tmp_path / "split")
    for name in ("packed", "split"):
        argv = ("run", str(tmp_path / name), str(tmp_path / f"{name}.out"), "--device", "cpu")
        run_json(*argv, *SMALL)
    a, b = (load_file(tmp_path / f"{name}.out") for name in ("packed", "split"))
    assert set(a) == {"q", "k"} and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("drop", ["positions", "q,k"])
def test_run_names_what_is_missing(drop: str, capsys: Capture, tmp_path: Path) -> None:
    kept = {n: t for n, t in load_file(EXAMPLE).items() if n not in drop.split(",")}
    save_file(kept, tmp_path / "x")
    assert main(["run", str(tmp_path / "x"), "--config", str(CONFIG), "--device", "cpu"]) == 2
    assert drop.split(",", maxsplit=1)[0] in capsys.readouterr().err


def test_run_refuses_a_file_of_another_kind(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("not tensors")
    assert main(["run", str(tmp_path / "x"), "--device", "cpu"]) == 2
    assert "input" in capsys.readouterr().err


def test_the_example_is_what_its_script_makes(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra qkrope[test] is not installed")
    script = EXAMPLES / "make_qwen3_example.py"
    out = tmp_path / "again.safetensors"
    subprocess.run([sys.executable, str(script), "--out", str(out)], check=True, timeout=300)
    made, shipped = load_file(out), load_file(EXAMPLE)
    assert made.keys() == shipped.keys() and EXAMPLE.stat().st_size < 300_000
    for name in ("positions", "q_weight", "k_weight"):
        assert torch.equal(made[name], shipped[name])
    for name in ("q", "k", "expected_q", "expected_k"):
        # Another processor may sum a matrix product in another order: one bf16 step.
        torch.testing.assert_close(made[name], shipped[name], rtol=2**-7, atol=2**-7)


def test_quickstart_runs() -> None:
    script = EXAMPLES / "quickstart.py"
    done = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True)
    assert "worst error" in done.stdout


# ---- build and cache --------------------------------------------------------------------------


def test_build_then_cache(run_json: Callable[..., Any]) -> None:
    pytest.importorskip("cuda.bindings", reason="the extra qkrope[cuda] is not installed")
    argv = ("build", "--arch", "sm_90", "--config", str(CONFIG), "--dtype", "bf16")
    (first,) = run_json(*argv)["built"]
    assert first["cached"] is False and first["variant"]["head_dim"] == 64
    assert first["kernels"]
    for used in first["kernels"].values():
        assert used["registers"] > 0 and used["spill_stores"] == used["spill_loads"] == 0
    (second,) = run_json(*argv)["built"]
    assert second["cached"] is True and second["path"] == first["path"]
    (entry,) = run_json("cache", "list")["entries"]
    assert Path(first["path"]).stem == entry["key"]
    assert entry["registers"] == {n: u["registers"] for n, u in first["kernels"].items()}
    Path(first["path"]).write_bytes(b"damaged")
    assert run_json("cache", "list")["entries"][0]["registers"] is None
    assert run_json("info")["cache"]["entries"] == 1
    assert run_json("cache", "clear")["removed"] == 1
    assert run_json("cache", "list")["entries"] == []


def test_build_many_and_a_failure(run_json: Callable[..., Any], capsys: Capture) -> None:
    pytest.importorskip("cuda.bindings", reason="the extra qkrope[cuda] is not installed")
    flags = ["--dtype", "fp16", "--dtype", "bf16", "--angles", "table", "-j", "2", *SMALL]
    got = run_json("build", "--arch", "sm_80", "--arch", "sm_10", *flags, code=1)
    assert len(got["built"]) == 2 and len(got["failed"]) == 2
    assert {b["variant"]["dtype"] for b in got["built"]} == {"float16", "bfloat16"}
    assert all(b["arch"] == "sm_80" and b["variant"]["angle"] == "table" for b in got["built"])
    assert all("sm_10" in f["error"] for f in got["failed"])
    assert main(["build", "--arch", "sm_80", *SMALL]) == 0
    assert "registers" in capsys.readouterr().out


def test_build_the_options(run_json: Callable[..., Any]) -> None:
    """A Spec with options has one kernel; one without, beside its own that of a call's options."""
    pytest.importorskip("cuda.core", reason="the extra qkrope[cuda] is not installed")
    argv = ("build", "--arch", "sm_90", "--head-dim", "64")
    for flags, found in (
        (["--norm", "layer"], [True]),
        (["--options"], [False, True]),
        (["--norm", "layer", "--options"], [True]),
    ):
        built = run_json(*argv, *flags)["built"]
        assert sorted(b["variant"]["options"] is not None for b in built) == found


def test_build_the_gradients(run_json: Callable[..., Any]) -> None:
    """Those of a Spec with casts on the way are of the Spec without."""
    pytest.importorskip("cuda.bindings", reason="the extra qkrope[cuda] is not installed")
    argv = ("build", "--arch", "sm_90", "--backward", "--spec")
    spec = qkrope.Spec(4, 2, 64, rounding="eager").canonical()
    built = run_json(*argv, spec)["built"]
    found = {b["variant"]["backward"]: b["variant"]["options"] is None for b in built}
    assert found == {False: False, True: True}
    assert all(("sums" in b["kernels"]) == b["variant"]["backward"] for b in built)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the architecture to take")
def test_build_needs_an_arch_without_a_gpu(capsys: Capture) -> None:
    assert main(["build", *SMALL]) == 2
    assert "sm_90" in capsys.readouterr().err


def test_cache_path(run_json: Callable[..., Any], capsys: Capture, tmp_path: Path) -> None:
    assert run_json("cache", "path")["path"] == str(tmp_path / "cache")
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_json_names_wrong_usage_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", "--nope"]) == 2
    caught = capsys.readouterr()
    assert json.loads(caught.out)["exit_code"] == 2 and "--nope" in caught.err
