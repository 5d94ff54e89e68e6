"""This machine writes the shards: this process and, in a run that is long enough, others beside it.

The others are started here, are handed shards over a socket, and end with this process, however that ends. They do not
compute anything that this process would not: a shard that one of them fails to write is handed out again, in the end to
this process, whose error is then that of the run.
"""

import contextlib
import logging
import math
import os
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from pipeline.core.errors import first_line
from pipeline.core.lanes import available_cores, given_cores
from pipeline.core.plan import Shard
from pipeline.executors.base import Executor, Work

if TYPE_CHECKING:
    from pipeline.engine.job import Written  # which imports PyTorch
    from pipeline.engine.processes import Processes

# How often the caller sees to its lock while it waits for the others.
POLL_SECONDS = 0.5
# What a helper has said is heard within so many seconds of its end.
LISTEN_SECONDS = 1.0
# Shards are handed out in ever smaller portions, so that all processes end at about the same time: this part of what
# each would get if all were handed out at once.
PORTION = 0.5

logger = logging.getLogger(__name__)


class LocalExecutor(Executor):
    """This machine does the work."""

    def run(self, shards: Sequence[Shard], work: Work) -> "Generator[Written | None, None, None]":
        if (processes := self.processes(shards, work)).count <= 1:
            # All at once: the stages of one shard overlap with those of the next.
            yield from work.here(shards)
            return
        self.workers = processes.count
        logger.info("%d processes of this machine share the work.", processes.count)
        with _Team(shards, work, processes) as team:
            yield from team.run()

    def processes(self, shards: Sequence[Shard], work: Work) -> "Processes":
        """How many processes write some shards."""
        return work.processes(shards)


class _Team:
    """This process and its helpers, and the shards that nobody has begun; a context that ends the helpers."""

    def __init__(self, shards: Sequence[Shard], work: Work, processes: "Processes") -> None:
        self._waiting, self._work, self._processes = deque(shards), work, processes
        self._mutex = threading.Lock()
        self._arrived: queue.SimpleQueue[Written | None] = queue.SimpleQueue()
        self._helpers: list[_Helper] = []
        self._over = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Team":
        count = self._processes.count
        cores, more = divmod(available_cores(), count)
        shares = [max(1, cores + (index < more)) for index in range(count)]
        with contextlib.ExitStack() as stack:
            for index in range(1, count):
                try:
                    helper = _Helper(index, self._work, self._processes, shares[index])
                except (OSError, MemoryError) as error:
                    logger.warning("No further process can be started (%s); the others do its work.", first_line(error))
                    break
                stack.callback(helper.end)
                self._helpers.append(helper)
                helper.thread = threading.Thread(target=self._listen, args=(helper,), daemon=True, name="helper")
                helper.thread.start()
            self._stack = stack.pop_all()
        self._own_cores = shares[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._stack.close()

    def run(self) -> "Generator[Written | None, None, None]":
        """Write shards here and have others written, until none is left."""
        while True:
            # A helper that is lost puts back what it had before it counts as ended.
            working = self._working
            if self._waiting:
                own_cores = given_cores(self._own_cores) if working else contextlib.nullcontext()
                with own_cores, contextlib.closing(self._work.here(self._own(working))) as receipts:
                    for written in receipts:
                        yield written
                        yield from self._drain()
            elif working:
                with contextlib.suppress(queue.Empty):
                    yield self._arrived.get(timeout=POLL_SECONDS)
                yield None
            else:
                yield from self._drain()
                return

    @property
    def _working(self) -> int:
        """Helpers that have not ended."""
        return sum(helper.works for helper in self._helpers)

    def _own(self, working: int) -> Iterator[Shard]:
        """A portion of this process, shard by shard, of `working` helpers. If one of them ends, the rest of the portion
        waits for the next one, as this process has more cores from then on."""
        portion = deque(self._take())
        while portion and self._working == working:
            yield portion.popleft()
        with self._mutex:
            self._waiting.extendleft(reversed(portion))

    def _take(self) -> list[Shard]:
        """The next portion of the shards that nobody has begun; none where there are none."""
        with self._mutex:
            working = self._working
            # Without helpers there is nobody to leave any to.
            count = math.ceil(len(self._waiting) * PORTION / (1 + working) if working else len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _drain(self) -> "Iterator[Written | None]":
        """What the helpers have written by now."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._arrived.get_nowait()

    def _listen(self, helper: "_Helper") -> None:
        """Hand shards to a helper and take what it reports, until it ends."""
        begun: dict[str, Shard] = {}
        reason: str | None = "it was ended from outside"
        try:
            while True:
                kind, content = helper.connection.recv()
                if kind == "ask":
                    shards = self._take()
                    begun = {shard.name: shard for shard in shards}
                    helper.connection.send(shards)
                    if not shards:
                        reason = None
                        return
                elif kind == "batch":
                    self._work.tell(*content)
                elif kind == "written":
                    begun.pop(content.receipt.shard)
                    self._arrived.put(content)
                else:
                    reason = content.rstrip(".")
                    return
        except (OSError, EOFError):
            pass
        finally:
            if reason is not None and not self._over:
                logger.warning("A process that shared the work has ended: %s. The others write its shards.", reason)
            with self._mutex:
                self._waiting.extendleft(reversed(begun.values()))
                helper.works = False


class _Helper:
    """A process beside this one that writes shards: see executors/helper.py. `thread` listens to it."""

    thread: threading.Thread | None = None

    def __init__(self, index: int, work: Work, processes: "Processes", cores: int) -> None:
        self.works = True
        own, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.executors.helper", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *work.handles),
                env=_environment(index, processes.gpus),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is meant for this process, which ends the others.
                process_group=0,
            )
        self.connection = Connection(own.detach())
        with contextlib.suppress(OSError):  # it has ended already, as who listens will find
            self.connection.send((work.elsewhere, cores, processes.gpu_share))

    def end(self) -> None:
        """End it at once: a shard is there with its receipt or not at all."""
        self._process.kill()
        self._process.wait()
        if self.thread is not None and self.thread.is_alive():
            self.thread.join(LISTEN_SECONDS)
        self.connection.close()


def _environment(index: int, gpus: int) -> dict[str, str]:
    """The variables of a helper: it imports what this process does, and sees the one GPU whose turn it is."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if gpus > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen else [str(number) for number in range(gpus)]
        environment["CUDA_VISIBLE_DEVICES"] = names[index % gpus].strip()
    return environment
