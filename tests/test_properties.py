"""Random Specs on random layouts, op against oracle, on the CPU and (under -m gpu) on CUDA."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

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
    """What the kernels run now."""
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


def examine(recipe: Recipe, device: str) -> None:
    """Out of place against the oracle; in place against that, and nothing else written."""
    call = recipe.make(device)
    q2, k2 = qkrope.qk_norm_rope(*call.args(), **call.extras)
    call.assert_inputs_unchanged()
    call.check(q2, k2)
    assert qkrope.qk_norm_rope_(*call.args(), **call.extras) is None
    for x, y in ((call.q, q2), (call.k, k2)):
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
