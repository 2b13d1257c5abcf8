"""tools/fetch_peers.py takes the right thing out of a wheel; wheels and tools here are made up."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from qkrope.bench import peer_cubins

TOOL = Path(__file__).resolve().parent.parent / "tools" / "fetch_peers.py"


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_peers", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_peers"] = module
    spec.loader.exec_module(module)
    return module


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def cubin(folder: Path, name: str, *symbols: str) -> Path:
    path = folder / name
    path.write_bytes(b"\x7fELF" + b"".join(b"\0" + symbol.encode() + b"\0" for symbol in symbols))
    return path


def test_pick_takes_the_file_that_holds_all(fetch: ModuleType, tmp_path: Path) -> None:
    wanted = ["kernel_a", "kernel_b"]
    cubin(tmp_path, "x.1.sm_90.cubin", "kernel_a")
    # A longer name that begins alike is another kernel.
    cubin(tmp_path, "x.2.sm_90.cubin", "kernel_a", "kernel_b_other")
    with pytest.raises(LookupError, match="no file holds all 2 kernels.*lacks kernel_b"):
        fetch.pick(tmp_path.glob("*.cubin"), wanted)
    plain = cubin(tmp_path, "x.3.sm_90.cubin", *wanted)
    assert fetch.pick(tmp_path.glob("*.cubin"), wanted) == plain
    special = cubin(tmp_path, "x.9.sm_90a.cubin", *wanted)
    assert fetch.pick(tmp_path.glob("*.cubin"), wanted) == special
    with pytest.raises(LookupError, match="no machine code for sm_90"):
        fetch.pick([], wanted)


def test_extract_takes_only_what_begins_so(fetch: ModuleType, tmp_path: Path) -> None:
    made = wheel(tmp_path / "w.whl", {"p/a.h": b"a", "p/csrc/b.cuh": b"b", "q/c": b"c", "p/": b""})
    found = fetch.extract(made, ["p/"], tmp_path / "out")
    assert sorted(path.name for path in found) == ["a.h", "b.cuh"]
    assert not (tmp_path / "out" / "q").exists()
    with pytest.raises(LookupError, match=r"w.whl: got nothing that begins with r/"):
        fetch.extract(made, ["r/"], tmp_path / "out")


@pytest.fixture
def index(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, and a cuobjdump that writes the library's lines as files of symbols."""
    tools = tmp_path / "bin"
    tools.mkdir()
    tool = tools / "cuobjdump"
    tool.write_text(
        f"""#!{sys.executable}
import pathlib, sys
assert sys.argv[1:3] == ["-xelf", "sm_90"], sys.argv
for line in pathlib.Path(sys.argv[3]).read_text().splitlines():
    name, *symbols = line.split()
    pathlib.Path(name).write_bytes(b"".join(s.encode() + b"\\0" for s in symbols))
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    return wheels


def test_machine_code_of_a_wheel(fetch: ModuleType, index: Path, tmp_path: Path) -> None:
    symbols = " ".join(peer_cubins.SGL_KERNEL_SYMBOLS)
    library = f"a.1.sm_90.cubin other\na.2.sm_90a.cubin {symbols}\n"
    wheel(
        index / "sgl_kernel-0.3.21-cp310-abi3-manylinux2014_x86_64.whl",
        {"sgl_kernel/sm90/common_ops.abi3.so": library.encode()},
    )
    liger = {"liger_kernel/ops/__init__.py": b"x = 1\n", "liger_kernel-0.8.5.dist-info/RECORD": b""}
    wheel(index / "liger_kernel-0.8.5-py3-none-any.whl", liger)
    into = tmp_path / "peers"
    words = [str(into), "--wheels", str(index), "--only", "sgl_kernel", "--only", "liger"]
    assert fetch.main(words) == 0
    assert peer_cubins.SGL_KERNEL_SYMBOLS[0].encode() in (into / "sgl_kernel.cubin").read_bytes()
    assert (into / "site/liger_kernel/ops/__init__.py").exists()
    listed = {"sgl_kernel": "sgl-kernel==0.3.21", "liger": "liger-kernel==0.8.5"}
    assert json.loads((into / "manifest.json").read_text()) == listed


def test_one_peer_that_cannot_be_had_leaves_the_others(
    fetch: ModuleType, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(
        index / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl",
        {"vllm/_C_stable_libtorch.abi3.so": b"a.1.sm_90.cubin something_else\n"},
    )
    wheel(index / "liger_kernel-0.8.5-py3-none-any.whl", {"liger_kernel/a.py": b""})
    into = tmp_path / "peers"
    words = [str(into), "--wheels", str(index), "--only", "vllm", "--only", "liger"]
    assert fetch.main(words) == 1
    assert "vllm: no file holds all 36 kernels" in capsys.readouterr().err
    assert sorted(path.name for path in into.iterdir()) == ["manifest.json", "site"]


def test_too_much_for_the_machine_is_an_error(
    fetch: ModuleType,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wheel(index / "liger_kernel-0.8.5-py3-none-any.whl", {"liger_kernel/a.py": b"1234567890"})
    monkeypatch.setattr(fetch, "LIMIT", 5)
    assert fetch.main([str(tmp_path / "peers"), "--wheels", str(index), "--only", "liger"]) == 1
    assert "expected at most 5" in capsys.readouterr().err


def test_what_is_fetched_is_never_committed() -> None:
    assert "/peers/" in (TOOL.parent.parent / ".gitignore").read_text().splitlines()
