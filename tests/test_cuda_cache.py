"""The cubin cache: what its key covers, what counts as a miss, and who may write it."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import qkrope
from option_variants import OPTION_VARIANTS
from qkrope.cuda import cache
from qkrope.cuda import compile as compiling
from qkrope.errors import CompileError
from qkrope.spec import Rope, Spec
from qkrope.variant import Variant

VARIANT = Variant(2, 2, "half", "rms", "rms", "bfloat16", "bfloat16", "bfloat16", "phase")
OTHER = Variant(2, 2, "interleaved", "rms", "rms", "bfloat16", "bfloat16", "bfloat16", "phase")
ARCH = "sm_90"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, in a directory that does not exist yet."""
    path = tmp_path / "below" / "cache"
    monkeypatch.setenv("QKROPE_CACHE_DIR", str(path))
    return path


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for NVRTC: what it was asked for, in order."""
    asked: list[str] = []

    def nvrtc(text: str, arch: str) -> tuple[bytes, str]:
        asked.append(arch)
        return f"cubin {len(asked)} of {arch}".encode(), f"log {len(asked)}"

    monkeypatch.setattr(compiling, "_nvrtc", nvrtc)
    return asked


def build(arch: str = ARCH, variant: Variant = VARIANT) -> compiling.CompiledVariant:
    return compiling.compile_variant(variant, arch)


# ---- hits and misses --------------------------------------------------------------------------


def test_a_real_entry(folder: Path) -> None:
    """The bytes and the compiler's log come back, without a compile."""
    first = build()
    assert not first.cached and first.path is not None and first.path.parent == folder
    second = build()
    assert second.cached and (second.cubin, second.log) == (first.cubin, first.log)
    assert second.path == first.path and second.resources == first.resources
    assert first.cubin[:4] == b"\x7fELF" and first.cubin in first.path.read_bytes()


def test_hit_and_miss(folder: Path, compiles: list[str]) -> None:
    assert [build().cached, build().cached] == [False, True]
    assert build("sm_80").cubin == b"cubin 2 of sm_80"
    assert build(variant=OTHER).cubin == b"cubin 3 of sm_90"
    assert build().cubin == b"cubin 1 of sm_90" and build().log == "log 1"
    assert compiles == ["sm_90", "sm_80", "sm_90"]
    assert len(cache.entries()) == 3 and cache.clear() == 3 and cache.entries() == []
    assert not build().cached


def test_without_the_cache(folder: Path, compiles: list[str]) -> None:
    for _ in range(2):
        made = compiling.compile_variant(VARIANT, ARCH, use_cache=False)
        assert not made.cached and made.path is None
    assert len(compiles) == 2 and not folder.exists()


def test_what_the_key_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources by content, architecture, compiler, options and schema, and the variant."""
    before = compiling.key(VARIANT, ARCH)
    assert compiling.key(VARIANT, ARCH) == before
    changed = {compiling.key(VARIANT, "sm_80"), compiling.key(OTHER, ARCH)}
    body = compiling._body(compiling._PLAIN)
    for name, value in (
        ("_body", lambda _: body + " "),
        ("_body", lambda _: body.replace("kLanes", "kLane5", 1)),
        ("compiler", lambda: "nvidia-cuda-nvrtc 99.0"),
        ("STANDARD", "c++20"),
        ("SCHEMA", compiling.SCHEMA + 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(compiling, name, value)
            changed.add(compiling.key(VARIANT, ARCH))
    assert len(changed) == 7 and before not in changed
    assert compiling.key(VARIANT, ARCH) == before


@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
def test_the_key_covers_every_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, general: bool
) -> None:
    """A changed line in any file that a kernel is made of is another key; no include is left."""
    one = OPTION_VARIANTS["row"] if general else VARIANT
    sources = compiling._GENERAL if general else compiling._PLAIN
    assert "#include" not in compiling.source(one)
    keys = set()
    for name in (None, *sources):
        for source in sources:
            text = compiling._native.resource("native", source).read_text()
            (tmp_path / source).write_text(text + ("// changed\n" if source == name else ""))
        with monkeypatch.context() as patch:
            patch.setattr(compiling._native, "resource", lambda *parts: tmp_path / parts[-1])
            compiling._body.cache_clear()
            keys.add(compiling.key(one, ARCH))
    compiling._body.cache_clear()
    assert len(keys) == 1 + len(sources) and compiling.key(one, ARCH) in keys


def damaged(data: bytes) -> dict[str, bytes]:
    flipped = bytearray(data)
    flipped[-1] ^= 1
    head = bytearray(data)
    head[0] ^= 1
    return {
        "empty": b"",
        "one byte": data[:1],
        "half of it": data[: len(data) // 2],
        "the header": data[:47],
        "all but a byte": data[:-1],
        "a byte more": data + b"\0",
        "a bit": bytes(flipped),
        "another format": bytes(head),
        "zeros": bytes(len(data)),
    }


def test_a_damaged_entry_is_a_miss_and_is_replaced(folder: Path, compiles: list[str]) -> None:
    path = build().path
    assert path is not None
    for number, (what, data) in enumerate(damaged(path.read_bytes()).items()):
        path.write_bytes(data)
        made = build()
        assert not made.cached and made.cubin == f"cubin {number + 2} of sm_90".encode(), what
        again = build()
        assert again.cached and again.cubin == made.cubin, what
    assert not list(folder.glob(".staging-*"))


# ---- the directory ----------------------------------------------------------------------------


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, base, expected in (
        ("/a/b", "/x", "/a/b"),
        ("~/kernels", "/x", f"{tmp_path}/kernels"),
        ("", "/x", "/x/qkrope"),
        (None, "/x", "/x/qkrope"),
        (None, "", f"{tmp_path}/.cache/qkrope"),
        (None, None, f"{tmp_path}/.cache/qkrope"),
    ):
        for name, value in (("QKROPE_CACHE_DIR", named), ("XDG_CACHE_HOME", base)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert str(cache.directory()) == expected
    assert list(tmp_path.iterdir()) == []


def test_it_is_made_for_its_owner_alone(folder: Path, compiles: list[str]) -> None:
    """Whatever the umask is."""
    before = os.umask(0)
    try:
        build()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (entry,) = folder.iterdir()
    assert not stat.S_IMODE(entry.stat().st_mode) & 0o077


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_can_write(folder: Path, compiles: list[str], mode: int) -> None:
    """Before its entries are read: they may be anyone's code."""
    build()
    folder.chmod(mode)
    with pytest.raises(CompileError, match="only you can write.*fix it or set QKROPE_CACHE_DIR"):
        build()
    with pytest.raises(CompileError, match=f"^cache directory {folder}: expected"):
        build(variant=OTHER)
    assert len(compiles) == 1 or len(list(folder.glob("*.cubin"))) == 1
    folder.chmod(0o755)  # others may read
    assert build().cached


def test_a_directory_of_someone_else(
    folder: Path, compiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(CompileError, match="that you own.*got owner"):
        build()


def refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: object, **kwargs: object) -> tuple[int, str]:
        raise OSError(number, os.strerror(number), f"{args}{os.urandom(4).hex()}")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_refuses(
    folder: Path, compiles: list[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It costs a compile, and is said once, not once a kernel."""
    refusing(monkeypatch, number)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for variant in (VARIANT, OTHER, VARIANT):
            made = build(variant=variant)
            assert made.path is None and not made.cached
    assert len(compiles) == 3 and not list(folder.glob("*"))
    (one,) = said
    assert one.category is RuntimeWarning and str(folder) in str(one.message)
    assert os.strerror(number) in str(one.message)


@pytest.mark.parametrize("what", ["the directory is a file", "its parent is a file"])
def test_a_path_that_cannot_be_a_directory(folder: Path, compiles: list[str], what: str) -> None:
    path = folder if "its parent" not in what else folder.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.warns(RuntimeWarning, match="qkrope keeps no compiled kernels in"):
        assert build().path is None
    assert compiles == [ARCH]


def test_an_entry_that_cannot_be_read(folder: Path, compiles: list[str]) -> None:
    path = build().path
    assert path is not None
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="keeps no compiled kernels"):
        assert not build().cached
    assert len(compiles) == 2 and not list(folder.glob(".staging-*"))


# ---- many at once -----------------------------------------------------------------------------

WRITER = """
import json, os, sys, time
from pathlib import Path
from qkrope.cuda import compile as compiling
from qkrope.variant import Variant

# No torch here: these processes start in no time.
kinds = ("rms", "rms", "bfloat16", "bfloat16", "bfloat16", "phase")
variants = [Variant(2, 2, pairing, *kinds) for pairing in ("half", "interleaved")]
count = 0
def nvrtc(text, arch):
    global count
    count += 1
    return (b"interleaved" if "QK_PAIRING 1" in text else b"half") * 100_000, "log"

compiling._nvrtc = nvrtc
Path(sys.argv[1], str(os.getpid())).touch()
while len(os.listdir(sys.argv[1])) < int(sys.argv[2]):
    time.sleep(0.001)
for round in range(20):
    for variant in variants:
        made = compiling.compile_variant(variant, "sm_90")
        assert made.cubin == variant.pairing.encode() * 100_000, "a torn entry"
        if os.getpid() % 2 and round % 4 == 3 and made.path is not None:
            made.path.unlink(missing_ok=True)
print(json.dumps(count))
"""


def test_writers_at_once(folder: Path, tmp_path: Path) -> None:
    """Eight processes on a cold cache, half of them deleting: every read is whole or a miss."""
    ready, count = tmp_path / "ready", 8
    ready.mkdir()
    command = [sys.executable, "-c", WRITER, str(ready), str(count)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    assert sum(json.loads(text) for text in outputs) >= 2
    assert not list(folder.glob(".staging-*"))
    for variant in (VARIANT, OTHER):
        entry = cache.read(compiling.key(variant, ARCH))
        assert entry is None or entry.cubin == variant.pairing.encode() * 100_000


def test_threads_at_once(folder: Path, compiles: list[str]) -> None:
    start, made = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        made.append(build())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and {len(one.cubin) for one in made} == {len(b"cubin 1 of sm_90")}
    assert len(cache.entries()) == 1 and not list(folder.glob(".staging-*"))


# ---- what is missing --------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def test_cuda_bindings_are_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached kernel needs no compiler; another one says what to install."""
    build()
    hide(monkeypatch, "cuda.bindings", "cuda.bindings.nvrtc")
    assert build().cached
    with pytest.raises(CompileError, match=r"cuda.bindings is missing.*pip install qkrope\[cuda\]"):
        build(variant=OTHER)


def test_nvrtc_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    hide(monkeypatch, "cuda.bindings", "cuda.bindings.nvrtc")
    monkeypatch.setattr(compiling.metadata, "version", version)
    compiling.compiler.cache_clear()
    try:
        with pytest.raises(CompileError, match=r"NVRTC is missing.*pip install qkrope\[cuda\]"):
            build()
    finally:
        compiling.compiler.cache_clear()
    assert not folder.exists()


@pytest.mark.parametrize("arch", ["sm_50", "sm_12345", "nonsense", ""])
def test_an_architecture_that_nvrtc_does_not_know(folder: Path, arch: str) -> None:
    with pytest.raises(CompileError, match=f"^compiling for {arch} failed: "):
        build(arch)
    assert cache.entries() == [] and not list(folder.glob("*"))


def test_a_compile_error_is_a_runtime_error_and_public() -> None:
    assert issubclass(CompileError, RuntimeError) and qkrope.CompileError is CompileError


# ---- what does not compile --------------------------------------------------------------------


def python(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("QKROPE_CACHE_DIR", "XDG_CACHE_HOME")
    }
    environment |= {"HOME": str(home)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=120
    )


def test_importing_is_free(tmp_path: Path) -> None:
    """No directory, no torch, no compiler, no library; not even by looking at the names."""
    done = python(
        """
        import sys, qkrope
        qkrope.Spec(32, 8, 128), qkrope.YaRN, qkrope.CompileError, dir(qkrope)
        heavy = {"torch", "numpy", "tvm_ffi", "cuda", "cuda.core", "qkrope.cuda", "qkrope.ops"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        import qkrope.cuda.compile, qkrope.cuda.cache
        assert not heavy - {"qkrope.cuda"} & set(sys.modules), "importing the compiler's module"
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_cpu_call_needs_no_compiler(tmp_path: Path) -> None:
    """warmup and a call on a CPU: no cache directory, no CUDA module."""
    done = python(
        """
        import sys, torch, qkrope
        spec = qkrope.Spec(2, 1, 8)
        qkrope.warmup(spec, device="cpu", dtype=torch.float32)
        q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
        qkrope.qk_norm_rope_(q, k, None, None, torch.arange(3), spec)
        loaded = [n for n in sys.modules if n.startswith(("cuda.bindings.nvrtc", "qkrope.cuda"))]
        assert not loaded, loaded
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_warmup_on_a_cpu(folder: Path, compiles: list[str], dtype: torch.dtype) -> None:
    spec = Spec(2, 1, 8, rope=Rope(dim=4))
    assert qkrope.warmup(spec, "cpu", dtype, weight_dtype=torch.float32) is None
    assert qkrope.warmup(spec, torch.device("cpu"), dtype) is None
    assert not compiles and not folder.exists()
