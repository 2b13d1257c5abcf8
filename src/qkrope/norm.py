"""What normalises a head, as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from ._limits import MAX_HEAD_DIM, choice, instance, integer, real, refuse, short_repr

__all__ = ["Norm", "Part"]


@dataclass(frozen=True, slots=True, repr=False)
class Norm:
    """The normalisation of one side (Q, K or V).

    ``y = x * r * (weight + weight_offset)``, with no weight taken as ones (and then no offset)::

        "rms"    r = 1 / sqrt(mean(x^2) + eps)
        "layer"  the same of x - mean(x), the bias added afterwards
        "l2"     r = 1 / max(sqrt(sum(x^2)), eps)
        "none"   y = x

    The mean or sum runs over a head ("head") or over all heads of the token ("row").
    ``weight_offset`` is 1 for models that store w - 1 (Gemma).

    ``dim``: only the leading ``dim`` channels of a head are normalised, by their own statistic
    (the row of MLA). The others stay, and the weight has ``dim`` channels; or ``rest`` normalises
    them among themselves, and the weight has both norms' channels in order.
    """

    kind: str = "rms"
    eps: float = 1e-6
    weight_offset: float = 0.0
    scope: str = "head"
    dim: int | None = None
    rest: Norm | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "kind", choice("Norm.kind", self.kind, ("rms", "layer", "l2", "none")))
        put(self, "eps", real("Norm.eps", self.eps, low=0.0))
        put(self, "weight_offset", real("Norm.weight_offset", self.weight_offset))
        put(self, "scope", choice("Norm.scope", self.scope, ("head", "row")))
        instance("Norm.rest", self.rest, Norm, optional=True)
        if self.dim is None:
            if self.rest is not None:
                refuse(ValueError, "Norm.rest", "None without dim", self.rest)
            return
        put(self, "dim", integer("Norm.dim", self.dim, 2, MAX_HEAD_DIM - 2, even=True))
        for name, norm in (("Norm", self), ("Norm.rest", self.rest)):
            if norm is not None and norm.kind == "none":
                refuse(ValueError, f"{name}.kind", "a norm where dim is given", "none")
            if norm is not None and norm.scope != "head":
                refuse(ValueError, f"{name}.scope", "'head' where dim is given", norm.scope)
        if self.rest is not None and self.rest.dim is not None:
            refuse(ValueError, "Norm.rest.dim", "None: rest is all other channels", self.rest.dim)

    def __repr__(self) -> str:
        return short_repr(self)

    def check(self, name: str, head_dim: int) -> None:
        """Raise ValueError where this norm does not fit a head."""
        if self.dim is not None and self.dim >= head_dim:
            refuse(ValueError, f"{name}.dim", f"less than head_dim = {head_dim}", self.dim)

    def weight_dim(self, head_dim: int) -> int:
        """Channels of a head that a weight or bias covers."""
        return head_dim if self.dim is None or self.rest is not None else self.dim

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        """The spans of a head's channels that are normalised each by its own statistic."""
        if self.dim is None:
            return (Part(0, head_dim, self),)
        return Part(0, self.dim, self), Part(self.dim, head_dim, self.rest or Norm("none"))


@dataclass(frozen=True, slots=True)
class Part:
    """Channels [start, stop) of a head and what normalises them; "none" leaves them."""

    start: int
    stop: int
    norm: Norm
