from __future__ import annotations

from django.apps import AppConfig


class PgLayerConfig(AppConfig):
    name = "pg_layer"
    verbose_name = "Channel layer"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from pg_layer._runtime.databases_of_tests import follow_test_databases
        from pg_layer.checks import register_checks

        register_checks()
        follow_test_databases()
