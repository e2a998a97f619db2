"""Keeps the tables' memberships as the client knows them: puts back what they lost, removes what has left.

Bound to one event loop. It waits for nobody: what somebody's transaction holds comes again later.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from pg_layer import roster
from pg_layer.client import Client
from pg_layer.connections import Connections
from pg_layer.exceptions import Held, PgLayerError
from pg_layer.inbox import Row
from pg_layer.membership import Member
from pg_layer.outage import Outage
from pg_layer.session import Session

T = TypeVar("T")

MOST = 5000  # memberships a statement
PAUSE = 0.5  # seconds before it tries again

Pair = tuple[str, str]  # a group, and a channel in it


class Restorer:
    """Has one statement in flight, and others wait while it has."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        outage: Outage,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._client = client
        self._connections = connections
        self._outage = outage
        self._spawn = spawn
        self._is_at_work = False
        self._is_all_due = False
        self._due: dict[Pair, None] = {}

    def restore(self) -> None:
        """The tables may have lost what a crash undid, or was swept: put all memberships back."""
        self._is_all_due = True
        self._begin()

    def told(self, rows: Sequence[Row]) -> None:
        """These rows told of memberships, and have been dispatched.

        A joining from before anybody knew that this client lives holds for a moment only, if it is not
        confirmed. It says until when it is to hold.
        """
        client = self._client
        for row in rows:
            if row.kind != "join" or not row.payload or row.channel is None or row.group is None:
                continue
            try:
                expires_at = float(row.payload)
            except ValueError:
                continue  # no word of ours
            if client.owns(row.channel) and expires_at > row.expires_at:
                client.memberships.join(row.group, client.mailbox(row.channel), row.id, expires_at)
            self._due[row.group, row.channel] = None
        self.look()

    def look(self) -> None:
        """Do what is to be done, if there is anything."""
        if self._due or self._client.memberships.has_ghosts:
            self._begin()

    def _begin(self) -> None:
        if not self._is_at_work:
            self._is_at_work = True
            self._spawn(self._work())

    async def _work(self) -> None:
        memberships = self._client.memberships
        try:
            while self._is_all_due or self._due or memberships.has_ghosts:
                try:
                    is_done = await self._put_back(self._pop_due()) & await self._banish(memberships.ghosts())
                except PgLayerError as error:
                    self._outage.begin(error)
                    is_done = False
                if not is_done:
                    await asyncio.sleep(PAUSE)
        finally:
            self._is_at_work = False

    def _pop_due(self) -> list[tuple[str, Member]]:
        memberships = self._client.memberships
        is_all_due, self._is_all_due = self._is_all_due, False
        due, self._due = self._due, {}
        if is_all_due:
            return memberships.all()
        found = [(group, memberships.of_pair(group, channel)) for group, channel in due]
        return [(group, member) for group, member in found if member is not None]

    async def _put_back(self, members: list[tuple[str, Member]]) -> bool:
        """Returns whether all were; the others are due again."""
        client = self._client
        left = {(group, member.mailbox.channel): member.expires_at for group, member in members}

        async def reassert(session: Session, pairs: Sequence[Pair]) -> None:
            now = client.clock.now()
            values = [(*pair, None if left[pair] == math.inf else left[pair] - now) for pair in pairs]
            client.memberships.put_back(await roster.reassert(session, client.inbox_name, values))
            done.update(pairs)

        done: set[Pair] = set()
        try:
            await self._in_parts(list(left), reassert)
        finally:
            # Of what was in flight it is unknown whether it was put back: take it that it was.
            undone = left.keys() - done
            client.memberships.put_back(undone)
            self._due.update(dict.fromkeys(undone))
        return not undone

    async def _banish(self, ghosts: list[Pair]) -> bool:
        """Returns whether all were."""
        client = self._client

        async def withdraw(session: Session, pairs: Sequence[Pair]) -> None:
            await roster.withdraw(session, client.inbox_name, pairs)
            client.memberships.banished(pairs)
            done.update(pairs)

        done: set[Pair] = set()
        await self._in_parts(ghosts, withdraw)
        return len(done) == len(ghosts)

    async def _in_parts(
        self, pairs: Sequence[Pair], work: Callable[[Session, Sequence[Pair]], Awaitable[None]]
    ) -> None:
        """Do it for as many as a statement may have, and for each but those that somebody holds."""
        for start in range(0, len(pairs), MOST):
            await self._connections.run(
                partial(_but_for_held, pairs=pairs[start : start + MOST], work=work),
                timeout=self._client.config.send_timeout,
                is_idempotent=True,
            )


async def _but_for_held(
    session: Session,
    pairs: Sequence[Pair],
    work: Callable[[Session, Sequence[Pair]], Awaitable[None]],
) -> None:
    try:
        await work(session, pairs)
    except Held:
        half = len(pairs) // 2
        if half:
            await _but_for_held(session, pairs[:half], work)
            await _but_for_held(session, pairs[half:], work)
