"""An init of one's own: starts a command, adopts whatever that leaves behind, and ends when the last of it has.

`python warden.py LOG TERMINAL COMMAND...` runs the command in a session of its own, with its output appended to LOG, or
with TERMINAL (the path of one; "-" for none) as its controlling terminal. Tells on standard output: ``started PID``,
``ended STATUS`` (negative: the signal that killed it). Has no import that takes time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_CHILD_SUBREAPER = 36


def watch(log: str, terminal: str) -> bool:
    """Fork: True in the child, which is to become the command; False here, when all that it left has ended."""
    # Orphans below this process become its children, and not those of the machine's init (prctl(2)).
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("this kernel has no child subreapers")
    started = os.fork()
    if started == 0:
        os.setsid()
        # Ignored where the tests run in a shell's background, and then in every process below.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if terminal == "-":
            files = [os.open(os.devnull, os.O_RDONLY), *2 * [os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)]]
        else:
            # The first terminal that the leader of a session opens becomes its controlling one.
            files = 3 * [os.open(terminal, os.O_RDWR)]
        for number, file in enumerate(files):
            os.dup2(file, number)
        return True
    tell(f"started {started}")
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return False
        if pid == started:
            tell(f"ended {os.waitstatus_to_exitcode(status)}")


def tell(line: str) -> None:
    """A line on standard output, past whatever Python has for it."""
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__" and watch(*sys.argv[1:3]):
    os.execvp(sys.argv[3], sys.argv[3:])
