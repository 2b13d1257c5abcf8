"""``qkrope.QKNormRope``: the call as a module that holds its weights."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ._limits import flag, instance
from .extras import Extras
from .norm import Norm
from .ops import Positions, qk_norm_rope
from .prebuild import dtype_name
from .spec import Spec

__all__ = ["QKNormRope"]


class _Affine(nn.Module):
    """The parameters of one norm, under the names that models' own norms give them."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, shape: tuple[int, ...], offset: float, weight: bool, bias: bool, **where: Any
    ) -> None:
        super().__init__()
        self.shape, self.offset = shape, offset
        for name, wanted in (("weight", weight), ("bias", bias)):
            made = nn.Parameter(torch.empty(shape, **where)) if wanted else None
            self.register_parameter(name, made)

    def reset_parameters(self) -> None:
        """A norm that changes no scale: the weight and its offset are one, the bias zero."""
        with torch.no_grad():
            if self.weight is not None:
                self.weight.fill_(1.0 - self.offset)
            if self.bias is not None:
                self.bias.zero_()

    def extra_repr(self) -> str:
        """The shape and what there is."""
        names = [n for n in ("weight", "bias") if getattr(self, n) is not None]
        return f"{', '.join(map(str, self.shape))}, {' and '.join(names) or 'no parameters'}"


class QKNormRope(nn.Module):
    """Normalise and rotate Q and K as a Spec says: `qkrope.qk_norm_rope` with weights of its own.

    Parameters are named as in the attention modules of most models, ``q_norm.weight`` and
    ``k_norm.weight`` (``q_norm.bias``, ``k_norm.bias``). As a submodule their keys get its name in
    front, ``norm_rope.q_norm.weight``, as any submodule's do. To load the entries of a checkpoint,
    give this module's own ``load_state_dict`` those of one attention module without their prefix
    (``layers.0.self_attn.``), or put the name into the keys. They start as models start them: 1
    minus the Spec's ``weight_offset`` (ones, or the zeros of Gemma), biases 0. A side whose norm is
    of kind "none" has no parameters.

    spec: what is computed; its ``q_norm`` and ``k_norm`` give the shapes: ``[head_dim]`` (or
    ``Norm.weight_dim``), and ``[heads * head_dim]`` with scope "row".
    weight, bias: whether the norms have them; a pair where q differs from k (DeepSeek-V4:
    ``weight=(False, True)``).
    per_head: a weight row for each head, ``[heads, head_dim]`` (Cohere).
    device, dtype: of the parameters, as for any module of torch; any of float32, bfloat16 and
    float16, whatever that of q and k; None is torch's default dtype.

    Raises TypeError and ValueError naming argument, expected and got.
    """

    q_norm: _Affine
    k_norm: _Affine

    def __init__(
        self,
        spec: Spec,
        *,
        weight: bool | tuple[bool, bool] = True,
        bias: bool | tuple[bool, bool] = False,
        per_head: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        instance("spec", spec, Spec)
        flag("per_head", per_head)
        instance("dtype", dtype, torch.dtype, optional=True)
        dtype_name("dtype", dtype or torch.get_default_dtype())
        self.spec = spec
        weights, biases = _pair("weight", weight), _pair("bias", bias)
        sides = (spec.q_norm, spec.num_q_heads), (spec.k_norm_resolved, spec.num_kv_heads)
        for name, (norm, heads), w, b in zip("qk", sides, weights, biases, strict=True):
            shape = _shape(norm, heads, spec.head_dim, per_head)
            if norm.kind == "none":
                w = b = False
            made = _Affine(shape, norm.weight_offset, w, b, device=device, dtype=dtype)
            self.add_module(f"{name}_norm", made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again; after ``to_empty`` of a module made on the meta device, for one."""
        for norm in (self.q_norm, self.k_norm):
            norm.reset_parameters()

    def forward(
        self,
        q: Tensor | None,
        k: Tensor | None,
        positions: Positions = None,
        **extras: Unpack[Extras],
    ) -> tuple[Tensor | None, ...]:
        """``qkrope.qk_norm_rope`` of q, k and positions with the module's weights and biases.

        q: ``[..., num_q_heads, head_dim]``, k: ``[..., num_kv_heads, head_dim]``, either may be
        None; positions, keywords, results and errors as there (a bias that the module has is no
        keyword any more).
        """
        for name, norm in (("q_bias", self.q_norm), ("k_bias", self.k_norm)):
            if norm.bias is not None:
                if extras.get(name) is not None:
                    raise ValueError(f"{name}: expected None, as the module has one, got a tensor")
                if (q if name == "q_bias" else k) is not None:
                    extras[name] = norm.bias  # type: ignore[literal-required]
        q_weight = None if q is None else self.q_norm.weight
        k_weight = None if k is None else self.k_norm.weight
        call = qk_norm_rope
        if any(t is not None and t.is_meta for t in (q, k)):
            from .torch_op import qk_norm_rope as call  # knows shapes without memory
        return call(q, k, q_weight, k_weight, positions, self.spec, **extras)

    def extra_repr(self) -> str:
        """The Spec."""
        return repr(self.spec)


def _pair(name: str, value: Any) -> tuple[bool, bool]:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a bool or a pair of them, got {value!r}")
    for item in pair:
        flag(name, item)
    return pair


def _shape(norm: Norm, heads: int, head_dim: int, per_head: bool) -> tuple[int, ...]:
    width = norm.weight_dim(head_dim)
    if per_head:
        return heads, width
    return (heads * width,) if norm.scope == "row" else (width,)
