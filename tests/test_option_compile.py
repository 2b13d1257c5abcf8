"""The general CUDA kernel compiles without a GPU, without spills, and with Python's limits."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from option_variants import OPTION_VARIANTS
from qkrope import _native
from qkrope.cuda import compile as compiling
from qkrope.rope import PAIRINGS
from qkrope.variant_options import Options, SideOptions
from test_cuda_compile import (
    MAIN,
    compile_clean,
    edited,
    lane_units,
    nvrtc,
    variant,
    warps_an_sm,
)

OPTION_CASES = [(arch, name) for arch in MAIN for name in OPTION_VARIANTS] + [("sm_75", "MLA")]


@pytest.mark.parametrize(("arch", "name"), OPTION_CASES, ids=str)
def test_options_compile_without_spills(arch: str, name: str) -> None:
    one = OPTION_VARIANTS[name]
    for kernel, found in compile_clean(one, arch).items():
        # The largest block of each fits: a team's warps, or QK_BLOCK_WARPS.
        rows = one.options is not None and one.options.has_rows
        most = (16 if lane_units(one.head_dim) < 4 else 8) if rows else 8
        assert warps_an_sm(found.registers) >= most, (kernel, found)


@pytest.mark.parametrize(
    ("name", "macros", "word"),
    [
        ("58", {"VECTOR_BYTES": 8}, "vector loads"),
        ("58", {"OFFSET": 32}, "offset"),
        ("58", {"OFFSET": 9}, "offset"),
        ("Gemma 4", {"DISTANCE": 63}, "pair_distance"),
        ("Gemma 4", {"DISTANCE": 449}, "offset"),
        ("Gemma 4 ViT", {"ROTARY_DIM": 62}, "block_half"),
        ("Gemma 4 ViT", {"OUTPUT_HALF": 1}, "output_pairing"),
        ("layer, by axes", {"AXES": 1}, "axes"),
        ("layer, by axes", {"AXES": 5}, "axes"),
        ("layer, by axes", {"AXES": 2}, "axes"),
        ("row", {"ROWS": 0}, "scope"),
        *(
            ("row", {"SIDES": f"{{{side}}}, {{{side}}}, {{{side}}}"}, "norm")
            for side in (
                "1, 0, 0, 0, 0, 0, 0",
                "1, 0, 130, 0, 130, 0, 0",
                "1, 1, 64, 0, 64, 0, 0",
                "1, 0, 128, 1, 128, 0, 0",
                "1, 0, 64, 0, 128, 0, 0",
                "1, 0, 64, 1, 64, 0, 0",
                "1, 0, 128, 0, 128, 1, 0",
            )
        ),
    ],
    ids=str,
)
def test_options_have_the_same_limits(
    monkeypatch: pytest.MonkeyPatch, name: str, macros: dict[str, Any], word: str
) -> None:
    wrong = edited(monkeypatch, OPTION_VARIANTS[name], **macros)
    with pytest.raises(AssertionError, match="static assertion failed") as raised:
        nvrtc(compiling.source(wrong))
    assert f'"{word}"' in str(raised.value), raised.value


WHOLE = SideOptions(dim=64, weight_dim=64)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"offset": 34}, "offset"),
        ({"offset": 9}, "offset"),
        ({"pair_distance": 15}, "pair_distance"),
        ({"pair_distance": 49}, "offset"),
        ({"output_half": True}, "output_half"),
        ({"axis_pairs": (16,)}, "axis_pairs"),
        ({"axis_pairs": (4, 4)}, "axis_pairs"),
        ({"q": replace(WHOLE, dim=0)}, r"q\.dim"),
        ({"k": replace(WHOLE, dim=66)}, r"k\.dim"),
        ({"v": replace(WHOLE, dim=32, row=True)}, r"v\.dim"),
        ({"q": replace(WHOLE, rest="rms")}, r"q\.rest"),
        ({"q": replace(WHOLE, dim=32)}, r"q\.weight_dim"),
        ({"q": replace(WHOLE, dim=32, weight_dim=32, rest="l2")}, r"q\.weight_dim"),
        ({"q": replace(WHOLE, round_norm="A")}, "letters"),
    ],
    ids=str,
)
def test_python_refuses_the_same(change: dict[str, Any], word: str) -> None:
    options = Options(q=WHOLE, k=WHOLE, v=WHOLE)
    one = variant(64, 32)
    assert replace(one, options=options).vector_bytes == 8
    with pytest.raises(ValueError, match=word):
        replace(one, options=replace(options, **change))


def test_a_plain_variant_has_no_text_of_the_options() -> None:
    """So no option can change its cubin, nor its key."""
    plain, general = (
        compiling.source(v) for v in (variant(), OPTION_VARIANTS["plain, with a bias or scale"])
    )
    for name in ("channels.cuh", "options.cuh", "general.cu"):
        head = _native.resource("native", name).read_text().splitlines()[0]
        assert head.startswith(f"// {name}: ") and head in general and head not in plain
    assert "QK_SIDES" in general and "QK_SIDES" not in plain


def test_options_have_vector_loads_where_runs_are_whole() -> None:
    """Variant.vector_bytes and lanes_are_whole of channels.cuh, over maps of every kind."""
    draw = random.Random(2)
    seen: dict[tuple[str, bool], int] = {}
    text = compiling.source(OPTION_VARIANTS["58"])
    body = text[text.index("#ifndef QKROPE_PARAMS_H") : text.index("// options.cuh")]
    body = body.replace('static_assert(!QK_VECTOR_BYTES || lanes_are_whole(), "vector loads");', "")
    checks = []
    while len(checks) < 60:
        head_dim = draw.choice([48, 64, 96, 128, 272, 512, 576])
        rotary = draw.randrange(4, head_dim + 1, 4)
        pairing = draw.choice(["half", "interleaved", "block_half"])
        change: dict[str, Any] = {"offset": draw.choice([0, 8, 16, 20, head_dim - rotary])}
        if pairing == "interleaved":
            change["output_half"] = draw.random() < 0.5
        elif pairing == "half":
            change["pair_distance"] = draw.choice([None, head_dim // 2, rotary // 2 + 4])
        side = SideOptions(dim=head_dim, weight_dim=head_dim)
        try:
            one = variant(head_dim, rotary, pairing)
            one = replace(one, options=Options(q=side, k=side, v=side, **change))
        except ValueError:
            continue
        whole = bool(one.vector_bytes)
        seen[pairing, whole] = seen.get((pairing, whole), 0) + 1
        own = one.macros() + body
        checks.append((own, whole))
    assert all(seen.get((pairing, whole)) for pairing in PAIRINGS for whole in (True, False)), seen
    for own, whole in checks:
        nvrtc(own + f'static_assert(lanes_are_whole() == {str(whole).lower()}, "whole");')
