"""The SQL statements of the layer by concern, each with its parameters and its typed function.

The functions that the statements call are defined, and documented, in ``migrations``.

The layer's own writes commit with ``synchronous_commit = off``. A crash of the server may undo the
last moments, and no transaction that notifies waits for the disk. The statement makes the setting
for its transaction, so that it works through a pooler and does not change the session. Claims and
releases of jobs are the exception: a claim that a crash undid would hand out the jobs twice. A
statement in a transaction of the application (``own`` is false) does not change how that
transaction commits.

Arguments that several modules use:

``own``: the statement is the layer's own, alone in its transaction.
``quiet``: the statement marks its rows and does not announce them; the caller must.
"""

from __future__ import annotations

from pg_layer._db.statement import Statement


def all_statements() -> list[Statement]:
    """Return every statement of these modules."""
    from pg_layer._db.queries import access, groups, identity, lease, maintenance, receive, send

    return [
        value
        for module in (send, receive, groups, lease, maintenance, access, identity)
        for value in vars(module).values()
        if isinstance(value, Statement)
    ]
