"""The README agrees with the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pg_layer
from pg_layer._config.options import OPTIONS, Config
from pg_layer.management.commands.pg_layer_sweep import Command

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTED = dict(
    re.findall(r"^\| `(\w+)` \| (\S+) \|", README.split("## Options")[1], re.MULTILINE)
)


def test_readme_documents_every_option() -> None:
    assert list(DOCUMENTED) == list(OPTIONS)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"using"}))
def test_readme_defaults_are_those_of_config(name: str) -> None:
    text = DOCUMENTED[name].strip("`")
    documented = None if text == "none" else ast.literal_eval(text)
    assert (getattr(Config(dsn="dbname=x"), name) or None) == (documented or None) or name == "dsn"


def test_readme_default_alias_is_that_of_config() -> None:
    assert Config().using == ast.literal_eval(DOCUMENTED["using"].strip("`"))


def test_readme_documents_the_options_of_the_sweeper() -> None:
    (usage,) = re.findall(r"manage\.py pg_layer_sweep (\[.*\])", README)
    parser = Command().create_parser("manage.py", "pg_layer_sweep")
    for option, value in re.findall(r"\[(--[\w-]+) ?(\S*)\]", usage):
        action = next(a for a in parser._actions if option in a.option_strings)
        if value and not value.isupper():
            assert str(action.default).removesuffix(".0") == value
        else:
            assert action.help


def test_readme_python_snippets_compile() -> None:
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        ast.parse("\n".join(line.removeprefix("   ") for line in snippet.splitlines()))


def test_readme_exceptions_can_be_imported() -> None:
    for name in (
        "ChannelFull",
        "MessageTooLarge",
        "LayerUnavailable",
        "OutcomeUnknown",
        "NotMigrated",
        "PgLayerError",
    ):
        assert f"`{name}`" in README
        assert name in pg_layer.__all__


def test_readme_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("target", re.findall(r"^make ([\w ]+?) *(?:#.*)?$", README, re.MULTILINE))
def test_readme_make_targets_exist(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in target.split():
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
