"""The families of transformers that test_upstream_transformers.py runs."""

from __future__ import annotations

from upstream_transformers import Family

FAMILIES = [
    Family("qwen3", "Qwen3Attention", {"head_dim": 16}),
    Family("qwen3_moe", "Qwen3MoeAttention", {"head_dim": 16}),
    Family("olmo2", "Olmo2Attention"),
    Family("gemma3_text", "Gemma3Attention", {"head_dim": 16, "num_hidden_layers": 6}, (0, 5)),
]
