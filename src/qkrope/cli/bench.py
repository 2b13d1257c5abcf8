"""`qkrope bench`: time, bandwidth, ratio to the memory sweep, speed-up, worst error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench_peers
from .common import FAILED, OK, Output, UsageError, dtype_name, token_list, torch_dtype

if TYPE_CHECKING:
    from qkrope.bench.records import Record
    from qkrope.bench.runner import Plan
    from qkrope.bench.shapes import Shape


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("bench", parents=[common], help="measure speed and worst error")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--shape", action="append", metavar="NAME", help="repeatable; default all")
    parser.add_argument("--config", action="append", metavar="FILE", help="a config.json instead")
    parser.add_argument("--tokens", type=token_list, metavar="N,N,...", help="default 1,256,4096")
    parser.add_argument("--dtype", type=dtype_name, default="bfloat16", help="bf16, fp16, fp32")
    parser.add_argument(
        "--baselines",
        help="of eager,compile,compile-inplace (default: the first two, with --peers all) or none",
    )
    parser.add_argument(
        "--peers",
        nargs="?",
        const="",
        metavar="DIR",
        help="other libraries too: installed, or from the folder that tools/fetch_peers.py filled",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="each baseline and peer once, against the oracle, without timing",
    )
    parser.add_argument(
        "--full", action="store_true", help="all token counts, torch.compile and oracle everywhere"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the records")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the records")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure, print, record; exit 1 if a result misses the criterion."""
    if args.plot:
        _need_matplotlib()
    from qkrope.bench import records, runner

    plan = _plan(args)
    if args.dry_run:
        return bench_peers.dry_run(plan, out)
    out.note(f"device {plan.device}, {args.dtype}, {len(plan.cases())} cases")
    found: list[Record] = []
    with out.progress() as bar:
        task = bar.add_task("bench", total=len(plan.cases()))
        for record in runner.run(plan, out.note):
            found.append(record)
            if args.out:
                records.append(args.out, [record])
            bar.update(task, advance=1, description=f"{record.shape} {record.tokens}")
    if args.plot:
        from qkrope.bench.plots import draw

        draw(found, args.plot)
        out.note(f"plot: {args.plot}")
    passed = all(record.passed for record in found)
    out.result({"passed": passed, "records": [records.to_dict(record) for record in found]})
    _print(found, out)
    if plan.peers:
        bench_peers.print_peers(found, out)
    if not passed:
        bad = sorted({f"{r.shape}, {r.tokens} tokens" for r in found if not r.passed})
        out.note(f"the criterion is missed by: {'; '.join(bad)}")
    return OK if passed else FAILED


def _plan(args: argparse.Namespace) -> Plan:
    from qkrope.bench import runner, shapes
    from qkrope.bench.baselines import BASELINES
    from qkrope.bench.machine import pick_device

    selected: list[Shape] = []
    if args.config:
        try:
            selected += [shapes.shape_from_config(path) for path in args.config]
        except OSError as error:
            raise UsageError(f"--config: {error}") from None
    if args.shape or not args.config:
        selected += shapes.find_shapes(args.shape)
    peers = bench_peers.peers_from(args.peers)
    default = "eager,compile,compile-inplace" if peers or args.dry_run else "eager,compile"
    given = default if args.baselines is None else args.baselines
    names = [n for n in given.split(",") if n and n != "none"]
    if unknown := [name for name in names if name not in BASELINES]:
        raise UsageError(f"--baselines: got {unknown[0]}, expected of {', '.join(BASELINES)}")
    compiled = selected if args.full or peers else selected[:1]
    device = pick_device(args.device)
    return runner.Plan(
        shapes=selected,
        tokens=args.tokens or (shapes.FULL_TOKENS if args.full else shapes.DEFAULT_TOKENS),
        dtype=torch_dtype(args.dtype),
        device=device,
        baselines=names,
        peers=peers,
        check_baselines=bool(peers),
        compile_shapes=frozenset(shape.name for shape in compiled),
        oracle_rows=None if args.full else 256,
        rounds=50 if args.full else 25,
        baseline_rounds=7 if args.full or device.type == "cuda" else 3,
    )


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("--plot: matplotlib is not installed (the extra qkrope[bench] has it)")


def _speedup(record: Record, name: str) -> str:
    result = record.baselines.get(name)
    if result is None:
        return "-"
    return f"{result['speedup']:.1f}x" if "speedup" in result else "failed"


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3f}"


def _print(found: list[Record], out: Output) -> None:
    if not found:
        return
    first = found[0]
    columns = ["shape", "q/k/v heads", "tokens", "cache", "us", "GB/s", "of sweep", "vs eager"]
    columns += ["vs compile", "worst ulp", "of the bound"]
    rows = [
        [
            r.shape,
            r.heads,
            str(r.tokens),
            r.cache,
            f"{r.us:.2f}",
            f"{r.gbps:.1f}" if r.gbps < 100 else f"{r.gbps:.0f}",
            f"{100 / r.ratio:.0f}%" if r.ratio else "-",
            _speedup(r, "eager"),
            _speedup(r, "compile"),
            _number(r.worst_ulp),
            _number(r.worst_error) + ("" if r.passed else " MISSED"),
        ]
        for r in found
    ]
    place = f"{first.device_name}, {first.isa}"
    if first.threads:
        place += f", {first.threads} threads"
    out.table(f"{first.op} {first.dtype}: {place}", columns, rows)
    out.text(
        "us: median. of sweep: speed as a share of an in-place sweep of the same bytes. worst ulp: "
        "error in ulps of the rotated pair. of the bound: error over the acceptance criterion's "
        "bound, met up to 1."
    )
