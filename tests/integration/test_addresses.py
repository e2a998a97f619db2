"""Addresses and notification channels are computed alike in Python and in SQL.

Neither side asks the other for them, so both must give the same results.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pg_layer._messages.addresses import channel_address, group_address, notification_channel
from tests.conftest import Observer

NAME = st.from_regex(r"[A-Za-z0-9._\-]{1,100}", fullmatch=True)
ON_ONE_DATABASE = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def query_value(observer: Observer, query: str, *parameters: str) -> str:
    row = observer.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return str(row[0])


@ON_ONE_DATABASE
@given(prefix=NAME, group=NAME)
def test_group_address_in_python_and_sql_is_the_same(
    observer: Observer, prefix: str, group: str
) -> None:
    address = group_address(prefix, group)
    assert query_value(observer, "SELECT pg_layer_group_address(%s, %s)", prefix, group) == address
    found = query_value(observer, "SELECT pg_layer_notification_channel(%s)", address)
    assert found == notification_channel(address)


@ON_ONE_DATABASE
@given(prefix=NAME, channel=NAME | st.tuples(NAME, NAME).map("!".join))
def test_channel_address_in_python_and_sql_is_the_same(
    observer: Observer, prefix: str, channel: str
) -> None:
    address = channel_address(prefix, channel)
    assert query_value(observer, "SELECT pg_layer_address(%s, %s)", prefix, channel) == address
    found = query_value(observer, "SELECT pg_layer_notification_channel(%s)", address)
    assert found == notification_channel(address)
