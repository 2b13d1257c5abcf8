"""`qkrope models`: the catalogue, and which models the kernels run."""

from __future__ import annotations

import argparse
from typing import Any

from .common import OK, Output

KINDS = ("llm", "vlm", "mla", "index", "enc", "dit")
DEVICES = ("cpu", "cuda")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "models",
        parents=[common],
        help="released models as Specs, and whether the kernels run them",
        description="Every call of every model runs on a few tokens: that is what covered means.",
    )
    parser.add_argument(
        "--device", default="cpu", choices=DEVICES, help="whose kernels (default cpu)"
    )
    parser.add_argument("--kind", choices=KINDS, help="these alone (default all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the table; its last line is the count."""
    found = rows(args.device, args.kind)
    out.result(found)
    columns = ["model", "spec", "covered"]
    cells = [
        [r["model"], r["spec"], "yes" if r["covered"] else f"no: {r['reason']}"] for r in found
    ]
    out.table(f"models, {args.device} kernels", columns, cells, right=False)
    out.text(f"{sum(r['covered'] for r in found)} of {len(found)}")
    return OK


def rows(device: str = "cpu", kind: str | None = None) -> list[dict[str, Any]]:
    """One plain object a model; ``specs`` are the canonical texts of its calls.

    ``shape`` is ``spec`` without head counts and theta: what models of a family share.
    """
    from qkrope.models import entries, reason

    found = []
    for entry in entries():
        if kind not in (None, entry.kind):
            continue
        why = reason(entry, device)
        found.append(
            {
                "model": entry.model,
                "family": entry.family,
                "kind": entry.kind,
                "spec": entry.describe(),
                "shape": entry.describe(sizes=False),
                "covered": why is None,
                "reason": why,
                "specs": [call.spec.canonical() for call in entry.calls],
            }
        )
    return found
