"""What people run without this library: the separate torch operations of the model itself.

cos and sin are made outside the timed region, as models make them once for all their layers.
A baseline is `build(buffers) -> one call for each buffer` (buffers differ in their packed tensor
alone). A call returns q and k, `[tokens, heads, head_dim]`, or None where it wrote them over those
of its buffer. Other libraries' kernels, in peers.py, are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch.nn import functional

from .data import Inputs, fp32_cos_sin

Call = Callable[[], object]
Build = Callable[[Sequence[Inputs]], list[Call]]


class Unmeasured(Exception):
    """A baseline that does not run here or not on this case; its text says why."""


def own_sides(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous copies of q and k, for what does not take views of a packed tensor."""
    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (inputs.q, inputs.k))
    return q, k


def _rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Diffusion models rotate in float32 on float32 tables and round once.
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imag, real), dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _chain(inputs: Inputs) -> tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], tuple]:
    """The unfused function, and its arguments after q and k."""
    spec = inputs.shape.spec
    head_dim, rotary = spec.head_dim, spec.rotary_dim
    half = spec.rope is None or spec.rope.pairing == "half"
    cos = sin = None
    if rotary:
        cos, sin = fp32_cos_sin(spec, inputs.positions)
        if half:
            cos, sin = (torch.cat((t, t), -1).to(inputs.qkv.dtype) for t in (cos, sin))
        else:
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        cos, sin = cos[:, None], sin[:, None]
    rotate = _rotate_half if half else _rotate_pairs

    def side(x, weight, norm, cos, sin):  # type: ignore[no-untyped-def]
        if norm.kind == "rms":
            if weight is not None and norm.weight_offset:
                weight = weight + norm.weight_offset
            x = functional.rms_norm(x, (head_dim,), weight, norm.eps)
        if rotary == 0:
            return x
        if rotary == head_dim:
            return rotate(x, cos, sin)
        return torch.cat((rotate(x[..., :rotary], cos, sin), x[..., rotary:]), dim=-1)

    def chain(q, k, q_weight, k_weight, cos, sin):  # type: ignore[no-untyped-def]
        return (
            side(q, q_weight, spec.q_norm, cos, sin),
            side(k, k_weight, spec.k_norm_resolved, cos, sin),
        )

    return chain, (inputs.q_weight, inputs.k_weight, cos, sin)


def _calls(function: Callable[..., object], buffers: Sequence[Inputs], rest: tuple) -> list[Call]:
    def bind(inputs: Inputs) -> Call:
        arguments = (inputs.q, inputs.k, *rest)
        return torch.no_grad()(lambda: function(*arguments))

    return [bind(inputs) for inputs in buffers]


def eager(buffers: Sequence[Inputs]) -> list[Call]:
    """Plain torch: F.rms_norm and the model's own rotation, out of place."""
    chain, rest = _chain(buffers[0])
    return _calls(chain, buffers, rest)


def forget_compiled(names: Iterable[str]) -> None:
    """To be called before each case: what torch.compile kept of the last one counts towards its
    limit of recompilations. Not between two baselines: it would make the first compile again.
    """
    if any(name.startswith("compile") for name in names):
        torch._dynamo.reset()


def compiled(buffers: Sequence[Inputs]) -> list[Call]:
    """torch.compile of the same function, static shapes; compiled before this returns."""
    chain, rest = _chain(buffers[0])
    calls = _calls(torch.compile(chain, dynamic=False, fullgraph=True), buffers, rest)
    calls[0]()
    return calls


def compiled_in_place(buffers: Sequence[Inputs]) -> list[Call]:
    """The same, written over its q and k: contiguous tensors of their own, as writes to views of
    one tensor would make torch.compile move V too.
    """
    chain, rest = _chain(buffers[0])

    def chain_(q, k, *rest):  # type: ignore[no-untyped-def]
        for x, new in zip((q, k), chain(q, k, *rest), strict=True):
            x.copy_(new)
        return q, k

    function = torch.compile(chain_, dynamic=False, fullgraph=True)
    return [torch.no_grad()(partial(function, *own_sides(b), *rest)) for b in buffers]


BASELINES: dict[str, Build] = {
    "eager": eager,
    "compile": compiled,
    "compile-inplace": compiled_in_place,
}
