"""What one benchmark result holds. A record is one JSON line; this file is its schema."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One measured case."""

    op: str  # the public call that was timed
    shape: str  # a name of PRODUCTION_SHAPES or of a config file
    spec: str  # Spec.canonical()
    heads: str  # q/k/v heads x head_dim
    rotary_dim: int
    pairing: str
    tokens: int
    dtype: str
    cache: str  # CPU: the "same" tensor every time; CUDA: "hot" (two buffers), "cold" (>= 300 MB)
    device: str  # "cpu" or "cuda"
    device_name: str
    driver: str | None
    isa: str | None  # CPU instruction level, or sm_XX
    threads: int | None
    torch: str
    qkrope: str
    commit: str
    bytes: int  # Q and K read once and written once
    us: float  # median
    us_best: float  # best decile
    gbps: float  # bytes / us
    sweep_us: float | None  # the in-place memory sweep of the same columns, median
    sweep_pdl: bool | None  # CUDA: the sweep used programmatic dependent launch
    ratio: float | None  # median over rounds of us / sweep_us
    worst_error: float | None  # over the criterion's bound: passes up to 1; None: infinite
    worst_ulp: float | None  # in ulps of the rotated pair; 0.5 is the best there is
    correct: float  # share of correctly rounded elements
    passed: bool
    oracle_rows: int
    repeats: int
    launches: int | None  # CUDA: launches a graph
    # name -> {"us", "speedup" (its time over ours), "repeats"} or {"error"}; where it was checked
    # against the oracle also {"worst_error", "worst_ulp"}, as above. Peers are among them.
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    @property
    def key(self) -> tuple[str | int | None, ...]:
        """A newer record of the same key replaces an older one in tables."""
        machine = (self.device, self.device_name, self.isa, self.threads)
        return (*machine, self.shape, self.dtype, self.cache, self.tokens)


_FIELDS = {f.name for f in dataclasses.fields(Record)}


def to_dict(record: Record) -> dict[str, Any]:
    """The JSON object of a record."""
    return dataclasses.asdict(record)


def from_dict(data: dict[str, Any]) -> Record:
    """A record from its JSON object; ValueError if it is not one of this schema."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"record schema: got {data.get('schema')!r}, expected {SCHEMA}")
    if wrong := _FIELDS ^ set(data):
        raise ValueError(f"record fields: {', '.join(sorted(wrong))} missing or unknown")
    return Record(**data)


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a JSONL file, making it and its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(to_dict(record), allow_nan=False) + "\n")


def read(path: Path) -> list[Record]:
    """All records of a JSONL file."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(from_dict(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from None
    return found


@cache
def commit() -> str:
    """The source revision: QKROPE_COMMIT, else git's where this file is tracked, else "unknown"."""
    if given := os.environ.get("QKROPE_COMMIT"):
        return given
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(here.parent), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no", ":/src")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """The processor's model name."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
