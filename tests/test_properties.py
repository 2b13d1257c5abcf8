"""Random Specs on random layouts, op against oracle, on the CPU and (under -m gpu) on CUDA."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import qkrope
from cases import ANGLES, LAYOUTS, Recipe, assert_same_bits
from qkrope.spec import Linear, Norm, Rope, Spec, YaRN

FLOATS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
EVEN = st.one_of(st.integers(1, 80), st.sampled_from([128, 192, 256])).map(lambda n: 2 * n)
NORMS = st.builds(
    Norm,
    kind=st.sampled_from(["rms", "rms", "rms", "none"]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-3]),
    weight_offset=st.sampled_from([0.0, 1.0]),
)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """What the kernels of every backend run."""
    head_dim = draw(EVEN)
    rope = None
    if draw(st.integers(0, 5)):
        scaling = st.sampled_from([None, Linear(factor=3.0), YaRN.from_ramp(4.0, 1.0, 5.0, 1.25)])
        rope = Rope(
            dim=draw(st.one_of(st.none(), st.integers(1, head_dim // 2).map(lambda n: 2 * n))),
            theta=draw(st.sampled_from([1e4, 1e6, 3.5, 5e8])),
            pairing=draw(st.sampled_from(["half", "interleaved"])),
            scaling=draw(scaling),
        )
    return Spec(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 5)),
        head_dim,
        norm=draw(NORMS),
        k_norm=draw(st.one_of(st.none(), NORMS)),
        rope=rope,
    )


LEADS = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """A Spec, what it runs on and how that lies in memory."""
    lead, dtype = draw(LEADS), draw(FLOATS)
    layout = draw(st.sampled_from([*LAYOUTS, "packed"]))
    angle = draw(st.sampled_from(["spec", "spec", *ANGLES]))
    shapes = ["full", "last", "one"] if len(lead) > 1 else ["full"]
    recipe = Recipe(
        draw(specs()),
        dtype=dtype,
        lead=lead,
        layout=layout,
        weight_dtype=draw(FLOATS),
        weights=draw(st.sampled_from(["both", "both", "q", "k", "-"])),
        sides=draw(st.sampled_from(["both", "both", "q", "k"])),
        position_shape=draw(st.sampled_from(shapes)),
        position_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        angle=angle,
        table_dtype=draw(st.sampled_from([torch.float32, dtype])),
        other_heads=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 10**6)),
    )
    own = layout != "packed" and angle not in ("pair", "channel", "complex")
    if own and recipe.position_shape == "full" and draw(st.booleans()):
        return recipe.but(k_lead=draw(LEADS), sides="both")
    return recipe


# ---- every option -----------------------------------------------------------------------------

EPS = st.sampled_from([1e-6, 1e-5, 1e-3])
OFFSETS = st.sampled_from([0.0, 0.0, 1.0])
WORDS = [f"{norm}/{turn}" for norm in "ABC" for turn in "bhf"]
WORD = st.sampled_from(WORDS)
ROUNDINGS = st.one_of(st.just("once"), WORD, st.tuples(WORD, WORD))


@st.composite
def any_norm(draw: st.DrawFn, head_dim: int) -> Norm:
    kind = draw(st.sampled_from(["rms", "rms", "layer", "l2", "none"]))
    scope = draw(st.sampled_from(["head", "head", "row"]))
    dim = rest = None
    if kind != "none" and scope == "head" and head_dim > 2 and not draw(st.integers(0, 2)):
        dim = 2 * draw(st.integers(1, head_dim // 2 - 1))
        if draw(st.booleans()):
            rest = Norm(draw(st.sampled_from(["rms", "layer", "l2"])), draw(EPS), draw(OFFSETS))
    return Norm(kind, draw(EPS), draw(OFFSETS), scope, dim, rest)


@st.composite
def sections(draw: st.DrawFn, pairs: int) -> dict[str, object]:
    """The axes of so many pairs: none, one set of frequencies for all, or one each."""
    axes = draw(st.integers(2, 4))
    how = draw(st.sampled_from(["one", "one", "sections", "interleaved", "axes"]))
    if how == "one" or pairs < axes:
        return {}
    if how == "interleaved":  # as many pairs for each axis: what always fits
        if pairs % axes:
            return {}
        return {"mrope_section": (pairs // axes,) * axes, "mrope_interleaved": True}
    cuts = draw(st.permutations(range(1, pairs)))[: axes - 1]
    ends = [0, *sorted(cuts), pairs]
    counts = tuple(b - a for a, b in pairwise(ends))
    if how == "sections":
        return {"mrope_section": counts}
    return {"axes_dim": tuple(2 * n for n in counts)}


@st.composite
def any_rope(draw: st.DrawFn, head_dim: int) -> Rope | None:
    if not draw(st.integers(0, 6)):
        return None
    dim = 2 * draw(st.integers(1, head_dim // 2))
    pairing = draw(st.sampled_from(["half", "interleaved", "block_half"]))
    if pairing == "block_half" and dim % 4:
        pairing = "half"
    offset = draw(st.one_of(st.just(0), st.integers(0, (head_dim - dim) // 2).map(lambda n: 2 * n)))
    fields: dict[str, object] = {"dim": dim, "pairing": pairing, "offset": offset}
    if pairing == "half" and draw(st.booleans()):
        fields["pair_distance"] = draw(st.integers(dim // 2, head_dim - offset - dim // 2))
    if pairing == "interleaved" and draw(st.booleans()):
        fields["output_pairing"] = "half"
    fields |= draw(sections(dim // 2))
    if "axes_dim" not in fields:
        scaling = [None, None, Linear(factor=3.0), YaRN.from_ramp(4.0, 1.0, 5.0, 1.25)]
        fields["scaling"] = draw(st.sampled_from(scaling))
        fields["freq_dim"] = draw(st.sampled_from([None, None, 512]))
    theta, reverse = draw(st.sampled_from([1e4, 1e6, 3.5])), draw(st.booleans())
    return Rope(theta=theta, reverse=reverse, **fields)


@st.composite
def any_spec(draw: st.DrawFn) -> Spec:
    head_dim = draw(EVEN)
    norm, rope = draw(any_norm(head_dim)), draw(any_rope(head_dim))
    k_norm = draw(st.one_of(st.none(), any_norm(head_dim)))
    order = draw(st.sampled_from(["norm_first", "norm_first", "rope_first"]))
    return Spec(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 5)),
        head_dim,
        norm=norm,
        k_norm=k_norm,
        rope=rope,
        order=order,
        rounding=draw(ROUNDINGS),
        v_norm=draw(st.one_of(st.none(), any_norm(head_dim))),
    )


@st.composite
def option_recipes(draw: st.DrawFn) -> Recipe:
    """Any Spec with any arguments that go with it."""
    spec, lead, dtype = draw(any_spec()), draw(LEADS), draw(FLOATS)
    angle = draw(st.sampled_from(["spec", "spec", *ANGLES]))
    table = angle in ("pair", "channel", "complex")
    norms = (spec.q_norm, spec.k_norm_resolved, spec.v_norm or Norm(scope="row"))
    shapes = ["channel", "head"] + (["row"] if all(n.scope == "row" for n in norms) else [])
    tables = draw(st.sampled_from(["shared", "separate", "head"]))
    rotate = None
    if spec.rope is not None and draw(st.booleans()):
        start = draw(st.integers(0, lead[-1]))
        rotate = (start, draw(st.one_of(st.none(), st.integers(start, lead[-1]))))
    layout = draw(st.sampled_from([*LAYOUTS, "packed"]))
    k_lead = None
    own = tables == "separate" if table else spec.rope is not None
    if layout != "packed" and own and rotate is None and draw(st.booleans()):
        k_lead = draw(LEADS)
    return Recipe(
        spec,
        dtype=dtype,
        lead=lead,
        layout=layout,
        weight_dtype=draw(FLOATS),
        weights=draw(st.sampled_from(["both", "both", "q", "k", "-"])),
        sides=draw(st.sampled_from(["both", "both", "q", "k"])) if k_lead is None else "both",
        k_lead=k_lead,
        position_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        angle=angle,
        table_dtype=draw(st.sampled_from([torch.float32, dtype])),
        seed=draw(st.integers(0, 10**6)),
        weight_shape=draw(st.sampled_from(shapes)),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, "number", "token", "head", "channel"])),
        tables=tables,
        rotate=rotate,
    )


def examine(recipe: Recipe, device: str) -> None:
    """Out of place against the oracle; in place against that, and nothing else written."""
    call = recipe.make(device)
    outputs = qkrope.qk_norm_rope(*call.args(), **call.extras)
    call.assert_inputs_unchanged()
    call.check(*outputs)
    assert qkrope.qk_norm_rope_(*call.args(), **call.extras) is None
    for x, y in zip((call.q, call.k, call.extras.get("v")), outputs, strict=False):
        if x is not None:
            assert_same_bits(x, y)
    call.assert_guards()


PLAIN = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@settings(PLAIN, max_examples=250)
@given(recipe=recipes())
def test_random_calls(backend: str, recipe: Recipe) -> None:
    examine(recipe, backend)


@pytest.mark.slow
@settings(PLAIN, max_examples=1500)
@given(recipe=recipes())
def test_many_random_calls(device: str, recipe: Recipe) -> None:
    examine(recipe, device)


@settings(PLAIN, max_examples=250)
@given(recipe=option_recipes())
def test_random_options(isa: str, recipe: Recipe) -> None:
    examine(recipe, "cpu")


@pytest.mark.slow
@settings(PLAIN, max_examples=3000)
@given(recipe=option_recipes())
def test_many_random_options(recipe: Recipe) -> None:
    examine(recipe, "cpu")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_random_options_on_a_gpu(cuda: str, part: int) -> None:
    """Each example is another kernel to compile: two minutes, where four processes share them."""

    @seed(part)
    @settings(PLAIN, derandomize=False, max_examples=120)
    @given(recipe=option_recipes())
    def examples(recipe: Recipe) -> None:
        examine(recipe, cuda)

    examples()
