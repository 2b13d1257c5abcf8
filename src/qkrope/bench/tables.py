"""The benchmark tables of the README and the documentation, written from the records.

`python -m qkrope.bench.tables FILE.md...` replaces what stands between `<!-- bench:cpu -->` and
`<!-- /bench:cpu -->` by a table of the newest records, and the same with cuda, peers, bars, host,
training and check; cpu-first and cuda-first are those of the first production shape alone.
`--check` changes nothing and exits 1 if a file is out of date. Between `<!-- models -->` and
`<!-- /models -->` comes the catalogue, with what this machine's CPU kernels run; between those of
commands what the `qkrope` command takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from . import records
from .records import Record
from .shapes import PRODUCTION_SHAPES
from .tables_commands import render_commands
from .tables_json import Line, render_check, render_host, render_training

KINDS = ("cpu", "cuda")
_ORDER = {shape.name: index for index, shape in enumerate(PRODUCTION_SHAPES)}


def newest(found: Sequence[Record]) -> list[Record]:
    """The last record of each case, in the order of the production shapes."""
    latest = {record.key: record for record in sorted(found, key=lambda r: r.time)}
    return sorted(
        latest.values(),
        key=lambda r: (_ORDER.get(r.shape, len(_ORDER)), r.shape, r.tokens, r.cache),
    )


def render(found: Sequence[Record], kind: str) -> str:
    """One table for each machine, level and dtype, with its provenance under it."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in newest(found):
        if record.device == kind:
            key = (record.device_name, record.isa or "", record.dtype, str(record.threads))
            groups.setdefault(key, []).append(record)
    if not groups:
        return f"No {kind} record yet.\n"
    return "\n".join(_table(group) for _, group in sorted(groups.items()))


def _table(group: Sequence[Record]) -> str:
    with_compile = any("speedup" in r.baselines.get("compile", {}) for r in group)
    with_cache = any(r.cache != "same" for r in group)
    head = ["model", "q/k/v heads", "tokens", *(["cache"] if with_cache else [])]
    head += ["us", "GB/s", "share of sweep", "vs eager"]
    head += [*(["vs torch.compile"] if with_compile else []), "worst error, ulp"]
    left = 2
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(["---"] * left + ["---:"] * (len(head) - left)) + "|",
    ]
    for r in group:
        cells = [r.shape, r.heads, str(r.tokens), *([r.cache] if with_cache else [])]
        cells += [f"{r.us:.4g}", f"{r.gbps:.4g}", f"{100 / r.ratio:.0f}%" if r.ratio else "-"]
        cells += [_speedup(r, "eager"), *([_speedup(r, "compile")] if with_compile else [])]
        ulp = "infinite" if r.worst_ulp is None else f"{r.worst_ulp:.3f}"
        cells.append(ulp if r.passed else f"{ulp} (over the bound)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _provenance(group), ""])


def _provenance(group: Sequence[Record]) -> str:
    first = group[0]
    parts = [first.device_name, first.isa or "", first.dtype]
    if first.threads:
        parts.append(f"{first.threads} threads")
    if first.driver:
        parts.append(f"driver {first.driver}")
    parts.append(f"torch {_several(r.torch for r in group)}")
    parts.append(f"qkrope {_several(r.qkrope for r in group)}")
    parts.append(f"commit {_several(r.commit for r in group)}")
    return ", ".join(part for part in parts if part) + "."


def _several(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


def _speedup(record: Record, name: str) -> str:
    result = record.baselines.get(name, {})
    return f"{result['speedup']:.1f}x" if "speedup" in result else "-"


def render_peers(found: Sequence[Record]) -> str:
    """Other libraries' kernels on CUDA: time over ours and worst error, then who refused what."""
    rows = newest([r for r in found if r.device == "cuda" and _peers(r)])
    if not rows:
        return "No record yet.\n"
    names = list(dict.fromkeys(name for r in rows for name in r.baselines))
    head = ["model", "q/k/v heads", "tokens", "cache", "qkrope, us", *names]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    refused: dict[str, list[str]] = {}
    for r in rows:
        cells = [r.shape, r.heads, str(r.tokens), r.cache, f"{r.us:.4g}"]
        for name in names:
            result = r.baselines.get(name, {})
            if "speedup" in result:
                error = "not checked"
                if "worst_ulp" in result:
                    worst = result["worst_ulp"]
                    error = "infinite" if worst is None else f"{worst:.3g}"
                cells.append(f"{result['speedup']:.2f}x ({error})")
                continue
            cells.append("-")
            if "error" in result:
                refused.setdefault(f"{name}: {result['error']}", []).append(r.shape)
        lines.append("| " + " | ".join(cells) + " |")
    every = {r.shape for r in rows}
    notes = ["Time over ours; in brackets the worst error in ulps of the rotated pair."]
    for why, shapes in refused.items():
        which = "" if set(shapes) == every else f" ({', '.join(dict.fromkeys(shapes))})"
        notes.append(f"{why}{which}.")
    return "\n".join([*lines, "", " ".join(notes), "", _provenance(rows), ""])


def _peers(record: Record) -> bool:
    """Whether other libraries were asked for, which no plain run does."""
    return any("worst_ulp" in result for result in record.baselines.values())


def render_bars(found: Sequence[Line]) -> str:
    """The table of `python -m qkrope.bench.bars`, the last line of each case."""
    if not found:
        return "No record yet.\n"
    latest = {row["case"]: row for row in found}
    lines = ["| case | us | sweep, us | ratio | bar |", "|---|---:|---:|---:|---:|"]
    for case, row in latest.items():
        bar = "-" if row["bar"] is None else row["bar"]
        numbers = f"{row['us']:.2f} | {row['sweep_us']:.2f} | {row['ratio']:.3f} | {bar}"
        lines.append(f"| {case} | {numbers} |")
    names = ("device_name", "isa", "driver", "torch", "qkrope", "commit")
    facts = {name: _several(str(row[name]) for row in latest.values()) for name in names}
    where = (
        "{device_name}, {isa}, driver {driver}, torch {torch}, qkrope {qkrope}, commit {commit}."
    )
    return "\n".join([*lines, "", where.format(**facts), ""])


@cache
def render_models() -> str:
    """The catalogue, one line a family and the count under it."""
    from qkrope.cli.models import rows

    found = rows()
    families: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found:
        why = "yes" if row["covered"] else f"no: {row['reason']}"
        families.setdefault((row["family"], row["shape"], why), []).append(row)
    lines = ["| models | what is done to q, k and v | run |", "|---|---|---|"]
    for (_, shape, why), members in families.items():
        names = ", ".join(row["model"] for row in members)
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in (names, shape, why)) + " |"
        )
    count = f"{sum(row['covered'] for row in found)} of {len(found)} models."
    return "\n".join([*lines, "", count, ""])


def rewrite(
    text: str,
    found: Sequence[Record],
    bars: Sequence[Line] = (),
    peers: Sequence[Record] = (),
    host: Sequence[Line] = (),
    checks: Sequence[Line] = (),
    training: Sequence[Line] = (),
) -> str:
    """The text with every marked table replaced; ValueError for a marker without its end."""
    first = [r for r in found if r.shape == PRODUCTION_SHAPES[0].name]
    tables: dict[str, Callable[[], str]] = {
        **{f"bench:{kind}": partial(render, found, kind) for kind in KINDS},
        **{f"bench:{kind}-first": partial(render, first, kind) for kind in KINDS},
        "bench:peers": partial(render_peers, peers),
        "bench:bars": partial(render_bars, bars),
        "bench:host": partial(render_host, host),
        "bench:check": partial(render_check, checks),
        "bench:training": partial(render_training, training),
        "models": render_models,
        "commands": render_commands,
    }
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start not in text and end not in text:
            continue
        before, _, rest = text.partition(start)
        _, closing, after = rest.partition(end)
        if not closing:
            raise ValueError(f"{start}: expected {end} after it")
        text = f"{before}{start}\n{table()}{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m qkrope.bench.tables", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="file")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of *.jsonl"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        print(f"--results: {args.results} is not a folder", file=sys.stderr)
        return 2
    found, peers = (
        [r for path in _files(folder) for r in records.read(path)]
        for folder in (args.results, args.results / "peers")
    )
    bars, host, training = (
        [json.loads(line) for path in _files(args.results / name) for line in _lines(path)]
        for name in ("bars", "host", "training")
    )
    checks = [json.loads(path.read_text()) for path in _files(args.results / "check", "json")]
    stale = 0
    for file in args.files:
        old = file.read_text()
        new = rewrite(old, found, bars, peers, host, checks, training)
        if new == old:
            continue
        if not args.check:
            file.write_text(new)
            continue
        stale = 1
        print(f"{file}: its bench tables are not those of {args.results}", file=sys.stderr)
    return stale


def _files(folder: Path, kind: str = "jsonl") -> list[Path]:
    return sorted(folder.glob(f"*.{kind}"))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


if __name__ == "__main__":
    sys.exit(main())
