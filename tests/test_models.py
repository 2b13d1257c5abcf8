"""The catalogue: every entry is a Spec, is what upstream code does, and runs where it says so."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING

import qkrope
import upstream_dits
import upstream_encoders
import upstream_families
import upstream_joint
import upstream_latent
import upstream_videos
from qkrope import models, reference
from qkrope.cli import main
from qkrope.config import PARTS
from qkrope.models import Call, Entry, cover
from qkrope.spec import Spec
from upstream_transformers import configure

ENTRIES = models.entries()
FAMILIES = [*upstream_families.FAMILIES, *upstream_latent.FAMILIES]
MODULES = {
    **upstream_encoders.ADAPTERS,
    **upstream_joint.ADAPTERS,
    **upstream_videos.ADAPTERS,
    **upstream_dits.ADAPTERS,
}
# Their code is with the checkpoints and in serving engines: transformers does not ship it, so no
# test can run it. What it does is that of a family that is tested, but for FoPE's tables.
ELSEWHERE = {"bailing_moe_v2", "sarvam_moe", "interns1_pro"}
# Sizes of one architecture: these entries run the module of another one.
ALIKE = {
    "Wan2.1-1.3B": "Wan2.1/2.2-14B",
    "Wan2.2-TI2V-5B": "Wan2.1/2.2-14B",
    "LTX-2 audio": "LTX-2 video",
}


def test_reading_the_catalogue_needs_no_torch() -> None:
    code = "import sys, qkrope.models as m; m.entries(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there_once() -> None:
    names = [entry.model for entry in ENTRIES]
    assert len(names) == len({*names}) == 147
    assert models.find("Qwen3-8B").calls[0].spec == Spec(32, 8, 128, rope=qkrope.Rope(theta=1e6))
    with pytest.raises(ValueError, match=r"model: expected one of the catalogue \(Qwen3-8B"):
        models.find("qwen3-8b")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.model)
def test_entry(entry: Entry) -> None:
    """Specs survive their canonical text, the oracle runs the arguments, descriptions differ."""
    for call in entry.calls:
        assert Spec.from_canonical(call.spec.canonical()) == call.spec
        args, keywords = cover.arguments(call)
        results = reference.qk_norm_rope(*args, **keywords)
        assert [x is not None for x in results] == [side in call.takes for side in "qkv"][
            : len(results)
        ]
        assert all(bool(x.isfinite().all()) for x in results if x is not None)
        # And as the model's own code rounds.
        spec = upstream(call)
        chain = reference.qk_norm_rope(*args[:5], spec, **keywords)
        assert (
            call.rounding == "once" or chain[0 if "q" in call.takes else 1].dtype == torch.bfloat16
        )
    labels = [call.label for call in entry.calls]
    assert len({*labels}) == len(labels)


def upstream(call: Call) -> Spec:
    """The Spec of a call with the casts of the model's own code."""
    return replace(call.spec, rounding=call.rounding)


def meaning(spec: Spec, takes: str) -> tuple[object, ...]:
    """A Spec without its sizes, theta, eps and scaling, as far as the given sides go."""
    norms = {"q": spec.q_norm, "k": spec.k_norm_resolved, "v": spec.v_norm}
    parts = tuple(
        (n.kind, n.scope, n.weight_offset, n.dim is not None, n.rest is not None) if n else None
        for side, n in norms.items()
        if side in takes
    )
    rope = spec.rope
    if rope is None:
        return (*parts, spec.rounding)
    axes = len(rope.mrope_section or ()), rope.mrope_interleaved, len(rope.axes_dim or ())
    turned = (rope.pairing, rope.output_pairing, rope.reverse, rope.offset > 0, axes)
    shape = rope.dim not in (None, spec.head_dim), rope.pair_distance is not None
    return (*parts, spec.order, turned, shape, spec.rounding)


@functools.cache
def of_configs(model_type: str) -> frozenset[Spec]:
    """Every layer and part of a family's test configs, with its own casts."""
    found = set()
    configs = [configure(f) for f in FAMILIES if f.model_type == model_type]
    for config in configs or [CONFIG_MAPPING[model_type]()]:
        for part in PARTS:
            for layer in range(config.num_hidden_layers):
                try:
                    found.add(Spec.from_config(config, layer, rounding="upstream", part=part))
                except ValueError as error:  # a layer or a part that the model lacks
                    assert "layer_idx" in str(error) or "a part that" in str(error)
    return frozenset(found)


def split(row: Spec) -> tuple[Spec, ...]:
    """A row [latent | k_pe] of which both are normalised, as two heads."""
    norm, rope = row.k_norm_resolved, row.rope
    if norm.rest is None or norm.dim is None or rope is None:
        return ()
    return (
        replace(row, head_dim=norm.dim, k_norm=replace(norm, dim=None, rest=None), rope=None),
        replace(
            row,
            head_dim=row.head_dim - norm.dim,
            k_norm=norm.rest,
            rope=replace(rope, offset=0, dim=None),
        ),
    )


def test_a_row_is_its_two_parts() -> None:
    """dots3-note's local rows are wider than a Spec's head: two calls give the same."""
    row = models.find("dots3-note").calls[1]
    args, keywords = cover.arguments(row, seed=4)
    _, whole = reference.qk_norm_rope(*args, **keywords)
    k, weight, positions, scale = args[1], args[3], args[4], keywords["k_scale"]
    parts = []
    for spec, part in zip(split(row.spec), (slice(0, 512), slice(512, None)), strict=True):
        own = positions if spec.rope else None
        call = (None, k[..., part], None, weight[part], own, spec)
        parts.append(reference.qk_norm_rope(*call, k_scale=scale[part])[1])
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-14, atol=1e-14)


TEXT = [e for e in ENTRIES if e.kind not in ("dit", "enc")]


@pytest.mark.parametrize("entry", TEXT, ids=lambda entry: entry.model)
def test_entry_of_a_text_model_is_that_of_its_config(entry: Entry) -> None:
    """`Spec.from_config`, which is tested against the modules, gives the calls of the entry."""
    if {*entry.code} <= ELSEWHERE:
        assert not {*entry.code} & {*CONFIG_MAPPING}, "shipped now: write a Family for it"
        return
    known = [spec for code in entry.code for spec in of_configs(code)]
    known += [part for spec in known for part in split(spec)]
    for call in entry.calls:
        own = meaning(upstream(call), call.takes)
        assert own in {meaning(spec, call.takes) for spec in known}, (call.label, own)


def test_every_architecture_is_tested() -> None:
    """Each entry's code has a Family or an adapter in the upstream tests, or is not shipped."""
    tested = {family.model_type for family in FAMILIES} | {"muse_glimmer_assistant"}
    for entry in ENTRIES:
        if entry.kind in ("dit", "enc"):
            assert ALIKE.get(entry.model, entry.model) in MODULES, entry.model
            for code in entry.code if entry.kind == "dit" else ():
                importlib.import_module(f"diffusers.models.transformers.{code}")
        else:
            assert {*entry.code} <= tested | ELSEWHERE, entry.model


def test_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found] == [entry.model for entry in ENTRIES]
    covered = sum(row["covered"] for row in found)
    assert lines[-1] == f"{covered} of {len(ENTRIES)}"
    for row, entry in zip(found, ENTRIES, strict=True):
        assert row["covered"] is (row["reason"] is None) is (models.reason(entry) is None)
        assert row["spec"] == entry.describe() and "\n" not in row["spec"]
        assert [Spec.from_canonical(text) for text in row["specs"]] == [c.spec for c in entry.calls]
        assert any(entry.model in line for line in lines)


def test_a_kind_and_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--kind", "index", "--json"]) == 0
    assert {row["kind"] for row in json.loads(capsys.readouterr().out)} == {"index"}
    assert main(["models", "--kind", "robot"]) == 2
    assert "--kind" in capsys.readouterr().err
    assert main(["models", "--device", "abacus"]) == 2
    if not torch.cuda.is_available():
        assert main(["models", "--device", "cuda"]) == 1
        assert "got 'cuda'" in capsys.readouterr().err


def test_a_refusal_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Covered follows what the kernels say now."""
    entry = models.find("MiniMax-M3")
    assert models.reason(entry) is None

    def refuse(*args: object, **keywords: object) -> None:
        raise ValueError("spec: no kernel runs this")

    monkeypatch.setattr(qkrope.ops, "qk_norm_rope", refuse)
    assert models.reason(entry) == "attention: spec: no kernel runs this"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("takes", "kv"),
        ("q_scale", "often"),
        ("rounding", "G/b"),
        ("positions", "none"),
        ("spec", 3),
    ],
)
def test_a_call_is_checked(field: str, value: object) -> None:
    call = models.find("Qwen3-8B").calls[0]
    with pytest.raises((ValueError, TypeError), match=f"Call.{field}"):
        replace(call, **{field: value})
