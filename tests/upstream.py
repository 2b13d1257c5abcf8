"""Watching real attention modules: what goes into their norms, what comes out at attention.

The modules are those of transformers and diffusers, small and with random weights. Nothing of
theirs is restated here: projections are read by hooks, and q, k and v where the module hands them
to its attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkrope import reference
from qkrope.accuracy import round_once
from qkrope.spec import Spec

BF16 = torch.bfloat16


@dataclass
class Seen:
    """What one call of one attention module did."""

    module: nn.Module
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of its children, by name
    outputs: dict[str, Tensor] = field(default_factory=dict)  # the last, where called again
    first: dict[str, Tensor] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    q: Tensor | None = None  # [..., heads, head_dim] as attention gets it
    k: Tensor | None = None
    v: Tensor | None = None
    positions: Tensor | None = None
    out: Tensor | None = None  # of the attention function
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # matmuls of its indexer


@contextmanager
def watched(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Seen]]:
    """Hooks on the modules and their children; the caller's patch fills q, k and v in."""
    seen = {module: Seen(module) for module in modules}
    handles = []

    def child_hook(record: Seen, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                record.inputs[name] = args[0].clone()
            if isinstance(output, Tensor):
                record.outputs[name] = output.clone()
                record.first.setdefault(name, output.clone())

        return hook

    def call_hook(record: Seen) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record.args, record.kwargs = args, dict(kwargs)

        return hook

    for module, record in seen.items():
        handles.append(module.register_forward_pre_hook(call_hook(record), with_kwargs=True))
        for name, child in module.named_modules():
            if name:
                handles.append(child.register_forward_hook(child_hook(record, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def randomize(model: nn.Module, modules: list[nn.Module], head_dim: int) -> None:
    """Distinct norm weights, and projections of which some heads are 500 times smaller.

    There an epsilon is no longer a small correction: every second head, and where a norm covers the
    row of all heads those of the keys. Parameters that a model leaves empty get values.
    """
    generator = torch.Generator().manual_seed(1234)

    def normal(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator)

    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and not bool(p.abs().amax() < 1e3):
                p.copy_(0.02 * normal(p))
        for module in modules:
            norms = [(n, m) for n, m in module.named_modules() if _is_norm(n, m)]
            weights = [getattr(m, "weight", None) for _, m in norms]
            row = any(w is not None and w.ndim == 1 and w.numel() > head_dim for w in weights)
            for name, child in module.named_modules():
                own = dict(child.named_parameters(recurse=False))
                if isinstance(child, nn.Linear):
                    heads = torch.arange(child.out_features) // head_dim
                    small = heads % 2 == 1
                    if row and any(part in name.split(".")[-1].split("_") for part in "k"):
                        small = torch.ones_like(small)
                    size = torch.where(small, 0.002, 1.0)
                    scaled = normal(child.weight) * size[:, None] / child.in_features**0.5
                    child.weight.copy_(scaled)
                    if child.bias is not None:
                        child.bias.copy_(0.1 * normal(child.bias) * size)
                elif _is_norm(name, child):
                    for key, p in own.items():
                        p.copy_(0.3 * normal(p) + (0.9 if key == "weight" else 0.0))
                else:
                    for p in own.values():
                        p.copy_(0.3 * normal(p))


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in name.lower() or "norm" in type(module).__name__.lower()


def compare(got: Tensor | None, expected: Tensor, terms: Tensor) -> None:
    """float32: within 1e-5 of the sum of the formula's absolute terms."""
    assert got is not None and got.dtype == torch.float32 and got.shape == expected.shape
    error = (got.double() - expected.double()).abs() / terms.double().clamp_min(1e-30)
    worst = float(error.detach().max())
    assert worst <= 1e-5, f"{worst:.3g} of the terms"


def compare_bits(
    got: Tensor | None, expected: Tensor, exact: bool = True, share: float = 1e-4
) -> None:
    """bfloat16: the same bits, or (``exact=False``) >= 99.99 % equal and the rest within 1 ulp."""
    assert got is not None and got.dtype == expected.dtype == BF16 and got.shape == expected.shape
    different = got != expected
    found = float(different.double().mean())
    steps = int((_ordered(got) - _ordered(expected)).abs().max())
    if exact and share < 1e-3:
        assert not found, f"{found:.3%} differ, by at most {steps} ulp"
    assert found <= share and steps <= 1, f"{found:.3%} differ, by at most {steps} ulp"


def _ordered(x: Tensor) -> Tensor:
    """bf16 as integers in the order of the values."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@dataclass
class Call:
    """Arguments of one qkrope call and what upstream made of them."""

    spec: Spec
    q: Tensor | None
    k: Tensor | None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    positions: Any = None
    extras: dict[str, Any] = field(default_factory=dict)
    own_angles: bool = True  # float32 too takes upstream's table where this is False
    table: Any = None  # upstream's cos and sin
    once: bool = False  # upstream rounds once too, from a float32 chain of its own
    after: Callable[[Tensor], Tensor] | None = None  # what upstream does to the rounded q, then
    after_k: Callable[[Tensor], Tensor] | None = None
    got: tuple[Tensor | None, ...] = ()  # upstream's q, k (and v)

    def check(self, *, bits: bool, exact: bool = True) -> None:
        """Hold upstream's results to the oracle."""
        extras, positions = dict(self.extras), self.positions
        if self.spec.rope is None:
            positions = None
        elif bits or not self.own_angles:
            extras["cos_sin"], positions = self.table, None
        args = (self.q, self.k, self.q_weight, self.k_weight, positions, self.spec)
        results = reference.qk_norm_rope(*args, **extras)
        if bits:
            if self.once:
                results = tuple(None if x is None else round_once(x, BF16) for x in results)
            if self.after is not None:
                results = (self.after(results[0]), *results[1:])
            if self.after_k is not None:
                results = (results[0], self.after_k(results[1]))
            for got, result in zip(self.got, results, strict=True):
                if result is not None:
                    compare_bits(got, result, exact, share=1e-3 if self.once else 1e-4)
            return
        terms = reference.criterion_terms(*args, **extras)
        for got, result, term in zip(self.got, results, terms, strict=True):
            if result is not None:
                compare(got, result, term)
