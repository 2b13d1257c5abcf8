"""The fused step of a Qwen3-like layer on whatever device is here, checked against the oracle."""

from __future__ import annotations

import torch

import qkrope
from qkrope import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
spec = qkrope.Spec(num_q_heads=32, num_kv_heads=8, head_dim=128, rope=qkrope.Rope(theta=1e6))

tokens, v_heads = 64, 8
torch.manual_seed(0)
qkv = torch.randn(tokens, (32 + 8 + v_heads) * 128, device=device).bfloat16()
q_weight, k_weight = (torch.rand(128, device=device).bfloat16() + 0.5 for _ in range(2))
positions = torch.arange(1_000_000, 1_000_000 + tokens, device=device)  # a long context

# q and k are views of the packed projection: no copy, no contiguous().
q, k, _ = qkv.view(tokens, -1, 128).split((32, 8, v_heads), dim=1)
q2, k2 = qkrope.qk_norm_rope(q, k, q_weight, k_weight, positions, spec)

arguments = (q, k, q_weight, k_weight, positions, spec)
exact = reference.qk_norm_rope(*arguments)
terms = reference.criterion_terms(*arguments)
worst = max(
    float(reference.error_over_bound(y, ref, term, torch.bfloat16).max())
    for y, ref, term in zip((q2, k2), exact, terms, strict=True)
)
print(f"{device}: q2 {tuple(q2.shape)}, k2 {tuple(k2.shape)}")
print(f"worst error {worst:.3f} of the bound at positions around one million")

# The same in place, V untouched.
qkrope.qkv_norm_rope_(qkv, q_weight, k_weight, positions, spec)
assert torch.equal(q, q2) and torch.equal(k, k2)
