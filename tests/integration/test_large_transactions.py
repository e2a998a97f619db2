"""``layer.sync`` sends more messages in a transaction than the process remembers rows."""

from __future__ import annotations

from django.db import transaction

from pg_layer._send.announcer import MOST_ROWS
from tests.conftest import MakeLayer
from tests.integration.test_announced_after_commit import (
    GROUP,
    in_thread,
    member,
    number,
    on_django,
    received,
)

COUNT = MOST_ROWS + 2_000  # more rows than a process remembers if they cannot be announced
PART = 1_000


async def test_transaction_with_more_rows_than_are_remembered_arrives_in_order(
    migrated_dsn: str, make_layer: MakeLayer
) -> None:
    """Only the announcement brings the messages, because no heartbeat follows in time.

    A message that is sent after the transaction arrives last.
    """
    reader = make_layer(capacity=2 * COUNT)
    channel = await member(reader)

    def commit() -> None:
        with transaction.atomic():
            for start in range(0, COUNT, PART):
                layer.sync.group_send(GROUP, number(start))
                numbers = range(start + 1, start + PART)
                assert all(layer.sync.send_many([(channel, number(n)) for n in numbers]))
        layer.sync.group_send(GROUP, number(COUNT))

    with on_django(migrated_dsn, capacity=2 * COUNT) as layer:
        await in_thread(commit)
        assert await received(reader, channel, COUNT + 1) == list(range(COUNT + 1))
        await layer.close()
