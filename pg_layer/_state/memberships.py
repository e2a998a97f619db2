"""The memberships of a client's own channels.

See ``docs/protocols.md``, section 4. Only the owner loop uses this module, except for
`Memberships.is_member` and ``len``, which any thread may call. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, KeysView

from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.snapshot import Moment

Pair = tuple[str, str]  # (group, channel)

MAX_REQUESTS = 10_000  # membership requests that are remembered, the last ones


class Member:
    """A channel in a group.

    ``since``: the moment in which the membership began. Messages that it sees were sent
    before, and the member does not receive them. None: such messages cannot arrive any more.
    """

    __slots__ = ("channel", "expires_at", "queue", "since")

    def __init__(self, queue: ChannelQueue, expires_at: float, since: Moment | None) -> None:
        self.queue = queue
        self.channel = queue.channel
        self.expires_at = expires_at
        self.since = since


class Memberships:
    """The channels of the client in each group. Delivery depends on this alone.

    A membership can be changed from two sides. The owner changes its own channels, and is
    finished when its statement has returned (`note_own_change`). Other processes, and
    callers in transactions, send membership requests: control messages that the owner
    applies when they are at the head of the announcement queue. A request may have been
    sent before an own change and be applied after it. Snapshots show which change was first:
    `resolve_against_own_change`, `start_of`, `joined_after`.
    """

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Member]] = {}
        self._of_channel: dict[str, set[str]] = {}
        self._by_since: dict[Moment, set[Pair]] = {}  # memberships with this `since`
        self._own_changes: dict[Pair, list[Moment]] = {}  # in order
        self._joined_at: dict[str, Moment] = {}  # when an own change added the first member
        # The last request of a client: its number, and the id of the control message.
        self._requests: dict[tuple[str, Pair], tuple[int, int]] = {}
        self.last_flush = (0, 0)  # boot and transaction of the last flush that was applied

    def __len__(self) -> int:
        return sum(map(len, list(self._of_channel.values())))

    def is_member(self, channel: str) -> bool:
        """Return whether a channel is in any group."""
        return channel in self._of_channel

    @property
    def groups(self) -> KeysView[str]:
        """The names of all groups."""
        return self._groups.keys()

    def members(self, group: str) -> Collection[Member]:
        """Return the members of a group."""
        members = self._groups.get(group)
        return members.values() if members is not None else ()

    def get(self, group: str, channel: str) -> Member | None:
        """Return the member, or None if the channel is not in the group."""
        return self._groups.get(group, {}).get(channel)

    def pairs(self) -> list[Pair]:
        """Return all memberships."""
        return [(group, channel) for group, members in self._groups.items() for channel in members]

    # ------------------------------------------------------------------ changes

    def add(self, group: str, queue: ChannelQueue, expires_at: float, since: Moment | None) -> None:
        """Add a channel. If it is a member, set its end and keep its beginning."""
        if group not in self._groups:
            self._joined_at.pop(group, None)
        members = self._groups.setdefault(group, {})
        member = members.get(queue.channel)
        if member is not None:
            member.queue, member.expires_at = queue, expires_at
            return
        members[queue.channel] = Member(queue, expires_at, since)
        self._of_channel.setdefault(queue.channel, set()).add(group)
        if since is not None:
            self._by_since.setdefault(since, set()).add((group, queue.channel))

    def discard(self, group: str, channel: str) -> bool:
        """Remove a channel from a group. Return whether it was a member."""
        members = self._groups.get(group)
        member = members.pop(channel, None) if members is not None else None
        if members is None or member is None:
            return False
        if not members:
            del self._groups[group]
        groups = self._of_channel[channel]
        groups.discard(group)
        if not groups:
            del self._of_channel[channel]
        self._set_since(member, group, None)
        return True

    def _set_since(self, member: Member, group: str, since: Moment | None) -> None:
        pair = (group, member.channel)
        if member.since is not None:
            pairs = self._by_since[member.since]
            pairs.discard(pair)
            if not pairs:
                del self._by_since[member.since]
        member.since = since
        if since is not None:
            self._by_since.setdefault(since, set()).add(pair)

    def note_own_change(self, pairs: Iterable[Pair], moment: Moment) -> None:
        """Note that the owner has changed memberships, in a statement with this snapshot."""
        for pair in pairs:
            self._own_changes.setdefault(pair, []).append(moment)

    def note_join(self, group: str, moment: Moment) -> None:
        """Note that an own change, in this moment, has added the first member of a group."""
        self._joined_at[group] = moment

    @property
    def newly_joined(self) -> KeysView[str]:
        """Groups whose first member an own change has added a moment ago."""
        return self._joined_at.keys()

    def joined_after(self, group: str, boot: int, xid: int) -> Moment | None:
        """Return when an own change added the first member, if after a transaction.

        The client did not listen to the group before. It has received no message that the
        returned moment sees.
        """
        moment = self._joined_at.get(group)
        return moment if moment is not None and moment.sees(boot, xid) else None

    def forget_join(self, group: str) -> None:
        """Note that the messages from before `note_join` were read: read them once only."""
        self._joined_at.pop(group, None)

    def start_of(self, pair: Pair, boot: int, xid: int, asked: Moment) -> Moment:
        """Return the beginning of a membership that a transaction has requested.

        ``asked``: the snapshot of the request. The membership does not begin before the last own
        change that preceded the end of the transaction. A message that this change sees was
        received then, or was not for the channel. If an own change followed,
        `resolve_against_own_change` decides.
        """
        moments = self._own_changes.get(pair, ())
        if not moments or any(moment.sees(boot, xid) for moment in moments):
            return asked
        return moments[-1] if moments[-1].is_later(asked) else asked

    def is_stale_request(self, pair: Pair, requester: str, number: int, id: int) -> bool:
        """Return whether a membership request arrived too late. If not, remember it.

        ``requester``: the client that made the request. ``number``: its number of the statement.
        ``id``: the id of the control message. A request is stale if the client has made a later one
        for the same membership, or has repeated the same one. Then it had given up the statement,
        and the network has delivered it afterwards.
        """
        last, last_id = self._requests.pop((requester, pair), (0, 0))
        is_stale = number < last or (number == last and id != last_id)
        self._requests[requester, pair] = (last, last_id) if is_stale else (number, id)
        if len(self._requests) > MAX_REQUESTS:
            del self._requests[next(iter(self._requests))]
        return is_stale

    def resolve_against_own_change(
        self, group: str, channel: str, boot: int, xid: int, added: Moment | None
    ) -> bool:
        """Return whether an own change followed a membership request, and so counts.

        ``xid`` and ``snapshot`` belong to the request. ``added``: the beginning of the membership
        that it requests, or None for a discard. The request then changes the beginning only. After
        a discard the channel was no member until the own change, and after an add it was a member
        since ``added``.
        """
        moments = self._own_changes.get((group, channel), ())
        seen_by = next((moment for moment in moments if moment.sees(boot, xid)), None)
        if seen_by is None:
            return False
        member = self.get(group, channel)
        if member is not None:
            begins_later = member.since is not None and member.since.sees(boot, xid)
            if added is None and not begins_later:
                self._set_since(member, group, seen_by)
            elif added is not None and begins_later:
                self._set_since(member, group, added)
        return True

    def flush(self, boot: int, xid: int) -> list[Pair]:
        """Remove the memberships that began before a flush. Return them.

        A membership that the owner has added again since the flush stays, and begins then.
        """
        self.last_flush = max(self.last_flush, (boot, xid))
        gone = []
        for group, channel in self.pairs():
            member = self._groups[group][channel]
            if member.since is not None and member.since.sees(boot, xid):
                continue
            moments = self._own_changes.get((group, channel), ())
            again = next((moment for moment in moments if moment.sees(boot, xid)), None)
            if again is None:
                gone.append((group, channel))
            else:
                self._set_since(member, group, again)
        for pair in gone:
            self.discard(*pair)
        return gone

    def expire(self, now: float) -> list[Pair]:
        """Remove the memberships that have expired. Return them."""
        gone = [
            (group, channel)
            for group, members in self._groups.items()
            for channel, member in members.items()
            if member.expires_at <= now
        ]
        for pair in gone:
            self.discard(*pair)
        return gone

    def forget_past(self, is_past: Callable[[Moment], bool]) -> None:
        """Forget past moments: no row that they see can arrive any more.

        ``is_past`` decides which. They are beginnings of memberships, own changes, and joins.
        """
        moments = {moment for each in self._own_changes.values() for moment in each}
        past = {moment for moment in moments if is_past(moment)}
        if past:
            changed = {
                pair: [m for m in each if m not in past] for pair, each in self._own_changes.items()
            }
            self._own_changes = {pair: each for pair, each in changed.items() if each}
        self._joined_at = {group: at for group, at in self._joined_at.items() if not is_past(at)}
        for since in [since for since in self._by_since if is_past(since)]:
            for group, channel in self._by_since.pop(since):
                self._groups[group][channel].since = None
