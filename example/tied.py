"""``python -m example.tied <pid> <command …>``: run the command until its parent ``pid`` ends.

Only Linux supports this. On other systems the command runs without it.
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
    if os.getppid() == int(parent):  # the parent had ended before prctl()
        os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
