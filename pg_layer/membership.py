"""The mirror of memberships: which channels of this client belong to which groups. No I/O."""

from __future__ import annotations

import threading
from typing import NamedTuple

from pg_layer.mailbox import Mailbox


class Member(NamedTuple):
    """A channel in a group: messages with a larger id than ``since`` are for it, until ``expires_at``."""

    mailbox: Mailbox
    since: int
    expires_at: float


class Memberships:
    """Group -> channel -> member, both ways. Thread-safe."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Member]] = {}
        self._channels: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, group: str, mailbox: Mailbox, since: int, expires_at: float) -> None:
        """Add a channel, or renew it: a member that is renewed has missed nothing since it first joined."""
        with self._lock:
            members = self._groups.setdefault(group, {})
            known = members.get(mailbox.channel)
            if known is not None:
                since = min(since, known.since)
            members[mailbox.channel] = Member(mailbox, since, expires_at)
            self._channels.setdefault(mailbox.channel, set()).add(group)

    def discard(self, group: str, channel: str) -> None:
        """Remove a channel from a group, if it is there."""
        with self._lock:
            members = self._groups.get(group)
            if members is None or members.pop(channel, None) is None:
                return
            if not members:
                del self._groups[group]
            groups = self._channels[channel]
            groups.discard(group)
            if not groups:
                del self._channels[channel]

    def of_group(self, group: str) -> list[Member]:
        """The members of a group."""
        with self._lock:
            members = self._groups.get(group)
            return list(members.values()) if members else []

    def of_channel(self, channel: str) -> list[str]:
        """The groups of a channel."""
        with self._lock:
            return list(self._channels.get(channel, ()))

    def is_member(self, channel: str) -> bool:
        """Whether the channel belongs to any group."""
        return channel in self._channels

    def all(self) -> list[tuple[str, Member]]:
        """Every (group, member)."""
        with self._lock:
            return [(group, member) for group, members in self._groups.items() for member in members.values()]

    def drop_expired(self, now: float) -> None:
        """Forget what has ended."""
        for group, member in self.all():
            if member.expires_at <= now:
                self.discard(group, member.mailbox.channel)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._groups.clear()
            self._channels.clear()
