"""Inputs of one benchmark case."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qkrope import angles

from .shapes import Shape

MAX_POSITION = 131072
_ROWS = 521  # distinct rows; more would take longer to make than to measure


@dataclass(frozen=True)
class Inputs:
    """One packed tensor `[tokens, width]` with the views, weights and positions of a call."""

    shape: Shape
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    positions: torch.Tensor

    @property
    def tokens(self) -> int:
        """Rows of the packed tensor."""
        return self.qkv.shape[0]


def _views(shape: Shape, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    spec = shape.spec
    q_columns = spec.num_q_heads * spec.head_dim
    q = qkv[:, :q_columns].unflatten(1, (spec.num_q_heads, spec.head_dim))
    k = qkv[:, q_columns : shape.columns].unflatten(1, (spec.num_kv_heads, spec.head_dim))
    return q, k


def make_inputs(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Inputs:
    """Random activations, distinct q and k weights, positions from 0 to 131071."""
    rng = torch.Generator().manual_seed(seed + 1000003 * tokens)
    spec = shape.spec
    some = torch.randn(min(tokens, _ROWS), shape.width, generator=rng).to(device, dtype)
    qkv = some[torch.arange(tokens, device=device) % _ROWS]
    weights: list[torch.Tensor | None] = []
    sides = ((spec.q_norm, spec.num_q_heads), (spec.k_norm_resolved, spec.num_kv_heads))
    for norm, heads in sides:
        width = (heads if norm.scope == "row" else 1) * spec.head_dim  # as models have them
        weight = 0.5 + torch.rand(width, generator=rng) - norm.weight_offset
        weights.append(None if norm.kind == "none" else weight.to(device, dtype))
    positions = torch.randint(0, MAX_POSITION, (tokens,), generator=rng)
    positions[0] = 0
    positions[-1] = MAX_POSITION - 1
    q, k = _views(shape, qkv)
    return Inputs(shape, qkv, q, k, weights[0], weights[1], positions.to(device))


def stationary(inputs: Inputs) -> Inputs:
    """The same inputs with weights of magnitude one.

    A timed in-place call runs on its own output thousands of times; with these weights the values
    neither die out into subnormal numbers (slow on a CPU) nor grow.
    """
    weights: list[torch.Tensor | None] = []
    spec = inputs.shape.spec
    sides = ((inputs.q_weight, spec.q_norm), (inputs.k_weight, spec.k_norm_resolved))
    for weight, norm in sides:
        if weight is None:
            weights.append(None)
            continue
        signs = torch.ones_like(weight)
        signs[1::3] = -1
        weights.append(signs - norm.weight_offset)
    return Inputs(
        inputs.shape, inputs.qkv, inputs.q, inputs.k, weights[0], weights[1], inputs.positions
    )


def another_buffer(inputs: Inputs) -> Inputs:
    """The same call on a packed tensor of its own."""
    qkv = inputs.qkv.clone()
    q, k = _views(inputs.shape, qkv)
    return Inputs(inputs.shape, qkv, q, k, inputs.q_weight, inputs.k_weight, inputs.positions)


def fp32_cos_sin(spec: object, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[tokens, rotary_dim / 2]` as models make them: float32 position times inv_freq.

    This is the upstream way, not ours: its error grows with the position.
    """
    resolved = angles.resolve(spec)  # type: ignore[arg-type]
    inv_freq = torch.tensor(resolved.inv_freq, dtype=torch.float64, device=positions.device)
    angle = positions.float()[..., None] * inv_freq.float()
    return angle.cos() * resolved.attention_factor, angle.sin() * resolved.attention_factor
