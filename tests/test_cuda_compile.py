"""The CUDA kernels compile without a GPU, within their budgets; and the rule of the grid."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest

from qkrope import _native, angles
from qkrope.cuda import compile as compiling
from qkrope.errors import CompileError
from qkrope.spec import MAX_HEAD_DIM, NTK, Linear, Llama3, Norm, Rope, Spec, YaRN
from qkrope.variant import DTYPES, Variant

MAIN = ("sm_80", "sm_90", "sm_100")
MORE = ("sm_75", "sm_89", "sm_120")
WARP, BLOCK = 32, 128
REGISTER_FILE = 65536  # of an SM, since sm_30


def variant(
    head_dim: int = 128,
    rotary: int | None = None,
    pairing: str = "half",
    dtype: str = "bfloat16",
    weight: str | None = None,
    angle: str = "phase",
    norms: tuple[str, str] = ("rms", "rms"),
) -> Variant:
    rotary = head_dim if rotary is None else rotary
    weight = weight or dtype
    return Variant(head_dim, rotary, pairing, *norms, dtype, weight, weight, angle)


# Every released shape, the largest and smallest, and what else reaches a branch of the source.
VARIANTS = {
    "128": variant(),
    "128 interleaved": variant(pairing="interleaved"),
    "64/32": variant(64, 32),
    "256/64": variant(256, 64),
    "128/96": variant(128, 96),
    "192/64": variant(192, 64),
    "72 interleaved": variant(72, pairing="interleaved"),
    "80": variant(80),
    "96": variant(96),
    "112": variant(112),
    "512/128": variant(512, 128),
    "1024": variant(1024),
    "1024 float32 interleaved": variant(1024, pairing="interleaved", dtype="float32"),
    "2": variant(2),
    "6/4": variant(6, 4),
    "90": variant(90),
    "34/10": variant(34, 10),
    "table": variant(angle="table"),
    "table, part": variant(128, 64, "interleaved", angle="table"),
    "inv_freq": variant(angle="inv_freq"),
    "inv_freq 1024": variant(1024, 512, dtype="float32", angle="inv_freq"),
    "no rope": variant(rotary=0, angle="none"),
    "no norm": variant(norms=("none", "none")),
    "one norm": variant(norms=("rms", "none")),
    "float16": variant(dtype="float16"),
    "float32": variant(dtype="float32"),
    "float32 weight": variant(weight="float32"),
    "bfloat16 weight": variant(dtype="float32", weight="bfloat16"),
}
FEW = ("128", "128 interleaved", "256/64", "34/10", "float16", "float32", "table")
CASES = [(arch, name) for arch in MAIN for name in VARIANTS]
CASES += [(arch, name) for arch in MORE for name in FEW]


def lane_units(head_dim: int) -> int:
    """Groups of 8 channels a lane holds: as few as let a warp cover the head."""
    return 1 if head_dim <= 256 else 2 if head_dim <= 512 else 4


def compile_clean(one: Variant, arch: str) -> dict[str, compiling.Resources]:
    """Each kernel's resources: none spills, and the compiler has nothing to say."""
    compiled = compiling.compile_variant(one, arch, use_cache=False)
    assert compiled.cubin[:4] == b"\x7fELF" and not compiled.cached and compiled.path is None
    assert (compiled.variant, compiled.arch) == (one, arch)
    # The compiler said nothing but what ptxas -v always says.
    lines = compiled.log.replace("\0", "").strip().splitlines()
    assert all(line.startswith("ptxas") and "warning" not in line.lower() for line in lines), lines
    assert set(compiled.resources) == set(one.kernels)
    for kernel, found in compiled.resources.items():
        assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), (kernel, found)
    return compiled.resources


@pytest.mark.parametrize(("arch", "name"), CASES, ids=str)
def test_it_compiles_without_spills(arch: str, name: str) -> None:
    one = VARIANTS[name]
    for kernel, found in compile_clean(one, arch).items():
        if kernel in ("vector1", "vector2") and kernel != one.kernels[-2]:
            continue  # of small batches, where the calls ahead are what hides latency
        # A budget in bytes, not in registers: 4.8 TB/s for the 0.7 us that memory takes are 25 KB
        # in flight on each of 132 SMs. Registers come to a warp in steps of 256, and a lane has
        # at least two heads' share in flight.
        warps = warps_an_sm(found.registers)
        lane = lane_units(one.head_dim) * 8 * (4 if one.dtype == "float32" else 2)
        rows = 4 if lane_units(one.head_dim) == 1 else 2
        in_flight = min(warps // (BLOCK // WARP) * BLOCK, 2048) * lane * rows
        assert in_flight >= 25_000, f"{kernel}: {found.registers} registers, {in_flight} bytes"


def warps_an_sm(registers: int) -> int:
    return REGISTER_FILE // (-(-registers // 8) * 8 * WARP)


@pytest.mark.parametrize("arch", MAIN)
def test_a_small_call_leaves_room_for_the_next(arch: str) -> None:
    """The rule of rows gives a small call 20 warps an SM: twice that many fit."""
    for name in ("128", "128 interleaved", "float16", "table", "float32 weight"):
        found = compiling.compile_variant(VARIANTS[name], arch, use_cache=False).resources
        for kernel in ("vector1", "vector2"):
            assert warps_an_sm(found[kernel].registers) >= 40, (name, found)
        assert warps_an_sm(found["vector4"].registers) >= 32, (name, found)


def test_a_warning_would_show() -> None:
    """The control of the clean log above."""
    text = compiling.source(variant()) + "\n__device__ int unused() { int x; return 0; }\n"
    _, log = compiling._nvrtc(text, "sm_90")
    assert "warning" in log.lower()


def nvrtc(text: str, arch: str = "sm_90") -> str:
    """The PTX of a source, or AssertionError with the log (cuda.core wants a driver for PTX)."""
    from cuda.bindings import nvrtc as lib

    def check(result: tuple[Any, ...]) -> Any:
        assert result[0] == lib.nvrtcResult.NVRTC_SUCCESS, result
        return result[1] if len(result) > 1 else None

    program = check(lib.nvrtcCreateProgram(text.encode(), b"qkrope.cu", 0, [], []))
    options = [f"--gpu-architecture={arch.replace('sm', 'compute')}".encode(), b"--std=c++17"]
    (result,) = lib.nvrtcCompileProgram(program, len(options), options)
    if result != lib.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * check(lib.nvrtcGetProgramLogSize(program))
        check(lib.nvrtcGetProgramLog(program, log))
        raise AssertionError(log.decode())
    found = b" " * check(lib.nvrtcGetPTXSize(program))
    check(lib.nvrtcGetPTX(program, found))
    return found.decode()


def ptx(one: Variant, arch: str = "sm_90") -> str:
    return nvrtc(compiling.source(one), arch)


@pytest.mark.parametrize("name", ["128", "256/64", "table", "float32", "1024", "34/10"])
def test_no_slow_instructions(name: str) -> None:
    """No powf or exp2 (angles come from integers), no double, no division of floats, no calls."""
    one = VARIANTS[name]
    text = ptx(one)
    for word in ("ex2.", "lg2.", ".f64", "div.rn", "div.full", "sqrt.rn", "call", ".local"):
        assert word not in text, word
    approximate = one.angle == "phase" and one.dtype != "float32"
    assert ("sin.approx" in text) == approximate and ("cos.approx" in text) == approximate


def test_the_words_of_the_previous_test_are_found() -> None:
    """Its control: a caller's inv_freq is multiplied in double."""
    assert ".f64" in ptx(VARIANTS["inv_freq"])
    assert "griddepcontrol.wait" in ptx(variant()) and "griddepcontrol" not in ptx(
        variant(), "sm_80"
    )


def test_a_scaling_costs_nothing_and_compiles_nothing() -> None:
    """All of it is in the frequencies: one variant, one key, whatever the Spec says of lengths."""
    plain = Spec(32, 8, 128, rope=Rope(theta=1e6))
    expected = Variant.of(plain, "bfloat16", None, None, "phase")
    for rope in (
        Rope(theta=5e5),
        Rope(scaling=YaRN(factor=4.0, original_max_position_embeddings=32768)),
        Rope(scaling=YaRN.from_ramp(8.0, 4.0, 11.0, 1.21)),
        Rope(scaling=Linear(factor=4.0)),
        Rope(scaling=NTK(factor=4.0)),
        Rope(scaling=Llama3(8.0, 1.0, 4.0, 8192)),
    ):
        for spec in (replace(plain, rope=rope), replace(plain, rope=rope, num_q_heads=7)):
            other = Variant.of(spec, "bfloat16", None, None, "phase")
            assert other == expected
            assert compiling.key(other, "sm_90") == compiling.key(expected, "sm_90")
            assert angles.resolve(spec, None) != angles.resolve(plain, None)
    for norm in (Norm(eps=1e-5), Norm(weight_offset=1.0)):
        assert Variant.of(replace(plain, norm=norm), "bfloat16", None, None, "phase") == expected
    others = [replace(expected, **change) for change in CHANGES]
    keys = {compiling.key(v, "sm_90") for v in (expected, *others)}
    assert len(keys) == len(CHANGES) + 1


CHANGES = (
    {"head_dim": 256},
    {"rotary_dim": 64},
    {"pairing": "interleaved"},
    {"q_norm": "none"},
    {"k_norm": "none"},
    {"dtype": "float16"},
    {"q_weight": "float32"},
    {"k_weight": "float32"},
    {"angle": "table"},
)

# ---- limits, stated in Python and in the source -----------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"head_dim": MAX_HEAD_DIM + 2}, "head_dim: expected even, 2 to 1024, got 1026"),
        ({"head_dim": 0, "rotary_dim": 0, "angle": "none"}, "head_dim: expected even"),
        ({"head_dim": 127}, "head_dim: expected even, 2 to 1024, got 127"),
        ({"rotary_dim": 130}, "rotary_dim: expected even, 0 to 128, got 130"),
        ({"rotary_dim": 63}, "rotary_dim: expected even, 0 to 128, got 63"),
        ({"rotary_dim": -2}, "rotary_dim: expected even, 0 to 128, got -2"),
        ({"rotary_dim": 0}, "angle: got 'phase' with rotary_dim 0"),
        ({"angle": "none"}, "angle: got 'none' with rotary_dim 128"),
    ],
    ids=str,
)
def test_a_variant_beyond_a_limit(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(variant(), **change)


def edited(monkeypatch: pytest.MonkeyPatch, one: Variant, **macros: int) -> Variant:
    """The variant, with other values behind its macros than it would accept."""
    text = one.macros()
    for name, value in macros.items():
        text, count = re.subn(rf"(#define QK_{name}) \S+", rf"\1 {value}", text)
        assert count == 1, name
    monkeypatch.setattr(Variant, "macros", lambda self: text)
    return one


@pytest.mark.parametrize(
    ("macros", "word"),
    [
        ({"HEAD_DIM": MAX_HEAD_DIM + 2, "VECTOR_BYTES": 0}, "head_dim"),
        ({"HEAD_DIM": 127, "VECTOR_BYTES": 0}, "head_dim"),
        ({"ROTARY_DIM": 130, "VECTOR_BYTES": 0}, "rotary_dim"),
        ({"ROTARY_DIM": 63, "VECTOR_BYTES": 0}, "rotary_dim"),
        ({"ROTARY_DIM": 0}, "angle source"),
        ({"ANGLE": 0}, "angle source"),
        ({"ROTARY_DIM": 60}, "vector loads"),
    ],
    ids=str,
)
def test_the_source_has_the_same_limits(
    monkeypatch: pytest.MonkeyPatch, macros: dict[str, int], word: str
) -> None:
    """The twin of each limit: what Python would refuse does not compile, and the log says why."""
    wrong = edited(monkeypatch, variant(), **macros)
    with pytest.raises(CompileError, match="compiling for sm_90 failed") as raised:
        compiling.compile_variant(wrong, "sm_90", use_cache=False)
    log = str(raised.value)
    assert "static assertion failed" in log and f'"{word}"' in log, log


def test_a_syntax_error_shows_the_compilers_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variant, "macros", lambda self: "this is no C++;\n")
    with pytest.raises(CompileError, match="compiling for sm_90 failed") as raised:
        compiling.compile_variant(variant(), "sm_90", use_cache=False)
    assert 'identifier "this" is undefined' in str(raised.value) or "error" in str(raised.value)
    assert "qkrope.cu(1)" in str(raised.value)


# ---- lanes, units and vector loads ------------------------------------------------------------


def test_lane_units_cover_every_head_dim() -> None:
    """params.h for all head dims at once, by assertions that NVRTC evaluates."""
    checks = []
    for head_dim in range(2, MAX_HEAD_DIM + 1, 2):
        units = lane_units(head_dim)
        lanes = -(-head_dim // (8 * units))
        for name, value in (("LANE_UNITS", units), ("LANES", lanes), ("GROUPS", 32 // lanes)):
            checks.append(f'static_assert(QK_{name}({head_dim}) == {value}, "{name} {head_dim}");')
        assert 1 <= lanes <= 32
    header = _native.resource("native", "params.h").read_text()
    nvrtc("\n".join([header, *checks]))
    with pytest.raises(AssertionError, match="static assertion failed"):
        nvrtc(header + 'static_assert(QK_LANES(128) == 15, "");')


def runs_are_whole(one: Variant) -> bool:
    """Whether each lane's channels lie in memory as runs of whole vectors."""
    pairs, rotated = one.head_dim // 2, one.rotary_dim // 2
    count = 4 * lane_units(one.head_dim)  # pairs a lane
    if pairs % count:
        return False
    for first in range(0, pairs, count):
        mine = range(first, first + count)
        if one.pairing == "interleaved":
            runs = [[c for j in mine for c in (2 * j, 2 * j + 1)]]
        else:  # the rotated pairs, then the rest of the head paired half with half
            rest = pairs - rotated
            runs = [
                [j if j < rotated else j + rotated for j in mine],
                [j + rotated if j < rotated else j + rotated + rest for j in mine],
            ]
        for run in runs:
            if run != list(range(run[0], run[0] + len(run))) or run[0] % len(run):
                return False
    return True


def test_vector_loads_where_and_only_where_runs_are_whole() -> None:
    draw = random.Random(1)
    seen = set()
    for _ in range(4000):
        head_dim = 2 * draw.randint(1, draw.choice([16, 80, 512]))
        if draw.random() < 0.5:
            head_dim = -(-head_dim // 16) * 16
        step = draw.choice([2, 8, 16])
        rotary = min(head_dim, draw.randint(0, head_dim // 2) * 2 // step * step)
        pairing, dtype = draw.choice(["half", "interleaved"]), draw.choice(DTYPES)
        angle = "phase" if rotary else "none"
        one = variant(head_dim, rotary, pairing, dtype, angle=angle)
        assert bool(one.vector_bytes) == runs_are_whole(one), one
        fast = ("vector1", "vector2", "vector4") if lane_units(one.head_dim) == 1 else ()
        assert one.kernels == (
            (*(fast or ("vector1", "vector2")), "scalar") if one.vector_bytes else ("scalar",)
        )
        size = 4 if dtype == "float32" else 2
        run = 4 * lane_units(head_dim) * size * (2 if pairing == "interleaved" else 1)
        assert run % (one.vector_bytes or 1) == 0 and one.vector_bytes in (0, 8, 16)
        seen.add((pairing, lane_units(head_dim), one.vector_bytes))
    both = {"half", "interleaved"}
    assert {s[0] for s in seen if s[2]} == {s[0] for s in seen if not s[2]} == both
    assert {units for _, units, width in seen if width} == {1, 2, 4}


@pytest.mark.parametrize("shape", [(90, 90), (34, 10), (128, 60), (260, 260), (516, 516)], ids=str)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_vector_loads_are_refused_elsewhere(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], pairing: str
) -> None:
    """kernel.cu asserts the same rule as Variant.vector_bytes."""
    one = variant(*shape, pairing=pairing)
    if one.vector_bytes:
        assert pairing == "interleaved" and shape[0] % 8 == 0
        return
    wrong = edited(monkeypatch, one, VECTOR_BYTES=8)
    with pytest.raises(CompileError, match="vector loads"):
        compiling.compile_variant(wrong, "sm_90", use_cache=False)


# ---- the grid rule ----------------------------------------------------------------------------


def test_rows() -> None:
    """The most heads a group for a large call, or as many as put 32 bytes a lane in flight."""
    rule = _native.lib().rows
    tokens = (1, 2, 3, 7, 16, 64, 100, 256, 700, 1024, 4096, 10**5, 10**7, 2**31 - 1)
    for q_heads, k_heads in ((1, 0), (0, 1), (5, 1), (32, 8), (17, 3), (129, 4), (4096, 4096)):
        for head_dim in (8, 64, 72, 96, 128, 192, 256, 512, 1024):
            most = 4 if lane_units(head_dim) == 1 else 2
            for size in (2, 4):
                for num_sms in (1, 20, 108, 132, 148):
                    args = q_heads, k_heads, head_dim, size, num_sms
                    found = [rule(t, *args) for t in tokens]
                    large = found[-1]
                    assert large in (1, 2, most) and set(found) <= {1, 2, most}
                    small = [rows for rows in found if rows < large]
                    assert small == sorted(small), found
    for tokens_, expected in ((1, 1), (52, 1), (64, 2), (256, 2), (1024, 2), (16384, 2)):
        assert rule(tokens_, 32, 8, 128, 2, 132) == expected
    assert rule(4096, 5, 1, 128, 2, 132) == 4  # two groups of two would idle
    assert rule(4096, 32, 8, 96, 2, 132) == 4  # rows of 192 bytes
    assert rule(4096, 32, 8, 128, 4, 132) == rule(4096, 8, 2, 512, 2, 132) == 1


def test_block_warps() -> None:
    """No multiprocessor has more warps of a small call than it must; at most 8 (4) a block."""
    rule = _native.lib().block_warps
    for head_dim, rows, most in ((128, 1, 8), (128, 2, 8), (128, 4, 4), (512, 1, 4)):
        for num_sms in (1, 20, 108, 132, 148):
            for slots in (1, 2, 3, 5, 7, 10, 12, 20, 33):
                for tokens in (0, 1, 2, 16, 63, 64, 65, 256, 4096, 10**5, 2**31 - 1):
                    busiest = {
                        warps: max(3, -(-(-(-slots // warps) * tokens) // num_sms) * warps)
                        for warps in range(1, min(most, slots) + 1)
                    }
                    found = rule(slots, tokens, head_dim, rows, num_sms)
                    assert -(-slots // -(-slots // found)) == found  # no block has fewer to do
                    if slots * tokens <= 20 * num_sms:
                        assert busiest[found] == min(busiest.values())
                    assert found in busiest
    found = [rule(slots, tokens, 128, 1, 132) for slots, tokens in ((20, 1), (20, 16), (5, 64))]
    assert found == [3, 3, 3]
    assert [rule(10, tokens, 128, 2, 132) for tokens in (64, 128, 256, 4096)] == [5, 5, 5, 5]
