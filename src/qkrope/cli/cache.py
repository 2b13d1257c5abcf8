"""`qkrope cache`: where compiled GPU kernels are kept, what is there, and away with it."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

from .common import OK, Output


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("cache", parents=[common], help="path, list or clear the cache")
    parser.add_argument(
        "action",
        choices=("path", "list", "clear"),
        help="say where it is, list what is there, or delete that",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Do the action."""
    from qkrope.cuda import cache as disk

    if args.action == "path":
        out.result({"path": str(disk.directory())})
        out.text(str(disk.directory()))
    elif args.action == "clear":
        removed = disk.clear()
        out.result({"path": str(disk.directory()), "removed": removed})
        out.text(f"{removed} entries removed from {disk.directory()}")
    else:
        entries = [_entry(path) for path in disk.entries()]
        out.result({"path": str(disk.directory()), "entries": entries})
        columns = ["entry", "bytes", "written", "kernels: registers"]
        rows = [
            [e["key"][:16], str(e["bytes"]), e["written"], _kernels(e["registers"])]
            for e in entries
        ]
        out.table(f"{disk.directory()}: {len(entries)} entries", columns, rows)
    return OK


def summary() -> dict[str, Any]:
    """Path, number of entries and their size."""
    from qkrope.cuda import cache as disk

    sizes = [path.stat().st_size for path in disk.entries()]
    return {"path": str(disk.directory()), "entries": len(sizes), "bytes": sum(sizes)}


def _entry(path: Any) -> dict[str, Any]:
    from qkrope.cuda import cache as disk
    from qkrope.cuda.compile import parse_log

    info = path.stat()
    entry = disk.read(path.stem)
    registers = None
    if entry is not None:
        registers = {name: used.registers for name, used in parse_log(entry.log).items()}
    return {
        "key": path.stem,
        "bytes": info.st_size,
        "written": datetime.fromtimestamp(info.st_mtime, UTC).isoformat(timespec="seconds"),
        "registers": registers,  # null: the entry is damaged and will be compiled again
    }


def _kernels(registers: dict[str, int] | None) -> str:
    if registers is None:
        return "damaged"
    return ", ".join(f"{name}: {count}" for name, count in registers.items())
