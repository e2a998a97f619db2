"""Transactions of an application that send messages and change memberships."""

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

DESKS = 2  # a clerk's threads
STEPS_MOST = 4  # sends and changes of memberships in one transaction
OPEN, OPEN_WEIGHTS = ((0.0, 0.3, 3.0, 8.0), (60, 30, 9, 1))  # seconds it stays open, at most
ROLLED_BACK = 0.15  # how likely a transaction is rolled back, and one of its steps


class Clerk(Sending):
    """Sends and changes memberships in transactions, by layer.sync on Django's connection."""

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
    """The transaction, or the savepoint, is rolled back on purpose."""


class Desk:
    """A clerk's thread: one transaction after the other.

    It has channels of others in a group of its own. Of some it is unknown whether they are members.
    """

    def __init__(self, clerk: Clerk, writer: str, seed: int) -> None:
        self._clerk = clerk
        self._book = clerk.book
        self._writer = writer
        self._chance = random.Random(seed)
        self._group = f"guests-{writer}"
        self._n = 0
        self._guests: set[str] = set()
        self._doubtful: set[str] = set()
        # Of the transaction that is open:
        self._sent: list[int] = []
        self._joins: set[str] = set()
        self._leaves: set[str] = set()
        self._has_committed = False

    def work(self) -> None:
        """Until the clerk is told to be quiet, or to end."""
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
                transaction.on_commit(self._committed)  # before the layer can announce anything
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
        """Send something, or change a membership; sometimes in a savepoint that is rolled back."""
        layer, action = self._clerk.layer.sync, self._chance.random()
        sent, joins, leaves = len(self._sent), set(self._joins), set(self._leaves)
        try:
            with transaction.atomic():
                if action < 0.15 and (channel := self._pick(self._clerk.specific, self._guests)):
                    self._joins.add(channel)
                    self._book.write(Joining(now(), self._group, channel, True))
                    layer.group_add(self._group, channel, using=DEFAULT_DB_ALIAS)
                elif action < 0.3 and (channel := self._pick(self._guests, ())):
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
        """One of some channels, which this transaction has not to do with yet."""
        free = set(channels) - set(but) - self._joins - self._leaves
        return self._chance.choice(sorted(free)) if free else None

    def _committed(self) -> None:
        """The transaction is committed, and the layer has not announced it."""
        self._has_committed = True
        if self._clerk.must_die and self._sent:
            self._end("unannounced")
            os.kill(os.getpid(), signal.SIGKILL)

    def _end(self, outcome: Outcome, first: int = 0) -> None:
        """Write down what became of the messages of this transaction, from one on."""
        for n in self._sent[first:]:
            self._book.write(Ended(now(), self._writer, n, outcome))
        del self._sent[first:]

    # Memberships

    def _settle_memberships(self) -> None:
        for channel in self._joins:
            self._book.write(Joined(now(), self._group, channel))
        for channel in self._leaves:
            self._book.write(Left(now(), self._group, channel))
        self._guests = (self._guests | self._joins) - self._leaves

    def _undo(self, channels: Collection[str]) -> None:
        for channel in channels:
            self._book.write(Undone(now(), self._group, channel))

    def _doubt_memberships(self) -> None:
        for channel in self._joins:
            self._book.write(Leaving(now(), self._group, channel, True))
        self._doubtful = self._joins | self._leaves
        self._guests -= self._doubtful

    def _clear_doubts(self) -> bool:
        """Have those leave of which it is unknown whether they are members."""
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
