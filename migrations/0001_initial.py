from pathlib import Path

from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.state import StateApps

SQL = Path(__file__).with_suffix(".sql")
DROP = Path(__file__).with_name("0001_initial_reverse.sql")


def create(apps: StateApps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    run(schema_editor, SQL)


def drop(apps: StateApps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    run(schema_editor, DROP)


def run(schema_editor: BaseDatabaseSchemaEditor, file: Path) -> None:
    # A project may have other databases beside PostgreSQL, and no router: the tables are of no use there.
    if schema_editor.connection.vendor == "postgresql":
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
                        ("inbox", name()),
                        ("nonce", models.BigIntegerField()),
                        ("kind", name(default="message")),
                        ("channel", name(null=True)),
                        ("group_name", name(null=True)),
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
                                "inbox",
                                "channel",
                                blank=True,
                                editable=False,
                                primary_key=True,
                                serialize=False,
                            ),
                        ),
                        ("group_name", name()),
                        ("inbox", name()),
                        ("channel", name()),
                        ("expires_at", models.DateTimeField()),
                        ("capacity", models.IntegerField(null=True)),
                        ("put_back", models.BooleanField(default=False)),
                        ("joined", models.BigIntegerField(default=0)),
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
                        ("inboxes", models.BigIntegerField()),
                    ],
                    options={"db_table": "pg_layer_group", "managed": False},
                ),
                migrations.CreateModel(
                    name="Client",
                    fields=[
                        ("inbox", name(primary_key=True, serialize=False)),
                        ("host", models.TextField(default="")),
                        ("pid", models.IntegerField(default=0)),
                        ("started_at", models.DateTimeField()),
                        ("expires_at", models.DateTimeField()),
                        ("fence", models.BigIntegerField(default=0)),
                        ("ended_at", models.DateTimeField(null=True)),
                        ("counters", models.JSONField(default=dict)),
                    ],
                    options={"db_table": "pg_layer_client"},
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
