"""How a forward is read and rewritten, on small forwards of every shape that could go wrong.

Each runs rewritten, with norms and rotations that write down what they were asked to do; whatever
the flow, the value must be that of the forward itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkrope.integrations.transformers_flow import Flow, Refused, is_ours, read, rewrite


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Any function that does not commute with a norm."""
    return q * cos + sin, k * cos - sin


def apply_rotary_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for one tensor."""
    return x * cos + sin


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).sqrt()


class Attention(nn.Module):
    """What the forwards below find in ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm, self.v_norm = Norm(), Norm(), Norm()
        self.scale, self.is_sliding, self.use_norm, self.kind = 3.0, True, True, "head"


class Plain(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q = self.q_norm(x.view(2, 3, 4)).transpose(0, 1)
        k = self.k_norm((2 * x).view(2, 3, 4)).transpose(0, 1)
        cos, sin = position_embeddings
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if cache is not None:
            k = torch.cat((cache, k))
        return q, k


class Later(Attention):
    """Separate statements, branches that the module decides, a norm of v."""

    def forward(self, x, position_embeddings, cache=None):
        q, k, v = x.view(2, 3, 4), (2 * x).view(2, 3, 4), x + 1
        if self.use_norm and hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        dtype = q.dtype
        q, k = q.transpose(0, 1), k.transpose(0, 1)
        v = self.v_norm(v)
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q.to(dtype), k + v.mean()


class Single(Attention):
    def forward(self, x, position_embeddings, cache=None):
        cos, sin = position_embeddings
        q = self.q_norm(x)
        q = apply_rotary_one(q, cos, sin)
        k = self.k_norm(2 * x)
        k = apply_rotary_one(k, cos, sin)
        return q, k


class Scaled(Attention):
    """Something reads a normalised q on its way: k alone is put off."""

    def forward(self, x, position_embeddings, cache=None):
        q = self.q_norm(x) * self.scale
        k = self.k_norm(2 * x)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k


class Sliced(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q, k = self.q_norm(x), self.k_norm(2 * x)
        a, b = apply_rotary_pos_emb(q[..., :2], k[..., :2], *position_embeddings)
        return torch.cat((a, q[..., 2:]), -1), torch.cat((b, k[..., 2:]), -1)


class ReadAfter(Attention):
    """Normalised k goes elsewhere too, after the rotation."""

    def forward(self, x, position_embeddings, cache=None):
        q, k = self.q_norm(x), self.k_norm(2 * x)
        a, b = apply_rotary_pos_emb(q, k, *position_embeddings)
        return a, b + k


class InPlace(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q, k = self.q_norm(x), self.k_norm(2 * x)
        q.clamp_(max=0.5)
        k *= 2
        return apply_rotary_pos_emb(q, k, *position_embeddings)


class Unknown(Attention):
    """A branch that the call decides: in one of them q is not normalised."""

    def forward(self, x, position_embeddings, cache=None):
        q, k = x, self.k_norm(2 * x)
        if cache is None:
            q = self.q_norm(q)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k


class Maybe(Attention):
    """The rotation itself is in such a branch."""

    def forward(self, x, position_embeddings, cache=None):
        q, k = self.q_norm(x), self.k_norm(2 * x)
        if cache is None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k


class Twice(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q = self.q_norm(x + self.q_norm(x).sum())
        k = self.k_norm(self.k_norm(2 * x).view(6, 4) + 1).view(2, 3, 4)
        return apply_rotary_pos_emb(q, k, *position_embeddings)


class Cross(Attention):
    """The same norm again, on keys that do not turn."""

    def forward(self, x, position_embeddings, cache=None):
        q, k = self.q_norm(x), self.k_norm(2 * x)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, torch.cat((k, self.k_norm(3 * x)))


class Loop(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q, k = self.q_norm(x), self.k_norm(2 * x)
        for _ in range(2):
            k = k + 1
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k


class Chosen(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q = self.q_norm(x) if self.kind == "head" else x
        k = 2 * x if self.kind == "none" else self.k_norm(2 * x)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k


class RopeFirst(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q, k = apply_rotary_pos_emb(x, 2 * x, *position_embeddings)
        q = self.q_norm(q.transpose(0, 1))
        return q.transpose(0, 1), self.k_norm(k)


class ReadBetween(Attention):
    def forward(self, x, position_embeddings, cache=None):
        q, k = apply_rotary_pos_emb(x, 2 * x, *position_embeddings)
        total = q.sum()
        return self.q_norm(q) + total, self.k_norm(k)


class InLoop(Attention):
    def forward(self, x, position_embeddings, cache=None):
        for _ in range(2):
            x = self.q_norm(x)
        return apply_rotary_pos_emb(x, x, *position_embeddings)


@dataclass
class Recorder:
    """In the place of a plan: the module's own norms and rotations, and what was asked for."""

    flow: Flow
    asked: list[Any] = field(default_factory=list)

    def norm(self, module: Any, name: str, x: Tensor) -> Tensor:
        self.asked.append(name)
        return getattr(module, name)(x)

    def turn(self, module: Any, index: int, *args: Any) -> Any:
        site = self.flow.turns[index]
        names = [None if n is None else n.name for n in site.norms]
        self.asked.append(tuple(names))
        tensors = 1 if site.name == "apply_rotary_one" else 2
        x, rest = list(args[:tensors]), args[tensors:]

        def normed() -> None:
            for i, name in enumerate(names[:tensors]):
                if name is not None:
                    x[i] = getattr(module, name)(x[i])

        first = all(n is None or n.first for n in site.norms)
        if first:
            normed()
        y = globals()[site.name](*x, *rest)
        x = [y] if tensors == 1 else list(y)
        if not first:
            normed()
        return x[0] if tensors == 1 else tuple(x)


BOTH = ("q_norm", "k_norm")
CASES = [
    (Plain, [BOTH]),
    (Later, ["v_norm", BOTH]),
    (Single, [("q_norm", None), ("k_norm", None)]),
    (Scaled, ["q_norm", (None, "k_norm")]),
    (Sliced, ["q_norm", "k_norm", (None, None)]),
    (ReadAfter, ["k_norm", ("q_norm", None)]),
    (InPlace, ["q_norm", "k_norm", (None, None)]),
    (Unknown, ["q_norm", (None, "k_norm")]),
    (Maybe, ["q_norm", "k_norm", (None, None)]),
    (Twice, ["q_norm", "k_norm", BOTH]),
    (Cross, [BOTH, "k_norm"]),
    (Loop, ["k_norm", ("q_norm", None)]),
    (Chosen, [BOTH]),
    (RopeFirst, [BOTH]),
]


def run(module: Any, cache: Tensor | None) -> list[Tensor]:
    x = torch.linspace(-1, 2, 24).view(2, 3, 4)
    torch.manual_seed(0)
    tables = torch.rand(()), torch.rand(())
    return [y.clone() for y in module(x, tables, cache)]


@pytest.mark.parametrize("kind, asked", CASES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("cached", [False, True])
def test_flow(kind: type[Attention], asked: list[Any], cached: bool) -> None:
    module = kind()
    cache = torch.ones(1, 2, 4) if cached and kind is Plain else torch.ones(1) if cached else None
    want = run(module, cache)
    flow = read(module, turns=True)
    recorder = module._qkrope = Recorder(flow)
    function = rewrite(flow)
    assert is_ours(function) and not is_ours(kind.forward)
    module.forward = function.__get__(module)
    for got, expected in zip(run(module, cache), want, strict=True):
        torch.testing.assert_close(got, expected)
    skipped = {Unknown: ["q_norm"], Maybe: [(None, None)]}.get(kind, []) if cached else []
    assert recorder.asked == [item for item in asked if item not in skipped]


def test_branches_that_the_module_decides() -> None:
    """Modules of a class may differ, and get functions of their own."""
    head, none, far = Chosen(), Chosen(), Later()
    none.kind = "none"
    assert [s.name for s in read(head, True).norms] == ["q_norm", "k_norm"]
    assert [s.name for s in read(none, True).norms] == []
    assert rewrite(read(head, True)) is rewrite(read(Chosen(), True))
    assert rewrite(read(head, True)) is not rewrite(read(none, True))
    flow = read(far, turns=False)  # no positions: no rotation, and norms of their own
    assert not flow.turns and all(site.met is None for site in flow.norms)
    far.use_norm = False
    assert [s.name for s in read(far, True).norms] == ["v_norm"]


def test_what_cannot_be_read_is_refused() -> None:
    class Decorated(Attention):
        @torch.no_grad()
        def forward(self, x, position_embeddings, cache=None):
            return x

    class Closed(Attention):
        def forward(self, x, position_embeddings, cache=None):
            return super().forward(x)

    class NoSource(Attention):
        forward = eval("lambda self, x, position_embeddings: x")

    class Changed(Attention):
        """As where a file was edited after its import."""

        def forward(self, x, position_embeddings, cache=None):
            return x

    Changed.forward.__code__ = Changed.forward.__code__.replace(co_names=("gone",))

    class Other(Attention):
        """The same names and constants, another operator."""

        def forward(self, x, position_embeddings, cache=None):
            return x + 1

    def minus(self, x, position_embeddings, cache=None):
        return x - 1

    Other.forward.__code__ = Other.forward.__code__.replace(co_code=minus.__code__.co_code)
    assert Other.forward(Other(), 3, None) == 2
    for kind, reason in (
        (Changed, "is not what runs"),
        (Other, "is not what runs"),
        (Decorated, "its forward is"),
        (Closed, "no plain function"),
        (NoSource, "source of its forward|its forward is"),
        (InLoop, "in a loop"),
        (ReadBetween, "its result is read before it is normalised"),
    ):
        with pytest.raises(Refused, match=reason):
            read(kind(), turns=True)
