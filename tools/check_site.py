"""Fails where a built page fetches something: `tools/check_site.py build/site`.

Links that a reader may follow are fine. What a browser loads by itself must come from the site:
scripts, styles, pictures, fonts, frames, and `url()` or `@import` in a style.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
# <link> elements that name an address without loading it.
NAMES = {"canonical", "next", "prev"}
REMOTE = re.compile(r"^(?:[a-z]+:)?//", re.IGNORECASE)
STYLE = re.compile(r"""(?:url\(|@import\s+)\s*["']?((?:https?:)?//[^"')\s;]+)""")


class Page(HTMLParser):
    """Collects what a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element."""
        found = dict(attrs)
        address = found.get(LOADS.get(tag, "")) or ""
        if REMOTE.match(address) and found.get("rel") not in NAMES:
            self.remote.append(f"<{tag}> {address}")


def remote(file: Path) -> list[str]:
    """What one file of the site loads from elsewhere."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".css":
        return STYLE.findall(text)
    page = Page()
    page.feed(text)
    return page.remote + STYLE.findall(text)


def main(folder: str) -> int:
    """Print every fault; 1 if there is one, 2 if there is no site."""
    files = [f for f in sorted(Path(folder).rglob("*")) if f.suffix in {".html", ".css"}]
    if not any(file.suffix == ".html" for file in files):
        print(f"{folder}: no page", file=sys.stderr)
        return 2
    faults = [f"{file}: {what}" for file in files for what in remote(file)]
    print("\n".join(faults) or f"{folder}: {len(files)} files, nothing is loaded from elsewhere")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
