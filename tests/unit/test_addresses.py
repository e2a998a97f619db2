"""Addresses of rows, and the NOTIFY channels that announce them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._messages.addresses import (
    BUCKETS,
    channel_address,
    group_address,
    notification_channel,
    split_address,
)


@pytest.mark.parametrize(
    ("channel", "address"),
    [
        ("specific.0a1b!xyz", "asgi!0a1b"),
        ("a.b.c.0a1b!x", "asgi!0a1b"),
        ("0a1b!x", "asgi!0a1b"),
        ("0a1b!", "asgi!0a1b"),
        ("specific.0a1b!x.y", "asgi!0a1b"),
        ("thumbnails", "asgi!:thumbnails"),
        ("a.b", "asgi!:a.b"),
    ],
)
def test_channel_address_is_that_of_its_client_or_of_its_readers(
    channel: str, address: str
) -> None:
    assert channel_address("asgi", channel) == address


@given(st.from_regex(r"[a-z.\-_]{1,10}(![a-z.\-_]{0,5})?", fullmatch=True))
def test_channel_address_clients_and_normal_channels_are_apart(channel: str) -> None:
    address = channel_address("p", channel)
    assert address.startswith("p!")
    assert address.startswith("p!:") is ("!" not in channel)


def test_split_address_returns_the_name_for_groups_only() -> None:
    assert split_address(group_address("p", "chat")) == ("chat", "")
    assert split_address("p!:jobs") == (None, ":jobs")
    assert split_address("p!0a1b") == (None, "0a1b")


@given(st.text(min_size=1, max_size=100))
def test_notification_channel_is_a_short_identifier(group: str) -> None:
    name = notification_channel(group_address("p", group))
    assert re.fullmatch(r"pg_layer_[0-9a-f]{40}", name)


def test_notification_channel_groups_share_buckets_of_their_prefix() -> None:
    names = {notification_channel(group_address("p", f"group {n}")) for n in range(20_000)}
    assert BUCKETS * 0.99 < len(names) <= BUCKETS
    assert names.isdisjoint(
        notification_channel(group_address("q", f"group {n}")) for n in range(1_000)
    )


def test_notification_channel_other_addresses_have_their_own() -> None:
    addresses = ["p!c1", "p!c2", "p!:jobs", "p!:mail", "q!c1"]
    assert len(set(map(notification_channel, addresses))) == len(addresses)
