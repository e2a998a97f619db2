"""The generated parts of the reference, and what the pages say about the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

import pg_layer
from devtools.option_texts import OPTION_TEXTS
from devtools.reference import COMMANDS, PARTS, default_of, read_tables, updated
from pg_layer._config.options import MAX_COUNT, MAX_MESSAGE_SIZE, MAX_SECONDS, OPTIONS, Config

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


@pytest.mark.parametrize("name", PARTS)
def test_generated_part_is_up_to_date(name: str) -> None:
    """If this fails, run `python -m devtools.reference`."""
    page, text = updated(name)
    assert page.read_text(encoding="utf-8") == text


def test_option_texts_describe_every_option_in_order() -> None:
    assert list(OPTION_TEXTS) == list(OPTIONS)
    assert all(all(text) for text in OPTION_TEXTS.values())


def test_default_of_each_option_is_that_of_config() -> None:
    assert {name: default_of(name) for name in ("using", "dsn", "expiry", "handle_sigterm")} == {
        "using": '`"default"`',
        "dsn": "none",
        "expiry": "`60`",
        "handle_sigterm": "`True`",
    }


# Of each option with a range: the ends, which are allowed, and values beyond them.
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "prefix": (["a", "a" * 50], ["", "a" * 51, "ä"]),
    **{name: ([MAX_SECONDS, 1e-9], [0, MAX_SECONDS + 1]) for name in ("expiry", "send_timeout")},
    **{
        name: ([MAX_SECONDS, 1e-9, None], [0, MAX_SECONDS + 1])
        for name in ("group_expiry", "poll_interval")
    },
    "lease": ([MAX_SECONDS, 50], [0, MAX_SECONDS + 1]),
    "heartbeat": ([24, 1e-9], [24.1, 0]),
    "sweep_interval": ([0, MAX_SECONDS], [-1, MAX_SECONDS + 1]),
    "capacity": ([1, MAX_COUNT], [0, MAX_COUNT + 1, 1.5]),
    "pool_max_size": ([1, MAX_COUNT], [0, MAX_COUNT + 1]),
    "channel_capacity": ([{"a*": 1}, {re.compile("a"): MAX_COUNT}], [{"a": 0}, {b"a": 1}]),
    "max_message_size": ([1, MAX_MESSAGE_SIZE], [0, MAX_MESSAGE_SIZE + 1]),
    "symmetric_encryption_keys": ([["a"], [b"a"], None], [[], [""], "a"]),
    "serializer_format": (["msgpack", "json"], ["pickle"]),
    "allow_unencrypted": ([True, False], [None, 1]),
    "handle_sigterm": ([True, False], [None, 1]),
    "on_disconnect": (["a", None], [""]),
    "on_reconnect": (["a", None], [""]),
}


def test_range_of_each_option_is_tested() -> None:
    assert set(RANGES) | {"dsn", "using", "listen_dsn"} == set(OPTIONS)


@pytest.mark.parametrize("name", RANGES)
def test_documented_range_is_that_of_config(name: str) -> None:
    allowed, refused = RANGES[name]
    for value in allowed:
        Config(**{name: value})
    for value in refused:
        with pytest.raises(ImproperlyConfigured, match=name):
            Config(**{name: value})
    largest = max((value for value in allowed if type(value) is int and value > 50), default=None)
    assert largest is None or f"{largest:,}" in OPTION_TEXTS[name].range


def test_reference_of_commands_gives_every_command_a_section() -> None:
    commands = (ROOT / "pg_layer" / "management" / "commands").glob("pg_layer_*.py")
    assert {path.stem for path in commands} == set(COMMANDS)


def test_reference_of_tables_has_each_table_and_a_comment_for_each_column() -> None:
    sql = "".join(path.read_text("utf-8") for path in (ROOT / "migrations").glob("*.sql"))
    tables = list(read_tables())
    assert [t.name for t in tables] == re.findall(r"CREATE (?:UNLOGGED )?TABLE (\w+)", sql)
    for table in tables:
        assert table.comment
        assert [column.name for column in table.columns if not column.comment] == []


def test_reference_of_the_api_names_every_exported_exception() -> None:
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    for name in pg_layer.__all__:
        assert re.search(rf"^\.\. (auto)?(exception|class):: {name}\b", text, re.MULTILINE), name


# Texts in the page that PostgreSQL, Django, psycopg or Python write.
OF_OTHERS = {
    "You cannot call this from an async context",
    'database "test_..." is being accessed by other users',
    "permission denied for table pg_layer_...",
    "cannot execute ... in a read-only transaction",
    "during recovery",
    "too many clients already",
    "remaining connection slots",
    "cannot adapt type 'Json'",
    "object has no attribute 'copy_expert'",
    "No module named 'daphne'",
}


def test_troubleshooting_quotes_errors_that_the_package_raises() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        text
        for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
        for text in re.findall(r"`(.+?)`", cell)
    ]
    assert len(quoted) > 20
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "pg_layer").rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)  # the parts of a long string
    code = " ".join(code.split())
    assert [text for text in quoted if text not in code and text not in OF_OTHERS] == []
