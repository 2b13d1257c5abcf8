"""`qkrope run`: apply a Spec to the tensors of a .safetensors file; for porting a model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import FAILED, OK, Output, UsageError, add_spec_flags, describe, spec_from

if TYPE_CHECKING:
    import torch

    from qkrope.spec import Spec

_HELP = """apply a Spec to the tensors of a .safetensors file

The file holds q [..., q_heads, head_dim] and k [..., kv_heads, head_dim], or a packed qkv
[..., (q_heads + kv_heads + v_heads) * head_dim]; positions (integers), unless the Spec rotates
nothing; q_weight and k_weight, unless the norm has none; expected_q and expected_k to compare with.
"""
_KNOWN = {"q", "k", "qkv", "q_weight", "k_weight", "positions", "expected_q", "expected_k"}


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "run",
        parents=[common],
        help="apply a Spec to the tensors of a .safetensors file",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "input", type=Path, metavar="IN.safetensors", help="q and k or qkv, and what goes with them"
    )
    parser.add_argument(
        "output",
        type=Path,
        nargs="?",
        metavar="OUT.safetensors",
        help="q and k of the result (default: none)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="ULP",
        help="exit 1 if an element is further than this from the expected outputs, in ulps of "
        "the rotated pair (default: only report)",
    )
    add_spec_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Apply, write, report; exit 1 if the result misses the criterion or the tolerance."""
    if not args.input.is_file():
        raise UsageError(f"input: {args.input}: no such file")
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    import qkrope
    from qkrope.bench.errors import compare, exact_and_terms
    from qkrope.bench.machine import pick_device

    device = pick_device(args.device)
    spec = spec_from(args)
    try:
        tensors = load_file(args.input, device=str(device))
    except SafetensorError as error:
        raise UsageError(f"input: {args.input}: {error}") from None
    for name in sorted(set(tensors) - _KNOWN):
        out.note(f"{args.input}: tensor {name} is not used")
    q, k = _q_and_k(tensors, spec)
    rest = (tensors.get("q_weight"), tensors.get("k_weight"), tensors.get("positions"), spec)
    got = qkrope.qk_norm_rope(q, k, *rest)
    exact, terms = exact_and_terms(q, k, *rest)
    dtype = (q if q is not None else k).dtype  # type: ignore[union-attr]
    errors = compare(got, exact, terms, spec, dtype)
    report: dict[str, Any] = {
        "spec": spec.canonical(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": {name: list(t.shape) for name, t in zip("qk", got, strict=True) if t is not None},
        "oracle": errors.plain(),
        "expected": None,
        "passed": errors.passed,
    }
    expected = (tensors.get("expected_q"), tensors.get("expected_k"))
    if any(t is not None for t in expected):
        report["expected"] = _against(got, expected, exact, spec)
        furthest, limit = report["expected"]["max_pair_ulp"], args.tolerance
        if limit is not None and (furthest is None or furthest > limit):
            report["passed"] = False
    elif args.tolerance is not None:
        raise UsageError("--tolerance: the file holds neither expected_q nor expected_k")
    if args.output:
        written = {name: t.cpu() for name, t in zip("qk", got, strict=True) if t is not None}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_file(written, args.output, metadata={"spec": spec.canonical()})
        report["output"] = str(args.output)
    out.result(report)
    _print(report, spec, out)
    return OK if report["passed"] else FAILED


def _q_and_k(
    tensors: dict[str, torch.Tensor], spec: Spec
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if "qkv" in tensors:
        if "q" in tensors or "k" in tensors:
            raise UsageError("input: got qkv and q or k, expected one form")
        qkv = tensors["qkv"]
        columns = (spec.num_q_heads + spec.num_kv_heads) * spec.head_dim
        if qkv.shape[-1] < columns or qkv.shape[-1] % spec.head_dim:
            raise UsageError(
                f"qkv: got {qkv.shape[-1]} columns, expected a multiple of {spec.head_dim} of at "
                f"least {columns}"
            )
        heads = qkv.unflatten(-1, (-1, spec.head_dim))
        q, k = heads.split((spec.num_q_heads, heads.shape[-2] - spec.num_q_heads), dim=-2)
        return q, k[..., : spec.num_kv_heads, :]
    if "q" not in tensors and "k" not in tensors:
        raise UsageError(f"input: got {sorted(tensors)}, expected q and k, or qkv")
    return tensors.get("q"), tensors.get("k")


def _against(got: Any, expected: Any, exact: Any, spec: Spec) -> dict[str, Any]:
    """Our distance from the expected outputs, and theirs from the exact ones."""
    import torch

    from qkrope.bench.errors import finite, pair_ulps

    ours = theirs = 0.0
    same = total = 0
    for name, y, want, ref in zip("qk", got, expected, exact, strict=True):
        if want is None:
            continue
        if y is None or y.shape != want.shape:
            shape = None if y is None else tuple(y.shape)
            raise UsageError(f"expected_{name}: got {tuple(want.shape)}, expected {shape}")
        if y.numel() == 0:
            continue
        far = [pair_ulps(y, want, ref, spec, y.dtype), pair_ulps(want, ref, ref, spec, y.dtype)]
        ours, theirs = (
            max(old, float(t.nan_to_num(math.inf).max()))
            for old, t in zip((ours, theirs), far, strict=True)
        )
        same += int(torch.eq(y, want).sum())
        total += y.numel()
    return {
        "max_pair_ulp": finite(ours),
        "equal": same / max(total, 1),
        "expected_from_exact_pair_ulp": finite(theirs),
    }


def _show(value: float | None, text: str = "{:.3g}") -> str:
    return "infinite" if value is None else text.format(value)


def _print(report: dict[str, Any], spec: Spec, out: Output) -> None:
    oracle, expected = report["oracle"], report["expected"]
    verdict = "met" if oracle["worst"] is not None and oracle["worst"] <= 1 else "MISSED"
    rows = [
        ["worst error, criterion's units", f"{_show(oracle['worst'])} ({verdict})"],
        ["worst error, ulps of the pair", _show(oracle["pair_ulp"])],
        ["correctly rounded", _show(oracle["correct"], "{:.3%}")],
    ]
    if expected:
        rows += [
            ["ulps of the pair, from the expected outputs", _show(expected["max_pair_ulp"])],
            ["the same, expected from exact", _show(expected["expected_from_exact_pair_ulp"])],
            ["equal to the expected outputs", _show(expected["equal"], "{:.2%}")],
        ]
    title = f"{describe(spec)}, {report['dtype']} on {report['device']}"
    out.table(title, ["", "result"], rows)
    if "output" in report:
        out.text(f"written: {report['output']}")
