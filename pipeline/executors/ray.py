"""Cluster: the same shards on the workers of a Ray cluster.

One plain task for each shard that is missing. Where it runs, and whether it is tried again, is Ray's; what counts
as done is what the receipts say. This process needs no device: it asks a worker to open the run, hands out shards, and
watches. A worker opens the run once and keeps it.
"""

import contextlib
import logging
import os
import signal
import socket
import statistics
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
import ray.exceptions
import torch
from ray._private.utils import read_ray_address  # it has no public name

from pipeline.config.schema import RuntimeConfig
from pipeline.core.cores import given_cores
from pipeline.core.errors import ConfigError, PipelineError, RowError, ShardsFailedError, causes, explained, first_line
from pipeline.core.plan import Shard
from pipeline.core.redaction import redact
from pipeline.engine.job import Written
from pipeline.executors.base import Executor, Result, Work, Write

# After its first try: a worker that died, a node that went, an error.
RETRIES = 3
# How often the driver looks whether it still holds the output.
POLL_SECONDS = 0.5
# An address that does not answer within this time does not answer; Ray itself tries for 80 s.
CONNECT_SECONDS = 10.0
# Workers that are ended by force are gone well before the end that Ctrl-C promises. First a task whose shard has just
# been committed may end by itself: Ray (2.60) aborts this process where a task ends while it is being cancelled.
CANCEL_SECONDS, ENDING_SECONDS = 2.0, 0.3

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- in a worker


@dataclass(frozen=True)
class WorkerContext:
    """Where a worker works: `cwd` is the driver's folder, to which a factory's modules may be relative; `cores` and
    `gpus` are what Ray has given it, a part of a GPU too; `device` is `runtime.device`.
    """

    cwd: str
    device: str
    cores: int
    gpus: float


@contextlib.contextmanager
def at_work(context: WorkerContext) -> Iterator[None]:
    """In the driver's folder, where the node has it, and with no more than Ray gave.

    What is raised names no credential of this node, which the driver would not know.
    """
    with contextlib.suppress(OSError):
        os.chdir(context.cwd)
    if not context.gpus and context.device == "auto":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of the node's GPUs in sight
    elif 0 < context.gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(context.gpus)
    try:
        with given_cores(context.cores):
            yield
    except Exception as error:
        for cause in causes(error):
            cause.args = tuple(redact(part) if isinstance(part, str) else part for part in cause.args)
        raise


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[int, str]]]:
    """Collect what is logged, levels and messages, since nobody reads a worker's log."""
    said: list[tuple[int, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelno, redact(record.getMessage())))

    listener, package = Listener(), logging.getLogger("pipeline")
    package.addHandler(listener)
    package.setLevel(logging.INFO)
    try:
        yield said
    finally:
        package.removeHandler(listener)


def call_on_worker(
    context: WorkerContext, function: Callable[..., Result], *arguments: Any
) -> tuple[Result, list[tuple[int, str]]]:
    """What a function returns, and what was said meanwhile."""
    with at_work(context), listening() as said:
        return function(*arguments), said


def write_on_worker(context: WorkerContext, write: Write, shard: Shard) -> list[Written] | RowError:
    """Write one shard. What ends the whole run is returned: raised, it would be tried again."""
    with at_work(context):
        try:
            return [*write([shard])]
        except RowError as error:
            return error


# ------------------------------------------------------------------------------------------- in the driver


@dataclass(frozen=True)
class Resources:
    """What each worker is given, and how many there may be at once; None for as many as there is room for."""

    cpus: int
    gpus: float
    most: int | None

    def __str__(self) -> str:
        return f"{self.cpus} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many workers nodes with such resources have room for at once."""
        needs = [(name, need) for name, need in (("CPU", self.cpus), ("GPU", self.gpus)) if need]
        room = sum(int(min(node.get(name, 0) / need + 1e-9 for name, need in needs)) for node in nodes)
        return room if self.most is None else min(room, self.most)


def share_out(runtime: RuntimeConfig, nodes: Sequence[Mapping[str, float]]) -> Resources:
    """Decide what each worker is given: on GPUs one each and its part of the node's CPUs, else all CPUs of a node.

    Raises:
        ConfigError: no node has what one worker needs.
    """
    gpus, cpus = runtime.ray.gpus_per_worker, runtime.ray.cpus_per_worker
    most = None if runtime.ray.workers == "auto" else runtime.ray.workers
    if gpus == "auto":
        some = any(node.get("GPU", 0) for node in nodes)
        gpus = float(runtime.device == "cuda" or (runtime.device == "auto" and some))
    if cpus == "auto":
        usable = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
        beside = [node["GPU"] // gpus if gpus else -(-(most or 1) // len(usable)) for node in usable]
        shares = [max(1, int(node["CPU"] // workers)) for node, workers in zip(usable, beside, strict=True)] or [1]
        # One size has to do for all nodes: with GPUs none of these is left over for want of CPUs.
        size: int = min(shares) if gpus else statistics.median_low(shares)
        cpus = size
    resources = Resources(cpus, gpus, most)
    if not resources.room(nodes):
        has = "; ".join(sorted({f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes}))
        raise ConfigError(
            f"runtime.ray: a worker needs {resources}, and no node of the Ray cluster has that (they have {has}); "
            "set cpus_per_worker and gpus_per_worker, or runtime.device."
        )
    return resources


class RayExecutor(Executor):
    """Workers of a Ray cluster do the work; a context, in which this process is connected to it."""

    remote = True

    def __enter__(self) -> Self:
        self._mine = not ray.is_initialized()
        if self._mine:
            _connect()
        nodes = _nodes()
        self._each = share_out(self.runtime, nodes)
        self._context = WorkerContext(str(Path.cwd()), self.runtime.device, self._each.cpus, self._each.gpus)
        self.workers, self._stuck = self._each.room(nodes), False
        logger.info("Ray: nodes: %d; workers: %d, with %s each.", len(nodes), self.workers, self._each)
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            ray.shutdown()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function returns that is called on a worker; a worker that is lost is replaced."""
        reference = self._remote(call_on_worker, retry_exceptions=False).remote(self._context, function, *arguments)
        try:
            answer: tuple[Result, list[tuple[int, str]]] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise PipelineError(f"The Ray worker that opens the run was lost: {_reason(error)}.") from error
        except BaseException:
            _cancel([reference])
            raise
        for level, message in answer[1]:
            logger.log(level, "%s", message)
        return answer[0]

    def _remote(self, function: Any, *, retry_exceptions: bool) -> Any:
        # By default a task that has a GPU ends its worker, and the next one would load the victim again.
        return ray.remote(
            num_cpus=self._each.cpus,
            num_gpus=self._each.gpus,
            max_calls=0,
            max_retries=RETRIES,
            retry_exceptions=retry_exceptions,
        )(function)

    def run(self, shards: Sequence[Shard], work: Work) -> Generator[Written | None, None, None]:
        """Have every shard tried, a bounded number at a time: see Executor."""
        task, waiting = self._remote(write_on_worker, retry_exceptions=True), deque(shards)
        flying: dict[Any, Shard] = {}
        failed: dict[str, str] = {}

        def submit() -> None:
            window = self._window() if waiting else 0
            while waiting and len(flying) < window:
                shard = waiting.popleft()
                # By value with each task: an object that is shared must be fetched from here, one more thing to fail.
                flying[task.options(name=f"write {shard.name}").remote(self._context, work.elsewhere, shard)] = shard

        try:
            submit()
            while flying:
                references, _ = ray.wait([*flying], timeout=POLL_SECONDS)
                ended = [(reference, flying.pop(reference)) for reference in references]
                submit()  # before anything is read: no worker waits for that
                for reference, shard in ended:
                    try:
                        answer: list[Written] | RowError = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        failed[shard.name] = _reason(error)
                        logger.warning("Shard %s failed: %s.", shard.name, failed[shard.name])
                        continue
                    if isinstance(answer, RowError):
                        raise answer
                    yield from answer
                yield None
        finally:
            _cancel([*flying])
        if failed:
            raise ShardsFailedError({s.name: failed[s.name] for s in shards if s.name in failed}, len(shards), RETRIES)

    def _window(self) -> int:
        """Tasks to have in flight: those that run, and where more may join, as many that wait for a worker."""
        room = self._each.room(_nodes())
        if not room and not self._stuck:
            logger.warning("No node of the Ray cluster has %s any more; waiting for one to join.", self._each)
        self._stuck, self.workers = not room, room or self.workers
        return self._each.most or max(1, 2 * room)


def _reason(error: BaseException) -> str:
    """Why a task failed, for a person."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, PipelineError):
            return str(cause).rstrip(".")
        return f"{type(cause).__name__}: {first_line(cause)}".rstrip(".")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "Ray ended its worker, as the node was short of memory"
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return "its worker died, perhaps for want of memory"
    return f"{type(error).__name__}: {first_line(error)}".rstrip(".")


def _cancel(references: Sequence[Any]) -> None:
    """End tasks by force, and wait until they are gone: they must not commit what nobody waits for."""
    if not references:
        return
    _, running = ray.wait([*references], num_returns=len(references), timeout=ENDING_SECONDS)
    for reference in running:
        ray.cancel(reference, force=True)
    if running:
        ray.wait(running, num_returns=len(running), timeout=CANCEL_SECONDS)


def _nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return [node["Resources"] for node in nodes if node["Alive"]]


def _connect() -> None:
    """Join the cluster that RAY_ADDRESS or the machine names, or start one of this machine's cores."""
    address = os.environ.get("RAY_ADDRESS") or read_ray_address()
    if address and address != "local":
        # A local cluster in its place would be a day's work on one machine.
        _check_answers(address)
        failed = f"RAY_ADDRESS: the Ray cluster at {address} does not take this process"
        fix = "correct that, or set it to local to start one of this machine's cores"
    else:
        failed = "Ray cannot be started on this machine"
        fix = "run the same command again when the machine is less busy, or set RAY_TMPDIR to a short path such as /tmp"
    # What was ended for want of memory Ray would try again for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Exception itself, where a process of Ray's does not start in time.
        with explained(failed, fix):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    finally:
        # Ray takes SIGTERM for itself, where it can.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_answers(address: str) -> None:
    """Find out within seconds whether a cluster of the form host:port is gone: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "//" not in host and port.isdigit():
        fix = "start it, or set RAY_ADDRESS to local to start one of this machine's cores"
        with explained(f"RAY_ADDRESS: no Ray cluster answers at {address}", fix, errors=(OSError,)):
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
