"""Every option of a Spec and of a call against the oracle, alone and in pairs, on each backend.

An option is what it changes: fields of Rope, of Norm, of Spec, and of the Recipe. Two options go
together unless they set the same field, or a Spec refuses the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
import torch

import qkrope
from cases import Call, Recipe, assert_same_bits
from qkrope.spec import Norm, Rope, Spec, YaRN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])


@dataclass(frozen=True)
class Option:
    """What an option changes of a call without any."""

    rope: dict[str, Any] = field(default_factory=dict)
    norm: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def __add__(self, other: Option) -> Option | None:
        """Both, or None where they set one field each its own way."""
        merged = []
        for name in ("rope", "norm", "spec", "recipe"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine.keys() & theirs.keys():
                return None
            merged.append(mine | theirs)
        return Option(*merged)

    def make(self, head_dim: int, **base: Any) -> Recipe | None:
        """A recipe with these options, or None where a Spec does not allow them together."""
        rope = {"dim": head_dim // 2 // 4 * 4, "theta": 1e6, **self.rope}
        given: dict[str, Any] = {"num_q_heads": 3, "num_kv_heads": 2, "head_dim": head_dim}
        try:
            given["norm"] = Norm(**self.norm)
            given["rope"] = None if rope.get("dim") == 0 else Rope(**rope)
            spec = Spec(**{**given, **self.spec})
        except ValueError:
            return None
        recipe = {**base, **self.recipe}
        turns, angle = spec.rope is not None, recipe.get("angle", "spec")
        if not turns and recipe.keys() & {"angle", "tables", "rotate"}:
            return None
        if recipe.get("tables") and angle not in ("pair", "channel"):
            return None
        norms = (spec.q_norm, spec.k_norm_resolved, spec.v_norm or spec.q_norm)
        if recipe.get("weight_shape") == "row" and any(n.scope != "row" for n in norms):
            return None
        if recipe.get("k_lead") and angle in ("pair", "channel") and not recipe.get("tables"):
            return None
        return Recipe(spec, **recipe)


OPTIONS = {
    "layer": Option(norm={"kind": "layer"}),
    "l2": Option(norm={"kind": "l2"}),
    "none": Option(norm={"kind": "none"}),
    "row": Option(norm={"scope": "row"}),
    "offset_weight": Option(norm={"weight_offset": 1.0}),
    "partial": Option(norm={"dim": 24}),
    "rest": Option(norm={"dim": 24, "rest": Norm(eps=1e-3, weight_offset=1.0)}),
    "rest_layer": Option(norm={"dim": 10, "rest": Norm("layer", eps=1e-3)}),
    "k_layer": Option(spec={"k_norm": Norm("layer", eps=1e-5)}),
    "k_none": Option(spec={"k_norm": Norm("none")}),
    "k_row": Option(spec={"k_norm": Norm(scope="row", eps=1e-3)}),
    "rope_first": Option(spec={"order": "rope_first"}),
    "no_rope": Option(rope={"dim": 0}),
    "v": Option(spec={"v_norm": Norm(eps=1e-3)}),
    "v_layer": Option(spec={"v_norm": Norm("layer")}),
    "v_row": Option(spec={"v_norm": Norm(scope="row")}),
    "v_none": Option(spec={"v_norm": Norm("none")}),
    "interleaved": Option(rope={"pairing": "interleaved"}),
    "block_half": Option(rope={"pairing": "block_half"}),
    "offset": Option(rope={"offset": 10}),
    "distance": Option(rope={"dim": 24, "pair_distance": 19}),
    "freq_dim": Option(rope={"freq_dim": 128}),
    "reverse": Option(rope={"reverse": True}),
    "output_half": Option(rope={"pairing": "interleaved", "output_pairing": "half"}),
    "sections": Option(rope={"dim": 24, "mrope_section": (3, 5, 4)}),
    "sections_interleaved": Option(
        rope={"dim": 24, "mrope_section": (4, 4, 4), "mrope_interleaved": True}
    ),
    "axes": Option(rope={"dim": 24, "axes_dim": (4, 8, 6, 6)}),
    "yarn": Option(rope={"scaling": YaRN.from_ramp(4.0, 1.0, 5.0, 1.25)}),
    "weight_heads": Option(recipe={"weight_shape": "head"}),
    "weight_row": Option(norm={"scope": "row"}, recipe={"weight_shape": "row"}),
    "weight_q": Option(recipe={"weights": "q"}),
    "weight_fp32": Option(recipe={"weight_dtype": FP32}),
    "bias": Option(recipe={"bias": True}),
    "scale_number": Option(recipe={"scale": "number"}),
    "scale_token": Option(recipe={"scale": "token"}),
    "scale_head": Option(recipe={"scale": "head"}),
    "scale_channel": Option(recipe={"scale": "channel"}),
    "table": Option(recipe={"angle": "pair"}),
    "table_full": Option(recipe={"angle": "channel"}),
    "table_heads": Option(recipe={"angle": "pair", "tables": "head"}),
    "table_full_heads": Option(recipe={"angle": "channel", "tables": "head"}),
    "tables_apart": Option(recipe={"angle": "channel", "tables": "separate"}),
    "cache": Option(recipe={"angle": "cache"}),
    "inv_freq": Option(recipe={"angle": "inv_freq64"}),
    "rotate": Option(recipe={"rotate": (2, 7)}),
    "prefix": Option(recipe={"rotate": (3, None)}),
    "k_longer": Option(recipe={"k_lead": (2, 12)}),
    "q_alone": Option(recipe={"sides": "q"}),
    "k_alone": Option(recipe={"sides": "k"}),
    "A/b": Option(spec={"rounding": "eager"}),
    "A/f": Option(spec={"rounding": "A/f"}),
    "B/b": Option(spec={"rounding": "B/b"}),
    "B/h": Option(spec={"rounding": "B/h"}),
    "C/h and B/f": Option(spec={"rounding": ("C/h", "B/f")}),
}

PAIRS = {
    f"{one} + {two}": both
    for one, two in combinations(OPTIONS, 2)
    if (both := OPTIONS[one] + OPTIONS[two]) and both.make(48)
}


def run_every_form(recipe: Recipe, device: str) -> None:
    """Out of place against the oracle; in place and packed are the same bits, and nothing else
    is written.
    """
    call = recipe.make(device)
    outputs = qkrope.qk_norm_rope(*call.args(), **call.extras)
    call.assert_inputs_unchanged()
    call.check(*outputs)
    call = recipe.make(device)
    assert qkrope.qk_norm_rope_(*call.args(), **call.extras) is None
    same_as(call, outputs)
    if recipe.layout == "packed" and recipe.sides == "both":
        call = recipe.make(device)
        assert qkrope.qkv_norm_rope_(call.qkv, *call.rest(), **call.packed_extras()) is None
        same_as(call, outputs)


def same_as(call: Call, outputs: tuple[Any, ...]) -> None:
    for x, y in zip((call.q, call.k, call.extras.get("v")), outputs, strict=False):
        assert (x is None) == (y is None)
        if x is not None:
            assert_same_bits(x, y)
    call.assert_guards()


@DTYPES
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(backend: str, name: str, dtype: torch.dtype) -> None:
    """Alone, in heads that fill vectors and in heads that do not, packed where it can be."""
    for head_dim, layout in ((48, "packed"), (58, "padded"), (128, "transposed")):
        option = OPTIONS[name]
        if layout == "packed" and "k_lead" in option.recipe:
            layout = "gated"
        recipe = option.make(head_dim, dtype=dtype, lead=(2, 9), layout=layout, seed=head_dim)
        assert recipe is not None, name
        run_every_form(recipe, backend)


LAYOUTS = ("packed", "transposed", "padded")


def run_pair(name: str, backend: str, turn: int) -> None:
    layout = LAYOUTS[turn % 3] if "k_lead" not in PAIRS[name].recipe else "odd"
    dtype, head_dim = (BF16, FP32, FP16)[turn // 3 % 3], (48, 58)[turn % 2]
    recipe = PAIRS[name].make(head_dim, dtype=dtype, lead=(2, 9), layout=layout, seed=turn)
    if recipe is not None:
        run_every_form(recipe, backend)


@pytest.mark.parametrize("first", OPTIONS)
def test_two_options(device: str, first: str) -> None:
    """Each pair on the best instruction set, in a layout and a dtype of its turn."""
    for turn, name in enumerate(PAIRS):
        if name.startswith(first + " + "):
            run_pair(name, device, turn)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(9))
def test_two_options_everywhere(backend: str, turn: int) -> None:
    """Each pair on every instruction set, in every layout and dtype."""
    for at, name in enumerate(PAIRS):
        run_pair(name, backend, at + turn)
