from __future__ import annotations

import sys
from typing import Any

from django.apps import AppConfig
from django.db import connections
from django.db.models.signals import post_migrate


class PgLayerConfig(AppConfig):
    name = "pg_layer"
    verbose_name = "Channel layer"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from pg_layer._runtime.databases_of_tests import follow_test_databases
        from pg_layer.checks import register_checks

        register_checks()
        follow_test_databases()
        post_migrate.connect(report_created_nothing, sender=self)


def report_created_nothing(using: str, verbosity: int = 1, **options: Any) -> None:
    """Say that `migrate` has created no tables, in a database that is not PostgreSQL.

    It is no error: a project may have databases other than the layer's, and no router.
    """
    is_applied = any(
        migration.app_label == "pg_layer" and not is_unapplied
        for migration, is_unapplied in options.get("plan", ())
    )
    vendor = connections[using].vendor
    if not is_applied or vendor == "postgresql" or verbosity < 1:
        return
    from pg_layer._config.aliases import name_postgresql_aliases
    from pg_layer._configured_layers import aliases_of_databases

    commands = [
        f"`python manage.py migrate pg_layer --database {alias}`"
        for alias in aliases_of_databases()
        if alias != using
    ]
    advice = f"Run {' and '.join(commands)}." if commands else name_postgresql_aliases()
    stdout = options.get("stdout") or sys.stdout
    stdout.write(
        f"  pg_layer has created no tables in the database {using!r}, which is {vendor}: the"
        f" channel layer needs PostgreSQL. {advice}"
    )
