"""What keeps the package readable: who may speak to the database, where SQL stands, how long a module is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pg_layer

PACKAGE = Path(pg_layer.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]

# Pure: thousands of interleavings of them can be tried in a second.
PURE_PACKAGES = ["_messages", "_state"]
PURE = ["lane", "tasks", "codec", "encryption", "statement", "room", "ops", "status"] + [
    f"{package}.{path.stem}"
    for package in PURE_PACKAGES
    for path in sorted((PACKAGE / package).glob("*.py"))
    if path.stem != "__init__"
]
# What the pure packages may import of pg_layer, and of others nothing that does I/O.
ALLOWED = {
    "_messages": ("pg_layer._messages",),
    "_state": ("pg_layer._messages", "pg_layer._state", "pg_layer.codec", "pg_layer.exceptions"),
}
DOES_IO = ("psycopg", "psycopg_pool", "django", "channels", "socket", "select", "subprocess", "sqlite3")
# `dsn` reads connection strings, and nothing else, with psycopg.
SPEAKS_TO_POSTGRESQL = {
    "_db/queries/access.py",
    "_db/queries/lease.py",
    "_db/queries/maintenance.py",
    "_receive/listener.py",
    "_runtime/engine.py",
    "_runtime/loops.py",
    "_runtime/owner.py",
    "connections.py",
    "django_session.py",
    "dsn.py",
    "faults.py",
    "session.py",
    "sweeper.py",
    "sync.py",
}

STATEMENT = re.compile(
    r"""
    \b(?: select\s.+\bfrom\b | select\s+\w+\( | insert\s+into\s | update\s+\w+\s+(?:as\s+\w+\s+)?set\s
        | delete\s+from\s | truncate\s | (?:create|alter|drop)\s+(?:table|index|function)\s )
    | ^\s* (?: select | listen | unlisten | notify | begin | commit | rollback | savepoint | vacuum | explain
        | set\s+transaction ) \s+ [\w*"(%]
    | \bpg_(?:layer_)?\w+\(
    """,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """The line and name of every import that takes place at run time, wherever in the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ("pg_layer." if node.level else "") + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """The line and text of every string but docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, str):
                yield node.lineno, node.value
            elif isinstance(node.value, bytes):
                yield node.lineno, node.value.decode(errors="replace")


@pytest.fixture(scope="module")
def unimportable() -> dict[str, str]:
    """The pure modules that cannot be imported where there is no psycopg, and why."""
    # Each anew, and without the package's own __init__, which imports the whole layer.
    script = f"""
import importlib, sys, types

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("psycopg", "psycopg_pool", "psycopg_c", "psycopg_binary"):
            raise ImportError(f"{{name}} was imported")

sys.meta_path.insert(0, Refuse())
for name in {PURE!r}:
    for known in [known for known in sys.modules if known.split(".")[0] == "pg_layer"]:
        del sys.modules[known]
    package = sys.modules["pg_layer"] = types.ModuleType("pg_layer")
    package.__path__ = [{str(PACKAGE)!r}]
    try:
        importlib.import_module(f"pg_layer.{{name}}")
    except ImportError as error:
        print(name, error, sep="\\t")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return dict(line.split("\t") for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_need_no_database_code(name: str, unimportable: dict[str, str]) -> None:
    assert name not in unimportable, unimportable[name]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_only_some_modules_speak_to_postgresql(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) in SPEAKS_TO_POSTGRESQL:
        return
    found = [f"line {line}: {name}" for line, name in imports(path) if name.startswith("psycopg")]
    assert not found


def test_modules_that_may_speak_to_postgresql_do() -> None:
    speakers = re.compile(r"psycopg(_pool)?(\..*)?")
    silent = {
        name
        for name in SPEAKS_TO_POSTGRESQL
        if not any(speakers.fullmatch(imported) for _, imported in imports(PACKAGE / name))
    }
    assert not silent


@pytest.mark.parametrize("package", PURE_PACKAGES)
def test_pure_packages_import_only_what_is_pure(package: str) -> None:
    """What decides about messages can be tried without a database, and says so by its imports."""
    found = [
        f"{path.name}, line {line}: {name}"
        for path in sorted((PACKAGE / package).glob("*.py"))
        for line, name in imports(path)
        if (name.startswith("pg_layer") and not name.startswith(ALLOWED[package]))
        or name.split(".")[0] in DOES_IO
    ]
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_sql_stands_in_one_package(path: Path) -> None:
    if path.parent == PACKAGE / "_db" / "queries":
        return
    found = [f"line {line}: {text.strip()[:60]}" for line, text in strings(path) if STATEMENT.search(text)]
    assert not found


@pytest.mark.parametrize("name", ["send", "receive", "groups", "lease", "maintenance"])
def test_sql_of_each_concern_stands_in_its_module(name: str) -> None:
    path = PACKAGE / "_db" / "queries" / f"{name}.py"
    assert [text for _, text in strings(path) if STATEMENT.search(text)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "select * from t",
        "INSERT INTO pg_layer_message VALUES (1)",
        "UPDATE t SET a = 1",
        "update t as x set a = 1",
        "DELETE FROM t",
        "LISTEN x",
        'UNLISTEN "x"',
        "UNLISTEN *",
        "NOTIFY x",
        "BEGIN ISOLATION LEVEL READ COMMITTED",
        "WITH a AS (SELECT b FROM c) DELETE FROM d",
        "TRUNCATE pg_layer_message",
        "x = pg_notify('a', 'b')",
    ],
)
def test_sql_is_recognised(sql: str) -> None:
    assert STATEMENT.search(sql)


@pytest.mark.parametrize(
    "text",
    [
        "Not listening to the database: %s Trying again.",
        "Please select a group.",
        "The channel layer was closed.",
        "update the settings",
        "Somebody sent a NOTIFY on %s that pg_layer did not send.",
        "pg_layer",
        "Deleted from here",
    ],
)
def test_english_is_not_taken_for_sql(text: str) -> None:
    assert not STATEMENT.search(text)
