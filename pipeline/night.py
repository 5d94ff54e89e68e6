"""Night: generate, verify, report and publish one after another, for a run that nobody watches.

Each phase is a command in a process of its own: one that is killed does not end the night. Its exit code says what
follows:

    0             the next phase
    75            the network or a server failed: the same again, up to PATIENT_TRIES
    3, a signal   shards failed on a cluster, a crash, out of memory: the same again, up to FEW_TRIES; and so for a 1 of
                  generate, which writes nothing twice
    any other     the end of the night: the same command would fail again

Tries are counted from the last one that committed a shard, and the pauses between them grow.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from pipeline.core.addresses import is_address
from pipeline.core.console import duration
from pipeline.core.errors import ConfigError, PipelineError, ShardsFailedError, TemporaryError, explained, first_line
from pipeline.core.logs import TIME_FORMAT
from pipeline.core.redaction import presentable

# With pauses from 15 s to 15 minutes 12 tries last an hour and a half.
PATIENT_TRIES, FEW_TRIES = 12, 3
FIRST_PAUSE, LONGEST_PAUSE = 15.0, 900.0
# Seconds without a line after which the log says that the phase is still at work.
SILENT_SECONDS = 60.0
# Seconds that a command may take to end after a signal (they promise five), and that the one of --on-end may take.
GRACE_SECONDS, ON_END_SECONDS = 30.0, 600.0
POLL_SECONDS = 0.2
SUMMARY = "summary.json"


def allowed_tries(phase: str, code: int) -> int:
    """How often in a row a phase may end with an exit code (negative: a signal) without anything new in the dataset."""
    if code == TemporaryError.exit_code:
        return PATIENT_TRIES
    # Above 128: somebody has stopped this command and not the night, such as a guard against running out of memory.
    if code < 0 or code > 128 or code == ShardsFailedError.exit_code:
        return FEW_TRIES
    return FEW_TRIES if (phase, code) == ("generate", PipelineError.exit_code) else 1


def night_folder(output: str) -> Path:
    """The folder for logs and summary, which is made: OUTPUT.night beside the dataset.

    In the working folder where the dataset is in an object store or has a parent in which no folder can be made.

    Raises:
        ConfigError: it cannot be made there either.
    """
    if is_address(output):
        parents, name = [Path.cwd()], output.rstrip("/").rpartition("/")[2]
    else:
        whole = Path(output).resolve()
        parents, name = [whole.parent, Path.cwd()], whole.name
    for parent in parents:
        folder = parent / f"{name}.night"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    raise ConfigError(f"The log cannot be written to {folder}; run the command from a folder that can be written to.")


class Night:
    """One night: its phases, its log, and `summary.json`, whose `status` is `running` until the end.

    Args:
        config: as `fgsm generate` takes it, with `overrides`, `output` and `executor`.
        repository: to publish to, `user/name`; None to publish nothing.
        on_end: a shell command, run once at the end.
        tell: shows a line to whoever is at the terminal.
        program: what the names of the phases are arguments of.
        pause: seconds before the second try.
        silent: seconds without a line after which the log says that a phase is still at work.
    """

    def __init__(
        self,
        config: str,
        repository: str | None,
        overrides: Sequence[str],
        output: str | None,
        executor: str,
        on_end: str | None,
        tell: Callable[[str], None],
        *,
        program: Sequence[str] = (sys.executable, "-P", "-m", "pipeline"),
        pause: float = FIRST_PAUSE,
        silent: float = SILENT_SECONDS,
    ) -> None:
        self._config, self._repository, self._overrides = config, repository, overrides
        self._asked, self._executor, self._on_end, self._tell = output, executor, on_end, tell
        self._program, self._pause, self._silent = program, pause, silent
        self._output: str | None = None
        self._folder: Path | None = None
        self._log_path = Path()
        self._log: TextIO | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._signum: int | None = None
        self._kill_at = float("inf")
        self._last = ""
        self._began = datetime.now().astimezone()
        self._phases: list[dict[str, Any]] = []

    def run(self) -> int:
        """Do all of it.

        Returns:
            The exit code: 0, that of the phase that failed, or 128 and the number of the signal that ended the night.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            try:
                self._output = self._check()
                self._open(stack)
                code = self._run_phases()
            except PipelineError as error:
                self._last = f"Error: {error}"
                self._say(self._last)
                code = error.exit_code
            except Exception as error:  # a bug of ours, of which somebody is to be told all the same
                for line in traceback.format_exc().splitlines():
                    self._say(line)
                self._last, code = first_line(error), PipelineError.exit_code
            # As shells count a command that a signal has killed.
            code = 128 + self._signum if self._signum else 128 - code if code < 0 else code
            self._end(code, stack)
        return code

    # ---------------------------------------------------------------------------------------------- before and after

    def _check(self) -> str:
        """Refuse at once what would only be noticed hours later. Returns where the dataset goes."""
        from pipeline.config.load import load_config

        path = load_config(self._config, self._overrides, output=self._asked).output.path
        if self._repository is not None:
            from pipeline.hub.account import check_repository_id, read_token

            check_repository_id(self._repository)
            read_token()
        return path if is_address(path) else str(Path(path).expanduser())

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Open the log, unless another night is at work on the same output, and say what became of the one before."""
        assert self._output is not None
        folder = night_folder(self._output)
        handle = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(f"Another fgsm night is at work on {self._output}; wait for it, or stop it.") from None
        except OSError:
            pass  # a file system without locks
        self._folder = folder
        self._log_path = folder / f"{self._began:%Y-%m-%dT%H-%M-%S}.log"
        with explained(f"The log {self._log_path} cannot be written", errors=(OSError,)):
            self._log = self._log_path.open("a", encoding="utf-8")
            stack.callback(_close, self._log)
        self._tell(f"log: {self._log_path}")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            previous = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            if previous["status"] == "running":
                seen = datetime.fromtimestamp(Path(previous["log"]).stat().st_mtime)
                self._say(
                    f"The previous run was killed at {seen:{TIME_FORMAT}}, or within a minute after it, in "
                    f"{previous['phase']}. What it committed is kept."
                )

    def _end(self, code: int, stack: contextlib.ExitStack) -> None:
        """Write the summary, and run what is to be run at the end."""
        summary = self._summarise(code)
        text = "\n".join(_three_lines(summary))
        self._record(summary)
        if self._log:
            with contextlib.suppress(OSError):
                _replace(self._log_path, f"{text}\n\n{self._log_path.read_text(encoding='utf-8')}")
                self._log = self._log_path.open("a", encoding="utf-8")
                stack.callback(_close, self._log)
            self._tell(f"\n{text}")
        if self._on_end:
            known = {"status": summary["status"], "exit_code": code, "phase": summary["phase"], "text": text}
            if self._folder:
                known |= {"output": self._output, "summary": self._folder / SUMMARY, "log": self._log_path}
            more = {f"FGSM_NIGHT_{name.upper()}": str(value) for name, value in known.items()}
            # A signal that has ended the night is not for this command.
            self._signum, self._kill_at = None, time.monotonic() + ON_END_SECONDS
            if failed := self._run("--on-end", ["/bin/sh", "-c", self._on_end], {**os.environ, **more}):
                self._say(f"--on-end ended with {_told(failed)}.")

    def _summarise(self, code: int | None) -> dict[str, Any]:
        """What summary.json says; `code` is None while the night goes on."""
        stopped = "interrupted" if self._signum else "failed"
        ended = None if code is None else datetime.now().astimezone()
        return {
            "status": "running" if code is None else stopped if code else "done",
            "exit_code": code,
            "phase": self._phases[-1]["name"] if self._phases else "start",
            "reason": self._last if code else None,
            "config": self._config,
            "output": self._output,
            "repository": self._repository,
            "log": str(self._log_path) if self._log else None,
            "started": self._began.isoformat(" ", "seconds"),
            "ended": ended and ended.isoformat(" ", "seconds"),
            "seconds": ended and round((ended - self._began).total_seconds(), 1),
            "phases": self._phases,
            # With a config that does not fit, what is there may be another dataset.
            "dataset": None if code in (None, ConfigError.exit_code) else self._describe_dataset(),
        }

    def _record(self, summary: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a disk that is full must not end the night
            if self._folder:
                _replace(self._folder / SUMMARY, json.dumps(summary, indent=1) + "\n")

    def _describe_dataset(self) -> dict[str, Any] | None:
        """Rows, bytes and accuracies of the dataset as far as it is there; None where that cannot be read."""
        if self._folder is None or self._output is None:
            return None
        from pipeline.output.folder import OutputFolder
        from pipeline.output.manifest import current_manifest

        try:
            manifest = current_manifest(OutputFolder(self._output))
        except (PipelineError, OSError):
            return None
        labelled, correct = Counter[str](), Counter[str]()
        for one in manifest.subsets:  # of each split
            labelled[one.subset] += one.labelled
            correct[one.subset] += one.correct
        return {
            "run_id": manifest.run_id,
            "complete": manifest.complete,
            "source_images": manifest.rows,
            "rows": sum(one.rows for one in manifest.subsets),
            "skipped_rows": manifest.skipped_rows,
            "bytes": sum(file.bytes for file in manifest.files),
            "accuracy": {subset: correct[subset] / count for subset, count in labelled.items() if count},
        }

    # ---------------------------------------------------------------------------------------------- the phases

    def _run_phases(self) -> int:
        """The phases in their order, up to the first that fails; its exit code."""
        assert self._output is not None
        more = [part for override in self._overrides for part in ("--set", override)]
        more += [] if self._asked is None else ["--output", self._asked]
        more += [] if self._executor == "local" else ["--executor", self._executor]
        phases = [
            ["generate", self._config, *more],
            ["verify", self._output, "--recompute"],
            ["report", self._output],
            *([["publish", self._output, self._repository]] if self._repository is not None else []),
        ]
        for arguments in phases:
            if code := self._run_phase(arguments):
                return code
            if self._signum:
                break
        return 0

    def _run_phase(self, arguments: Sequence[str]) -> int:
        """A phase, tried as often as that is worth while; the exit code of the last try."""
        name = arguments[0]
        state: dict[str, Any] = {"name": name, "tries": 0, "seconds": 0.0, "exit_code": None}
        self._phases.append(state)
        shards, fruitless = self._count_shards(0), Counter[int]()
        while True:
            state["tries"] += 1
            self._record(self._summarise(None))
            self._say(f"fgsm {shlex.join(arguments)}")
            began = time.monotonic()
            # So that `python -P -m pipeline` is this package, whatever lies in the working folder.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            code = self._run(f"fgsm {name}", [*self._program, *arguments], environment)
            took = time.monotonic() - began
            state["seconds"], state["exit_code"] = round(state["seconds"] + took, 1), code
            if code == 0:
                self._say(f"fgsm {name} took {duration(took)}.")
                return 0
            self._say(f"fgsm {name} ended with {_told(code)} after {duration(took)}.")
            if code < 0 or not self._last:
                self._last = _told(code)
            if (now := self._count_shards(shards)) != shards:
                shards, fruitless = now, Counter()
            else:
                fruitless[code] += 1
            allowed = allowed_tries(name, code)
            if self._signum or allowed == 1 or fruitless[code] >= allowed:
                return code
            self._wait(min(self._pause * 2 ** max(fruitless[code] - 1, 0), LONGEST_PAUSE))
            if self._signum:
                return code

    def _count_shards(self, before: int) -> int:
        """How many shards are committed; `before` where that cannot be read now."""
        from pipeline.output.folder import OutputFolder

        assert self._output is not None
        with contextlib.suppress(PipelineError, OSError):
            sizes = OutputFolder(self._output).store.sizes()
            return sum(name.startswith(f"{OutputFolder.receipts}/") for name in sizes)
        return before

    def _wait(self, seconds: float) -> None:
        self._say(f"Trying again in {seconds:.0f} s.")
        end = time.monotonic() + seconds
        while self._signum is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))

    # ---------------------------------------------------------------------------------------------- processes

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Hear Ctrl-C, SIGTERM and the end of the terminal, unless nohup has said to ignore that."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        former = {number: signal.signal(number, self._stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self._signum = self._signum or signum
        self._kill_at = min(self._kill_at, time.monotonic() + GRACE_SECONDS)
        if self._child:
            # Commands end in order at SIGINT and SIGTERM.
            self._child.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

    def _run(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a process and write what it says to the log. Returns its exit code, negative for a signal."""
        self._last = ""
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that Ctrl-C reaches it once, through us
            )
        except OSError as error:  # the system may have no memory or no process to spare at the moment
            self._last = f"{name} cannot be started: {error.strerror}"
            self._say(self._last)
            return TemporaryError.exit_code
        self._child = child
        with child, contextlib.ExitStack() as stack:
            stack.callback(child.terminate)  # where an error of ours leaves it at work
            if self._signum:  # arrived while it was started
                self._stop(self._signum, None)
            for line in self._lines(name, child):
                if text := line.decode(errors="backslashreplace").rstrip():
                    self._last = presentable(text.strip())
                    self._say(text)
            self._child = None
            return child.wait()

    def _lines(self, name: str, child: "subprocess.Popen[bytes]") -> Iterator[bytes]:
        """The lines of a process until it has ended. While it says none the log says so."""
        assert child.stdout is not None
        began = said = time.monotonic()
        pending, more = b"", True
        while True:
            # What it has started may hold the pipe open for longer.
            ended = child.poll() is not None
            timeout = 0.0 if ended else POLL_SECONDS if more else POLL_SECONDS / 20
            if select.select([child.stdout] if more else [], [], [], timeout)[0]:
                read = os.read(child.stdout.fileno(), 2**16)
                more, said = bool(read), time.monotonic()
                *lines, pending = re.split(rb"[\r\n]", pending + read)
                yield from lines
            elif ended:
                yield pending
                return
            now = time.monotonic()
            if now - said >= self._silent:
                said = now
                self._say(f"{name} is still at work after {duration(now - began)}, with {_memory(child.pid)}.")
            if now >= self._kill_at:
                self._kill_at = float("inf")
                self._say(f"{name} takes too long to end, and is killed.")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def _say(self, text: str) -> None:
        """A line to the log and the terminal, with the time where it has none."""
        line = presentable(text, "\t")
        if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line):
            line = f"{datetime.now():{TIME_FORMAT}} {line}"
        self._tell(line)
        if self._log:
            with contextlib.suppress(OSError):  # a disk that is full must not end the night
                self._log.write(f"{line}\n")
                self._log.flush()


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError:  # as on a disk that is full: the part that was written would take up room for nothing
        new.unlink(missing_ok=True)
        raise


def _close(file: TextIO) -> None:
    """Close the log; what a full disk does not take of it is no failure of the night."""
    with contextlib.suppress(OSError):
        file.close()


def _three_lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary for people: what came of it, what there is now, and the accuracies."""
    from pipeline.output.summary import human_bytes

    tries = ", ".join(f"{phase['name']} {phase['tries']}" for phase in summary["phases"]) or "none"
    what = f"{summary['status'].upper()} in {summary['phase']} with exit code {summary['exit_code']} after"
    what = "done in" if summary["status"] == "done" else what
    why = "" if summary["reason"] is None else f"; {summary['reason']}"
    began, ended = (datetime.fromisoformat(summary[key]).strftime(TIME_FORMAT) for key in ("started", "ended"))
    took = f"{duration(summary['seconds'])}, from {began} to {ended}"
    first = f"{summary['output'] or summary['config']}: {what} {took}; tries: {tries}{why}"
    if not (dataset := summary["dataset"]):
        return [first, "no dataset that can be read", "accuracy: not known"]
    state = "" if dataset["complete"] else "INCOMPLETE: "
    second = (
        f"{state}{dataset['rows']:,} rows of {dataset['source_images']:,} source images, "
        f"{dataset['skipped_rows']:,} skipped, {human_bytes(dataset['bytes'])}"
    )
    if summary["repository"] and summary["status"] == "done":
        second += f", published as {summary['repository']}"
    shares = [f"{subset} {share:.2%}" for subset, share in dataset["accuracy"].items()]
    return [first, second, f"accuracy: {', '.join(shares) or 'nothing is labelled'}"]


def _told(code: int) -> str:
    if code == -signal.SIGKILL:
        return "signal SIGKILL, as a rule because the system was out of memory"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _memory(pid: int) -> str:
    """What a process and its children hold in memory, for people."""
    import psutil

    from pipeline.output.summary import human_bytes

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        sizes = [each.memory_info().rss for each in (process, *process.children(recursive=True))]
        return f"{human_bytes(sum(sizes))} in memory"
    return "memory unknown"
