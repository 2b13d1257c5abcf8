"""What a model does to Q, K and V before attention, as a frozen value: Spec.

The values know their limits and their canonical text, and nothing about devices, kernels or torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from ._limits import MAX_HEAD_DIM, choice, instance, integer, refuse
from .norm import Norm
from .rope import Pair, Rope
from .rounding import Letters, Rounding, canonical_rounding, letters
from .scaling import (
    MAX_LENGTH,
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Scaling,
    YaRN,
)

__all__ = [
    "MAX_HEADS",
    "MAX_HEAD_DIM",
    "NTK",
    "DynamicNTK",
    "Linear",
    "Llama3",
    "LongRoPE",
    "Norm",
    "Rope",
    "Scaling",
    "Spec",
    "YaRN",
]

MAX_HEADS = 1 << 16

_SCHEMA = "qkrope.Spec/2"


@dataclass(frozen=True)
class Spec:
    """One model's step between the QKV projection and attention.

    Equal values are equal Specs and hash alike. ``k_norm=None`` normalises K as Q; ``rope=None``
    rotates nothing; ``order`` is "norm_first" or "rope_first". ``rounding`` is "once" (float32
    from load to store), or the casts of an unfused chain: "eager", "X/y" of `qkrope.rounding`, or
    a pair of these where Q's differ from K's. ``max_position_embeddings`` is the sequence length
    that length-dependent scalings take where a call gives no ``seq_len``. ``v_norm`` normalises V,
    which is never rotated, in the same call; None leaves it alone.

    Raises ValueError and TypeError naming the field, expected and got.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Norm = Norm()
    k_norm: Norm | None = None
    rope: Rope | None = Rope()
    order: str = "norm_first"
    rounding: Rounding = "once"
    max_position_embeddings: int | None = None
    v_norm: Norm | None = None

    _text: ClassVar[str]  # made at once: torch.compile reads a constant, and cannot trace json
    # What calls keep on an instance (see qkrope.plan); no part of its value.
    _plan: ClassVar[Any] = None
    _bare: ClassVar[Any] = None
    _once: ClassVar[Any] = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "num_q_heads", integer("Spec.num_q_heads", self.num_q_heads, 1, MAX_HEADS))
        put(self, "num_kv_heads", integer("Spec.num_kv_heads", self.num_kv_heads, 1, MAX_HEADS))
        put(self, "head_dim", integer("Spec.head_dim", self.head_dim, 2, MAX_HEAD_DIM, even=True))
        instance("Spec.norm", self.norm, Norm)
        instance("Spec.k_norm", self.k_norm, Norm, optional=True)
        instance("Spec.rope", self.rope, Rope, optional=True)
        put(self, "order", choice("Spec.order", self.order, ("norm_first", "rope_first")))
        put(self, "rounding", canonical_rounding("Spec.rounding", self.rounding))
        if (length := self.max_position_embeddings) is not None:
            length = integer("Spec.max_position_embeddings", length, 1, MAX_LENGTH)
            put(self, "max_position_embeddings", length)
        instance("Spec.v_norm", self.v_norm, Norm, optional=True)
        for name in ("norm", "k_norm", "v_norm"):
            if (norm := getattr(self, name)) is not None:
                norm.check(f"Spec.{name}", self.head_dim)
        if self.rope is not None:
            self.rope.check(self.rotary_dim, self.head_dim)
        text = {"schema": _SCHEMA, **_plain(self)}
        put(self, "_text", json.dumps(text, sort_keys=True, allow_nan=False))

    @property
    def q_norm(self) -> Norm:
        """The normalisation of Q."""
        return self.norm

    @property
    def k_norm_resolved(self) -> Norm:
        """The normalisation of K: ``k_norm``, or that of Q."""
        return self.norm if self.k_norm is None else self.k_norm

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of a head; 0 where rope is None."""
        if self.rope is None:
            return 0
        return self.head_dim if self.rope.dim is None else self.rope.dim

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Channels (a, b) of a head that each rotated pair reads."""
        return () if self.rope is None else self.rope.pairs(self.rotary_dim)

    @property
    def output_pairs(self) -> tuple[Pair, ...]:
        """Channels of a head that each rotated pair writes."""
        return () if self.rope is None else self.rope.output_pairs(self.rotary_dim)

    @property
    def pair_axes(self) -> tuple[int, ...]:
        """The axis of positions ``[A, ...]`` that each pair turns by; zeros without axes."""
        return () if self.rope is None else self.rope.axes(self.rotary_dim)

    @property
    def position_axes(self) -> int:
        """A of positions ``[A, ...]``; 0 where positions have no axis of their own."""
        return 0 if self.rope is None else self.rope.position_axes

    @property
    def roundings(self) -> tuple[Letters | None, Letters | None]:
        """Q's and K's letters (norm, rotation) of `qkrope.rounding`, None for "once".

        V rounds as K does.
        """
        pair = (self.rounding,) * 2 if isinstance(self.rounding, str) else self.rounding
        return letters(pair[0]), letters(pair[1])

    def canonical(self) -> str:
        """One line of JSON with sorted keys: equal Specs have equal text, whatever built them."""
        return self._text

    @classmethod
    def from_canonical(cls, text: str) -> Spec:
        """The Spec of a ``canonical()`` text, with every limit checked again."""
        if not isinstance(text, str):
            refuse(TypeError, "text", "the str that Spec.canonical() gave", text)
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: expected the JSON of Spec.canonical(), got {error}") from None
        if not isinstance(data, dict) or data.pop("schema", None) != _SCHEMA:
            refuse(ValueError, "text", f'a JSON object with "schema": "{_SCHEMA}"', text)
        value = _value(data)
        if not isinstance(value, cls):
            refuse(ValueError, "text", 'a JSON object with "type": "Spec"', text)
        return value

    @classmethod
    def from_config(
        cls,
        config: Any,
        layer_idx: int | None = None,
        *,
        rounding: Rounding = "once",
        part: str = "attention",
    ) -> Spec:
        """The Spec of one layer of a Hugging Face config: see ``qkrope.config``."""
        from .config import spec_from_config  # config.py builds Specs, so it imports this module

        return spec_from_config(config, layer_idx, rounding=rounding, part=part)

    def __reduce__(self) -> tuple[Any, ...]:
        # Fields only: what backends cache on an instance stays with that instance.
        return Spec, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


_TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Spec, Norm, Rope, Linear, NTK, DynamicNTK, YaRN, Llama3, LongRoPE)
}


def _plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"type": type(value).__name__, **fields}


def _value(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    name = data.pop("type", None)
    if not isinstance(name, str) or name not in _TYPES:
        refuse(ValueError, "type", "one of " + ", ".join(sorted(_TYPES)), name)
    kind = _TYPES[name]
    known = {field.name for field in dataclasses.fields(kind)}
    if odd := sorted(set(data) ^ known):
        raise ValueError(
            f"text: expected the fields {', '.join(sorted(known))} of {name}, "
            f"got {', '.join(odd)} added or missing"
        )
    return kind(**{key: _value(item) for key, item in data.items()})
