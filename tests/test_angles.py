"""Inverse frequencies of every scaling against transformers, and frac against mpmath."""

from __future__ import annotations

import math
import random
import struct

import mpmath
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qkrope import angles
from qkrope.angles import Angles, frac, frac_words, resolve, split
from qkrope.spec import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Rope, Spec, YaRN

DIMS = (32, 64, 128, 256)
THETAS = (1e4, 5e5, 1e6, 1e7)


def make(dim=128, theta=1e6, scaling=None, longest=None, head_dim=None):
    rope = Rope(dim=dim, theta=theta, scaling=scaling)
    return Spec(8, 2, head_dim or dim, rope=rope, max_position_embeddings=longest)


def upstream(dim, theta, fields, longest, seq_len=None):
    """(inv_freq in float32, attention factor) of transformers' own init function."""
    config = transformers.LlamaConfig(
        hidden_size=8 * dim,
        num_attention_heads=8,
        head_dim=dim,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": theta, **fields},
    )
    return ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, "cpu", seq_len=seq_len)


def assert_close(got, expected, theta, *, blend=1.0):
    """Agreement to the float32 rounding of the upstream chain, u = 2^-24 relative a step:

    i / dim one, then theta ** x: an exponent off by x * u moves the result by x * ln(theta) * u
    relative, x < 1, and a float32 pow is good to 2 ulp (4 u); the reciprocal and up to two
    factors 1 each; theta itself 1 where it was stretched, and the table's last rounding 1. A blend
    of two terms of one sign with a float32 weight adds 4 more, and near the end of a ramp, where
    the kept share is small against 1, an absolute error of the weight of 2^-24 times the larger
    term: ``blend`` is that term over the result at most.
    """
    inv_freq, attention_factor = expected
    bound = (math.log(theta) + 14 + 4 * blend) * 2.0**-24
    assert len(got.inv_freq) == len(inv_freq)
    for i, (ours, theirs) in enumerate(zip(got.inv_freq, inv_freq.tolist(), strict=True)):
        assert abs(ours - theirs) <= bound * abs(theirs), (i, ours, theirs)
    assert got.attention_factor == pytest.approx(float(attention_factor), rel=1e-12)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("dim", DIMS)
def test_default(dim, theta):
    exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
    assert_close(resolve(make(dim, theta)), (1.0 / theta**exponents, 1.0), theta)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("dim", DIMS)
def test_linear(dim, theta):
    expected = upstream(dim, theta, {"rope_type": "linear", "factor": 8.0}, 4096)
    assert_close(resolve(make(dim, theta, Linear(8))), expected, theta)


@pytest.mark.parametrize("seq_len", [None, 1, 4096, 4097, 100_000])
@pytest.mark.parametrize("dim", DIMS)
def test_dynamic_ntk(dim, seq_len):
    fields = {"rope_type": "dynamic", "factor": 4.0}
    expected = upstream(dim, 1e4, fields, 4096, seq_len)
    for scaling in (DynamicNTK(4.0), DynamicNTK(4.0, 4096)):
        spec = make(dim, 1e4, scaling, longest=4096)
        assert_close(resolve(spec, seq_len), expected, 1e4)
    # The Spec's own length stands in for an absent seq_len.
    if seq_len is not None:
        extended = make(dim, 1e4, DynamicNTK(4.0, 4096), longest=seq_len)
        assert resolve(extended) == resolve(make(dim, 1e4, DynamicNTK(4.0, 4096)), seq_len)


def test_static_ntk():
    for dim in DIMS:
        base = 1e4 * 3.0 ** (dim / (dim - 2))
        expected = [base ** (-2 * i / dim) for i in range(dim // 2)]
        assert resolve(make(dim, 1e4, NTK(3.0))).inv_freq == pytest.approx(expected, rel=1e-14)
        # NTK at factor f is DynamicNTK where its own formula gives f.
        dynamic = resolve(make(dim, 1e4, DynamicNTK(3.0, 1000)), 5000 // 3 + 1)
        ratio = 3.0 * (5000 // 3 + 1) / 1000 - 2.0
        static = resolve(make(dim, 1e4, NTK(ratio)))
        assert static.inv_freq == pytest.approx(dynamic.inv_freq, rel=1e-14)


YARN_FIELDS = [
    {},
    {"factor": 1.0},
    {"factor": 0.5},
    {"factor": 40.0},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"beta_fast": 4.0, "beta_slow": 4.0},
    {"truncate": False},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"mscale": 0.707, "mscale_all_dim": 1.0},
    {"mscale": 1.0},
    {"mscale_all_dim": 1.0},
    {"mscale": 1.0, "mscale_all_dim": 0.0},
    {"attention_factor": 1.5},
    {"attention_factor": 0.25, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"original_max_position_embeddings": 16},
    {"original_max_position_embeddings": 1 << 24},
]


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("fields", YARN_FIELDS, ids=map(str, YARN_FIELDS))
def test_yarn(fields, dim, theta):
    fields = {"factor": 4.0, "original_max_position_embeddings": 32768, **fields}
    expected = upstream(dim, theta, {"rope_type": "yarn", **fields}, 131072)
    # The blend's larger term is at most factor (or 1) times the result.
    blend = max(fields["factor"], 1 / fields["factor"])
    assert_close(resolve(make(dim, theta, YaRN(**fields))), expected, theta, blend=blend)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("low_high", [(1.0, 4.0), (0.5, 32.0)])
@pytest.mark.parametrize("dim", DIMS)
def test_llama3(dim, low_high, theta):
    low, high = low_high
    fields = {
        "factor": 8.0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }
    expected = upstream(dim, theta, {"rope_type": "llama3", **fields}, 131072)
    # The blend's weight is (L / wavelength - low) / (high - low): the quotient is off by its own
    # frequency's error, times high / (high - low) at most, and the larger term is 8 times the
    # smaller.
    blend = 8 * (high / (high - low)) * (math.log(theta) + 14)
    assert_close(resolve(make(dim, theta, Llama3(**fields))), expected, theta, blend=blend)


@pytest.mark.parametrize("seq_len", [1, 4096, 4097, 131072])
@pytest.mark.parametrize(
    "more", [{}, {"factor": 32.0}, {"factor": 0.5}, {"attention_factor": 1.25}], ids=str
)
def test_longrope(more, seq_len):
    rng = random.Random(7)
    fields = {
        "short_factor": [rng.uniform(1, 2) for _ in range(48)],
        "long_factor": [rng.uniform(1, 60) for _ in range(48)],
        "original_max_position_embeddings": 4096,
        **more,
    }
    expected = upstream(96, 1e4, {"rope_type": "longrope", **fields}, 131072, seq_len)
    spec = make(96, 1e4, LongRoPE(**fields), longest=131072)
    assert_close(resolve(spec, seq_len), expected, 1e4)
    if seq_len == 131072:
        assert resolve(spec) == resolve(spec, seq_len)


def ramp(theta, dim, factor, low, high):
    """The published kernel's mix, written out in float64 on its own."""
    if low == high:
        high = high + 0.001
    out = torch.empty(dim // 2, dtype=torch.float64)
    for i in range(dim // 2):
        extrapolated = 1.0 / math.pow(theta, 2.0 * i / dim)
        interpolated = extrapolated / factor
        share = min(1.0, max(0.0, (i - low) / (high - low)))
        out[i] = interpolated * share + extrapolated * (1.0 - share)
    return out


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 0),
        (5, 5),
        (0, 63),
        (10, 30),
        (-8, 90),
        (20.5, 33.25),
        (63, 63),
        (30, 10),
        (20.9995, 20.9995),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 4.0, 0.5])
def test_yarn_from_ramp(low, high, factor):
    spec = make(128, 5e5, YaRN.from_ramp(factor, low, high, 1.2))
    got = resolve(spec)
    # pow of theta and -x against 1 / pow of x: a few float64 roundings.
    expected = ramp(5e5, 128, factor, low, high).tolist()
    assert got.inv_freq == pytest.approx(expected, rel=1e-14)
    assert got.attention_factor == 1.2


def test_from_ramp_direction():
    """Pairs before low keep their frequency, pairs after high are divided by the factor."""
    plain = resolve(make(128, 1e4)).inv_freq
    mixed = resolve(make(128, 1e4, YaRN.from_ramp(4.0, 16, 32, 1.0))).inv_freq
    assert mixed[:17] == plain[:17] and mixed[32:] == tuple(f / 4.0 for f in plain[32:])
    assert all(f / 4.0 < m < f for m, f in zip(mixed[17:32], plain[17:32], strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_the_ramp_of_the_fields_is_the_ramp_by_its_ends(dim):
    """YaRN's fields name the same ramp as the triple that callers derive from them."""
    length, theta = 32768, 1e6
    ends = [
        dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)
    ]
    low, high = math.floor(ends[0]), math.ceil(ends[1])
    triple = YaRN.from_ramp(4.0, low, high, 0.1 * math.log(4.0) + 1.0)
    assert resolve(make(dim, theta, triple)) == resolve(make(dim, theta, YaRN(4.0, length)))


def test_partial_rotation_uses_the_rotary_dim():
    assert resolve(make(64, head_dim=128)) == resolve(make(64))
    assert len(resolve(make(64, head_dim=128)).inv_freq) == 32


def test_no_rope_has_no_angles():
    assert resolve(Spec(1, 1, 64, rope=None)) == Angles((), 1.0)


def test_only_length_dependent_scalings_read_seq_len():
    fields = ([1.0] * 64, [2.0] * 64, 4096)
    for scaling in (None, Linear(2), NTK(2), YaRN(2, 64), Llama3(8, 1, 4, 8192)):
        assert resolve(make(scaling=scaling), 1 << 20) == resolve(make(scaling=scaling))
    assert resolve(make(scaling=DynamicNTK(2, 64)), 65) != resolve(
        make(scaling=DynamicNTK(2, 64)), 64
    )
    longrope = make(scaling=LongRoPE(*fields, attention_factor=1.0))
    assert resolve(longrope, 4096).inv_freq[0] == 1.0 and resolve(longrope, 4097).inv_freq[0] == 0.5


@pytest.mark.parametrize(
    ("scaling", "seq_len", "names"),
    [
        (DynamicNTK(2.0), 100, "Spec.max_position_embeddings"),
        (DynamicNTK(2.0, 64), None, "seq_len or Spec.max_position_embeddings"),
        (LongRoPE([1.0], [1.0], 64), None, "seq_len or Spec.max_position_embeddings"),
        (LongRoPE([1.0], [1.0], 64), 100, "factor or Spec.max_position_embeddings"),
    ],
)
def test_a_missing_length_is_named(scaling, seq_len, names):
    spec = make(2 if isinstance(scaling, LongRoPE) else 64, scaling=scaling)
    with pytest.raises(ValueError, match=names):
        resolve(spec, seq_len)


@pytest.mark.parametrize(
    ("seq_len", "error"),
    [(True, TypeError), (1.0, TypeError), (-1, ValueError), (2**31 + 1, ValueError)],
)
def test_seq_len_limits(seq_len, error):
    resolve(make(), 1)  # a cached 1 must not let True through
    with pytest.raises(error, match="seq_len"):
        resolve(make(), seq_len)


@pytest.mark.parametrize(
    ("dim", "theta", "scaling"),
    [
        (128, 1e-300, Linear(1e-300)),
        (1024, 5e-324, None),
        (4, 1e-300, NTK(1e-300)),
        (4, 1e-300, YaRN.from_ramp(1e-300, 0, 1, 1.0)),
    ],
)
def test_frequencies_that_float64_cannot_hold_are_refused(dim, theta, scaling):
    with pytest.raises(ValueError, match="frequencies float64 can hold"):
        resolve(make(dim, theta, scaling))


mpmath.mp.prec = 2600  # 1074 + 971 + 64 bits and room


def exact_frac(value):
    return int(mpmath.nint(mpmath.mpf(value) / (2 * mpmath.pi) * mpmath.mpf(2) ** 64)) % 2**64


def sample_floats():
    rng = random.Random(20)
    yield from (0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308)
    for value in (1.0, math.pi, 2 * math.pi, 3.5, 100.0, 2.0**63, 2.0**64, 1e17, 1e300):
        yield from (value, -value, math.nextafter(value, 0.0), math.nextafter(value, math.inf))
    for theta in (1e4, 5e5, 1e6, 1e7, 11158840.0):
        yield from (theta ** (-2 * i / 128) for i in range(64))
    for _ in range(1500):
        yield rng.uniform(-1.0, 1.0)
        yield math.ldexp(rng.uniform(0.5, 1.0), rng.randrange(-90, 4))
    for _ in range(1000):  # any bit pattern
        value = struct.unpack("d", struct.pack("Q", rng.getrandbits(64)))[0]
        if math.isfinite(value):
            yield value
    tie = 2 * math.pi * 2.0**-65  # half a unit: the two neighbours round apart
    yield from (tie, math.nextafter(tie, 0.0), math.nextafter(tie, 1.0))


def test_the_constant_is_one_turn():
    assert angles._TURN == int(mpmath.floor(mpmath.mpf(2) ** angles._TURN_BITS / (2 * mpmath.pi)))


def test_frac_is_exact_to_the_last_bit():
    values = list(sample_floats())
    assert len(values) > 4000
    wrong = [value for value in values if frac(value) != exact_frac(value)]
    assert not wrong, wrong[:5]


def test_frac_of_a_negative_is_the_other_way_round():
    for value in sample_floats():
        assert (frac(value) + frac(-value)) % 2**64 == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_frac_refuses_what_is_not_finite(value):
    with pytest.raises(ValueError, match="inv_freq: expected a finite number"):
        frac(value)


def test_split_is_the_balanced_form():
    rng = random.Random(3)
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2**31]
    for value in edges + [rng.getrandbits(64) for _ in range(3000)]:
        lo, hi = split(value)
        assert -(2**31) <= lo < 2**31 and -(2**31) <= hi < 2**31
        assert (hi * 2**32 + lo) % 2**64 == value
        # What the kernels compute from it: the top word of position * frac.
        for position in (0, 1, -1, 2**31 - 1, -(2**31), rng.randrange(-(2**31), 2**31)):
            phase = ((position * lo >> 32) + position * hi) % 2**32
            assert phase == (position * value >> 32) % 2**32


def test_frac_words_are_the_kernel_table():
    inv_freq = resolve(make()).inv_freq
    words = frac_words(inv_freq)
    assert words.typecode == "i" and words.itemsize == 4 and len(words) == 128
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert pairs == [split(frac(value)) for value in inv_freq]


def test_the_turn_of_a_position_is_exact():
    """phase(p) is the turn of the real number p * inv_freq to 2^-33, at any position."""
    for theta in (1e4, 1e7):
        for value in resolve(make(128, theta)).inv_freq[::9]:
            for position in (0, 1, 40, 4095, 131071, 2**20, 2**24 + 1, 2**31 - 1, -1):
                turns = position * mpmath.mpf(value) / (2 * mpmath.pi)
                phase = (position * frac(value) >> 32) % 2**32
                error = mpmath.mpf(phase) / 2**32 - turns
                error -= mpmath.nint(error)
                # One unit of the truncated word, and |position| times half a unit of frac.
                assert abs(error) <= 2.0**-32 + abs(position) * 2.0**-65


def test_resolve_is_cached():
    assert resolve(make()) is resolve(make())
    assert resolve(make(scaling=DynamicNTK(2, 64)), 65) is resolve(
        make(scaling=DynamicNTK(2, 64)), 65
    )
