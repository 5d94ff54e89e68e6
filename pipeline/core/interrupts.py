"""Ctrl-C and SIGTERM: stop within seconds, whatever the main thread is doing."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline.core.errors import Interrupted

# A step of the model can hold the main thread for longer than the five seconds that are promised.
GRACE_SECONDS = 4.0
SAYING_SECONDS = 0.5
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible(farewell: Callable[[], None], grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise `Interrupted` in the main thread on SIGINT and SIGTERM, and end the process if its own end takes long.

    Ending by force is safe at any moment: a shard is there with its receipt or not at all. After a signal the process
    is meant to end: it hears no other, and its time runs on beyond this context, as Python waits for threads at exit.

    Args:
        farewell: says what becomes of the work; called once, after a signal.
        grace: seconds that an orderly end may take.
    """
    read, write = socket.socketpair()
    write.setblocking(False)

    def say() -> None:
        if once.acquire(blocking=False):
            farewell()

    def stop(signum: int, frame: FrameType | None) -> None:
        del frame
        arrived.append(signum)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(signum)

    over, once = threading.Event(), threading.Lock()
    arrived: list[int] = []
    former_fd = signal.set_wakeup_fd(write.fileno())
    former = {number: signal.signal(number, stop) for number in SIGNALS}
    threading.Thread(target=_watch, args=(read, over, grace, say), daemon=True, name="interrupts").start()
    try:
        yield
        if arrived:
            # Python ignores what is raised in a callback of a fork or of the garbage collector.
            raise Interrupted(arrived[0])
    except KeyboardInterrupt as interrupt:
        if not arrived:
            raise
        say()
        # Extensions that wait, such as Ray's, put their own in the place of what a handler raises.
        raise interrupt if isinstance(interrupt, Interrupted) else Interrupted(arrived[0]) from None
    finally:
        if not arrived:
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_fd)
            over.set()
            write.close()


def _watch(signals: socket.socket, over: threading.Event, grace: float, say: Callable[[], None]) -> None:
    """End the process where it has not ended by itself in time."""
    # The C handler writes the signal's number here at once, even while the main thread sits in a long operator and
    # no Python handler can run. Other signals that have a handler pass by here too.
    with signals:
        while received := signals.recv(1):
            if received[0] in SIGNALS and not over.wait(grace):
                # Where nobody reads what is said, saying it lasts for ever.
                saying = threading.Thread(target=say, daemon=True)
                saying.start()
                saying.join(SAYING_SECONDS)
                os._exit(128 + received[0])
