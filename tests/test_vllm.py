"""qkrope behind vLLM's op, on stubs with the schemas of released wheels."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from cases import Recipe, assert_same_bits
from qkrope.integrations import vllm
from qkrope.spec import Rope, Spec

# As the wheels' libraries register it: vllm/_C_stable_libtorch.abi3.so, vllm/_C.abi3.so.
SCHEMAS = {
    "vllm 0.33.0": (
        "fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, "
        "int head_dim, float eps, Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, "
        "bool is_neox, Tensor position_ids, int forced_token_heads_per_warp=-1) -> ()"
    ),
    "vllm 0.14.1": (
        "fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, "
        "int head_dim, float eps, Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, "
        "bool is_neox, Tensor position_ids) -> ()"
    ),
}
LATEST = "vllm 0.33.0"


def theirs(*args: Any) -> None:
    raise AssertionError("theirs")


@pytest.fixture
def engine() -> Iterator[None]:
    """A vLLM that can be imported and whose ops are not there yet."""
    assert not hasattr(torch.ops._C, "fused_qk_norm_rope") and "vllm" not in sys.modules
    for path in ("vllm", "vllm._custom_ops"):
        sys.modules[path] = ModuleType(path)
    yield
    vllm.uninstall()
    for path in ("vllm", "vllm._custom_ops"):
        del sys.modules[path]


@pytest.fixture
def op(engine: None, request: pytest.FixtureRequest) -> Iterator[Any]:
    """vLLM's op, with a kernel of its own, of the release that the test names or the latest."""
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(SCHEMAS[getattr(request, "param", LATEST)])
    library.impl("fused_qk_norm_rope", theirs, "CUDA")
    library.impl("fused_qk_norm_rope", theirs, "CPU")
    yield torch.ops._C.fused_qk_norm_rope
    vllm.uninstall()
    library._destroy()


HEADS = (5, 2, 3)


def recipe(head_dim: int = 64, rotary: int = 32, neox: bool = True, **more: Any) -> Recipe:
    spec = Spec(*HEADS[:2], head_dim, rope=Rope(rotary, pairing="half" if neox else "interleaved"))
    return Recipe(spec, layout="packed", other_heads=HEADS[2], angle="cache", **more)


def arguments(call: Any) -> dict[str, Any]:
    """What vLLM passes."""
    spec = call.spec
    return {
        "qkv": call.qkv,
        **dict(zip(("num_heads_q", "num_heads_k", "num_heads_v"), HEADS, strict=True)),
        **{"head_dim": spec.head_dim, "eps": spec.norm.eps},
        **{"q_weight": call.q_weight, "k_weight": call.k_weight},
        "cos_sin_cache": call.extras["cos_sin_cache"],
        **{"is_neox": spec.rope.pairing == "half", "position_ids": call.positions},
    }


def check(call: Any) -> None:
    call.check(call.q, call.k)
    call.assert_guards()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("op", SCHEMAS, indirect=True)
@pytest.mark.parametrize("neox", [True, False], ids=["half", "interleaved"])
@pytest.mark.parametrize("table", [FP32, BF16], ids=["fp32 table", "bf16 table"])
def test_the_call(op: Any, neox: bool, table: torch.dtype, device: str) -> None:
    vllm.install()
    for head_dim, rotary in ((64, 64), (128, 96), (256, 64), (80, 20)):
        call = recipe(head_dim, rotary, neox, table_dtype=table).make(device)
        assert op(*arguments(call).values()) is None  # in order, as vllm._custom_ops calls it
        check(call)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=["fp16", "fp32"])
def test_other_dtypes_and_positions(op: Any, dtype: torch.dtype, device: str) -> None:
    vllm.install()
    call = recipe(dtype=dtype, position_dtype=torch.int32, lead=(0,)).make(device)
    op(**arguments(call))
    check(call)
    call = recipe(dtype=dtype, position_dtype=torch.int32, lead=(33,)).make(device)
    op(**arguments(call), forced_token_heads_per_warp=4)  # which changes nothing
    check(call)


def test_as_the_fusion_pass_calls_it(op: Any, device: str) -> None:
    vllm.install()
    call = recipe().make(device)
    given = arguments(call) | {"forced_token_heads_per_warp": -1}
    before = call.qkv.clone()
    _, result = auto_functionalized(op.default, **given)
    assert_same_bits(call.qkv, before)
    op(**given)
    check(call)
    assert_same_bits(result, call.qkv)


def test_uninstall_gives_the_kernel_back(op: Any, device: str) -> None:
    call = recipe().make(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, that a kernel is hidden, is not shown
        vllm.install()
    vllm.install()
    op(**arguments(call))
    vllm.uninstall()
    with pytest.raises(AssertionError, match="theirs"):
        op(**arguments(call))
    vllm.uninstall()
    vllm.install()
    op(**arguments(recipe().make(device)))


def test_a_build_without_the_op(engine: None, device: str) -> None:
    vllm.install()
    op = torch.ops._C.fused_qk_norm_rope
    arguments_ = op.default._schema.arguments
    assert [a.name for a in arguments_ if a.alias_info and a.alias_info.is_write] == ["qkv"]
    released = torch._C.parse_schema(SCHEMAS[LATEST])
    assert [(a.name, str(a.type), a.default_value) for a in arguments_] == [
        (a.name, str(a.type), a.default_value) for a in released.arguments
    ]
    call = recipe().make(device)
    torch.library.opcheck(op.default, (), arguments(call))
    torch._dynamo.reset()
    torch.compile(op, fullgraph=True, backend="aot_eager")(**arguments(call))
    check(call)
    vllm.uninstall()
    assert not hasattr(torch.ops._C, "fused_qk_norm_rope")


def test_without_vllm() -> None:
    with pytest.raises(ImportError, match="vLLM: expected vllm._custom_ops, got ModuleNotFound"):
        vllm.install()
    assert not hasattr(torch.ops._C, "fused_qk_norm_rope")


def test_another_signature_changes_nothing(engine: None) -> None:
    library = torch.library.Library("_C", "FRAGMENT")
    try:
        library.define(SCHEMAS[LATEST].replace("cos_sin_cache", "cos_sin_table"))
        library.impl("fused_qk_norm_rope", theirs, "CPU")
        expected = r"expected the arguments \(.*cos_sin_cache.*\), got \(.*cos_sin_table.*\)"
        with pytest.raises(RuntimeError, match=rf"fused_qk_norm_rope: {expected}"):
            vllm.install()
        with pytest.raises(AssertionError, match="theirs"):
            torch.ops._C.fused_qk_norm_rope(*arguments(recipe().make()).values())
    finally:
        library._destroy()


def test_errors_by_name_and_nothing_written(op: Any) -> None:
    vllm.install()
    call = recipe().make()
    given = arguments(call)
    table = given["cos_sin_cache"]
    for change, text in (
        ({"num_heads_v": 4}, r"qkv: expected a last dimension of .* = 704, got shape \[7, 640\]"),
        ({"cos_sin_cache": table[0]}, r"cos_sin_cache: expected shape \[max_position, rotary_dim"),
        ({"cos_sin_cache": torch.ones(9, 66)}, "Rope.dim: expected"),
        ({"position_ids": given["position_ids"] + 50}, "positions: expected"),
        ({"head_dim": 0}, "qkv: expected a last dimension"),
        ({"q_weight": given["q_weight"][:-2]}, "q_weight: expected"),
    ):
        with pytest.raises(ValueError, match=text):
            op(**{**given, **change})
    call.assert_inputs_unchanged()


@pytest.mark.parametrize(
    ("plugins", "installs"), [("qkrope", True), ("a,qkrope", True), ("a", False), (None, False)]
)
def test_plugin(
    engine: None, plugins: str | None, installs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM loads every plugin where the variable is not set: this one waits to be named."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    vllm.plugin()
    assert hasattr(torch.ops._C, "fused_qk_norm_rope") is installs


def test_entry_point() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="vllm.general_plugins", name="qkrope")
    assert found.load() is vllm.plugin
