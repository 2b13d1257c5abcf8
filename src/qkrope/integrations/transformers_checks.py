"""What a patch makes sure of: that a model's own functions and modules do what its Spec says.

Nothing here knows a family by name. A rotation function is run on random numbers and compared with
the oracle, which also tells how it takes its arguments; so is each norm, with rows so small that
its epsilon counts. Where parameters have no values yet (the meta device) shapes are all there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qkrope import reference
from qkrope.norm import Norm
from qkrope.spec import Spec

from .transformers_flow import Refused
from .transformers_plan import Form, Norming

__all__ = ["check_frequencies", "check_norm", "form_of"]

_TOKENS, _Q, _K = 5, 3, 2
_forms: dict[Any, Form] = {}


def bare(spec: Spec) -> Spec:
    """The rotation of a Spec alone, in float32, for few heads."""
    none = Norm("none")
    return replace(
        spec,
        num_q_heads=_Q,
        num_kv_heads=_K,
        norm=none,
        k_norm=None,
        v_norm=None,
        rounding="once",
    )


def form_of(name: str, function: Callable[..., Any], spec: Spec) -> Form:
    """How ``function`` rotates as ``spec`` says; Refused where it does not."""
    spec = bare(spec)
    if (found := _forms.get((function, spec))) is not None:
        return found
    with torch.no_grad(), torch.device("cpu"):
        for form in _candidates(function, spec):
            if _rotates(function, spec, form, _TOKENS):
                break
        else:
            raise Refused(f"{name} does not rotate as the config says")
        tail = form.tensors == 2 and _rotates(function, spec, form, 2)
    form = _forms[function, spec] = replace(form, tail=tail)
    return form


def _candidates(function: Callable[..., Any], spec: Spec) -> Iterator[Form]:
    """Every way that a function with these parameters might take its arguments."""
    names = list(inspect.signature(function).parameters)
    first = next((names.index(n) for n in ("cos", "freqs_cis") if n in names), 0)
    rope, named, rotary = spec.rope, "unsqueeze_dim" in names, spec.rotary_dim
    if first not in (1, 2) or rope is None:
        return
    if "cos" not in names:
        tables = [("complex", rotary // 2)]
    else:
        tables = [("halves", rotary), ("repeated", rotary), ("pairs", rotary // 2)]
        if rope.mrope_section is not None and not rope.mrope_interleaved:
            tables[0] = ("channels", rotary)  # sections in chunks: some disagree on the second half
        if rope.pair_distance is not None:  # channels that never turn are in it too
            tables.append(("halves", spec.head_dim))
    for (table, width), axis in product(tables, (1,) if named else (1, 2)):
        yield Form(first, axis, named, table, width, tail=False)


def _rotates(function: Callable[..., Any], spec: Spec, form: Form, q_tokens: int) -> bool:
    """Does the function do to random numbers what the oracle does?"""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, q_tokens, _Q, spec.head_dim, generator=generator)
    k = torch.randn(2, _TOKENS, _K, spec.head_dim, generator=generator)
    angles = torch.randn(2, _TOKENS, spec.rotary_dim // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    q_table = cos[:, -q_tokens:], sin[:, -q_tokens:]
    want = reference.qk_norm_rope(q, k, None, None, None, spec, cos_sin=(q_table, (cos, sin)))
    if form.axis == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    given = (q, k) if form.tensors == 2 else (q,)
    try:
        got = function(*given, *_table(form, angles))
    except Exception:  # whatever it is, these are not the arguments
        return False
    results = got if form.tensors == 2 else (got,)
    if form.axis == 1:
        results = tuple(y.transpose(1, 2) for y in results)
    return all(_close(y, ref, 1e-5) for y, ref in zip(results, want, strict=False))


def _table(form: Form, angles: Tensor) -> tuple[Tensor, ...]:
    """cos and sin of the angles of pairs as a form has them; an angle of 0 does not turn."""
    if form.table == "repeated":
        angles = angles.repeat_interleave(2, -1)
    elif form.table in ("halves", "channels"):
        angles = nn.functional.pad(angles, (0, form.width // 2 - angles.shape[-1]))
        angles = torch.cat((angles, angles), -1)
    if form.table == "complex":
        return (torch.polar(torch.ones_like(angles), angles),)
    return angles.cos(), angles.sin()


def check_frequencies(form: Form, frequencies: Collection[int]) -> None:
    """Raise Refused where the model that owns a layer makes tables of another width.

    ``frequencies`` are the lengths of its ``inv_freq`` buffers; none says nothing.
    """
    pairs = form.width if form.table in ("pairs", "complex") else form.width // 2
    if frequencies and pairs not in frequencies:
        got = " or ".join(map(str, sorted(frequencies)))
        raise Refused(
            f"the model's tables have {got} frequencies, by the config {pairs} pairs turn"
        )


def check_norm(norm: Any, step: Norming) -> None:
    """Raise Refused unless the module normalises as ``step.spec`` says."""
    parameters = list(norm.parameters())
    if any(p.is_meta for p in parameters):
        return
    dtype = parameters[0].dtype if parameters else torch.float32
    device = parameters[0].device if parameters else torch.device("cpu")
    spec, heads = step.spec, step.spec.num_q_heads
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 2, heads, spec.head_dim, generator=generator)
    rows[:, 1] *= max(spec.norm.eps, 1e-12) ** 0.5  # there the statistic is about eps
    rows = rows.to(device, dtype)
    given = rows.flatten(-2) if step.shape in ("row", "last") else rows
    given = given.transpose(1, 2) if step.shape == "split" else given
    with torch.no_grad():
        try:
            got = norm(given)
        except Exception as error:
            raise Refused(f"{step.name} does not take what the config says ({error})") from None
        got = got.transpose(1, 2) if step.shape == "split" else got.reshape(rows.shape)
        weight, bias = step.affine(norm)
        want, _ = reference.qk_norm_rope(rows, None, weight, None, None, spec, q_bias=bias)
    # Each rounding of the module's chain, of which there are at most four, is 2^-8 in bfloat16.
    if not _close(got, want, 4 * float(torch.finfo(dtype).eps)):
        raise Refused(f"{step.name} ({type(norm).__name__}) does not normalise as the config says")


def _close(got: Tensor, want: Any, share: float) -> bool:
    if got.shape != want.shape:
        return False
    error = (got.double() - want.double()).abs().amax()
    return bool(error <= share * want.double().abs().amax())
