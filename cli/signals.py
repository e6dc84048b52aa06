"""Ctrl-C and SIGTERM in a process that is the command's own: how it ends, whatever it is doing.

Imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Terminated(SystemExit):
    """SIGTERM came. What is open is closed and temporaries go, as after Ctrl-C; nothing that was found is kept."""

    def __init__(self) -> None:
        super().__init__(STATUS[signal.SIGTERM])


class Handler:
    """`working` False: there is nothing to tidy up, and a signal ends the process at once. True: it raises, and while
    what it interrupted is tidied up no other signal does."""

    def __init__(self) -> None:
        self.working = False

    def __call__(self, number: int, frame: object) -> None:
        if not self.working:
            said = "terminated" if number == signal.SIGTERM else "interrupted"
            os.write(2, f"headgate: {said}\n".encode())
            os._exit(STATUS[signal.Signals(number)])
        if isinstance(sys.exc_info()[1], KeyboardInterrupt | Terminated):
            return
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def install() -> Handler:
    """Takes both signals for the rest of the process. One that is ignored stays so: it is a background job's Ctrl-C."""
    handler = Handler()
    for number in STATUS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    atexit.register(_ignore)  # the first registered is the last called
    return handler


def leave(status: int) -> None:
    """Ends the process with `status`, without taking the interpreter apart. A thread that computes while that is done
    aborts the process, and what was interrupted may have left one: it was just being started, say."""
    atexit._run_exitfuncs()
    from contextlib import suppress

    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads, it is closed, there is none
            stream.flush()
    os._exit(status)


def _ignore() -> None:
    """The interpreter takes itself apart, and the status is decided."""
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)
