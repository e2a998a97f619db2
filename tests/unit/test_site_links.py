"""The check of the links of a built site."""

from __future__ import annotations

from pathlib import Path

import pytest

from devtools.site_links import broken_links, main


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_site_links_that_lead_to_files_and_ids_are_not_broken(tmp_path: Path) -> None:
    write(tmp_path, "index.html", '<a id="top" href="sub/page.html#part"></a><img src="a.svg">')
    write(tmp_path, "sub/page.html", '<h2 id="part"></h2><a href="../index.html?q=1#top"></a>')
    write(tmp_path, "sub/self.html", '<a id="x" href="#x"></a><a href="https://a.example/b"></a>')
    write(tmp_path, "a.svg", "")
    assert list(broken_links(tmp_path)) == []
    assert main(tmp_path) == 0


@pytest.mark.parametrize(
    "link", ["missing.html", "index.html#missing", "#missing", "../outside.html", "missing.svg"]
)
def test_site_link_without_target_is_broken(
    tmp_path: Path, link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "outside.html", "")
    write(tmp_path, "site/index.html", f'<a href="{link}"></a>')
    assert list(broken_links(tmp_path / "site")) == [f"index.html: {link}"]
    assert main(tmp_path / "site") == 1
    assert capsys.readouterr().out == f"broken link in index.html: {link}\n"


def test_site_that_is_not_built_is_an_error(tmp_path: Path) -> None:
    assert main(tmp_path) == 1
