"""What the queries share."""

from __future__ import annotations

from typing import Any, Protocol

from pg_layer._db.statement import Statement


class Executor(Protocol):
    """What runs a single statement: a `Session`, or Django's connection."""

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of the statement."""
        ...


async def one(session: Executor, statement: Statement, *values: object) -> tuple[Any, ...]:
    """Return the only row of a statement."""
    (row,) = await session.execute(statement, *values)
    return row


# For the layer's own writes. A CASE, because a statement in an application's transaction has another commit.
def lazily(own: str) -> str:
    """Begin a SELECT whose transaction does not wait for the disk if the parameter ``own`` is true."""
    return f"SELECT CASE WHEN {own} THEN set_config('synchronous_commit', 'off', true) END, "


LAZY = "SELECT set_config('synchronous_commit', 'off', true), "
