"""Every family of transformers that `patch` takes: q and k at attention, and the model's result.

float32: qkrope is within 2^-19 of an output's terms, the model's chain of at most six roundings
within 6 * 2^-24 of them, and no term of these rotations is more than twice the largest output:
together below 2^-17 of that. bfloat16 with rounding="upstream": the same bits, but for the rare
value so near to a tie that the order of a sum decides; one an output is let pass, by one step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from qkrope.integrations.transformers import patch, unpatch
from transformers_models import FAMILIES, attend, rows_of, small, watched_calls
from upstream import compare_bits
from upstream_transformers import Family

DOCS = Path(__file__).parents[1] / "docs" / "integrations" / "transformers.md"
FP32, BF16 = torch.float32, torch.bfloat16


def row_of(family: Family, said: dict[str, str]) -> str:
    """A family's row in the table of the documentation."""
    calls = " or ".join(f"{text}" for text in sorted({*said.values()}))
    return f"| `{family.id}` | {family.attention} | {calls} |"


@pytest.mark.filterwarnings("ignore:qkrope leaves as they are")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.id)
def test_family(family: Family, device: str) -> None:
    for dtype in (FP32, BF16):
        model = small(family, dtype, device)
        before, result = attend(family, model)
        report = patch(model, rounding="once" if dtype == FP32 else "upstream")
        names = {
            name for name, module in model.named_modules() if module in {s.module for s in before}
        }
        assert names <= {*report.patched, *report.left}
        with watched_calls() as calls:
            after, patched = attend(family, model)
        # A call more or less would be a norm or a rotation that is done twice, or not at all.
        assert calls[0] == sum(text.count(",") + 1 for text in report.patched.values())
        for old, new in zip(before, after, strict=True):
            for x, y in ((old.q, new.q), (old.k, new.k)):
                same(y, x)
        if dtype == FP32:
            assert float((patched - result).abs().max()) <= 1e-4 * float(result.abs().max())
            assert row_of(family, dict(report.patched)) in rows_of(DOCS.read_text(), "families")
        assert unpatch(model) == len(report.patched)
        assert torch.equal(attend(family, model)[1], result)


def same(y: Tensor | None, x: Tensor | None) -> None:
    """One attention input, patched and not."""
    assert x is not None and y is not None
    if x.dtype == BF16:
        compare_bits(y, x, exact=False, share=1.5 / x.numel())
    else:
        assert float((y - x).abs().max()) <= 2**-17 * float(x.abs().max())


WRAPPERS = (
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_asr", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4"),
    *("gemma4_unified", "embedding_gemma2", "t5gemma2", "minimax_m3_vl", "llama4", "exaone4_5"),
    *("lfm2_vl", "lfm3_vl", "muse_spark", "muse_glimmer", "molmo2", "kimi_k25", "dots3_note"),
    "mistral_large4",
)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_whole_models_at_their_own_size(model_type: str) -> None:
    """Whole models of the default config, without memory: all their text layers, and no others."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = CONFIG_MAPPING[model_type]()
    names = (*MODEL_MAPPING_NAMES.items(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items())
    found = next(name for key, name in names if key == model_type)
    with torch.device("meta"):
        model = getattr(transformers, found)(config)
    report = patch(model)
    assert report.patched
    for reason in report.left.values():
        assert "is no text model" in reason or reason == "a layer without norm and rotation"


def test_the_table_has_no_other_rows() -> None:
    found = [row.split("`")[1] for row in rows_of(DOCS.read_text(), "families")]
    assert found == [family.id for family in FAMILIES]
