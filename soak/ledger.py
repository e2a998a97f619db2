"""The outcome of every message, computed from the records of the processes. No I/O."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from soak.absences import HEARTBEAT, Absences, Receipts
from soak.group_order import GroupOrder, Key, Receipt, compare
from soak.history import History, Message, Reading, Stay
from soak.records import KINDS, Fault, Got, Kind, Record

ORDERED = ("specific", "group", "single")  # several workers on one channel promise no order
JOBS = ("normal", "single")
OWED = ("returned", "unannounced")  # outcomes after which a message must arrive

LAZY = 1.0  # a crash of the server may lose commits of so many seconds before it
LONG = 0.3  # seconds: a longer fault delays messages
# Jobs that a killed worker may hold: 31 prefetched, two waited for, two not yet recorded.
TAKEN_MOST = 35
HELD = 3.0  # seconds for which a worker may hold a job before it releases it
ANNOUNCED = 1.0  # seconds after a transaction within which its messages were announced
DELIVERED_MOST = 3.0  # seconds within which a message arrives without a fault
FOUND_MOST = 2 * HEARTBEAT + 2.0  # seconds until a message that was never announced arrives
BUCKET = 5.0  # seconds: memberships are indexed by intervals of this length


@dataclass
class Tally:
    """Counts for one kind of stream. Lost messages are counted by cause, once per reader."""

    returned: int = 0
    unknown: int = 0
    refused: int = 0
    unannounced: int = 0
    delivered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    twice: int = 0
    again: int = 0  # jobs whose claim had not reached a standby before it was promoted
    disordered: int = 0
    late: int = 0  # never announced and found later than promised
    early: int = 0  # sent to a group before the channel joined it
    stayed: int = 0  # sent to a group after the channel left it, if that change was lost
    # refused, sent to another channel, or sent to a group after the channel left it
    uninvited: int = 0

    @property
    def is_clean(self) -> bool:
        """Return whether no promise was broken."""
        return not (
            self.lost[UNEXPLAINED] or self.twice or self.disordered or self.late or self.uninvited
        )


CRASH = "crash"
PROMOTION = "promotion"
# the processes of all members of a group were absent for a lease while the database was up
NO_LEASE = "no lease"
UNDONE_JOIN = "undone join"
KILLED = "kill -9"
LEFT = "reader left"
LEFT_GROUP = "left group"  # the member left the group before the message arrived
UNEXPLAINED = "UNEXPLAINED"
CAUSES = (CRASH, PROMOTION, NO_LEASE, UNDONE_JOIN, KILLED, LEFT, LEFT_GROUP, UNEXPLAINED)


@dataclass
class Ledger:
    """The result of a soak."""

    tallies: dict[Kind, Tally]
    group_order: GroupOrder
    faults: list[Fault]
    complaints: list[str]
    cancelled: int
    joins: int
    offences: list[str]  # one line for each broken promise
    first: dict[str, list[float]]  # by kind of fault: seconds until any message arrived
    all_back: dict[str, list[float]]  # seconds until every reader received a message

    @property
    def is_clean(self) -> bool:
        """Return whether the layer kept its promises."""
        return not (self.complaints or self.group_order.disagreements) and all(
            tally.is_clean for tally in self.tallies.values()
        )


def settle(books: Mapping[str, Iterable[Record]]) -> Ledger:
    """Return the ledger of the books, by process. Faults may be in any book."""
    return _Settling(History(books)).settle()


class _Settling:
    """The computation of a ledger."""

    def __init__(self, history: History) -> None:
        self.messages = history.messages
        self.readings = history.readings
        self.stays = history.stays
        self.jobs = history.jobs
        self.faults = history.faults
        self.crashes = history.crashes
        self.promotions = history.promotions
        self.gone = history.gone
        self.complaints = history.complaints
        self.cancelled = history.cancelled
        self.joins = history.joins
        self.tallies: dict[Kind, Tally] = {kind: Tally() for kind in KINDS}
        self.offences: list[str] = []
        # A crash ends a boot, and so does a promotion.
        breaks = [(crash.at, crash.ended) for crash in self.crashes]
        breaks += [(promotion.crashed, promotion.ended) for promotion in self.promotions]
        self.absences = Absences(history.aways, self._receipts(), breaks)
        self.heard = self._groups_heard()
        self.progress: dict[str, tuple[list[float], list[float]]] = {}
        self.stays_of = _by_channel(stay for stays in self.stays.values() for stay in stays)
        self.sure_stays = self._find_sure_stays()
        self.caught_up_until = self._catch_ups_of_groups()
        self.start = min((message.begun.at for message in self.messages.values()), default=0.0)

    def _receipts(self) -> dict[str, list[tuple[float, float]]]:
        """Return by process when messages on specific channels were sent and received."""
        receipts: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for reading in self.readings.values():
            receipts[reading.process] += [
                self._times(got) for got in reading.got if (got.writer, got.n) in self.messages
            ]
        return receipts

    def _groups_heard(self) -> dict[tuple[str, str], Receipts]:
        """Return by group and channel when messages of the group were sent and received."""
        heard: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for channel, reading in self.readings.items():
            for got in reading.got:
                message = self.messages.get((got.writer, got.n))
                if message is not None and message.begun.kind == "group":
                    heard[message.begun.stream, channel].append(self._times(got))
        return {member: Receipts(times) for member, times in heard.items()}

    def settle(self) -> Ledger:
        """Check all promises and return the ledger."""
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
        """Check the messages of specific channels; return what each channel received."""
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
        """Check the jobs of normal channels; return what was received on each channel."""
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
        """Return whether a leave by another process was lost or had not reached the owner yet."""
        if message.begun.kind != "group":
            return False
        for stay in self.stays_of[message.begun.stream, reading.channel]:
            if stay.by == reading.process or stay.left > message.begun.at:
                continue
            if self._change_was_lost(stay.leaving, stay.left, stay.leaves_in_transaction):
                return True
            # The owner found the change without an announcement.
            if (
                stay.leaves_in_transaction
                and message.begun.at <= stay.left + FOUND_MOST
                and self.absences.was_away(stay.by, stay.leaving, stay.left + ANNOUNCED)
            ):
                return True
        return False

    def _change_was_lost(self, began: float, ended: float, in_transaction: bool) -> bool:
        """Return whether a membership change by another process may never reach the owner.

        An application's transaction waits for the disk, unlike the layer's own, so a crash does
        not undo it.
        """
        return self._fell_to_promotion(began, ended) or (
            not in_transaction and self._fell_to_crash(began, ended)
        )

    def _taking_was_lost(self, message: Message, first: Got, second: Got) -> bool:
        """Return whether the promoted standby may not have had the claim of a job."""
        return message.begun.kind in JOBS and any(
            message.begun.at <= promotion.cut
            and promotion.at <= first.at
            and promotion.crashed <= second.at
            for promotion in self.promotions
        )

    def _may_be_unannounced(self, message: Message) -> bool:
        """Return whether a message was announced late or possibly never."""
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
        """Check that an unannounced message arrives within two heartbeats, without an absence."""
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
        """Compare the order in which the members of each group received messages."""
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
        """Return whether a member received a message in a catch-up.

        If another process added the member, its own process may first have to listen for the
        group and then catch up.
        """
        sent = message.begun.at
        if self.absences.is_caught_up(reading.process, sent, got.at):
            return True
        return any(
            joining <= got.at and sent <= until
            for joining, until in self.caught_up_until[message.begun.stream, got.channel]
        )

    def _catch_ups_of_groups(self) -> dict[tuple[str, str], list[tuple[float, float]]]:
        """Return by member when another process added it and when it then received a message."""
        found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for (group, channel), stays in self.stays_of.items():
            for stay in stays:
                if stay.by != self.readings[channel].process:
                    found[group, channel].append((stay.joining, self._first_got(stay)))
        return found

    def _first_got(self, stay: Stay) -> float:
        """Return when the first message sent to the group after ``joining`` arrived."""
        heard = self.heard.get((stay.group, stay.channel))
        return math.inf if heard is None else heard.first_sent_after(stay.joining)

    def _keep_order(self, message: Message, last: dict[str, int], got: Got, process: str) -> None:
        # A statement whose answer was lost may reach the server at any later time.
        if message.outcome != "returned":
            return
        if got.n < last.get(got.writer, 0):
            # A job sent in a transaction has its place in the order from the call on, not from
            # the commit. The README states this limit.
            begun = message.begun
            if self._may_be_unannounced(message) or (begun.kind in JOBS and begun.in_transaction):
                return
            self.tallies[begun.kind].disordered += 1
            self._offend(message, f"came to {process} after number {last[got.writer]}", got.at)
        else:
            last[got.writer] = got.n

    # ------------------------------------------------------------------ what was lost

    def _find_lost(self, received: Mapping[str, set[Key]], done: Mapping[str, set[Key]]) -> None:
        lost_jobs: dict[str, list[Message]] = defaultdict(list)
        for message in self.messages.values():
            if message.outcome not in OWED:
                continue
            kind, stream = message.begun.kind, message.begun.stream
            if kind == "specific":
                reading = self.readings[stream]
                if message.begun.at < reading.until and message.key not in received[stream]:
                    self._lose(message, self._cause(message, reading), f"for {reading.process}")
            elif kind == "group":
                for stay in self.sure_stays[stream, int(message.begun.at // BUCKET)]:
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

    def _find_sure_stays(self) -> dict[tuple[str, int], list[Stay]]:
        """Return, by group and interval, the stays in which a channel was certainly a member."""
        sure: dict[tuple[str, int], list[Stay]] = defaultdict(list)
        last = max((message.begun.at for message in self.messages.values()), default=0.0)
        for group, stays in self.stays.items():
            for stay in stays:
                until = min(stay.leaving, self.readings[stay.channel].until, last)
                if stay.joined <= until:
                    for piece in range(int(stay.joined // BUCKET), int(until // BUCKET) + 1):
                        sure[group, piece].append(stay)
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
        """Return whether the member left the group before the message had to arrive.

        A ``group_discard`` by the owner ends delivery at once: messages that are in transit then
        are no longer owed. A ``group_discard`` by another process takes effect after all messages
        that were sent before it, except messages that are found without an announcement.
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
        """Return whether a message that was sent later was received before ``until``."""
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
        """Return the cause if a crash or a promotion of a server lost the message."""
        begun = message.begun
        if not begun.in_transaction and self._fell_to_crash(begun.at, message.ended):
            return CRASH
        held = HELD if begun.kind in JOBS else 0.0  # the release of the job may be lost too
        return PROMOTION if self._fell_to_promotion(begun.at, message.ended + held) else None

    def _fell_to_crash(self, began: float, ended: float) -> bool:
        return any(ended >= crash.at - LAZY and began <= crash.ended for crash in self.crashes)

    def _fell_to_promotion(self, began: float, ended: float) -> bool:
        return any(
            ended >= promotion.at and began <= promotion.ended for promotion in self.promotions
        )

    def _fell_to_lease(self, message: Message, reading: Reading) -> bool:
        """Return whether no process with a lease had a member, so the message was not written.

        All other messages are written and wait for their readers.
        """
        began, ended = message.begun.at, message.ended
        return self.absences.had_no_lease(reading.process, began, ended) and not any(
            other.joined <= began
            and ended <= min(other.leaving, self.readings[other.channel].until)
            and not self.absences.had_no_lease(self.readings[other.channel].process, began, ended)
            for other in self.sure_stays[message.begun.stream, int(began // BUCKET)]
        )

    def _join_was_undone(self, stay: Stay, owner: Reading) -> bool:
        """Return whether a join by another process was lost or had not reached the owner yet.

        The owner keeps the members that it knows in memory, whatever happens to the database.
        """
        if stay.by == owner.process or self._first_got(stay) < stay.left:
            return False
        return self._change_was_lost(stay.joining, stay.joined, stay.joins_in_transaction)

    def _join_was_late(self, message: Message, stay: Stay) -> bool:
        """Return whether the owner found a join in a transaction without its announcement."""
        return (
            stay.joins_in_transaction
            and message.begun.at <= stay.joined + FOUND_MOST
            and self.absences.was_away(stay.by, stay.joining, stay.joined + ANNOUNCED)
        )

    def _find_lost_jobs(self, messages: list[Message]) -> None:
        """Assign lost jobs to workers that were killed later, at most `TAKEN_MOST` to each."""
        readers = {process for process, _ in self.jobs[messages[0].begun.stream]}
        takers = sorted(
            gone.at for gone in self.gone.values() if gone.was_killed and gone.process in readers
        )
        capacity = [TAKEN_MOST] * len(takers)
        for message in sorted(messages, key=lambda message: message.begun.at):
            cause = UNEXPLAINED
            if fell := self._fell_to_server(message):
                cause = fell
            else:
                first = bisect_right(takers, message.begun.at)
                taker = next(
                    (index for index in range(first, len(takers)) if capacity[index]), None
                )
                if taker is not None:
                    capacity[taker] -= 1
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
                # A competing worker may receive nothing for a while without a fault.
                if self.messages[got.writer, got.n].begun.kind in ORDERED:
                    times.setdefault(process, []).append(self._times(got))
        began = {
            process: min(received for _, received in of) for process, of in times.items() if of
        }
        receipts = {process: Receipts(of) for process, of in times.items()}
        long = [f.at for f in self.faults if f.ended - f.at > LONG and not f.is_aside]
        for fault in self.faults:
            # A message that arrives only after the next long fault was delayed by that fault.
            until = min((at for at in long if at > fault.at), default=math.inf)
            backs = [
                back
                for process, at in began.items()
                if at < fault.ended  # a process that started later has nothing to recover from
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
    """Return the stays by group and channel."""
    found: dict[tuple[str, str], list[Stay]] = defaultdict(list)
    for stay in stays:
        found[stay.group, stay.channel].append(stay)
    return found
