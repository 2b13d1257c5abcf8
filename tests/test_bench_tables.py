"""What is made from records: the README's tables and the roofline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qkrope.bench import plots, records, tables
from qkrope.bench.shapes import PRODUCTION_SHAPES
from test_bench import record


def test_records_of_another_schema_are_refused(tmp_path: Path) -> None:
    good = records.to_dict(record())
    assert records.from_dict(good) == record()
    with pytest.raises(ValueError, match="schema: got 99"):
        records.from_dict(good | {"schema": 99})
    with pytest.raises(ValueError, match="extra"):
        records.from_dict(good | {"extra": 1})
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(good) + "\n{}\n")
    with pytest.raises(ValueError, match=r"r.jsonl:2"):
        records.read(path)


def test_tables_take_the_newest_and_say_where_from(tmp_path: Path) -> None:
    results = tmp_path / "results"
    later = record(us=7.0, time="2026-02-02T00:00:00+00:00")
    records.append(results / "a.jsonl", [later, record()])
    gpu = record(device="cuda", device_name="a GPU", driver="580.1", cache="cold", threads=None)
    records.append(results / "b.jsonl", [gpu])
    page = tmp_path / "README.md"
    page.write_text(
        "before\n<!-- bench:cpu -->\nstale table\n<!-- /bench:cpu -->\nbetween\n"
        "<!-- bench:cuda -->\n<!-- /bench:cuda -->\nafter\n"
    )
    arguments = [str(page), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "stale" in page.read_text()
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert "| Qwen3-0.6B | 16/8/8 x 128 | 64 | 7 | 78.6 | 50% | 50.0x | 0.500 |" in text
    assert "| 10 |" in text.split("between")[1] and "| cold |" in text
    for fact in ("a processor (2 cores)", "avx2", "2 threads", "driver 580.1", "0123456789ab"):
        assert fact in text
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert tables.main(arguments) == 0 and page.read_text() == text
    assert tables.main([*arguments, "--check"]) == 0


FACTS = {"device_name": "a GPU", "driver": "580.1", "torch": "2", "qkrope": "1", "commit": "0123ab"}


def host(case: str, value: float, bar: float | None, met: bool) -> dict[str, object]:
    return {**FACTS, "case": case, "value": value, "unit": "us", "bar": bar, "met": met}


def check(dtype: str) -> dict[str, object]:
    errors = {"worst": 0.9, "pair_ulp": 0.50012, "correct": 0.99991}
    far = {"worst": 99.0, "pair_ulp": 105.3, "correct": 0.4002}
    methods = {"qkrope": errors, "chain": far, "fp32 angle": far}
    decade = {"first": 10**6, "last": 10**7 - 1, "methods": methods}
    return {**FACTS, "driver": None, "dtype": dtype, "decades": [decade]}


def test_figures_of_the_host_and_errors_by_position(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "page.md"
    for folder in ("host", "check"):
        (results / folder).mkdir(parents=True)
    lines = [host("a call", 3.0, 2.0, True), host("  of it", 1.0, None, True)]
    lines.append(host("a call", 3.4078, 2.0, False))  # the later line of a case counts
    (results / "host" / "h.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for dtype in ("bfloat16", "float16"):
        (results / "check" / f"{dtype}.json").write_text(json.dumps(check(dtype)))
    marks = [f"<!-- {end}bench:{name} -->\n" for name in ("host", "check") for end in ("", "/")]
    page.write_text("".join(marks))
    other = tmp_path / "other.md"
    other.write_text("no table")
    arguments = [str(other), str(page), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1 and tables.main(arguments) == 0
    text = page.read_text()
    assert "| a call | 3.41 us | 2 us, missed |\n| of it | 1 us | - |\n" in text
    assert "a GPU, driver 580.1, torch 2, qkrope 1, commit 0123ab.\n" in text
    assert "| 1e6 .. 1e7 | 0.5 | 105 | 105 | 99.99% | 40.02% | 40.02% |\n" in text
    assert text.index("bfloat16:\n") < text.index("\nfloat16:\n")
    assert "a GPU, float16, torch 2, qkrope 1, commit 0123ab.\n" in text
    assert tables.main([*arguments, "--check"]) == 0 and other.read_text() == "no table"


def test_steps_of_training() -> None:
    """The last line of a case, each other's time over ours, and why one has none."""
    line = {**FACTS, "dtype": "bfloat16", "case": "32/8", "tokens": 4096}
    us = {"qkrope": 80.0, "eager": 880.0, "liger": "not here"}
    found = [{**line, "us": {**us, "qkrope": 100.0}}, {**line, "us": us}]
    text = tables.rewrite("<!-- bench:training -->\n<!-- /bench:training -->", [], training=found)
    assert "| 32/8 | 4096 | 80 | 11.00x | - |\n\nliger: not here.\n" in text
    assert text.count("| 32/8 |") == 1 and "commit 0123ab.\n" in text


def test_the_first_shape_alone() -> None:
    found = [record(), record(shape=PRODUCTION_SHAPES[0].name, us=3.0)]
    text = tables.rewrite("<!-- bench:cpu-first -->\n<!-- /bench:cpu-first -->", found)
    assert PRODUCTION_SHAPES[0].name in text and "Qwen3-0.6B" not in text


def test_a_marker_without_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="/bench:cpu"):
        tables.rewrite("<!-- bench:cpu -->\n", [record()])


def test_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra qkrope[bench] is not installed")
    path = tmp_path / "p.png"
    hot = record(cache="hot", device="cuda", device_name="a GPU", tokens=1024)
    cold = dataclasses.replace(hot, cache="cold", us=20.0, ratio=None, sweep_us=None)
    plots.draw([hot, cold], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    for several in ([], [record(), hot]):
        with pytest.raises(ValueError, match="plot: got records of [02] machines"):
            plots.draw(several, path)
    results = tmp_path / "r.jsonl"
    records.append(results, [record(), hot])
    other = tmp_path / "other.png"
    assert plots.main([str(results), str(other)]) == 2 and not other.exists()
    assert plots.main([str(results), str(other), "--where", "device=cuda"]) == 0
    assert other.read_bytes()[:4] == b"\x89PNG"


def test_the_roof_passes_through_the_ends_and_the_medians() -> None:
    sizes = {1000: 1.0, 4096: 1.0, 4100: 4.0, 4200: 3.0, 100000: 10.0}  # bytes: us
    made = [record(bytes=size, sweep_us=us) for size, us in sizes.items()]
    line = plots._line(made, "same", lambda r: r.sweep_us)
    assert line == [(1000, 1.0), (4100, pytest.approx(4200 / 3e3)), (100000, pytest.approx(10.0))]
    assert plots._line(made, "hot", lambda r: r.sweep_us) == []


def test_the_peers_table() -> None:
    assert tables.render_peers([record(device="cuda")]) == "No record yet.\n"  # none was checked
    measured = {"us": 20.0, "speedup": 2.0, "repeats": 7, "worst_ulp": 18.34, "worst_error": 40.0}
    broken = measured | {"worst_ulp": None}
    first = record(
        device="cuda",
        device_name="a GPU",
        cache="cold",
        baselines={"sglang": measured, "vllm": broken, "liger": {"error": "not installed"}},
    )
    second = dataclasses.replace(
        first,
        shape="FLUX.1",
        baselines={
            "sglang": {"error": "no"},
            "vllm": measured,
            "liger": {"error": "not installed"},
        },
    )
    later = dataclasses.replace(first, baselines={}, time="2027-01-01T00:00:00+00:00")
    text = tables.render_peers([first, second, later])  # a later plain run does not hide it
    assert (
        "| Qwen3-0.6B | 16/8/8 x 128 | 64 | cold | 10 | 2.00x (18.3) | 2.00x (infinite) | - |"
        in text
    )
    assert "liger: not installed." in text and "sglang: no (FLUX.1)." in text
    marked = "<!-- bench:peers -->\nstale\n<!-- /bench:peers -->\n"
    assert text in tables.rewrite(marked, [], peers=[first, second, later])
