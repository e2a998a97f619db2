"""The mirror of memberships: which channels of this client belong to which groups. No I/O."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

from pg_layer.inbox import LAST_ID
from pg_layer.mailbox import Mailbox

LEFT_MOST = 10_000
GONE_MOST = 4  # times that a channel has left a group, and that are remembered


class Member(NamedTuple):
    """A channel in a group: messages with ids above ``since`` are for it, until ``expires_at``.

    One that has left is kept a while for the messages that were sent before, with ids up to ``until``, and
    are still on their way, also where it has joined anew meanwhile. ``joined`` is the id at which it last
    joined: what is older does not undo it.
    """

    mailbox: Mailbox
    since: int
    joined: int
    expires_at: float
    until: int = LAST_ID

    @property
    def has_left(self) -> bool:
        """Whether it is here only for what is on its way."""
        return self.until != LAST_ID


class Memberships:
    """Group -> channel -> member, both ways. Thread-safe.

    Changes carry ids, as they come by ways that overtake each other: the answer to the own call, and rows
    that tell of others' calls. The change with the largest id counts.

    What the tables had lost is put back from here, and may be known to have left only afterwards: such a pair
    is a ghost, which stands in the tables and not here, and is to be removed there.
    """

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Member]] = {}
        self._channels: dict[str, set[str]] = {}
        self._gone: dict[str, dict[str, list[Member]]] = {}  # group -> channel -> what it was until of late
        # (group, channel) -> id of the leaves of late: what tells of an earlier joining must not undo them.
        self._left: dict[tuple[str, str], int] = {}
        self._left_before: dict[tuple[str, str], int] = {}
        self._flushed = -1
        self._put_back: set[tuple[str, str]] = set()  # (group, channel) pairs
        self._ghosts: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._channels.values()))

    def __bool__(self) -> bool:
        return bool(self._channels)

    def join(self, group: str, mailbox: Mailbox, id: int, expires_at: float) -> None:
        """Add a channel, or renew it: a member that is renewed has missed nothing since it first joined."""
        channel = mailbox.channel
        with self._lock:
            if max(self._left.get((group, channel), -1), self._flushed) > id:
                return
            members = self._groups.setdefault(group, {})
            known = members.get(channel)
            since, joined = id, id
            if known is not None:
                since, joined = min(id, known.since), max(id, known.joined)
                expires_at = max(expires_at, known.expires_at)
            members[channel] = Member(mailbox, since, joined, expires_at)
            self._ghosts.discard((group, channel))
            self._channels.setdefault(channel, set()).add(group)

    def leave(self, group: str, channel: str, id: int) -> None:
        """Remove a channel from a group, unless it has joined since."""
        with self._lock:
            member = self._groups.get(group, {}).get(channel)
            if member is not None and member.joined < id:
                self._remove(group, channel)
                gone = self._gone.setdefault(group, {}).setdefault(channel, [])
                gone.append(member._replace(until=id))
                del gone[:-GONE_MOST]
            self._left[group, channel] = max(id, self._left.pop((group, channel), id))
            if len(self._left) > LEFT_MOST:
                self._forget_left(next(iter(self._left)))

    def forget_left(self) -> None:
        """Forget who had left when this was last called."""
        with self._lock:
            for pair, id in self._left_before.items():
                if self._left.get(pair) == id:
                    self._forget_left(pair)
            self._left_before = dict(self._left)

    def drop(self, group: str, channel: str) -> None:
        """Remove a channel from a group here, whatever the tables say."""
        with self._lock:
            member = self._groups.get(group, {}).get(channel)
            if member is not None:
                self._remove(group, channel)

    def flush(self, id: int) -> None:
        """Forget all that has not joined after that id."""
        with self._lock:
            self._flushed = max(id, self._flushed)
            for group, member in self._all():
                if member.joined <= id:
                    self._remove(group, member.mailbox.channel)

    def ids_begin_anew(self, next_id: int) -> None:
        """The server may be another, that hands ids out again from ``next_id`` on.

        The price is that a message sent just before a joining, and read only now, reaches the new member as
        well.
        """
        with self._lock:
            for pair in list(self._left):
                self._forget_left(pair)
            self._flushed = -1
            for group, member in self._all():
                self._groups[group][member.mailbox.channel] = member._replace(
                    since=-1, joined=min(member.joined, next_id - 1)
                )

    def put_back(self, pairs: Iterable[tuple[str, str]]) -> None:
        """These were put back into the tables: who has left meanwhile is a ghost, and who leaves later."""
        with self._lock:
            for group, channel in pairs:
                is_here = channel in self._groups.get(group, ())
                (self._put_back if is_here else self._ghosts).add((group, channel))

    @property
    def has_ghosts(self) -> bool:
        """Whether there are any."""
        return bool(self._ghosts)

    def ghosts(self) -> list[tuple[str, str]]:
        """All ghosts."""
        with self._lock:
            return list(self._ghosts)

    def banished(self, pairs: Iterable[tuple[str, str]]) -> None:
        """These ghosts have been removed from the tables."""
        with self._lock:
            self._ghosts.difference_update(pairs)

    def of_pair(self, group: str, channel: str) -> Member | None:
        """The member of a group that is this channel."""
        return self._groups.get(group, {}).get(channel)

    def of_group(self, group: str) -> tuple[list[Member], list[list[Member]]]:
        """The members of a group; but for who has left it of late: of each all that he was and is."""
        with self._lock:
            members = self._groups.get(group, {})
            gone = self._gone.get(group)
            if not gone:
                return list(members.values()), []
            present = [member for channel, member in members.items() if channel not in gone]
            return present, [[*past, *filter(None, [members.get(channel)])] for channel, past in gone.items()]

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
            return self._all()

    def drop_expired(self, now: float) -> None:
        """Forget what has ended."""
        with self._lock:
            for group, member in self._all():
                if member.expires_at <= now:
                    self._remove(group, member.mailbox.channel)

    def _all(self) -> list[tuple[str, Member]]:
        return [(group, member) for group, members in self._groups.items() for member in members.values()]

    def _forget_left(self, pair: tuple[str, str]) -> None:
        del self._left[pair]
        group, channel = pair
        gone = self._gone.get(group, {})
        gone.pop(channel, None)
        if not gone:
            self._gone.pop(group, None)

    def _remove(self, group: str, channel: str) -> None:
        if (group, channel) in self._put_back:
            self._put_back.discard((group, channel))
            self._ghosts.add((group, channel))
        members = self._groups[group]
        del members[channel]
        if not members:
            del self._groups[group]
        groups = self._channels[channel]
        groups.discard(group)
        if not groups:
            del self._channels[channel]
