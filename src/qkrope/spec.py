"""What a model does to Q and K before attention, as a frozen value: Norm, Rope, Spec.

The values know their limits and their canonical text, and nothing about devices, kernels or torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from ._limits import choice, instance, integer, real, refuse
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

MAX_HEAD_DIM = 1024  # twin of QK_MAX_HEAD_DIM in native/params.h
MAX_HEADS = 1 << 16

_SCHEMA = "qkrope.Spec/1"


@dataclass(frozen=True, slots=True)
class Norm:
    """The normalisation of one side (Q or K).

    ``y = x * r * (weight + weight_offset)``, with no weight taken as ones (and then no offset):
    "rms"   r = 1 / sqrt(mean(x^2) + eps)
    "layer" the same of x - mean(x), the bias added afterwards
    "l2"    r = 1 / max(sqrt(sum(x^2)), eps)
    "none"  y = x
    The mean or sum runs over a head ("head") or over all heads of the token ("row").
    ``weight_offset`` is 1 for models that store w - 1 (Gemma).
    """

    kind: str = "rms"
    eps: float = 1e-6
    weight_offset: float = 0.0
    scope: str = "head"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "kind", choice("Norm.kind", self.kind, ("rms", "layer", "l2", "none")))
        put(self, "eps", real("Norm.eps", self.eps, low=0.0))
        put(self, "weight_offset", real("Norm.weight_offset", self.weight_offset))
        put(self, "scope", choice("Norm.scope", self.scope, ("head", "row")))


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation: the first ``dim`` channels of a head turn by position * inv_freq.

    ``inv_freq[i] = theta ** (-2 * i / dim)`` before ``scaling``; ``dim=None`` is the whole head.
    Pairs are channels (i, i + dim / 2) with pairing="half" (NeoX), (2i, 2i + 1) with
    "interleaved" (GPT-J).
    """

    dim: int | None = None
    theta: float = 10000.0
    pairing: str = "half"
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.dim is not None:
            put(self, "dim", integer("Rope.dim", self.dim, 2, MAX_HEAD_DIM, even=True))
        put(self, "theta", real("Rope.theta", self.theta, above=0.0))
        put(self, "pairing", choice("Rope.pairing", self.pairing, ("half", "interleaved")))
        instance("Rope.scaling", self.scaling, Scaling, optional=True)
        if self.scaling is not None and self.dim is not None:
            self.scaling.check_rope(self.theta, self.dim)


@dataclass(frozen=True)
class Spec:
    """One model's step between the QKV projection and attention.

    Equal values are equal Specs and hash alike. ``k_norm=None`` normalises K as Q; ``rope=None``
    rotates nothing; ``order`` is "norm_first" or "rope_first"; ``rounding`` is "once" (float32
    from load to store) or "eager" (the casts of the unfused chain). ``max_position_embeddings`` is
    the sequence length that length-dependent scalings take where a call gives no ``seq_len``.
    A value no backend runs yet still constructs; ``qkrope.reference`` runs every value.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Norm = Norm()
    k_norm: Norm | None = None
    rope: Rope | None = Rope()
    order: str = "norm_first"
    rounding: str = "once"
    max_position_embeddings: int | None = None

    _text: ClassVar[str]  # made at once: torch.compile reads a constant, and cannot trace json
    # What calls keep on an instance (see qkrope.plan); no part of its value.
    _plan: ClassVar[Any] = None
    _bare: ClassVar[Any] = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "num_q_heads", integer("Spec.num_q_heads", self.num_q_heads, 1, MAX_HEADS))
        put(self, "num_kv_heads", integer("Spec.num_kv_heads", self.num_kv_heads, 1, MAX_HEADS))
        put(self, "head_dim", integer("Spec.head_dim", self.head_dim, 2, MAX_HEAD_DIM, even=True))
        instance("Spec.norm", self.norm, Norm)
        instance("Spec.k_norm", self.k_norm, Norm, optional=True)
        instance("Spec.rope", self.rope, Rope, optional=True)
        put(self, "order", choice("Spec.order", self.order, ("norm_first", "rope_first")))
        put(self, "rounding", choice("Spec.rounding", self.rounding, ("once", "eager")))
        if (length := self.max_position_embeddings) is not None:
            length = integer("Spec.max_position_embeddings", length, 1, MAX_LENGTH)
            put(self, "max_position_embeddings", length)
        if (rope := self.rope) is not None:
            if rope.dim is not None and rope.dim > self.head_dim:
                refuse(ValueError, "Rope.dim", f"at most head_dim = {self.head_dim}", rope.dim)
            if rope.scaling is not None:
                rope.scaling.check_rope(rope.theta, self.rotary_dim)
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
        cls, config: Any, layer_idx: int | None = None, *, rounding: str = "once"
    ) -> Spec:
        """The Spec of one layer of a Hugging Face config: see ``qkrope.config``."""
        from .config import spec_from_config  # config.py builds Specs, so it imports this module

        return spec_from_config(config, layer_idx, rounding=rounding)

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
