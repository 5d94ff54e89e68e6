"""The command line in a process of its own: limits of the system, and streams that are closed, full or of no reader."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError, system_refusal
from tests.conftest import fgsm, generate

COMMAND = [sys.executable, "-m", "pipeline"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "digits"
    generate(Path("digits"), "--limit", "8", "--output", str(folder), "--set", "runtime.workers=0")
    return folder


def limited(which: int, value: int) -> Callable[[], None]:
    return partial(resource.setrlimit, which, (value, value))


def ended(*arguments: str | Path, prepare: Callable[[], None] | None = None, **streams: Any) -> tuple[int, str]:
    """The exit code of a command in another process, and what it says."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options |= {"preexec_fn": prepare, "timeout": 60, **streams}
    done = subprocess.run([*COMMAND, *map(str, arguments)], check=False, **options)
    return done.returncode, str(done.stderr or b"", "utf-8")


# ------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("command", "most"),
    [
        ("generate digits --limit 8 --output out", 0),
        ("generate digits --limit 8 --output out", 4096),
        ("plan digits", 0),
        ("report digits", 0),
    ],
)
@pytest.mark.slow
def test_a_limit_of_file_sizes_is_one_sentence(
    out: Path, tmp_path: Path, command: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # Python itself would leave half a file
    monkeypatch.chdir(out.parent if command.startswith("report") else tmp_path)
    code, said = ended(*command.split(), prepare=limited(resource.RLIMIT_FSIZE, most))
    assert code == 1
    assert "Traceback" not in said
    assert (os.strerror(errno.EFBIG) if most else "TMPDIR") in said.splitlines()[-1]


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x"),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        OSError(errno.EROFS, os.strerror(errno.EROFS), "/home/me/.cache"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/home/me"),
        NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/dev/null/.cache"),
        RuntimeError("unable to open file <x> in read-only mode: Too many open files (24)"),
        RuntimeError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 24] Too many open files"),
        RuntimeError("can't start new thread"),
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
        BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."),
        caused(ValueError("no config"), OSError(errno.EIO, os.strerror(errno.EIO))),
        MemoryError(),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.output.summary.inspect", fail)
    result = fgsm("inspect", "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    if name := getattr(error, "filename", None):
        assert name in result.stderr
    assert "Traceback" in fgsm("inspect", "out", "--debug").stderr


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "x", "y"), RuntimeError("a bug")])
def test_a_bug_is_no_refusal_of_the_system(error: Exception) -> None:
    assert system_refusal(error) is None


def test_a_refusal_that_was_dealt_with_does_not_hide_a_bug() -> None:
    """`raise ... from None` says that the bug came of something else; a traceback shows the refusal no more."""

    def raised(suppress: bool) -> Exception:
        bug = RuntimeError("a bug")
        bug.__context__, bug.__suppress_context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), suppress
        return bug

    assert system_refusal(raised(suppress=True)) is None
    assert isinstance(system_refusal(raised(suppress=False)), PipelineError)


@pytest.mark.slow
def test_folders_that_cannot_be_written_are_no_traceback(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for other in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(other, raising=False)
    for name in ("HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "file/below"))
    code, said = ended("report", out)
    assert (code, "Traceback" in said) == (0, False), said


# ------------------------------------------------------------------------------------------------- streams


def closed(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture
def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect"]])
def test_a_result_that_cannot_be_written_is_one_sentence(out: Path, full: int, arguments: list[str | Path]) -> None:
    code, said = ended(*arguments, *([out] if "inspect" in arguments else ()), stdout=full)
    assert code == 1
    assert said.splitlines()[-1].endswith(f" standard output: {os.strerror(errno.ENOSPC)}.")
    assert "Traceback" not in said


def test_a_closed_output_is_one_sentence(out: Path) -> None:
    code, said = ended("inspect", out, prepare=partial(closed, 1))
    assert code == 1
    assert re.fullmatch(f"Error: .* standard output: {os.strerror(errno.EBADF)}\\.\n", said)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect"]])
def test_a_reader_that_has_gone_ends_a_command_as_it_ends_others(out: Path, arguments: list[str | Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    assert ended(*arguments, *([out] if "inspect" in arguments else ()), stdout=write) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_messages_that_nobody_can_read_change_nothing(out: Path, tmp_path: Path, full: int) -> None:
    streams: dict[str, Any]
    for streams in ({"stderr": full}, {"prepare": partial(closed, 0, 2)}):
        assert ended("inspect", out, **streams)[0] == 0
        assert ended("inspect", tmp_path / "none", **streams)[0] == 2


@pytest.mark.slow
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints would end up in it."""
    out = tmp_path / "out"
    arguments: list[str | Path] = ["generate", "digits", "--limit", "8", "--set", "runtime.workers=0", "--output", out]
    assert ended(*arguments, prepare=partial(closed, 0, 1, 2))[0] == 1, "the summary was not written"
    assert fgsm("verify", out).exit_code == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"TERM": "dumb", "COLUMNS": "1"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
    ids=["dumb", "ascii", "latin-1"],
)
def test_a_poor_terminal_is_no_traceback(
    out: Path, tmp_path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    odd = tmp_path / "Blumen 花"
    odd.symlink_to(out)
    for folder, expected in ((odd, 0), (tmp_path / "Blumen", 2)):
        code, said = ended("inspect", folder)
        assert (code, "Traceback" in said) == (expected, False), said
