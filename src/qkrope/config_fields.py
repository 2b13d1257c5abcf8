"""Reading Hugging Face configs: keys, rope fields, and the scaling each rope_type names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ._limits import integer, refuse
from .scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Scaling, YaRN

__all__ = ["REQUIRED", "SCALINGS", "Config", "RopeFields"]

REQUIRED: Any = object()


class Config:
    """The keys of one model_type's config; ``defaults`` stand behind the absent ones."""

    def __init__(
        self, model_type: str, data: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        self.model_type = model_type
        self._data = {**defaults, **data}

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a key, its default, or ValueError where it is required and absent."""
        value = self._data.get(name, default)
        if value is REQUIRED:
            self.refuse(f"the key {name!r}", "none")
        return value

    def integer(self, name: str) -> int:
        """A required positive int."""
        return integer(f"config.{name}", self.get(name), 1, 1 << 31)

    def over(self, values: Mapping[str, Any]) -> Config:
        """The same config where ``values`` stand before its own."""
        return Config(self.model_type, {**self._data, **values}, {}) if values else self

    def refuse(self, expected: str, got: object) -> NoReturn:
        """Raise ValueError naming the model."""
        raise ValueError(f"config of {self.model_type!r}: expected {expected}, got {got}")


class RopeFields:
    """One rope_parameters dict."""

    def __init__(self, config: Config, data: Any) -> None:
        if not isinstance(data, Mapping):
            refuse(TypeError, "config.rope_parameters", "a dict", data)
        self.config, self._data = config, dict(data)
        self._unread = {key for key, value in self._data.items() if value is not None}

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a field (null counts as absent), its default, or ValueError."""
        self._unread.discard(name)
        value = self._data.get(name)
        if value is None and default is REQUIRED:
            self.config.refuse(f"the rope field {name!r}", "none")
        return default if value is None else value

    def close(self, rope_type: str) -> None:
        """Raise for fields nobody read: they would change the model."""
        if self._unread:
            known = f"rope fields known with rope_type {rope_type!r}"
            self.config.refuse(known, ", ".join(map(repr, sorted(self._unread))))


# Scalings. ``trained`` is the top-level original_max_position_embeddings, which goes first.


def _trained(f: RopeFields, trained: int | None) -> int:
    inner = f.get("original_max_position_embeddings", None)
    if trained is not None or inner is not None:
        return trained if trained is not None else inner
    return f.config.integer("max_position_embeddings")


def _dynamic(f: RopeFields, trained: int | None) -> Scaling:
    if alpha := f.get("alpha", None) if f.config.model_type.startswith("hunyuan") else None:
        for unused in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            f.get(unused, None)
        return NTK(alpha)
    longest = f.config.integer("max_position_embeddings")
    if (inner := f.get("original_max_position_embeddings", longest)) != longest:
        f.config.refuse(f"original_max_position_embeddings of {longest} with 'dynamic'", inner)
    return DynamicNTK(f.get("factor"), longest)


def _yarn(f: RopeFields, trained: int | None) -> Scaling:
    length = _trained(f, trained)
    return YaRN(
        factor=f.get("factor", None) or f.config.integer("max_position_embeddings") / length,
        original_max_position_embeddings=length,
        beta_fast=f.get("beta_fast", None) or 32,
        beta_slow=f.get("beta_slow", None) or 1,
        mscale=f.get("mscale", None),
        mscale_all_dim=f.get("mscale_all_dim", None),
        attention_factor=f.get("attention_factor", None),
        truncate=f.get("truncate", True),
    )


def _llama3(f: RopeFields, trained: int | None) -> Scaling:
    low, high = f.get("low_freq_factor"), f.get("high_freq_factor")
    return Llama3(f.get("factor"), low, high, _trained(f, trained))


def _longrope(f: RopeFields, trained: int | None) -> Scaling:
    return LongRoPE(
        short_factor=f.get("short_factor"),
        long_factor=f.get("long_factor"),
        original_max_position_embeddings=_trained(f, trained),
        factor=f.get("factor", None),
        attention_factor=f.get("attention_factor", None),
    )


SCALINGS: dict[str, Callable[[RopeFields, int | None], Scaling | None]] = {
    "default": lambda f, trained: None,
    "linear": lambda f, trained: Linear(f.get("factor")),
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
