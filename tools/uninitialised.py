"""The positive control of `tools/gpu.sh sanitize`: reads memory that nothing has written.

Run under compute-sanitizer's initcheck with the kernel filter of that script, this must be
reported; if it is not, the filter matches no kernel of ours and a clean report means nothing.
"""

import torch

import qkrope

spec = qkrope.Spec(num_q_heads=2, num_kv_heads=1, head_dim=64)
q = torch.empty(4, 2, 64, dtype=torch.bfloat16, device="cuda")
k = torch.empty(4, 1, 64, dtype=torch.bfloat16, device="cuda")
weight = torch.ones(64, dtype=torch.bfloat16).cuda()
positions = torch.arange(4).cuda()
qkrope.qk_norm_rope(q, k, weight, weight, positions, spec)
torch.cuda.synchronize()
