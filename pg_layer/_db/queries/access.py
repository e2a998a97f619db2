"""Obstacles between a role and the layer's rows: missing privileges, row-level security."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from psycopg import Connection, errors

from pg_layer._db.queries.maintenance import LOOK_TIMEOUT, TABLES
from pg_layer._db.session import Session
from pg_layer._db.statement import TEXTS, Statement
from pg_layer._state.status import Problem

MESSAGE = "pg_layer_message"
FUNCTIONS = "pg_layer_*"  # the privilege to execute all functions counts as one
_WRITES = ("INSERT", "UPDATE", "DELETE", "USAGE")

ROLE = Statement("SELECT quote_ident(current_user)")
# Schemas in search_path with the tables that the role may not use. PostgreSQL does not find names
# in them, and reports that the tables do not exist.
HIDDEN = Statement(
    """
    SELECT quote_ident(n.nspname)
    FROM pg_namespace AS n JOIN pg_class AS c ON c.relnamespace = n.oid
    WHERE c.relname = 'pg_layer_message' AND NOT has_schema_privilege(n.oid, 'USAGE')
        AND to_regclass('pg_layer_message') IS NULL
        AND n.nspname IN (
            SELECT CASE trim(BOTH ' "' FROM part) WHEN '$user' THEN current_user
                ELSE trim(BOTH ' "' FROM part) END
            FROM unnest(string_to_array(current_setting('search_path'), ',')) AS part
        )
    """
)
# Row-level security is not active for superusers, for roles with BYPASSRLS, and, unless it is
# forced, for the owner.
ROW_SECURITY = Statement(
    """
    SELECT t.name FROM unnest($1) WITH ORDINALITY AS t (name, place)
    WHERE row_security_active(t.name) ORDER BY place
    """,
    TEXTS,
)
GRANTED = Statement(
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
    SELECT p.oid::regprocedure::text, p.pronamespace::regnamespace::text FROM pg_proc AS p
    WHERE p.proname LIKE 'pg\\_layer\\_%' AND NOT has_function_privilege(p.oid, 'EXECUTE')
        AND p.pronamespace = (
            SELECT relnamespace FROM pg_class WHERE oid = 'pg_layer_message'::regclass)
    ORDER BY 1
    """
)


class Privilege(NamedTuple):
    """A privilege on a relation, or on one of its columns."""

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
# The kinds of roles in docs/reference/permissions.md, with the privileges that the page grants.
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

    Without this check a statement would report missing tables, and the advice would be to migrate.
    """
    for (schema,) in Session(conn).execute_now(HIDDEN, timeout=LOOK_TIMEOUT):
        raise errors.InsufficientPrivilege(f"permission denied for schema {schema}")


def role_problems(conn: Connection[Any]) -> list[Problem]:
    """Return all problems that keep the role from rows.

    Raises psycopg's error if the tables are missing, or in a schema that the role may not use.
    """
    prove_usage(conn)
    return [problem for problem in (row_security(conn), privileges(conn)) if problem is not None]


def row_security(conn: Connection[Any]) -> Problem | None:
    """Return a problem if row-level security applies to the role. Needs no privilege."""
    run = partial(Session(conn).execute_now, timeout=LOOK_TIMEOUT)
    tables = [table for (table,) in run(ROW_SECURITY, TABLES)]
    if not tables:
        return None
    ((role,),) = run(ROLE)
    commands = [f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY" for table in tables]
    return Problem(
        f"Row-level security applies to the role {role} on {', '.join(tables)}:"
        " rows that it needs are hidden from it, or refused.",
        f"As the owner: {'; '.join(commands)}.",
    )


def privileges(conn: Connection[Any]) -> Problem | None:
    """Return a problem if the role lacks privileges for its use of the layer. Needs no privilege.

    What a role does follows from what it may write. Each privilege to write must belong to a kind
    of role (`KINDS`) whose privileges are complete. A role that may write nothing only reads: it
    has no problem.
    """
    run = partial(Session(conn).execute_now, timeout=LOOK_TIMEOUT)
    known = sorted(frozenset().union(*KINDS.values()) - _FUNCTIONS)
    answers = run(GRANTED, *(list(part) for part in zip(*known, strict=True)))
    granted = {
        privilege for privilege, (is_granted,) in zip(known, answers, strict=True) if is_granted
    }
    not_executable = run(NOT_EXECUTABLE)
    if not not_executable:
        granted |= _FUNCTIONS
    missing = {kind: needed - granted for kind, needed in KINDS.items()}
    complete = {_place(p) for kind, needed in KINDS.items() if not missing[kind] for p in needed}
    incomplete = {_place(p) for p in granted if p.name in _WRITES} - complete
    if not incomplete:
        return None
    # The kind with the fewest missing privileges, of those that include all that the role may
    # write. A smaller kind would leave a role that does more without a part of what it needs.
    kinds = [kind for kind, needed in KINDS.items() if incomplete <= {_place(p) for p in needed}]
    kind = min(kinds, key=lambda kind: len(missing[kind]))
    ((role,),) = run(ROLE)
    grants = _grants(missing[kind], not_executable)
    return Problem(
        f"The role {role} lacks privileges to {kind}: {'; '.join(grants)}.",
        f"As the owner: {'; '.join(f'GRANT {grant} TO {role}' for grant in grants)}."
        " See docs/reference/permissions.md.",
    )


def _place(privilege: Privilege) -> tuple[str, str]:
    return privilege.name, privilege.relation


def _grants(missing: frozenset[Privilege], not_executable: Sequence[Any]) -> list[str]:
    """Return the missing privileges in the syntax of GRANT, columns of a relation together.

    ``not_executable``: functions with their schema.
    """
    columns: dict[tuple[str, str], list[str]] = {}
    for privilege in sorted(missing):
        columns.setdefault(_place(privilege), []).append(privilege.column)
    grants = []
    for (name, relation), of in columns.items():
        if relation == FUNCTIONS:
            function, schema = not_executable[0]
            of_all = f"ALL FUNCTIONS IN SCHEMA {schema}"
            grants.append(f"EXECUTE ON {of_all if not_executable[1:] else f'FUNCTION {function}'}")
        else:
            listed = f" ({', '.join(of)})" if any(of) else ""
            kind = "SEQUENCE " if relation.endswith("_seq") else ""
            grants.append(f"{name}{listed} ON {kind}{relation}")
    return grants
