"""The watchman of one `PostgresServer`: ends what a killed parent leaves behind.

Run as a script with nothing but the standard library, so that it starts in milliseconds. Standard input is
the only link to the parent, one command a line:

    watch PID SIGNAL    PID now runs for the parent; SIGNAL is how it is to be stopped
    forget              the watched process has ended
    remove FOLDER       a folder that must not outlive the parent
    done                the parent has cleaned up itself

When standard input ends without `done`, the parent is gone: the watched process is stopped, the folders are
removed.

Why not PR_SET_PDEATHSIG: the kernel ties it to the *thread* that forked, so that a server started in a worker
thread would die with the worker; it is cleared by a change of user; it exists on Linux only; and it removes
no folders.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time

PATIENCE = 20.0  # seconds until a process that ignores its signal gets a stronger one


class Guard:
    """The parent's end: starts a watchman that sees to `folder`, and tells it what to watch."""

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # what is sent to our whole group must not reach it
        )
        self._tell(f"remove {folder}")

    def watch(self, pid: int, signum: int) -> None:
        """`pid` is the process to end with `signum` should we die; it takes the place of an earlier one."""
        self._tell(f"watch {pid} {int(signum)}")

    def forget(self) -> None:
        """The watched process has ended."""
        self._tell("forget")

    def dismiss(self) -> None:
        """Everything is cleaned up: end the watchman."""
        self._tell("done")
        try:
            self._process.communicate()
        except BrokenPipeError:
            self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # somebody ended the watchman; the server does not depend on it


class Watched:
    """One process, held by a pidfd where the system has it: a pid alone may be taken over by a stranger."""

    def __init__(self, pid: int, signum: int) -> None:
        self.pid = pid
        self.signum = signum
        self.pidfd: int | None = None
        if sys.platform == "linux":
            try:
                self.pidfd = os.pidfd_open(pid)
            except OSError:  # already gone, or a kernel before 5.3
                self.pidfd = None

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)

    def send(self, signum: int) -> bool:
        try:
            if sys.platform == "linux" and self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signum)
            else:
                os.kill(self.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def wait(self, timeout: float) -> bool:
        """Whether the process ended within `timeout` seconds."""
        if self.pidfd is not None:
            return bool(select.select([self.pidfd], [], [], timeout)[0])
        deadline = time.monotonic() + timeout
        while self.send(0):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)  # not our child: there is nothing to wait on
        return True

    def end(self) -> None:
        for signum in (self.signum, signal.SIGQUIT, signal.SIGKILL):
            if not self.send(signum) or self.wait(PATIENCE):
                return


def remove(folder: str) -> None:
    """Remove `folder`, also while the last processes of a killed server still write to it."""
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if os.path.exists(folder):
            time.sleep(0.05)


def main() -> None:
    watched: Watched | None = None
    folders: list[str] = []
    for line in sys.stdin:
        command, _, rest = line.rstrip("\n").partition(" ")
        if command == "done":
            return
        if command == "remove":
            folders.append(rest)
            continue
        if watched is not None:
            watched.close()
            watched = None
        if command == "watch":
            pid, signum = rest.split()
            watched = Watched(int(pid), int(signum))
    if watched is not None:
        watched.end()
    for folder in folders:
        remove(folder)


if __name__ == "__main__":
    main()
