"""The project's docstrings as Markdown, for mkdocstrings: a griffe extension.

A docstring is written to be read in a terminal. Two of its habits mean something else in Markdown:
lines "name: meaning" run together into one paragraph, and "::" opens an indented block.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# "q, k: ..." at the start of a line. Prose that wraps before such a word is no end of a sentence.
_ARGUMENT = re.compile(r"^(?P<names>[a-z]\w*(?:, [a-z]\w*)*): (?=\S)")


def to_markdown(text: str) -> str:
    """One docstring, its arguments as a list and its formulas as indented blocks."""
    lines: list[str] = []
    inside = False  # an argument whose text may go on
    for line in text.splitlines():
        found = _ARGUMENT.match(line)
        last = lines[-1].rstrip() if lines else ""
        if found and (not last or last.endswith((".", ":"))):
            names = ", ".join(f"`{name}`" for name in found["names"].split(", "))
            if last and not inside:
                lines.append("")
            lines.append(f"- {names}: {line[found.end() :]}")
            inside = True
            continue
        inside = inside and bool(line.strip())
        lines.append(f"  {line}" if inside else re.sub(r"::$", ":", line))
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before its sections are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
