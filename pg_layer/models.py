"""Models of the layer's tables, for Django's ``flush``, database routers and the admin.

The layer does not use these models, and the SQL of the migrations creates the tables. A message
that is written through a model is not announced: use the layer to send messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from django.db import models

if TYPE_CHECKING:
    DateTimeField = models.DateTimeField[datetime | None, datetime | None]
else:  # Django's class is generic for the type checker only
    DateTimeField = models.DateTimeField


DEFAULT_CHUNK = 2000  # rows, as in Django


class EndField(DateTimeField):
    """The time of an end; None if there is no end.

    The database stores ``infinity`` for that, which `datetime` cannot represent.
    """

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        return f"NULLIF(NULLIF({sql}, 'infinity'), '-infinity')", params

    def deconstruct(self) -> Any:
        # Migrations must see the type of the column, not this class.
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.DateTimeField", args, kwargs


class LayerQuerySet(models.QuerySet[Any]):
    """Rows that stay out of data dumps.

    No dump can restore them: they are about processes and transactions of this database, and one
    of the tables is a view.
    """

    def iterator(self, chunk_size: int | None = DEFAULT_CHUNK) -> Iterator[Any]:
        """Return an iterator over the rows; over nothing, if ``chunk_size`` is None.

        ``dumpdata`` and ``serialized_rollback`` pass None. Other code passes a number or nothing.
        """
        return iter(()) if chunk_size is None else super().iterator(chunk_size)


class LayerModel(models.Model):
    """A model of a table or view of the layer."""

    objects: ClassVar[models.Manager[Any]] = models.Manager.from_queryset(LayerQuerySet)()

    class Meta:
        abstract = True
        base_manager_name = "objects"  # ``dumpdata --all`` uses the base manager


class Message(LayerModel):
    """A message at the address of a client, a normal channel or a group."""

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    address: models.TextField[str, str] = models.TextField(db_collation="C")
    boot: models.BigIntegerField[int, int] = models.BigIntegerField()
    marked: models.BooleanField[bool, bool] = models.BooleanField(default=False)
    kind: models.TextField[str, str] = models.TextField(db_collation="C", default="message")
    channel: models.TextField[str | None, str | None] = models.TextField(
        db_collation="C", null=True
    )
    excluded: models.TextField[str | None, str | None] = models.TextField(
        db_collation="C", null=True
    )
    payload: models.BinaryField[bytes, bytes] = models.BinaryField(default=b"")
    sent_at: models.DateTimeField[datetime, datetime] = models.DateTimeField()
    expires_at = EndField()

    class Meta:
        db_table = "pg_layer_message"

    def __str__(self) -> str:
        return f"{self.kind} {self.id} for {self.address}"


class Membership(LayerModel):
    """A membership, or a request to change it. The row with the largest id is valid."""

    pk = models.CompositePrimaryKey("group_name", "address", "channel", "id")
    group_name: models.TextField[str, str] = models.TextField(db_collation="C")
    address: models.TextField[str, str] = models.TextField(db_collation="C")
    channel: models.TextField[str, str] = models.TextField(db_collation="C")
    id: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    present: models.BooleanField[bool, bool] = models.BooleanField(default=True)
    expires_at = EndField()
    capacity: models.IntegerField[int | None, int | None] = models.IntegerField(null=True)

    class Meta:
        db_table = "pg_layer_membership"

    def __str__(self) -> str:
        return f"{self.channel} {'in' if self.present else 'not in'} {self.group_name}"


class Group(LayerModel):
    """A group that has members. A view, therefore read-only."""

    key: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    prefix: models.TextField[str, str] = models.TextField(db_collation="C")
    group_name: models.TextField[str, str] = models.TextField(db_collation="C")
    members: models.BigIntegerField[int, int] = models.BigIntegerField()
    addresses: models.BigIntegerField[int, int] = models.BigIntegerField()

    class Meta:
        db_table = "pg_layer_group"
        managed = False
        verbose_name = "channel group"  # Django's users have groups, too

    def __str__(self) -> str:
        return self.group_name


class Client(LayerModel):
    """A client and its lease. Each process that receives has a row."""

    address: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    host: models.TextField[str, str] = models.TextField(default="")
    pid: models.IntegerField[int, int] = models.IntegerField(default=0)
    started_at: models.DateTimeField[datetime, datetime] = models.DateTimeField()
    expires_at = EndField()
    lease: models.FloatField[float, float] = models.FloatField()
    fence: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    ended_at: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(
        null=True
    )
    swept_at: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(
        null=True
    )
    counters: models.JSONField[dict[str, int], dict[str, int]] = models.JSONField(default=dict)

    class Meta:
        db_table = "pg_layer_client"

    def __str__(self) -> str:
        process = "unknown process" if self.is_unknown else f"{self.host}, process {self.pid}"
        return f"{self.address} ({process})"

    @property
    def is_unknown(self) -> bool:
        """Whether host and process are unknown: the client closed before it had a lease."""
        return self.host == "" and self.pid == 0

    @property
    def is_without_notifications(self) -> bool:
        """Whether it polls because notifications do not arrive, as of its last heartbeat."""
        return self.counter("without_notifications") > 0

    def counter(self, name: str) -> int:
        """Return one counter; 0 if it is missing or no integer, because any role may write it."""
        count = self.counters.get(name)
        return count if isinstance(count, int) else 0


class LeaseClock(LayerModel):
    """The time since which the leases of a prefix have been renewed without a gap."""

    prefix: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    boot: models.BigIntegerField[int, int] = models.BigIntegerField()
    lease: models.FloatField[float, float] = models.FloatField()
    renewed_at: models.DateTimeField[datetime, datetime] = models.DateTimeField()
    steady_since: models.DateTimeField[datetime, datetime] = models.DateTimeField()

    class Meta:
        db_table = "pg_layer_lease_clock"

    def __str__(self) -> str:
        return f"{self.prefix}, renewed at {self.renewed_at}"


class LowId(LayerModel):
    """The low-water id of an address: no row that waits there has a smaller id."""

    address: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    low_id: models.BigIntegerField[int, int] = models.BigIntegerField()
    kept_on: models.DateField[date, date] = models.DateField()

    class Meta:
        db_table = "pg_layer_low_id"

    def __str__(self) -> str:
        return f"{self.address}, from {self.low_id}"


class LastSweep(LayerModel):
    """The time at which the last sweep of a prefix ended."""

    prefix: models.TextField[str, str] = models.TextField(primary_key=True, db_collation="C")
    swept_at: models.DateTimeField[datetime, datetime] = models.DateTimeField()

    class Meta:
        db_table = "pg_layer_last_sweep"

    def __str__(self) -> str:
        return f"{self.prefix}, swept at {self.swept_at}"
