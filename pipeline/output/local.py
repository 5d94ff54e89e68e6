"""An output in a folder on a disk, and temporary folders.

A run holds the folder by a handle. All that it writes or deletes it reaches from that handle down, and through no link:
so it changes the folder that it holds, whatever has come to lie at its path meanwhile.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipeline.core.errors import ConfigError, PipelineError, first_line, write_failure
from pipeline.output.locks import LOCK, in_use, no_locks, part_locks
from pipeline.output.store import Store

RECEIPTS, SCRATCH = ".run/receipts", ".run/tmp"
# Temporary folders have names that begin like this. The file in each says whose it is, and is locked while its process
# lives. A folder without that file is somebody else's, whatever its name.
TEMPORARY = "fgsm-pipeline-"
MARKER = ".fgsm-pipeline"
MARK = b"A temporary folder of fgsm-pipeline, to be removed when no process has locked this file.\n"
# How long a process that has taken a lock may need to write its number there.
NAMING_SECONDS = 1.0


class LocalStore(Store):
    """A folder on a disk."""

    local = True

    def __init__(self, folder: Path) -> None:
        self.disk = folder.expanduser()
        self.root = str(self.disk)
        # While it is held: handles of the folder and, by their names, of its locks.
        self._handle: int | None = None
        self._locks: dict[str, int] = {}

    def handles(self) -> Sequence[int]:
        return [handle for handle in (self._handle, *self._locks.values()) if handle is not None]

    def at(self, name: str) -> str:
        return str(self.disk / name)

    def entries(self) -> list[str]:
        for folder in (self.disk, *self.disk.parents):
            if os.path.lexists(folder) and not folder.is_dir():
                what = "a link that leads nowhere" if folder.is_symlink() else "a file, not a folder"
                raise ConfigError(f"output.path: {folder} is {what}; remove it, or choose another folder.")
        return [entry.name for entry in self.disk.iterdir()] if self.disk.is_dir() else []

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        folders = ["", RECEIPTS]
        while folders:
            folder = folders.pop()
            with (
                reading(self.disk / folder),
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                os.scandir(self.disk / folder) as entries,
            ):
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_file():
                        # A file may go away after it was listed; the others are there still.
                        with contextlib.suppress(FileNotFoundError):
                            found[name] = entry.stat().st_size
                    # What lies deeper is not ours, which is what `verify` must see. A link there may lead in a circle.
                    elif not name.startswith(".") and entry.is_dir(follow_symlinks=not folder):
                        folders.append(name)
        return found

    def read(self, name: str) -> bytes:
        with reading(self.disk / name):
            return (self.disk / name).read_bytes()

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        return (self.disk / name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        # First elsewhere, as two processes may write the same file.
        with writing(self.disk / name), self.scratch("file") as folder:
            file = folder / "content"
            file.write_bytes(content)
            self.put(file, name)

    def put(self, local: Path, name: str) -> None:
        with writing(self.disk / name):
            with local.open("rb") as file:
                os.fsync(file.fileno())
            with self._folder_of(name) as folder:
                os.rename(local, PurePosixPath(name).name, dst_dir_fd=folder)
                os.fsync(folder)  # the new name is stored in the folder

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = PurePosixPath(name)
            with (
                writing(self.disk / name),
                contextlib.suppress(FileNotFoundError),
                self._folder_of(name, make=False) as folder,
            ):
                os.unlink(path.name, dir_fd=folder)
            # The folder of a subset, if that is empty; never that of receipts, by which the output is known as ours.
            if len(path.parts) == 2:
                with contextlib.suppress(OSError), self._folder_of(path.parts[0]) as folder:
                    os.rmdir(path.parts[0], dir_fd=folder)

    @contextlib.contextmanager
    def _folder_of(self, name: str, *, make: bool = True) -> Iterator[int]:
        """A handle of the folder in which a file lies, opened from the output's handle down and through no link."""
        self.check_held()
        handle = os.open(self.disk, os.O_DIRECTORY) if self._handle is None else os.dup(self._handle)
        try:
            for part in PurePosixPath(name).parent.parts:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=handle)
                inner = os.open(part, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
                os.close(handle)
                handle = inner
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        # On the same disk, so that a rename moves a file. Under a name of its own: another try of the shard may still
        # be under way, on a node that was given up. A dataset that was downloaded has no folder of a run's.
        parent = f"{SCRATCH}/" if (self.disk / ".run").is_dir() else "."
        own = f"{parent}{name}.{secrets.token_hex(6)}"
        folder = self.disk / own
        with writing(folder), self._folder_of(own) as scratch:
            os.mkdir(folder.name, dir_fd=scratch)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def fetched(self, names: Iterable[str]) -> Iterator[Path]:
        for name in names:
            (self.disk / name).stat()
        yield self.disk

    def staged(self, sizes: Mapping[str, int]) -> Iterator[Path]:
        del sizes
        yield self.disk

    def refuse_links(self, name: str = "") -> None:
        """A dataset that comes from elsewhere may hold any: `.run` to a home folder, assets/x.png to a private key."""

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        walked = os.walk(self.disk, onerror=refuse)
        inside = (Path(top, entry) for top, folders, files in walked for entry in (*folders, *files))
        with reading(self.disk):
            for path in [self.disk / name] if name else inside:
                if path.is_symlink() and not path.resolve().is_relative_to(self.disk.resolve()):
                    raise ConfigError(
                        f"{path} is a link that leads out of the dataset's folder, through which nothing is written, "
                        "deleted or published; put what it leads to in its place, or remove it."
                    )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        self.refuse_links()
        with writing(self.disk):
            self.disk.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.disk, os.O_DIRECTORY)
        outer, self._handle = self._handle, handle
        try:
            with writing(self.disk), self._folder_of(f"{RECEIPTS}/lock"):
                pass  # makes the folder of receipts, by which the output is known as ours
            yield
        finally:
            self._handle = outer
            os.close(handle)

    @contextlib.contextmanager
    def _exclusive(self, patience: float = 0.0) -> Iterator[None]:
        with self._locked(LOCK, patience):
            with writing(self.disk), self._folder_of(LOCK) as folder, os.scandir(folder) as entries:
                names = [f".run/{entry.name}" for entry in entries]
            for name in part_locks(names, self._part):
                with self._locked(name):
                    pass
            yield

    def tidy(self) -> None:
        if any((self.disk / SCRATCH).glob("*")):
            with contextlib.suppress(PipelineError), self.held():
                pass  # the scratch folder is emptied at the end of the block

    def _clear_scratch(self) -> None:
        """Remove files that are not complete, by the handle of the folder: another may lie at its path by now."""
        assert self._handle is not None
        with contextlib.suppress(OSError):
            lock = self._locks.get(LOCK)
            if lock is not None and not os.path.samestat(os.fstat(lock), os.stat(LOCK, dir_fd=self._handle)):
                return  # the lock was removed: these may be files of a run that has made it anew
            inside = os.open(".run", os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._handle)
            try:
                shutil.rmtree(PurePosixPath(SCRATCH).name, ignore_errors=True, dir_fd=inside)
            finally:
                os.close(inside)

    def check_held(self) -> None:
        """No other process can get the lock, but the folder may be moved and the lock's file be removed."""
        for name, handle in {"": self._handle, **self._locks}.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if handle is None or os.path.samestat((self.disk / name).stat(), os.fstat(handle)):
                    continue
            raise PipelineError(
                f"{self.disk / name} was removed, moved or replaced while the run went on, and nothing more is "
                "written; put the folder back, then run the same command again."
            )

    @contextlib.contextmanager
    def _locked(self, name: str, patience: float = 0.0) -> Iterator[None]:
        """A lock of the operating system, which lets go when the process ends."""
        with writing(self.disk):
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=self._handle)
        try:
            holder, since = None, 0.0
            while not self._take(lock):
                now = os.pread(lock, 100, 0).decode(errors="replace").strip()
                if now != holder:
                    holder, since = now, time.monotonic()
                # Who has just taken it has not yet written who it is.
                if time.monotonic() - since >= (patience if holder else max(patience, NAMING_SECONDS)):
                    raise in_use(self.root, f"process {holder or 'unknown'}")
                time.sleep(0.05)
            with writing(self.disk):
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
            self._locks[name] = lock
            yield
        finally:
            self._locks.pop(name, None)
            os.close(lock)

    def _take(self, lock: int) -> bool:
        """Lock a file; False where another process has locked it."""
        try:
            # flock, not lockf: it keeps out other threads of this process too.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise no_locks(self.root, f"the file system has no locks ({error.strerror})") from None
        return True


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the temporary space, removed at the end. Those that killed processes left are removed first."""
    space = Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        with writing(space):
            for left in space.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(OSError):
                    _remove_abandoned(left)
            made = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=space))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            # Locked before it has its final name: another process may be looking for abandoned folders.
            marker = stack.enter_context((made / f"{MARKER}.tmp").open("wb"))
            marker.write(MARK)
            marker.flush()
            fcntl.flock(marker, fcntl.LOCK_EX)
            Path(marker.name).rename(made / MARKER)
            folder = made / "files"
            folder.mkdir()
        yield folder


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder if a process of this user has made it; an OSError where it is in use, or has no marker."""
    if re.fullmatch(rf"{TEMPORARY}[a-z0-9_]{{8}}", folder.name) and folder.lstat().st_uid == os.getuid():
        with os.fdopen(os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW), "rb") as marker:
            if marker.read() == MARK:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system cannot read into one sentence; a FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PipelineError(
            f"Cannot read {path}: {error.strerror or first_line(error)}; check the disk and its permissions."
        ) from error
