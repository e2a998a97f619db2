"""The processes of a run: start, notify, stop, kill and replace them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from psycopg.conninfo import make_conninfo

from soak.book import Book, now
from soak.process import play
from soak.records import Away, Complaint, Gone
from soak.roles import ON_DJANGOS_CONNECTION, SENDING, Part, Role

READY_MOST = 60.0  # seconds; the server may be down meanwhile
END_MOST = 20.0  # seconds
RESUME = 1.0  # seconds after SIGCONT until a process has noticed its lost connections


class Member:
    """One process of the crew."""

    def __init__(self, part: Part, process: BaseProcess, pipe: Connection) -> None:
        loop = asyncio.get_running_loop()
        self.part = part
        self.process = process
        self.pipe = pipe
        self.channels: set[str] = set()
        self.ready = asyncio.Event()
        self.quiet = asyncio.Event()
        self.ended = asyncio.Event()
        self.is_going = False  # it is being ended
        self.is_stopped = False
        loop.add_reader(process.sentinel, self._end)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.process.join()
        self.ended.set()

    def signal(self, signum: signal.Signals) -> None:
        # The pid cannot be reused before the process is waited for, which only _end does.
        if self.process.pid is not None and not self.ended.is_set():
            os.kill(self.process.pid, signum)


class Crew:
    """All processes of a run. Belongs to one event loop.

    ``book`` records which processes end. Half of the processes use the first DSN, which connects
    directly, and half the second, which goes through a network that breaks. Django's connections
    have no timeout, so all processes that use them have the first DSN.
    """

    def __init__(
        self, folder: Path, dsns: tuple[str, str], chance: random.Random, book: Book
    ) -> None:
        self._folder = folder
        self._dsns = dsns
        self._chance = chance
        self._book = book
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["soak.process"])
        self._serials: dict[str, int] = {}
        self.members: list[Member] = []

    def of(self, *roles: Role) -> list[Member]:
        """Return the running members with one of these roles that are not being ended."""
        return [
            m
            for m in self.members
            if m.part.role in roles and m.ready.is_set() and not (m.is_going or m.is_stopped)
        ]

    def behind_network(self) -> list[str]:
        """Return the names of the processes whose DSN goes through the network."""
        return [member.part.name for member in self.members if member.part.takes_network]

    async def start(self, role: Role) -> Member:
        """Start a process and wait until it works."""
        serial = self._serials[role] = self._serials.get(role, 0) + 1
        # Alternate, so that every role uses both paths to the server.
        takes_network = serial % 2 == 0 and role not in ON_DJANGOS_CONNECTION
        name = f"{role}-{serial}"
        dsn = make_conninfo(self._dsns[takes_network], application_name=name)
        part = Part(role, name, dsn, takes_network, self._folder, self._chance.getrandbits(32))
        own_end, child_end = self._context.Pipe()
        process = self._context.Process(
            target=play, args=(part, child_end), name=part.name, daemon=True
        )
        await asyncio.to_thread(process.start)
        child_end.close()
        member = Member(part, process, own_end)
        self.members.append(member)
        asyncio.get_running_loop().add_reader(own_end.fileno(), self._read_pipe, member)
        await asyncio.wait_for(member.ready.wait(), READY_MOST)
        self._notify(member)
        return member

    async def kill(self, member: Member) -> None:
        """Send SIGKILL and wait until the process has ended."""
        member.is_going = True
        self._book.write(Gone(now(), member.part.name, True))
        member.signal(signal.SIGKILL)
        await member.ended.wait()
        self._forget(member)

    async def dismiss(self, member: Member) -> None:
        """Send SIGTERM and wait until the process has ended."""
        member.is_going = True
        self._book.write(Gone(now(), member.part.name, False))
        member.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(member.ended.wait(), END_MOST)
        except asyncio.TimeoutError:
            self._complain(f"{member.part.name} did not end within {END_MOST:g} s of SIGTERM")
            member.signal(signal.SIGKILL)
            await member.ended.wait()
        else:
            if member.process.exitcode:
                self._complain(f"{member.part.name} ended with {member.process.exitcode}")
        self._forget(member)

    async def die(self, member: Member) -> None:
        """Let a member kill itself between a commit and the announcement; wait for its end."""
        member.is_going = True
        self._send(member, "die")
        try:
            await asyncio.wait_for(member.ended.wait(), END_MOST)
        except asyncio.TimeoutError:  # it commits no message
            member.signal(signal.SIGKILL)
            await member.ended.wait()
        self._book.write(Gone(now(), member.part.name, True))
        self._forget(member)

    async def stop(self, member: Member, until: asyncio.Event, seconds: float) -> None:
        """Send SIGSTOP, and SIGCONT after ``seconds`` or when the event is set."""
        began = now()
        member.is_stopped = True
        member.signal(signal.SIGSTOP)
        try:
            await asyncio.wait_for(until.wait(), seconds)
        except asyncio.TimeoutError:
            pass
        finally:
            member.signal(signal.SIGCONT)
            self._book.write(Away(began, now() + RESUME, member.part.name, True))
            member.is_stopped = False
        if member.part.role in SENDING:
            self._notify(member)

    async def hush(self) -> None:
        """Stop all senders. Returns when no send is in progress."""
        senders = self.of(*SENDING)
        for member in self.members:
            self._send(member, "quiet")
        for member in senders:
            await asyncio.wait_for(member.quiet.wait(), END_MOST)

    async def end(self) -> None:
        """End all members with SIGTERM."""
        await asyncio.gather(
            *(self.dismiss(member) for member in self.members if not member.is_going)
        )

    def close(self) -> None:
        """Kill all processes that still run, even after a failed run."""
        for member in self.members:
            member.process.kill()
        for member in self.members:
            member.process.join()
            member.pipe.close()

    def _forget(self, member: Member) -> None:
        asyncio.get_running_loop().remove_reader(member.pipe.fileno())
        member.pipe.close()
        self.members.remove(member)
        member.channels.clear()
        self._notify_senders()

    def _read_pipe(self, member: Member) -> None:
        try:
            while member.pipe.poll():
                what, value = member.pipe.recv()
                if what == "ready":
                    member.ready.set()
                elif what == "quiet":
                    member.quiet.set()
                elif what == "opened":
                    member.channels.add(value)
                    self._notify_senders()
                elif what == "closed":
                    member.channels.discard(value)
                    self._notify_senders()
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(member.pipe.fileno())
            if not member.is_going:
                self._complain(f"{member.part.name} ended by itself")

    def _notify_senders(self) -> None:
        for member in self.of(*SENDING):
            self._notify(member)

    def _notify(self, member: Member) -> None:
        self._send(member, "channels", sorted(c for m in self.members for c in m.channels))

    def _send(self, member: Member, what: str, value: object = None) -> None:
        try:
            member.pipe.send((what, value))
        except OSError:
            pass  # the process has ended; its sentinel reports that

    def _complain(self, text: str) -> None:
        self._book.write(Complaint(now(), text))
