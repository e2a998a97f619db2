"""The memberships of a client's own channels. See ``docs/protocols.md``, section 4.

Pure; used by the owner loop only, but for `is_member` and `len`.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView

from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.snapshot import Moment

Pair = tuple[str, str]  # (group, channel)


class Member:
    """A channel in a group. ``since``: messages that it sees are not for this member; None: none."""

    __slots__ = ("channel", "expires_at", "queue", "since")

    def __init__(self, queue: ChannelQueue, expires_at: float, since: Moment | None) -> None:
        self.queue = queue
        self.channel = queue.channel
        self.expires_at = expires_at
        self.since = since


class Memberships:
    """Which of the client's channels are in which groups."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Member]] = {}
        self._of_channel: dict[str, set[str]] = {}
        self._young: set[Pair] = set()  # those with `since`

    def __len__(self) -> int:
        return sum(map(len, list(self._of_channel.values())))

    def is_member(self, channel: str) -> bool:
        """Whether a channel is in any group."""
        return channel in self._of_channel

    @property
    def groups(self) -> KeysView[str]:
        """The names of all groups."""
        return self._groups.keys()

    def members(self, group: str) -> Iterable[Member]:
        """The members of a group."""
        members = self._groups.get(group)
        return members.values() if members is not None else ()

    def get(self, group: str, channel: str) -> Member | None:
        """One member, if it is one."""
        return self._groups.get(group, {}).get(channel)

    def pairs(self) -> list[Pair]:
        """All memberships."""
        return [(group, channel) for group, members in self._groups.items() for channel in members]

    # ------------------------------------------------------------------ changes

    def add(self, group: str, queue: ChannelQueue, expires_at: float, since: Moment | None) -> None:
        """Add a channel, or prolong its membership: then the beginning stays."""
        members = self._groups.setdefault(group, {})
        member = members.get(queue.channel)
        if member is not None:
            member.queue, member.expires_at = queue, expires_at
            return
        members[queue.channel] = Member(queue, expires_at, since)
        self._of_channel.setdefault(queue.channel, set()).add(group)
        if since is not None:
            self._young.add((group, queue.channel))

    def discard(self, group: str, channel: str) -> bool:
        """Remove a channel. Return whether it was a member."""
        members = self._groups.get(group)
        if members is None or members.pop(channel, None) is None:
            return False
        if not members:
            del self._groups[group]
        groups = self._of_channel[channel]
        groups.discard(group)
        if not groups:
            del self._of_channel[channel]
        self._young.discard((group, channel))
        return True

    def flush(self, boot: int, xid: int) -> list[Pair]:
        """Remove what began before this transaction. Return what was removed."""
        gone = []
        for group, channel in self.pairs():
            member = self._groups[group][channel]
            if member.since is None or not member.since.sees(boot, xid):
                gone.append((group, channel))
        for pair in gone:
            self.discard(*pair)
        return gone

    def expire(self, now: float) -> list[Pair]:
        """Remove what has expired. Return it."""
        gone = [
            (group, channel)
            for group, members in self._groups.items()
            for channel, member in members.items()
            if member.expires_at <= now
        ]
        for pair in gone:
            self.discard(*pair)
        return gone

    def grow_old(self, moment: Moment) -> None:
        """The cursor is at this moment: beginnings that it covers need not be remembered."""
        for group, channel in list(self._young):
            member = self._groups[group][channel]
            if member.since is None or moment.covers(member.since):
                member.since = None
                self._young.discard((group, channel))
