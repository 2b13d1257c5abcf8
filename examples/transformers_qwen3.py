"""Qwen3-0.6B of transformers, with qkrope and without: generate, train a few steps, compare.

    python examples/transformers_qwen3.py                       # random weights, full depth
    python examples/transformers_qwen3.py --layers 2 --steps 3  # in a few seconds
    python examples/transformers_qwen3.py --checkpoint DIR      # a local folder of a checkpoint

The text is a file of this repository and its tokens are its bytes; nothing is downloaded. A model
with random weights says nothing sensible, but it says the same with qkrope as without.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from qkrope.integrations.transformers import patched

TEXT = Path(__file__).parents[1] / "README.md"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="folder of a model's weights and config")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--layers", type=int, default=28, help="with random weights")
    parser.add_argument("--prompt", type=int, default=128, help="tokens read before the first new")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--steps", type=int, default=10, help="of training, 0 for none")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row in training")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--rounding", help="once, eager or upstream; default by dtype")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Any:
    if args.checkpoint is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(
            args.checkpoint, local_files_only=True
        )
    torch.manual_seed(0)
    config = transformers.Qwen3Config(  # Qwen3-0.6B, but for its vocabulary: bytes are enough
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=0,
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.uniform_(0.5, 1.5)
    return model


def sync(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def generate(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> tuple[Any, float]:
    """The new tokens, and how many came a second."""
    model.eval()
    keywords = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, **keywords)  # compile, load, warm up
        start = sync(args.device)
        out = model.generate(ids, max_new_tokens=args.new, min_new_tokens=args.new, **keywords)
        seconds = sync(args.device) - start
    return out[:, ids.shape[1] :], out.shape[0] * args.new / seconds


def train(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> tuple[list[float], float]:
    """The losses of a copy of the model, and how many tokens it learnt from a second."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, size = [], args.batch * args.length
    start = sync(args.device)
    for step in range(args.steps):
        rows = ids[(step * size) % (len(ids) - size) :][:size].view(args.batch, args.length)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, args.steps * size / (sync(args.device) - start)


def main() -> None:
    args = options()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.rounding = args.rounding or ("once" if args.dtype == "float32" else "upstream")
    model = load(args).to(args.device, getattr(torch, args.dtype))
    text = args.text.read_bytes()
    ids = torch.tensor(list(text), device=args.device)
    prompt = ids[: args.batch * args.prompt].view(args.batch, args.prompt)

    found: dict[str, Any] = {}
    for name in ("transformers", "qkrope"):
        ours = patched(model, rounding=args.rounding) if name == "qkrope" else nullcontext()
        with ours as report:
            if report is not None:
                print(report)
            tokens, speed = generate(model, prompt, args)
            found[name] = {"tokens": tokens}
            print(f"{name:12} generate {speed:10.1f} tokens/s")
            if args.steps:
                losses, speed = train(model, ids, args)
                found[name]["losses"] = losses
                shown = f"loss {losses[0]:.6f} -> {losses[-1]:.6f}"
                print(f"{name:12} train    {speed:10.1f} tokens/s, {shown}")
    plain, fused = found["transformers"], found["qkrope"]
    same = torch.equal(plain["tokens"], fused["tokens"])
    print(f"{args.dtype}, rounding {args.rounding!r}: the same {args.new} tokens: {same}")
    if args.steps:
        pairs = zip(plain["losses"], fused["losses"], strict=True)
        worst = max(abs(a - b) / abs(a) for a, b in pairs)
        print(f"losses over {args.steps} steps differ by at most {worst:.2e} of themselves")


if __name__ == "__main__":
    main()
