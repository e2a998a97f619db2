"""What keeps a role from the layer's rows: privileges that it lacks, and row-level security."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from psycopg import Connection, errors

from pg_layer._db.queries.maintenance import LOOK_PATIENCE, TABLES
from pg_layer._db.session import Session
from pg_layer._db.statement import TEXTS, Statement
from pg_layer._state.status import Problem

MESSAGE = "pg_layer_message"
FUNCTIONS = "pg_layer_*"  # all of them count as one
_WRITES = ("INSERT", "UPDATE", "DELETE", "USAGE")

ROLE = Statement("SELECT quote_ident(current_user)")
# Names in a schema that a role may not use are as if they were not there.
HIDDEN = Statement(
    """
    SELECT quote_ident(n.nspname) FROM pg_namespace AS n JOIN pg_class AS c ON c.relnamespace = n.oid
    WHERE c.relname = 'pg_layer_message' AND NOT has_schema_privilege(n.oid, 'USAGE')
        AND to_regclass('pg_layer_message') IS NULL
        AND n.nspname IN (
            SELECT CASE trim(BOTH ' "' FROM part) WHEN '$user' THEN current_user
                ELSE trim(BOTH ' "' FROM part) END
            FROM unnest(string_to_array(current_setting('search_path'), ',')) AS part
        )
    """
)
# It is not active for superusers, for roles with BYPASSRLS, and for the owner unless it is forced.
ROW_SECURITY = Statement(
    "SELECT t.name FROM unnest($1) WITH ORDINALITY AS t (name, place) WHERE row_security_active(t.name)"
    " ORDER BY place",
    TEXTS,
)
HELD = Statement(
    """
    SELECT CASE
        WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, p.name)
        WHEN p.of = '' THEN has_table_privilege(c.oid, p.name)
        ELSE has_column_privilege(c.oid, p.of, p.name)
    END
    FROM unnest($1, $2, $3) WITH ORDINALITY AS p (name, relation, of, place)
        JOIN pg_class AS c ON c.oid = p.relation::regclass
    ORDER BY p.place
    """,
    *(TEXTS, TEXTS, TEXTS),
)
NOT_EXECUTABLE = Statement(
    """
    SELECT p.oid::regprocedure::text FROM pg_proc AS p
    WHERE p.proname LIKE 'pg\\_layer\\_%' AND NOT has_function_privilege(p.oid, 'EXECUTE')
        AND p.pronamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'pg_layer_message'::regclass)
    ORDER BY 1
    """
)


class Privilege(NamedTuple):
    """A privilege on a relation, or on a column of it."""

    name: str
    relation: str
    column: str = ""


def _privileges(names: str, relations: str, columns: str = "") -> frozenset[Privilege]:
    return frozenset(
        Privilege(name, relation, column)
        for name in names.split()
        for relation in relations.split()
        for column in columns.split() or [""]
    )


_SEQUENCE = _privileges("SELECT USAGE", "pg_layer_message_id_seq")
_FUNCTIONS = _privileges("EXECUTE", FUNCTIONS)
# What docs/permissions.md grants, by what the role does.
KINDS = {
    "do all that the layer can do": (
        _privileges("SELECT INSERT UPDATE DELETE", " ".join(TABLES))
        | _privileges("SELECT", "pg_layer_group")
        | _SEQUENCE
        | _FUNCTIONS
    ),
    "send": (
        _privileges("SELECT", MESSAGE, "address id xid boot marked kind channel expires_at")
        | _privileges(
            "INSERT", MESSAGE, "address xid boot marked channel excluded payload expires_at"
        )
        | _privileges("SELECT", "pg_layer_membership pg_layer_lease_clock pg_layer_low_id")
        | _privileges("SELECT INSERT", "pg_layer_boot")
        | _FUNCTIONS
    ),
    "receive": (
        _privileges("SELECT DELETE", MESSAGE)
        | _privileges("UPDATE", MESSAGE, "address xid boot marked")
        | _privileges(
            "SELECT INSERT UPDATE DELETE", "pg_layer_membership pg_layer_client pg_layer_low_id"
        )
        | _privileges("SELECT INSERT UPDATE", "pg_layer_lease_clock pg_layer_last_sweep")
        | _privileges("SELECT INSERT DELETE", "pg_layer_boot")
        | _SEQUENCE
        | _FUNCTIONS
    ),
}


def prove_usage(conn: Connection[Any]) -> None:
    """Raise psycopg's error if the tables are in a schema that the role may not use.

    A statement would say that there are no such tables, and have them migrated.
    """
    for (schema,) in Session(conn).execute_now(HIDDEN, patience=LOOK_PATIENCE):
        raise errors.InsufficientPrivilege(f"permission denied for schema {schema}")


def role_problems(conn: Connection[Any]) -> list[Problem]:
    """Return all that keeps the role from rows. Raise psycopg's error if there are no tables for it."""
    prove_usage(conn)
    return [fault for fault in (row_security(conn), privileges(conn)) if fault is not None]


def row_security(conn: Connection[Any]) -> Problem | None:
    """Whether row-level security applies to the role. Needs no privilege."""
    run = partial(Session(conn).execute_now, patience=LOOK_PATIENCE)
    tables = [table for (table,) in run(ROW_SECURITY, TABLES)]
    if not tables:
        return None
    ((role,),) = run(ROLE)
    return Problem(
        f"Row-level security applies to the role {role} on {', '.join(tables)}:"
        " rows that it needs are hidden from it, or refused.",
        f"As the owner: {'; '.join(f'ALTER TABLE {table} DISABLE ROW LEVEL SECURITY' for table in tables)}.",
    )


def privileges(conn: Connection[Any]) -> Problem | None:
    """Whether the role lacks a part of what it needs for what it does. Needs no privilege.

    What it does is told by what it may write: each such privilege has to be one of a kind of role that is
    complete. A role that may write nothing is taken for one that only looks.
    """
    run = partial(Session(conn).execute_now, patience=LOOK_PATIENCE)
    asked = sorted(frozenset().union(*KINDS.values()) - _FUNCTIONS)
    answers = run(HELD, *(list(part) for part in zip(*asked, strict=True)))
    held = {privilege for privilege, (is_held,) in zip(asked, answers, strict=True) if is_held}
    functions = [function for (function,) in run(NOT_EXECUTABLE)]
    if not functions:
        held |= _FUNCTIONS
    lacks = {kind: needed - held for kind, needed in KINDS.items()}
    explained = {_place(p) for kind, needed in KINDS.items() if not lacks[kind] for p in needed}
    begun = {_place(p) for p in held if p.name in _WRITES} - explained
    if not begun:
        return None
    kinds = [kind for kind, needed in KINDS.items() if begun & {_place(p) for p in needed}]
    kind = min(kinds, key=lambda kind: len(lacks[kind]))
    ((role,),) = run(ROLE)
    grants = _grants(lacks[kind], functions)
    return Problem(
        f"The role {role} lacks privileges to {kind}: {'; '.join(grants)}.",
        f"As the owner: {'; '.join(f'GRANT {grant} TO {role}' for grant in grants)}."
        " See docs/permissions.md.",
    )


def _place(privilege: Privilege) -> tuple[str, str]:
    return privilege.name, privilege.relation


def _grants(lacking: frozenset[Privilege], functions: list[str]) -> list[str]:
    """The privileges as GRANT takes them."""
    columns: dict[tuple[str, str], list[str]] = {}
    for privilege in sorted(lacking):
        columns.setdefault(_place(privilege), []).append(privilege.column)
    grants = []
    for (name, relation), of in columns.items():
        if relation == FUNCTIONS:
            more = f" and {len(functions) - 2} more" if functions[2:] else ""
            grants.append(f"EXECUTE ON FUNCTION {', '.join(functions[:2])}{more}")
        else:
            listed = f" ({', '.join(of)})" if any(of) else ""
            kind = "SEQUENCE " if relation.endswith("_seq") else ""
            grants.append(f"{name}{listed} ON {kind}{relation}")
    return grants
