from pathlib import Path

from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.state import StateApps

FOLDER = Path(__file__).parent


def create(apps: StateApps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    run(schema_editor, "0001_[0-9]_*.sql")


def drop(apps: StateApps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    run(schema_editor, "0001_reverse.sql")


def run(schema_editor: BaseDatabaseSchemaEditor, files: str) -> None:
    # A project may have databases other than PostgreSQL, and no router. The layer cannot use them:
    # `report_created_nothing` in apps.py says so.
    if schema_editor.connection.vendor == "postgresql":
        for file in sorted(FOLDER.glob(files)):
            schema_editor.execute(file.read_text(encoding="utf-8"), params=None)


def name(**options: object) -> "models.TextField[str, str]":
    return models.TextField(db_collation="C", **options)  # type: ignore[arg-type]


class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.SeparateDatabaseAndState(
            database_operations=[migrations.RunPython(create, drop)],
            state_operations=[
                migrations.CreateModel(
                    name="Message",
                    fields=[
                        ("id", models.BigAutoField(primary_key=True, serialize=False)),
                        ("address", name()),
                        ("boot", models.BigIntegerField()),
                        ("marked", models.BooleanField(default=False)),
                        ("kind", name(default="message")),
                        ("channel", name(null=True)),
                        ("excluded", name(null=True)),
                        ("payload", models.BinaryField(default=b"")),
                        ("sent_at", models.DateTimeField()),
                        ("expires_at", models.DateTimeField()),
                    ],
                    options={"db_table": "pg_layer_message"},
                ),
                migrations.CreateModel(
                    name="Membership",
                    fields=[
                        (
                            "pk",
                            models.CompositePrimaryKey(
                                "group_name",
                                "address",
                                "channel",
                                "id",
                                blank=True,
                                editable=False,
                                primary_key=True,
                                serialize=False,
                            ),
                        ),
                        ("group_name", name()),
                        ("address", name()),
                        ("channel", name()),
                        ("id", models.BigIntegerField(default=0)),
                        ("present", models.BooleanField(default=True)),
                        ("expires_at", models.DateTimeField()),
                        ("capacity", models.IntegerField(null=True)),
                    ],
                    options={"db_table": "pg_layer_membership"},
                ),
                migrations.CreateModel(
                    name="Group",
                    fields=[
                        ("key", name(primary_key=True, serialize=False)),
                        ("prefix", name()),
                        ("group_name", name()),
                        ("members", models.BigIntegerField()),
                        ("addresses", models.BigIntegerField()),
                    ],
                    options={
                        "db_table": "pg_layer_group",
                        "managed": False,
                        "verbose_name": "channel group",
                    },
                ),
                migrations.CreateModel(
                    name="Client",
                    fields=[
                        ("address", name(primary_key=True, serialize=False)),
                        ("host", models.TextField(default="")),
                        ("pid", models.IntegerField(default=0)),
                        ("started_at", models.DateTimeField()),
                        ("expires_at", models.DateTimeField()),
                        ("lease", models.FloatField()),
                        ("fence", models.BigIntegerField(default=0)),
                        ("ended_at", models.DateTimeField(null=True)),
                        ("swept_at", models.DateTimeField(null=True)),
                        ("counters", models.JSONField(default=dict)),
                    ],
                    options={"db_table": "pg_layer_client"},
                ),
                migrations.CreateModel(
                    name="LeaseClock",
                    fields=[
                        ("prefix", name(primary_key=True, serialize=False)),
                        ("boot", models.BigIntegerField()),
                        ("lease", models.FloatField()),
                        ("renewed_at", models.DateTimeField()),
                        ("steady_since", models.DateTimeField()),
                    ],
                    options={"db_table": "pg_layer_lease_clock"},
                ),
                migrations.CreateModel(
                    name="LowId",
                    fields=[
                        ("address", name(primary_key=True, serialize=False)),
                        ("low_id", models.BigIntegerField()),
                        ("kept_on", models.DateField()),
                    ],
                    options={"db_table": "pg_layer_low_id"},
                ),
                migrations.CreateModel(
                    name="LastSweep",
                    fields=[
                        ("prefix", name(primary_key=True, serialize=False)),
                        ("swept_at", models.DateTimeField()),
                    ],
                    options={"db_table": "pg_layer_last_sweep"},
                ),
            ],
        ),
    ]
