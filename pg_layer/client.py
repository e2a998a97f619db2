"""One process's use of the layer: its id, its mailboxes and memberships, and where each row goes. No I/O.

A client outlives event loops: when one closes, the next finds mailboxes and memberships as they were. It
does not outlive a fork: a child begins with a client of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from pg_layer.clock import DatabaseClock
from pg_layer.codec import Codec, Template
from pg_layer.exceptions import UndecodableMessage
from pg_layer.inbox import LAST_ID, Inbox, Key, Row
from pg_layer.mailbox import Letter, Mailbox
from pg_layer.membership import Memberships
from pg_layer.stats import Counters

if TYPE_CHECKING:
    from pg_layer.config import Config

logger = logging.getLogger("pg_layer")

LOG_PERIOD = 60.0  # seconds between two log lines about the same thing


class Farewell(NamedTuple):
    """A client's end: ``done`` was handed over, what else it took goes back to its channel, all else goes."""

    prefix: str
    inbox: str
    done: list[Key]
    memberships: list[tuple[str, str]]


def inbox_of(prefix: str, channel: str) -> str:
    """The inbox a channel is read from: what pg_layer_inbox() says in SQL, without asking it."""
    head, bang, _ = channel.partition("!")
    return f"{prefix}!{head.rpartition('.')[2]}" if bang else f"{prefix}!:{channel}"


class Client:
    """What is known in this process, whatever loop it is used on."""

    def __init__(self, config: Config, codec: Codec, counters: Counters | None = None) -> None:
        # counters: those of the layer, which go on when the next client begins
        self.config = config
        self.codec = codec
        self.id = secrets.token_hex(8)
        self.address = f"specific.{self.id}!"
        # What stands in the names of its channels, of which each has one "!" at most.
        self._mark, self._bare_mark = f".{self.id}!", f"{self.id}!"
        self.inbox_name = inbox_of(config.prefix, self.address)
        self.process = os.getpid()
        self.has_lease = False
        self.renewed_at = 0.0  # by time.monotonic()
        self.fence = 0  # goes with what moves rows: with a larger one, what is on its way is given up
        self.raised_fence = 0  # the one that the database knows of
        self.last_id = 0  # the largest that was met
        self._server: float | None = None  # when it started, by its clock
        self._met_at = 0.0  # by its clock
        self.inbox = Inbox()
        self.memberships = Memberships()
        self.clock = DatabaseClock()
        self.counters = counters or Counters()
        self._counted_before = self.counters.read()
        # Rows of no further use, and the mailbox that counts them (none: a group's). Deleted many at once.
        self.doomed: dict[Key, Mailbox | None] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._lock = threading.Lock()
        self._serial = 0
        self._logged: dict[object, float] = {}

    # ------------------------------------------------------------------ names

    def new_channel(self, prefix: str) -> str:
        """A specific channel name that nobody had before."""
        with self._lock:
            self._serial += 1
            return f"{prefix}.{self.id}!{self._serial:x}"

    def owns(self, channel: str) -> bool:
        """Whether it is a specific channel of this client."""
        return self._mark in channel or channel.startswith(self._bare_mark)

    # ------------------------------------------------------------------ mailboxes

    def mailbox(self, channel: str) -> Mailbox:
        """The mailbox of a channel, made when it is first needed."""
        mailbox = self._mailboxes.get(channel)
        if mailbox is None:
            with self._lock:
                mailbox = self._mailboxes.get(channel)
                if mailbox is None:
                    mailbox = Mailbox(channel, self.config.capacity_of(channel))
                    self._mailboxes[channel] = mailbox
        mailbox.is_used = True
        return mailbox

    def find_mailbox(self, channel: str) -> Mailbox | None:
        """The mailbox of a channel, if there is one."""
        return self._mailboxes.get(channel)

    def mailboxes(self) -> list[Mailbox]:
        """All mailboxes."""
        with self._lock:
            return list(self._mailboxes.values())

    def forget_idle_mailboxes(self) -> None:
        """Drop mailboxes that nobody has used since this was last called."""
        with self._lock:
            for channel, mailbox in list(self._mailboxes.items()):
                if not self.memberships.is_member(channel) and mailbox.retire():
                    del self._mailboxes[channel]

    # ------------------------------------------------------------------ servers

    def meet(self, server: float, now: float, next_id: int) -> bool:
        """A server that started at ``server`` answered at ``now``; returns whether it may hand ids out again.

        It does so if its next id was met already, as after a crash, or on tables made anew. A server that ran
        while another answered is a standby that was promoted: it may have lagged, and have gone on since.
        """
        is_promoted = self._server is not None and server != self._server and server <= self._met_at
        begins_anew = is_promoted or next_id <= self.last_id
        self._server, self._met_at = server, now
        self.last_id = next_id if begins_anew else max(self.last_id, next_id)
        return begins_anew

    def ids_begin_anew(self, next_id: int) -> None:
        """The server may hand ids out again from ``next_id`` on: what was concluded from ids says nothing."""
        self.memberships.ids_begin_anew(next_id)
        for mailbox in self.mailboxes():
            mailbox.neglected = -1

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, rows: Sequence[Row]) -> list[Key]:
        """Bring rows to their mailboxes, in order; returns the keys of rows that are of no further use."""
        self.counters.add("received", sum(row.kind == "message" for row in rows))
        self.last_id = max(self.last_id, max((row.id for row in rows), default=0))
        done: list[Key] = []
        # Under load many messages for the same group come together, and each mailbox gets them at once.
        for audience, run in groupby(rows, _audience):
            if audience is None:
                done += [row.key for row in run if not self._dispatch_one(row)]
                continue
            together = list(run)
            self._fan_out(*audience, together)
            done += [row.key for row in together]
        return done

    def _dispatch_one(self, row: Row) -> bool:
        """Returns whether the row stays until its message is received."""
        if row.kind == "message":
            payload = self._opened(row)
            if payload is None or row.channel is None:
                return False
            mailbox = self.mailbox(row.channel)
            if len(mailbox) >= mailbox.capacity:
                self.drop_expired(mailbox)
            mailbox.undeleted += 1
            mailbox.put(Letter(row.id, payload, row.expires_at, row.key))
            return True
        if row.kind == "flush":
            self.flush(row.id)
        elif row.kind not in ("join", "leave"):
            self.undecodable(
                row.channel or row.group, UndecodableMessage(f"It is of the unknown kind {row.kind!r}.")
            )
        elif row.channel is not None and row.group is not None:
            if row.kind == "join" and self.owns(row.channel):
                self.memberships.join(row.group, self.mailbox(row.channel), row.id, row.expires_at)
            elif row.kind == "leave":
                self.memberships.leave(row.group, row.channel, row.id)
        return False

    def _opened(self, row: Row) -> bytes | None:
        try:
            return self.codec.open(row.payload)
        except UndecodableMessage as error:
            self.undecodable(row.channel or row.group, error)
            return None

    def _fan_out(self, group: str, excluded: str | None, rows: Sequence[Row]) -> None:
        letters = [
            Letter(row.id, Template(payload), row.expires_at, None)
            for row in rows
            if (payload := self._opened(row)) is not None
        ]
        if not letters:
            return
        first, last = letters[0].id, letters[-1].id
        now, here = self.clock.now(), asyncio._get_running_loop()
        members, comers_and_goers = self.memberships.of_group(group)
        for mailbox, since, _, expires_at, until in members:
            if expires_at <= now or mailbox.channel == excluded:
                continue
            if since < first and last <= until:
                self._put(group, mailbox, letters, here)
            else:
                self._put(group, mailbox, [letter for letter in letters if since < letter.id <= until], here)
        for times in comers_and_goers:
            mailbox = times[-1].mailbox
            if mailbox.channel != excluded:
                spans = [(since, until) for _, since, _, expires_at, until in times if expires_at > now]
                due = [letter for letter in letters if any(a < letter.id <= b for a, b in spans)]
                self._put(group, mailbox, due, here)

    def _put(
        self, group: str, mailbox: Mailbox, letters: Sequence[Letter], here: asyncio.AbstractEventLoop | None
    ) -> None:
        if left := mailbox.put_if_room(letters, here):
            self.drop_expired(mailbox)
            for _ in mailbox.put_if_room(left, here):
                self.count_dropped(group, mailbox.channel)

    def drop_expired(self, mailbox: Mailbox) -> None:
        """Drop what waited in a mailbox beyond its end."""
        expired = mailbox.pop_expired(self.clock.now())
        if expired:
            mailbox.neglected = max(mailbox.neglected, *(letter.id for letter in expired))
            self.counters.add("dropped_expired", len(expired))
            self.doomed.update({letter.key: mailbox for letter in expired if letter.key is not None})

    def announce(self, type: str | None) -> None:
        """Put a message of this type, if one is given, into the mailbox of each consumer here."""
        if type is None:
            return
        payload = self.codec.open(self.codec.encode({"type": type}))
        for mailbox in self.mailboxes():
            if mailbox.is_receivable and self.owns(mailbox.channel):
                mailbox.put_if_room((Letter(LAST_ID, payload, math.inf, None),))

    def flush(self, id: int) -> None:
        """Forget all that was sent or joined before that id."""
        self.memberships.flush(id)
        for mailbox in self.mailboxes():
            self.doomed.update(
                {letter.key: mailbox for letter in mailbox.pop_up_to(id) if letter.key is not None}
            )

    # ------------------------------------------------------------------ how it fares

    def counted(self) -> dict[str, int]:
        """What this process did since this client began, by the names in `Counts`."""
        return self.counters.since(self._counted_before)

    # ------------------------------------------------------------------ the end

    def farewell(self) -> Farewell:
        """What is to be said to the database at the end; closes the mailboxes."""
        for mailbox in self.mailboxes():
            mailbox.close()
        done = list(self.doomed)
        members = [(group, member.mailbox.channel) for group, member in self.memberships.all()]
        return Farewell(self.config.prefix, self.inbox_name, done, members)

    # ------------------------------------------------------------------ what goes wrong

    def count_dropped(self, group: str, channel: str) -> None:
        """A full channel missed a group's message."""
        self.counters.add("dropped_full")
        if self._may_log(("full", channel)):
            logger.warning("Channel %s is full and misses messages of group %s.", channel, group)

    def undecodable(self, where: str | None, error: UndecodableMessage) -> None:
        """A message could not be read: it is skipped."""
        self.counters.add("dropped_undecodable")
        if self._may_log(("undecodable", str(error))):
            logger.error("Skipped a message for %s that cannot be read: %s", where, error)

    def unheard(self, why: str) -> None:
        """What is sent rings no doorbell."""
        if self._may_log("unheard"):
            logger.warning("Without notifications: %s Messages wait until their readers look.", why)

    def foreign(self, doorbell: str) -> None:
        """Somebody else sent a NOTIFY on one of our doorbells."""
        self.counters.add("foreign_notifies")
        if self._may_log(("foreign", doorbell)):
            logger.warning("Ignored a NOTIFY on %s that pg_layer did not send.", doorbell)

    def _may_log(self, about: object) -> bool:
        now = time.monotonic()
        if now - self._logged.get(about, -LOG_PERIOD) < LOG_PERIOD:
            return False
        if len(self._logged) > 1000:
            self._logged.clear()
        self._logged[about] = now
        return True


def _audience(row: Row) -> tuple[str, str | None] | None:
    """Whom a group's message is for: the group, but for the member that is excluded. None: it is no such."""
    if row.kind == "message" and row.channel is None and row.group is not None:
        return row.group, row.excluded
    return None
