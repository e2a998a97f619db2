"""Addresses of rows, and the NOTIFY channels on which rows are announced.

The functions follow the rules in ``migrations/0001_2_addresses.sql``, so that neither side asks the
other.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

BUCKETS = 1024  # NOTIFY channels that all groups of a prefix share: 10 bits of a digest


def channel_address(prefix: str, channel: str) -> str:
    """Return the address of a channel.

    For a specific channel it is the address of its client, for a normal channel the address of the
    channel's readers.
    """
    head, bang, _ = channel.partition("!")
    return f"{prefix}!{head.rpartition('.')[2]}" if bang else f"{prefix}!:{channel}"


def group_address(prefix: str, group: str) -> str:
    """Return the address of a group."""
    return f"{prefix}!@{group}"


def group_name(group: str) -> str:
    """Return the name of a group for places that also hold names of channels.

    It begins with ``@``, and no name of a channel does.
    """
    return f"@{group}"


def split_address(address: str) -> tuple[str | None, str]:
    """Return ``(group, "")`` for a group's address, and else ``(None, rest)``."""
    _, _, rest = address.partition("!")
    return (rest[1:], "") if rest.startswith("@") else (None, rest)


@lru_cache(maxsize=20_000)
def notification_channel(address: str) -> str:
    """Return the NOTIFY channel of an address. Groups share 1,024 buckets."""
    head, at, _ = address.partition("@")
    if at:
        digest = sha256(address.encode()).digest()
        address = f"{head}@{digest[0] * 4 + digest[1] // 64}"
    return f"pg_layer_{sha256(address.encode()).hexdigest()[:40]}"
