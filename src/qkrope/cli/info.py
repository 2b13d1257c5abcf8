"""`qkrope info`: devices, instruction levels, versions, cache, environment variables."""

from __future__ import annotations

import argparse
import os
from typing import Any

from .common import OK, Output

_PACKAGES = (
    "qkrope",
    "torch",
    "apache-tvm-ffi",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "rich",
    "safetensors",
    "matplotlib",
    "transformers",
)
_VARIABLES = ("QKROPE_ISA", "QKROPE_CACHE_DIR", "QKROPE_COMMIT", "OMP_NUM_THREADS")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("info", parents=[common], help="devices, versions, cache")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Print what this machine offers."""
    facts = gather()
    out.result(facts)
    cpu = facts["cpu"]
    rows = [["cpu", cpu["name"]], ["cpu level", cpu["isa"] or cpu["problem"]]]
    rows += [["cpu levels available", ", ".join(cpu["available"]) or "-"]]
    rows += [["threads", str(cpu["threads"])]]
    if not facts["cuda"]:
        rows.append(["cuda devices", "none"])
    for index, gpu in enumerate(facts["cuda"]):
        parts = (
            gpu["name"],
            gpu["arch"],
            f"{gpu['multiprocessors']} SMs",
            f"{gpu['memory_gib']} GiB",
        )
        rows.append([f"cuda:{index}", ", ".join(parts)])
    rows.append(["driver", facts["driver"] or "none"])
    rows.append(["nvrtc", facts["nvrtc"] or "not importable"])
    rows += [[name, version or "not installed"] for name, version in facts["versions"].items()]
    cache = facts["cache"]
    rows.append(["cache", f"{cache['path']} ({cache['entries']} entries, {cache['bytes']} bytes)"])
    rows += [[name, value or "not set"] for name, value in facts["environment"].items()]
    out.table("qkrope", ["", "found"], rows, right=False)
    return OK


def gather() -> dict[str, Any]:
    """All facts as plain values."""
    import torch

    from qkrope.bench import machine
    from qkrope.bench.records import cpu_name

    from .cache import summary

    try:
        isa, levels, problem = machine.cpu_isa(), machine.cpu_levels(), None
    except (ImportError, ValueError) as error:  # not built, or QKROPE_ISA asks too much
        isa, levels, problem = None, [], str(error)
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": isa,
            "available": levels,
            "problem": problem,
        },
        "cuda": [_gpu(index) for index in devices],
        "driver": machine.driver_version(),
        "nvrtc": nvrtc_version(),
        "versions": {name: machine.package_version(name) for name in _PACKAGES},
        "cache": summary(),
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    props = torch.cuda.get_device_properties(index)
    return {
        "name": props.name,
        "arch": f"sm_{props.major}{props.minor}",
        "multiprocessors": props.multi_processor_count,
        "memory_gib": round(props.total_memory / 2**30, 1),
        "l2_bytes": props.L2_cache_size,
    }


def nvrtc_version() -> str | None:
    """The version of the NVRTC that would compile, or None where none loads."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception:  # a missing library raises what its loader raises
        return None
    return f"{major}.{minor}" if int(status) == 0 else None
