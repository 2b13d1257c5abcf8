"""Frequencies of the options of a Rope: upstream's rotary dims, a denominator, axes, a sign."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qkrope.angles import frac, resolve
from qkrope.spec import DynamicNTK, Linear, Llama3, LongRoPE, Rope, Spec, YaRN
from test_angles import assert_close

HEAD_DIM, TRAINED = 128, 4096


def upstream(fields, partial, theta, seq_len=None):
    """(inv_freq in float32, attention factor) of transformers' own init function."""
    config = transformers.LlamaConfig(
        hidden_size=8 * HEAD_DIM,
        num_attention_heads=8,
        head_dim=HEAD_DIM,
        max_position_embeddings=4 * TRAINED,
        original_max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": theta, "partial_rotary_factor": partial, **fields},
    )
    return ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, "cpu", seq_len=seq_len)


def make(dim, theta, scaling=None, **fields):
    rope = Rope(dim, theta, scaling=scaling, **fields)
    return Spec(8, 2, HEAD_DIM, rope=rope, max_position_embeddings=4 * TRAINED)


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("partial", [0.25, 0.5, 1.0])
def test_proportional(partial, factor, theta):
    """A rotary dim of partial * head_dim over the whole head's exponents, then zeros."""
    dim = int(partial * HEAD_DIM)
    fields = {"rope_type": "proportional", "factor": factor}
    inv_freq, attention_factor = upstream(fields, partial, theta)
    assert inv_freq.shape == (HEAD_DIM // 2,) and not inv_freq[dim // 2 :].any()
    rope = {"pair_distance": HEAD_DIM // 2, "freq_dim": HEAD_DIM}
    scaling = None if factor == 1.0 else Linear(factor)
    got = resolve(make(dim, theta, scaling, **rope))
    assert_close(got, (inv_freq[: dim // 2], attention_factor), theta)


SHORT, LONG = [1.0 + i / 64 for i in range(32)], [2.0 + i for i in range(32)]
SCALINGS = {
    "linear": ({"factor": 4.0}, Linear(4.0)),
    "yarn": ({"factor": 4.0}, YaRN(4.0, TRAINED)),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        Llama3(8.0, 1.0, 4.0, TRAINED),
    ),
    "dynamic": ({"factor": 4.0}, DynamicNTK(4.0)),
    "longrope": (
        {"short_factor": SHORT, "long_factor": LONG},
        LongRoPE(SHORT, LONG, TRAINED),
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_scaling_reads_the_rotary_dim(kind):
    """With partial_rotary_factor upstream's dim is that of the rotary channels, not the head's."""
    fields, scaling = SCALINGS[kind]
    length = 5 * TRAINED if kind in ("dynamic", "longrope") else None
    fields = {"rope_type": kind, "original_max_position_embeddings": TRAINED, **fields}
    expected = upstream(fields, 0.5, 1e4, length)
    got = resolve(make(64, 1e4, scaling), length)
    # yarn and llama3 blend: the larger term is at most the factor times the result.
    assert_close(got, expected, 1e4, blend=8.0)
    whole = SCALINGS[kind][1]
    if kind != "longrope":
        assert got.inv_freq != resolve(make(128, 1e4, whole), length).inv_freq[:32]


def test_a_denominator_replaces_the_rotary_dim_in_a_scaling():
    """The frequencies are the first ones of the longer list, whatever stretches them."""
    for scaling in (None, Linear(4.0), YaRN(4.0, TRAINED), DynamicNTK(2.0)):
        some = resolve(make(32, 1e6, scaling, freq_dim=128), 3 * TRAINED)
        whole = resolve(make(128, 1e6, scaling), 3 * TRAINED)
        assert some.inv_freq == whole.inv_freq[:16]
        assert some.attention_factor == whole.attention_factor


def test_each_axis_has_frequencies_of_its_own():
    got = resolve(make(None, 1e4, axes_dim=(16, 56, 56))).inv_freq
    alone = [resolve(Spec(1, 1, n, rope=Rope(theta=1e4))).inv_freq for n in (16, 56, 56)]
    assert got == tuple(itertools.chain(*alone))
    # Sections share one set.
    shared = resolve(make(None, 1e4, mrope_section=(8, 28, 28))).inv_freq
    assert shared == resolve(make(None, 1e4)).inv_freq


def test_reverse_is_the_opposite_fraction_of_a_turn():
    for scaling in (None, YaRN(4.0, TRAINED)):
        forward = resolve(make(64, 1e6, scaling))
        back = resolve(make(64, 1e6, scaling, reverse=True))
        assert back.attention_factor == forward.attention_factor
        for a, b in zip(forward.inv_freq, back.inv_freq, strict=True):
            assert b == -a and (frac(a) + frac(b)) % 2**64 == 0
    axes = resolve(make(None, 1e4, axes_dim=(64, 64), reverse=True)).inv_freq
    assert torch.tensor(axes).lt(0).all()
