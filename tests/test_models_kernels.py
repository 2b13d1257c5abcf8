"""The catalogue's calls on the kernels, against the oracle. Nothing here needs transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest

import qkrope
from checks import assert_chain, assert_criterion
from qkrope import models, reference
from qkrope.models import Entry, cover

ENTRIES = models.entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.model)
def test_what_is_covered_computes_the_entry(entry: Entry, device: str) -> None:
    """Where `models.problem` finds none, the kernels meet the criterion; else they refuse."""
    for call in entry.calls:
        args, keywords = cover.arguments(call, device, seed=1)
        if models.problem(call, device) is not None:
            with pytest.raises((TypeError, ValueError, NotImplementedError)):
                qkrope.qk_norm_rope(*args, **keywords)
            continue
        results = qkrope.qk_norm_rope(*args, **keywords)
        expected = reference.qk_norm_rope(*args, **keywords)
        terms = reference.criterion_terms(*args, **keywords)
        for result, ref, term in zip(results, expected, terms, strict=True):
            if ref is not None:
                assert_criterion(result, ref, term, result.dtype)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.model)
def test_the_casts_of_the_models_own_code(entry: Entry, device: str) -> None:
    """Where the kernels run them they are the chain of casts, bit for bit but for ties."""
    for call in entry.calls:
        own = replace(call, spec=replace(call.spec, rounding=call.rounding))
        args, keywords = cover.arguments(own, device, seed=2)
        if call.rounding == "once":
            continue
        if models.problem(own, device) is not None:
            with pytest.raises((TypeError, ValueError, NotImplementedError)):
                qkrope.qk_norm_rope(*args, **keywords)
            continue
        results = qkrope.qk_norm_rope(*args, **keywords)
        expected = reference.qk_norm_rope(*args, **keywords)
        terms = reference.criterion_terms(*args, **keywords)
        for result, ref, term in zip(results, expected, terms, strict=True):
            if ref is not None:
                assert_chain(result, ref, term, own.spec.rope is None or "cos_sin" in keywords)
