"""The first qkrope call of a process, timed: a script that bench/host.py runs, not a module.

``python first_call.py DEVICE FOLDER NAME``: makes the inputs and the CUDA context, writes
FOLDER/NAME.ready, waits for FOLDER/go, and times from ``import qkrope`` to the synchronised result,
which goes to FOLDER/NAME.pt. It imports nothing of qkrope before the clock runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

HEADS, HEAD_DIM, THETA, TOKENS = (32, 8, 8), 128, 1e6, 17


def inputs(device: str) -> dict[str, torch.Tensor]:
    """Random inputs of the call, the same in every process."""
    rng = torch.Generator().manual_seed(11)
    tensors = {
        "qkv": torch.randn(TOKENS, sum(HEADS) * HEAD_DIM, generator=rng).bfloat16(),
        "q_weight": torch.rand(HEAD_DIM, generator=rng).bfloat16(),
        "k_weight": torch.rand(HEAD_DIM, generator=rng).bfloat16(),
        "positions": torch.randint(0, 131072, (TOKENS,), generator=rng),
    }
    return {name: x.to(device) for name, x in tensors.items()}


def main(device: str, folder: str, name: str) -> None:
    """Wait for the others, then time."""
    here = Path(folder)
    given: dict[str, Any] = {**inputs(device)}

    def synchronize() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    synchronize()
    loaded = set(sys.modules)
    (here / f"{name}.ready").touch()
    while not (here / "go").exists():
        time.sleep(2e-4)
    start = time.perf_counter()
    import qkrope

    spec = qkrope.Spec(*HEADS[:2], HEAD_DIM, rope=qkrope.Rope(theta=THETA))
    call = qkrope.qkv_norm_rope_
    imported = time.perf_counter()
    call(**given, spec=spec)
    synchronize()
    end = time.perf_counter()
    result: dict[str, Any] = {
        "seconds": end - start,
        "import_seconds": imported - start,
        "compiled": "cuda.bindings.nvrtc" in set(sys.modules) - loaded,
        "qkv": given["qkv"].cpu(),
    }
    torch.save(result, here / f"{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
