"""The values: every limit, equality and hashing, and the round trips."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkrope.scaling import MAX_LENGTH
from qkrope.spec import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Norm,
    Rope,
    Spec,
    YaRN,
)

NAN, INF = float("nan"), float("inf")


def spec(**changes):
    return Spec(**{"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes})


def yarn(**changes):
    return YaRN(**{"factor": 4, "original_max_position_embeddings": 32768, **changes})


def llama3(**changes):
    fields = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    return Llama3(**{**fields, "original_max_position_embeddings": 8192, **changes})


def longrope(**changes):
    fields = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    return LongRoPE(**{**fields, "original_max_position_embeddings": 4096, **changes})


# What each argument refuses: ValueError for a value out of its limits, TypeError for another type.
NOT_INT = [True, 1.0, "1", None, [1]]
NOT_REAL = [True, "1", None, [1.0]]
NOT_FINITE = [NAN, INF, -INF, 1e39, 10**400]
POSITIVE = {"values": [*NOT_FINITE, 0, 0.0, -1], "types": NOT_REAL}
OPTIONAL_POSITIVE = {"values": [*NOT_FINITE, 0, -1], "types": [True, "1", [1.0]]}
LENGTH = {"values": [0, -1, MAX_LENGTH + 1], "types": NOT_INT}
OPTIONAL_LENGTH = {"values": [0, -1, MAX_LENGTH + 1], "types": [True, 1.0, "1"]}
HEADS = {"values": [0, -1, MAX_HEADS + 1], "types": NOT_INT}
FACTORS = {"values": [[], [0.0, 1.0], [NAN, 1.0], [-1.0, 1.0]], "types": [None, 1.0, "ab", [True]]}

LIMITS = [
    (Norm, "kind", {"values": ["RMS", ""], "types": [None, 1, True]}),
    (Norm, "eps", {"values": [*NOT_FINITE, -1e-9], "types": NOT_REAL}),
    (Norm, "weight_offset", {"values": NOT_FINITE, "types": NOT_REAL}),
    (Norm, "scope", {"values": ["full"], "types": [None, 0]}),
    (Rope, "dim", {"values": [0, -2, 63, MAX_HEAD_DIM + 2], "types": [True, 64.0, "64"]}),
    (Rope, "theta", POSITIVE),
    (Rope, "pairing", {"values": ["neox"], "types": [None, True]}),
    (Rope, "scaling", {"values": [], "types": ["yarn", 2.0, Norm()]}),
    (spec, "num_q_heads", HEADS),
    (spec, "num_kv_heads", HEADS),
    (spec, "head_dim", {"values": [0, 1, 127, MAX_HEAD_DIM + 2], "types": NOT_INT}),
    (spec, "norm", {"values": [], "types": [None, "rms", Rope()]}),
    (spec, "k_norm", {"values": [], "types": ["rms", 1]}),
    (spec, "rope", {"values": [], "types": [1e4, Norm()]}),
    (spec, "order", {"values": ["norm"], "types": [None]}),
    (spec, "rounding", {"values": ["twice"], "types": [None, 1]}),
    (spec, "max_position_embeddings", OPTIONAL_LENGTH),
    (Linear, "factor", POSITIVE),
    (NTK, "factor", POSITIVE),
    (lambda **c: DynamicNTK(**{"factor": 2, **c}), "factor", POSITIVE),
    (
        lambda **c: DynamicNTK(**{"factor": 2, **c}),
        "original_max_position_embeddings",
        OPTIONAL_LENGTH,
    ),
    (yarn, "factor", POSITIVE),
    (yarn, "original_max_position_embeddings", LENGTH),
    (yarn, "beta_fast", {"values": [*NOT_FINITE, 0, -1, 0.5], "types": NOT_REAL}),
    (yarn, "beta_slow", {"values": [*NOT_FINITE, 0, -1], "types": NOT_REAL}),
    (yarn, "mscale", {"values": [*NOT_FINITE, -1], "types": [True, "1"]}),
    (yarn, "mscale_all_dim", {"values": [*NOT_FINITE, -1], "types": [True, "1"]}),
    (yarn, "attention_factor", OPTIONAL_POSITIVE),
    (yarn, "truncate", {"values": [], "types": [None, 1, "yes"]}),
    (llama3, "factor", POSITIVE),
    (llama3, "low_freq_factor", POSITIVE),
    (llama3, "high_freq_factor", {"values": [*NOT_FINITE, 0, 0.5], "types": NOT_REAL}),
    (llama3, "original_max_position_embeddings", LENGTH),
    (longrope, "short_factor", FACTORS),
    (longrope, "long_factor", {**FACTORS, "values": [*FACTORS["values"], [1.0]]}),
    (
        longrope,
        "original_max_position_embeddings",
        {"values": [*LENGTH["values"], 1], "types": NOT_INT},
    ),
    (longrope, "factor", OPTIONAL_POSITIVE),
    (longrope, "attention_factor", OPTIONAL_POSITIVE),
]
REFUSED = [
    pytest.param(make, name, error, value, id=f"{i}-{name}-{error.__name__}-{j}")
    for i, (make, name, limits) in enumerate(LIMITS)
    for error, key in ((ValueError, "values"), (TypeError, "types"))
    for j, value in enumerate(limits[key])
]


@pytest.mark.parametrize(("make", "name", "error", "value"), REFUSED)
def test_a_limit_names_argument_expected_and_got(make, name, error, value):
    with pytest.raises(error) as caught:
        make(**{name: value})
    message = str(caught.value)
    assert name in message and "expected" in message and "got" in message, message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("YaRN.low", {"high": 4.0}, TypeError),
        ("YaRN.high", {"low": 4.0}, TypeError),
        ("YaRN.low", {"low": NAN, "high": 4.0, "attention_factor": 1.0}, ValueError),
        ("YaRN.attention_factor", {"low": 1.0, "high": 4.0}, TypeError),
    ],
)
def test_a_ramp_needs_all_its_numbers(name, value, expected):
    with pytest.raises(expected, match=name):
        YaRN(4.0, **value)


@pytest.mark.parametrize(
    "extra",
    [
        {"original_max_position_embeddings": 4096},
        {"mscale": 1.0},
        {"mscale_all_dim": 1.0},
        {"beta_fast": 16.0},
        {"beta_slow": 2.0},
        {"truncate": False},
    ],
)
def test_a_ramp_takes_nothing_that_it_would_ignore(extra):
    with pytest.raises(ValueError, match=next(iter(extra))):
        YaRN(4.0, low=1.0, high=4.0, attention_factor=1.0, **extra)


def test_limits_between_arguments():
    with pytest.raises(ValueError, match="Rope.dim: expected at most head_dim = 64, got 128"):
        spec(head_dim=64, rope=Rope(dim=128))
    assert spec(head_dim=64, rope=Rope(dim=64)).rotary_dim == 64
    with pytest.raises(ValueError, match="short_factor: expected 64 numbers for rotary dim 128"):
        spec(rope=Rope(scaling=longrope()))
    with pytest.raises(ValueError, match="expected 32 numbers for rotary dim 64, got 2"):
        Rope(dim=64, scaling=longrope())
    assert spec(head_dim=4, rope=Rope(scaling=longrope())).rotary_dim == 4
    for scaling in (NTK(2.0), DynamicNTK(2.0)):
        with pytest.raises(ValueError, match="rotary dim >= 4, got 2"):
            spec(rope=Rope(dim=2, scaling=scaling))
    with pytest.raises(ValueError, match="theta: expected a number other than 1 with YaRN"):
        spec(rope=Rope(theta=1, scaling=yarn()))
    spec(rope=Rope(theta=1, scaling=YaRN.from_ramp(2.0, 0, 8, 1.0)))  # takes no logarithm


def test_the_ends_of_every_range_are_allowed():
    Spec(1, 1, 2)
    Spec(MAX_HEADS, MAX_HEADS, MAX_HEAD_DIM, max_position_embeddings=MAX_LENGTH)
    assert Norm(eps=0).eps == 0.0
    assert spec(rope=None, norm=Norm(kind="none")).rotary_dim == 0


def test_values_no_kernel_runs_construct():
    for kind in ("layer", "l2", "none"):
        spec(norm=Norm(kind=kind))
    spec(norm=Norm(scope="row"), order="rope_first", rounding="eager")


def test_defaults_are_the_contract():
    assert Norm() == Norm(kind="rms", eps=1e-6, weight_offset=0.0, scope="head")
    assert Rope() == Rope(dim=None, theta=10000.0, pairing="half", scaling=None)
    one = Spec(num_q_heads=32, num_kv_heads=8, head_dim=128)
    same = spec(
        norm=Norm(),
        k_norm=None,
        rope=Rope(),
        order="norm_first",
        rounding="once",
        max_position_embeddings=None,
    )
    assert one == same
    assert one.q_norm is one.norm and one.k_norm_resolved is one.norm and one.rotary_dim == 128
    assert spec(k_norm=Norm(eps=1e-5)).k_norm_resolved == Norm(eps=1e-5)


def test_numbers_are_normalised():
    one = spec(rope=Rope(theta=10000), norm=Norm(eps=np.float64(1e-5), weight_offset=1))
    two = spec(rope=Rope(theta=10000.0), norm=Norm(eps=1e-5, weight_offset=1.0))
    assert one == two and hash(one) == hash(two) and one.canonical() == two.canonical()
    assert type(one.rope.theta) is float and type(spec(head_dim=np.int32(64)).head_dim) is int
    zero = Norm(weight_offset=-0.0)
    assert spec(norm=zero).canonical() == spec().canonical()
    assert longrope().short_factor == longrope(short_factor=(1, 2)).short_factor == (1.0, 2.0)
    assert YaRN.from_ramp(4, 1, 2, 1) == YaRN.from_ramp(4.0, 1.0, 2.0, 1.0)


DIFFERENT = [
    spec(),
    spec(num_q_heads=16),
    spec(num_kv_heads=4),
    spec(head_dim=64),
    spec(norm=Norm(eps=1e-5)),
    spec(norm=Norm(weight_offset=1.0)),
    spec(norm=Norm(kind="l2")),
    spec(norm=Norm(scope="row")),
    spec(k_norm=Norm(eps=1e-5)),
    spec(rope=None),
    spec(rope=Rope(dim=64)),
    spec(rope=Rope(theta=1e6)),
    spec(rope=Rope(pairing="interleaved")),
    spec(order="rope_first"),
    spec(rounding="eager"),
    spec(max_position_embeddings=4096),
    *(
        spec(rope=Rope(scaling=scaling))
        for scaling in (
            Linear(2.0),
            NTK(2.0),
            DynamicNTK(2.0),
            DynamicNTK(2.0, 4096),
            yarn(),
            yarn(truncate=False),
            yarn(mscale=1.0, mscale_all_dim=0.5),
            YaRN.from_ramp(4.0, 1.0, 8.0, 1.0),
            llama3(),
        )
    ),
    spec(head_dim=4, rope=Rope(scaling=longrope())),
    spec(head_dim=4, rope=Rope(scaling=longrope(factor=32.0, attention_factor=1.25))),
]


def test_different_values_are_different_everywhere():
    assert len(set(DIFFERENT)) == len(DIFFERENT)
    assert len({one.canonical() for one in DIFFERENT}) == len(DIFFERENT)
    assert len({repr(one) for one in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize("one", DIFFERENT, ids=range(len(DIFFERENT)))
def test_round_trips(one):
    again = Spec.from_canonical(one.canonical())
    assert again == one and hash(again) == hash(one) and again.canonical() == one.canonical()
    assert "\n" not in one.canonical()
    assert eval(repr(one), dict(globals())) == one
    object.__setattr__(one, "_plan", object())
    for twin in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one and hash(twin) == hash(one) and twin._plan is None
    assert "_plan" not in repr(one) and "_plan" not in one.canonical()


@pytest.mark.parametrize("value", [Norm(), Rope(), yarn(), Linear(2), longrope(), spec()])
def test_values_are_frozen(value):
    field = next(iter(value.__dataclass_fields__))
    with pytest.raises(AttributeError):
        setattr(value, field, 1)


NORM_TEXT = (
    '{"schema": "qkrope.Spec/2", "type": "Norm", "kind": "rms", "eps": 0.0, "scope": "head", '
    '"weight_offset": 0.0, "dim": null, "rest": null}'
)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, TypeError, "text"),
        ("", ValueError, "text"),
        ("[]", ValueError, "schema"),
        ('{"type": "Spec"}', ValueError, "schema"),
        ('{"schema": "qkrope.Spec/2", "type": "Norm"}', ValueError, "eps"),
        (NORM_TEXT, ValueError, '"type": "Spec"'),
        ('{"schema": "qkrope.Spec/2", "type": "os"}', ValueError, "type"),
        ('{"schema": "qkrope.Spec/2", "type": "Spec", "bias": 1}', ValueError, "bias"),
        ('{"schema": "qkrope.Spec/2", "type": "Spec"}', ValueError, "num_q_heads"),
        (spec().canonical().replace("128", "127"), ValueError, "head_dim"),
        (spec().canonical().replace("1e-06", "NaN"), ValueError, "eps"),
    ],
)
def test_from_canonical_checks_again(text, error, message):
    with pytest.raises(error, match=message):
        Spec.from_canonical(text)


def test_canonical_text_is_fixed():
    # The text is a cache key and goes into records: a change of it needs a new schema number.
    assert spec(rope=Rope(dim=64, theta=1e6)).canonical() == (
        '{"head_dim": 128, "k_norm": null, "max_position_embeddings": null, '
        '"norm": {"dim": null, "eps": 1e-06, "kind": "rms", "rest": null, "scope": "head", '
        '"type": "Norm", "weight_offset": 0.0}, "num_kv_heads": 8, "num_q_heads": 32, '
        '"order": "norm_first", "rope": {"axes_dim": null, "dim": 64, "freq_dim": null, '
        '"mrope_interleaved": false, "mrope_section": null, "offset": 0, "output_pairing": null, '
        '"pair_distance": null, "pairing": "half", "reverse": false, "scaling": null, '
        '"theta": 1000000.0, "type": "Rope"}, "rounding": "once", "schema": "qkrope.Spec/2", '
        '"type": "Spec", "v_norm": null}'
    )


def test_values_import_no_torch():
    code = (
        "import sys, qkrope.spec, qkrope.angles, qkrope.config\n"
        "loaded = {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


positive = st.floats(min_value=1e-30, max_value=1e30)
lengths = st.integers(1, MAX_LENGTH)
norms = st.builds(
    Norm,
    kind=st.sampled_from(["rms", "layer", "l2", "none"]),
    eps=st.floats(min_value=0, max_value=1.0),
    weight_offset=st.floats(min_value=-1e30, max_value=1e30),
    scope=st.sampled_from(["head", "row"]),
)
scalings = st.one_of(
    st.none(),
    st.builds(Linear, positive),
    st.builds(NTK, positive),
    st.builds(DynamicNTK, positive, st.none() | lengths),
    st.builds(YaRN, positive, lengths, attention_factor=st.none() | positive),
    st.builds(YaRN.from_ramp, positive, positive, positive, positive),
    st.builds(Llama3, positive, st.just(1.0), st.floats(2.0, 1e6), lengths),
)


@st.composite
def specs(draw):
    head_dim = 2 * draw(st.integers(2, MAX_HEAD_DIM // 2))
    dim = draw(st.none() | st.integers(2, head_dim // 2).map(lambda half: 2 * half))
    theta = draw(positive.filter(lambda theta: theta != 1.0))
    pairing = draw(st.sampled_from(["half", "interleaved"]))
    rope = draw(st.none() | scalings.map(lambda s: Rope(dim, theta, pairing, s)))
    return Spec(
        draw(st.integers(1, MAX_HEADS)),
        draw(st.integers(1, MAX_HEADS)),
        head_dim,
        draw(norms),
        draw(st.none() | norms),
        rope,
        draw(st.sampled_from(["norm_first", "rope_first"])),
        draw(st.sampled_from(["once", "eager"])),
        draw(st.none() | lengths),
    )


@settings(deadline=None, derandomize=True, max_examples=150)
@given(specs(), specs())
def test_any_spec_round_trips_and_equality_is_that_of_the_text(one, two):
    again = Spec.from_canonical(one.canonical())
    assert again == one and hash(again) == hash(one)
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert (one == two) == (one.canonical() == two.canonical())
