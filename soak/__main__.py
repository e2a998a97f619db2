"""The command line ``python -m soak``."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from soak.faults import KINDS
from soak.report import describe
from soak.run import soak


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak and print its ledger.

    Return the exit code: 0 if all promises were kept, 1 if one was broken, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description="Inject random faults for a while and account for every message.",
    )
    parser.add_argument(
        "--seconds", type=float, default=120, help="how long to inject faults (default: 120)"
    )
    parser.add_argument(
        "--seed", type=int, help="seed of all random choices; random by default, and printed"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="copy the records of the processes to this folder",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="inject only faults whose name contains this; may be given more than once",
    )
    options = parser.parse_args(arguments)
    if unknown := [text for text in options.only if not any(text in kind for kind in KINDS)]:
        kinds = "\n  ".join(KINDS)
        parser.error(f"no fault contains {unknown[0]!r}. The faults are:\n  {kinds}")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    signal.signal(signal.SIGTERM, _interrupt)
    _say(f"{options.seconds:g} seconds of faults, --seed {seed}")
    try:
        ledger = soak(options.seconds, seed, _say, options.keep, options.only)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    _say(f"\n{describe(ledger)}\n(--seed {seed})")
    return 0 if ledger.is_clean else 1


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
