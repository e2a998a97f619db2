"""A process whose transactions send messages and change memberships."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import traceback
from collections.abc import Collection

from django.db import DEFAULT_DB_ALIAS, connection, transaction
from django.db import Error as DatabaseError

from pg_layer import LayerUnavailable
from soak.book import now
from soak.records import Complaint, Ended, Joined, Joining, Leaving, Left, Outcome, Undone
from soak.roles import PAUSE, RETRY, Sending

DESKS = 2  # threads of a clerk
STEPS_MOST = 4  # at most so many sends and membership changes in one transaction
OPEN, OPEN_WEIGHTS = ((0.0, 0.3, 3.0, 8.0), (60, 30, 9, 1))  # seconds it stays open at most
ROLLED_BACK = 0.15  # probability that a transaction, or one step of it, is rolled back


class Clerk(Sending):
    """A process that uses ``layer.sync`` in transactions on Django's connection."""

    async def play(self) -> None:
        self.rest = threading.Event()
        self.say("ready")
        desks = [
            Desk(self, f"{self.part.name}.{number}", self.random.getrandbits(32))
            for number in range(DESKS)
        ]
        await asyncio.gather(*(asyncio.to_thread(desk.work) for desk in desks))
        self.say("quiet")
        await self.end

    def on_end(self) -> None:
        self.rest.set()


class _RollBack(Exception):
    """Raised to roll back a transaction or a savepoint on purpose."""


class Desk:
    """A thread of a clerk, which runs one transaction after the other.

    It adds channels of other processes to a group of its own. After a transaction with an unknown
    result it does not know whether these channels are members.
    """

    def __init__(self, clerk: Clerk, writer: str, seed: int) -> None:
        self._clerk = clerk
        self._book = clerk.book
        self._writer = writer
        self._chance = random.Random(seed)
        self._group = f"own-{writer}"
        self._n = 0
        self._members: set[str] = set()
        self._doubtful: set[str] = set()
        # What the open transaction has done:
        self._sent: list[int] = []
        self._joins: set[str] = set()
        self._leaves: set[str] = set()
        self._has_committed = False

    def work(self) -> None:
        """Run transactions until the clerk must be quiet or end."""
        while not (self._clerk.is_quiet or self._clerk.is_ending):
            connection.close_if_unusable_or_obsolete()
            if not self._doubtful or self._clear_doubts():
                self._transact()
            self._clerk.rest.wait(self._chance.expovariate(1 / PAUSE))
        connection.close()

    def _transact(self) -> None:
        self._sent, self._joins, self._leaves = [], set(), set()
        self._has_committed = is_complete = is_unknown = False
        try:
            with transaction.atomic():
                transaction.on_commit(
                    self._committed
                )  # before the layer registers its own callback
                for _ in range(self._chance.randint(1, STEPS_MOST)):
                    self._step()
                (longest,) = self._chance.choices(OPEN, OPEN_WEIGHTS)
                self._clerk.rest.wait(self._chance.uniform(0, longest))
                if self._chance.random() < ROLLED_BACK:
                    raise _RollBack
                is_complete = True
        except _RollBack:
            pass
        except (DatabaseError, LayerUnavailable):
            if self._has_committed:
                text = f"raised after the commit:\n{traceback.format_exc()}"
                self._book.write(Complaint(now(), text))
            is_unknown = is_complete
            if not is_complete:
                self._clerk.rest.wait(RETRY)
        if self._has_committed:
            self._end("returned")
            self._settle_memberships()
        elif is_unknown:
            self._end("unknown")
            self._doubt_memberships()
        else:
            self._end("refused")
            self._undo(self._joins | self._leaves)

    def _step(self) -> None:
        """Send a message or change a membership, sometimes in a savepoint that is rolled back."""
        layer, action = self._clerk.layer.sync, self._chance.random()
        sent, joins, leaves = len(self._sent), set(self._joins), set(self._leaves)
        try:
            with transaction.atomic():
                if action < 0.15 and (channel := self._pick(self._clerk.specific, self._members)):
                    self._joins.add(channel)
                    self._book.write(Joining(now(), self._group, channel, True))
                    layer.group_add(self._group, channel, using=DEFAULT_DB_ALIAS)
                elif action < 0.3 and (channel := self._pick(self._members, ())):
                    self._leaves.add(channel)
                    self._book.write(Leaving(now(), self._group, channel, True))
                    layer.group_discard(self._group, channel, using=DEFAULT_DB_ALIAS)
                else:
                    self._send()
                if self._chance.random() < ROLLED_BACK:
                    raise _RollBack
        except _RollBack:
            self._end("refused", sent)
            self._undo(self._joins - joins | self._leaves - leaves)
            self._joins, self._leaves = joins, leaves

    def _send(self) -> None:
        kind, stream = self._clerk.choose(self._chance)
        if kind == "group" and self._chance.random() < 0.3:
            stream = self._group
        self._n += 1
        message = self._clerk.begin(
            self._chance, self._writer, self._n, kind, stream, in_transaction=True
        )
        self._sent.append(self._n)
        layer = self._clerk.layer.sync
        if kind == "group":
            layer.group_send(stream, message, using=DEFAULT_DB_ALIAS)
        else:
            layer.send(stream, message, using=DEFAULT_DB_ALIAS)

    def _pick(self, channels: Collection[str], but: Collection[str]) -> str | None:
        """Return a random channel that this transaction has not used, None without one."""
        free = set(channels) - set(but) - self._joins - self._leaves
        return self._chance.choice(sorted(free)) if free else None

    def _committed(self) -> None:
        """Note the commit. Django calls this before the layer announces the messages."""
        self._has_committed = True
        if self._clerk.must_die and self._sent:
            self._end("unannounced")
            os.kill(os.getpid(), signal.SIGKILL)

    def _end(self, outcome: Outcome, first: int = 0) -> None:
        """Record the outcome of the messages of this transaction from number ``first`` on."""
        for n in self._sent[first:]:
            self._book.write(Ended(now(), self._writer, n, outcome))
        del self._sent[first:]

    # Memberships

    def _settle_memberships(self) -> None:
        for channel in self._joins:
            self._book.write(Joined(now(), self._group, channel))
        for channel in self._leaves:
            self._book.write(Left(now(), self._group, channel))
        self._members = (self._members | self._joins) - self._leaves

    def _undo(self, channels: Collection[str]) -> None:
        for channel in channels:
            self._book.write(Undone(now(), self._group, channel))

    def _doubt_memberships(self) -> None:
        for channel in self._joins:
            self._book.write(Leaving(now(), self._group, channel, True))
        self._doubtful = self._joins | self._leaves
        self._members -= self._doubtful

    def _clear_doubts(self) -> bool:
        """Remove the channels whose membership is unknown; return whether that succeeded."""
        try:
            with transaction.atomic():
                for channel in self._doubtful:
                    self._clerk.layer.sync.group_discard(
                        self._group, channel, using=DEFAULT_DB_ALIAS
                    )
        except (DatabaseError, LayerUnavailable):
            return False
        for channel in self._doubtful:
            self._book.write(Left(now(), self._group, channel))
        self._doubtful.clear()
        return True
