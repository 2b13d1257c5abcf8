"""What the compiler made of the CUDA kernel, counted from the machine code itself; needs no GPU.

    python tools/kernel_facts.py [sm_90]

prints a Markdown table for a few variants. nvdisasm is taken from PATH or from triton's wheel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from qkrope.cuda.compile import compile_variant
from qkrope.variant import Variant

BF16 = "bfloat16"
VARIANTS = {
    "128 half": Variant(128, 128, "half", "rms", "rms", BF16, BF16, BF16, "phase"),
    "128 interleaved": Variant(128, 128, "interleaved", "rms", "rms", BF16, BF16, BF16, "phase"),
    "256, rotary 64": Variant(256, 64, "half", "rms", "rms", BF16, BF16, BF16, "phase"),
    "128 half, float32": Variant(
        128, 128, "half", "rms", "rms", "float32", "float32", "float32", "phase"
    ),
    "128 half, cos/sin table": Variant(128, 128, "half", "rms", "rms", BF16, BF16, BF16, "table"),
}
# Opcode prefixes, by what they show.
COUNTED = {
    "sin": r"MUFU\.SIN",
    "cos": r"MUFU\.COS",
    "powf (ex2, lg2)": r"MUFU\.(EX2|LG2)",
    "local memory": r"(LDL|STL)",
    "loads": r"LDG",
    "stores": r"STG",
    "shuffles": r"SHFL",
    "all": r".",
}


def nvdisasm() -> str:
    """The disassembler; SystemExit where there is none."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(inside) if inside.is_file() else None
    if found is None:
        raise SystemExit("nvdisasm: not on PATH, nor is triton, whose wheel has one, installed")
    return found


def opcodes(cubin: bytes, kernel: str) -> list[str]:
    """The opcodes of one kernel in order, padding left out."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    body = text.split(f".text.{kernel}:", 1)[1].split(".section", 1)[0]
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", body)
    return [opcode for opcode in found if opcode != "NOP"]


def main() -> None:
    """Print the table."""
    arch = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    print("| variant | heads a group | registers | spills | " + " | ".join(COUNTED) + " |")
    print("|---|---:|---:|---:|" + "---:|" * len(COUNTED))
    for name, variant in VARIANTS.items():
        built = compile_variant(variant, arch, use_cache=False)
        for kernel in variant.kernels[:-1]:
            facts = built.resources[kernel]
            found = opcodes(built.cubin, f"qkrope_{kernel}")
            counts = Counter(
                {label: sum(bool(re.match(p, op)) for op in found) for label, p in COUNTED.items()}
            )
            spills = facts.spill_stores + facts.spill_loads
            cells = [kernel.removeprefix("vector"), str(facts.registers), str(spills)]
            cells += [str(counts[label]) for label in COUNTED]
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
