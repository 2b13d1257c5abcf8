"""Variants of the general CUDA kernel that stand for the catalogue: each kind of norm, map, angle
and rounding at a shape that has it, and the widest heads.
"""

from __future__ import annotations

from typing import Any

from qkrope.spec import Norm, Rope, Spec
from qkrope.variant import Variant

__all__ = ["OPTION_VARIANTS"]

ROW = Norm(scope="row")
MLA = Rope(dim=64, offset=512, pairing="interleaved", output_pairing="half")
TRAILING = Rope(dim=64, offset=448, pairing="interleaved")
SECTIONS = {"mrope_section": (24, 20, 20), "mrope_interleaved": True}


def general(head_dim: int, dtype: str = "bfloat16", angle: str = "phase", **spec: Any) -> Variant:
    return Variant.of(Spec(8, 2, head_dim, **spec), dtype, None, None, angle, general=True)


OPTION_VARIANTS = {
    "plain, with a bias or scale": general(128),
    "layer, by axes": general(64, norm=Norm("layer"), rope=Rope(axes_dim=(16, 24, 24))),
    "layer, eager, table": general(64, "float16", "table", norm=Norm("layer"), rounding="eager"),
    "row, table": general(128, angle="table", norm=ROW, rope=Rope(pairing="interleaved")),
    "row": general(128, norm=ROW, k_norm=Norm("layer", scope="row"), rounding="B/f"),
    "l2, rope first": general(128, norm=Norm("l2"), order="rope_first", rounding="C/f"),
    "Qwen3-VL": general(128, rope=Rope(**SECTIONS), rounding="eager"),
    "Gemma 4": general(512, rope=Rope(dim=128, pair_distance=256), v_norm=Norm()),
    "Gemma 4 ViT": general(64, rope=Rope(pairing="block_half"), v_norm=Norm()),
    "MLA": general(576, norm=Norm(dim=512), rope=MLA),
    "dots3": general(576, norm=Norm(dim=512, rest=Norm()), rope=MLA, rounding="A/h"),
    "DeepSeek V4": general(512, rope=TRAILING, rounding=("C/h", "B/h"), k_norm=Norm("none")),
    "backwards": general(128, angle="inv_freq", rope=Rope(reverse=True)),
    "no rope": general(256, "float32", norm=Norm("layer"), v_norm=ROW, rope=None),
    "rotation alone": general(192, norm=Norm("none"), rope=Rope(dim=64, offset=128)),
    "nothing": general(64, norm=Norm("none"), rope=None),
    "58": general(58, k_norm=Norm("layer"), rope=Rope(dim=28, offset=10)),
    "row of 1024": general(1024, "float32", norm=Norm("layer", scope="row")),
}
