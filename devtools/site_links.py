"""``python -m devtools.site_links FOLDER``: check the links of a built site, without the network.

Each link inside the site must lead to a file, and to an element with the id of its fragment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links and the ids of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids.update(value for name in ("id", "name") if (value := values.get(name)))
        self.links.update(value for name in ("href", "src") if (value := values.get(name)))


@cache
def _page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def broken_links(site: Path) -> Iterator[str]:
    """Yield each broken link as ``page: link``, in order."""
    site = site.resolve()
    for path in sorted(site.rglob("*.html")):
        for link in sorted(_page(path).links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            is_found = target.is_file() and target.is_relative_to(site)
            if is_found and fragment and target.suffix == ".html":
                is_found = fragment in _page(target).ids
            if not is_found:
                yield f"{path.relative_to(site)}: {link}"


def main(site: Path) -> int:
    """Print the broken links of a site. Return the exit status."""
    if not (site / "index.html").exists():
        print(f"{site} has no index.html: build the site first, with `make docs`.")
        return 1
    broken = list(broken_links(site))
    for link in broken:
        print(f"broken link in {link}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
