"""The shapes `qkrope bench` measures: what released models run, restated as Specs.

Models with several position axes (vision-language text, diffusion) are measured with one axis: the
bytes and the arithmetic of the kernel are the same, only the position of a pair differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qkrope.spec import Norm, Rope, Spec

# Three counts keep the default run short: decode, a small batch, a prefill chunk.
DEFAULT_TOKENS = (1, 256, 4096)
FULL_TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    """A named Spec with the number of V heads that share its packed tensor."""

    name: str
    spec: Spec
    num_v_heads: int = field(default=0)

    @property
    def heads(self) -> str:
        """q/k/v heads x head_dim, as people write it."""
        spec = self.spec
        counts = f"{spec.num_q_heads}/{spec.num_kv_heads}/{self.num_v_heads}"
        return f"{counts} x {spec.head_dim}"

    @property
    def columns(self) -> int:
        """Elements of Q and K in one packed row."""
        return (self.spec.num_q_heads + self.spec.num_kv_heads) * self.spec.head_dim

    @property
    def width(self) -> int:
        """Elements of one packed row, V included."""
        return self.columns + self.num_v_heads * self.spec.head_dim

    def bytes_moved(self, tokens: int, itemsize: int) -> int:
        """Q and K read once and written once: the least any kernel can move."""
        return 2 * tokens * self.columns * itemsize


def _shape(name: str, q: int, kv: int, head_dim: int, theta: float, **more: Any) -> Shape:
    norm = Norm(eps=more.get("eps", 1e-6), weight_offset=more.get("weight_offset", 0.0))
    rope = Rope(
        dim=more.get("rotary_dim", head_dim), theta=theta, pairing=more.get("pairing", "half")
    )
    spec = Spec(num_q_heads=q, num_kv_heads=kv, head_dim=head_dim, norm=norm, rope=rope)
    return Shape(name, spec, kv)


PRODUCTION_SHAPES: tuple[Shape, ...] = (
    _shape("Qwen3-8B", 32, 8, 128, 1e6),
    _shape("Qwen3-0.6B", 16, 8, 128, 1e6),
    _shape("Qwen3-32B", 64, 8, 128, 1e6),
    _shape("Qwen3-30B-A3B", 32, 4, 128, 1e6),
    _shape("Qwen3-235B-A22B", 64, 4, 128, 1e6),
    _shape("Qwen3-VL-32B", 64, 8, 128, 5e6),
    _shape("Qwen3-Next-80B-A3B", 16, 2, 256, 1e7, rotary_dim=64, weight_offset=1.0),
    _shape("GLM-4.5-355B", 96, 8, 128, 1e6, rotary_dim=64, eps=1e-5),
    _shape("Gemma3-12B", 16, 8, 256, 1e4, weight_offset=1.0),
    _shape("Gemma3-27B", 32, 16, 128, 1e4, weight_offset=1.0),
    _shape("FLUX.1", 24, 24, 128, 1e4, pairing="interleaved"),
    _shape("Qwen-Image", 24, 24, 128, 1e4, pairing="interleaved"),
    _shape("Z-Image", 30, 30, 128, 256.0, pairing="interleaved", eps=1e-5),
)


def find_shapes(names: list[str] | None) -> list[Shape]:
    """The production shapes with these names (case-insensitive), all of them for None.

    Raises ValueError for a name that is not in the list.
    """
    if not names:
        return list(PRODUCTION_SHAPES)
    known = {shape.name.lower(): shape for shape in PRODUCTION_SHAPES}
    missing = [name for name in names if name.lower() not in known]
    if missing:
        options = ", ".join(shape.name for shape in PRODUCTION_SHAPES)
        raise ValueError(f"shape: got {', '.join(missing)}, expected one of: {options}")
    return [known[name.lower()] for name in names]


def shape_from_config(path: str) -> Shape:
    """The shape of a Hugging Face `config.json` (its text model, layer 0)."""
    import json
    from pathlib import Path

    file = Path(path)
    spec = Spec.from_config(json.loads(file.read_text()))
    if spec.rope is not None and spec.rope.mrope_section is not None:  # text: the axes agree
        rope = replace(spec.rope, mrope_section=None, mrope_interleaved=False)
        spec = replace(spec, rope=rope)
    name = file.parent.name if file.name == "config.json" and file.parent.name else file.stem
    return Shape(name, spec, spec.num_kv_heads)
