"""Make qwen3_attention.safetensors: q and k of a Qwen3 attention before and after its own code.

A one-layer Qwen3 of `transformers`, tiny and randomly initialised, reads the bytes of a text file.
Saved are q and k as they leave their projections, the norm weights, the positions, and what the
module itself makes of q and k (its norm, then its rotation). Nothing is downloaded.

    python examples/make_qwen3_example.py            # the repository's LICENSE
    qkrope run examples/qwen3_attention.safetensors --config examples/qwen3_config.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3 import modeling_qwen3

HERE = Path(__file__).parent
TOKENS = 160
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}


def capture(text: bytes) -> dict[str, torch.Tensor]:
    """Run the module on the text and keep its tensors."""
    torch.manual_seed(0)
    fields = {name: value for name, value in CONFIG.items() if name != "torch_dtype"}
    # Not `.to(bfloat16)`, which would round the rotary frequencies; loading a model does not.
    model = Qwen3Model._from_config(Qwen3Config(**fields), dtype=torch.bfloat16).eval()
    attention = model.layers[0].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # as initialised they are all ones

    kept: dict[str, torch.Tensor] = {}
    for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
        norm.register_forward_pre_hook(
            lambda _, inputs, name=name: kept.__setitem__(name, inputs[0][0])
        )
    rotate = modeling_qwen3.apply_rotary_pos_emb

    def keep_rotated(*args, **kwargs):
        q, k = rotate(*args, **kwargs)
        kept["expected_q"], kept["expected_k"] = q[0].transpose(0, 1), k[0].transpose(0, 1)
        return q, k

    modeling_qwen3.apply_rotary_pos_emb = keep_rotated
    try:
        with torch.no_grad():
            model(torch.tensor([list(text)]))
    finally:
        modeling_qwen3.apply_rotary_pos_emb = rotate
    kept["q_weight"], kept["k_weight"] = attention.q_norm.weight, attention.k_norm.weight
    kept["positions"] = torch.arange(len(text))
    return {name: tensor.detach().contiguous() for name, tensor in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="?", default=HERE.parent / "LICENSE")
    parser.add_argument("--out", type=Path, default=HERE / "qwen3_attention.safetensors")
    args = parser.parse_args()
    save_file(capture(args.text.read_bytes()[:TOKENS]), args.out)
    (HERE / "qwen3_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
