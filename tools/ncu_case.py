"""What ncu looks at (tools/gpu.sh ncu): torch's negation of 1 GiB, which reads and writes as a copy
does, and calls of 16384 tokens, 32/8/8 x 128.
"""

from __future__ import annotations

import torch

import qkrope
from qkrope import Rope, Spec


def main() -> None:
    """The negations' DRAM throughput is the ceiling that the kernel's is compared with."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    for _ in range(3):
        torch.neg(source, out=target)
    spec = Spec(32, 8, 128, rope=Rope(theta=1e6))
    qkv = torch.randn(3, 16384, 48 * 128, device="cuda", dtype=torch.bfloat16)
    weights = [torch.ones(128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    positions = torch.arange(16384, device="cuda")
    with torch.no_grad():
        for packed in qkv:
            qkrope.qkv_norm_rope_(packed, *weights, positions, spec)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
