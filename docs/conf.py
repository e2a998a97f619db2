"""The configuration of Sphinx for the documentation site, which `make docs` builds."""

import os
import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import django
from django.conf import settings

# autodoc imports the package, and its models need settings.
settings.configure(INSTALLED_APPS=["django.contrib.contenttypes", "channels", "pg_layer"])
django.setup()

project = "pg_layer"
release = version = version_of("pg-layer")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
root_doc = "index"
default_role = "code"  # docstrings write names as in Markdown

myst_heading_anchors = 6

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72

html_theme = "furo"
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"  # Furo's own underlines names, like links
html_title = "pg_layer"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options: dict[str, Any] = {"top_of_page_buttons": []}

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Pages of the repository that are also pages of the site. The file of the page in this folder is
# added below.
PAGES = {
    "index": ROOT / "README.md",
    "changes": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "benchmarking": ROOT / "benchmarks" / "README.md",
}


def read_page(app: object, docname: str, source: list[str]) -> None:
    """Insert a page of the repository, and adapt links that are valid in the repository.

    A link to another file of the repository becomes a download, one to a folder plain text.
    """
    page = PAGES.get(docname)
    if page:
        source[0] = f"{page.read_text(encoding='utf-8')}\n{source[0]}"
    folder = page.parent if page else (DOCS / docname).parent
    names = {path: f"{name}.md" for name, path in PAGES.items()}

    def adapt(link: re.Match[str]) -> str:
        path, hash_, anchor = link["target"].partition("#")
        target = Path(os.path.normpath(folder / path))
        if not path or re.match("[a-z]+:", path) or not target.exists():
            return link[0]  # Sphinx reports a link without a target
        if target in names:
            target = DOCS / names[target]
        path = os.path.relpath(target, (DOCS / docname).parent)
        if not target.is_relative_to(DOCS):
            return f"{{download}}`{link['text']} <{path}>`" if target.is_file() else link["text"]
        return f"{link['mark']}[{link['text']}]({path}{hash_}{anchor})"

    source[0] = re.sub(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", adapt, source[0])


def setup(app: Any) -> None:
    """Connect the events of Sphinx."""
    app.connect("source-read", read_page)
