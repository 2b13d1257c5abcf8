"""`qkrope build`: compile CUDA variants ahead of time, in parallel, with or without a GPU."""

from __future__ import annotations

import argparse
import os
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from .common import (
    FAILED,
    OK,
    Output,
    UsageError,
    add_spec_flags,
    dtype_name,
    read_config,
    spec_from,
)

if TYPE_CHECKING:
    from qkrope.cuda.compile import CompiledVariant
    from qkrope.spec import Spec
    from qkrope.variant import Variant


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("build", parents=[common], help="compile CUDA kernels now")
    parser.add_argument(
        "--arch", action="append", metavar="sm_XX", help="repeatable; default: of the GPUs here"
    )
    parser.add_argument(
        "--dtype", type=dtype_name, action="append", help="repeatable; default bf16"
    )
    parser.add_argument("--weight-dtype", type=dtype_name, help="default: the dtype")
    parser.add_argument(
        "--angles",
        action="append",
        choices=("phase", "inv_freq", "table"),
        help="from positions and the Spec, from positions and the caller's inv_freq, or from the "
        "caller's cos and sin; repeatable; default phase",
    )
    parser.add_argument(
        "--options",
        action="store_true",
        help="also the kernels of calls that bring more than weights: a bias, a scale, a weight or "
        "table for each head, tokens that do not turn",
    )
    parser.add_argument("--backward", action="store_true", help="also the kernels of the gradients")
    parser.add_argument(
        *("-j", "--jobs"),
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="compilers at once (default: one for each core)",
    )
    add_spec_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Compile everything asked for; exit 1 if something does not compile."""
    if args.jobs < 1:
        raise UsageError(f"--jobs: got {args.jobs}, expected at least 1")
    archs = _archs(args.arch)
    variants = _variants(args, out)
    from qkrope.cuda.compile import compile_variant
    from qkrope.errors import CompileError

    work = [(variant, arch) for arch in archs for variant in variants]
    built: list[CompiledVariant] = []
    failed: list[dict[str, Any]] = []
    with out.progress() as bar, ThreadPoolExecutor(args.jobs) as pool:
        task = bar.add_task("build", total=len(work))
        jobs = {pool.submit(compile_variant, v, arch): (v, arch) for v, arch in work}
        for job in as_completed(jobs):
            variant, arch = jobs[job]
            try:
                built.append(job.result())
            except CompileError as error:
                failed.append({"variant": name(variant), "arch": arch, "error": str(error)})
                out.note(f"{name(variant)}, {arch}: {error}")
            bar.update(task, advance=1)
    built.sort(key=lambda b: (b.arch, name(b.variant)))
    out.result({"built": [_plain(b) for b in built], "failed": failed})
    columns = ["variant", "arch", "kernel", "registers", "stack", "spills", "bytes", "from"]
    rows = [
        [
            name(b.variant),
            b.arch,
            layout,
            str(used.registers),
            str(used.stack),
            str(used.spill_stores + used.spill_loads),
            str(len(b.cubin)),
            "cache" if b.cached else "compiler",
        ]
        for b in built
        for layout, used in b.resources.items()
    ]
    out.table(f"{len(built)} built, {len(failed)} failed", columns, rows)
    return FAILED if failed else OK


def name(variant: Variant) -> str:
    """A variant in a few words."""
    norm = "|".join(dict.fromkeys((variant.q_norm, variant.k_norm)))
    weights = sorted({variant.q_weight, variant.k_weight} - {variant.dtype})
    parts = [f"{variant.head_dim}/{variant.rotary_dim}", variant.pairing, norm, variant.dtype]
    backward = ["backward"] if variant.backward else []
    return " ".join([*parts, *(f"w:{dtype}" for dtype in weights), variant.angle, *backward])


def _archs(given: list[str] | None) -> list[str]:
    if given:
        for arch in given:
            if not re.fullmatch(r"sm_\d{2,3}[a-z]?", arch):
                raise UsageError(f"--arch: got {arch!r}, expected a name like sm_90")
        return list(dict.fromkeys(given))
    import torch

    from qkrope.cuda.compile import arch_name

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UsageError("--arch: no GPU here to take it from, expected a name like sm_90")
    found = (arch_name(*torch.cuda.get_device_capability(i)) for i in range(count))
    return list(dict.fromkeys(found))


def _specs(args: argparse.Namespace, out: Output) -> list[Spec]:
    """The Spec of the flags; every layer's with a config and no --layer."""
    from qkrope.spec import Spec

    if not args.config or args.layer is not None or args.shape or args.spec:
        return [spec_from(args)]
    config = read_config(args.config)
    text = config.get("text_config") or config
    layers = text.get("num_hidden_layers") or text.get("num_layers") or 1
    specs: dict[Spec, None] = {}
    reasons: list[str] = []
    for layer in range(int(layers)):
        try:
            specs[Spec.from_config(config, layer_idx=layer)] = None
        except ValueError as error:  # a layer without attention in a hybrid model
            reasons.append(f"layer {layer}: {error}")
    if not specs:
        raise UsageError(f"--config: {reasons[0]}")
    if reasons:
        out.note(f"{len(reasons)} of {layers} layers left out; {reasons[0]}")
    return list(specs)


def _variants(args: argparse.Namespace, out: Output) -> list[Variant]:
    from qkrope.plan import once_of
    from qkrope.variant import Variant

    found: dict[Variant, None] = {}
    for spec in _specs(args, out):
        for dtype in args.dtype or ["bfloat16"]:
            for angle in args.angles or ["phase"]:
                weight = args.weight_dtype
                for general in (False, True) if args.options else (False,):
                    given = (dtype, weight, weight, angle, general)
                    found[Variant.of(spec, *given)] = None
                    if args.backward:
                        found[Variant.of(once_of(spec), *given, backward=True)] = None
    return list(found)


def _plain(built: CompiledVariant) -> dict[str, Any]:
    import dataclasses

    return {
        "variant": dataclasses.asdict(built.variant),
        "arch": built.arch,
        "cached": built.cached,
        "path": str(built.path) if built.path else None,
        "bytes": len(built.cubin),
        "kernels": {n: used._asdict() for n, used in built.resources.items()},
    }
