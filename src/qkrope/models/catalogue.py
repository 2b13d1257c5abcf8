"""Reading the catalogue: TOML tables to Specs and the arguments that go with them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import scaling
from .._limits import choice, instance, refuse
from ..norm import Norm
from ..rope import Rope
from ..rounding import Rounding, canonical_rounding
from ..spec import Spec

__all__ = ["Call", "Entry", "entries", "find"]

_FILES = ("catalogue_llm.toml", "catalogue_more.toml", "catalogue_dit.toml")
_WORDS = {
    "takes": ("qk", "q", "k", "qkv"),
    "q_weight": ("head", "heads", "none"),
    "k_weight": ("head", "heads", "none"),
    "bias": ("", "q", "k", "qk"),
    "q_scale": ("", "number", "token", "head", "channel"),
    "k_scale": ("", "number", "token", "head", "channel"),
    "positions": ("shared", "each", "table", "table by head", "tables by head"),
    "rotate": ("", "from", "to"),
}


@dataclass(frozen=True)
class Call:
    """One qkrope call: a Spec and the form of the other arguments.

    ``takes`` says which of q, k and v it is given. ``q_weight`` and ``k_weight``: "head" is one
    weight a channel (a row of all heads with scope "row"), "heads" a row for each head, "none".
    ``bias``: sides with a bias. ``q_scale``, ``k_scale``: a number, or a tensor that differs by
    token, head or channel. ``positions``: "shared", or "each" for q's and k's own; "table" where
    the angles are no integer position times a frequency and come as ``cos_sin``, "table by head",
    "tables by head" for q's and k's own. ``rotate``: whether the first ("from") or last ("to")
    tokens do not turn. ``rounding`` is the chain of casts of the model's own code. ``layout`` names
    the packed tensor that q and k are views of.
    """

    spec: Spec
    label: str = ""
    takes: str = "qk"
    q_weight: str = "head"
    k_weight: str = "head"
    bias: str = ""
    q_scale: str = ""
    k_scale: str = ""
    positions: str = "shared"
    rotate: str = ""
    rounding: Rounding = "once"
    layout: str = ""

    def __post_init__(self) -> None:
        instance("Call.spec", self.spec, Spec)
        for name, words in _WORDS.items():
            choice(f"Call.{name}", getattr(self, name), words)
        object.__setattr__(self, "rounding", canonical_rounding("Call.rounding", self.rounding))

    def describe(self, sizes: bool = True) -> str:
        """The call in one line: heads, norms, rotation, extras; or without head counts and theta.

        q heads / k heads x head_dim; "-" where a side is absent.
        """
        spec, takes = self.spec, self.takes
        heads = "/".join(
            str(n) if side in takes else "-"
            for side, n in (("q", spec.num_q_heads), ("k", spec.num_kv_heads))
        )
        parts = [f"{heads} x {spec.head_dim}" if sizes else f"{takes} x {spec.head_dim}"]
        q, k = _norm_text(spec.q_norm), _norm_text(spec.k_norm_resolved)
        norms = {"q": q, "k": k}.get(takes, q if q == k else f"q {q}, k {k}")
        parts.append(norms + (f", v {_norm_text(spec.v_norm)}" if spec.v_norm else ""))
        parts.append(
            _rope_text(spec, sizes) + (", then norm" if spec.order == "rope_first" else "")
        )
        for side in "qk":
            if side in takes and getattr(self, f"{side}_weight") == "heads":
                parts.append(f"{side} weight by head")
            if scale := getattr(self, f"{side}_scale"):
                parts.append(f"{side} scaled by {scale}" if scale != "number" else f"{side} scaled")
        parts += [f"bias {self.bias}"] if self.bias else []
        parts += [self.positions] if "table" in self.positions else []
        parts += [f"rotate_{self.rotate}"] if self.rotate else []
        text = ", ".join(parts)
        return f"{self.label}: {text}" if self.label else text


@dataclass(frozen=True)
class Entry:
    """One released model and the calls of a layer."""

    model: str
    family: str
    kind: str  # llm, vlm, mla, index, enc, dit
    calls: tuple[Call, ...]
    code: tuple[str, ...]  # model_types of transformers; for kind dit, files of diffusers

    def describe(self, sizes: bool = True) -> str:
        """All calls in one line; calls that differ by their label alone are one."""
        lines: dict[str, list[str]] = {}
        for call in self.calls:
            text = call.describe(sizes).removeprefix(f"{call.label}: ")
            lines.setdefault(text, []).append(call.label)
        return "; ".join(
            f"{' and '.join(labels)}: {text}" if labels != [""] else text
            for text, labels in lines.items()
        )


def _number(value: float) -> str:
    """1e6 where %g would give 1e+06."""
    return f"{value:g}".replace("e+0", "e").replace("e-0", "e-")


def _norm_text(norm: Norm) -> str:
    if norm.kind == "none":
        return "no norm"
    text = norm.kind + (" of the row" if norm.scope == "row" else "")
    text += " 1+w" if norm.weight_offset == 1 else ""
    if norm.dim is not None:
        text += f" of the first {norm.dim}" + (", rest apart" if norm.rest else "")
    return f"{text} eps {_number(norm.eps)}"


def _rope_text(spec: Spec, sizes: bool) -> str:
    rope = spec.rope
    if rope is None:
        return "no rotation"
    text = rope.pairing + (f" to {rope.output_pairing}" if rope.output_pairing else "")
    if rope.dim not in (None, spec.head_dim):
        text += f" {rope.dim}" + (f" from {rope.offset}" if rope.offset else "")
    text += f" at distance {rope.pair_distance}" if rope.pair_distance else ""
    text += f" theta {_number(rope.theta)}" if sizes else ""
    text += f" {type(rope.scaling).__name__}" if rope.scaling else ""
    axes = rope.mrope_section or rope.axes_dim
    if axes:
        kind = "mrope" if rope.mrope_section else "axes"
        text += f" {kind} {'/'.join(map(str, axes))}"
    return text + (" reversed" if rope.reverse else "")


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """Every entry of the catalogue, in its order."""
    found = tuple(entry for name in _FILES for entry in _read(Path(__file__).with_name(name)))
    names = [entry.model for entry in found]
    assert len({*names}) == len(names)
    return found


def find(model: str) -> Entry:
    """The entry of a model; ValueError naming those that are near for another name."""
    for entry in entries():
        if entry.model == model:
            return entry
    near = [e.model for e in entries() if str(model).lower() in e.model.lower()][:8]
    refuse(
        ValueError, "model", "one of the catalogue" + f" ({', '.join(near)})" * bool(near), model
    )


def _read(path: Path) -> Iterator[Entry]:
    for family in tomllib.loads(path.read_text(encoding="utf-8"))["family"]:
        for model, own in family["models"].items():
            calls = tuple(_call(family, own, call) for call in family["calls"])
            yield Entry(model, family["name"], family["kind"], calls, tuple(family["code"]))


def _call(family: Mapping[str, Any], own: Mapping[str, Any], call: Mapping[str, Any]) -> Call:
    keywords: Any = {}
    for layer in (family.get("spec", {}), own, call.get("spec", {})):
        keywords = _merge(keywords, layer)
    rest = {key: value for key, value in call.items() if key != "spec"}
    rounding = rest.pop("rounding", family["rounding"])
    return Call(_value(Spec, keywords), rounding=rounding, **rest)


def _merge(below: Any, above: Any) -> Any:
    """Tables key by key; anything else is replaced."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}


_SCALINGS = ("Linear", "NTK", "DynamicNTK", "YaRN", "Llama3", "LongRoPE")
_NESTED = {"norm": Norm, "k_norm": Norm, "v_norm": Norm, "rest": Norm, "rope": Rope}


def _value(kind: type, keywords: Mapping[str, Any]) -> Any:
    """A Spec, Norm, Rope or scaling from its keywords; "none" is None."""
    known = {field.name for field in fields(kind)}
    if odd := sorted({*keywords} - known):
        raise ValueError(f"catalogue: {kind.__name__} has no {', '.join(odd)}")
    values: dict[str, Any] = {}
    for key, value in keywords.items():
        if key == "scaling" and isinstance(value, Mapping):
            own = dict(value)
            value = _value(getattr(scaling, choice("type", own.pop("type"), _SCALINGS)), own)
        elif isinstance(value, Mapping):
            value = _value(_NESTED[key], value)
        elif value == "none" and (key in _NESTED or key == "scaling"):
            value = None
        values[key] = value
    return kind(**values)
