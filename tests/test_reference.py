"""The oracle against truths that share none of its code: Hugging Face, torch, mpmath."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3 as hf
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from cases import POSITIONS, assert_criterion, assert_same_bits
from qkrope import angles, reference, reference_angles
from qkrope.spec import Linear, Norm, Rope, Spec, YaRN

B, S, NQ, NK, D = 2, 9, 3, 2, 16

# Two float64 formulas of a dozen operations each, values of order one to ten.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def spec(**changes: object) -> Spec:
    return Spec(**{"num_q_heads": NQ, "num_kv_heads": NK, "head_dim": D, **changes})


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, NQ, D, generator=draw, dtype=torch.float64).to(dtype)
    k = torch.randn(B, S, NK, D, generator=draw, dtype=torch.float64).to(dtype)
    w, u = torch.randn(2, D, generator=draw, dtype=torch.float64).to(dtype)
    positions = torch.randint(0, 300, (B, S), generator=draw)
    return q, k, w, u, positions


def exact_cos_sin(positions: Tensor, rope: Rope, dim: int) -> tuple[Tensor, Tensor]:
    """Per pair, from float64 arithmetic that is good to 1e-13 at the small positions used here."""
    inv_freq = rope.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions[..., None] * inv_freq
    return angle.cos(), angle.sin()


def complex_rotation(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Interleaved pairs as complex numbers times exp(i angle)."""
    cos, sin = exact_cos_sin(positions, rope, x.shape[-1])
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, :, None]
    return torch.view_as_real(turned).flatten(-2)


# ---- against Hugging Face ---------------------------------------------------------------------


def hf_qwen3(dtype: torch.dtype, q: Tensor, k: Tensor, w: Tensor, u: Tensor, positions: Tensor):
    """q and k as Qwen3Attention has them before attention, [B, S, H, D], and its cos and sin."""
    config = Qwen3Config(hidden_size=NQ * D, num_attention_heads=NQ, head_dim=D)
    cos, sin = hf.Qwen3RotaryEmbedding(config)(q, positions)
    norms = []
    for weight in (w, u):
        norm = hf.Qwen3RMSNorm(D, eps=1e-6).to(dtype)
        norm.weight.data = weight
        norms.append(norm)
    q2, k2 = norms[0](q).transpose(1, 2), norms[1](k).transpose(1, 2)
    q2, k2 = hf.apply_rotary_pos_emb(q2, k2, cos, sin)
    return q2.transpose(1, 2), k2.transpose(1, 2), (cos, sin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eager_is_bit_equal_to_hf_qwen3(dtype: torch.dtype) -> None:
    with torch.no_grad():
        q, k, w, u, positions = tensors(dtype)
        q_hf, k_hf, cos_sin = hf_qwen3(dtype, q, k, w, u, positions)
        q2, k2 = reference.qk_norm_rope(q, k, w, u, None, spec(rounding="eager"), cos_sin=cos_sin)
    assert q2.dtype == dtype
    assert_same_bits(q2, q_hf, "q")
    assert_same_bits(k2, k_hf, "k")


def test_exact_agrees_with_hf_qwen3_in_float32() -> None:
    with torch.no_grad():
        q, k, w, u, positions = tensors(torch.float32)
        q_hf, k_hf, cos_sin = hf_qwen3(torch.float32, q, k, w, u, positions)
    args = (q, k, w, u, None, spec())
    refs = reference.qk_norm_rope(*args, cos_sin=cos_sin)
    terms = reference.criterion_terms(*args, cos_sin=cos_sin)
    for y, ref, term in zip((q_hf, k_hf), refs, terms, strict=True):
        assert_criterion(y, ref, term, torch.float32)


def test_eager_differs_from_once_in_bfloat16() -> None:
    """The two roundings are different values of the Spec; a mix-up must not go unseen."""
    q, k, w, u, positions = tensors(torch.bfloat16)
    once, _ = reference.qk_norm_rope(q, k, w, u, positions, spec(), round_to=torch.bfloat16)
    eager, _ = reference.qk_norm_rope(q, k, w, u, positions, spec(rounding="eager"))
    share = float((once == eager).double().mean())
    assert 0.3 < share < 0.8  # the unfused chain is correctly rounded in about half its outputs


# ---- against torch and complex numbers --------------------------------------------------------


def test_half_pairing_against_torch_and_hf_rotation_in_float64() -> None:
    q, k, w, u, positions = tensors()
    rope = Rope(theta=1e6)
    q2, k2 = reference.qk_norm_rope(q, k, w, u, positions, spec(rope=rope))
    cos, sin = (torch.cat((t, t), -1) for t in exact_cos_sin(positions, rope, D))
    q_n, k_n = F.rms_norm(q, (D,), w, 1e-6), F.rms_norm(k, (D,), u, 1e-6)
    q_hf, k_hf = hf.apply_rotary_pos_emb(q_n, k_n, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(q2, q_hf, **CLOSE)
    torch.testing.assert_close(k2, k_hf, **CLOSE)


@pytest.mark.parametrize("dim", [D, 6])
def test_interleaved_pairing_against_complex_numbers(dim: int) -> None:
    q, k, w, u, positions = tensors()
    rope = Rope(dim=dim, theta=1e4, pairing="interleaved")
    q2, _ = reference.qk_norm_rope(q, k, w, u, positions, spec(rope=rope))
    n = F.rms_norm(q, (D,), w, 1e-6)
    turned = complex_rotation(n[..., :dim].contiguous(), positions, rope)
    torch.testing.assert_close(q2, torch.cat((turned, n[..., dim:]), -1), **CLOSE)


def test_pairings_differ_by_a_permutation_of_channels() -> None:
    q, k, w, u, positions = tensors()
    to_half = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    inter, _ = reference.qk_norm_rope(q, k, w, u, positions, spec(rope=Rope(pairing="interleaved")))
    half, _ = reference.qk_norm_rope(q[..., to_half], k, w[to_half], u, positions, spec())
    torch.testing.assert_close(half, inter[..., to_half], **CLOSE)


def test_layer_norm_with_bias_per_head_and_per_row() -> None:
    q, k, w, u, _ = tensors()
    bias = torch.randn(D, dtype=torch.float64)
    head = spec(norm=Norm(kind="layer", eps=1e-5), rope=None)
    q2, k2 = reference.qk_norm_rope(q, k, w, u, None, head, q_bias=bias)
    torch.testing.assert_close(q2, F.layer_norm(q, (D,), w, bias, 1e-5), **CLOSE)
    torch.testing.assert_close(k2, F.layer_norm(k, (D,), u, None, 1e-5), **CLOSE)
    row = spec(norm=Norm(kind="layer", eps=1e-5, scope="row"), rope=None)
    wide, wide_bias = torch.randn(2, NQ * D, dtype=torch.float64)
    q2, _ = reference.qk_norm_rope(q, None, wide, None, None, row, q_bias=wide_bias)
    expected = F.layer_norm(q.flatten(-2), (NQ * D,), wide, wide_bias, 1e-5)
    torch.testing.assert_close(q2.flatten(-2), expected, **CLOSE)


def test_rms_over_a_row_and_a_weight_for_each_head() -> None:
    q, k, *_ = tensors()
    wide, narrow = (
        torch.randn(NQ * D, dtype=torch.float64),
        torch.randn(NK * D, dtype=torch.float64),
    )
    row = spec(norm=Norm(scope="row"), rope=None)
    q2, k2 = reference.qk_norm_rope(q, k, wide, narrow, None, row)
    torch.testing.assert_close(q2.flatten(-2), F.rms_norm(q.flatten(-2), (NQ * D,), wide, 1e-6))
    torch.testing.assert_close(k2.flatten(-2), F.rms_norm(k.flatten(-2), (NK * D,), narrow, 1e-6))
    each = wide.view(NQ, D)
    q2, _ = reference.qk_norm_rope(q, k, each, None, None, spec(rope=None))
    for h in range(NQ):
        expected = F.rms_norm(q[:, :, h], (D,), each[h], 1e-6)
        torch.testing.assert_close(q2[:, :, h], expected, **CLOSE)


def test_l2_none_and_a_norm_of_its_own_for_k() -> None:
    q, k, w, u, _ = tensors()
    q[0, 0, 0] = 0  # l2 of nothing is nothing, not NaN
    s = spec(norm=Norm(kind="l2", eps=1e-12), k_norm=Norm(kind="none"), rope=None)
    q2, k2 = reference.qk_norm_rope(q, k, w, None, None, s)
    torch.testing.assert_close(q2, F.normalize(q, dim=-1) * w, **CLOSE)
    assert torch.equal(k2, k)


def test_weight_offset_and_no_weight() -> None:
    q, k, w, u, positions = tensors()
    gemma = spec(norm=Norm(weight_offset=1.0))
    q2, k2 = reference.qk_norm_rope(q, k, w, None, positions, gemma)
    plain, _ = reference.qk_norm_rope(q, k, w + 1, None, positions, spec())
    _, bare = reference.qk_norm_rope(q, k, w, torch.ones(D), positions, spec())
    torch.testing.assert_close(q2, plain, **CLOSE)
    torch.testing.assert_close(k2, bare, **CLOSE)  # no weight: nothing multiplies, offset or not


def test_rope_first_normalises_the_rotated_row() -> None:
    q, k, w, u, positions = tensors()
    rope = Rope(pairing="interleaved")
    s = spec(rope=rope, order="rope_first")
    q2, _ = reference.qk_norm_rope(q, k, w, u, positions, s)
    expected = F.rms_norm(complex_rotation(q, positions, rope), (D,), w, 1e-6)
    torch.testing.assert_close(q2, expected, **CLOSE)
    first, _ = reference.qk_norm_rope(q, k, w, u, positions, spec(rope=rope))
    assert not torch.allclose(q2, first, rtol=1e-2, atol=1e-2)  # a weight does not commute


# ---- angles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_angles_against_mpmath_at_every_position(theta: float) -> None:
    """Exact for the 64-bit fraction; that fraction is within half a unit of the true frequency."""
    rope = Rope(theta=theta, dim=128)
    inv_freq = angles.resolve(Spec(1, 1, 128, rope=rope)).inv_freq
    positions = torch.tensor([*POSITIONS, 10**7, 123456789, -987654321])
    cos, sin = reference_angles.cos_sin_of_positions(positions, inv_freq)
    with mpmath.workdps(60):
        for (i, p), j in itertools.product(enumerate(positions.tolist()), (0, 1, 17, 40, 63)):
            fixed = 2 * mpmath.pi * p * mpmath.mpf(angles.frac(inv_freq[j])) / 2**64
            true = p * mpmath.mpf(inv_freq[j])
            worst = abs(p) * 2 * mpmath.pi / 2**65
            for got, function in ((cos, mpmath.cos), (sin, mpmath.sin)):
                value = mpmath.mpf(float(got[i, j]))
                assert abs(value - function(fixed)) < 1e-15
                assert abs(value - function(true)) < 1e-15 + worst


def test_a_negative_position_rotates_back() -> None:
    q, *_ = tensors()
    s = spec(norm=Norm(kind="none"))
    positions = torch.tensor([1, 40, 4095, 131071, 2**20, 2**24 + 1, 2**31 - 1, -1, -5])
    there, _ = reference.qk_norm_rope(q, None, None, None, positions, s)
    back, _ = reference.qk_norm_rope(there, None, None, None, -positions, s)
    torch.testing.assert_close(back, q, **CLOSE)


def test_callers_inv_freq_is_taken_as_it_is() -> None:
    q, k, w, u, positions = tensors()
    resolved = angles.resolve(spec()).inv_freq
    same, _ = reference.qk_norm_rope(
        q,
        k,
        w,
        u,
        positions,
        spec(rope=Rope(theta=7.0)),
        inv_freq=torch.tensor(resolved, dtype=torch.float64),
    )
    expected, _ = reference.qk_norm_rope(q, k, w, u, positions, spec())
    assert torch.equal(same, expected)
    # In float32 the values are other values, and those are what counts at a long position.
    far = positions + 2**30
    narrow = torch.tensor(resolved, dtype=torch.float32)
    a, _ = reference.qk_norm_rope(q, k, w, u, far, spec(), inv_freq=narrow)
    b, _ = reference.qk_norm_rope(q, k, w, u, far, spec(), inv_freq=narrow.double())
    c, _ = reference.qk_norm_rope(q, k, w, u, far, spec())
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=0.1)


def test_tables_give_what_angles_give() -> None:
    q, k, w, u, positions = tensors()
    for pairing in ("half", "interleaved"):
        s = spec(rope=Rope(dim=6, pairing=pairing))
        expected = reference.qk_norm_rope(q, k, w, u, positions, s)
        cos, sin = exact_cos_sin(positions, s.rope, 6)
        cache = torch.cat(exact_cos_sin(torch.arange(300), s.rope, 6), -1)
        wide = [
            t.repeat_interleave(2, -1) if pairing == "interleaved" else torch.cat((t, t), -1)
            for t in (cos, sin)
        ]
        for extras in ({"cos_sin": (cos, sin)}, {"cos_sin": tuple(wide)}, {"cos_sin_cache": cache}):
            got = reference.qk_norm_rope(q, k, w, u, positions, s, **extras)
            torch.testing.assert_close(got, expected, **CLOSE)


def test_a_full_width_table_may_have_two_angles_in_a_pair() -> None:
    q, *_ = tensors()
    cos, sin = torch.randn(2, S, D, dtype=torch.float64)
    s = spec(norm=Norm(kind="none"))
    y, _ = reference.qk_norm_rope(q, None, None, None, None, s, cos_sin=(cos, sin))
    a, b, h = q[..., : D // 2], q[..., D // 2 :], D // 2
    c, d = cos[None, :, None], sin[None, :, None]
    first = a * c[..., :h] - b * d[..., :h]
    second = b * c[..., h:] + a * d[..., h:]
    torch.testing.assert_close(y, torch.cat((first, second), -1), **CLOSE)


def test_attention_factor_multiplies_the_rotated_channels_alone() -> None:
    q, k, w, u, positions = tensors()
    scaled = spec(rope=Rope(dim=6, scaling=YaRN.from_ramp(1.0, 0.0, 1.0, 1.5)))
    y, _ = reference.qk_norm_rope(q, k, w, u, positions, scaled)
    plain, _ = reference.qk_norm_rope(q, k, w, u, positions, spec(rope=Rope(dim=6)))
    torch.testing.assert_close(y[..., :6], 1.5 * plain[..., :6], **CLOSE)
    assert torch.equal(y[..., 6:], plain[..., 6:])


def test_linear_scaling_is_division_of_the_position() -> None:
    q, k, w, u, positions = tensors()
    linear, _ = reference.qk_norm_rope(
        q, k, w, u, 4 * positions, spec(rope=Rope(scaling=Linear(factor=4.0)))
    )
    plain, _ = reference.qk_norm_rope(q, k, w, u, positions, spec())
    torch.testing.assert_close(linear, plain, **CLOSE)


# ---- the call ---------------------------------------------------------------------------------


def test_packed_form_splits_and_keeps_v() -> None:
    q, k, w, u, positions = tensors(torch.bfloat16)
    v = torch.randn(B, S, 5, D).bfloat16()
    qkv = torch.cat((q, k, v), -2).flatten(-2)
    out = reference.qkv_norm_rope(qkv, w, u, positions, spec(), round_to=torch.bfloat16)
    parts = out.unflatten(-1, (-1, D)).split((NQ, NK, 5), -2)
    expected = reference.qk_norm_rope(q, k, w, u, positions, spec(), round_to=torch.bfloat16)
    for got, want in zip(parts, (*expected, v), strict=True):
        assert_same_bits(got, want)
    with pytest.raises(ValueError, match="qkv: last dimension"):
        reference.qkv_norm_rope(qkv[..., : 4 * D], w, u, positions, spec())


def test_broadcasting_own_positions_and_absent_sides() -> None:
    q, k, w, u, positions = tensors()
    row = positions[0]
    expected = reference.qk_norm_rope(q, k, w, u, row.expand(B, S), spec())
    for shape in (row, row[None], row.int()):
        got = reference.qk_norm_rope(q, k, w, u, shape, spec())
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    only_q, none = reference.qk_norm_rope(q, None, w, None, row, spec())
    assert none is None and torch.equal(only_q, expected[0])
    none, only_k = reference.qk_norm_rope(None, k[:, :4], None, u, row[:4], spec())
    assert none is None and torch.equal(only_k, expected[1][:, :4])
    both = reference.qk_norm_rope(q, k[:, :4], w, u, (row, row[:4]), spec())
    assert torch.equal(both[0], expected[0]) and torch.equal(both[1], expected[1][:, :4])


def test_wrong_arguments_are_named() -> None:
    q, k, w, u, positions = tensors()
    cos = torch.ones(S, D // 2)

    def refuse(match: str, *args: object, **extras: object) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            reference.qk_norm_rope(*args, **extras)

    refuse("positions", q, k, w, u, None, spec())
    refuse("positions", q, k, w, u, positions.float(), spec())
    refuse("positions", q, k, w, u, positions[:, :3], spec())
    refuse("positions", q, k, w, u, positions + 2**31, spec())
    refuse("q: shape", q[..., :4], k, w, u, positions, spec())
    refuse("k: shape", q, q, w, u, positions, spec())
    refuse("q_weight", q, k, w[:4], u, positions, spec())
    refuse("k_weight", q, k, w, torch.ones(NK * D), positions, spec())
    refuse("k_weight", q, k, w, u, positions, spec(k_norm=Norm(kind="none")))
    refuse("cos: last", q, k, w, u, None, spec(), cos_sin=(cos[:, :3], cos))
    refuse("rope=None", q, k, w, u, None, spec(rope=None), cos_sin=(cos, cos))
    refuse("at most one", q, k, w, u, None, spec(), cos_sin=(cos, cos), inv_freq=cos[0])
    refuse("inv_freq", q, k, w, u, positions, spec(), inv_freq=cos)
    refuse("cos_sin_cache", q, k, w, u, positions, spec(), cos_sin_cache=torch.ones(9, 4))
    refuse("cos_sin_cache", q, k, w, u, positions, spec(), cos_sin_cache=torch.ones(9, D))


# ---- the criterion's terms ---------------------------------------------------------------------


def by_hand(order: str) -> tuple[list[float], float]:
    """Terms of one head [3, -4, 2, 1], rotary dim 2 interleaved, weight [2, -1, 3, 1]; its rstd."""
    x, w = [3.0, -4.0, 2.0, 1.0], [2.0, -1.0, 3.0, 1.0]
    rstd = (30 / 4) ** -0.5
    own = [abs(a) * rstd * abs(b) for a, b in zip(x, w, strict=True)]
    pair = [own[0] + own[1]] * 2 if order == "norm_first" else [14 * rstd, 7 * rstd]
    return [*pair, *own[2:]], rstd


@pytest.mark.parametrize("order", ["norm_first", "rope_first"])
def test_terms_by_hand(order: str) -> None:
    x = torch.tensor([[[3.0, -4.0, 2.0, 1.0]]])
    w = torch.tensor([1.0, -2.0, 2.0, 0.0])  # and an offset of 1
    norm = Norm(eps=0.0, weight_offset=1.0)
    rope = Rope(dim=2, pairing="interleaved")
    s = Spec(1, 1, 4, norm=norm, rope=rope, order=order)
    expected, rstd = by_hand(order)
    terms, _ = reference.criterion_terms(x, None, w, None, torch.tensor([7]), s)
    torch.testing.assert_close(terms.flatten(), torch.tensor(expected, dtype=torch.float64))
    # A bias adds its size (of both channels where they mix), a table its largest entry if above 1.
    bias = torch.tensor([0.5, -0.25, 1.0, 0.0])
    terms, _ = reference.criterion_terms(x, None, w, None, torch.tensor([7]), s, q_bias=bias)
    added = [0.75, 0.75] if order == "norm_first" else [0.5, 0.25]
    with_bias = [a + b for a, b in zip(expected, [*added, 1.0, 0.0], strict=True)]
    torch.testing.assert_close(terms.flatten(), torch.tensor(with_bias, dtype=torch.float64))
    if order == "norm_first":
        table = (torch.tensor([[0.5]]), torch.tensor([[-3.0]]))
        terms, _ = reference.criterion_terms(x, None, w, None, None, s, cos_sin=table)
        scaled = [3 * expected[0], 3 * expected[1], *expected[2:]]
        torch.testing.assert_close(terms.flatten(), torch.tensor(scaled, dtype=torch.float64))


def test_terms_count_the_mean_of_a_layer_norm() -> None:
    x = torch.tensor([[[3.0, -4.0, 2.0, 1.0]]], dtype=torch.float64)
    s = Spec(1, 1, 4, norm=Norm(kind="layer", eps=0.0), rope=None)
    terms, _ = reference.criterion_terms(x, None, None, None, None, s)
    rstd = float(x.var(correction=0)) ** -0.5
    torch.testing.assert_close(terms, (x.abs() + 0.5) * rstd)
