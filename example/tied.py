"""``python -m example.tied <pid> <command …>``: become the command, and die when its parent, ``pid``, does.

Only Linux can do this; elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(parent: str, *command: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(parent):  # or it was gone already before the line above
        os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
