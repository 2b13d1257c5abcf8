"""The positive control of the sanitizer runs: a fault that the tool must report.

    python tools/planted_fault.py uninitialised   # CUDA: a q that nothing has written
    python tools/planted_fault.py overrun         # CPU: a q whose memory ends before it does

A sanitizer that does not report it is not looking at our kernels, and its clean reports mean
nothing. Never run this without one.
"""

import sys

import numpy as np
import torch

import qkrope

TOKENS, DIM = 64, 64
fault = sys.argv[1]
spec = qkrope.Spec(num_q_heads=2, num_kv_heads=1, head_dim=DIM)


shape = (TOKENS, 2, DIM)
if fault == "uninitialised":
    q = torch.empty(shape, device="cuda")
else:
    half = np.zeros(TOKENS * DIM, dtype=np.float32)
    strides = tuple(step * half.itemsize for step in (2 * DIM, DIM, 1))
    q = torch.from_numpy(np.lib.stride_tricks.as_strided(half, shape, strides))
weight = torch.ones(DIM).to(q.device)
positions = torch.arange(TOKENS).to(q.device)
qkrope.qk_norm_rope_(q, None, weight, None, positions, spec)
if q.is_cuda:
    torch.cuda.synchronize()
