"""What became of every message: pure computation over what the processes wrote down. No I/O."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from soak.absences import HEARTBEAT, Absences, Receipts
from soak.group_order import GroupOrder, Key, Receipt, compare
from soak.records import (
    KINDS,
    Away,
    Begun,
    Cancelled,
    Closed,
    Complaint,
    Crash,
    Ended,
    Fault,
    Gone,
    Got,
    Joined,
    Joining,
    Kind,
    Leaving,
    Left,
    Opened,
    Outcome,
    Promotion,
    Record,
    Undone,
)

ORDERED = ("specific", "group", "single")  # several workers on one channel promise no order
JOBS = ("normal", "single")
OWED = ("returned", "unannounced")  # outcomes after which a message must arrive

LAZY = 1.0  # seconds before a crash of the server of which commits may be lost
LONG = 0.3  # seconds: a fault that takes longer keeps messages from coming
TAKEN_MOST = (
    35  # jobs that a killed worker may hold: 31 ahead, two waited for, two not yet written down
)
HELD = 3.0  # seconds for which a worker may hold a job before it releases it
ANNOUNCED = 1.0  # seconds after a transaction within which its messages were surely announced
DELIVERED_MOST = 3.0  # seconds within which a message arrives if nothing is the matter
FOUND_MOST = 2 * HEARTBEAT + 2.0  # seconds until a message that was never announced arrives
BUCKET = 5.0  # seconds: memberships are looked up by pieces of time


# ---------------------------------------------------------------------- what is made of it


class Message(NamedTuple):
    """A message that was sent, or was to be."""

    begun: Begun
    ended: float  # infinity: the sender ended before the call did
    outcome: Outcome

    @property
    def key(self) -> Key:
        """What identifies it."""
        return (self.begun.writer, self.begun.n)


@dataclass
class Stay:
    """A channel in a group.

    Surely from ``joined`` to ``leaving``, perhaps from ``joining`` to ``left``.
    """

    group: str
    channel: str
    by: str  # the process that has it join
    joining: float
    joined: float = math.inf
    leaving: float = math.inf
    left: float = math.inf
    joins_in_transaction: bool = False
    leaves_in_transaction: bool = False


@dataclass
class Reading:
    """A specific channel, and the process that reads it."""

    channel: str
    process: str
    until: float = math.inf
    was_killed: bool = False
    got: list[Got] = field(default_factory=list)
    last_of: dict[str, int] = field(
        default_factory=dict
    )  # writer -> its last message that was received here


@dataclass
class Tally:
    """What became of one kind of stream. What is lost is counted by its cause, per reader."""

    returned: int = 0
    unknown: int = 0
    refused: int = 0
    unannounced: int = 0
    delivered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    twice: int = 0
    again: int = 0  # jobs of which a promoted standby had not heard that they were taken
    disordered: int = 0
    late: int = 0  # never announced, and found later than promised
    early: int = 0  # sent to a group before joining it, by a catch-up
    stayed: int = 0  # sent to a group after leaving it, where the leaving itself was lost
    uninvited: int = 0  # refused, sent to another channel, or to a group after leaving it

    @property
    def is_clean(self) -> bool:
        """Whether nothing happened that must not."""
        return not (
            self.lost[UNEXPLAINED] or self.twice or self.disordered or self.late or self.uninvited
        )


CRASH = "crash"
PROMOTION = "promotion"
# the only members of a group were away for longer than their leases, and the database was not
NO_LEASE = "no lease"
UNDONE_JOIN = "undone join"
KILLED = "kill -9"
LEFT = "reader left"
LEFT_GROUP = "left group"  # it was on its way when its member left the group
UNEXPLAINED = "UNEXPLAINED"
CAUSES = (CRASH, PROMOTION, NO_LEASE, UNDONE_JOIN, KILLED, LEFT, LEFT_GROUP, UNEXPLAINED)


@dataclass
class Ledger:
    """The result."""

    tallies: dict[Kind, Tally]
    group_order: GroupOrder
    faults: list[Fault]
    complaints: list[str]
    cancelled: int
    joins: int
    offences: list[str]  # what must not have happened, one line each
    first: dict[str, list[float]]  # by kind of fault: seconds until anything came through
    all_back: dict[str, list[float]]  # and until every reader had something

    @property
    def is_clean(self) -> bool:
        """Whether the layer kept its promises."""
        return not (self.complaints or self.group_order.disagreements) and all(
            tally.is_clean for tally in self.tallies.values()
        )


def settle(books: Mapping[str, Iterable[Record]]) -> Ledger:
    """The ledger of these books, by process; faults are in any of them."""
    return _Settling(books).settle()


class _Settling:
    def __init__(self, books: Mapping[str, Iterable[Record]]) -> None:
        self.messages: dict[Key, Message] = {}
        self.readings: dict[str, Reading] = {}
        self.stays: dict[str, list[Stay]] = defaultdict(list)  # by group
        self.jobs: dict[str, list[tuple[str, Got]]] = defaultdict(
            list
        )  # normal channel -> (process, got)
        self.faults: list[Fault] = []
        self.aways: list[Away] = []
        self.crashes: list[Crash] = []
        self.promotions: list[Promotion] = []
        self.gone: dict[str, Gone] = {}
        self.tallies: dict[Kind, Tally] = {kind: Tally() for kind in KINDS}
        self.complaints: list[str] = []
        self.offences: list[str] = []
        self.cancelled = self.joins = 0
        self.streams: dict[Kind, set[str]] = defaultdict(set)
        for process, records in books.items():
            self._read(process, records)
        for reading in self.readings.values():
            gone = self.gone.get(reading.process)
            if gone is not None and gone.at < reading.until:
                reading.until, reading.was_killed = gone.at, gone.was_killed
        # A crash and a promotion alike end one run of ids, and are over at a time.
        self.breaks = [(crash.at, crash.ended) for crash in self.crashes]
        self.breaks += [(promotion.crashed, promotion.ended) for promotion in self.promotions]
        self.absences = Absences(self.aways, self._receipts(), self.breaks)
        self.heard = self._groups_heard()
        self.progress: dict[str, tuple[list[float], list[float]]] = {}
        self.stays_of = _by_channel(stay for stays in self.stays.values() for stay in stays)
        self.caught_up_until = self._catch_ups_of_groups()
        self.faults.sort()
        self.start = min((message.begun.at for message in self.messages.values()), default=0.0)

    def _receipts(self) -> dict[str, list[tuple[float, float]]]:
        """By process: when what its specific channels received had been sent, and was received."""
        receipts: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for reading in self.readings.values():
            receipts[reading.process] += [
                self._times(got) for got in reading.got if (got.writer, got.n) in self.messages
            ]
        return receipts

    def _groups_heard(self) -> dict[tuple[str, str], Receipts]:
        """By group and channel: when messages of the group had been sent, and were received."""
        heard: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for channel, reading in self.readings.items():
            for got in reading.got:
                message = self.messages.get((got.writer, got.n))
                if message is not None and message.begun.kind == "group":
                    heard[message.begun.stream, channel].append(self._times(got))
        return {member: Receipts(times) for member, times in heard.items()}

    def _read(self, process: str, records: Iterable[Record]) -> None:
        open_stays: dict[tuple[str, str], Stay] = {}
        for record in records:
            match record:
                case Begun():
                    self.messages[record.writer, record.n] = Message(record, math.inf, "unknown")
                    self.streams[record.kind].add(record.stream)
                case Ended():
                    key = (record.writer, record.n)
                    self.messages[key] = Message(
                        self.messages[key].begun, record.at, record.outcome
                    )
                case Opened():
                    self.readings[record.channel] = Reading(record.channel, process)
                case Closed():
                    self.readings[record.channel].until = record.at
                case Got():
                    if record.channel in self.readings:
                        reading = self.readings[record.channel]
                        reading.got.append(record)
                        reading.last_of[record.writer] = max(
                            record.n, reading.last_of.get(record.writer, 0)
                        )
                    else:
                        self.jobs[record.channel].append((process, record))
                case Joining():
                    stay = Stay(record.group, record.channel, process, record.at)
                    stay.joins_in_transaction = record.in_transaction
                    open_stays[record.group, record.channel] = stay
                    self.stays[record.group].append(stay)
                    self.joins += 1
                case Joined():
                    open_stays[record.group, record.channel].joined = record.at
                case Leaving():
                    stay = open_stays[record.group, record.channel]
                    stay.leaving, stay.leaves_in_transaction = record.at, record.in_transaction
                case Left():
                    open_stays[record.group, record.channel].left = record.at
                case Undone():
                    stay = open_stays[record.group, record.channel]
                    if stay.leaving < math.inf:
                        stay.leaving = math.inf
                    else:
                        self.stays[record.group].remove(stay)
                        del open_stays[record.group, record.channel]
                case Cancelled():
                    self.cancelled += 1
                case Complaint():
                    self.complaints.append(f"{process}: {record.text}")
                case Fault():
                    self.faults.append(record)
                case Away():
                    self.aways.append(record)
                case Crash():
                    self.crashes.append(record)
                case Promotion():
                    self.promotions.append(record)
                case Gone():
                    self.gone[record.process] = record

    def settle(self) -> Ledger:
        for message in self.messages.values():
            tally = self.tallies[message.begun.kind]
            setattr(tally, message.outcome, getattr(tally, message.outcome) + 1)
        received = self._look_at_channels()
        done = self._look_at_jobs()
        self._find_lost(received, done)
        group_order = self._compare_members()
        first, all_back = self._recoveries()
        return Ledger(
            self.tallies,
            group_order,
            self.faults,
            self.complaints,
            self.cancelled,
            self.joins,
            self.offences,
            first,
            all_back,
        )

    # ------------------------------------------------------------------ what was delivered

    def _look_at_channels(self) -> dict[str, set[Key]]:
        """What specific channels received, whether for themselves or for their groups."""
        received: dict[str, set[Key]] = defaultdict(set)
        for channel, reading in self.readings.items():
            last: dict[str, int] = {}
            first: dict[Key, Got] = {}
            for got in reading.got:
                message = self._delivered(got, first, reading.process)
                if message is None:
                    continue
                tally = self.tallies[message.begun.kind]
                if not self._was_meant_for(message, channel):
                    if self._has_joined_since(message, got):
                        tally.early += 1
                    elif self._leaving_was_lost(message, reading):
                        tally.stayed += 1
                    else:
                        self._offend(
                            message, f"came uninvited to {channel} of {reading.process}", got.at
                        )
                        tally.uninvited += 1
                self._expect_in_time(message, got, reading.process)
                self._keep_order(message, last, got, reading.process)
            received[channel] = set(first)
        return received

    def _look_at_jobs(self) -> dict[str, set[Key]]:
        """What the readers of normal channels received."""
        done: dict[str, set[Key]] = defaultdict(set)
        for channel, gots in self.jobs.items():
            last: dict[str, dict[str, int]] = defaultdict(dict)
            first: dict[Key, Got] = {}
            for process, got in sorted(gots, key=lambda entry: entry[1].at):
                message = self._delivered(got, first, process)
                if message is None:
                    continue
                if message.begun.stream != channel:
                    self._offend(message, f"came uninvited to {channel}", got.at)
                    self.tallies[message.begun.kind].uninvited += 1
                if message.begun.kind in ORDERED:
                    self._keep_order(message, last[process], got, process)
            done[channel] = set(first)
        return done

    def _delivered(self, got: Got, first: dict[Key, Got], process: str) -> Message | None:
        message = self.messages.get((got.writer, got.n))
        if message is None:
            raise ValueError(f"{got} was never sent.")
        tally = self.tallies[message.begun.kind]
        tally.delivered += 1
        earlier = first.setdefault(message.key, got)
        if earlier is not got:
            if self._taking_was_lost(message, earlier, got):
                tally.again += 1
            else:
                tally.twice += 1
                self._offend(message, f"came twice, now to {process}", got.at)
            return None
        if message.outcome == "refused":
            tally.uninvited += 1
            self._offend(message, f"was refused, and came to {process}", got.at)
        return message

    def _was_meant_for(self, message: Message, channel: str) -> bool:
        if message.begun.kind == "group":
            return any(
                stay.joining <= message.ended and message.begun.at <= stay.left
                for stay in self.stays_of[message.begun.stream, channel]
            )
        return message.begun.stream == channel

    def _has_joined_since(self, message: Message, got: Got) -> bool:
        return message.begun.kind == "group" and any(
            message.ended < stay.joining < got.at
            for stay in self.stays_of[message.begun.stream, got.channel]
        )

    def _leaving_was_lost(self, message: Message, reading: Reading) -> bool:
        """Whether a leaving that another process made did not reach the owner, or not yet."""
        if message.begun.kind != "group":
            return False
        for stay in self.stays_of[message.begun.stream, reading.channel]:
            if stay.by == reading.process or stay.left > message.begun.at:
                continue
            if self._change_was_lost(stay.leaving, stay.left, stay.leaves_in_transaction):
                return True
            # It was found without an announcement.
            if (
                stay.leaves_in_transaction
                and message.begun.at <= stay.left + FOUND_MOST
                and self.absences.was_away(stay.by, stay.leaving, stay.left + ANNOUNCED)
            ):
                return True
        return False

    def _change_was_lost(self, began: float, ended: float, in_transaction: bool) -> bool:
        """Whether a change of a membership by another process may be lost on its way to the owner.

        A transaction waits for the disk, unlike the layer's own commits, and survives a crash.
        """
        return self._fell_to_promotion(began, ended) or (
            not in_transaction and self._fell_to_crash(began, ended)
        )

    def _taking_was_lost(self, message: Message, first: Got, second: Got) -> bool:
        """Whether a job was taken without the knowledge of the standby that was promoted."""
        return message.begun.kind in JOBS and any(
            message.begun.at <= promotion.cut
            and promotion.at <= first.at
            and promotion.crashed <= second.at
            for promotion in self.promotions
        )

    def _may_be_unannounced(self, message: Message) -> bool:
        """Whether a message was perhaps never announced, or much later than it was committed."""
        begun = message.begun
        return begun.in_transaction and (
            message.outcome in ("unannounced", "unknown")
            or self.absences.was_away(begun.process, begun.at, message.ended + ANNOUNCED)
            or self._died_after(message)
        )

    def _died_after(self, message: Message) -> bool:
        gone = self.gone.get(message.begun.process)
        return gone is not None and gone.was_killed and gone.at <= message.ended + ANNOUNCED

    def _expect_in_time(self, message: Message, got: Got, process: str) -> None:
        """What was never announced arrives within two heartbeats, if the process is there."""
        due = message.ended + FOUND_MOST
        if (
            message.outcome == "unannounced"
            and got.at > due
            and not self.absences.was_away(process, message.ended, due)
        ):
            self.tallies[message.begun.kind].late += 1
            self._offend(
                message, f"was found by {process} after {got.at - message.ended:.1f} s", got.at
            )

    def _compare_members(self) -> GroupOrder:
        """What the members of each group received, beside each other."""
        members: dict[str, dict[str, list[Receipt]]] = defaultdict(lambda: defaultdict(list))
        has_place: dict[Key, bool] = {}
        for channel, reading in self.readings.items():
            seen: set[Key] = set()
            for got in reading.got:
                message = self.messages[got.writer, got.n]
                if message.begun.kind != "group" or message.key in seen:
                    continue
                seen.add(message.key)
                if message.key not in has_place:
                    has_place[message.key] = not self._may_be_unannounced(message)
                if has_place[message.key]:
                    group, sent = message.begun.stream, message.begun.at
                    members[group][channel].append(
                        Receipt(
                            message.key, sent, got.at, self._is_caught_up(message, got, reading)
                        )
                    )
        found = GroupOrder()
        for of_group in members.values():
            found.add(compare(of_group))
        for disagreement in found.disagreements.values():
            one, other = disagreement.one, disagreement.other
            before = "{}#{}".format(*disagreement.other_key)
            self._offend(
                self.messages[disagreement.key],
                f"came before {before} to {one} of {self.readings[one].process},"
                f" and after it to {other} of {self.readings[other].process}",
                disagreement.received,
            )
        return found

    def _is_caught_up(self, message: Message, got: Got, reading: Reading) -> bool:
        """Whether a member read a message that it had missed.

        So does one that another process added: its process may first have to listen for the group.
        """
        sent = message.begun.at
        if self.absences.is_caught_up(reading.process, sent, got.at):
            return True
        return any(
            joining <= got.at and sent <= until
            for joining, until in self.caught_up_until[message.begun.stream, got.channel]
        )

    def _catch_ups_of_groups(self) -> dict[tuple[str, str], list[tuple[float, float]]]:
        """By group and channel: when another process added it, and when it then heard something."""
        found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for (group, channel), stays in self.stays_of.items():
            for stay in stays:
                if stay.by != self.readings[channel].process:
                    found[group, channel].append((stay.joining, self._first_got(stay)))
        return found

    def _first_got(self, stay: Stay) -> float:
        """When a member received the first message that was sent to its group since it began to join."""
        heard = self.heard.get((stay.group, stay.channel))
        return math.inf if heard is None else heard.first_sent_after(stay.joining)

    def _keep_order(self, message: Message, last: dict[str, int], got: Got, process: str) -> None:
        # What was lost on the way to the server may get there at any later time.
        if message.outcome != "returned":
            return
        if got.n < last.get(got.writer, 0):
            # A job that is sent in a transaction has its place from the call on: the README's limit.
            begun = message.begun
            if self._may_be_unannounced(message) or (begun.kind in JOBS and begun.in_transaction):
                return
            self.tallies[begun.kind].disordered += 1
            self._offend(message, f"came to {process} after number {last[got.writer]}", got.at)
        else:
            last[got.writer] = got.n

    # ------------------------------------------------------------------ what was not

    def _find_lost(self, received: Mapping[str, set[Key]], done: Mapping[str, set[Key]]) -> None:
        lost_jobs: dict[str, list[Message]] = defaultdict(list)
        sure = self._sure_stays()
        for message in self.messages.values():
            if message.outcome not in OWED:
                continue
            kind, stream = message.begun.kind, message.begun.stream
            if kind == "specific":
                reading = self.readings[stream]
                if message.begun.at < reading.until and message.key not in received[stream]:
                    self._lose(message, self._cause(message, reading), f"for {reading.process}")
            elif kind == "group":
                for stay in sure[stream, int(message.begun.at // BUCKET)]:
                    reading = self.readings[stay.channel]
                    if (
                        stay.joined <= message.begun.at
                        and message.ended <= min(stay.leaving, reading.until)
                        and message.key not in received[stay.channel]
                    ):
                        cause = self._cause(message, reading, stay)
                        self._lose(message, cause, f"for {stay.channel} of {reading.process}")
            elif message.key not in done.get(stream, ()):
                lost_jobs[stream].append(message)
        for messages in lost_jobs.values():
            self._find_lost_jobs(messages)

    def _sure_stays(self) -> dict[tuple[str, int], list[Stay]]:
        """By group and piece of time: the stays in which a channel was surely a member."""
        sure: dict[tuple[str, int], list[Stay]] = defaultdict(list)
        last = max((message.begun.at for message in self.messages.values()), default=0.0)
        for group, stays in self.stays.items():
            for stay in stays:
                until = min(stay.leaving, self.readings[stay.channel].until, last)
                if stay.joined <= until:
                    for piece in range(int(stay.joined // BUCKET), int(until // BUCKET) + 1):
                        sure[group, piece].append(stay)
        self.sure_stays = sure
        return sure

    def _cause(self, message: Message, reading: Reading, stay: Stay | None = None) -> str:
        has_later = reading.last_of.get(message.begun.writer, 0) > message.begun.n
        if reading.until < math.inf and not has_later:
            return KILLED if reading.was_killed else LEFT
        if stay is not None and self._left_before(message, reading, stay):
            return LEFT_GROUP
        if cause := self._fell_to_server(message):
            return cause
        if stay is not None and self._fell_to_lease(message, reading):
            return NO_LEASE
        if stay is not None and (
            self._join_was_undone(stay, reading) or self._join_was_late(message, stay)
        ):
            return UNDONE_JOIN
        return UNEXPLAINED

    def _left_before(self, message: Message, reading: Reading, stay: Stay) -> bool:
        """Whether the member left the group before it was due to have received a message.

        The owner's group_discard ends delivery at once: messages that are on their way then are no
        longer owed. That of another process takes its place in the order behind the messages that
        were sent before, except those that may have to be found without an announcement.
        """
        if stay.leaving == math.inf:
            return False
        if self._may_be_unannounced(message):
            due = FOUND_MOST
        elif stay.by == reading.process and not self._had_read_on(message, reading, stay.leaving):
            due = DELIVERED_MOST
        else:
            return False
        return stay.leaving <= message.ended + due or self.absences.is_caught_up(
            reading.process, message.begun.at, stay.leaving
        )

    def _had_read_on(self, message: Message, reading: Reading, until: float) -> bool:
        """Whether something that was sent later had been received before a moment."""
        if reading.channel not in self.progress:
            begun = (self.messages[got.writer, got.n].begun.at for got in reading.got)
            self.progress[reading.channel] = (
                [got.at for got in reading.got],
                list(accumulate(begun, max)),
            )
        received, latest_sent = self.progress[reading.channel]
        place = bisect_left(received, until)
        return place > 0 and latest_sent[place - 1] > message.ended

    def _fell_to_server(self, message: Message) -> str | None:
        """Whether a server took it along: a crash before it was on the disk, or a promotion."""
        begun = message.begun
        if not begun.in_transaction and self._fell_to_crash(begun.at, message.ended):
            return CRASH
        held = HELD if begun.kind in JOBS else 0.0  # its release may be lost as well
        return PROMOTION if self._fell_to_promotion(begun.at, message.ended + held) else None

    def _fell_to_crash(self, began: float, ended: float) -> bool:
        return any(ended >= crash.at - LAZY and began <= crash.ended for crash in self.crashes)

    def _fell_to_promotion(self, began: float, ended: float) -> bool:
        return any(
            ended >= promotion.at and began <= promotion.ended for promotion in self.promotions
        )

    def _fell_to_lease(self, message: Message, reading: Reading) -> bool:
        """Whether a group message was not written, as no process with a lease had a member.

        All other messages are written, and are there when their reader returns.
        """
        began, ended = message.begun.at, message.ended
        return self.absences.had_no_lease(reading.process, began, ended) and not any(
            other.joined <= began
            and ended <= min(other.leaving, self.readings[other.channel].until)
            and not self.absences.had_no_lease(self.readings[other.channel].process, began, ended)
            for other in self.sure_stays[message.begun.stream, int(began // BUCKET)]
        )

    def _join_was_undone(self, stay: Stay, owner: Reading) -> bool:
        """Whether the owner had not heard of a joining that another process made, or not yet.

        What the owner knows does not depend on the database.
        """
        if stay.by == owner.process or self._first_got(stay) < stay.left:
            return False
        return self._change_was_lost(stay.joining, stay.joined, stay.joins_in_transaction)

    def _join_was_late(self, message: Message, stay: Stay) -> bool:
        """Whether the owner found a joining in a transaction without its announcement."""
        return (
            stay.joins_in_transaction
            and message.begun.at <= stay.joined + FOUND_MOST
            and self.absences.was_away(stay.by, stay.joining, stay.joined + ANNOUNCED)
        )

    def _find_lost_jobs(self, messages: list[Message]) -> None:
        """Each worker that was killed took some along, sent before."""
        readers = {process for process, _ in self.jobs[messages[0].begun.stream]}
        takers = sorted(
            gone.at for gone in self.gone.values() if gone.was_killed and gone.process in readers
        )
        room = [TAKEN_MOST] * len(takers)
        for message in sorted(messages, key=lambda message: message.begun.at):
            cause = UNEXPLAINED
            if fell := self._fell_to_server(message):
                cause = fell
            else:
                first = bisect_right(takers, message.begun.at)
                taker = next((index for index in range(first, len(takers)) if room[index]), None)
                if taker is not None:
                    room[taker] -= 1
                    cause = KILLED
            self._lose(message, cause, f"on {message.begun.stream}")

    def _lose(self, message: Message, cause: str, where: str) -> None:
        self.tallies[message.begun.kind].lost[cause] += 1
        if cause == UNEXPLAINED:
            self._offend(message, f"was lost {where} ({cause})", message.ended)

    def _offend(self, message: Message, what: str, at: float) -> None:
        begun = message.begun
        near = [
            f"{fault.kind} {fault.at - self.start:.2f}-{fault.ended - self.start:.2f}"
            for fault in self.faults
            if begun.at - 15 < fault.ended and fault.at < at + 5
        ]
        self.offences.append(
            f"{begun.kind} {begun.writer}#{begun.n} to {begun.stream},"
            f" sent {begun.at - self.start:.3f}-{message.ended - self.start:.3f}"
            f" ({message.outcome}), {what} [{at - self.start:.3f}];"
            f" faults: {', '.join(near) or 'none'}"
        )

    # ------------------------------------------------------------------ how long it took

    def _recoveries(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        first: dict[str, list[float]] = defaultdict(list)
        all_back: dict[str, list[float]] = defaultdict(list)
        times: dict[str, list[tuple[float, float]]] = self._receipts()
        for gots in self.jobs.values():
            for process, got in gots:
                # Of those that compete, some get nothing for a while though they could.
                if self.messages[got.writer, got.n].begun.kind in ORDERED:
                    times.setdefault(process, []).append(self._times(got))
        began = {
            process: min(received for _, received in of) for process, of in times.items() if of
        }
        receipts = {process: Receipts(of) for process, of in times.items()}
        long = [f.at for f in self.faults if f.ended - f.at > LONG and not f.is_aside]
        for fault in self.faults:
            # What comes only after the next long fault has waited for that.
            until = min((at for at in long if at > fault.at), default=math.inf)
            backs = [
                back
                for process, at in began.items()
                if at < fault.ended  # a later one has nothing to recover from
                and (back := receipts[process].first_sent_after(fault.ended)) < until
                and not self.absences.was_alone(process, fault.ended, back)
            ]
            if backs:
                first[fault.kind].append(min(backs) - fault.ended)
                all_back[fault.kind].append(max(backs) - fault.ended)
        return dict(first), dict(all_back)

    def _times(self, got: Got) -> tuple[float, float]:
        return self.messages[got.writer, got.n].begun.at, got.at


def _by_channel(stays: Iterable[Stay]) -> dict[tuple[str, str], list[Stay]]:
    """Stays by group and channel."""
    found: dict[tuple[str, str], list[Stay]] = defaultdict(list)
    for stay in stays:
        found[stay.group, stay.channel].append(stay)
    return found
