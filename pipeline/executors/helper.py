"""A process that writes shards for another one of this machine: see executors/local.py.

It is started with the number of a socket. Over that it is told once what to do, and asks for shards until there are no
more. It reports batches, shards that are committed, and why it cannot go on. When the other process is gone, so is it.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from pipeline.core.errors import PipelineError, first_line
from pipeline.core.lanes import given_cores
from pipeline.core.plan import Shard
from pipeline.executors.base import Write


class _Caller:
    """The process that this one works for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._mutex = threading.Lock()
        self._answers: queue.SimpleQueue[list[Shard]] = queue.SimpleQueue()

    def listen(self) -> None:
        """Take its answers. It ends when the caller is gone, and this process with it, whatever it is doing."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._answers.put(self._connection.recv())
        os._exit(1)

    def say(self, kind: str, content: Any = None) -> None:
        """Send a message, from any thread."""
        with self._mutex:
            self._connection.send((kind, content))

    def portions(self) -> Iterator[list[Shard]]:
        """Ask for shards until there are no more."""
        while True:
            self.say("ask")
            if not (shards := self._answers.get()):
                return
            yield shards


def work(caller: _Caller, write: Write, cores: int, gpu_share: float | None) -> None:
    """Write what the caller hands out."""

    def tell(images: int, labelled: int, correct: Mapping[str, int]) -> None:
        caller.say("batch", (images, labelled, correct))

    try:
        if gpu_share is not None:
            import torch

            torch.cuda.set_per_process_memory_fraction(gpu_share)
        with given_cores(cores):
            for shards in caller.portions():
                with contextlib.closing(write(shards, tell=tell)) as written:
                    for each in written:
                        caller.say("written", each)
    except Exception as error:
        of_ours = isinstance(error, PipelineError)
        caller.say("failed", str(error) if of_ours else f"{type(error).__name__}: {first_line(error)}")


def main() -> None:
    """Work for the process at the other end of the socket that the command line names."""
    # What is worth saying is said by the caller, which has opened the same run.
    logging.getLogger("pipeline").addHandler(logging.NullHandler())
    connection = Connection(int(sys.argv[1]))
    write, cores, gpu_share = connection.recv()
    caller = _Caller(connection)
    threading.Thread(target=caller.listen, daemon=True, name="caller").start()
    work(caller, write, cores, gpu_share)
    # The caller waits for nothing more of it; tearing down CUDA would take a second.
    os._exit(0)


if __name__ == "__main__":
    main()
