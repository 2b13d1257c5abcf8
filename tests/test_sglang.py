"""qkrope behind SGLang's names, on stub modules with the signatures of released wheels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Recipe, assert_same_bits
from qkrope import compat
from qkrope.integrations import sglang
from qkrope.spec import Rope, Spec

PACKED = (
    "qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, base, "
    "is_neox, position_ids, factor, low, high, attention_factor, rotary_dim=None"
)
OUT = (
    "qkv, q_weight, k_weight, position_ids, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, "
    "base, is_neox, factor, low, high, attention_factor, rotary_dim"
)
CAN_USE = "head_dim, is_neox, dtype, yarn=False"
AOT = {"fused_qk_norm_rope": PACKED}
JIT = AOT | {"fused_qk_norm_rope_out": OUT, "can_use_fused_qk_norm_rope": CAN_USE}
JIT_KERNEL, KERNELS = sglang._MODULES[1:]
# Parameters read from the wheels' own sources: sgl_kernel/moe.py, which sgl_kernel exports, and the
# files of the other two modules. The models import the names of theirs.
RELEASES: dict[str, dict[str, dict[str, str]]] = {
    "sgl-kernel 0.3.21": {"sgl_kernel": AOT},
    "sglang-kernel 0.4.10": {"sgl_kernel": AOT},
    "sglang 0.5.10": {JIT_KERNEL: JIT},
    "sglang 0.5.13": {JIT_KERNEL: JIT, "sgl_kernel": AOT},
    "sglang 0.5.17": {KERNELS: JIT, "sgl_kernel": AOT},
    "sglang 0.5.21": {KERNELS: JIT},
    "sglang 0.5.23": {KERNELS: JIT},
}
MODEL = "sglang.srt.models.qwen3_moe"


def function(name: str, parameters: str) -> Callable[..., Any]:
    """A function of SGLang's name and parameters that must not run."""
    names: dict[str, Any] = {}
    exec(f"def {name}({parameters}):\n    raise AssertionError('theirs')", names)
    return names[name]


def module(path: str, **names: Any) -> ModuleType:
    made = ModuleType(path)
    vars(made).update(names)
    sys.modules[path] = made
    return made


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    before = set(sys.modules)
    assert not any(path.partition(".")[0] in sglang._PACKAGES for path in before)
    yield
    sglang.uninstall()
    for path in set(sys.modules) - before:
        if path.partition(".")[0] in sglang._PACKAGES:
            del sys.modules[path]


def engine(release: str) -> dict[str, ModuleType]:
    """The modules of a release, and a model that imported from each."""
    made = {
        path: module(path, **{name: function(name, p) for name, p in names.items()})
        for path, names in RELEASES[release].items()
    }
    for number, defining in enumerate(list(made.values())):
        names = {name: vars(defining)[name] for name in JIT if name in vars(defining)}
        path = f"{MODEL}_{number}"
        made[path] = module(path, renamed=names["fused_qk_norm_rope"], other=len, **names)
    return made


def theirs(modules: dict[str, ModuleType]) -> dict[str, Any]:
    """Every function of a module, by its full name."""
    return {
        f"{path}.{name}": value
        for path, found in modules.items()
        for name, value in vars(found).items()
        if name in (*JIT, "renamed")
    }


@pytest.mark.parametrize("release", RELEASES)
def test_install_and_uninstall(release: str) -> None:
    modules = engine(release)
    before = theirs(modules)
    assert sorted(sglang.install()) == sorted(before)
    after = theirs(modules)
    assert not {id(f) for f in after.values()} & {id(f) for f in before.values()}
    assert sglang.install() == ()  # all is replaced already

    path = next(iter(modules))
    late = {name: vars(modules[path])[name] for name in JIT if name in vars(modules[path])}
    modules["late"] = module("sglang.srt.models.late", **late)
    restored = sglang.uninstall()
    assert set(restored) == set(before) | {f"sglang.srt.models.late.{name}" for name in late}
    assert {name: f for name, f in theirs(modules).items() if name in before} == before
    assert all(vars(modules["late"])[name] is before[f"{path}.{name}"] for name in late)
    assert sglang.uninstall() == ()


def test_a_module_that_is_loaded_later() -> None:
    modules = engine("sglang 0.5.23")
    sglang.install()
    aot = module("sgl_kernel", fused_qk_norm_rope=function("fused_qk_norm_rope", PACKED))
    assert sglang.install() == ("sgl_kernel.fused_qk_norm_rope",)
    sglang.uninstall()
    with pytest.raises(AssertionError, match="theirs"):
        aot.fused_qk_norm_rope(*[None] * 16)
    with pytest.raises(AssertionError, match="theirs"):
        modules[KERNELS].fused_qk_norm_rope(*[None] * 16)


def arguments(call: Any, heads: tuple[int, ...]) -> dict[str, Any]:
    """What SGLang's models pass."""
    return {
        "qkv": call.qkv,
        **dict(zip(("num_heads_q", "num_heads_k", "num_heads_v"), heads, strict=True)),
        **{"head_dim": 64, "eps": 1e-6, "q_weight": call.q_weight, "k_weight": call.k_weight},
        **{"base": 1e6, "is_neox": True, "position_ids": call.positions.int()},
        **{"factor": 4.0, "low": 2.0, "high": 7.0, "attention_factor": 1.14},
    }


SPEC, HEADS = Spec(5, 2, 64, rope=Rope()), (5, 2, 3)
RECIPE = Recipe(SPEC, layout="packed", other_heads=3)


def expected(device: str) -> Tensor:
    call = RECIPE.make(device)
    compat.fused_qk_norm_rope(**arguments(call, HEADS))
    return call.qkv


@pytest.mark.parametrize("release", ["sgl-kernel 0.3.21", "sglang 0.5.13", "sglang 0.5.23"])
def test_the_calls(release: str, device: str) -> None:
    modules = engine(release)
    sglang.install()
    for found in modules.values():
        call = RECIPE.make(device)
        given = arguments(call, HEADS)
        assert found.fused_qk_norm_rope(*given.values()) is None  # in order, as models call it
        assert_same_bits(call.qkv, expected(device))
        call.assert_guards()
        if hasattr(found, "fused_qk_norm_rope_out"):
            call = RECIPE.make(device)
            found.fused_qk_norm_rope_out(**arguments(call, HEADS), rotary_dim=64)
            assert_same_bits(call.qkv, expected(device))
            assert found.can_use_fused_qk_norm_rope(64, True, torch.bfloat16, True)


@pytest.mark.parametrize("name", ["fused_qk_norm_rope", "fused_qk_norm_rope_out"])
def test_a_traced_call_is_one_node(name: str, device: str) -> None:
    """Also the first of its kind, whose Spec a graph could not make."""
    modules = engine("sglang 0.5.23")
    sglang.install()
    compat._specs.clear()
    call, graphs = RECIPE.make(device), []
    given = arguments(call, HEADS) | ({"rotary_dim": 64} if name.endswith("out") else {})

    def forward(**given: Any) -> None:
        getattr(modules[KERNELS], name)(**given)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    torch.compile(forward, fullgraph=True, backend=backend)(**given)
    assert graphs == [[getattr(torch.ops.qkrope, name).default]]
    assert_same_bits(call.qkv, expected(device))


def test_opcheck(device: str) -> None:
    engine("sglang 0.5.23")
    sglang.install()
    call = RECIPE.make(device)
    torch.library.opcheck(torch.ops.qkrope.fused_qk_norm_rope.default, (), arguments(call, HEADS))


def test_a_registered_op_in_place_of_a_function() -> None:
    """Releases before 0.5.23 have ``torch.ops.sglang.fused_qk_norm_rope_out`` for one of them."""
    modules = engine("sglang 0.5.10")
    library = torch.library.Library("sglang", "FRAGMENT")
    schema = torch.library.infer_schema(compat.fused_qk_norm_rope_out, mutates_args=["qkv"])
    library.define(f"fused_qk_norm_rope_out{schema}")
    try:
        packet = torch.ops.sglang.fused_qk_norm_rope_out
        modules[JIT_KERNEL].fused_qk_norm_rope_out = packet
        assert f"{JIT_KERNEL}.fused_qk_norm_rope_out" in sglang.install()
        assert modules[JIT_KERNEL].fused_qk_norm_rope_out is not packet
        sglang.uninstall()
        assert modules[JIT_KERNEL].fused_qk_norm_rope_out is packet
    finally:
        library._destroy()


def test_the_versions_that_are_written_down() -> None:
    """The docstring, the table of the documentation and the stubs above name the same."""
    page = (Path(__file__).parents[1] / "docs/integrations/engines.md").read_text()
    for path in (JIT_KERNEL, KERNELS):
        versions = [r.removeprefix("sglang ") for r, found in RELEASES.items() if path in found]
        text = f"sglang {', '.join(versions)}"
        assert f"| `{path}` | {text} |" in page
        lines = [line.split() for line in str(sglang.__doc__).splitlines()]
        assert [path, *text.split()] in lines


def test_without_sglang() -> None:
    with pytest.raises(ImportError) as raised:
        sglang.install()
    text = str(raised.value)
    assert text.startswith("SGLang: expected one of its modules, got sgl_kernel (ModuleNotFound")
    assert all(path in text for path in sglang._MODULES)


BROKEN = (
    ("raise OSError('libcuda.so.1 is not there')", OSError, "OSError: libcuda.so.1 is not there"),
    ("import qkrope_is_not_here", ModuleNotFoundError, "ModuleNotFoundError: .*qkrope_is_not_here"),
    ("import sgl", ModuleNotFoundError, "ModuleNotFoundError: .*'sgl'"),  # no parent of sgl_kernel
    ("raise ModuleNotFoundError('no name')", ModuleNotFoundError, "ModuleNotFoundError: no name"),
)


def test_a_library_that_does_not_load(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, and SGLang may get it to load later: no other module makes up for it."""
    modules = engine("sglang 0.5.23")
    before = theirs(modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    for line, kind, said in BROKEN:
        (tmp_path / "sgl_kernel.py").write_text(line)
        importlib.invalidate_caches()
        with pytest.raises(ImportError, match=f"got sgl_kernel .{said}") as caught:
            sglang.install()
        assert type(caught.value.__cause__) is kind
        assert theirs(modules) == before and sglang.uninstall() == ()


def test_a_package_without_the_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent package that is there is no broken module."""
    (tmp_path / "sglang" / "jit_kernel").mkdir(parents=True)
    for folder in ("sglang", "sglang/jit_kernel"):
        (tmp_path / folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    module("sgl_kernel", fused_qk_norm_rope=function("fused_qk_norm_rope", PACKED))
    assert sglang.install() == ("sgl_kernel.fused_qk_norm_rope",)


def test_a_module_without_the_call() -> None:
    module("sgl_kernel", silu_and_mul=len)
    with pytest.raises(ImportError, match="sgl_kernel .without fused_qk_norm_rope"):
        sglang.install()


@pytest.mark.parametrize("name", JIT)
def test_another_signature_changes_nothing(name: str) -> None:
    modules = engine("sglang 0.5.23")
    changed = JIT[name].replace("head_dim", "head_size")
    setattr(modules[KERNELS], name, function(name, changed))
    before = theirs(modules)
    expected = r"expected the parameters \(.*head_dim.*\), got \(.*head_size.*\)"
    with pytest.raises(RuntimeError, match=rf"{KERNELS}\.{name}: {expected}"):
        sglang.install()
    assert theirs(modules) == before and sglang.uninstall() == ()


def test_errors_are_those_of_the_calls() -> None:
    modules = engine("sglang 0.5.23")
    sglang.install()
    given = arguments(RECIPE.make(), HEADS)
    with pytest.raises(ValueError, match="head_dim: expected"):
        modules[KERNELS].fused_qk_norm_rope(**{**given, "head_dim": 63})


@pytest.mark.parametrize(
    ("plugins", "installs"), [("qkrope", True), ("a, qkrope", True), ("a", False), (None, False)]
)
def test_plugin(plugins: str | None, installs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang loads every plugin where the variable is not set: this one waits to be named."""
    engine("sglang 0.5.23")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    sglang.plugin()
    assert bool(sglang.uninstall()) is installs


def test_entry_point() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="sglang.srt.plugins", name="qkrope")
    assert found.load() is sglang.plugin
