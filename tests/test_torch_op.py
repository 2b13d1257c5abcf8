"""The torch ops: schemas, fakes, and what torch.compile and torch.export make of the calls."""

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
from qkrope import torch_op  # noqa: F401  registers the ops
from qkrope.spec import DynamicNTK, Norm, Rope, Spec

SPEC = Spec(3, 2, 16, rope=Rope(8, 1e6))
OPS = torch.ops.qkrope
BF16 = torch.bfloat16
Args = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def flat(call: Call, *inputs: Tensor | None, **extras: Any) -> Args:
    """A call's arguments as a schema has them."""
    more = {**call.extras, **extras}
    if cos_sin := more.pop("cos_sin", None):
        apart = cos_sin if isinstance(cos_sin[0], Tensor) else (*cos_sin[0], *cos_sin[1])
        more |= dict(zip(("cos", "sin", "k_cos", "k_sin"), apart, strict=False))
    more |= dict(zip(("q_out", "k_out", "v_out"), more.pop("out", ()), strict=False))
    for name in ("q_scale", "k_scale"):
        if isinstance(more.get(name), float):
            more[f"{name}_number"] = more.pop(name)
    if len(inputs) == 1:
        more.pop("v", None)
    positions = call.positions
    if isinstance(positions, tuple):
        positions, more["k_positions"] = positions
    return (*inputs, call.q_weight, call.k_weight, positions, call.spec.canonical()), more


def outputs(call: Call) -> tuple[Tensor | None, ...]:
    return tuple(
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in _views(call)
    )


# ---- the ops ----------------------------------------------------------------------------------


def test_schemas_say_what_is_written() -> None:
    written = {
        f"{packet}.{overload}": [
            a.name
            for a in getattr(getattr(OPS, packet), overload)._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        for packet, overload in (
            ("qk_norm_rope", "default"),
            ("qk_norm_rope", "out"),
            ("qk_norm_rope_", "default"),
            ("qkv_norm_rope_", "default"),
            ("qkv_norm_rope_", "more"),
            ("qkv_norm_rope_", "out"),
        )
    }
    assert written == {
        "qk_norm_rope.default": [],
        "qk_norm_rope.out": ["q_out", "k_out", "v_out"],
        "qk_norm_rope_.default": ["q", "k", "v"],
        "qkv_norm_rope_.default": ["qkv"],
        "qkv_norm_rope_.more": ["qkv"],
        "qkv_norm_rope_.out": ["q_out", "k_out", "v_out"],
    }


RECIPES = {
    "plain": Recipe(SPEC, lead=(2, 3)),
    "packed": Recipe(SPEC, layout="packed", lead=(2, 3)),
    "transposed": Recipe(SPEC, layout="transposed", lead=(2, 3), angle="pair"),
    "cache": Recipe(SPEC, layout="packed", angle="cache", weights="q"),
    "inv_freq": Recipe(SPEC, angle="inv_freq64", weights="-", dtype=torch.float32),
    "one side": Recipe(SPEC, layout="odd", sides="k"),
    "two lengths": Recipe(SPEC, k_lead=(4,)),
    "no rotation": Recipe(replace(SPEC, rope=None), layout="packed"),
}
# What only the CPU kernels run so far.
OPTIONS = {
    "biases": Recipe(SPEC, layout="packed", bias=True, weight_shape="head"),
    "scales": Recipe(SPEC, layout="packed", scale="number"),
    "scale tensors": Recipe(SPEC, scale="token"),
    "two tables": Recipe(SPEC, k_lead=(4,), angle="channel", tables="separate"),
    "some tokens": Recipe(SPEC, layout="packed", lead=(2, 9), rotate=(2, 7)),
    "v": Recipe(replace(SPEC, v_norm=Norm("rms")), layout="packed"),
    "v apart": Recipe(replace(SPEC, v_norm=Norm("rms")), layout="transposed", lead=(2, 3)),
}
CPU = RECIPES | OPTIONS


@pytest.mark.parametrize("case", CPU)
def test_opcheck(case: str, device: str) -> None:
    """Mutation as the schema says, the fake as the op, the same under AOT with dynamic shapes."""
    if device != "cpu" and case in OPTIONS:
        pytest.skip("only the CPU kernels run this option")
    call = CPU[case].make(device)
    out = {"out": outputs(call)}
    ops = [
        (OPS.qk_norm_rope.default, flat(call, call.q, call.k)),
        (OPS.qk_norm_rope.out, flat(call, call.q, call.k, **out)),
        (OPS.qk_norm_rope_.default, flat(call, call.q, call.k)),
    ]
    if call.qkv is not None:
        args, more = flat(call, call.qkv)
        ops.append((OPS.qkv_norm_rope_.more, (args, more)))
        ops.append((OPS.qkv_norm_rope_.out, flat(call, call.qkv, **out)))
        if not more:
            ops.append((OPS.qkv_norm_rope_.default, (args, {})))
    for op, (args, more) in ops:
        torch.library.opcheck(op, args, more)


def test_an_op_has_the_bits_of_the_call(device: str) -> None:
    recipe = RECIPES["packed"]
    want = recipe.make(device)
    qkrope.qkv_norm_rope_(want.qkv, *want.rest())
    for grad in (False, True):
        call = recipe.make(device)
        with torch.set_grad_enabled(grad):
            OPS.qkv_norm_rope_(*flat(call, call.qkv)[0])
        assert_same_bits(call.qkv, want.qkv)
        call.assert_guards()
        q, k = OPS.qk_norm_rope(*flat(*(c := recipe.make(device), c.q, c.k))[0])
        assert_same_bits(q, want.q)
        assert_same_bits(k, want.k)


def test_an_absent_side_has_no_result(device: str) -> None:
    call = Recipe(SPEC, sides="k").make(device)
    (k,) = OPS.qk_norm_rope(*flat(call, call.q, call.k)[0])
    call.check(None, k)


def test_an_out_without_a_tensor_is_refused() -> None:
    """None there would mean the input itself, which these schemas say is not written."""
    call = RECIPES["packed"].make()
    q_out, k_out = outputs(call)
    for op, inputs in (
        (OPS.qk_norm_rope.out, (call.q, call.k)),
        (OPS.qkv_norm_rope_.out, (call.qkv,)),
    ):
        for given, name in (((None, k_out), "out[0]"), ((q_out, None), "out[1]"), ((), "out[0]")):
            args, more = flat(call, *inputs, out=given)
            with pytest.raises(TypeError, match=rf"^{name[:3]}\[{name[4]}\]: expected a tensor"):
                op(*args, **more)
    call.assert_inputs_unchanged()
    call = OPTIONS["v"].make()
    *two, _ = outputs(call)
    for op, inputs in (
        (OPS.qk_norm_rope.out, (call.q, call.k)),
        (OPS.qkv_norm_rope_.out, (call.qkv,)),
    ):
        args, more = flat(call, *inputs, out=two)
        with pytest.raises(TypeError, match=r"^out\[2\]: expected a tensor"):
            op(*args, **more)
    call.assert_inputs_unchanged()


def test_a_text_that_is_no_spec_is_refused() -> None:
    call = RECIPES["packed"].make()
    args, _ = flat(call, call.qkv)
    for text in ("", "{}", args[-1].replace("head_dim", "head_size")):
        with pytest.raises(ValueError, match="^text: expected"):
            OPS.qkv_norm_rope_(*args[:-1], text)
    call.assert_inputs_unchanged()


# ---- gradients --------------------------------------------------------------------------------


GRAD = ("q", "q_weight", "k_weight", "inv_freq")


@pytest.mark.parametrize("name", GRAD)
def test_no_gradient_is_lost(name: str) -> None:
    """A traced call, and an op called by itself, raise where the eager call does."""
    recipe = Recipe(SPEC, angle="inv_freq32", dtype=torch.float32)

    def public(q: Tensor, **more: Tensor) -> Tensor:
        given = {"k": k, "q_weight": w, "k_weight": w, "positions": p, "spec": SPEC, **more}
        return qkrope.qk_norm_rope(q=q * 1, **given)[0]

    def raw(q: Tensor, **more: Tensor) -> Tensor:
        given = {"k": k, "q_weight": w, "k_weight": w, "positions": p, **more}
        return OPS.qk_norm_rope(q=q * 1, spec=SPEC.canonical(), **given)[0]

    call = recipe.make()
    k, w, p = call.k, call.q_weight, call.positions
    leaf = call.extras["inv_freq"] if name == "inv_freq" else getattr(call, name)
    args = {"q": call.q, name: leaf.requires_grad_()}
    text = f"{name}: expected a tensor without requires_grad"
    for function in (public, raw):
        with pytest.raises(ValueError, match=text):
            function(**args)
        for fullgraph in (False, True):
            compiled = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)
            with pytest.raises((ValueError, RuntimeError), match=text):
                compiled(**args)
        with torch.no_grad():
            assert torch.equal(compiled(**args), public(**args))


def test_in_place_refuses_what_requires_grad() -> None:
    call = RECIPES["packed"].make()
    weight = call.q_weight.requires_grad_()

    @torch.compile(backend="eager")
    def packed() -> None:
        qkrope.qkv_norm_rope_(call.qkv, *call.rest())

    @torch.compile(backend="eager")
    def apart() -> None:
        qkrope.qk_norm_rope_(*call.args())

    for function in (packed, apart):
        with pytest.raises(
            (ValueError, RuntimeError), match="q_weight: expected .* in an in-place call"
        ):
            function()
    weight.requires_grad_(False)
    call.assert_inputs_unchanged()


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


def _views(call: Call) -> tuple[Tensor | None, ...]:
    return (call.q, call.k, *([call.extras["v"]] if "v" in call.extras else []))


def compiled_calls() -> dict[str, tuple[str, Callable[[Call], Any]]]:
    def new(call: Call) -> Any:
        return qkrope.qk_norm_rope(*call.args(), **call.extras)

    def into(call: Call) -> Any:
        return qkrope.qk_norm_rope(*call.args(), **call.extras, out=outputs(call))

    def in_place(call: Call) -> Any:
        qkrope.qk_norm_rope_(*call.args(), **call.extras)
        return _views(call)

    def in_place_into(call: Call) -> Any:
        out = outputs(call)
        qkrope.qk_norm_rope_(*call.args(), **call.extras, out=out)
        return out

    def packed(call: Call) -> Any:
        qkrope.qkv_norm_rope_(call.qkv, *call.rest(), **call.packed_extras())
        return _views(call)

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
def test_inductor_makes_one_call_and_no_copy(device: str, packed: bool, dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    block, x, positions = _block(device, packed)
    want = block(x, positions)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    got, code = run_and_get_code(compiled, x, positions)
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
@torch.no_grad()
def test_an_op_in_a_cuda_graph(cuda: str) -> None:
    recipe = Recipe(Spec(4, 2, 64, rope=Rope(48)), layout="packed", lead=(9,))
    call = recipe.make(cuda)
    qkrope.warmup(call.spec, cuda, BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.qkv_norm_rope_(*flat(call, call.qkv)[0])
    graph.replay()
    call.check(call.q, call.k)
    call.assert_guards()


@pytest.mark.gpu
@torch.no_grad()
def test_a_first_call_of_an_op_while_capturing(cuda: str) -> None:
    call = Recipe(Spec(4, 2, 58, rope=Rope(46)), layout="packed", lead=(9,)).make(cuda)
    args = flat(call, call.qkv)[0]
    x = torch.ones(8, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(RuntimeError, match=r"call qkrope.warmup\(spec, device, dtype\)"):
            OPS.qkv_norm_rope_(*args)
    torch.cuda.synchronize()
    call.assert_inputs_unchanged()
    OPS.qkv_norm_rope_(*args)
    call.check(call.q, call.k)


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
