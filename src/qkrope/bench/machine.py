"""Facts about the machine and the versions, for records and `qkrope info`."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import torch

ISA_LEVELS = ("scalar", "neon", "avx2", "avx512", "avx512bf16")


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or cuda where there is one, or cpu. ValueError if it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise ValueError(f"device: got {name!r}, but {count} CUDA devices are available")
        device = torch.device("cuda", index)
    return device


def driver_version() -> str | None:
    """The version of the NVIDIA kernel driver, e.g. 580.65.06; None without one."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return _driver_from_nvml()
    return next((w for w in words if w.count(".") >= 1 and w.replace(".", "").isdigit()), None)


def _driver_from_nvml() -> str | None:
    import subprocess

    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def qkrope_version() -> str:
    """The version of this package."""
    return package_version("qkrope") or "unknown"


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a record that describe the machine."""
    from .records import commit, cpu_name

    common = {
        "device": device.type,
        "torch": torch.__version__,
        "qkrope": qkrope_version(),
        "commit": commit(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return common | {
            "device_name": torch.cuda.get_device_name(device),
            "driver": driver_version(),
            "isa": f"sm_{major}{minor}",
            "threads": None,
        }
    return common | {
        "device_name": f"{cpu_name()} ({os.cpu_count()} cores)",
        "driver": None,
        "isa": cpu_isa(),
        "threads": torch.get_num_threads(),
    }


def cpu_isa() -> str:
    """The instruction level the CPU kernels run at; ValueError if QKROPE_ISA asks for another."""
    from qkrope import _native

    return str(_native.lib().cpu_isa())


def cpu_levels() -> list[str]:
    """The levels that this machine runs, the plainest first."""
    from qkrope import _native

    return [name for name in ISA_LEVELS if _native.lib().cpu_supported(name)]
