"""Ctrl-C and SIGTERM: stop within seconds, whatever the main thread is doing."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from pipeline.errors import Interrupted

# A step of the model can hold the main thread for longer than the five seconds that are promised.
GRACE_SECONDS = 4.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible(farewell: str, grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise `Interrupted` in the main thread on SIGINT and SIGTERM, and end the process if that takes long.

    Ending by force is safe at any moment: a shard is there with its receipt or not at all.

    Args:
        farewell: printed before the end by force.
        grace: seconds that an orderly end may take.
    """
    read, write = socket.socketpair()
    write.setblocking(False)

    def watch() -> None:
        # The C handler writes the signal's number here at once, even while the main thread sits in a long
        # operator and no Python handler can run.
        # Other signals pass by here too: DataLoader has a handler for SIGCHLD.
        with read:
            while received := read.recv(1):
                if received[0] in SIGNALS and not over.wait(grace):
                    print(farewell, file=sys.stderr, flush=True)
                    os._exit(128 + received[0])

    def stop(signum: int, frame: FrameType | None) -> None:
        del frame
        arrived.append(signum)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # A SIGTERM to the group ends the workers too, and DataLoader's handler would take that for a failure.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Interrupted(signum)

    over = threading.Event()
    arrived: list[int] = []
    former_fd = signal.set_wakeup_fd(write.fileno())
    former = {number: signal.signal(number, stop) for number in SIGNALS}
    threading.Thread(target=watch, daemon=True, name="interrupts").start()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if arrived and not isinstance(interrupt, Interrupted):
            # Extensions that wait, such as Ray's, put their own in the place of what a handler raises.
            raise Interrupted(arrived[0]) from None
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_fd)
        over.set()
        write.close()
