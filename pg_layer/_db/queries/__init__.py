"""The statements of the layer, each with its parameters and results, by concern.

The functions that they call are defined, and explained, in ``migrations``.

The layer's own writes commit with ``synchronous_commit = off``: a crash of the server may undo the last
moments, and no transaction that notifies waits for the disk. The setting is made within the statement's
transaction, so that it works through a pooler and leaves the session as it was. Claiming jobs is the
exception: undone, it would hand them out twice. A statement in an application's transaction (``own`` is
false) leaves the durability of its commit alone.
"""

from __future__ import annotations

from pg_layer._db.statement import Statement


def all_statements() -> list[Statement]:
    """Each statement of these modules."""
    from pg_layer._db.queries import access, groups, lease, maintenance, receive, send

    return [
        value
        for module in (send, receive, groups, lease, maintenance, access)
        for value in vars(module).values()
        if isinstance(value, Statement)
    ]
