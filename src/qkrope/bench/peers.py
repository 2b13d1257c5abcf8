"""Other libraries' fused kernels, each fed the layout, table and position dtype that it takes.

A peer is taken from the folder that `tools/fetch_peers.py` fills, else from an installed package.
What it does not run it refuses by name (`Unmeasured`): that text stands in its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from . import peer_cubins, peer_ops
from .baselines import Build, Call, Unmeasured, own_sides
from .data import MAX_POSITION, Inputs, fp32_cos_sin
from .peer_cubins import HEAD_DIMS, Op

_HALF = (torch.bfloat16, torch.float16)
_BF16 = (torch.bfloat16,)


def cos_sin_cache(inputs: Inputs, dtype: torch.dtype, rows: int = MAX_POSITION) -> torch.Tensor:
    """`[rows, rotary_dim]`: cos, then sin, of every position, made as engines make it: in float32
    from a float32 inv_freq, then rounded to `dtype`.
    """
    positions = torch.arange(rows, device=inputs.qkv.device)
    return torch.cat(fp32_cos_sin(inputs.shape.spec, positions), dim=-1).to(dtype)


def _counts(inputs: Inputs) -> tuple[int, int, int, int, float]:
    spec = inputs.shape.spec
    heads = (spec.num_q_heads, spec.num_kv_heads, inputs.shape.num_v_heads)
    return *heads, spec.head_dim, float(spec.q_norm.eps)


def _theta(op: Op, buffers: Sequence[Inputs]) -> list[Call]:
    """Packed, int32 positions, no table: theta, and YaRN numbers that mean none."""
    first = buffers[0]
    rope = first.shape.spec.rope
    assert rope is not None  # `refusal` saw to it
    norm = (*_counts(first), first.q_weight, first.k_weight)
    angles = (float(rope.theta), rope.pairing == "half", first.positions.int())
    plain = (1.0, 1.0, 1.0, 1.0, first.shape.spec.rotary_dim)
    return [op(b.qkv, *norm, *angles, *plain) for b in buffers]


def _packed_table(op: Op, buffers: Sequence[Inputs]) -> list[Call]:
    """Packed, int64 positions, a table in the dtype of the activations (vLLM's default)."""
    first = buffers[0]
    table = cos_sin_cache(first, first.qkv.dtype)
    norm = (*_counts(first), first.q_weight, first.k_weight)
    return [op(b.qkv, *norm, table, _half(first), first.positions.long()) for b in buffers]


def _views_table(op: Op, buffers: Sequence[Inputs]) -> list[Call]:
    """q and k as views of the packed tensor, int64 positions, a float32 table."""
    first = buffers[0]
    table, positions = cos_sin_cache(first, torch.float32), first.positions.long()
    rest = (first.q_weight, first.k_weight, table, positions)
    return [op(b.q, b.k, *rest, _half(first), first.shape.spec.q_norm.eps) for b in buffers]


def _rows(op: Op, buffers: Sequence[Inputs]) -> list[Call]:
    """Contiguous q and k of their own, cos and sin a row a token in the dtype of the activations,
    each value twice as Hugging Face models have them.
    """
    first = buffers[0]
    spec = first.shape.spec
    tables = fp32_cos_sin(spec, first.positions)
    cos, sin = (torch.cat((t, t), -1).to(first.qkv.dtype)[None] for t in tables)
    rest = (first.q_weight, first.k_weight, cos, sin, spec.q_norm)
    return [op(*own_sides(b), *rest) for b in buffers]


def _half(inputs: Inputs) -> bool:
    rope = inputs.shape.spec.rope
    return rope is not None and rope.pairing == "half"


@dataclass(frozen=True)
class Peer:
    """One library's kernel: where it comes from, what it takes, how it is called."""

    name: str
    package: str
    carried: Callable[[Path], Op | None]  # from the folder; None: not in it
    imported: Callable[[], Op]
    bind: Callable[[Op, Sequence[Inputs]], list[Call]]
    dtypes: tuple[torch.dtype, ...] = _BF16
    head_dims: tuple[int, ...] | None = HEAD_DIMS
    scaling: bool = True  # any frequencies, as a table gives them
    interleaved: bool = True
    offset: bool = False

    def find(self, folder: Path | None) -> Op:
        """The peer's operation. Unmeasured if neither the folder nor the packages have it."""
        if folder is not None and (op := self.carried(folder)) is not None:
            return op
        if find_spec(self.package) is None:
            raise Unmeasured("not installed")
        return self.imported()

    def refusal(self, inputs: Inputs) -> str | None:
        """Why the peer does not run this case; None if it should."""
        spec, dtype = inputs.shape.spec, inputs.qkv.dtype
        norms = (spec.q_norm, spec.k_norm_resolved)
        if not inputs.qkv.is_cuda:
            return "needs CUDA"
        if dtype not in self.dtypes:
            return f"no {str(dtype).removeprefix('torch.')}"
        if self.head_dims and spec.head_dim not in self.head_dims:
            return f"no head_dim {spec.head_dim}"
        if spec.rope is None or any(norm.kind != "rms" for norm in norms) or norms[0] != norms[1]:
            return "only one RMS norm and a rotation"
        if norms[0].weight_offset and not self.offset:
            return "no weight offset"
        if spec.rope.scaling is not None and not self.scaling:
            return "no scaling of this kind"
        if spec.rope.pairing == "interleaved" and not self.interleaved:
            return "no interleaved pairs"
        return None

    def builder(self, folder: Path | None) -> Build:
        """The peer as one of the runner's baselines."""

        def build(buffers: Sequence[Inputs]) -> list[Call]:
            op = self.find(folder)
            if why := self.refusal(buffers[0]):
                raise Unmeasured(why)
            return self.bind(op, buffers)

        return build


PEERS: tuple[Peer, ...] = (
    Peer(
        "sgl_kernel",
        "sgl_kernel",
        peer_ops.cubin("sgl_kernel", peer_cubins.sgl_kernel),
        peer_ops.function("sgl_kernel", "fused_qk_norm_rope"),
        _theta,
        scaling=False,
    ),
    Peer(
        "sglang",
        "sglang",
        peer_ops.carried_sglang,
        peer_ops.function("sglang.kernels.ops.attention.fused_qknorm_rope", "fused_qk_norm_rope"),
        _theta,
        scaling=False,
    ),
    Peer(
        "sglang-diffusion",
        "sglang",
        peer_ops.carried_diffusion,
        peer_ops.imported_diffusion,
        _views_table,
    ),
    Peer(
        "vllm",
        "vllm",
        peer_ops.cubin("vllm", peer_cubins.vllm),
        peer_ops.function("vllm._custom_ops", "fused_qk_norm_rope"),
        _packed_table,
        dtypes=_HALF,
    ),
    Peer(
        "flashinfer",
        "flashinfer",
        peer_ops.carried_flashinfer,
        peer_ops.imported_flashinfer,
        _views_table,
    ),
    Peer(
        "liger",
        "liger_kernel",
        peer_ops.carried_liger,
        peer_ops.imported_liger,
        _rows,
        dtypes=(*_HALF, torch.float32),
        head_dims=None,
        interleaved=False,
        offset=True,
    ),
)


def builders(folder: Path | None) -> dict[str, Build]:
    """Every peer by name, for `runner.Plan.peers`."""
    return {peer.name: peer.builder(folder) for peer in PEERS}
