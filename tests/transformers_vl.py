"""A small Qwen3-VL with its vision tower, and a prompt with an image in it."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from transformers_models import scattered

IMAGE, START, END, VIDEO = 40, 41, 42, 43
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 48,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e5,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def qwen3_vl(device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in float32, and the inputs of one row: text, an image of 2 x 3 tokens, text."""
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).float().eval()
    ids = torch.tensor([[5, 9, START, *[IMAGE] * 6, END, 7, 11, 3]])
    grid = torch.tensor([[1, 4, 6]])
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(24, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
    return scattered(model).to(device), {name: x.to(device) for name, x in inputs.items()}
