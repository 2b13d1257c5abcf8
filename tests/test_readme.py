"""The README and CONTRIBUTING say what is true: their code runs, and what they name exists."""

import pkgutil
import re
import runpy
from importlib.metadata import version
from pathlib import Path

import pytest

import qkrope

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
VARIABLE = r"QKROPE_[A-Z0-9_]+"


def fenced(text: str, language: str) -> list[str]:
    """The bodies of the text's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_snippets_run_on_the_cpu() -> None:
    # One namespace: a later snippet goes on where an earlier one stopped, as a reader would.
    snippets = fenced(README, "python")
    assert len(snippets) >= 3
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md python block {number}", "exec"), names)
    q, k, q2, k2 = (names[name] for name in ("q", "k", "q2", "k2"))
    assert q2.shape == q.shape and k2.shape == k.shape  # type: ignore[attr-defined]
    assert not q2.equal(q)  # type: ignore[attr-defined]


def test_the_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    assert "of the bound" in capsys.readouterr().out


def test_the_example_has_six_lines() -> None:
    assert len(fenced(README, "python")[0].splitlines()) <= 7  # an import and six lines


def test_every_environment_variable_is_documented_with_its_default() -> None:
    read = set()
    for path in (ROOT / "src").rglob("*"):
        if path.suffix in {".py", ".c", ".cpp", ".h", ".cu"}:
            read |= set(re.findall(rf"[\"']({VARIABLE})[\"']", path.read_text()))
    rows = re.findall(rf"^\| `({VARIABLE})` \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
    assert read and read == {name for name, _, _ in rows}
    assert all(default.strip() and meaning.strip() for _, default, meaning in rows)
    assert set(re.findall(VARIABLE, README)) == read


def test_every_name_in_the_readme_exists() -> None:
    names = set(re.findall(r"qkrope\.([a-zA-Z_][\w.]*)", README))
    assert len(names) > 8
    for name in names:
        pkgutil.resolve_name(f"qkrope.{name}")


@pytest.mark.parametrize("name", qkrope.__all__)
def test_public_name_imports(name: str) -> None:
    assert getattr(qkrope, name) is not None


def test_version_is_stated_once() -> None:
    assert qkrope.__version__ == version("qkrope")
    assert f"## [{qkrope.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_make_targets_named_in_the_text_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(code(README) + code(CONTRIBUTING))))
    assert {"bench", "test"} <= named and named <= targets


def test_commands_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from qkrope.cli import main

    named = set(re.findall(r"^qkrope ([a-z]+)", "\n".join(fenced(README, "sh")), re.MULTILINE))
    assert len(named) >= 6
    for name in named:
        assert main([name, "--help"]) == 0, name
        assert f"qkrope {name}" in capsys.readouterr().out


def test_tables_are_those_of_the_records() -> None:
    from qkrope.bench.tables import main

    # `make readme` is the remedy.
    results = ROOT / "benchmarks" / "results"
    assert main([str(ROOT / "README.md"), "--results", str(results), "--check"]) == 0


def test_files_named_in_the_text_exist() -> None:
    inline = [text for text in code(README) + code(CONTRIBUTING) if "\n" not in text]
    paths = [t for t in inline if re.fullmatch(r"(docs|tests|src|tools|benchmarks)/[\w./-]*", t)]
    assert len(paths) >= 5
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def code(text: str) -> list[str]:
    """Code blocks, and inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", rest)
