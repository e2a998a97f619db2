"""The memberships of a client's own channels. See ``docs/protocols.md``, section 4.

Pure; used by the owner loop only, but for `is_member` and `len`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, KeysView

from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.snapshot import Moment

Pair = tuple[str, str]  # (group, channel)

MAX_REQUESTS = 10_000  # changes that others asked for are remembered, the last ones


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
        self._by_since: dict[Moment, set[Pair]] = {}  # those with this `since`
        self._own_changes: dict[Pair, list[Moment]] = {}  # when the owner itself changed them
        self._joined_at: dict[
            str, Moment
        ] = {}  # when the owner itself added the first member of a group
        # The last change that a client has asked for: its number, and the id of the control message.
        self._requests: dict[tuple[str, Pair], tuple[int, int]] = {}
        self.last_flush = (0, 0)  # boot and transaction of the last flush that was applied

    def __len__(self) -> int:
        return sum(map(len, list(self._of_channel.values())))

    def is_member(self, channel: str) -> bool:
        """Whether a channel is in any group."""
        return channel in self._of_channel

    @property
    def groups(self) -> KeysView[str]:
        """The names of all groups."""
        return self._groups.keys()

    def members(self, group: str) -> Collection[Member]:
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
        """Remove a channel. Return whether it was a member."""
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
        """The owner itself has changed these memberships, in a statement that saw this moment."""
        for pair in pairs:
            self._own_changes.setdefault(pair, []).append(moment)

    def note_join(self, group: str, moment: Moment) -> None:
        """The owner itself has added the first member of a group, in this moment."""
        self._joined_at[group] = moment

    @property
    def newly_joined(self) -> KeysView[str]:
        """Groups whose first member the owner itself has added a moment ago."""
        return self._joined_at.keys()

    def joined_after(self, group: str, boot: int, xid: int) -> Moment | None:
        """The moment in which the owner itself added the first member, if that was after this transaction.

        No message that it sees has been received here.
        """
        moment = self._joined_at.get(group)
        return moment if moment is not None and moment.sees(boot, xid) else None

    def forget_join(self, group: str) -> None:
        """What was sent before that has been read: it must not be read again."""
        self._joined_at.pop(group, None)

    def start_of(self, pair: Pair, boot: int, xid: int, asked: Moment) -> Moment:
        """Where a membership begins that this transaction has asked for, in the moment ``asked``.

        Not before the last change by the owner itself that came before the transaction ended: what that one
        sees was received, or was not for the channel. One that came later is judged by `resolve_against_own_change`.
        """
        moments = self._own_changes.get(pair, ())
        if not moments or any(moment.sees(boot, xid) for moment in moments):
            return asked
        return moments[-1] if moments[-1].is_later(asked) else asked

    def is_stale_request(self, pair: Pair, asker: str, number: int, id: int) -> bool:
        """Whether a client has asked for a later change of a membership, or for the same one before.

        Then the statement behind this control message was given up, and the network has delivered it late.
        """
        last, last_id = self._requests.pop((asker, pair), (0, 0))
        is_stale_request = number < last or (number == last and id != last_id)
        self._requests[asker, pair] = (last, last_id) if is_stale_request else (number, id)
        if len(self._requests) > MAX_REQUESTS:
            del self._requests[next(iter(self._requests))]
        return is_stale_request

    def resolve_against_own_change(
        self, group: str, channel: str, boot: int, xid: int, added: Moment | None
    ) -> bool:
        """Whether the owner has changed a membership after this transaction asked for a change.

        Then that changes nothing but the beginning of the membership: the channel was no member between a
        discard and the owner's own change, and it was one since an add, in the moment ``added``.
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
        """Remove what began before this transaction. Return what was removed."""
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
            else:  # the owner has added it again since
                self._set_since(member, group, again)
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

    def forget_past(self, is_past: Callable[[Moment], bool]) -> None:
        """Forget beginnings and changes of which this is true: no row that they see can come any more."""
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
