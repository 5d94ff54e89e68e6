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
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray
import ray.exceptions
import torch
from pydantic_core import from_json
from ray._private.utils import read_ray_address  # it has no public name
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.schema import Config, RayConfig
from pipeline.core.errors import ConfigError, PipelineError, RowError, ShardsFailedError, causes, first_line, listing
from pipeline.core.lanes import DEVICE_LANES, given_cores
from pipeline.core.plan import Shard
from pipeline.core.redaction import redact
from pipeline.engine.estimate import estimate_bytes
from pipeline.engine.execute import check_share_skipped, compile_as_begun, tell_speed, write_shards
from pipeline.engine.loader import name_row
from pipeline.engine.progress import Board, Busy, Progress, ShardCounts
from pipeline.engine.run import Run, differences, open_run
from pipeline.output.folder import OutputFolder, Receipt, committed
from pipeline.output.manifest import Manifest

# After its first try: a worker that died, a node that went, an error.
RETRIES = 3
# How often the driver looks, and a worker tells.
POLL_SECONDS = 0.5
# An address that does not answer within this time does not answer; Ray itself tries for 80 s.
CONNECT_SECONDS = 10.0
# A shared folder may show later what a worker wrote: a client of NFS remembers for up to a minute what there was.
SHARED_SECONDS = 60.0
# Workers that are ended by force are gone well before the end that Ctrl-C promises.
CANCEL_SECONDS = 2.0

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- in a worker


@dataclass(frozen=True)
class Job:
    """What a worker must know of the run.

    recorded: the manifest of the run as it began, or None to begin it in this generation; cwd: where the driver stands,
    to which a factory's modules may be relative; cores and gpus: that a worker has, a part of one too.
    """

    config: Config
    recorded: Manifest | None
    generation: int
    cwd: str
    cores: int
    gpus: float


@dataclass(frozen=True)
class _Held:
    config: Config
    run: Run


# The run that this worker has opened, with the victim on its device.
_held: _Held | None = None


@contextlib.contextmanager
def _at_work(job: Job) -> Iterator[None]:
    """In the driver's folder, where the node has it, and with no more than Ray gave.

    What is raised names no credential of this node, which the driver would not know.
    """
    with contextlib.suppress(OSError):
        os.chdir(job.cwd)
    if not job.gpus and job.config.runtime.device == "auto":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of the node's GPUs in sight
    elif 0 < job.gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(job.gpus)
    try:
        with given_cores(job.cores):
            yield
    except Exception as error:
        for cause in causes(error):
            cause.args = tuple(redact(part) if isinstance(part, str) else part for part in cause.args)
        raise


def open_on_worker(job: Job) -> tuple[Manifest, list[tuple[int, str]]]:
    """Open the run, for the driver to know what it is.

    Returns:
        The manifest as it is before anything is written, and what was said meanwhile: levels and messages.
    """
    global _held
    with _at_work(job), _listening() as said:
        run = open_run(job.config, job.recorded, job.generation)
        _held = _Held(job.config, run)
        return run.manifest(), said


@contextlib.contextmanager
def _listening() -> Iterator[list[tuple[int, str]]]:
    """Collect what is logged, since nobody reads a worker's log."""
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


def _run(job: Job) -> Run:
    """The run that was begun, opened at most once in a worker.

    Raises:
        PipelineError: what this node has under the config's names is not what the run was begun with.
    """
    global _held
    recorded = job.recorded
    assert recorded is not None
    if _held is None or _held.config != job.config or _held.run.run_id != recorded.run_id:
        _held = None  # before another victim takes memory
        run = open_run(job.config, recorded)
        if run.run_id != recorded.run_id:
            raise PipelineError(
                f"the node {socket.gethostname()} has something else under the same names: "
                f"{differences(recorded.identity, run.identity)}; all nodes must read the same source and weights"
            )
        _held = _Held(job.config, run)
    compile_as_begun(_held.run)
    return _held.run


def estimate_on_worker(job: Job, shards: Sequence[Shard]) -> int:
    """Bytes that some shards will take."""
    with _at_work(job):
        return estimate_bytes(_run(job), shards)


def write_on_worker(job: Job, location: str, shard: Shard, board: Any) -> dict[str, float] | RowError:
    """Write one shard.

    Args:
        job: the run that was begun.
        location: the output folder.
        shard: the one to write.
        board: where the driver looks for the counts.

    Returns:
        Seconds of a core for each stage; that the shard is there only its receipt says. Or what ends the whole run:
        raised, it would be tried again.
    """
    with _at_work(job):
        run, folder, busy, told = _run(job), OutputFolder(location), Busy(), time.monotonic()
        if _read_receipt(folder, shard, run.edition) is not None:
            return busy.seconds  # of a worker that was lost right after its commit
        counts = ShardCounts(0, 0, {})

        def tell(images: int, labelled: int, correct: Mapping[int, int]) -> None:
            nonlocal counts, told
            right = dict(Counter(counts.correct) + Counter(correct))
            counts = ShardCounts(counts.images + images, counts.labelled + labelled, right)
            if time.monotonic() - told >= POLL_SECONDS or counts.images == shard.rows:
                told = time.monotonic()
                board.tell.remote(shard.name, counts)

        try:
            write_shards(run, folder, [shard], None, busy, tell)
        except RowError as error:
            return error
        return busy.seconds


# ------------------------------------------------------------------------------------------- in the driver


@dataclass(frozen=True)
class Workers:
    """What each worker is given, and how many there may be at once; None for as many as there is room for."""

    cpus: int
    gpus: float
    most: int | None

    def __str__(self) -> str:
        parts = [_many(self.cpus, "CPU")]
        if self.gpus:
            parts.append(f"{self.gpus:g} GPU" + "s" * (self.gpus > 1))
        return " and ".join(parts)

    def fit(self, node: Mapping[str, float]) -> int:
        """How many a node with these resources has room for."""
        room = int(node.get("CPU", 0) // self.cpus)
        return min(room, int(node.get("GPU", 0) / self.gpus + 1e-9)) if self.gpus else room

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many work at once."""
        room = sum(map(self.fit, nodes))
        return room if self.most is None else min(room, self.most)


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" + "s" * (count != 1)


def share_out(asked: RayConfig, device: str, nodes: Sequence[Mapping[str, float]]) -> Workers:
    """Decide what each worker is given: on GPUs one each and its part of the node's CPUs, else all CPUs of a node.

    Args:
        asked: `runtime.ray`.
        device: `runtime.device`, or that of the run which is resumed.
        nodes: the resources of each node.

    Raises:
        ConfigError: no node has what one worker needs.
    """
    gpus, cpus = asked.gpus_per_worker, asked.cpus_per_worker
    if gpus == "auto":
        wanted = device == "cuda" or (device == "auto" and any(node.get("GPU", 0) for node in nodes))
        gpus = 1.0 if wanted else 0.0
    most = None if asked.workers == "auto" else asked.workers
    if cpus == "auto":
        cpus = _cpus_beside_gpus(gpus, nodes) if gpus else _cpus_of_nodes(most, nodes)
    workers = Workers(cpus, gpus, most)
    if not workers.room(nodes):
        there = "; ".join(sorted({f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes}))
        raise ConfigError(
            f"runtime.ray: a worker needs {workers}, and no node of the Ray cluster has that (they have {there}); "
            "set cpus_per_worker and gpus_per_worker, or runtime.device."
        )
    return workers


def _cpus_beside_gpus(gpus: float, nodes: Sequence[Mapping[str, float]]) -> int:
    """CPUs of a worker such that on every node with enough GPUs no GPU is left over for want of CPUs."""
    parts = [int(node.get("CPU", 0) // (node["GPU"] // gpus)) for node in nodes if node.get("GPU", 0) >= gpus]
    return max(1, min(parts, default=1))


def _cpus_of_nodes(most: int | None, nodes: Sequence[Mapping[str, float]]) -> int:
    """CPUs of a worker such that so many find room, or that whole nodes are used."""
    sizes = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not sizes:
        return 1
    if most is not None:
        return max(
            (cpus for cpus in range(1, max(sizes) + 1) if sum(size // cpus for size in sizes) >= most), default=1
        )

    def used(cpus: int) -> float:
        return sum(size // cpus * cpus for size in sizes) / sum(sizes)

    # One size has to do for nodes of many: the largest that leaves next to none idle.
    return max(sizes, key=lambda cpus: (round(used(cpus), 1), cpus))


class RayExecutor:
    """Workers of a Ray cluster do the work; a context, in which this process is connected to it."""

    def __enter__(self) -> "RayExecutor":
        self._mine = not ray.is_initialized()
        if self._mine:
            _connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            ray.shutdown()

    def open(self, config: Config, recorded: Manifest | None, generation: int) -> Manifest:
        """Have a worker open the run: see generate.Executor.

        Raises:
            ConfigError: as `open_run`, or no node has what a worker needs.
        """
        device = config.runtime.device
        if device == "auto" and recorded is not None:
            device = recorded.resolved.runtime.device
        nodes = _nodes()
        self.workers = share_out(config.runtime.ray, device, nodes)
        room = self.workers.room(nodes)
        logger.info(
            "Ray: %s, room for %s with %s each.", _many(len(nodes), "node"), _many(room, "worker"), self.workers
        )
        job = Job(config, recorded, generation, str(Path.cwd()), self.workers.cpus, self.workers.gpus)
        self.opened, said = self._ask(open_on_worker, job)
        for level, message in said:
            logger.log(level, "%s", message)
        self.job = replace(job, recorded=self.opened)
        return self.opened

    def estimate_bytes(self, folder: OutputFolder, shards: Sequence[Shard]) -> int:
        # What waits for its upload lies on the workers' disks.
        return self._ask(estimate_on_worker, self.job, shards) if folder.store.local else 0

    def _ask(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function returns that is called on a worker; a worker that is lost is replaced."""
        reference = self._remote(function, retry_exceptions=False).remote(*arguments)
        try:
            answer: Result = ray.get(reference)
            return answer
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise PipelineError(f"The Ray worker that opens the run was lost: {_reason(error)}.") from error
        except BaseException:
            _cancel([reference])
            raise

    def _remote(self, function: Any, *, retry_exceptions: bool) -> Any:
        # By default a task that has a GPU ends its worker, and the next one would load the victim again.
        return ray.remote(
            num_cpus=self.workers.cpus,
            num_gpus=self.workers.gpus,
            max_calls=0,
            max_retries=RETRIES,
            retry_exceptions=retry_exceptions,
        )(function)

    def write(self, folder: OutputFolder, shards: Sequence[Shard], done: Sequence[Receipt]) -> None:
        """Have workers write some shards, and tell how far they are: see generate.Executor.

        Raises:
            ShardsFailedError: some failed each time they were tried; all others were committed.
            PipelineError: too many rows were skipped, or what was written is not in the folder.
        """
        if not shards:
            return
        finished, total = sum(receipt.planned for receipt in done), self.opened.plan.total
        with Progress(total, finished, self.opened.levels) as progress:
            session = _Session(self, folder, done, progress)
            session.run(shards)
        session.check(shards)
        tell_speed(folder, progress, session.shares(), self.opened.versions["device"])


class _Session:
    """One session of writing: the tasks in flight, and what is known of them."""

    def __init__(
        self, executor: RayExecutor, folder: OutputFolder, done: Sequence[Receipt], progress: Progress
    ) -> None:
        self.opened, self.workers, self.folder, self.progress = executor.opened, executor.workers, folder, progress
        self.flying: dict[Any, Shard] = {}
        self.failed: dict[str, BaseException] = {}
        self.done, self.receipts = done, [*done]
        self.total, self.most = progress.total, executor.opened.resolved.runtime.max_skipped
        self.busy = Busy()
        self._seen: dict[str, ShardCounts] = {}
        self._proved = False
        self._stuck = False
        self._location = str(Path(folder.root).absolute()) if folder.store.local else folder.root
        # By value with each task: an object that is shared must be fetched from here, one more thing to fail.
        self._job = executor.job
        self._write = executor._remote(write_on_worker, retry_exceptions=True)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._board: Any = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()

    def run(self, shards: Sequence[Shard]) -> None:
        """Have every shard tried, a bounded number at a time.

        Raises:
            PipelineError: as `RayExecutor.write`; then, as after Ctrl-C, no task goes on.
        """
        waiting = deque(shards)
        try:
            while waiting or self.flying:
                self._submit(waiting)
                references, _ = ray.wait([*self.flying], timeout=POLL_SECONDS)
                ended = [(reference, self.flying.pop(reference)) for reference in references]
                self._submit(waiting)  # before anything is read: no worker waits for that
                for reference, shard in ended:
                    self._end(reference, shard)
                self._look()
        except BaseException:
            _cancel([*self.flying])
            raise
        finally:
            ray.kill(self._board)

    def _submit(self, waiting: deque[Shard]) -> None:
        while waiting and len(self.flying) < self._window():
            shard = waiting.popleft()
            task = self._write.options(name=f"write {shard.name}")
            self.flying[task.remote(self._job, self._location, shard, self._board)] = shard

    def _window(self) -> int:
        """Tasks to have in flight: those that run, and where more may join, as many that wait for a worker."""
        nodes = _nodes()
        room = self.workers.room(nodes)
        if not room and not self._stuck:
            logger.warning("No node of the Ray cluster has %s any more; waiting for one to join.", self.workers)
        self._stuck = not room
        return self.workers.most or max(1, 2 * room)

    def _end(self, reference: Any, shard: Shard) -> None:
        """Take note of a task that has ended.

        Raises:
            RowError: a row of it ends the run, or too many rows were skipped.
            PipelineError: its files cannot be seen from here.
        """
        try:
            answer: dict[str, float] | RowError = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.failed[shard.name] = error
            logger.warning("Shard %s failed: %s.", shard.name, _reason(error))
            return
        if isinstance(answer, RowError):
            raise answer
        for stage, seconds in answer.items():
            self.busy.add(stage, seconds)
        if not self._proved:
            if not self._wait_for([shard]):
                raise _not_shared(self.folder, shard.name)
            self._proved = True
        receipt = _read_receipt(self.folder, shard, self.opened.edition)
        if receipt is None:  # to be seen later; `check` counts it
            return
        right = {counts.level: counts.correct for counts in receipt.counts}
        self._count(shard.name, ShardCounts(receipt.planned, receipt.counts[0].labelled, right))
        self.receipts.append(receipt)
        if receipt.skipped:
            self._judge(self.receipts, shard, receipt)

    def _wait_for(self, shards: Sequence[Shard]) -> dict[str, Receipt]:
        """The receipts of shards that workers say they have written, as far as they can be seen from here in time."""
        end = time.monotonic() + SHARED_SECONDS
        while True:
            there = committed(self.folder, self.opened.edition, shards)
            if len(there) == len(shards) or time.monotonic() > end:
                return there
            time.sleep(POLL_SECONDS)

    def _judge(self, receipts: Sequence[Receipt], shard: Shard, last: Receipt) -> None:
        """Stop where too many rows were skipped, the last of them in this shard, as its receipt says."""
        skipped, read = sum(len(receipt.skipped) for receipt in receipts), sum(receipt.planned for receipt in receipts)
        row = last.skipped[-1]
        message = f"{name_row(shard, row.source_index, row.file)} cannot be decoded ({row.reason})"
        check_share_skipped(skipped, self.total, read, self.most, message)

    def _look(self) -> None:
        """Show what the workers have told, without which the run goes on just as well.

        Raises:
            PipelineError: another run has taken the output over.
        """
        self.folder.store.check_held()
        with contextlib.suppress(ray.exceptions.RayError):
            for name, now in ray.get(self._board.take.remote(), timeout=10 * POLL_SECONDS).items():
                self._count(name, now)

    def _count(self, shard: str, now: ShardCounts) -> None:
        """Show how far a shard is; one that is tried again begins anew, and counts from where the first try stopped."""
        before = self._seen.get(shard, ShardCounts(0, 0, {}))
        if now.images > before.images:
            self._seen[shard] = now
            right = {level: count - before.correct.get(level, 0) for level, count in now.correct.items()}
            self.progress.update(now.images - before.images, now.labelled - before.labelled, right)

    def check(self, shards: Sequence[Shard]) -> None:
        """See what the receipts say.

        Raises:
            ShardsFailedError, PipelineError: as `RayExecutor.write`.
        """
        there = self._wait_for([shard for shard in shards if shard.name not in self.failed])
        # One may have failed after its commit.
        tried = [shard for shard in shards if shard.name in self.failed]
        there |= committed(self.folder, self.opened.edition, tried) if tried else {}
        with_skipped = [shard for shard in shards if shard.name in there and there[shard.name].skipped]
        if with_skipped:
            last = with_skipped[-1]
            self._judge([*self.done, *there.values()], last, there[last.name])
        failed = [shard.name for shard in tried if shard.name not in there]
        if failed:
            first = self.failed[failed[0]]
            raise ShardsFailedError(
                f"{len(failed)} of {len(shards)} shards failed after {RETRIES} retries: {listing(failed)}; the first: "
                f"{_reason(first)}. The others are committed, and the same command tries these again."
            ) from first
        missing = next((shard.name for shard in shards if shard.name not in there), None)
        if missing:
            raise _not_shared(self.folder, missing)

    def shares(self) -> dict[str, float]:
        """How busy each stage was, of what the workers could use."""
        workers = max(1, self.workers.room(_nodes()))
        cores = workers * self.workers.cpus
        lanes = workers * DEVICE_LANES if self.workers.gpus else cores
        return self.busy.shares({"load": cores, "attack": lanes, "encode": cores, "write": workers})


def _not_shared(folder: OutputFolder, shard: str) -> PipelineError:
    return PipelineError(
        f"output.path: a worker has written shard {shard}, and {folder.root} on this machine does not hold it; it must "
        "be a folder that all nodes of the cluster share, or an object store."
    )


def _read_receipt(folder: OutputFolder, shard: Shard, edition: str) -> Receipt | None:
    """A shard's receipt, None where it is not to be seen yet; whether it is there in the end `check` says."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Receipt.of_json(from_json(folder.store.read(folder.receipt(shard, edition))))
    return None


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
    for reference in references:
        ray.cancel(reference, force=True)
    if references:
        ray.wait([*references], num_returns=len(references), timeout=CANCEL_SECONDS)


def _nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _connect() -> None:
    """Join the cluster that RAY_ADDRESS or the machine names, or start one of this machine's cores.

    Raises:
        PipelineError: RAY_ADDRESS names a cluster that does not answer, or the cluster does not take this process.
    """
    named = os.environ.get("RAY_ADDRESS")
    # Ray itself would try for minutes to reach a cluster that is gone.
    remembered = None if named else read_ray_address()
    silence = _silence(named or remembered)
    if named and silence:
        raise _no_answer(named, silence)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if silence:
            _start(f"the one that it remembers, at {remembered}, does not answer: {silence}")
        else:
            _join(named)
    finally:
        # Ray takes SIGTERM for itself, where it can.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _join(named: str | None) -> None:
    """Join a cluster; where none is named and none found, Ray starts one."""
    try:
        _init()
    except ConnectionError as error:
        if named:
            raise _no_answer(named, first_line(error)) from error
        _start(first_line(error))
    except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
        # As of another version of Ray or Python, or without its token. A local one in its place would be a day's work
        # on one machine.
        where = f"at {named}" if named else "of this machine"
        raise PipelineError(
            f"RAY_ADDRESS: the Ray cluster {where} does not take this process ({first_line(error).rstrip('.')}); mend "
            "that, or set it to local to start one of this machine's cores."
        ) from error


def _start(reason: str) -> None:
    logger.warning("No Ray cluster of this machine takes part (%s); starting a local one.", reason.rstrip("."))
    _init(address="local")


def _init(**options: Any) -> None:
    """Join or start a cluster.

    Raises:
        PipelineError: none can be started, as in a temporary folder with a long name, or not in time.
        ConnectionError, RayError, RuntimeError, ValueError: the cluster that is there cannot be joined.
    """
    # What was ended for want of memory Ray would try again for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    starting = "local" in (options.get("address"), os.environ.get("RAY_ADDRESS"))
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Exception itself, where a process of Ray's does not start in time
        joining = (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError)
        if not starting and isinstance(error, joining):
            raise
        advice = "run the same command again when the machine is less busy"
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            advice = "name a folder for it with RAY_TMPDIR, such as /tmp"
        reason = first_line(error).rstrip(".")
        raise PipelineError(f"Ray cannot be started on this machine ({reason}); {advice}.") from error


def _silence(address: str | None) -> str | None:
    """Why nothing answers at an address of the form host:port, found out within seconds; None where something does."""
    host, _, port = (address or "").rpartition(":")
    if not host or "//" in host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or first_line(error)
    return None


def _no_answer(address: str, reason: str) -> PipelineError:
    return PipelineError(
        f"RAY_ADDRESS: no Ray cluster answers at {address} ({reason.rstrip('.')}); start it, or unset the variable to "
        "start a local one."
    )
