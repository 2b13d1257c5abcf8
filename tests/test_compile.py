"""What torch.compile and torch.export make of the calls."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkrope
from cases import ANGLES, Call, Recipe, assert_same_bits
from op_calls import CPU, RECIPES, SPEC, outputs, views
from qkrope import torch_op  # noqa: F401  registers the ops
from qkrope.spec import DynamicNTK, Rope, Spec

OPS = torch.ops.qkrope
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


# ---- torch.compile ----------------------------------------------------------------------------


class Graphs:
    """A backend that keeps the graphs it is given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inner = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return self.inner(graph, inputs)

    def nodes(self) -> list[str]:
        """The functions called, in order."""
        return [str(n.target) for g in self.graphs for n in g.graph.nodes if n.op[:4] == "call"]

    def ours(self) -> list[str]:
        return [name for name in self.nodes() if name.startswith("qkrope.")]


def compiled_calls() -> dict[str, tuple[str, Callable[[Call], Any]]]:
    def new(call: Call) -> Any:
        return qkrope.qk_norm_rope(*call.args(), **call.extras)

    def into(call: Call) -> Any:
        return qkrope.qk_norm_rope(*call.args(), **call.extras, out=outputs(call))

    def in_place(call: Call) -> Any:
        qkrope.qk_norm_rope_(*call.args(), **call.extras)
        return views(call)

    def in_place_into(call: Call) -> Any:
        out = outputs(call)
        qkrope.qk_norm_rope_(*call.args(), **call.extras, out=out)
        return out

    def packed(call: Call) -> Any:
        qkrope.qkv_norm_rope_(call.qkv, *call.rest(), **call.packed_extras())
        return views(call)

    def packed_into(call: Call) -> Any:
        out = outputs(call)
        qkrope.qkv_norm_rope_(call.qkv, *call.rest(), **call.packed_extras(), out=out)
        return out

    return {
        "new": ("qk_norm_rope.default", new),
        "into": ("qk_norm_rope.out", into),
        "in place": ("qk_norm_rope_.default", in_place),
        "in place, into": ("qk_norm_rope.out", in_place_into),
        "packed": ("qkv_norm_rope_.", packed),
        "packed, into": ("qkv_norm_rope_.out", packed_into),
    }


CALLS = compiled_calls()


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case, recipe in CPU.items()
        for name in CALLS
        if recipe.layout == "packed" or not name.startswith("packed")
    ],
)
def test_a_compiled_call_is_one_node(case: str, name: str) -> None:
    (op, function), recipe = CALLS[name], CPU[case]
    graphs = Graphs()
    call = recipe.make()
    got = torch.compile(function, backend=graphs, fullgraph=True)(call)
    ours = graphs.ours()
    assert len(ours) == 1 and ours[0].startswith(f"qkrope.{op}"), graphs.nodes()
    call.check(*got)
    if name in ("in place", "packed"):
        call.assert_guards()
    else:
        call.assert_inputs_unchanged()
    for y, want in zip(got, function(recipe.make()), strict=True):
        assert (y is None) == (want is None)
        if y is not None:
            assert_same_bits(y, want)


@pytest.mark.parametrize("angle", ANGLES)
def test_every_angle_source_compiles(angle: str) -> None:
    recipe = Recipe(SPEC, angle=angle, layout="packed")
    call = recipe.make()
    torch.compile(CALLS["packed"][1], backend="eager", fullgraph=True)(call)
    call.check(call.q, call.k)


def test_each_group_is_a_node() -> None:
    groups = [
        qkrope.Group(0, 2, 16, weight=torch.rand(16), rope=Rope(8), head_stride=32),
        qkrope.Group(64, 3, 16, rope=Rope(), scale=0.5),
    ]
    graphs = Graphs()

    def function(x: Tensor) -> Tensor:
        y = x * 1
        qkrope.norm_rope_groups_(y, groups, torch.arange(5))
        return y

    x = torch.randn(2, 5, 64 + 3 * 16 + 7)
    got = torch.compile(function, backend=graphs, fullgraph=True)(x)
    assert graphs.ours() == ["qkrope.qk_norm_rope_.default"] * 2
    assert torch.equal(got, function(x)) and not torch.equal(got, x)


def test_token_counts_are_symbols() -> None:
    """One graph serves every length, and every length that DynamicNTK is told."""
    spec = replace(SPEC, rope=replace(SPEC.rope, scaling=DynamicNTK(2.0, 64)))
    graphs = Graphs()

    def function(q: Tensor, k: Tensor, positions: Tensor) -> Any:
        return qkrope.qk_norm_rope(q, k, None, None, positions, spec, seq_len=q.shape[0] * 20)

    compiled = torch.compile(function, backend=graphs, fullgraph=True, dynamic=True)
    # Sizes that are equal in the first call are taken for one symbol: no size of 3, 2 or 16.
    for tokens in (5, 7, 40):
        q, k = torch.randn(tokens, 3, 16), torch.randn(tokens, 2, 16)
        got = compiled(q, k, torch.arange(tokens))
        for y, want in zip(got, function(q, k, torch.arange(tokens)), strict=True):
            assert_same_bits(y, want)
    assert len(graphs.graphs) == 1


def test_a_spec_is_part_of_the_graph() -> None:
    """Another Spec is another graph, an equal one is not; two in a graph are two."""
    graphs = Graphs()
    call = RECIPES["plain"].make()
    other = replace(SPEC, rope=replace(SPEC.rope, theta=1e4))

    def function(*specs: Spec) -> list[Any]:
        return [qkrope.qk_norm_rope(*call.args()[:-1], spec) for spec in specs]

    compiled = torch.compile(function, backend=graphs, fullgraph=True)
    for specs in ((SPEC,), (other,), (replace(SPEC),), (SPEC, other)):
        for got, want in zip(compiled(*specs), function(*specs), strict=True):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert [
        len(g.graph.find_nodes(op="call_function", target=OPS.qk_norm_rope.default))
        for g in graphs.graphs
    ] == [1, 1, 2]


def test_a_wrong_argument_is_named() -> None:
    call = RECIPES["packed"].make()

    @torch.compile(backend="eager")
    def function(**changes: Any) -> Any:
        return qkrope.qk_norm_rope(*call.args()[:-1], changes.pop("spec", SPEC), **changes)

    for changes, error, text in (
        ({"spec": "qwen3"}, TypeError, "spec: expected a qkrope.Spec, got str"),
        ({"cos_sin": (torch.ones(7, 4),)}, TypeError, "cos_sin: expected a pair"),
        ({"q_bias": torch.ones(15)}, ValueError, "q_bias: expected"),
        ({"angle": 3}, TypeError, "angle: expected a keyword of"),
        ({"inv_freq": torch.ones(5)}, ValueError, "inv_freq: expected shape"),
        ({"out": (torch.ones(7, 3, 16), None)}, TypeError, r"out\[1\]: expected a tensor"),
    ):
        torch._dynamo.reset()
        with pytest.raises(error, match=text):
            function(**changes)
    call.assert_inputs_unchanged()


class Attention(nn.Module):
    """One attention block, with the packed call or with q and k as views of the projection."""

    def __init__(self, packed: bool = True) -> None:
        super().__init__()
        self.spec, self.packed = Spec(4, 2, 16), packed
        self.qkv, self.out = nn.Linear(32, 8 * 16), nn.Linear(64, 32)
        self.q_weight = nn.Parameter(torch.rand(16))
        self.k_weight = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        qkv = self.qkv(x)
        rest = (self.q_weight, self.k_weight, positions, self.spec)
        if self.packed:
            qkrope.qkv_norm_rope_(qkv, *rest)
        q, k, v = (t.unflatten(-1, (-1, 16)) for t in qkv.split([64, 32, 32], -1))
        if not self.packed:
            qkrope.qk_norm_rope_(q, k, *rest)
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def _block(device: str = "cpu", packed: bool = True) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(5)
    block = Attention(packed).to(device)
    return block, torch.randn(2, 7, 32, device=device), torch.arange(7, device=device)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_inductor_makes_one_call_and_no_copy(packed: bool, dynamic: bool) -> None:
    """Read off the code that Inductor writes for a CPU; what it calls does not depend on that."""
    block, x, positions = _block("cpu", packed)
    want = block(x, positions)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    got, code = _run_and_get_code(compiled, x, positions)
    assert torch.allclose(got, want, atol=1e-5)
    lines = "\n".join(code).splitlines()
    calls = [line for line in lines if "torch.ops.qkrope." in line]
    name = "qkv_norm_rope_" if packed else "qk_norm_rope_"
    assert len(calls) == 1 and f"torch.ops.qkrope.{name}.default(" in calls[0]
    # Between the projection and our call nothing runs, so nothing copies; what reads the result
    # comes after it.
    projection = next(i for i, line in enumerate(lines) if "extern_kernels.addmm" in line)
    between = lines[projection + 1 : lines.index(calls[0])]
    assert not [line for line in between if "(" in line and not _bookkeeping(line)], between
    assert not [line for line in lines if "clone" in line and "#" not in line]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_inductor_on_a_gpu(cuda: str, packed: bool) -> None:
    block, x, positions = _block(cuda, packed)
    want = block(x, positions)
    got, code = _run_and_get_code(torch.compile(block, fullgraph=True), x, positions)
    assert torch.allclose(got, want, atol=1e-5)
    name = "qkv_norm_rope_" if packed else "qk_norm_rope_"
    assert "\n".join(code).count(f"torch.ops.qkrope.{name}.default(") == 1


def _run_and_get_code(*args: Any) -> Any:
    from torch._inductor.utils import run_and_get_code

    return run_and_get_code(*args)


def _bookkeeping(line: str) -> bool:
    text = line.strip()
    return text.startswith(("#", "del ", "assert_size_stride", "assert_alignment"))


# ---- torch.export -----------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    """Once `import qkrope.torch_op` has been said there; any number of tokens."""
    block, x, positions = _block()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    for strict, block.packed in ((False, True), (True, True), (False, False)):
        program = torch.export.export(
            block, (x, positions), dynamic_shapes=({1: tokens}, {0: tokens}), strict=strict
        )
        ours = [n for n in program.graph.nodes if str(n.target).startswith("qkrope.")]
        assert len(ours) == 1
        torch.export.save(program, tmp_path / f"{strict} {block.packed}.pt2")
    x, positions = torch.randn(2, 11, 32), torch.arange(11)
    torch.save((x, positions, block(x, positions)), tmp_path / "case.pt")
    code = """
        import sys, torch
        folder = sys.argv[1]
        try:
            torch.export.load(folder + "/True True.pt2")
        except RuntimeError:  # torch says on stderr what is missing
            pass
        else:
            raise AssertionError("loaded without the ops")
        import qkrope.torch_op
        x, positions, want = torch.load(folder + "/case.pt")
        for name in ("False True", "True True", "False False"):
            program = torch.export.load(f"{folder}/{name}.pt2").module()
            with torch.no_grad():
                got = program(x, positions)
            assert torch.equal(got, want), (name, (got - want).abs().max())
    """
    done = python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "failed to resolve torch.ops.qkrope.qkv_norm_rope_.default" in done.stderr


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("order", ["eager first", "compiled first"])
def test_the_ops_are_registered_when_a_call_is_traced(order: str) -> None:
    """Not at import and not by an eager call; a compile may be what touches qkrope first."""
    code = """
        import sys, torch, qkrope
        spec, positions, x = qkrope.Spec(2, 1, 8), torch.arange(5), torch.randn(5, 32)

        def function(x):
            y = x * 1
            qkrope.qkv_norm_rope_(y, None, None, positions, spec)
            return y

        if sys.argv[1] == "eager first":
            function(x)
        assert "qkrope.torch_op" not in sys.modules
        got = torch.compile(function, backend="eager", fullgraph=True)(x)
        assert "qkrope.torch_op" in sys.modules
        assert torch.equal(got, function(x)) and not torch.equal(got, x)
    """
    done = python(code, order)
    assert done.returncode == 0, done.stderr


# ---- CUDA graphs ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_reduce_overhead(cuda: str, packed: bool) -> None:
    """mode="reduce-overhead" captures the call and replays it on new inputs."""
    block, x, positions = _block(cuda, packed)
    qkrope.warmup(block.spec, cuda, torch.float32)
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for step in range(5):
        x, positions = torch.randn_like(x), positions + step
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.allclose(compiled(x, positions), block(x, positions), atol=1e-4)
    trees = sys.modules["torch._inductor.cudagraph_trees"]
    manager = trees.get_container(torch.cuda.current_device()).tree_manager
    assert manager is not None and manager.roots, "nothing was captured"
