"""Definitions that the modules of queries share."""

from __future__ import annotations

from typing import Any, Protocol

from pg_layer._db.statement import Statement

# The beginning of a SELECT whose transaction does not wait for the disk.
LAZY = "SELECT set_config('synchronous_commit', 'off', true), "


class Executor(Protocol):
    """An object that runs single statements: a `Session`, or Django's connection."""

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows."""
        ...


def lazily(own: str) -> str:
    """Return the beginning of a SELECT that does not wait for the disk if ``own`` is true.

    ``own``: a parameter of the statement, as ``$7``. It is a CASE because a statement in a
    transaction of the application must not change how that transaction commits.
    """
    return f"SELECT CASE WHEN {own} THEN set_config('synchronous_commit', 'off', true) END, "


async def one(session: Executor, statement: Statement, *values: object) -> tuple[Any, ...]:
    """Run a statement that returns one row. Return the row."""
    (row,) = await session.execute(statement, *values)
    return row
