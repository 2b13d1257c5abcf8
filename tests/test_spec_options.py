"""Norm, Rope and rounding beyond the first release: limits, one value one text, pairs and axes."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkrope.rope import MAX_AXES, PAIRINGS
from qkrope.rounding import letters
from qkrope.spec import MAX_HEAD_DIM, Linear, LongRoPE, Norm, Rope, Spec, YaRN
from qkrope.variant import Variant, is_general


def spec(**changes):
    return Spec(**{"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, **changes})


NOT_EVEN = {"values": [0, 3, -2, MAX_HEAD_DIM + 2], "types": [True, 2.0, "2", [2]]}
INTS = {
    "values": [[], [2], [2] * (MAX_AXES + 1), [2, 0], [2, MAX_HEAD_DIM + 2]],
    "types": [4, "44", {4}, [2, 2.0], [2, True]],
}
LIMITS = [
    (Norm, "dim", {**NOT_EVEN, "values": [*NOT_EVEN["values"], MAX_HEAD_DIM]}),
    (lambda **c: Norm(dim=4, **c), "rest", {"values": [Norm("none")], "types": ["rms", 1]}),
    (Rope, "offset", {"values": [-2, 1, MAX_HEAD_DIM], "types": [None, True, 2.0]}),
    (Rope, "pair_distance", {"values": [0, MAX_HEAD_DIM], "types": [True, 2.0, "2"]}),
    (Rope, "freq_dim", NOT_EVEN),
    (Rope, "reverse", {"values": [], "types": [None, 1, "yes"]}),
    (
        lambda **c: Rope(pairing="interleaved", **c),
        "output_pairing",
        {"values": ["interleaved", ""], "types": [1, True]},
    ),
    (Rope, "mrope_section", INTS),
    (Rope, "axes_dim", {**INTS, "values": [*INTS["values"], [2, 3]]}),
    (
        lambda **c: Rope(mrope_section=(2, 2), **c),
        "mrope_interleaved",
        {"values": [], "types": [None, 1]},
    ),
    (
        spec,
        "rounding",
        {
            "values": ["a/b", "A/B", "A", "A/", "/b", "A/b/f", "G/b", "", ["A/b"], ["once", "G/b"]],
            "types": [None, 1, ["A/b", 1], {"A/b": 1}],
        },
    ),
    (spec, "v_norm", {"values": [], "types": ["rms", 1, Rope()]}),
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


TOGETHER = [
    (lambda: Norm(rest=Norm()), "Norm.rest: expected None without dim"),
    (lambda: Norm("none", dim=4), "Norm.kind"),
    (lambda: Norm(scope="row", dim=4), "Norm.scope"),
    (lambda: Norm(dim=4, rest=Norm(scope="row")), "Norm.rest.scope"),
    (lambda: Norm(dim=4, rest=Norm(dim=2)), "Norm.rest.dim"),
    (lambda: spec(norm=Norm(dim=128)), "Spec.norm.dim: expected less than head_dim = 128"),
    (lambda: spec(k_norm=Norm(dim=128)), "Spec.k_norm.dim"),
    (lambda: spec(v_norm=Norm(dim=130)), "Spec.v_norm.dim"),
    (lambda: Rope(pairing="interleaved", pair_distance=64), "Rope.pair_distance: expected None"),
    (lambda: Rope(pairing="half", output_pairing="half"), "Rope.output_pairing: expected None"),
    (lambda: Rope(dim=8, pair_distance=3), "Rope.pair_distance: expected at least dim / 2 = 4"),
    (lambda: spec(rope=Rope(pair_distance=63)), "Rope.pair_distance: expected at least"),
    (lambda: spec(rope=Rope(dim=8, pair_distance=125)), "pairs within head_dim = 128 channels"),
    (lambda: spec(rope=Rope(offset=2)), "Rope.offset: expected pairs within head_dim = 128"),
    (lambda: spec(rope=Rope(dim=64, offset=66)), "Rope.offset"),
    (lambda: Rope(dim=6, pairing="block_half"), "Rope.dim: expected a multiple of 4"),
    (lambda: spec(head_dim=6, rope=Rope(pairing="block_half")), "Rope.dim"),
    (lambda: Rope(mrope_interleaved=True), "Rope.mrope_interleaved: expected False without"),
    (lambda: Rope(axes_dim=(4, 4), mrope_section=(2, 2)), "Rope.mrope_section: expected None"),
    (lambda: Rope(axes_dim=(4, 4), freq_dim=8), "Rope.freq_dim: expected None beside axes_dim"),
    (lambda: Rope(axes_dim=(4, 4), scaling=Linear(2)), "Rope.scaling: expected None beside"),
    (lambda: Rope(dim=16, axes_dim=(8, 6)), "Rope.axes_dim: expected a sum of dim = 16"),
    (lambda: spec(rope=Rope(axes_dim=(16, 56, 58))), "Rope.axes_dim: expected a sum of dim = 128"),
    (lambda: Rope(dim=16, mrope_section=(4, 3)), "Rope.mrope_section: expected a sum of dim / 2"),
    (lambda: spec(rope=Rope(mrope_section=(32, 33))), "Rope.mrope_section"),
    # 14 pairs of axis 1 would need pairs up to 42 of 32.
    (
        lambda: Rope(64, mrope_section=(9, 14, 9), mrope_interleaved=True),
        "Rope.mrope_section: expected sections that fit 32 pairs",
    ),
    (
        lambda: Rope(8, freq_dim=64, scaling=LongRoPE([1.0] * 32, [1.0] * 32, 4096)),
        "short_factor: expected 4 numbers for rotary dim 8, got 32",
    ),
]


@pytest.mark.parametrize(("make", "message"), TOGETHER, ids=[m[:40] for _, m in TOGETHER])
def test_values_that_exclude_each_other(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value), str(caught.value)


def test_defaults_are_the_contract():
    assert Norm() == Norm(dim=None, rest=None)
    assert Rope() == Rope(
        offset=0,
        pair_distance=None,
        freq_dim=None,
        reverse=False,
        output_pairing=None,
        mrope_section=None,
        mrope_interleaved=False,
        axes_dim=None,
    )
    one = spec()
    assert one == spec(v_norm=None) and one.v_norm is None
    assert one.position_axes == 0 and one.pair_axes == (0,) * 64
    assert one.pairs == one.output_pairs == tuple((i, i + 64) for i in range(64))
    still = spec(rope=None)
    assert still.pairs == still.output_pairs == still.pair_axes == () and still.position_axes == 0
    assert repr(Norm()) == "Norm()" and repr(Rope(64, reverse=True)) == "Rope(dim=64, reverse=True)"


def test_one_value_has_one_text():
    same = [
        (Rope(64, pair_distance=32), Rope(64)),
        (Rope(64, freq_dim=64), Rope(64)),
        (Rope(64, mrope_section=[16, 8, 8]), Rope(64, mrope_section=(16, 8, 8))),
        (Rope(64, axes_dim=[32, 32]), Rope(64, axes_dim=(32, 32))),
    ]
    for one, two in same:
        assert one == two and hash(one) == hash(two)
        assert spec(rope=one).canonical() == spec(rope=two).canonical()
    words = {
        "eager": ["A/b", "E/b", ("A/b", "eager")],
        "B/f": ["N/c", "D/f", ["B/c", "D/f"]],
        "C/h": ["F/h", ("C/h", "F/h")],
        "once": [("once", "once")],
    }
    for word, spellings in words.items():
        for spelling in spellings:
            one = spec(rounding=spelling)
            assert one == spec(rounding=word) and one.rounding == word
    assert spec(rounding=["C/h", "N/h"]).rounding == ("C/h", "B/h")
    assert spec(rounding=("once", "A/b")).roundings == (None, ("A", "b"))
    assert spec(rounding="eager").roundings == (("A", "b"), ("A", "b"))
    assert letters("once") is None and letters("B/h") == ("B", "h")


def test_pairs_of_each_layout():
    def pairs(dim, **fields):
        return Rope(dim, **fields).pairs(dim)

    assert pairs(4, offset=6) == ((6, 8), (7, 9))
    assert pairs(4, offset=6, pairing="interleaved") == ((6, 7), (8, 9))
    assert pairs(4, pair_distance=7) == ((0, 7), (1, 8))
    assert pairs(8, pairing="block_half") == ((0, 2), (1, 3), (4, 6), (5, 7))
    moved = Rope(6, pairing="interleaved", output_pairing="half", offset=2)
    assert moved.pairs(6) == ((2, 3), (4, 5), (6, 7))
    assert moved.output_pairs(6) == ((2, 5), (3, 6), (4, 7))


def test_axes_of_each_layout():
    assert Rope(mrope_section=(1, 2, 3)).axes(12) == (0, 1, 1, 2, 2, 2)
    assert Rope(axes_dim=(2, 4, 6)).axes(12) == (0, 1, 1, 2, 2, 2)
    qwen3_vl = Rope(mrope_section=(24, 20, 20), mrope_interleaved=True)
    axes = spec(rope=qwen3_vl).pair_axes
    assert axes == (0, 1, 2) * 20 + (0,) * 4
    four = spec(rope=Rope(axes_dim=(32, 32, 32, 32)))
    assert four.position_axes == 4 and [four.pair_axes.count(a) for a in range(4)] == [16] * 4


def test_parts_of_a_head():
    (one,) = Norm().parts(8)
    assert (one.start, one.stop, one.norm) == (0, 8, Norm())
    first, rest = Norm(dim=6).parts(8)
    assert (first.start, first.stop, rest.start, rest.stop) == (0, 6, 6, 8)
    assert rest.norm == Norm("none")
    assert Norm(dim=6, rest=Norm(eps=1e-5)).parts(8)[1].norm == Norm(eps=1e-5)
    assert (Norm().weight_dim(8), Norm(dim=6).weight_dim(8)) == (8, 6)
    assert Norm(dim=6, rest=Norm()).weight_dim(8) == 8


VALUES = [
    spec(),
    spec(norm=Norm(dim=64)),
    spec(norm=Norm(dim=64, rest=Norm())),
    spec(norm=Norm(dim=64, rest=Norm(eps=1e-5))),
    spec(rope=Rope(dim=64)),
    spec(rope=Rope(dim=64, offset=64)),
    spec(rope=Rope(dim=64, pair_distance=64)),
    spec(rope=Rope(dim=64, freq_dim=128)),
    spec(rope=Rope(reverse=True)),
    spec(rope=Rope(pairing="block_half")),
    spec(rope=Rope(pairing="interleaved", output_pairing="half")),
    spec(rope=Rope(mrope_section=(24, 20, 20))),
    spec(rope=Rope(mrope_section=(24, 20, 20), mrope_interleaved=True)),
    spec(rope=Rope(axes_dim=(16, 56, 56))),
    spec(rope=Rope(axes_dim=(56, 16, 56))),
    *(spec(rounding=f"{norm}/{rotation}") for norm in "ABC" for rotation in "bhf"),
    spec(rounding=("C/h", "B/h")),
    spec(rounding=("B/h", "C/h")),
    spec(rounding=("once", "B/h")),
    spec(v_norm=Norm()),
    spec(v_norm=Norm(eps=1e-5)),
]


def test_different_values_are_different_everywhere():
    for texts in (VALUES, [v.canonical() for v in VALUES], [repr(v) for v in VALUES]):
        assert len(set(texts)) == len(VALUES)


@pytest.mark.parametrize("one", VALUES, ids=range(len(VALUES)))
def test_round_trips(one):
    again = Spec.from_canonical(one.canonical())
    assert again == one and hash(again) == hash(one) and again.canonical() == one.canonical()
    assert eval(repr(one), dict(globals())) == one
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)


@st.composite
def specs(draw):
    """Any Spec of the new fields that hold together."""
    quarter = draw(st.integers(2, 16))
    dim = 4 * quarter
    pairing = draw(st.sampled_from(PAIRINGS))
    fields = {"pairing": pairing, "offset": 2 * draw(st.integers(0, 8))}
    extent = fields["offset"] + dim
    if pairing == "half" and draw(st.booleans()):
        fields["pair_distance"] = draw(st.integers(dim // 2, dim))
        extent = fields["offset"] + fields["pair_distance"] + dim // 2
    if pairing == "interleaved":
        fields["output_pairing"] = draw(st.sampled_from([None, "half"]))
    axes = draw(st.sampled_from(["none", "sections", "axes", "denominator"]))
    first = draw(st.integers(1, quarter - 1))
    if axes == "sections":
        fields["mrope_section"] = [2 * first, dim // 2 - 2 * first]
    elif axes == "axes":
        fields["axes_dim"] = (4 * first, dim - 4 * first)
    elif axes == "denominator":
        fields |= {"freq_dim": dim + 2 * draw(st.integers(0, 9)), "scaling": YaRN(4.0, 4096)}
    rope = Rope(dim, draw(st.floats(2.0, 1e7)), reverse=draw(st.booleans()), **fields)
    head_dim = extent + extent % 2 + 2 * draw(st.integers(0, 4))
    rest = draw(st.none() | st.builds(Norm, eps=st.floats(0, 1)))
    norm = Norm("layer", dim=2 * draw(st.integers(1, head_dim // 2 - 1)), rest=rest)
    word = st.sampled_from(["once", "eager", "B/f", "C/h", "N/c", "E/b"])
    rounding = draw(word | st.tuples(word, word))
    v_norm = draw(st.none() | st.just(norm))
    return Spec(4, 2, head_dim, norm, None, rope, rounding=rounding, v_norm=v_norm)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(specs(), specs())
def test_any_spec_round_trips_and_its_pairs_are_disjoint(one, two):
    again = Spec.from_canonical(one.canonical())
    assert again == one and hash(again) == hash(one)
    assert (one == two) == (one.canonical() == two.canonical())
    for pairs in (one.pairs, one.output_pairs):
        channels = [channel for pair in pairs for channel in pair]
        assert len(set(channels)) == len(channels) == one.rotary_dim
        assert max(channels) < one.head_dim
    # Channels that are written are those that are read: the others stay where they are.
    assert {c for p in one.pairs for c in p} == {c for p in one.output_pairs for c in p}
    assert len(one.pair_axes) == len(one.pairs) and max(one.pair_axes) < max(one.position_axes, 1)


@pytest.mark.parametrize(
    ("change", "general"),
    [
        ({}, False),
        ({"k_norm": Norm("none")}, False),
        ({"norm": Norm("none", scope="row")}, False),
        ({"rope": None}, False),
        ({"rope": Rope(64, freq_dim=128)}, False),
        ({"rope": Rope(reverse=True)}, False),
        ({"v_norm": Norm()}, False),
        ({"norm": Norm("l2")}, True),
        ({"norm": Norm(scope="row")}, True),
        ({"norm": Norm(dim=64)}, True),
        ({"k_norm": Norm("layer")}, True),
        ({"order": "rope_first"}, True),
        ({"rounding": ("C/h", "B/h")}, True),
        ({"rope": Rope(pairing="block_half")}, True),
        ({"rope": Rope(64, offset=2)}, True),
        ({"rope": Rope(64, pair_distance=64)}, True),
        ({"rope": Rope(pairing="interleaved", output_pairing="half")}, True),
        ({"rope": Rope(mrope_section=(32, 32))}, True),
        ({"rope": Rope(axes_dim=(64, 64))}, True),
    ],
)
def test_what_takes_the_general_kernels(change, general):
    """qk_variant.general; a V norm and, with a caller's angles, a reversed rotation do on CUDA."""
    one = spec(**change)
    assert is_general(one) == general
    angles = ("table", "inv_freq", "phase") if one.rope else ("none",)
    for angle in angles:
        reads = one.rope is not None and one.rope.reverse and angle != "phase"
        options = Variant.of(one, "bfloat16", None, "float32", angle).options
        assert (options is not None) == (general or reads or one.v_norm is not None)
        assert Variant.of(one, "bfloat16", None, None, angle, general=True).options is not None
