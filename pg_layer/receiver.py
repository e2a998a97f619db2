"""Doorbells in, messages out: drains the inbox, and takes from normal channels.

Bound to one event loop. What it decides is decided by `pg_layer.inbox`; this is the I/O around it.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from pg_layer import store
from pg_layer.client import Client
from pg_layer.connections import Connections
from pg_layer.deleter import Deleter
from pg_layer.exceptions import PgLayerError
from pg_layer.inbox import EVERYTHING, LAST_ID, Key, Row, Span
from pg_layer.listener import Listener
from pg_layer.outage import Outage
from pg_layer.reader import Reader
from pg_layer.session import Session

logger = logging.getLogger("pg_layer")

READ_TIMEOUT = 60.0  # seconds; a catch-up may be long
PUT_BACK_DELAY = 0.05  # seconds for which a taken message waits for a reader of this process
QUICK = 0.02  # seconds: a reader that has done with what was taken in less is given more at a time
AHEAD_PART = 16  # of the capacity: what is taken ahead makes room for others
AHEAD_MOST = 31
RETRY = 0.5  # seconds


class Receiver:
    """The receiving side of a client on its home loop."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        outage: Outage,
    ) -> None:
        self._client = client
        self._connections = connections
        self._outage = outage
        self.heard_at: float | None = None  # the last doorbell, by the loop's time
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._readers: dict[str, Reader] = {}
        self._own_doorbell: str | None = None
        self._doorbells: dict[str, Reader] = {}
        self._is_draining = False
        self._caught = 0  # messages that reading everything has brought
        client.inbox.abandon_views()
        self.deleter = Deleter(client, connections, spawn)
        self._pings: dict[str, asyncio.Future[None]] = {}
        self.listener: Listener | None = None  # none: the tables are polled
        self.on_caught_up: Callable[[int], None] = outage.end  # told how many messages that brought
        self.on_told: Callable[[Sequence[Row]], None] | None = None  # given what tells of memberships
        for mailbox in client.mailboxes():
            if "!" not in mailbox.channel and len(mailbox):
                self._put_back_later(self._reader(mailbox.channel))

    # ------------------------------------------------------------------ doorbells

    async def listen(self, session: Session) -> None:
        """Begin with a new LISTEN connection: first listen, then look at what was missed."""
        prefix = self._client.config.prefix
        self._client.inbox.reconnected()
        self._own_doorbell = await store.listen(session, prefix, self._client.address)
        self._doorbells.clear()
        for reader in self._readers.values():
            reader.doorbell = None
        # Again until none is left: others may be wanted meanwhile.
        while deaf := [r for r in self._readers.values() if r.is_wanted and r.doorbell is None]:
            for reader in deaf:
                reader.doorbell = await store.listen(session, prefix, reader.mailbox.channel)
                self._doorbells[reader.doorbell] = reader
        self.look_again()

    def look_again(self) -> None:
        """Read and take everything, as if all doorbells had rung."""
        self._client.inbox.suspect()
        self._drain_soon()
        for reader in self._readers.values():
            reader.may_have_more, reader.floor = True, 0
            self._take_soon(reader)

    def hear(self, doorbell: str, said: str) -> None:
        """A NOTIFY came."""
        self.heard_at = self._loop.time()
        try:
            what, _, rest = said.partition(" ")
            if doorbell == self._own_doorbell:
                if what == "M":
                    self._hear_message(rest)
                    return
                if what == "R":
                    nonce, first, last = map(_bigint, rest.split(" "))
                    self._client.inbox.hear_span(nonce, Span(first, last))
                    self._drain_soon()
                    return
                if what == "P":
                    self._hear_ping(rest)
                    return
            elif (reader := self._doorbells.get(doorbell)) is not None and what == "R":
                _, first, _ = map(_bigint, rest.split(" "))
                reader.may_have_more = True
                reader.floor = min(reader.floor, first)
                self._take_soon(reader)
                return
            elif reader is None:
                return  # heard while LISTEN is on its way: what it announces is looked for afterwards
        except (ValueError, binascii.Error):
            pass
        self._client.foreign(doorbell)

    def _hear_message(self, rest: str) -> None:
        id, nonce, expires_at, channel, group, excluded, payload = rest.split(" ", 6)
        row = Row(
            _bigint(id),
            _bigint(nonce),
            "message",
            channel or None,
            group or None,
            binascii.a2b_base64(payload),
            float(expires_at),
            excluded or None,
        )
        if math.isnan(row.expires_at):
            raise ValueError(rest)
        if self._client.inbox.hear_message(row.id, row.nonce):
            self._client.counters.add("shortcuts")
            self._dispatch((row,))
        else:
            self._drain_soon()

    # ------------------------------------------------------------------ pings

    async def ping(self, send: Callable[[str], Coroutine[Any, Any, None]], timeout: float) -> bool:
        """Ring the own doorbell; returns whether it was heard within ``timeout`` seconds."""
        number = self._client.inbox.ping()
        token = str(number)
        heard = self._pings[token] = self._loop.create_future()
        deadline = self._loop.time() + timeout
        try:
            await send(token)
            await asyncio.wait((heard,), timeout=max(deadline - self._loop.time(), 0.0))
            return heard.done()
        finally:
            del self._pings[token]

    def _hear_ping(self, token: str) -> None:
        self._client.inbox.pong(int(token))
        heard = self._pings.get(token)
        if heard is not None and not heard.done():
            heard.set_result(None)

    # ------------------------------------------------------------------ draining

    def _drain_soon(self) -> None:
        if not self._is_draining and self._client.inbox.is_due:
            self._is_draining = True
            self._spawn(self._drain())

    async def _drain(self) -> None:
        inbox = self._client.inbox
        try:
            while inbox.is_due:
                view, span = inbox.begin_read()
                read = self._read_everything if span == EVERYTHING else self._read_span
                try:
                    await self._connections.run(
                        partial(read, view=view, span=span),
                        timeout=READ_TIMEOUT,
                        patience=self._client.config.send_timeout,
                        is_idempotent=True,
                    )
                except PgLayerError as error:
                    inbox.fail_read(view)
                    self._outage.begin(error)
                    await asyncio.sleep(RETRY)
                    continue
                except BaseException:
                    inbox.fail_read(view)
                    raise
                self._client.counters.add("drains")
                self._delete_strays()
                if span == EVERYTHING:
                    self._caught_up()
        finally:
            self._is_draining = False

    def _caught_up(self) -> None:
        caught_up, self._caught = self._caught, 0
        # All that was sent before the last time has been read: who had left by then is due nothing more.
        self._client.memberships.forget_left()
        self.on_caught_up(caught_up)
        for reader in self._readers.values():
            self._take_soon(reader)

    async def _read_span(self, session: Session, view: int, span: Span) -> None:
        rows, up_to = await store.read(session, self._client.inbox_name, span)
        self._dispatch(self._client.inbox.read(view, rows))
        self._client.inbox.end_read(view, up_to)

    async def _read_everything(self, session: Session, view: int, span: Span) -> None:
        inbox = self._client.inbox

        def dispatch(rows: list[Row]) -> None:
            fresh = inbox.read(view, rows)
            self._caught += sum(row.kind == "message" for row in fresh)
            self._dispatch(fresh)

        client = self._client
        if client.raised_fence < (fence := client.fence):
            await store.raise_fence(session, client.inbox_name, fence)
            client.raised_fence = fence
        await store.read_everything(session, client.inbox_name, dispatch)
        inbox.end_read(view)

    def _dispatch(self, rows: Sequence[Row]) -> None:
        done = self._client.dispatch(rows)
        if self.on_told is not None and (told := [row for row in rows if row.kind in ("join", "leave")]):
            self.on_told(told)
        for channel in {row.channel for row in rows if row.was_taken and row.channel is not None}:
            # Read rather than taken: an answer was lost, and perhaps its reader has gone.
            self._put_back_later(self._reader(channel))
        self._doom(done)

    def _delete_strays(self) -> None:
        self._doom(self._client.inbox.pop_strays())

    def _doom(self, keys: list[Key]) -> None:
        if keys:
            self._client.doomed.update(dict.fromkeys(keys))
            self.deleter.soon()

    # ------------------------------------------------------------------ normal channels

    def want(self, channel: str) -> None:
        """Somebody waits on a normal channel."""
        reader = self._reader(channel)
        reader.is_used = True
        if not reader.is_wanted:
            reader.is_wanted = True
            self._spawn(self._begin(channel, reader))
        self._take_soon(reader)

    def _reader(self, channel: str) -> Reader:
        mailbox = self._client.mailbox(channel)
        reader = self._readers.get(channel)
        if reader is None:
            reader = self._readers[channel] = Reader(mailbox)
        reader.mailbox = mailbox
        return reader

    async def _begin(self, channel: str, reader: Reader) -> None:
        async def listen(session: Session) -> None:
            doorbell = await store.listen(session, self._client.config.prefix, channel)
            reader.doorbell = doorbell
            self._doorbells[doorbell] = reader

        if self.listener is not None and await self.listener.execute(listen):
            reader.may_have_more, reader.floor = True, 0
        self._take_soon(reader)

    def forget_idle_readers(self) -> None:
        """Stop listening to normal channels that nobody has read since this was last called."""
        for channel, reader in list(self._readers.items()):
            if reader.is_used or reader.mailbox.waiting or len(reader.mailbox) or reader.is_taking:
                reader.is_used = False
                continue
            del self._readers[channel]
            if reader.doorbell is not None and self.listener is not None:
                self._doorbells.pop(reader.doorbell, None)
                self._spawn(self._unlisten(channel))

    async def _unlisten(self, channel: str) -> None:
        if self.listener is not None:
            await self.listener.execute(
                lambda session: store.unlisten(session, self._client.config.prefix, channel)
            )

    def _take_soon(self, reader: Reader) -> None:
        if self._client.inbox.is_suspect:
            # What was taken before, and its answer lost, comes first.
            self._drain_soon()
            return
        if not self._client.renewed_at:
            return  # who has no lease is given nothing; when it has come, all is looked at
        if (
            not (reader.is_taking or reader.is_putting_back)
            and reader.may_have_more
            and reader.mailbox.missing > 0
        ):
            reader.is_taking = True
            self._spawn(self._take(reader))

    async def _take(self, reader: Reader) -> None:
        client, mailbox = self._client, reader.mailbox
        try:
            while reader.may_have_more and not client.inbox.is_suspect and (missing := mailbox.missing) > 0:
                reader.may_have_more = False
                if self._loop.time() - reader.took_at < QUICK:
                    most = min(mailbox.capacity // AHEAD_PART, AHEAD_MOST)
                    reader.ahead = min(2 * reader.ahead + 1, most)
                else:
                    reader.ahead = 0
                limit = missing + reader.ahead
                floor, reader.floor = reader.floor, LAST_ID
                view = client.inbox.begin_view()
                rows: list[Row] = []
                try:
                    rows = await self._connections.run(
                        partial(
                            store.take,
                            prefix=client.config.prefix,
                            channel=mailbox.channel,
                            inbox=client.inbox_name,
                            fence=client.fence,
                            floor=floor,
                            limit=limit,
                        ),
                        timeout=client.config.send_timeout,
                    )
                except PgLayerError:
                    # Rows may have been taken and the answer lost: they are in the own inbox now.
                    self._give_up()
                    self._drain_soon()
                    reader.may_have_more, reader.floor = True, min(floor, reader.floor)
                    await asyncio.sleep(RETRY)
                    continue
                except BaseException:
                    self._give_up()
                    reader.may_have_more, reader.floor = True, 0
                    raise
                finally:
                    fresh = client.inbox.taken(rows)
                    client.inbox.end_view(view)
                    self._delete_strays()
                    self._drain_soon()
                reader.floor = min(reader.floor, max((row.id + 1 for row in rows), default=LAST_ID))
                reader.took_at = self._loop.time()
                if len(rows) == limit:
                    reader.may_have_more = True
                self._dispatch(fresh)
                self._put_back_later(reader)
        finally:
            reader.is_taking = False

    def _give_up(self) -> None:
        """It is unknown what became of a statement that moves rows: it is to have no effect any more."""
        self._client.fence += 1
        self._client.inbox.suspect()

    def _put_back_later(self, reader: Reader) -> None:
        if reader.put_back is None and not reader.is_putting_back and len(reader.mailbox):
            reader.put_back = self._loop.call_later(PUT_BACK_DELAY, self._put_back_now, reader)

    def _put_back_now(self, reader: Reader) -> None:
        reader.put_back = None
        if reader.is_taking:  # what it brings comes after these
            self._put_back_later(reader)
            return
        keys = [letter.key for letter in reader.mailbox.pop_idle() if letter.key is not None]
        if keys:
            reader.ahead = 0
            reader.is_putting_back = True  # a take meanwhile would get what comes after them
            self._spawn(self._put_back(reader, keys))
        else:
            self._put_back_later(reader)

    async def _put_back(self, reader: Reader, keys: list[Key]) -> None:
        client = self._client
        is_sure = False
        try:
            await self._connections.run(
                lambda session: store.put_back(
                    session, client.config.prefix, client.inbox_name, client.fence, keys
                ),
                timeout=client.config.send_timeout,
            )
            is_sure = True
        except BaseException as error:
            self._give_up()  # what was not put back is still in the inbox
            if not isinstance(error, PgLayerError):
                raise
            await asyncio.sleep(RETRY)
        finally:
            client.inbox.put_back(keys, is_sure=is_sure)
            reader.mailbox.undeleted -= len(keys)
            reader.is_putting_back = False
        reader.may_have_more, reader.floor = True, min(reader.floor, keys[0][0])
        self._drain_soon()
        self._take_soon(reader)


def _bigint(text: str) -> int:
    number = int(text)
    if not 0 <= number <= LAST_ID:
        raise ValueError(text)
    return number
