"""Rewrite the table of families in docs/integrations/transformers.md: what `patch` says of each.

Run it with the packages of the test extra; tests/test_transformers_families.py holds the table to
the same models.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    """One row a family."""
    import torch

    from qkrope.integrations.transformers import patch
    from test_transformers_families import DOCS, row_of
    from transformers_models import FAMILIES, small

    warnings.simplefilter("ignore")
    rows = [
        row_of(family, dict(patch(small(family, torch.float32, "cpu")).patched))
        for family in FAMILIES
    ]
    text = DOCS.read_text(encoding="utf-8")
    head, rest = text.split("<!-- families -->")
    tail = rest.split("<!-- /families -->")[1]
    titles = "| model_type | attention module | calls of qkrope in a layer |\n|---|---|---|"
    table = "\n".join(["<!-- families -->", titles, *rows, "<!-- /families -->"])
    DOCS.write_text(head + table + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
