"""The processes of a run: started, told of each other, killed, replaced."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from soak.book import Book, now
from soak.ledger import Complaint, Gone
from soak.roles import Part, Role, play

READY_MOST = 60.0  # seconds; a server may be down meanwhile
END_MOST = 20.0


class Member:
    """One process."""

    def __init__(self, part: Part, process: BaseProcess, pipe: Connection) -> None:
        loop = asyncio.get_running_loop()
        self.part = part
        self.process = process
        self.pipe = pipe
        self.channels: set[str] = set()
        self.ready = asyncio.Event()
        self.quiet = asyncio.Event()
        self.ended = asyncio.Event()
        self.is_going = False  # somebody ends it
        loop.add_reader(process.sentinel, self._end)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.process.join()
        self.ended.set()

    def signal(self, signum: signal.Signals) -> None:
        # By its sentinel, and not its pid, it is known to live; nobody else waits for it.
        if self.process.pid is not None and not self.ended.is_set():
            self.process.kill() if signum is signal.SIGKILL else self.process.terminate()


class Crew:
    """All processes. Belongs to one event loop; ``book`` is where it writes down who goes."""

    def __init__(self, folder: Path, dsns: tuple[str, ...], chance: random.Random, book: Book) -> None:
        self._folder = folder
        self._dsns = dsns
        self._chance = chance
        self._book = book
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["soak.roles"])
        self._serials: dict[str, int] = {}
        self.members: list[Member] = []

    def of(self, *roles: Role) -> list[Member]:
        """Those that play one of these roles, and that nobody ends."""
        return [m for m in self.members if m.part.role in roles and not m.is_going and m.ready.is_set()]

    async def start(self, role: Role) -> Member:
        """Start a process; returns when it is at work."""
        serial = self._serials[role] = self._serials.get(role, 0) + 1
        # In turn, so that both ways to the server are taken in every role.
        dsn = self._dsns[serial % len(self._dsns)]
        part = Part(role, f"{role}-{serial}", dsn, self._folder, self._chance.getrandbits(32))
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=play, args=(part, theirs), name=part.name, daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()
        member = Member(part, process, ours)
        self.members.append(member)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear, member)
        await asyncio.wait_for(member.ready.wait(), READY_MOST)
        self._tell(member)
        return member

    async def kill(self, member: Member) -> None:
        """kill -9; returns when it is gone."""
        member.is_going = True
        self._book.write(Gone(now(), member.part.name, True))
        member.signal(signal.SIGKILL)
        await member.ended.wait()
        self._forget(member)

    async def dismiss(self, member: Member) -> None:
        """SIGTERM; returns when it is gone."""
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

    async def hush(self) -> None:
        """Have all be quiet; returns when nothing is on its way into the database any more."""
        senders = self.of("sender", "threads")
        for member in self.members:
            self._send(member, "quiet")
        for member in senders:
            await asyncio.wait_for(member.quiet.wait(), END_MOST)

    async def end(self) -> None:
        """Dismiss all."""
        await asyncio.gather(*(self.dismiss(member) for member in self.members if not member.is_going))

    def close(self) -> None:
        """Leave nothing behind, wherever the run broke off."""
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
        self._tell_senders()

    def _hear(self, member: Member) -> None:
        try:
            while member.pipe.poll():
                what, value = member.pipe.recv()
                if what == "ready":
                    member.ready.set()
                elif what == "quiet":
                    member.quiet.set()
                elif what == "opened":
                    member.channels.add(value)
                    self._tell_senders()
                elif what == "closed":
                    member.channels.discard(value)
                    self._tell_senders()
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(member.pipe.fileno())
            if not member.is_going:
                self._complain(f"{member.part.name} ended by itself")

    def _tell_senders(self) -> None:
        for member in self.of("sender", "threads"):
            self._tell(member)

    def _tell(self, member: Member) -> None:
        self._send(member, "channels", sorted(c for m in self.members for c in m.channels))

    def _send(self, member: Member, what: str, value: object = None) -> None:
        try:
            member.pipe.send((what, value))
        except OSError:
            pass  # it is gone, as will be noticed

    def _complain(self, text: str) -> None:
        self._book.write(Complaint(now(), text))
