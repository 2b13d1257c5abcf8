"""The CUDA kernels of the gradients compile without a GPU within their budgets; and their grids."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import emulated
from option_variants import OPTION_VARIANTS
from qkrope import _native, cpu, ops_backward
from qkrope.cuda.launch import slot_key, variant_of
from qkrope.plan import once_of, plan_of
from qkrope.spec import Norm, Rope, Spec
from qkrope.variant import Variant
from test_cuda_compile import FEW, MAIN, MORE, VARIANTS, compile_clean, warps_an_sm

# Every variant on one architecture, some on the others: `-m slow` takes the rest.
CASES = [("sm_90", name) for name in VARIANTS]
CASES += [(arch, name) for arch in (*MAIN, *MORE) if arch != "sm_90" for name in FEW]
REST = [(arch, name) for arch in MAIN for name in VARIANTS if (arch, name) not in CASES]
GENERAL = [("sm_90", name) for name in OPTION_VARIANTS]
GENERAL_REST = [(arch, name) for arch in MAIN if arch != "sm_90" for name in OPTION_VARIANTS]


def gradients_of(one: Variant) -> Variant:
    """The backward of a variant: its casts count as the identity."""
    if (options := one.options) is not None:
        plain = {
            side: replace(getattr(options, side), round_norm="", round_turn="") for side in "qkv"
        }
        options = replace(options, **plain)
    return replace(one, options=options, backward=True)


@pytest.mark.parametrize(("arch", "name"), CASES, ids=str)
def test_plain(arch: str, name: str) -> None:
    """No spills, and the warps that the launcher counts on fit."""
    check_plain(arch, name)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), REST, ids=str)
def test_plain_everywhere(arch: str, name: str) -> None:
    check_plain(arch, name)


def check_plain(arch: str, name: str) -> None:
    one = gradients_of(VARIANTS[name])
    found = compile_clean(one, arch)
    for kernel in found.keys() & {"vector1", "vector2"}:
        assert warps_an_sm(found[kernel].registers) >= warps(one), (kernel, found)
    assert found["sums"].registers <= 32


def warps(one: Variant) -> int:
    """QK_BACKWARD_WARPS of native/backward.h."""
    if one.lane_units != 1:
        return 16 if one.lane_units == 2 else 8
    lanes = -(-one.head_dim // 8)
    tight = lanes & (lanes - 1) == 0 and one.rotary_dim in (0, one.head_dim)
    tight = tight and one.dtype != "float32" and one.q_norm == one.k_norm
    return 20 if tight and one.angle != "inv_freq" else 16


@pytest.mark.parametrize(("arch", "name"), GENERAL, ids=str)
def test_general(arch: str, name: str) -> None:
    check_general(arch, name)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), GENERAL_REST, ids=str)
def test_general_everywhere(arch: str, name: str) -> None:
    check_general(arch, name)


def check_general(arch: str, name: str) -> None:
    one = gradients_of(OPTION_VARIANTS[name])
    found = compile_clean(one, arch)
    for kernel, used in found.items():
        if kernel != "sums":
            assert warps_an_sm(used.registers) >= (8 if one.lane_units == 4 else 16), kernel


def test_a_key_says_backward() -> None:
    spec = Spec(3, 2, 64, rope=Rope(32))
    forward = Variant.of(spec, "bfloat16", None, None, "phase")
    backward = Variant.of(spec, "bfloat16", None, None, "phase", backward=True)
    keys = {slot_key(forward, 3), slot_key(backward, 3)}
    assert len(keys) == 2
    assert {variant_of(spec, key) for key in keys} == {forward, backward}


def test_a_spec_with_casts_runs_the_plain_kernel() -> None:
    spec = once_of(Spec(3, 2, 64, rounding="eager"))
    assert spec == once_of(spec) == Spec(3, 2, 64) and once_of(spec) is spec
    assert Variant.of(spec, "bfloat16", None, None, "phase", backward=True).options is None


# ---- the grid ---------------------------------------------------------------------------------

PLAIN = Spec(32, 8, 128)
SPECS = {
    "32/8": PLAIN,
    "5/1": Spec(5, 1, 128),
    "wide": Spec(3, 2, 512),
    "widest": Spec(2, 1, 1024, norm=Norm("layer")),
    "small": Spec(3, 2, 8),
    "layer": Spec(9, 3, 64, norm=Norm("layer")),
    "row": Spec(40, 8, 128, norm=Norm(scope="row")),
    "long rows": Spec(131, 2, 128, norm=Norm(scope="row")),
}


def partials(spec: Spec, tokens: int, num_sms: int) -> int:
    return int(_native.lib().backward_partials(plan_of(spec).handle, tokens, num_sms))


@pytest.mark.parametrize("name", SPECS)
def test_there_are_rows_for_all_blocks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A function of the Spec, the tokens and the multiprocessors: few rows, so that they are added
    in no time, but never fewer than the blocks of a side.
    """
    spec = SPECS[name]
    weights = [torch.ones(width(spec, heads)) for heads in (spec.num_q_heads, spec.num_kv_heads)]
    for num_sms in (1, 2, 132):
        for tokens in (1, 7, 64, 500):
            rows = partials(spec, tokens, num_sms)
            assert 1 <= rows <= 8 * num_sms + spec.num_q_heads and partials(spec, 0, num_sms) == 0
            found: list[emulated.Launch] = []
            with monkeypatch.context() as patch:
                run = partial(emulated.emulate_backward, num_sms=num_sms, into=found)
                patch.setattr(cpu, "qk_norm_rope_backward", run)
                q, k = (
                    torch.zeros(tokens, heads, spec.head_dim)
                    for heads in (spec.num_q_heads, spec.num_kv_heads)
                )
                positions = torch.arange(tokens)
                wanted = (True, True, False, False, False)
                ops_backward.qk_norm_rope_backward(
                    q, k, None, q, k, *weights, positions, spec, wanted=wanted
                )
            kernel, sums = found
            grid = kernel.prepared.grid
            assert [*grid.grid[1:], grid.block[0], grid.block[2]] == [1, 1, 32, 1]
            used = [s.rows for s in emulated.sums_of(sums) if s.rows]
            assert len(used) == 2 and max(used) <= rows
            # Each block writes one row, where blocks do not share a row among their heads.
            assert sum(used) == grid.grid[0]


def width(spec: Spec, heads: int) -> int:
    return spec.head_dim * (heads if spec.norm.scope == "row" else 1)
