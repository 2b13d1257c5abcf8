"""What the README alone must have. Its code, names and tables: tests/test_docs.py."""

import re
import runpy
from importlib.metadata import version

import pytest

import qkrope
from test_docs import PAGES, ROOT, SNIPPETS

README = PAGES["README.md"]
VARIABLE = r"QKROPE_[A-Z0-9_]+"


def test_the_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    assert "of the bound" in capsys.readouterr().out


def test_the_example_has_six_lines() -> None:
    assert len(SNIPPETS["README.md"]) >= 3
    assert len(SNIPPETS["README.md"][0].splitlines()) <= 7  # an import and six lines


@pytest.mark.parametrize("page", ["README.md", "docs/reliability.md"])
def test_every_environment_variable_is_documented_with_its_default(page: str) -> None:
    read = set()
    for path in (ROOT / "src").rglob("*"):
        if path.suffix in {".py", ".c", ".cpp", ".h", ".cu"}:
            read |= set(re.findall(rf"[\"']({VARIABLE})[\"']", path.read_text()))
    row = rf"^\| `({VARIABLE})` \| ([^|]+) \| ([^|]+) \|$"
    rows = re.findall(row, PAGES[page], re.MULTILINE)
    assert read and read == {name for name, _, _ in rows}
    assert all(default.strip() and meaning.strip() for _, default, meaning in rows)
    assert set(re.findall(VARIABLE, PAGES[page])) == read
    assert rows == re.findall(row, README, re.MULTILINE)


@pytest.mark.parametrize("name", qkrope.__all__)
def test_public_name_imports(name: str) -> None:
    assert getattr(qkrope, name) is not None


def test_version_is_stated_once() -> None:
    assert qkrope.__version__ == version("qkrope")
    assert f"## [{qkrope.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
