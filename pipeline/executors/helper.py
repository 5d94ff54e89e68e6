"""A process that writes shards for another one of this machine: see executors/local.py.

It is started with the number of a socket. Over that it is told once what to do, and asks for shards until there are no
more. It reports batches, shards that are committed, and why it cannot go on. When the other process is gone, so is it.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from pipeline.core.cores import given_cores
from pipeline.core.errors import NonFiniteError, PipelineError, RowError, first_line
from pipeline.core.plan import Shard


class _Caller:
    """The process that this one works for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._mutex = threading.Lock()
        self._messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="caller").start()

    def _listen(self) -> None:
        """Take its messages. It ends when the caller is gone, and this process with it, whatever it is doing."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._messages.put(self._connection.recv_bytes())
        os._exit(1)

    def hear(self) -> Any:
        """Its next message."""
        return pickle.loads(self._messages.get())

    def say(self, kind: str, content: Any = None) -> None:
        """Send a message, from any thread."""
        with self._mutex:
            self._connection.send((kind, content))

    def portions(self) -> Iterator[list[Shard]]:
        """Ask for shards until there are no more."""
        while True:
            self.say("ask")
            if not (shards := self.hear()):
                return
            yield shards


def work(caller: _Caller) -> None:
    """Write what the caller hands out."""

    def tell(images: int, labelled: int, correct: Mapping[str, int]) -> None:
        caller.say("batch", (images, labelled, dict(correct)))

    try:
        write, cores, gpu_share = caller.hear()
        if gpu_share is not None:
            import torch

            torch.cuda.set_per_process_memory_fraction(gpu_share)
        with given_cores(cores):
            for _ in write([]):  # opens the run, before shards wait for it
                pass
            for shards in caller.portions():
                with contextlib.closing(write(shards, tell=tell)) as written:
                    for each in written:
                        caller.say("written", each)
    except (RowError, NonFiniteError) as error:  # what ends the run, whoever writes
        caller.say("error", error)
    except Exception as error:
        # Without what to do about it, as the run goes on.
        said = str(error).partition("; ")[0] if isinstance(error, PipelineError) else first_line(error)
        caller.say("failed", said or type(error).__name__)


def main() -> None:
    """Work for the process at the other end of the socket that the command line names."""
    # These are meant for the caller, which ends this process.
    numbers = signal.SIGINT, signal.SIGTERM
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    # What is worth saying is said by the caller, which has opened the same run.
    logging.getLogger("pipeline").addHandler(logging.NullHandler())
    socket = int(sys.argv[1])
    os.set_inheritable(socket, False)
    work(_Caller(Connection(socket)))
    # The caller waits for nothing more of it; tearing down CUDA would take a second.
    os._exit(0)


if __name__ == "__main__":
    main()
