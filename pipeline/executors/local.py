"""This machine writes the shards: this process and, in a run that is long enough, others beside it.

The others are started here, are handed shards over a socket, and end with this process, however that ends. They do not
compute anything that this process would not: shards that one of them fails to write are handed out again, in the end to
this process, whose error is then that of the run.
"""

import contextlib
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.cores import available_cores, given_cores
from pipeline.core.errors import PipelineError, first_line
from pipeline.core.plan import Shard
from pipeline.executors.base import Executor, Work

if TYPE_CHECKING:
    from pipeline.engine.job import Written  # which imports PyTorch

# How often the caller sees to its lock while it waits for the others.
POLL_SECONDS = 0.5
# A process that was ended is gone within so many seconds, or is left to itself.
END_SECONDS = 2.0
# Shards are handed out in ever smaller portions, so that all processes end at about the same time: this part of what
# each would get if all were handed out at once, but no more than so many.
PORTION, MOST_SHARDS = 0.5, 8

logger = logging.getLogger(__name__)


class LocalExecutor(Executor):
    """This machine does the work."""

    def run(self, shards: Sequence[Shard], work: Work) -> "Generator[Written | None, None, None]":
        self.workers = work.processes.count
        if self.workers == 1:
            # All at once: the stages of one shard overlap with those of the next.
            yield from work.here(shards)
            return
        logger.info("%d processes of this machine share the work.", self.workers)
        with _Team(shards, work) as team:
            yield from team.run()


class _Team:
    """This process and its helpers, and the shards that nobody has begun; a context that ends the helpers."""

    def __init__(self, shards: Sequence[Shard], work: Work) -> None:
        self._waiting, self._work = deque(shards), work
        self._mutex = threading.Lock()
        # What helpers have written, and errors that end the run.
        self._arrived: queue.SimpleQueue[Written | PipelineError] = queue.SimpleQueue()
        self._helpers: list[_Helper] = []
        self._over = False

    def __enter__(self) -> "_Team":
        count = self._work.processes.count
        self._cores = available_cores()
        cores, more = divmod(self._cores, count)
        try:
            for index in range(1, count):
                helper = _Helper(index, self._work, max(1, cores + (index < more)))
                self._helpers.append(helper)
                helper.thread = threading.Thread(target=self._listen, args=(helper,), daemon=True, name="helper")
                helper.thread.start()
        except (OSError, MemoryError, RuntimeError) as error:  # the last one is that of a thread
            logger.warning("No further process can be started (%s); the others do its work.", first_line(error))
            for helper in self._helpers:
                if helper.thread is None or helper.thread.ident is None:
                    helper.works = False
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for helper in self._helpers:
            helper.kill()
        for helper in self._helpers:
            helper.close()

    def run(self) -> "Generator[Written | None, None, None]":
        """Write shards here and have others written, until none is left."""
        while True:
            # A helper that is lost puts back what it had before it counts as ended.
            theirs = [helper.cores for helper in self._helpers if helper.works]
            has_shards = any(helper.begun for helper in self._helpers if helper.works)
            if own := self._take():
                # Those of helpers that have ended too.
                with (
                    given_cores(max(1, self._cores - sum(theirs))),
                    contextlib.closing(self._work.here(own)) as receipts,
                ):
                    for written in receipts:
                        yield written
                        yield from self._drain()
            elif has_shards:
                with contextlib.suppress(queue.Empty):
                    yield _checked(self._arrived.get(timeout=POLL_SECONDS))
                yield None
            else:
                yield from self._drain()
                return

    def _take(self, helper: "_Helper | None" = None) -> list[Shard]:
        """The next portion of the shards that nobody has begun, for a helper or this process; none where there are
        none."""
        with self._mutex:
            workers = 1 + sum(helper.works for helper in self._helpers)
            count = len(self._waiting)
            if workers > 1:  # else there is nobody to leave any to
                count = min(MOST_SHARDS, math.ceil(count * PORTION / workers))
            shards = [self._waiting.popleft() for _ in range(count)]
            if helper is not None:
                helper.begun = {shard.name: shard for shard in shards}
            return shards

    def _drain(self) -> "Iterator[Written]":
        """What the helpers have written by now."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield _checked(self._arrived.get_nowait())

    def _listen(self, helper: "_Helper") -> None:
        """Tell a helper what to do, hand it shards and take what it reports, until it ends."""
        reason: str | None = ""
        try:
            helper.connection.send((self._work.elsewhere, helper.cores, self._work.processes.gpu_share))
            while True:
                kind, content = helper.connection.recv()
                if kind == "ask":
                    shards = self._take(helper)
                    helper.connection.send(shards)
                    if not shards:
                        reason = None
                        return
                elif kind == "failed":
                    reason = content
                    return
                elif kind == "error":
                    self._arrived.put(content)
                    reason = None
                    return
                else:
                    self._report(helper, content)
        except (OSError, EOFError):
            pass  # it has ended
        except Exception as error:  # what is sent, or was received, is not what it should be
            reason = f"{type(error).__name__}: {first_line(error)}"
        finally:
            self._let_go(helper, reason)

    def _report(self, helper: "_Helper", content: "tuple[int, int, dict[str, int]] | Written") -> None:
        """Take a batch, or a shard that is committed."""
        if isinstance(content, tuple):
            helper.told(*content)
            self._tell(*content)
            return
        receipt = content.receipt
        self._arrived.put(content)  # before the shard is off the helper's hands
        del helper.begun[receipt.shard]
        helper.told(*_negative(*receipt.progress))

    def _let_go(self, helper: "_Helper", reason: str | None) -> None:
        """End a helper, and hand out again what it had begun; `reason` is why it has ended, None where it should."""
        code = helper.kill(END_SECONDS if reason == "" else 0)
        if not self._over:
            if reason is not None:
                logger.warning(
                    "A process that shared the work has ended (%s). The others write its shards.", reason or code
                )
            if helper.images:  # whoever writes its shards counts them again
                self._tell(*_negative(helper.images, helper.labelled, helper.correct))
        with self._mutex:
            self._waiting.extendleft(reversed(helper.begun.values()))
            helper.works = False

    def _tell(self, images: int, labelled: int, correct: dict[str, int]) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone, as the first process will find
            self._work.tell(images, labelled, correct)


def _checked(arrived: "Written | PipelineError") -> "Written":
    if isinstance(arrived, PipelineError):
        raise arrived
    return arrived


def _negative(images: int, labelled: int, correct: dict[str, int]) -> tuple[int, int, dict[str, int]]:
    """What takes back that so many were told."""
    return -images, -labelled, {subset: -count for subset, count in correct.items()}


class _Helper:
    """A process beside this one that writes shards: see executors/helper.py.

    thread: listens to it. begun: the shards that it has and has not committed; images, labelled, correct: what it has
    told of them.
    """

    thread: threading.Thread | None = None

    def __init__(self, index: int, work: Work, cores: int) -> None:
        self.cores, self.works = cores, True
        self.begun = dict[str, Shard]()
        self.images, self.labelled, self.correct = 0, 0, dict[str, int]()
        own, theirs = socket.socketpair()
        with own, theirs, _signals_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.executors.helper", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *work.handles),
                env=_environment(index, work.processes.gpus),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self.connection = Connection(own.detach())

    def told(self, images: int, labelled: int, correct: dict[str, int]) -> None:
        """Count what it has told of batches, or take off what is committed."""
        self.images, self.labelled = self.images + images, self.labelled + labelled
        self.correct = {subset: self.correct.get(subset, 0) + count for subset, count in correct.items()}

    def kill(self, patience: float = 0) -> str:
        """End it, if it has not ended within so many seconds, and say how it ended. A shard is there with its receipt
        or not at all."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        code = self._process.returncode
        if code is None:
            return "it does not end"
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    def close(self) -> None:
        """Let go of it, after it was ended."""
        if self.thread is not None and self.thread.is_alive():
            self.thread.join(END_SECONDS)
        self.connection.close()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started meanwhile gets none of these before it has said what it does with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(index: int, gpus: Sequence[int]) -> dict[str, str]:
    """The variables of a helper: it imports what this process does and, of several GPUs, sees one."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        str(Path(path).absolute()) for path in sys.path if isinstance(path, str)
    )
    if len(gpus) > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        number = gpus[index % len(gpus)]
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number].strip() if seen else str(number)
    return environment
