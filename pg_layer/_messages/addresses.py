"""Addresses of rows and the NOTIFY channels that announce them.

The same rules as in ``migrations/0001_2_addresses.sql``, so that neither side asks the other.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

BUCKETS = 1024  # of groups


def channel_address(prefix: str, channel: str) -> str:
    """Return the address of a channel: of its client, or of the readers of a normal channel."""
    head, bang, _ = channel.partition("!")
    return f"{prefix}!{head.rpartition('.')[2]}" if bang else f"{prefix}!:{channel}"


def group_address(prefix: str, group: str) -> str:
    """Return the address of a group."""
    return f"{prefix}!@{group}"


def group_name(group: str) -> str:
    """Return what stands for a group where a channel's name could stand: none begins like this."""
    return f"@{group}"


def split_address(address: str) -> tuple[str | None, str]:
    """Return ``(group, "")`` for a group's address, and ``(None, rest)`` for another."""
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
