"""A flush beside a transaction that has locked rows which the flush would remove."""

from __future__ import annotations

import psycopg

from tests.conftest import MakeLayer, Observer
from tests.faults.test_open_transactions import add
from tests.processes import listen, receive


async def test_flush_beside_a_transaction_with_locked_rows_does_not_wait(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """The flush skips the locked rows, and removes no later rows.

    The transaction has deleted a message, and an older membership request for a channel that
    it adds again. Memberships and messages that follow the flush stay. So do the rows that the
    transaction commits after it.
    """
    layer, other = make_layer(), make_layer()
    await listen(layer)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await other.group_add("room", "jobs")
    for number in range(3):
        await other.send("jobs", {"number": number})
    with psycopg.connect(migrated_dsn) as transaction:
        transaction.execute(
            "DELETE FROM pg_layer_message AS m WHERE m.channel = 'jobs'"
            " AND m.id = (SELECT min(first.id) FROM pg_layer_message AS first"
            " WHERE first.channel = 'jobs')"
        )
        add(transaction, "room", "jobs")
        await other.flush()
        jobs = "SELECT count(*) FROM pg_layer_message WHERE channel = 'jobs'"
        assert observer.execute(jobs).fetchone() == (1,)
        for name in (channel, "jobs"):
            await other.group_add("hall", name)
        await layer.group_add("room", channel)
        await other.group_send("hall", {"number": 3})
        for name in (channel, "jobs"):
            assert (await receive(layer, name))["number"] == 3
        transaction.commit()
    assert sorted(await other.group_channels("room")) == sorted([channel, "jobs"])
    await other.group_send("room", {"number": 4})
    for name in (channel, "jobs"):
        assert (await receive(layer, name))["number"] == 4
