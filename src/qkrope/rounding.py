"""Where a chain of unfused operations rounds, in two letters: the norm's, the rotation's.

With T the dtype of the activations and everything between two roundings in float32:

    A/.   T(T(x * rstd) * w), then T(. + bias)     HF Llama; E is the same chain of a layer norm
    B/.   T(x * rstd * w + bias)                   HF OLMo 2, Gemma, torch.nn.RMSNorm (N, D)
    C/.   T(x * T(rstd)), then as A                DeepSeek-V4; of an l2 norm T(x / T(length)) (F)
    ./b   T(T(x * T(cos)) + T(partner * T(sin)))
    ./h   T(x * T(cos) + partner * T(sin))
    ./f   T(x * cos + partner * sin)               cos and sin in float32; c is the same

A scale rounds once more, T(n * scale). Whatever the letters, T is reached before the rotation.
"""

from __future__ import annotations

from typing import Any

from ._limits import refuse

__all__ = ["Letters", "Rounding", "canonical_rounding", "letters"]

Letters = tuple[str, str]
Rounding = str | tuple[str, str]

_NORM = {"A": "A", "B": "B", "C": "C", "D": "B", "E": "A", "F": "C", "N": "B"}
_ROTATION = {"b": "b", "h": "h", "f": "f", "c": "f"}
_EXPECTED = (
    '"once", "eager", or "X/y" with X one of A B C (D E F N) and y one of b h f (c), '
    "or a pair of those for q and k"
)


def canonical_rounding(name: str, value: Any) -> Rounding:
    """The one spelling of a rounding: "eager" for "A/b", one word where q and k agree."""
    if isinstance(value, str):
        return _word(name, value, value)
    if not isinstance(value, list | tuple):
        refuse(TypeError, name, _EXPECTED, value)
    if len(value) != 2:
        refuse(ValueError, name, _EXPECTED, value)
    q, k = (_word(name, item, value) for item in value)
    return q if q == k else (q, k)


def _word(name: str, word: Any, value: Any) -> str:
    if not isinstance(word, str):
        refuse(TypeError, name, _EXPECTED, value)
    if word in ("once", "eager"):
        return str(word)
    norm, slash, rotation = word.partition("/")
    if not slash or norm not in _NORM or rotation not in _ROTATION:
        refuse(ValueError, name, _EXPECTED, value)
    word = f"{_NORM[norm]}/{_ROTATION[rotation]}"
    return "eager" if word == "A/b" else word


def letters(word: str) -> Letters | None:
    """("A", "b") of a canonical word; None of "once"."""
    if word == "once":
        return None
    norm, _, rotation = ("A/b" if word == "eager" else word).partition("/")
    return norm, rotation
