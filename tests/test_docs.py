"""README, CONTRIBUTING and docs say what is true: their code runs, and what they name exists.

A ```python block runs on the CPU, after those above it on the page, in the same namespace. One
whose first line is `# needs a CUDA device` runs where there is one (`-m gpu`), again after those
above it.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qkrope

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
NEEDS_CUDA = "# needs a CUDA device\n"
LANGUAGES = {"python", "sh", ""}  # of a code block; "" is a tree of files or a formula


def fenced(text: str, language: str) -> list[str]:
    """The bodies of the text's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Code blocks, and inline code."""
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [block for language in sorted(LANGUAGES) for block in fenced(text, language)]
    return blocks + re.findall(r"`([^`\n]+)`", rest)


SNIPPETS = {page: fenced(text, "python") for page, text in PAGES.items()}
ON_CUDA = [page for page, blocks in SNIPPETS.items() if any(NEEDS_CUDA in b for b in blocks)]
EVERYTHING = "\n".join(text for page in PAGES.values() for text in code(page))


def tool(name: str) -> ModuleType:
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- code -------------------------------------------------------------------------------------


def run(page: str, cuda: bool) -> int:
    """Run a page's blocks and return how many ran."""
    names: dict[str, object] = {}
    ran = 0
    for number, block in enumerate(SNIPPETS[page]):
        if cuda or not block.startswith(NEEDS_CUDA):
            exec(compile(block, f"{page} python block {number}", "exec"), names)
            ran += 1
    return ran


@pytest.mark.parametrize("page", [page for page, blocks in SNIPPETS.items() if blocks])
def test_snippets_run_on_the_cpu(page: str) -> None:
    waiting = sum(block.startswith(NEEDS_CUDA) for block in SNIPPETS[page])
    assert run(page, cuda=False) == len(SNIPPETS[page]) - waiting


@pytest.mark.gpu
@pytest.mark.parametrize("page", ON_CUDA)
def test_snippets_run_on_cuda(cuda: str, page: str) -> None:
    for package in ("transformers", "diffusers"):
        if f"import {package}" in PAGES[page] or f"from {package}" in PAGES[page]:
            pytest.importorskip(package, reason=f"{page} needs {package}, which is not here")
    assert run(page, cuda=True) == len(SNIPPETS[page])
    torch.cuda.synchronize()


def test_every_code_block_is_found() -> None:
    """A block that the patterns above miss would run nowhere: indented, in ~~~, in a language of
    another spelling, or marked for CUDA elsewhere than in its first line.
    """
    for page, text in PAGES.items():
        fences = re.findall(r"^([ \t]*)(```+|~~~+)(.*)$", text, re.MULTILINE)
        assert all(indent == "" and fence == "```" for indent, fence, _ in fences), page
        opened = [language for _, _, language in fences[::2]]
        assert not [language for _, _, language in fences[1::2] if language], page
        assert {*opened} <= LANGUAGES, page
        assert opened.count("python") == len(SNIPPETS[page]), page
        marked = [b for b in SNIPPETS[page] if "needs a CUDA device" in b]
        assert all(b.startswith(NEEDS_CUDA) for b in marked), page
    assert sum(map(len, SNIPPETS.values())) > 40
    assert len(ON_CUDA) >= 2


# ---- names ------------------------------------------------------------------------------------


def test_every_name_in_the_text_exists() -> None:
    names = set(re.findall(r"(?<![\w./])qkrope\.([a-zA-Z_][\w.]*)", EVERYTHING))
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(f"qkrope.{name}")


def test_the_number_of_models_is_that_of_the_catalogue() -> None:
    from qkrope.models import entries

    assert f" {len(entries())} released models" in PAGES["docs/index.md"]


def test_every_public_name_is_in_the_api() -> None:
    documented = set(re.findall(r"^::: qkrope\.(\w+)$", PAGES["docs/api.md"], re.MULTILINE))
    assert {*qkrope.__all__} <= documented


def test_type_checkers_see_the_lazy_names() -> None:
    """What __getattr__ finds is also imported, from the same modules, where only they look."""
    tree = ast.parse((ROOT / "src/qkrope/__init__.py").read_text())
    block = next(
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)
    )
    seen = {
        name.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert seen == {**qkrope._LAZY, "reference": None}


def test_make_targets_named_in_the_text_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z][a-z-]*)", EVERYTHING, re.MULTILINE))
    assert {"bench", "test", "docs"} <= named and named <= targets


def test_commands_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from qkrope.cli import main

    named = set(re.findall(r"^qkrope ([a-z]+)", EVERYTHING, re.MULTILINE))
    assert len(named) >= 6
    for name in named:
        assert main([name, "--help"]) == 0, name
        assert f"qkrope {name}" in capsys.readouterr().out


def test_files_named_in_the_text_exist() -> None:
    inline = [text for page in PAGES.values() for text in code(page) if "\n" not in text]
    folders = "docs|tests|src|tools|benchmarks|examples|native"
    paths = [t for t in inline if re.fullmatch(rf"({folders})/[\w./-]*\w/?", t)]
    assert len(paths) >= 10
    bases = (ROOT, ROOT / "src" / "qkrope")
    assert not [path for path in paths if not any((base / path).exists() for base in bases)]


def test_links_between_files_lead_somewhere() -> None:
    """`make docs` checks the site; README and CONTRIBUTING are not in it."""
    for page in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page])
        assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


# ---- tables -----------------------------------------------------------------------------------


def test_tables_are_those_of_the_records() -> None:
    from qkrope.bench.tables import main

    # `make readme` is the remedy.
    results = ROOT / "benchmarks" / "results"
    pages = [str(ROOT / page) for page, text in PAGES.items() if "<!-- /" in text]
    assert len(pages) >= 4
    assert main([*pages, "--results", str(results), "--check"]) == 0


# ---- the site ---------------------------------------------------------------------------------


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="the extra qkrope[docs] is not installed")
    convert = tool("docstrings").to_markdown
    assert convert("What it does.\n\nx: a tensor,\nwith strides.\ny, z: numbers.\n\nMore.") == (
        "What it does.\n\n- `x`: a tensor,\n  with strides.\n- `y`, `z`: numbers.\n\nMore."
    )
    assert convert("Keywords:\nout: where.") == "Keywords:\n\n- `out`: where."
    assert convert("It changes\nnothing: one for all.") == "It changes\nnothing: one for all."
    assert convert("As here::\n\n    x: y") == "As here:\n\n    x: y"


@pytest.mark.parametrize(
    ("name", "text", "faults"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', 1),
        ("a.html", '<img src="//cdn.example/x.png"><link rel="stylesheet" href="a.css">', 1),
        ("a.html", "<style>@import 'https://cdn.example/x.css'</style>", 1),
        ("a.css", "@font-face { src: url(https://fonts.example/f.woff2) }", 1),
        ("a.html", '<a href="https://example.org">x</a><script src="x.js"></script>', 0),
        ("a.css", "a { background: url(data:image/png;base64,AA==) }", 0),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(
    tmp_path: Path, name: str, text: str, faults: int
) -> None:
    site = tool("check_site")
    (tmp_path / "index.html").write_text("<p>a page</p>")
    (tmp_path / name).write_text(text)
    assert len(site.remote(tmp_path / name)) == faults
    assert site.main(str(tmp_path)) == (1 if faults else 0)


def test_no_site_is_an_error(tmp_path: Path) -> None:
    assert tool("check_site").main(str(tmp_path)) == 2
