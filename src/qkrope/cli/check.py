"""`qkrope check`: the error by position decade, next to what unfused and fp32-angle code does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import (
    FAILED,
    OK,
    Output,
    UsageError,
    add_spec_flags,
    describe,
    dtype_name,
    spec_from,
    torch_dtype,
)

if TYPE_CHECKING:
    from qkrope.bench.decades import Decade


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("check", parents=[common], help="report accuracy by position")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", type=dtype_name, default="bfloat16", help="bf16, fp16, fp32")
    parser.add_argument("--rows", type=int, default=64, help="positions a decade (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random rows (default 0)")
    add_spec_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure every decade; exit 1 if qkrope violates the criterion in one."""
    if args.rows < 2:
        raise UsageError(f"--rows: got {args.rows}, expected at least 2")
    from qkrope.bench import decades
    from qkrope.bench.machine import environment, pick_device

    spec = spec_from(args)
    device = pick_device(args.device)
    found: list[Decade] = []
    with out.progress() as bar:
        task = bar.add_task("check", total=len(decades.ranges()))
        for decade in decades.measure(
            spec, torch_dtype(args.dtype), device, rows=args.rows, seed=args.seed
        ):
            found.append(decade)
            bar.update(task, advance=1, description=decade.label)
    passed = all(decade.errors["qkrope"].passed for decade in found)
    out.result(
        {
            "passed": passed,
            "spec": spec.canonical(),
            "dtype": args.dtype,
            **environment(device),
            "decades": [_plain(decade) for decade in found],
        }
    )
    methods = list(decades.METHODS)
    columns = ["positions"]
    columns += [f"{name}: error" for name in methods]
    columns += [f"{name}: ulp" for name in methods] + [f"{name}: exact" for name in methods]
    rows = [
        [
            decade.label,
            *(f"{decade.errors[m].worst:.3g}" for m in methods),
            *(f"{decade.errors[m].pair_ulp:.3g}" for m in methods),
            *(f"{100 * decade.errors[m].correct:.2f}%" for m in methods),
        ]
        for decade in found
    ]
    out.table(f"{describe(spec)}, {args.dtype} on {device}", columns, rows)
    out.text(
        "error: worst element in units of the acceptance criterion (met up to 1). "
        "ulp: worst error in ulps of the rotated pair. exact: share of correctly rounded elements."
    )
    out.text(f"the criterion is {'met' if passed else 'MISSED'} by qkrope")
    return OK if passed else FAILED


def _plain(decade: Decade) -> dict[str, Any]:
    methods = {name: errors.plain() for name, errors in decade.errors.items()}
    return {"first": decade.first, "last": decade.last, "methods": methods}
