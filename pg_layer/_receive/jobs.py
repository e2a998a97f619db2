"""The claim of jobs for waiting readers, and the release of jobs that no reader takes.

A claim moves rows to the client's address. If its answer is lost, the jobs are there
without the process knowing. The fence then refuses the statement if it arrives later, and a
catch-up reads the moved jobs. Each claim gives a row a new key, so that the row is new once,
whether the answer or a catch-up brings it first.

Bound to the owner loop. See ``docs/protocols.md``, section 6.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import TYPE_CHECKING

from pg_layer._db.fence import raise_fence
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

RELEASE_DELAY = 0.05  # seconds that a claimed job waits for a reader of this process
QUICK = 0.02  # seconds: a reader that finishes its jobs in less time is given more at a time
# Jobs claimed ahead do not count against the capacity of the channel, so they are few: a part
# of the capacity, and at most so many.
AHEAD_PART = 16
AHEAD_MOST = 31
RETRY = 0.5  # seconds
ANNOUNCE_RETRY = 1.0  # seconds


class JobReader:
    """A normal channel that this process reads. Only `JobReaders` changes it."""

    def __init__(self, queue: ChannelQueue) -> None:
        self.queue = queue
        self.is_wanted = False  # a reader has waited, so the process listens for jobs
        self.is_used = True  # since the last `forget_idle`
        self.is_claiming = False
        self.is_releasing = False
        self.may_have_more = True
        self.low_id = 0  # no job waits below this id; 0: the server has a low-water id
        self.ahead = 0  # jobs to claim beyond the demand, because this reader is quick
        self.claimed_at = -math.inf  # by the loop's time
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
        # Channels whose released jobs were not announced -> the first id.
        self._unannounced: dict[str, int] = {}
        # Low-water ids of claims in flight, and of claims whose answer was lost.
        self._unknown_low_id = LAST_ID
        self._in_flight: dict[int, int] = {}

    def start(self) -> None:
        """Take over the jobs that the last owner loop has claimed or was releasing."""
        for channel in self._client.releasing:
            reader = self._reader(channel)
            reader.is_releasing = True
            self._spawn("The release of jobs", partial(self._release, reader))
        for queue in self._client.queues():
            if "!" not in queue.channel and len(queue):
                self._release_later(self._reader(queue.channel))
        # The last owner loop may not have seen the answer of a claim: a catch-up reads its jobs.
        self._unknown_low_id = 0

    @property
    def low_id(self) -> int:
        """The smallest id at which the process may have a job that it does not know of."""
        return min(self._unknown_low_id, *self._in_flight.values(), LAST_ID)

    def caught_up(self) -> None:
        """Note that a catch-up has read the jobs of all claims with lost answers."""
        self._unknown_low_id = LAST_ID

    # ------------------------------------------------------------------ readers

    def reader_waits(self, channel: str) -> None:
        """Note that a reader waits on a normal channel, and claim jobs for it."""
        reader = self._reader(channel)
        reader.is_used = True
        if not reader.is_wanted:
            reader.is_wanted = True
            self._spawn("Listening for jobs", partial(self._begin, channel, reader))
        self._claim_soon(reader)

    def announced(self, channel: str, first: int) -> None:
        """Note that jobs wait in a channel, from the id ``first`` on."""
        reader = self._readers.get(channel)
        if reader is not None:
            reader.may_have_more = True
            reader.low_id = min(reader.low_id, first)
            self._claim_soon(reader)

    def claim_from_all(self) -> None:
        """Claim for all channels, whether or not jobs were announced in them."""
        for reader in self._readers.values():
            reader.may_have_more, reader.low_id = True, 0
            self._claim_soon(reader)

    def addresses(self) -> list[str]:
        """Return the addresses of all channels."""
        prefix = self._client.config.prefix
        return [channel_address(prefix, channel) for channel in self._readers]

    def forget_idle(self) -> None:
        """Stop listening to normal channels that were not read since the last call."""
        for channel, reader in list(self._readers.items()):
            # A timer, too, belongs to this object: another one must not release beside it.
            is_busy = reader.is_claiming or reader.is_releasing or reader.release is not None
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
        # A pending catch-up brings jobs that were claimed earlier, and they are delivered first.
        # Without a lease nothing is claimed: `claim_from_all` follows the first renewal.
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
        """Return how many jobs to claim: none while claimed ones wait for dispatch."""
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
                rows = await self._claim_and_append(queue.channel, low_id, limit)
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

    async def _claim_and_append(self, channel: str, low_id: int, limit: int) -> list[Row]:
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
            # Rows may have been claimed, and the answer lost. They are at the own address then.
            self._unknown_low_id = min(self._unknown_low_id, low_id)
            self._give_up_claim()
            raise
        finally:
            del self._in_flight[number]
            client.cursor.end_claim(number)

    async def _claim_on(self, session: Session, channel: str, low_id: int, limit: int) -> list[Row]:
        client = self._client
        await raise_fence(session, client)
        return await queries.claim(
            session, client.config.prefix, channel, client.address, client.fence, low_id, limit
        )

    def _give_up_claim(self) -> None:
        """Make the server refuse a claim of unknown outcome if it arrives late, and catch up."""
        self._client.advance_fence()
        self._client.cursor.interrupt()
        self._receiver.catch_up_soon()

    # ------------------------------------------------------------------ releasing

    def dispatched(self, channel: str) -> None:
        """Note that jobs were put into a channel's queue.

        Perhaps no reader waits for them any more, or more readers wait.
        """
        reader = self._reader(channel)
        self._release_later(reader)
        self._claim_soon(reader)

    def _release_later(self, reader: JobReader) -> None:
        if reader.release is None and not reader.is_releasing and len(reader.queue):
            reader.release = self._loop.call_later(RELEASE_DELAY, self._release_now, reader)

    def _release_now(self, reader: JobReader) -> None:
        reader.release = None
        # Jobs of a claim in flight, and jobs not dispatched yet, follow these. If
        # these were released now, readers would receive them after the later ones.
        if reader.is_claiming or self._client.announcements.holds_jobs(reader.queue.channel):
            self._release_later(reader)
            return
        reader.is_releasing = True  # so that no claim takes later jobs during the release
        self._spawn("The release of jobs", partial(self._release, reader))

    async def _release(self, reader: JobReader) -> None:
        client, channel = self._client, reader.queue.channel
        if channel in client.releasing:
            # Begun by the last owner loop, or before an unexpected error.
            await self._resolve(reader)
            return
        # Not before this task runs: if the loop ended first, the jobs would be lost.
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
                raise  # the next run, or the next owner loop, calls `_resolve`
            await self._resolve(reader)
            return
        self._released(reader, set())

    async def _resolve(self, reader: JobReader) -> None:
        """Find out which jobs were not released: those that are still at the own address."""
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
        await raise_fence(session, client)
        await queries.release(
            session, client.config.prefix, client.address, client.fence, keys, quiet=quiet
        )
        return not quiet

    def _announce_later(self, channel: str, first: int) -> None:
        """Announce released jobs later: the server refuses NOTIFY now."""
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
        """Return which jobs are still at the own address.

        The fence is raised first: the release of these jobs cannot take effect after that.
        """
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
        await raise_fence(session, self._client)
        address = self._client.address
        return await queries.read_keys(
            session, [KeyAt(address, key.id, key.xid, key.boot, False, 0) for key in keys]
        )
