"""Bugs that shipped in kernels of this operation elsewhere, and where each is tested here.

In this file: 64-bit offsets, empty batches, NaN padding, half a mutation, state kept between calls,
many tokens. Elsewhere:

* shuffles in divergent branches, partial rotary dims, halves that are no power of two, narrow
  tails: ``test_kernels.test_shape`` and ``test_core`` (128/96, 72, 80, 90, 34/10, 6/4, 2/2);
* a rotary dim that is not passed on, or a table of another width: ``test_kernels.test_tables``
  and ``test_shape``; a position outside a table: test_errors.py (CPU) and test_cuda.py;
* YaRN's attention factor, inverted ramp, ramp index, mscale, other scalings taken for YaRN:
  ``test_kernels.test_scalings``, ``test_mutants``, and test_angles.py against Hugging Face;
* angles that lose accuracy with the position: the position list of every recipe, and
  ``test_mutants.angle_in_float32``;
* a second rounding between norm and rotation:
  ``test_kernel_rules.test_outputs_are_correctly_rounded``;
* bits that differ with the instruction mix (contraction): the kernels spell every product and sum;
  ``test_kernel_rules.test_bits_do_not_depend_on_*``;
* reading before the previous kernel wrote:
  ``test_kernel_rules.test_reads_what_the_previous_kernel_wrote``;
* synchronising with the host, graph capture: ``test_kernel_rules.test_in_a_cuda_graph``;
* positions that are silently converted: int32 and int64 both run in ``test_kernels.test_layouts``;
* a fallback that is silently slow, a compile error that becomes "unsupported": test_compat.py;
* JIT: missing compiler, stale or truncated cache: test_cuda*.py.

Not tested, because what they touch does not exist here: paged KV writes (slot -1), FP8 (fnuz and
OCP formats, scale indices, saturation), double rotation by an attention backend (we are no
attention backend), collective races of tensor-parallel row norms, ROCm and XPU, and shifts by 32
bits of a lane mask (there is no lane mask: shuffles name all lanes).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qkrope
from cases import Recipe, assert_same_bits
from qkrope.spec import Rope, Spec, YaRN

BF16 = torch.bfloat16
SPEC = Spec(3, 2, 64, rope=Rope(dim=32, theta=1e6))


def test_offsets_beyond_32_bits(device: str) -> None:
    """Tokens more than 2^31 elements apart; only the pages that are touched cost memory."""
    rows, row = 4, 2**30 + 64
    try:
        storage = torch.empty(rows * row, dtype=BF16, device=device)
    except RuntimeError:  # includes torch.OutOfMemoryError
        pytest.skip("no address space for 8 GiB here")
    small = Recipe(SPEC, lead=(rows,), layout="packed").make(device)
    width = small.qkv.shape[-1]
    far = storage.as_strided((rows, width), (row, 1))
    far.copy_(small.qkv)
    expected = small.qkv.clone()
    qkrope.qkv_norm_rope_(expected, *small.rest())
    qkrope.qkv_norm_rope_(far, *small.rest())
    assert_same_bits(far, expected)
    # And heads that far apart: a transposed tensor with a very long sequence.
    q = storage.as_strided((1, 3, 64), (64, row, 1))
    k = storage.as_strided((1, 2, 64), (64, row, 1), 4096)
    q.copy_(small.q[:1])
    k.copy_(small.k[:1])
    qkrope.qk_norm_rope_(q, k, small.q_weight, small.k_weight, small.positions[:1], SPEC)
    want = qkrope.qk_norm_rope(
        small.q[:1], small.k[:1], small.q_weight, small.k_weight, small.positions[:1], SPEC
    )
    assert_same_bits(q, want[0])
    assert_same_bits(k, want[1])


@pytest.mark.parametrize("lead", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "packed"])
def test_an_empty_batch_is_no_launch(device: str, lead: tuple[int, ...], layout: str) -> None:
    call = Recipe(SPEC, lead=lead, layout=layout).make(device)
    q2, k2 = qkrope.qk_norm_rope(*call.args())
    assert q2.shape == call.q.shape and k2.shape == call.k.shape
    qkrope.qk_norm_rope_(*call.args())
    if call.qkv is not None:
        qkrope.qkv_norm_rope_(call.qkv, *call.rest())
    call.assert_guards()


def test_nan_padding_tokens_stay_padding(device: str) -> None:
    """Serving engines pad a batch with rows of anything."""
    recipe = Recipe(SPEC, lead=(16,), layout="packed")
    clean, padded = recipe.make(device), recipe.make(device)
    padded.qkv[11:] = torch.nan
    for call in (clean, padded):
        qkrope.qkv_norm_rope_(call.qkv, *call.rest())
    assert_same_bits(padded.qkv[:11], clean.qkv[:11])
    assert bool(padded.qkv[11:].isnan().all())


def test_nothing_is_written_before_a_refusal(device: str) -> None:
    """A wrong k is found before q is touched."""
    call = Recipe(SPEC, lead=(9,)).make(device)
    q, k, qw, kw, positions, spec = call.args()
    with pytest.raises(ValueError, match="k_weight"):
        qkrope.qk_norm_rope_(q, k, qw, kw[:32], positions, spec)
    with pytest.raises(ValueError, match="k"):
        qkrope.qk_norm_rope_(q, k[..., :32], qw, kw, positions, spec)
    call.assert_inputs_unchanged()


def test_no_state_is_kept_between_specs(device: str) -> None:
    """Two models in turn, alike but for theta, scaling, eps: what the first left must not show."""
    specs = [
        SPEC,
        replace(SPEC, rope=replace(SPEC.rope, theta=1e4)),
        replace(SPEC, rope=replace(SPEC.rope, scaling=YaRN.from_ramp(4.0, 2.0, 9.0, 1.3))),
        replace(SPEC, norm=replace(SPEC.norm, eps=1e-2, weight_offset=1.0)),
    ]
    for _ in range(2):
        for spec in specs:
            call = Recipe(spec, lead=(22,)).make(device)
            call.check(*qkrope.qk_norm_rope(*call.args()))


def test_seq_len_is_not_remembered(device: str) -> None:
    """Length-dependent frequencies follow the call, not the first call."""
    scaling = qkrope.DynamicNTK(factor=2.0, original_max_position_embeddings=512)
    spec = replace(SPEC, rope=replace(SPEC.rope, scaling=scaling))
    for seq_len in (512, 4096, 512, 100000):
        call = Recipe(spec, lead=(22,)).make(device)
        call.extras = {"seq_len": seq_len}
        call.check(*qkrope.qk_norm_rope(*call.args(), seq_len=seq_len))


def test_an_inv_freq_changed_in_place_is_seen(device: str) -> None:
    """LongRoPE models rewrite their frequency buffer between calls."""
    call = Recipe(SPEC, lead=(22,), angle="inv_freq32").make(device)
    for factor in (1.0, 0.37):
        call.extras["inv_freq"] *= factor
        call.check(*qkrope.qk_norm_rope(*call.args(), **call.extras))


def test_more_tokens_than_a_grid_dimension(device: str) -> None:
    """70000 tokens: above the 65535 blocks of a grid's second dimension."""
    spec = Spec(1, 1, 8, rope=Rope(dim=4))
    call = Recipe(spec, lead=(70000,), layout="packed", other_heads=0).make(device)
    call.check(*qkrope.qk_norm_rope(*call.args()))


def test_many_heads(device: str) -> None:
    """More heads than a block has threads, and q and k counts without a common factor."""
    call = Recipe(Spec(257, 129, 16, rope=Rope(dim=8)), lead=(3,), layout="packed").make(device)
    call.check(*qkrope.qk_norm_rope(*call.args()))
