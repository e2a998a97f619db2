"""The layer's tables as Django knows them: for ``flush``, routers and the admin.

The layer itself never goes through these models, and the tables are made by the SQL of the migrations.
Writing through a model rings no doorbell: send messages with the layer.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.db import models

if TYPE_CHECKING:
    DateTimeField = models.DateTimeField[datetime | None, datetime | None]
else:  # generic for the type checker alone
    DateTimeField = models.DateTimeField


class EndField(DateTimeField):
    """When something ends. None: at no time; the database says infinity, which no datetime can."""

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        return f"NULLIF(NULLIF({sql}, 'infinity'), '-infinity')", params

    def deconstruct(self) -> Any:
        # To migrations it is the field that it is in the database.
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.DateTimeField", args, kwargs


class Message(models.Model):
    """A message that waits in an inbox."""

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    inbox: models.TextField[str, str] = models.TextField(db_collation="C")
    nonce: models.BigIntegerField[int, int] = models.BigIntegerField()
    kind: models.TextField[str, str] = models.TextField(db_collation="C", default="message")
    channel: models.TextField[str | None, str | None] = models.TextField(db_collation="C", null=True)
    group_name: models.TextField[str | None, str | None] = models.TextField(db_collation="C", null=True)
    excluded: models.TextField[str | None, str | None] = models.TextField(db_collation="C", null=True)
    payload: models.BinaryField[bytes, bytes] = models.BinaryField(default=b"")
    sent_at: models.DateTimeField[datetime, datetime] = models.DateTimeField()
    expires_at = EndField()

    class Meta:
        db_table = "pg_layer_message"

    def __str__(self) -> str:
        return f"{self.kind} {self.id} for {self.inbox}"


class Membership(models.Model):
    """A channel that belongs to a group."""

    pk = models.CompositePrimaryKey("group_name", "inbox", "channel")
    group_name: models.TextField[str, str] = models.TextField(db_collation="C")
    inbox: models.TextField[str, str] = models.TextField(db_collation="C")
    channel: models.TextField[str, str] = models.TextField(db_collation="C")
    expires_at = EndField()
    capacity: models.IntegerField[int | None, int | None] = models.IntegerField(null=True)
    put_back: models.BooleanField[bool, bool] = models.BooleanField(default=False)
    joined: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)

    class Meta:
        db_table = "pg_layer_membership"

    def __str__(self) -> str:
        return f"{self.channel} in {self.group_name}"


class Group(models.Model):
    """A group that has live members: a view, so that nothing can be written."""

    key: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    prefix: models.TextField[str, str] = models.TextField(db_collation="C")
    group_name: models.TextField[str, str] = models.TextField(db_collation="C")
    members: models.BigIntegerField[int, int] = models.BigIntegerField()
    inboxes: models.BigIntegerField[int, int] = models.BigIntegerField()

    class Meta:
        db_table = "pg_layer_group"
        managed = False

    def __str__(self) -> str:
        return self.group_name


class Client(models.Model):
    """The lease of one process that uses the layer."""

    inbox: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    host: models.TextField[str, str] = models.TextField(default="")
    pid: models.IntegerField[int, int] = models.IntegerField(default=0)
    started_at: models.DateTimeField[datetime, datetime] = models.DateTimeField()
    expires_at = EndField()
    fence: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    ended_at: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    counters: models.JSONField[dict[str, int], dict[str, int]] = models.JSONField(default=dict)

    UNKNOWN = models.Q(host="", pid=0)

    class Meta:
        db_table = "pg_layer_client"

    def __str__(self) -> str:
        who = "unknown process" if self.is_unknown else f"{self.host}, process {self.pid}"
        return f"{self.inbox} ({who})"

    @property
    def is_unknown(self) -> bool:
        """Whether it has not told who it is: a channel of its has joined a group, and no more is known."""
        return self.host == "" and self.pid == 0


class LastSweep(models.Model):
    """When the inboxes of a prefix were last swept, to the end."""

    prefix: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    swept_at: models.DateTimeField[datetime, datetime] = models.DateTimeField()

    class Meta:
        db_table = "pg_layer_last_sweep"

    def __str__(self) -> str:
        return f"{self.prefix}, swept at {self.swept_at}"
