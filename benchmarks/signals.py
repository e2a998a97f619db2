"""Whatever is to end a run interrupts it, and only the process that cleans up after it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


def interrupt_when_told_to_end() -> None:
    """SIGTERM and SIGHUP become KeyboardInterrupt, as Ctrl-C does; what nohup ignores stays ignored."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that are started here never hear of a Ctrl-C, not even before their first line.

    A terminal sends it to all processes. One that comes meanwhile reaches this process afterwards.
    """
    resource_tracker.ensure_running()  # the first process would start it, which lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
