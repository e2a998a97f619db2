"""Normal channels: claims jobs for waiting readers, and releases what nobody asks for.

Bound to the owner loop. See ``docs/protocols.md``, section 6.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import TYPE_CHECKING

from pg_layer._db.pool import Connections
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._messages.addresses import channel_address, notification_channel
from pg_layer._messages.rows import LAST_ID, Key, KeyAt, Row
from pg_layer._process.tasks import Spawn
from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.client import Client
from pg_layer.exceptions import PgLayerError

if TYPE_CHECKING:
    from pg_layer._receive.receiver import Receiver

RELEASE_DELAY = 0.05  # seconds for which a claimed job waits for a reader of this process
QUICK = 0.02  # seconds: a reader that finishes its jobs in less is given more at a time
AHEAD_PART = 16  # of the capacity: jobs claimed ahead make room for others
AHEAD_MOST = 31
RETRY = 0.5  # seconds
ANNOUNCE_RETRY = 1.0  # seconds


class JobReader:
    """A normal channel that this process reads."""

    def __init__(self, queue: ChannelQueue) -> None:
        self.queue = queue
        self.is_wanted = False  # a reader has waited: it must be listened to
        self.is_used = True
        self.is_claiming = False
        self.is_releasing = False
        self.may_have_more = True
        self.low_id = 0  # nothing waits below this id; 0: the server knows
        self.ahead = 0  # jobs to claim beyond what is waited for, because this reader is quick
        self.claimed_at = -math.inf
        self.release: asyncio.TimerHandle | None = None


class JobReaders:
    """The normal channels that this process reads."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        receiver: Receiver,
        spawn: Spawn,
    ) -> None:
        self._client = client
        self._connections = connections
        self._receiver = receiver
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._readers: dict[str, JobReader] = {}
        self._unannounced: dict[str, int] = {}  # channels whose released jobs were not announced
        self._unknown_low_id = LAST_ID  # a claim whose answer was lost has moved no smaller id
        self._in_flight: dict[int, int] = {}  # claims whose answer is not here -> the same

    def start(self) -> None:
        """Go on with jobs that the last owner loop has claimed."""
        for channel in self._client.releasing:
            reader = self._reader(channel)
            reader.is_releasing = True
            self._spawn("The release of jobs", partial(self._release, reader))
        for queue in self._client.queues():
            if "!" not in queue.channel and len(queue):
                self._release_later(self._reader(queue.channel))
        # What a claim of the last owner loop moved, whose answer it did not see, comes with a catch-up.
        self._unknown_low_id = 0

    @property
    def low_id(self) -> int:
        """No job with a smaller id may be at the own address without this process knowing."""
        return min(self._unknown_low_id, *self._in_flight.values(), LAST_ID)

    def caught_up(self) -> None:
        """Note that a catch-up has read all jobs that claims with lost answers have moved."""
        self._unknown_low_id = LAST_ID

    # ------------------------------------------------------------------ readers

    def reader_waits(self, channel: str) -> None:
        """A reader waits on a normal channel."""
        reader = self._reader(channel)
        reader.is_used = True
        if not reader.is_wanted:
            reader.is_wanted = True
            self._spawn("Listening for jobs", partial(self._begin, channel, reader))
        self._claim_soon(reader)

    def announced(self, channel: str, first: int) -> None:
        """Jobs wait, from this id on."""
        reader = self._readers.get(channel)
        if reader is not None:
            reader.may_have_more = True
            reader.low_id = min(reader.low_id, first)
            self._claim_soon(reader)

    def claim_from_all(self) -> None:
        """Claim as if all channels had announced jobs."""
        for reader in self._readers.values():
            reader.may_have_more, reader.low_id = True, 0
            self._claim_soon(reader)

    def addresses(self) -> list[str]:
        """The addresses of all channels."""
        prefix = self._client.config.prefix
        return [channel_address(prefix, channel) for channel in self._readers]

    def forget_idle(self) -> None:
        """Stop listening to normal channels that were not read since the last call."""
        for channel, reader in list(self._readers.items()):
            is_busy = reader.is_claiming or reader.is_releasing
            if reader.is_used or reader.queue.waiting or len(reader.queue) or is_busy:
                reader.is_used = False
                continue
            del self._readers[channel]
            if reader.is_wanted:
                self._spawn("Listening for jobs", partial(self._end, channel))

    def _reader(self, channel: str) -> JobReader:
        queue = self._client.queue(channel)
        reader = self._readers.get(channel)
        if reader is None:
            reader = self._readers[channel] = JobReader(queue)
        reader.queue = queue
        return reader

    async def _begin(self, channel: str, reader: JobReader) -> None:
        if await self._receiver.listen_to_jobs(channel):
            reader.may_have_more, reader.low_id = True, 0
        self._claim_soon(reader)

    async def _end(self, channel: str) -> None:
        reader = self._readers.get(channel)
        if reader is None or not reader.is_wanted:
            await self._receiver.unlisten_to_jobs(channel)

    # ------------------------------------------------------------------ claiming

    def _claim_soon(self, reader: JobReader) -> None:
        # What was claimed before, and its answer lost, comes first. Without a lease nothing is claimed; when
        # it is there, `claim_from_all` follows.
        if self._receiver.is_catch_up_pending or not self._client.renewed_at:
            return
        if (
            not (reader.is_claiming or reader.is_releasing)
            and reader.may_have_more
            and self._demand(reader) > 0
        ):
            reader.is_claiming = True
            self._spawn("The claim of jobs", partial(self._claim, reader))

    def _demand(self, reader: JobReader) -> int:
        """How many jobs to claim: none while those that were claimed last wait for dispatch."""
        is_waiting = self._client.announcements.holds_jobs(reader.queue.channel)
        return 0 if is_waiting else reader.queue.demand

    async def _claim(self, reader: JobReader) -> None:
        queue = reader.queue
        while (
            reader.may_have_more
            and not self._receiver.is_catch_up_pending
            and (demand := self._demand(reader)) > 0
        ):
            reader.may_have_more = False
            if self._loop.time() - reader.claimed_at < QUICK:
                most = min(queue.capacity // AHEAD_PART, AHEAD_MOST)
                reader.ahead = min(2 * reader.ahead + 1, most)
            else:
                reader.ahead = 0
            limit = demand + reader.ahead
            low_id, reader.low_id = reader.low_id, LAST_ID
            try:
                rows = await self._claimed(queue.channel, low_id, limit)
            except PgLayerError:
                reader.may_have_more, reader.low_id = True, min(low_id, reader.low_id)
                await asyncio.sleep(RETRY)
                continue
            except BaseException:
                reader.may_have_more, reader.low_id = True, 0
                raise
            reader.low_id = min(reader.low_id, max((row.id + 1 for row in rows), default=LAST_ID))
            reader.claimed_at = self._loop.time()
            if len(rows) == limit:
                reader.may_have_more = True
            self._release_later(reader)
        reader.is_claiming = False
        self._claim_soon(reader)

    async def _claimed(self, channel: str, low_id: int, limit: int) -> list[Row]:
        """Claim jobs, and append them to the announcement queue."""
        client = self._client
        number = client.cursor.begin_claim()
        self._in_flight[number] = low_id
        try:
            rows = await self._connections.run(
                partial(self._claim_on, channel=channel, low_id=low_id, limit=limit),
                timeout=client.config.send_timeout,
            )
            self._receiver.append_claimed(rows)
            return rows
        except BaseException:
            # Rows may have been claimed and the answer lost: they are at the own address now.
            self._unknown_low_id = min(self._unknown_low_id, low_id)
            self._give_up()
            raise
        finally:
            del self._in_flight[number]
            client.cursor.end_claim(number)

    async def _claim_on(self, session: Session, channel: str, low_id: int, limit: int) -> list[Row]:
        client = self._client
        await self._receiver.raise_fence(session)
        return await queries.claim(
            session, client.config.prefix, channel, client.address, client.fence, low_id, limit
        )

    def _give_up(self) -> None:
        """It is unknown what became of a statement that moves jobs: it must have no effect any more."""
        self._client.advance_fence()
        self._client.cursor.interrupt()
        self._receiver.catch_up_soon()

    # ------------------------------------------------------------------ releasing

    def delivered(self, channel: str) -> None:
        """Jobs were put into the channel's queue: perhaps nobody waits for them any more, or for others."""
        reader = self._reader(channel)
        self._release_later(reader)
        self._claim_soon(reader)

    def _release_later(self, reader: JobReader) -> None:
        if reader.release is None and not reader.is_releasing and len(reader.queue):
            reader.release = self._loop.call_later(RELEASE_DELAY, self._release_now, reader)

    def _release_now(self, reader: JobReader) -> None:
        reader.release = None
        # What a claim brings, or has brought and is not dispatched yet, comes after these.
        if reader.is_claiming or self._client.announcements.holds_jobs(reader.queue.channel):
            self._release_later(reader)
            return
        reader.is_releasing = True  # a claim meanwhile would get what comes after them
        self._spawn("The release of jobs", partial(self._release, reader))

    async def _release(self, reader: JobReader) -> None:
        client, channel = self._client, reader.queue.channel
        if (
            channel in client.releasing
        ):  # begun by the last owner loop, or before an unexpected error
            await self._resolve(reader)
            return
        # Not before this runs: else they would be nobody's if the loop ended first.
        messages = reader.queue.pop_idle()
        if not messages:
            reader.is_releasing = False
            self._release_later(reader)
            self._claim_soon(reader)
            return
        reader.ahead = 0
        keys = [message.key for message in messages if message.key is not None]
        client.releasing[channel] = messages
        try:
            is_announced = await self._connections.run(
                partial(self._release_on, keys=keys, quiet=False),
                quietly=partial(self._release_on, keys=keys, quiet=True),
                timeout=client.config.send_timeout,
            )
            if not is_announced:
                self._announce_later(channel, min(key.id for key in keys))
        except BaseException as error:
            client.advance_fence()
            if not isinstance(error, PgLayerError):
                raise  # the next run, or the next owner loop, finds out what became of them
            await self._resolve(reader)
            return
        self._released(reader, set())

    async def _resolve(self, reader: JobReader) -> None:
        """Find out which jobs were not released: they are still at the own address."""
        messages = self._client.releasing[reader.queue.channel]
        self._released(
            reader, await self._remaining([message.key for message in messages if message.key])
        )

    def _released(self, reader: JobReader, remaining: set[Key]) -> None:
        messages = self._client.releasing.pop(reader.queue.channel)
        reader.is_releasing = False
        for message in reversed(messages):
            if message.key in remaining:
                reader.queue.push_front(message)
        reader.queue.uncount_rows(len(messages) - len(remaining))
        first = min(message.key.id for message in messages if message.key is not None)
        reader.may_have_more, reader.low_id = True, min(reader.low_id, first)
        self._release_later(reader)
        self._claim_soon(reader)

    async def _release_on(self, session: Session, keys: list[Key], quiet: bool) -> bool:
        client = self._client
        await self._receiver.raise_fence(session)
        await queries.release(
            session, client.config.prefix, client.address, client.fence, keys, quiet=quiet
        )
        return not quiet

    def _announce_later(self, channel: str, first: int) -> None:
        """The server has refused to announce jobs that were released: announce them when it does."""
        if not self._unannounced:
            self._spawn("The announcement of released jobs", self._announce)
        self._unannounced[channel] = min(first, self._unannounced.get(channel, first))

    async def _announce(self) -> None:
        prefix = self._client.config.prefix
        while self._unannounced:
            channel, first = next(iter(self._unannounced.items()))
            name = notification_channel(channel_address(prefix, channel))
            try:
                await self._connections.run(
                    partial(queries.notify, channel=name, payload=f"J {first}"),
                    timeout=self._client.config.send_timeout,
                    is_idempotent=True,
                )
            except PgLayerError:
                await asyncio.sleep(ANNOUNCE_RETRY)
            else:
                if self._unannounced.get(channel) == first:
                    del self._unannounced[channel]

    async def _remaining(self, keys: list[Key]) -> set[Key]:
        """Which of these jobs are still at the own address, now that their release can come no more."""
        client = self._client
        while True:
            await asyncio.sleep(RETRY)
            try:
                rows = await self._connections.run(
                    partial(self._remaining_on, keys=keys),
                    timeout=client.config.send_timeout,
                    is_idempotent=True,
                )
                return {row.key for row in rows}
            except PgLayerError:
                continue

    async def _remaining_on(self, session: Session, keys: list[Key]) -> list[Row]:
        await self._receiver.raise_fence(session)
        address = self._client.address
        return await queries.read_keys(
            session, [KeyAt(address, key.id, key.xid, key.boot, False, 0) for key in keys]
        )
