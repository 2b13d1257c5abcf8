"""The oracle's chains of casts, bit for bit against the upstream modules that make them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.chameleon import modeling_chameleon as chameleon
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.nanochat import modeling_nanochat as nanochat
from transformers.models.olmo3 import modeling_olmo3 as olmo3

from cases import assert_chain, assert_same_bits
from qkrope import reference
from qkrope.spec import Norm, Rope
from small import BF16, NQ, B, D, S, counts, draw, heads, ladder, spec


def angle_table(dim: int = D) -> tuple[Tensor, Tensor]:
    angle = counts()[..., None].float() * ladder(1e4, dim).float()
    return angle.cos(), angle.sin()


def weighted(norm: torch.nn.Module, weight: Tensor, dtype: torch.dtype = BF16) -> torch.nn.Module:
    norm = norm.to(dtype)
    norm.weight.data = weight.to(dtype)
    return norm


def chain(rounding: object, norm: Norm, weight: Tensor | None, **more: object) -> Tensor:
    """q through the oracle's chain, half pairing with a float32 table unless told otherwise."""
    q, _ = heads(BF16)
    more = {"rope": Rope(), "order": "norm_first", "cos_sin": angle_table(), "bias": None, **more}
    s = spec(more["rope"], norm=norm, order=more["order"], rounding=rounding)
    table = more["cos_sin"] if s.rope else None
    y, _ = reference.qk_norm_rope(
        q, None, weight, None, None, s, cos_sin=table, q_bias=more["bias"]
    )
    assert y.dtype == BF16
    return y


def rounded_half(x: Tensor, cast: bool, apply: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    cos, sin = (torch.cat((t, t), -1).to(BF16 if cast else torch.float32) for t in angle_table())
    return apply(x, x, cos, sin, unsqueeze_dim=2)[0]


@torch.no_grad()
def test_chain_b_f_of_olmo() -> None:
    q, _ = heads(BF16)
    w = draw(D, dtype=BF16, seed=5)
    n = weighted(olmo3.Olmo3RMSNorm(D), w)(q)
    expected = rounded_half(n, False, olmo3.apply_rotary_pos_emb)
    for word in ("B/f", "N/f", "B/c"):
        assert_same_bits(chain(word, Norm(), w), expected)


@torch.no_grad()
def test_chain_of_deepseek_v4() -> None:
    """C/h without a weight for q, B/h with a float32 one for k."""
    q, k = heads(BF16)
    w = draw(D, dtype=torch.float32, seed=5)
    cos, sin = (t.to(BF16) for t in angle_table(6))
    rope = Rope(6, pairing="interleaved", offset=D - 6)
    s = spec(rope, rounding=("C/h", "B/h"))
    q2, k2 = reference.qk_norm_rope(q, k, None, w, None, s, cos_sin=(cos, sin))
    q_norm = deepseek_v4.DeepseekV4UnweightedRMSNorm()(q)
    k_norm = weighted(deepseek_v4.DeepseekV4RMSNorm(D), w, torch.float32)(k)
    assert_same_bits(q2, deepseek_v4.apply_rotary_pos_emb(q_norm, cos, sin, 2))
    assert_same_bits(k2, deepseek_v4.apply_rotary_pos_emb(k_norm, cos, sin, 2))


@torch.no_grad()
def test_chain_of_nanochat_rotates_back_and_first() -> None:
    q, _ = heads(BF16)
    expected = nanochat.NanoChatRMSNorm()(rounded_half(q, True, nanochat.apply_rotary_pos_emb))
    got = chain("B/b", Norm(), None, rope=Rope(reverse=True), order="rope_first")
    assert_same_bits(got, expected)


@torch.no_grad()
def test_chains_of_layer_norms() -> None:
    q, _ = heads(BF16)
    w, b = draw(2, NQ, D, dtype=BF16, seed=5)
    module = weighted(chameleon.ChameleonLayerNorm((NQ, D)), w)
    module.bias.data = b
    layer = Norm("layer", eps=1e-5)
    for word in ("E/b", "A/b", "eager"):
        assert_same_bits(chain(word, layer, w, bias=b, rope=None), module(q))
    module = weighted(cohere.CohereLayerNorm((NQ, D)), w)
    assert_same_bits(chain("B/b", layer, w, rope=None), module(q))
    # torch's layer_norm sums and fuses in another order: the same chain but for ties.
    got = chain("D/b", layer, w[0], bias=b[0], rope=None)
    terms, _ = reference.criterion_terms(q, None, w[0], None, None, spec(norm=layer), q_bias=b[0])
    assert_chain(got, F.layer_norm(q, (D,), w[0], b[0], 1e-5), terms, table=True)


@torch.no_grad()
def test_chains_of_rms_and_l2() -> None:
    q, _ = heads(BF16)
    w = draw(D, dtype=BF16, seed=5)
    assert_same_bits(chain("N/b", Norm(eps=1e-5), w, rope=None), F.rms_norm(q, (D,), w, 1e-5))
    assert_same_bits(chain("F/b", Norm("l2", eps=1e-12), None, rope=None), F.normalize(q, dim=-1))
    # Gemma's reciprocal root is a power.
    terms, _ = reference.criterion_terms(q, None, w, None, None, spec())
    expected = weighted(gemma4.Gemma4RMSNorm(D), w)(q)
    assert_chain(chain("B/b", Norm(), w, rope=None), expected, terms, table=True)


def test_a_scale_rounds_once_more() -> None:
    q, k = heads(BF16)
    scale = draw(B, S, 1, 1, dtype=torch.float32, seed=7)
    s = spec(rounding="B/b")
    q2, k2 = reference.qk_norm_rope(q, k, None, None, None, s, q_scale=scale, k_scale=0.3)
    q1, k1 = reference.qk_norm_rope(q, k, None, None, None, s)
    assert_same_bits(q2, (q1 * scale).to(BF16))
    assert_same_bits(k2, k1 * 0.3)
