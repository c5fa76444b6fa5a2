"""An init of one's own: starts a command, adopts whatever that leaves behind, and ends when the last of it has.

`python warden.py LOG TERMINAL COMMAND...` runs the command in a session of its own, with its output appended to LOG, or
with TERMINAL (the path of one; "-" for none) as its controlling terminal. Tells on standard output: ``started PID``,
``ended STATUS`` (negative: the signal that killed it). Has no import that takes time: it is started for every run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_CHILD_SUBREAPER = 36


def main(log: str, terminal: str, command: list[str]) -> None:
    """See the module."""
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
        os.execvp(command[0], command)
    print("started", started, flush=True)
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return
        if pid == started:
            print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
