"""Signals interrupt a run, and only in the process that cleans up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


def interrupt_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt. Signals that nohup ignores stay ignored."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Block SIGINT in processes that are started in the block, even before their first line.

    A terminal sends it to all processes. This process receives a pending one after the block.
    """
    resource_tracker.ensure_running()  # the first new process would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
