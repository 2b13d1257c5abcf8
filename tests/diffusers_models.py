"""Small diffusion transformers of diffusers with random weights, and inputs for them.

Run as a program it prints the table of docs/integrations/diffusers.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upstream import randomize

BATCH, TEXT = 2, 7
HEADS, D = 2, 64
AXES = (16, 24, 24)
# Two float32 chains of the same formula differ by a few units of 2^-24 in q and k; a dozen
# attention modules, of which some amplify (small rows under an epsilon), stay well below 2^-17,
# and are a hundredth of what the mistakes of `test_the_bound_notices` make.
FP32 = 2.0**-17
Case = tuple[nn.Module, dict[str, Any]]


def normal(*shape: int) -> Tensor:
    """Activations from torch's generator."""
    return torch.randn(shape)


def ids(axes: int) -> dict[str, Tensor]:
    """FLUX: ids of text tokens and of a grid of 3 x 4 image tokens."""
    text, image = torch.zeros(TEXT, axes), torch.zeros(12, axes)
    image[:, 1], image[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    if axes == 4:
        text[:, 3] = torch.arange(TEXT)
    return {"img_ids": image, "txt_ids": text}


def flux() -> Case:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=D,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=AXES,
    )
    return model, {
        "hidden_states": normal(BATCH, 12, 8),
        "encoder_hidden_states": normal(BATCH, TEXT, 32),
        "pooled_projections": normal(BATCH, 24),
        "timestep": torch.tensor([0.3, 0.8]),
        **ids(3),
    }


def flux2() -> Case:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=D,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(16, 16, 16, 16),
    )
    return model, {
        "hidden_states": normal(BATCH, 12, 8),
        "encoder_hidden_states": normal(BATCH, TEXT, 32),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([3.0, 4.0]),
        **ids(4),
    }


def qwen_image() -> Case:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=D,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        axes_dims_rope=AXES,
    )
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    return model, {
        "hidden_states": normal(BATCH, 12, 8),
        "encoder_hidden_states": normal(BATCH, TEXT, 32),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.3, 0.8]),
        "img_shapes": [[(1, 3, 4)]] * BATCH,
    }


def z_image() -> Case:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=HEADS * D,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=32,
        axes_dims=list(AXES),
        axes_lens=[128, 32, 32],
    )
    return model, {  # of different lengths, so that tokens are masked
        "x": [normal(4, 1, 6, 8), normal(4, 1, 12, 16)],
        "t": torch.tensor([0.3, 0.8]),
        "cap_feats": [normal(TEXT, 32), normal(40, 32)],
    }


def hunyuan_video() -> Case:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=D,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=24,
        rope_axes_dim=AXES,
    )
    mask = torch.ones(BATCH, TEXT, dtype=torch.long)
    mask[1, 4:] = 0
    return model, {
        "hidden_states": normal(BATCH, 4, 2, 6, 4),
        "timestep": torch.tensor([300, 800]),
        "encoder_hidden_states": normal(BATCH, TEXT, 32),
        "encoder_attention_mask": mask,
        "pooled_projections": normal(BATCH, 24),
        "guidance": torch.tensor([3000.0, 4000.0]),
    }


def wan(image: bool = False) -> Case:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=D,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=24 if image else None,
        added_kv_proj_dim=HEADS * D if image else None,
    )
    inputs = {
        "hidden_states": normal(BATCH, 4, 2, 6, 4),
        "timestep": torch.tensor([300, 800]),
        "encoder_hidden_states": normal(BATCH, 512 if image else TEXT, 32),
    }
    if image:
        inputs["encoder_hidden_states_image"] = normal(BATCH, 5, 24)
    return model, inputs


def ltx2(rope: str = "split", perturbed: bool = False) -> Case:
    from diffusers import LTX2VideoTransformer3DModel

    width = HEADS * D
    model = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=D,
        cross_attention_dim=width,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=D // 2,
        audio_cross_attention_dim=width // 2,
        num_layers=2,
        caption_channels=32,
        gated_attn=perturbed,
        audio_gated_attn=perturbed,
        rope_type=rope,
        perturbed_attn=perturbed,
    )
    mask = torch.ones(BATCH, TEXT)
    mask[1, 4:] = 0
    inputs = {
        "hidden_states": normal(BATCH, 2 * 3 * 2, 8),
        "audio_hidden_states": normal(BATCH, 5, 8),
        "encoder_hidden_states": normal(BATCH, TEXT, 32),
        "audio_encoder_hidden_states": normal(BATCH, TEXT, 32),
        "timestep": torch.tensor([300.0, 800.0])[:, None],
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 3,
        "width": 2,
        "audio_num_frames": 5,
    }
    if perturbed:  # the first of the batch keeps its attention, the second its values
        inputs["spatio_temporal_guidance_blocks"] = [1]
        inputs["perturbation_mask"] = torch.tensor([1.0, 0.0])
    return model, inputs


MODELS: dict[str, Callable[[], Case]] = {
    "FLUX.1": flux,
    "FLUX.2": flux2,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "HunyuanVideo": hunyuan_video,
    "Wan": wan,
    "Wan, image": lambda: wan(image=True),
    "LTX-2": ltx2,
    "LTX-2, interleaved": lambda: ltx2("interleaved"),
    "LTX-2, perturbed": lambda: ltx2(perturbed=True),
}


def made(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    """A model with random weights and its inputs, floating point ones of ``dtype``."""
    torch.manual_seed(11)
    model, inputs = MODELS[name]()
    attention = [m for m in model.modules() if hasattr(m, "set_processor")]
    randomize(model, attention, D)
    return in_dtype(model, dtype).to(device).eval(), cast(inputs, dtype, device)


def cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    """Tensors inside, on a device and, floating point ones, of a dtype."""
    if isinstance(value, dict):
        return {key: cast(item, dtype, device) for key, item in value.items()}
    if isinstance(value, list):
        return [cast(item, dtype, device) for item in value]
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The model's outputs, by tensor."""
    made = model(**inputs, return_dict=False)
    return [x for item in made for x in (item if isinstance(item, list) else [item])]


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained(torch_dtype=...)` does it: some modules of a model stay float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, child in model.named_modules():
        if not any(part in kept for part in name.split(".")):
            for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False)):
                tensor.data = cast(tensor.data, dtype, "cpu")
    return model


def relative(got: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference, of all outputs, by that of the expected ones."""
    a, b = (torch.cat([x.double().flatten() for x in side]) for side in (got, expected))
    return float((a - b).norm() / b.norm())


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(got, expected, strict=True))


def figures(name: str) -> tuple[float, float, float, bool]:
    """What patching changes: float32; bf16's error before and after; are its bits upstream's?

    Errors of bf16 are against the same weights and inputs in float32.
    """
    from qkrope.integrations.diffusers import patched

    with torch.no_grad():
        model, inputs = made(name)
        stock = run(model, inputs)
        with patched(model):
            single = relative(run(model, inputs), stock)
        model, inputs = made(name, torch.bfloat16)
        wide = run(copy.deepcopy(model).float(), cast(inputs, torch.float32, "cpu"))
        stock = run(model, inputs)
        with patched(model):
            ours = relative(run(model, inputs), wide)
        with patched(model, rounding="upstream"):
            same = equal(run(model, inputs), stock)
    return single, relative(stock, wide), ours, same


if __name__ == "__main__":
    for name in MODELS:
        single, before, after, same = figures(name)
        bits = "the same" if same else "others"
        print(f"| {name} | {single:.1e} | {before:.1e} | {after:.1e} | {bits} |")
