"""A helper process for one `PostgresServer` that cleans up if its parent is killed.

It runs as a script and imports only the standard library, so that it starts in milliseconds. The
parent writes commands to its standard input, one a line:

    watch PID SIGNAL    the process PID runs for the parent; SIGNAL stops it
    forget              the watched process has ended
    remove FOLDER       a folder that must not outlive the parent
    done                the parent has cleaned up

If standard input ends without `done`, the parent has ended. The helper then stops the watched
process and removes the folders.

PR_SET_PDEATHSIG would not do. The kernel ties it to the *thread* that forked, so a server that was
started in a worker thread would end with that thread. A change of user clears it. It exists on
Linux only. It removes no folders.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time

TIMEOUT = 20.0  # seconds until a process that ignores a signal is sent a stronger one


class Guard:
    """The parent's end: starts the helper process, which removes `folder`."""

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # signals to the parent's group must not reach it
        )
        self._write(f"remove {folder}")

    def watch(self, pid: int, signum: int) -> None:
        """Watch a process, instead of an earlier one. It is sent `signum` if the parent dies."""
        self._write(f"watch {pid} {int(signum)}")

    def forget(self) -> None:
        """Stop watching, because the watched process has ended."""
        self._write("forget")

    def dismiss(self) -> None:
        """End the helper, because the parent has cleaned up."""
        self._write("done")
        try:
            self._process.communicate()
        except BrokenPipeError:
            self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the helper was killed; the server does not depend on it


class Watched:
    """A watched process. A pidfd, if the system has it, excludes that the pid is reused."""

    def __init__(self, pid: int, signum: int) -> None:
        self.pid = pid
        self.signum = signum
        self.pidfd: int | None = None
        if sys.platform == "linux":
            try:
                self.pidfd = os.pidfd_open(pid)
            except OSError:  # the process has ended, or the kernel is older than 5.3
                self.pidfd = None

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)

    def send(self, signum: int) -> bool:
        """Send a signal; return whether the process exists."""
        try:
            if sys.platform == "linux" and self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signum)
            else:
                os.kill(self.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def wait(self, timeout: float) -> bool:
        """Return whether the process ended within `timeout` seconds."""
        if self.pidfd is not None:
            return bool(select.select([self.pidfd], [], [], timeout)[0])
        deadline = time.monotonic() + timeout
        while self.send(0):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)  # not a child of this process, so waitpid() is impossible
        return True

    def end(self) -> None:
        """End the process, with stronger signals if necessary."""
        for signum in (self.signum, signal.SIGQUIT, signal.SIGKILL):
            if not self.send(signum) or self.wait(TIMEOUT):
                return


def remove(folder: str) -> None:
    """Remove `folder`, even while processes of a killed server still write to it."""
    deadline = time.monotonic() + TIMEOUT
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if os.path.exists(folder):
            time.sleep(0.05)


def main() -> None:
    """Execute the commands of standard input; clean up if it ends without `done`."""
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
