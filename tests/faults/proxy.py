"""A TCP proxy between a layer and its server, for a network that breaks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

T = TypeVar("T")

_CHUNK = 65536
_TIMEOUT = 10.0


class Proxy:
    """A proxy to the server of the DSN ``target``, in a thread of its own.

    A layer connects through it with ``dsn()``. To break its listener only, pass that DSN as
    ``listen_dsn``.
    """

    def __init__(self, target: str) -> None:
        parameters = conninfo_to_dict(target)
        self._target = (str(parameters["host"]), int(str(parameters["port"])))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        # The task of each connection, and the event that is set while its data flows.
        self._paths: dict[asyncio.Task[None], asyncio.Event] = {}
        # The task of each connection by the port of its socket towards the server.
        self._ports: dict[int, asyncio.Task[None]] = {}
        self._is_swallowing = False
        self._dsn = target

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._dsn = make_conninfo(self._dsn, host="127.0.0.1", port=self._run(self._start()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------------ faults of the network

    def dsn(self, **parameters: str | int) -> str:
        """Return the DSN of the target, through the proxy."""
        return make_conninfo(self._dsn, **parameters)

    def cut(self) -> None:
        """Close all connections, on both sides. New connections work."""
        self._run(self._cut())

    def swallow(self) -> None:
        """Forward nothing, and close nothing. New connections are accepted, but not forwarded."""
        self._run(self._swallow())

    def hold(self, port: int) -> None:
        """Forward nothing on the connection that the server knows by this client port."""
        self._run(self._hold(port))

    def let_go(self, *, revive: bool = True) -> None:
        """Forward again, beginning with the data that was held back.

        ``revive=False``: only for connections that are opened later.
        """
        self._run(self._let_go(revive))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT)

    async def _cut(self) -> None:
        for path in self._paths:
            path.cancel()
        if self._paths:
            await asyncio.wait(self._paths)

    async def _swallow(self) -> None:
        self._is_swallowing = True
        for flows in self._paths.values():
            flows.clear()

    async def _hold(self, port: int) -> None:
        self._paths[self._ports[port]].clear()

    async def _let_go(self, revive: bool) -> None:
        self._is_swallowing = False
        if revive:
            for flows in self._paths.values():
                flows.set()

    # ------------------------------------------------------------------ in the proxy's thread

    # Do not use asyncio.start_server(): before Python 3.12.1 it never closes a connection that it
    # accepts while it is being closed.
    async def _start(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        port: int = self._listener.getsockname()[1]
        return port

    async def _stop(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        await self._cut()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the other side has closed it already
        connection.setblocking(False)
        flows = asyncio.Event()
        if not self._is_swallowing:
            flows.set()
        path = self._loop.create_task(self._forward(connection, flows))
        self._paths[path] = flows
        path.add_done_callback(self._paths.pop)
        # The task may be cancelled before its first step: its own cleanup does not run then.
        path.add_done_callback(lambda _: connection.close())

    async def _forward(self, connection: socket.socket, flows: asyncio.Event) -> None:
        writers: list[asyncio.StreamWriter] = []
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
            writers.append(writer)
            await flows.wait()
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            writers.append(far_writer)
            path = asyncio.current_task()
            assert path is not None
            self._ports[far_writer.get_extra_info("sockname")[1]] = path
            pumps = [
                asyncio.ensure_future(_pump(reader, far_writer, flows)),
                asyncio.ensure_future(_pump(far_reader, writer, flows)),
            ]
            try:
                # Either side may close the connection. Its last data has been forwarded by then.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            for each in writers:
                each.transport.abort()
        finally:
            for each in writers:
                each.close()
            for each in writers:
                with contextlib.suppress(OSError):
                    await each.wait_closed()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event
) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK):
            await flows.wait()
            writer.write(chunk)
            await writer.drain()
    await flows.wait()
