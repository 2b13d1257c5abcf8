"""What the attention processors of ``qkrope.integrations.diffusers`` share.

A processor projects, calls ``Processor.joint`` where the stock one normalises, concatenates and
rotates, and hands the result to diffusers' own attention dispatch: backends, masks and context
parallelism are chosen as before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from .. import ops
from ..norm import Norm
from ..rope import Rope
from ..rounding import Rounding, canonical_rounding
from ..spec import Spec

__all__ = [
    "ADD",
    "ADDED",
    "QK",
    "TO",
    "Part",
    "Processor",
    "Table",
    "check_rounding",
    "of_complex",
    "of_pairs",
    "projected_out",
    "rows",
]

Table = tuple[Tensor, Tensor]
# Layers of an attention module, by the names diffusers has for them.
QK, ADDED = ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")
TO, ADD = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# How the norm classes round: x * rstd * weight once, or after rstd and again after the weight.
_LETTERS = {"torch.nn.modules.normalization": "B", "diffusers.models.normalization": "A"}


class Part(NamedTuple):
    """One stream: its norms' names, its ``[batch, tokens, heads, head_dim]`` and its rotation.

    ``table``: (cos, sin) for q and k, or ((cos, sin), (cos, sin)) for each; None does not turn.
    Only the first ``rotate_to`` tokens do.
    """

    norms: tuple[str, str]
    q: Any
    k: Any
    v: Any = None
    table: Any = None
    rotate_to: int | None = None


class Processor:
    """An attention processor that normalises and rotates by `qkrope.qk_norm_rope`.

    One may serve many attention modules. ``attn`` is one that it will serve: its Specs are made
    here, so that a traced first call makes none. ``rounding``: "once", or "upstream" for the casts
    of the stock chain (see ``qkrope.rounding``). ``stock`` is what `unpatch` puts back.

    Raises ValueError naming the norm that no Spec describes.
    """

    # By these names diffusers sets the attention backend and context parallelism.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, attn: Any = None, *, rounding: Rounding = "once", stock: Any = None) -> None:
        check_rounding(rounding)
        self.stock = stock
        self.rounding = rounding
        self._specs: dict[tuple[Any, ...], Spec] = {}
        for names in (QK, ADDED) if attn is not None else ():
            if any(getattr(attn, name, None) is not None for name in names):
                for pairing in (None, self.pairing_of(attn)):
                    self._spec(attn, names, (attn.heads, attn.heads), pairing)

    def pairing_of(self, attn: Any) -> str:
        """Which channels turn together, as `qkrope.Rope` has it."""
        return "interleaved"

    def _spec(
        self, attn: Any, names: tuple[str, str], heads: tuple[int, int], pairing: str | None
    ) -> Spec:
        head_dim = attn.inner_dim // attn.heads
        norms = [getattr(attn, name, None) for name in names]
        key = (heads, head_dim, attn.heads, pairing, *[_facts(norm) for norm in norms])
        if (spec := self._specs.get(key)) is not None:
            return spec
        found = [_norm(*item, head_dim, attn.heads) for item in zip(names, norms, strict=True)]
        (q, q_letter), (k, k_letter) = found
        own = (f"{q_letter}/f", f"{k_letter}/f")
        spec = self._specs[key] = Spec(
            *heads,
            head_dim,
            norm=q,
            k_norm=k,
            rope=None if pairing is None else Rope(pairing=pairing),
            rounding=own if self.rounding == "upstream" else self.rounding,
        )
        return spec

    def heads_of(self, attn: Any, *projected: Tensor) -> tuple[Any, ...]:
        """``[batch, tokens, heads * head_dim]`` as ``[batch, tokens, heads, head_dim]``.

        The number of heads is whatever there is: a rank of tensor parallelism holds some of them.
        """
        head_dim = attn.inner_dim // attn.heads
        return tuple([x.unflatten(-1, (-1, head_dim)) for x in projected])

    def projected(
        self, attn: Any, x: Tensor, names: tuple[str, ...], packed: str = ""
    ) -> tuple[Any, ...]:
        """The projections of x, or views of the one that they are fused into, by heads.

        ``packed`` is that one's name, where the stock processor has it used.
        """
        if packed and getattr(attn, "fused_projections", False) and hasattr(attn, packed):
            return self.heads_of(attn, *getattr(attn, packed)(x).chunk(len(names), dim=-1))
        return self.heads_of(attn, *[getattr(attn, name)(x) for name in names])

    def turned(self, attn: Any, part: Part) -> tuple[Any, Any]:
        """Q and K of a part, normalised and rotated: in place, or new tensors with gradients.

        A side that is None stays None.
        """
        args, extras = self._call(attn, part)
        if _needs_grad(args, extras):
            q, k = ops.qk_norm_rope(*args, **extras)
            return q, k
        ops.qk_norm_rope_(*args, **extras)
        return part.q, part.k

    def joint(self, attn: Any, *parts: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V of the tokens of several parts, in order.

        Without gradients each part is written straight to its place, and only V is concatenated.
        """
        calls = [self._call(attn, part) for part in parts]
        v = torch.cat([part.v for part in parts], dim=1)
        if any(_needs_grad(*call) for call in calls):
            made = [ops.qk_norm_rope(*args, **extras) for args, extras in calls]
            q, k = (torch.cat(side, dim=1) for side in zip(*made, strict=True))
            return q, k, v
        q, k = v.new_empty(v.shape), v.new_empty(v.shape)
        start = 0
        for part, (args, extras) in zip(parts, calls, strict=True):
            stop = start + part.v.shape[1]
            ops.qk_norm_rope(*args, **extras, out=(q[:, start:stop], k[:, start:stop]))
            start = stop
        return q, k, v

    def _call(self, attn: Any, part: Part) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and keywords of `qkrope.qk_norm_rope` for a part."""
        q, k = part.q, part.k
        heads = (k if q is None else q).shape[2], (q if k is None else k).shape[2]
        pairing = None if part.table is None else self.pairing_of(attn)
        spec = self._spec(attn, part.norms, heads, pairing)
        q_norm, k_norm = (getattr(attn, name, None) for name in part.norms)
        extras = {
            "cos_sin": part.table,
            "rotate_to": part.rotate_to,
            "q_bias": getattr(q_norm, "bias", None),
            "k_bias": getattr(k_norm, "bias", None),
        }
        weights = getattr(q_norm, "weight", None), getattr(k_norm, "weight", None)
        given = {name: value for name, value in extras.items() if value is not None}
        return (q, k, *weights, None, spec), given

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, parallel: bool = True
    ) -> Tensor:
        """diffusers' attention by the backend in use: ``[batch, tokens, heads * head_dim]``."""
        made = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config if parallel else None,
        )
        return made.flatten(2, 3).to(q.dtype)


def check_rounding(rounding: Any) -> None:
    """Raise ValueError or TypeError for a rounding that is neither a Spec's nor "upstream"."""
    if rounding != "upstream":
        canonical_rounding("rounding", rounding)


def _needs_grad(args: tuple[Any, ...], extras: dict[str, Any]) -> bool:
    """Whether a call's results have gradients: no place may be given for them then."""
    given = (*args[:4], extras.get("q_bias"), extras.get("k_bias"))
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def _facts(norm: Any) -> tuple[Any, ...] | None:
    """What of a norm module a Spec depends on."""
    if norm is None:
        return None
    kind = type(norm)
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return kind.__module__, kind.__name__, getattr(norm, "eps", None), shape


def _norm(name: str, norm: Any, head_dim: int, heads: int) -> tuple[Norm, str]:
    """A norm module as a value, and the letter of its rounding."""
    if (facts := _facts(norm)) is None:
        return Norm("none"), "B"
    module, kind, eps, shape = facts
    if module not in _LETTERS or kind != "RMSNorm":
        raise ValueError(f"{name}: expected an RMSNorm of torch or diffusers, got {kind}")
    if eps is None:
        raise ValueError(f"{name}.eps: expected a number, got None")
    scopes = {(head_dim,): "head", (heads * head_dim,): "row"}
    if (scope := scopes.get(tuple(shape))) is None:
        expected = " or ".join(str(list(s)) for s in scopes)
        raise ValueError(f"{name}: expected a norm over {expected}, got {list(shape)}")
    return Norm(eps=eps, scope=scope), _LETTERS[module]


def of_pairs(table: Any) -> Table | None:
    """One value a pair of tables that repeat each for both of its channels: views."""
    if table is None:
        return None
    cos, sin = table
    return cos[..., ::2], sin[..., 1::2]


def of_complex(table: Tensor | None) -> Table | None:
    """cos and sin of ``cos + i sin``: views."""
    return None if table is None else (table.real, table.imag)


def rows(table: Table | None, part: slice) -> Table | None:
    """The tokens of one stream in a table of several."""
    return None if table is None else (table[0][part], table[1][part])


def projected_out(attn: Any, x: Tensor) -> Tensor:
    """The output projection and what follows it (a dropout)."""
    for layer in attn.to_out:
        x = layer(x)
    return x
