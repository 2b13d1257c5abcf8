"""The bars of the host: what a call costs above the driver's own launch, and what the first costs.

``python -m qkrope.bench.host`` prints the table and exits 1 if a bar is missed, 2 without a GPU.
One process times the eager call and ``torch.ops`` in turns with ``cuLaunchKernel`` of a kernel that
does nothing, its arguments packed beforehand; new processes time a first call on an empty and on a
filled cache, and eight of them at once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

import qkrope

from . import first_call, timing
from .driver import function, load, ok
from .errors import compare, exact_and_terms
from .machine import environment

CALLS = 50  # in a row, from an empty queue: a queue holds a thousand, so no call waits for the GPU
ROUNDS = 301
REPEATS = 5
PROCESSES = 8
START_S = 300.0  # for the processes to import torch and make their contexts

Calls = Mapping[str, Callable[[], object]]
Result = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One figure, and the bar that it must not exceed (None: only reported)."""

    case: str
    value: float
    unit: str
    bar: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is within the bar."""
        return self.bar is None or self.value <= self.bar

    def line(self) -> str:
        """A row of the table."""
        bar = "" if self.bar is None else f"bar {self.bar:g}  {'met' if self.met else 'MISSED'}"
        return f"{self.case:52s} {self.value:8.3f} {self.unit:2s}  {bar}".rstrip()


# ---- calls beside the driver's launch ---------------------------------------------------------

DRIVER, DRIVER_PDL, EAGER, OP, IDLE_OP, ADD = (
    "cuLaunchKernel",
    "cuLaunchKernelEx, PDL",
    "qkv_norm_rope_",
    "torch.ops.qkrope.qkv_norm_rope_",
    "a torch op of that schema that does nothing",
    "torch add_",
)
_ARGUMENTS = 16
NOTHING = f"""
extern "C" __global__ void nothing({", ".join(f"long long a{i}" for i in range(_ARGUMENTS))}) {{}}
"""
_alive: list[Any] = []  # packed arguments, which the driver is given by address; the op


def driver_calls(device: int) -> Calls:
    """Launches of a kernel that does nothing, arguments packed once, on the null stream."""
    from cuda.bindings import driver

    from ..cuda.compile import _nvrtc, arch_name

    cubin, _ = _nvrtc(NOTHING, arch_name(*torch.cuda.get_device_capability(device)))
    nothing = function(load(device, cubin), "nothing")
    values = (ctypes.c_longlong * _ARGUMENTS)()
    first, size = ctypes.addressof(values), ctypes.sizeof(ctypes.c_longlong)
    packed = (ctypes.c_void_p * _ARGUMENTS)(*range(first, first + size * _ARGUMENTS, size))
    _alive.append((values, packed))
    config = driver.CUlaunchConfig()
    config.gridDimX = config.gridDimY = config.gridDimZ = 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 128, 1, 1
    attribute = driver.CUlaunchAttribute()
    ids = driver.CUlaunchAttributeID
    attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.attrs, config.numAttrs = [attribute], 1
    at, null = ctypes.addressof(packed), driver.CUstream(0)
    calls = {
        DRIVER: partial(driver.cuLaunchKernel, nothing, 1, 1, 1, 128, 1, 1, 0, null, at, 0),
        DRIVER_PDL: partial(driver.cuLaunchKernelEx, config, nothing, at, 0),
    }
    for call in calls.values():
        ok(call())
    return calls


@cache
def _idle_op() -> Any:
    """What torch itself takes to get from a call of an op to Python and back."""
    library = torch.library.Library("qkrope_bench", "DEF")
    schema = torch.ops.qkrope.qkv_norm_rope_.default._schema
    library.define("nothing(" + str(schema).partition("(")[2])
    library.impl("nothing", lambda *_: None, "CompositeExplicitAutograd")
    library.impl("nothing", torch.library.fallthrough_kernel, "Autograd")
    _alive.append(library)
    return torch.ops.qkrope_bench.nothing.default


def torch_calls(device: str) -> Calls:
    """The call at one token, eager and as an op, an op that does nothing, and torch's own add_."""
    from .. import torch_op  # noqa: F401  registers the op

    q_heads, kv_heads, _ = first_call.HEADS
    spec = qkrope.Spec(q_heads, kv_heads, first_call.HEAD_DIM, rope=qkrope.Rope(theta=1e6))
    given = first_call.inputs(device)
    rest = (given["q_weight"], given["k_weight"], given["positions"][:1])
    qkv = given["qkv"][:1].clone()
    op = torch.ops.qkrope.qkv_norm_rope_.default
    return {
        EAGER: partial(qkrope.qkv_norm_rope_, qkv, *rest, spec),
        OP: partial(op, qkv, *rest, spec.canonical()),
        IDLE_OP: partial(_idle_op(), qkv, *rest, spec.canonical()),
        ADD: partial(qkv.clone().add_, torch.zeros_like(qkv)),
    }


def host_samples(calls: Calls, device: str, rounds: int = ROUNDS) -> dict[str, timing.Samples]:
    """Microseconds a call of each, by the host's clock, in turns."""

    def measure(call: Callable[[], object]) -> timing.Measure:
        def sample() -> float:
            call()  # the first after a wait is slower
            _synchronize(device)
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            return (time.perf_counter() - begin) / CALLS * 1e6

        return sample

    measures = {name: measure(call) for name, call in calls.items()}
    with torch.no_grad():
        return timing.interleaved(measures, rounds=rounds, budget_s=60.0)


def host_bars(samples: Mapping[str, timing.Samples]) -> list[Bar]:
    """Each median, and the differences that have a bar, taken round by round."""

    def above(name: str, base: str) -> float:
        return median(a - b for a, b in zip(samples[name].us, samples[base].us, strict=True))

    return [
        *(Bar(name, found.median, "us") for name, found in samples.items()),
        Bar(f"{EAGER} above {DRIVER}", above(EAGER, DRIVER), "us", 2.0),
        Bar(f"{EAGER} above {ADD}", above(EAGER, ADD), "us", 0.0),
        Bar(f"{OP} above {DRIVER}", above(OP, DRIVER), "us", 6.0),
    ]


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


# ---- first calls ------------------------------------------------------------------------------


def first_calls(device: str, cache: Path, count: int = 1) -> list[Result]:
    """What first_call.py says in each of ``count`` processes that start together."""
    script = Path(first_call.__file__)
    # As installed: with the bytecode of every module on disk, once a first process has written it.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environ["QKROPE_CACHE_DIR"] = str(cache)
    with TemporaryDirectory() as name:
        folder = Path(name)
        # -P: the script's folder has modules that are not meant to be found from there.
        command = (sys.executable, "-P", str(script), device, name)
        running = [subprocess.Popen((*command, str(i)), env=environ) for i in range(count)]
        try:
            deadline = time.monotonic() + START_S
            while len(list(folder.glob("*.ready"))) < count:
                if any(process.poll() is not None for process in running):
                    raise RuntimeError("a process ended before its first call")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{count} processes were not ready in {START_S:g} s")
                time.sleep(0.01)
            (folder / "go").touch()
            if codes := [code for process in running if (code := process.wait(START_S))]:
                raise RuntimeError(f"a first call ended with status {codes[0]}")
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [torch.load(folder / f"{i}.pt") for i in range(count)]


def is_right(result: Result) -> bool:
    """Whether a process computed what the oracle says, and left V alone."""
    q_heads, kv_heads, _ = first_call.HEADS
    dim, given = first_call.HEAD_DIM, first_call.inputs("cpu")
    spec = qkrope.Spec(q_heads, kv_heads, dim, rope=qkrope.Rope(theta=first_call.THETA))
    before, after = (
        x.unflatten(-1, (-1, dim)).split(list(first_call.HEADS), 1)
        for x in (given["qkv"], result["qkv"])
    )
    rest = (given["q_weight"], given["k_weight"], given["positions"])
    exact, terms = exact_and_terms(before[0], before[1], *rest, spec)
    errors = compare((after[0], after[1]), exact, terms, spec, torch.bfloat16)
    return errors.passed and torch.equal(before[2], after[2])


def broken_entries(cache: Path) -> int:
    """Entries of a cache folder that do not read back, and leftovers of unfinished ones."""
    from ..cuda import cache as disk

    files = list(cache.iterdir()) if cache.is_dir() else []
    return sum(f.suffix != ".cubin" or disk.parse(f.read_bytes()) is None for f in files)


def first_bars(device: str, repeats: int = REPEATS, processes: int = PROCESSES) -> list[Bar]:
    """Cold, warm, and many at once, after a call that nobody times: it writes the .pyc files."""
    with TemporaryDirectory() as name:
        caches = [Path(name) / str(i) for i in range(2 * repeats + 1)]
        first_calls(device, caches[0])
        cold = [first_calls(device, cache)[0] for cache in caches[1 : repeats + 1]]
        warm = [first_calls(device, caches[0])[0] for _ in range(repeats)]
        many = [first_calls(device, cache, processes) for cache in caches[repeats + 1 :]]
        broken = sum(broken_entries(cache) for cache in caches)
    wrong = sum(
        not is_right(result) for result in (*cold, *warm, *(r for one in many for r in one))
    )

    def ms(results: Sequence[Result], key: str = "seconds") -> float:
        return median(result[key] for result in results) * 1e3

    slowest = median(max(r["seconds"] for r in one) for one in many) * 1e3
    return [
        Bar("first call, cold cache", ms(cold), "ms", 500.0),
        Bar("first call, warm cache", ms(warm), "ms", 60.0),
        Bar("  of which importing qkrope", ms(warm, "import_seconds"), "ms"),
        Bar(f"slowest of {processes} at once, cold cache", slowest, "ms", 1000.0),
        Bar("wrong results and broken cache entries", wrong + broken, "", 0.0),
        Bar("warm calls that loaded the compiler", sum(r["compiled"] for r in warm), "", 0.0),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every bar is met, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m qkrope.bench.host", description=__doc__)
    parser.add_argument("--out", type=Path, help="append one JSON line a figure")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("qkrope.bench.host: needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    calls = {**driver_calls(device.index), **torch_calls(str(device))}
    bars = host_bars(host_samples(calls, str(device)))
    for bar in bars:
        print(bar.line(), flush=True)
    for bar in (more := first_bars(str(device))):
        print(bar.line(), flush=True)
    bars += more
    if options.out:
        facts = environment(device)
        with options.out.open("a") as file:
            for bar in bars:
                file.write(json.dumps({**facts, **asdict(bar), "met": bar.met}) + "\n")
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
