"""What the subcommands share: output, exit codes, and the flags that describe a Spec.

Nothing here imports torch: `qkrope --help` must be instant.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from qkrope.spec import Scaling, Spec

OK, FAILED, USAGE = 0, 1, 2
DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
}


class UsageError(Exception):
    """A wrong argument: printed on stderr, exit code 2."""


class Output:
    """Where a subcommand writes: tables or one JSON document on stdout, the rest on stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, document: Any) -> None:
        """Print the JSON document, if that is what was asked for."""
        if self.as_json:
            print(json.dumps(document, indent=2, allow_nan=False))

    def note(self, text: str) -> None:
        """One line for the reader on stderr."""
        print(text, file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        """One line of the result on stdout; nothing with --json."""
        if not self.as_json:
            print(text)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        right: bool = True,
        caption: str | None = None,
    ) -> None:
        """A table on stdout; nothing with --json. No cell is cut, whatever the width."""
        if self.as_json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        terminal = sys.stdout.isatty()
        rows = [list(map(str, row)) for row in rows]
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for index, column in enumerate(columns):
            justify: Literal["left", "right"] = "right" if right and index else "left"
            table.add_column(column, justify=justify, no_wrap=not terminal, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        wide = max([len(title), len(caption or ""), *map(_row_width, [list(columns), *rows])])
        total = sum(max(len(r[i]) for r in [list(columns), *rows]) + 3 for i in range(len(columns)))
        Console(file=sys.stdout, width=None if terminal else max(wide, total) + 2).print(table)

    def progress(self) -> Progress:
        """A progress bar on stderr; silent where stderr is no terminal."""
        from rich import progress as bars
        from rich.console import Console

        return bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )


def _row_width(row: Sequence[str]) -> int:
    return sum(len(cell) + 3 for cell in row)


def token_list(text: str) -> tuple[int, ...]:
    """argparse type: "1,64,4096" to a tuple of counts of at least 1."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected counts like 1,64,4096")
    return counts


def dtype_name(text: str) -> str:
    """argparse type: bf16, fp16, fp32 or the torch name."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[text]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name that `dtype_name` accepted."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def add_spec_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that describe a Spec; `spec_from` reads them."""
    group = parser.add_argument_group(
        "what to apply", "a config.json, a production shape, or the fields of a Spec"
    )
    group.add_argument("--config", metavar="FILE", help="Hugging Face config.json")
    group.add_argument("--layer", type=int, metavar="N", help="layer of the config (default 0)")
    group.add_argument("--shape", metavar="NAME", help="a production shape, e.g. Qwen3-8B")
    group.add_argument("--spec", metavar="JSON", help="the text of Spec.canonical()")
    group.add_argument("--q-heads", type=int, default=32, metavar="N", help="default 32")
    group.add_argument("--kv-heads", type=int, default=8, metavar="N", help="default 8")
    group.add_argument("--head-dim", type=int, default=128, metavar="N", help="default 128")
    group.add_argument("--norm", default="rms", help="rms or none (default rms)")
    group.add_argument("--eps", type=float, default=1e-6, help="default 1e-6")
    group.add_argument("--weight-offset", type=float, default=0.0, help="1 for Gemma (default 0)")
    group.add_argument("--rotary-dim", type=int, metavar="N", help="default head_dim; 0: no RoPE")
    group.add_argument("--theta", type=float, default=1e6, help="default 1e6")
    group.add_argument("--pairing", default="half", help="half or interleaved (default half)")
    group.add_argument(
        "--scaling",
        metavar="CALL",
        help="e.g. 'YaRN(factor=4.0, original_max_position_embeddings=32768)'",
    )
    group.add_argument("--max-positions", type=int, metavar="N", help="max_position_embeddings")


def spec_from(args: argparse.Namespace) -> Spec:
    """The Spec that the flags of `add_spec_flags` describe."""
    from qkrope.spec import Norm, Rope, Spec

    given = [name for name in ("config", "shape", "spec") if getattr(args, name)]
    if len(given) > 1:
        raise UsageError(f"--{' and --'.join(given)}: expected one of them")
    if args.config:
        return Spec.from_config(read_config(args.config), layer_idx=args.layer or 0)
    if args.shape:
        from qkrope.bench.shapes import find_shapes

        return find_shapes([args.shape])[0].spec
    if args.spec:
        return Spec.from_canonical(args.spec)
    rope = None
    if args.rotary_dim != 0:
        scaling = parse_scaling(args.scaling) if args.scaling else None
        rope = Rope(args.rotary_dim, args.theta, args.pairing, scaling)
    return Spec(
        num_q_heads=args.q_heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        norm=Norm(kind=args.norm, eps=args.eps, weight_offset=args.weight_offset),
        rope=rope,
        max_position_embeddings=args.max_positions,
    )


def read_config(path: str) -> Any:
    """The content of a config.json."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--config: {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--config: {path}: not JSON: {error}") from None


def parse_scaling(text: str) -> Scaling:
    """A scaling written as its constructor call with literal keywords."""
    from qkrope import spec as values

    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError("not a call with keywords")
        keywords = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except (SyntaxError, ValueError):
        raise UsageError(
            f"--scaling: got {text!r}, expected a call with keywords, as Linear(factor=8.0)"
        ) from None
    kinds = {kind.__name__: kind for kind in values.Scaling.__subclasses__()}
    if node.func.id not in kinds:
        raise UsageError(f"--scaling: got {node.func.id}, expected one of {', '.join(kinds)}")
    scaling: Scaling = kinds[node.func.id](**keywords)
    return scaling


def describe(spec: Spec) -> str:
    """A Spec in a few words, for titles."""
    parts = [f"{spec.num_q_heads}/{spec.num_kv_heads} x {spec.head_dim}", spec.q_norm.kind]
    if spec.rope is None:
        return ", ".join([*parts, "no rotation"])
    parts.append(f"rotary {spec.rotary_dim} {spec.rope.pairing}, theta {spec.rope.theta:g}")
    if spec.rope.scaling is not None:
        parts.append(type(spec.rope.scaling).__name__)
    return ", ".join(parts)
