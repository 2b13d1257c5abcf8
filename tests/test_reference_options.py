"""The oracle's options against truths that share none of its code: Hugging Face, torch, slices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from qkrope import angles, reference
from qkrope.spec import Norm, Rope, Spec
from small import CLOSE, FP64, NK, NQ, B, D, S, counts, draw, heads, ladder, spec

NONE = Norm("none")


def turned(rope: Rope, positions: Tensor, **extras: object) -> tuple[Tensor, Tensor]:
    """q and what the rotation alone makes of it."""
    q, _ = heads()
    s = spec(rope, norm=NONE)
    return q, reference.qk_norm_rope(q, None, None, None, positions, s, **extras)[0]


def full(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Hugging Face's table of half pairing: cos and sin of all pairs, twice."""
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


# ---- which channels turn, by upstream's own functions, in float64 -----------------------------


def test_proportional_is_a_distance_and_a_denominator() -> None:
    """Gemma 4 global: zero frequencies pad the pairs of the whole head."""
    positions = counts()
    rope = Rope(dim=4, theta=1e6, pair_distance=D // 2, freq_dim=D)
    q, y = turned(rope, positions)
    padded = torch.cat((ladder(1e6, D)[:2], torch.zeros(6, dtype=FP64)))
    cos, sin = full(positions[..., None] * padded)
    expected = gemma4.apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(y, expected, **CLOSE)
    # Its padded table is the table of a whole-head rope.
    _, by_table = turned(Rope(), None, cos_sin=(cos, sin))
    torch.testing.assert_close(by_table, expected, **CLOSE)


def test_block_half_is_two_axes_of_a_vision_tower() -> None:
    positions = counts(2)
    rope = Rope(theta=100.0, pairing="block_half", axes_dim=(D // 2, D // 2))
    q, y = turned(rope, positions)
    tables = [full(p[..., None] * ladder(100.0, D // 2)) for p in positions]
    cos, sin = (torch.cat(parts, -1) for parts in zip(*tables, strict=True))
    expected = gemma4.apply_multidimensional_rope(q, cos, sin, positions.permute(1, 2, 0))
    torch.testing.assert_close(y, expected, **CLOSE)
    _, by_table = turned(rope, positions, cos_sin=(cos, sin))  # in the order of the channels
    torch.testing.assert_close(by_table, expected, **CLOSE)


def test_a_trailing_rotation_and_its_inverse() -> None:
    """DeepSeek-V4: interleaved, on the last channels; outputs turn back."""
    positions = counts()
    rope = Rope(dim=6, pairing="interleaved", offset=D - 6)
    q, y = turned(rope, positions)
    angle = positions[..., None] * ladder(1e4, 6)
    expected = deepseek_v4.apply_rotary_pos_emb(q.float(), angle.cos(), angle.sin(), 2)
    torch.testing.assert_close(y.float(), expected)  # upstream computes in float32
    assert torch.equal(y[..., : D - 6], q[..., : D - 6])
    inverse = Rope(dim=6, pairing="interleaved", offset=D - 6, reverse=True)
    table = {"cos_sin": (angle.cos(), angle.sin())}
    inv_freq = {"inv_freq": ladder(1e4, 6)}
    for extras in ({}, table, inv_freq):
        s = spec(inverse, norm=NONE)
        given = None if "cos_sin" in extras else positions
        back, _ = reference.qk_norm_rope(y, None, None, None, given, s, **extras)
        torch.testing.assert_close(back, q, rtol=1e-11, atol=1e-11)


def test_output_pairing_reads_pairs_and_writes_halves() -> None:
    positions = counts()
    rope = Rope(pairing="interleaved", output_pairing="half")
    q, y = turned(rope, positions)
    _, k = heads()
    cos, sin = full(positions[..., None] * ladder(1e4, D))
    expected, _ = deepseek_v3.apply_rotary_pos_emb_interleave(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(y, expected, **CLOSE)
    _, by_table = turned(rope, positions, cos_sin=(cos, sin))
    torch.testing.assert_close(by_table, expected, **CLOSE)
    # With an offset, the same inside the rotary channels.
    offset = Rope(8, pairing="interleaved", output_pairing="half", offset=4)
    q, y = turned(offset, positions)
    cos, sin = full(positions[..., None] * ladder(1e4, 8))
    expected, _ = deepseek_v3.apply_rotary_pos_emb_interleave(
        q[..., 4:12], k[..., 4:12], cos, sin, unsqueeze_dim=2
    )
    torch.testing.assert_close(y, torch.cat((q[..., :4], expected, q[..., 12:]), -1), **CLOSE)


# ---- which position turns a pair --------------------------------------------------------------


@pytest.mark.parametrize("module", [qwen3_vl, qwen2_vl], ids=["interleaved", "chunked"])
def test_sections_against_upstreams_recomposition(module: object) -> None:
    interleaved = module is qwen3_vl
    section = (4, 2, 2) if interleaved else (2, 3, 3)
    name = "Qwen3VLTextRotaryEmbedding" if interleaved else "Qwen2VLRotaryEmbedding"
    kind = getattr(module, name)
    embedding = kind.__new__(kind)
    torch.nn.Module.__init__(embedding)
    embedding.mrope_section = section
    positions = counts(3)
    angle = positions[..., None] * ladder(1e4, D)
    cos, sin = (embedding.recomposition_frequencies(f) for f in (angle.cos(), angle.sin()))
    rope = Rope(mrope_section=section, mrope_interleaved=interleaved)
    q, y = turned(rope, positions)
    expected = gemma4.apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(y, expected, **CLOSE)
    # A cache of the common frequencies, a row by the position of each pair's axis.
    rows = torch.arange(300)[:, None] * ladder(1e4, D)
    cache = torch.cat((rows.cos(), rows.sin()), -1)
    _, cached = turned(rope, positions, cos_sin_cache=cache)
    torch.testing.assert_close(cached, expected, **CLOSE)
    # An axis may broadcast as positions without axes do.
    _, one = turned(rope, positions[:, :1])
    _, same = turned(rope, positions[:, :1].expand(3, B, S))
    assert torch.equal(one, same)


def test_axes_of_a_diffusion_model_against_complex_numbers() -> None:
    positions = counts(3)
    widths, begin = (4, 6, 6), 0
    q, y = turned(Rope(pairing="interleaved", axes_dim=widths), positions)
    for axis, width in enumerate(widths):
        angle = positions[axis][..., None, None] * ladder(1e4, width)
        part = q[..., begin : begin + width].unflatten(-1, (-1, 2)).contiguous()
        expected = torch.view_as_complex(part) * torch.polar(torch.ones_like(angle), angle)
        got = y[..., begin : begin + width]
        torch.testing.assert_close(got, torch.view_as_real(expected).flatten(-2), **CLOSE)
        begin += width


# ---- norms of parts, scales, tokens, heads, v --------------------------------------------------


def test_leading_channels_and_the_rest() -> None:
    q, _ = heads()
    w = draw(D, seed=5)
    first = F.rms_norm(q[..., :10], (10,), w[:10], 1e-6)
    s = spec(norm=Norm(dim=10))
    y, _ = reference.qk_norm_rope(q, None, w[:10], None, None, s)
    torch.testing.assert_close(y, torch.cat((first, q[..., 10:]), -1), **CLOSE)
    s = spec(norm=Norm(dim=10, rest=Norm("layer", eps=1e-3, weight_offset=1.0)))
    y, _ = reference.qk_norm_rope(q, None, w, None, None, s)
    second = F.layer_norm(q[..., 10:], (6,), w[10:] + 1, None, 1e-3)
    torch.testing.assert_close(y, torch.cat((first, second), -1), **CLOSE)
    each = draw(NQ, D, seed=6)
    y, _ = reference.qk_norm_rope(q, None, each, None, None, spec(norm=Norm(dim=10, rest=Norm())))
    last = F.rms_norm(q[:, :, 1, 10:], (6,), each[1, 10:], 1e-6)
    torch.testing.assert_close(y[:, :, 1, 10:], last, **CLOSE)


@pytest.mark.parametrize("order", ["norm_first", "rope_first"])
def test_a_scale_multiplies_what_the_norm_gives(order: str) -> None:
    q, k = heads()
    w, scale = draw(2, D, seed=5)
    rope, positions = Rope(), counts()
    s = spec(rope, order=order)
    y, z = reference.qk_norm_rope(q, k, w, w, positions, s, q_scale=scale, k_scale=-0.5)
    plain = reference.qk_norm_rope(q, k, w * scale, w * -0.5, positions, s)
    torch.testing.assert_close((y, z), plain, **CLOSE)
    bare = spec(rope, norm=NONE, order=order)
    y, _ = reference.qk_norm_rope(q, None, None, None, positions, bare, q_scale=scale)
    if order == "norm_first":
        expected, _ = reference.qk_norm_rope(q * scale, None, None, None, positions, bare)
    else:
        expected = scale * reference.qk_norm_rope(q, None, None, None, positions, bare)[0]
    torch.testing.assert_close(y, expected, **CLOSE)


def test_tokens_outside_the_range_are_normed_alone() -> None:
    q, k = heads()
    w, positions = draw(D, seed=5), counts()
    args = (q, k, w, None)
    whole = reference.qk_norm_rope(*args, positions, spec(Rope()))
    still = reference.qk_norm_rope(*args, None, spec())
    some = reference.qk_norm_rope(*args, positions, spec(Rope()), rotate_from=2, rotate_to=7)
    angle = positions[:, 2:7, None] * ladder(1e4, D)
    by_table = reference.qk_norm_rope(
        *args, None, spec(Rope()), cos_sin=(angle.cos(), angle.sin()), rotate_from=2, rotate_to=7
    )
    for a, b, got, table in zip(whole, still, some, by_table, strict=True):
        assert torch.equal(got, torch.cat((b[:, :2], a[:, 2:7], b[:, 7:]), 1))
        torch.testing.assert_close(table, got, **CLOSE)
    # No position outside the range is read.
    wild = positions.clone()
    wild[:, 7:] = 2**40
    same = reference.qk_norm_rope(*args, wild, spec(Rope()), rotate_from=2, rotate_to=7)
    assert all(torch.equal(a, b) for a, b in zip(same, some, strict=True))
    empty = reference.qk_norm_rope(*args, positions, spec(Rope()), rotate_from=4, rotate_to=4)
    assert all(torch.equal(a, b) for a, b in zip(empty, still, strict=True))


def test_tables_of_each_head_and_each_side() -> None:
    q, k = heads()
    angle_q, angle_k = draw(S, NQ, D // 2, seed=8), draw(B, S, NK, D, seed=9)
    tables = tuple((t.cos(), t.sin()) for t in (angle_q[None], angle_k))
    s = spec(Rope(pairing="interleaved"), norm=NONE)
    q2, k2 = reference.qk_norm_rope(q, k, None, None, None, s, cos_sin=tables)
    one = spec(Rope(pairing="interleaved"), norm=NONE, num_q_heads=1, num_kv_heads=1)
    for head in range(NQ):
        table = (angle_q[:, head].cos(), angle_q[:, head].sin())
        y, _ = reference.qk_norm_rope(
            q[:, :, head : head + 1], None, None, None, None, one, cos_sin=table
        )
        assert torch.equal(y[:, :, 0], q2[:, :, head])
    table = (angle_k[:, :, 1].cos(), angle_k[:, :, 1].sin())
    _, y = reference.qk_norm_rope(None, k[:, :, 1:], None, None, None, one, cos_sin=table)
    assert torch.equal(y[:, :, 0], k2[:, :, 1])
    only = reference.qk_norm_rope(q, None, None, None, None, s, cos_sin=(tables[0], None))
    assert torch.equal(only[0], q2) and only[1] is None


def test_v_is_normed_and_not_rotated() -> None:
    q, k = heads()
    v, w, positions = draw(B, S, NK, D, seed=3), draw(D, seed=5), counts()
    s = spec(Rope(), v_norm=Norm(eps=1e-5))
    q2, k2, v2 = reference.qk_norm_rope(q, k, w, None, positions, s, v=v, v_weight=w)
    torch.testing.assert_close(v2, F.rms_norm(v, (D,), w, 1e-5), **CLOSE)
    assert len(reference.qk_norm_rope(q, k, w, None, positions, s)) == 2
    packed = torch.cat((q, k, v), -2).flatten(-2)
    out = reference.qkv_norm_rope(packed, w, None, positions, s, v_weight=w)
    assert torch.equal(out, torch.cat((q2, k2, v2), -2).flatten(-2))
    wide = torch.cat((packed, v.flatten(-2)), -1)
    with pytest.raises(ValueError, match=f"qkv: last dimension {9 * D}, expected {7 * D}"):
        reference.qkv_norm_rope(wide, w, None, positions, s)
    terms = reference.criterion_terms(q, k, w, None, positions, s, v=v, v_weight=w)
    torch.testing.assert_close(terms[2], v2.abs(), **CLOSE)


# ---- wrong arguments --------------------------------------------------------------------------

Q, K = heads()
ROPE = spec(Rope())
AXES = spec(Rope(axes_dim=(8, 8)))
TABLE = torch.ones(S, D // 2)
BY_HEAD = torch.ones(B, S, NQ, D // 2)


@pytest.mark.parametrize(
    ("match", "s", "positions", "extras"),
    [
        (r"positions: shape \(2, 9\), expected \(3, ...\)", spec(Rope(mrope_section=(4, 2, 2))),
         counts(), {}),
        ("positions: shape", AXES, counts(2)[..., :4], {}),
        ("rotate_to: expected a range within the 9", ROPE, counts(), {"rotate_to": 10}),
        ("rotate_to: expected a range within", ROPE, counts(), {"rotate_from": 5, "rotate_to": 4}),
        ("rotate_from: expected an int", ROPE, counts(), {"rotate_from": -1}),
        ("rotate_from: given, but the spec has rope=None", spec(), None, {"rotate_from": 1}),
        ("cos: shape .* does not broadcast", ROPE, None, {"cos_sin": (TABLE[:4], TABLE)}),
        ("sin: shape .* heads .* of k", ROPE, None, {"cos_sin": (TABLE, BY_HEAD)}),
        ("cos_sin: None for k", ROPE, None, {"cos_sin": ((TABLE, TABLE), None)}),
        ("q_scale: torch.float16", ROPE, counts(), {"q_scale": TABLE.half()}),
        ("k_scale: shape", ROPE, counts(), {"k_scale": torch.ones(3)}),
        ("q_scale: expected a finite number", ROPE, counts(), {"q_scale": float("nan")}),
        ("v: given, but the spec has v_norm=None", ROPE, counts(), {"v": K}),
        ("v: shape", spec(v_norm=Norm()), None, {"v": Q}),
        ("v_weight: given without v", spec(v_norm=Norm()), None, {"v_weight": TABLE[0]}),
        (r"q_bias: shape \(16,\), expected \(10,\), \(3, 10\)", spec(norm=Norm(dim=10)), None,
         {"q_bias": torch.ones(D)}),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(
    match: str, s: Spec, positions: Tensor | None, extras: dict[str, object]
) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        reference.qk_norm_rope(Q, K, None, None, positions, s, **extras)


# ---- the criterion's terms ---------------------------------------------------------------------


def test_terms_of_options_by_hand() -> None:
    """One head [3, -4, 2, 1], the first two channels normed (rms 5 / sqrt(2)), the others not."""
    x = torch.tensor([[[3.0, -4.0, 2.0, 1.0]], [[3.0, -4.0, 2.0, 1.0]]], dtype=FP64)
    s = Spec(1, 1, 4, Norm(eps=0.0, dim=2), rope=Rope(dim=2, pair_distance=2, offset=0))
    scale = torch.tensor([1.0, 1.0, -3.0, 1.0])
    w = torch.tensor([2.0, 1.0])
    terms, _ = reference.criterion_terms(
        x, None, w, None, torch.tensor([7, 7]), s, q_scale=scale, rotate_from=1
    )
    r = 2**0.5 / 5
    own = [6 * r, 4 * r, 6.0, 1.0]
    pair = [6 * r + 6.0, 4 * r, 6 * r + 6.0, 1.0]
    torch.testing.assert_close(terms[:, 0], torch.tensor([own, pair], dtype=FP64))
    table = {"cos_sin": ((torch.tensor([[[0.5]]]), torch.tensor([[[2.0]]])), None)}
    terms, _ = reference.criterion_terms(
        x, None, w, None, None, s, q_scale=scale, rotate_from=1, **table
    )
    wide = [2 * pair[0], pair[1], 2 * pair[2], pair[3]]
    torch.testing.assert_close(terms[:, 0], torch.tensor([own, wide], dtype=FP64))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_rope_first_terms_bound_the_rotated_row(kind: str) -> None:
    """The bound of |y|, and so of every error that a rounding of a summand makes."""
    q, _ = heads()
    w, bias, scale = draw(3, D, seed=5)
    s = spec(Rope(dim=6, offset=4), norm=Norm(kind), order="rope_first")
    args, extras = (q, None, w, None, counts(), s), {"q_bias": bias, "q_scale": scale}
    y, _ = reference.qk_norm_rope(*args, **extras)
    terms, _ = reference.criterion_terms(*args, **extras)
    assert bool((y.abs() <= terms * (1 + 1e-12)).all())
    if kind == "rms":
        # No larger than it has to be somewhere: where the two products of a pair have one sign.
        assert float((terms / y.abs()).min()) < 1.05
        return
    # Of a LayerNorm the mean is a sum too, and all of its summands would have to agree.
    none, _ = reference.criterion_terms(q, None, w, None, counts(), replace(s, norm=Norm()))
    turned, _ = reference.qk_norm_rope(q, None, None, None, counts(), replace(s, norm=Norm("none")))
    rms = (turned.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    own = none / (rms * w.double().abs())
    rstd = (turned.var(-1, correction=0, keepdim=True) + 1e-6).rsqrt()
    want = (own + own.mean(-1, keepdim=True)) * rstd * w.double().abs() + bias.double().abs()
    assert torch.allclose(terms, want * scale.double().abs(), rtol=1e-12)


def test_frequencies_take_the_sign_of_reverse() -> None:
    forward, back = (angles.resolve(spec(Rope(reverse=r))).inv_freq for r in (False, True))
    assert back == tuple(-f for f in forward)
