"""Where an output lies: a folder on a disk, or a prefix in an object store such as `s3://bucket/prefix`.

A store has few verbs, over names relative to its root with `/` between their parts. On a disk a file is written aside,
synced and renamed; an object appears whole when its upload ends. So in either a reader sees a file or none.
Everything that fails is one sentence; only that something is not there is a `FileNotFoundError`.
"""

import contextlib
import errno
import fcntl
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipeline.config.schema import check_address, is_address
from pipeline.core.errors import ConfigError, PipelineError, causes, first_line, write_failure
from pipeline.core.redaction import redact_answer
from pipeline.output.locks import LOCK, ConflictError, StoreLock, UnsupportedError, in_use

SCRATCH = ".run/tmp"
# By these a folder is known as ours.
OWN_FOLDERS = ".run/receipts"

# Of the S3 client: an attempt ends when nothing was heard for so long, and so many are made, half a minute in all where
# the store answers with errors at once.
CONNECT_SECONDS, SILENT_SECONDS, ATTEMPTS = 10.0, 30.0, 8
# An upload to which no answer comes outlasts the client's own patience (s3fs 2026.9): it is given up after this, and a
# second more for each megabyte, and so many are tried.
PATIENCE_SECONDS, TRIES = 200.0, 3
# Requests for small files under way at once.
CONNECTIONS = 32
# Bytes of a dataset that lie on the local disk at once while it is published from an object store.
STAGED_BYTES = 4 * 10**9
# Folders in the temporary space, as `tempfile` names them, and the file in each that says whose they are and is locked
# while its process lives. A folder that has it not is somebody else's, whatever its name.
TEMPORARY = "fgsm-pipeline-"
MARKER = ".fgsm-pipeline"
MARK = b"A temporary folder of fgsm-pipeline, to be removed when no process has locked this file.\n"
# Protocols whose client writes on the condition that an object is still of a version.
CONDITIONAL = ("s3", "s3a")
# What brings a protocol to fsspec.
PACKAGES = {
    "s3": "'fgsm-pipeline[s3]'",
    "s3a": "'fgsm-pipeline[s3]'",
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}

# Folders that are held in this process, by device and inode: a lock of POSIX keeps out other processes only, and is
# given up where any handle of the file is closed.
_HELD: set[tuple[int, int]] = set()
_HELD_LOCK = threading.Lock()

logger = logging.getLogger(__name__)


class Store(ABC):
    """What an output needs of the place where it lies.

    `root` is its folder or address, for messages; `disk` a folder on the disk that must have room for what is written;
    `local` says whether that is all of the dataset, rather than the shards in flight; `session` names the process that
    holds it, where others could take it over.
    """

    root: str
    disk: Path
    local: bool
    session: str = ""

    @abstractmethod
    def at(self, name: str) -> str:
        """The whole path or address of a file, for messages and other libraries."""

    @abstractmethod
    def entries(self) -> list[str]:
        """The names at the top, of files and folders; none where nothing is there yet.

        Raises:
            ConfigError: nothing could be written there.
        """

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The bytes of every file by its name, from one fresh listing: of `.run` and the like only receipts matter."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Many small files that were listed, but for those that are gone since."""

    @abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to read parts of.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Replace a small file as a whole, so that a reader or a crash sees the old one or the new one."""

    @abstractmethod
    def commit(self, name: str, content: bytes) -> None:
        """Write a small file after everything that went before it; the same is there already is as well."""

    @abstractmethod
    def put(self, local: Path, name: str) -> None:
        """Bring a file from the scratch folder to its place."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove files, those that are there."""

    @abstractmethod
    def scratch(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A folder of one's own on a local disk, for files that are not complete yet; removed at the end."""

    @abstractmethod
    def fetched(self, names: Iterable[str]) -> contextlib.AbstractContextManager[Path]:
        """A local folder in which some files lie under their names, for as long as it is held.

        Raises:
            FileNotFoundError: one of them is not there.
        """

    @abstractmethod
    def staged(self, sizes: Mapping[str, int]) -> Iterator[Path]:
        """Local folders in which some files, given with their bytes, lie under their names: a bounded part in each."""

    @abstractmethod
    def refuse_links(self, name: str = "") -> None:
        """Refuse a place, or a name in it, in which a link leads elsewhere, before anything is written, deleted or
        published through it. An object store has no links.

        Raises:
            ConfigError: there is one.
        """

    @abstractmethod
    def held(self, *, unlocked: bool = False) -> contextlib.AbstractContextManager[None]:
        """Hold the place against a second run.

        Args:
            unlocked: do without a lock; the caller has seen to it that no second run writes there.

        Raises:
            ConfigError: a link in it leads elsewhere, or the store has no means to keep a second run out.
            PipelineError: another process holds it, or it cannot be written.
        """

    @abstractmethod
    def check_held(self) -> None:
        """See that the place is still held: whoever writes asks by itself, whoever has others write there asks this.

        Raises:
            PipelineError: it was taken over, moved or replaced.
        """

    @abstractmethod
    def tidy(self) -> None:
        """Remove what killed processes have left aside, unless somebody holds the place."""

    @abstractmethod
    def watch(self) -> None:
        """For who writes without holding the place: from now on nothing is replaced that another has written since."""


def open_store(root: str | Path) -> Store:
    """The store of an output: a folder, or an address such as `s3://bucket/prefix`.

    Raises:
        ConfigError: the address cannot be one, or the package for its protocol is missing.
    """
    return ObjectStore(str(root)) if is_address(root) else LocalStore(Path(root))


class LocalStore(Store):
    """A folder on a disk."""

    local = True

    def __init__(self, folder: Path) -> None:
        self.disk = folder.expanduser()
        self.root = str(self.disk)
        # While it is held: handles of the folder and of its lock.
        self._handle: int | None = None
        self._lock: int | None = None

    def at(self, name: str) -> str:
        return str(self.disk / name)

    def entries(self) -> list[str]:
        for folder in (self.disk, *self.disk.parents):
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"output.path: {folder} is a file, not a folder.")
        return [entry.name for entry in self.disk.iterdir()] if self.disk.is_dir() else []

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        folders = ["", ".run/receipts"]
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

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return (self.disk / name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        # First under a name of its own, as two processes may write the same file. In the scratch folder, where there is
        # one: who holds the dataset next removes what a crash has left there.
        path = PurePosixPath(name)
        file, temporary = path.name, f".{path.name}.{secrets.token_hex(6)}"
        aside = SCRATCH if (self.disk / ".run").is_dir() else str(path.parent)
        with (
            writing(self.disk / name),
            self._folder_of(name) as folder,
            self._folder_of(f"{aside}/{temporary}") as scratch,
        ):
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                with os.fdopen(os.open(temporary, flags, 0o666, dir_fd=scratch), "wb") as opened:
                    opened.write(content)
                    opened.flush()
                    os.fsync(opened.fileno())
                os.rename(temporary, file, src_dir_fd=scratch, dst_dir_fd=folder)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=scratch)
            os.fsync(folder)  # a rename belongs to the folder

    def commit(self, name: str, content: bytes) -> None:
        self.write(name, content)

    def put(self, local: Path, name: str) -> None:
        with writing(self.disk / name):
            with local.open("rb") as file:
                os.fsync(file.fileno())
            with self._folder_of(name) as folder:
                os.rename(local, PurePosixPath(name).name, dst_dir_fd=folder)
                os.fsync(folder)

    def delete(self, names: Iterable[str]) -> None:
        emptied = set()
        with writing(self.disk):
            for name in names:
                path = PurePosixPath(name)
                with contextlib.suppress(FileNotFoundError), self._folder_of(name, make=False) as folder:
                    os.unlink(path.name, dir_fd=folder)
                # Not that of the receipts, by which a folder is known as ours.
                if len(path.parts) == 2:
                    emptied.add(path.parts[0])
            for name in emptied:
                with contextlib.suppress(OSError), self._folder_of(name) as folder:
                    os.rmdir(name, dir_fd=folder)

    @contextlib.contextmanager
    def _folder_of(self, name: str, *, make: bool = True) -> Iterator[int]:
        """A handle of the folder in which a file lies.

        Handles lead from the dataset's folder down, not paths, and through no link: so it is the folder that is held,
        whatever has come to lie at its path.
        """
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
        # On the same disk, so that a file can be renamed into its place.
        # A name of its own: another try of the shard may still be under way, on a node that was given up.
        own = f"{name}.{secrets.token_hex(6)}"
        folder = self.disk / SCRATCH / own
        with writing(folder), self._folder_of(f"{SCRATCH}/{own}") as scratch:
            os.mkdir(own, dir_fd=scratch)
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
        if name:
            self._refuse_link(self.disk / name)
            return
        waiting = [self.disk]
        while waiting:
            folder = waiting.pop()
            with (
                reading(folder),
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                os.scandir(folder) as entries,
            ):
                for entry in entries:
                    if entry.is_symlink():
                        self._refuse_link(Path(entry.path))
                    elif entry.is_dir():
                        waiting.append(Path(entry.path))

    def _refuse_link(self, path: Path) -> None:
        if path.is_symlink() and not path.resolve().is_relative_to(self.disk.resolve()):
            raise ConfigError(
                f"{path} is a link that leads out of the dataset's folder, through which nothing is written, deleted "
                "or published; put what it leads to in its place, or remove it."
            )

    @contextlib.contextmanager
    def held(self, *, unlocked: bool = False) -> Iterator[None]:
        """By a lock of the operating system, which lets go when the process ends."""
        self.refuse_links()
        with contextlib.ExitStack() as stack:
            with writing(self.disk):
                self.disk.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.disk, os.O_DIRECTORY)
                stack.callback(os.close, handle)
                with self._folder_of(f"{OWN_FOLDERS}/lock"):
                    there = os.fstat(handle)
            stack.enter_context(self._held_here((there.st_dev, there.st_ino)))
            if unlocked:
                warn_unlocked(self.root)
            else:
                self._lock = stack.enter_context(self._locked_out(handle))
            self._handle = handle
            stack.callback(self._let_go)
            self._clear_scratch()
            # What a node that was lost leaves: once all is there no command holds the folder again.
            stack.callback(self._clear_scratch)
            yield

    def tidy(self) -> None:
        if any((self.disk / SCRATCH).glob("*")):
            with contextlib.suppress(PipelineError), self.held():
                pass  # to let go of it is to remove that

    def _let_go(self) -> None:
        self._handle = self._lock = None

    def _clear_scratch(self) -> None:
        """Remove what is not complete; by its handle, as another folder may lie at the path by now."""
        assert self._handle is not None
        with contextlib.suppress(OSError):
            lock = None if self._lock is None else os.fstat(self._lock)
            if lock and not os.path.samestat(lock, os.stat(LOCK, dir_fd=self._handle)):
                return  # the lock was removed: what is there may be of the run that has made it anew
            inside = os.open(".run", os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._handle)
            try:
                shutil.rmtree(PurePosixPath(SCRATCH).name, ignore_errors=True, dir_fd=inside)
            finally:
                os.close(inside)

    def check_held(self) -> None:
        """The operating system gives it to nobody else, but it may have been moved, and its lock be removed."""
        for name, handle in (("", self._handle), (LOCK, self._lock)):
            if handle is not None and not _is_at(self.disk / name, handle):
                raise PipelineError(
                    f"{self.disk / name} was removed, moved or replaced while the run went on, and nothing more is "
                    "written; put the folder back, then run the same command again."
                )

    def watch(self) -> None:
        """Here a file is replaced at once, by the name that it has now."""

    @contextlib.contextmanager
    def _held_here(self, folder: tuple[int, int]) -> Iterator[None]:
        """Against other threads of this process."""
        with _HELD_LOCK:
            if folder in _HELD:
                raise in_use(self.root, f"process {os.getpid()}")
            _HELD.add(folder)
        try:
            yield
        finally:
            with _HELD_LOCK:
                _HELD.discard(folder)

    @contextlib.contextmanager
    def _locked_out(self, folder: int) -> Iterator[int]:
        """Against other processes."""
        with writing(self.disk):
            lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=folder)
        try:
            try:
                # lockf, not flock: a worker inherits an flock, and would hold the folder for the seconds that it
                # outlives a killed run.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    holder = os.pread(lock, 100, 0).decode(errors="replace").strip()
                    raise in_use(self.root, f"process {holder}") from None
                raise ConfigError(
                    f"output.path: {self.root}: nothing there keeps a second run out, as the file system has no "
                    f"locks ({error.strerror}); see to it yourself that no other run writes there, and say so with "
                    "--unlocked."
                ) from None
            with writing(self.disk):
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
            yield lock
        finally:
            os.close(lock)


class ObjectStore(Store):
    """A prefix in an object store, through fsspec. Credentials come from the environment, as its client finds them.

    An instance may be used by several threads, and by a process that was forked from one that has used it.
    """

    local = False

    def __init__(self, address: str) -> None:
        try:
            check_address(address)
        except ValueError as error:
            raise ConfigError(f"output.path: {error}.") from None
        self.root, self.disk = address.rstrip("/"), Path(tempfile.gettempdir())
        self._protocol = address.partition("://")[0]
        self._kind = _file_system(self._protocol)
        self._base: str = self._kind._strip_protocol(self.root)
        # By process: a client's connections and threads do not survive a fork.
        self._systems: dict[int, Any] = {}
        # What the last listing says of the version of each file, and small files that were read with theirs.
        self._tags: dict[str, str] = {}
        self._known: dict[str, tuple[str, bytes]] = {}
        self._lock: StoreLock | None = None
        # The versions of the files that are written on conditions, None where there are no conditions.
        self._versions: dict[str, str] | None = None

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def entries(self) -> list[str]:
        try:
            found = self._ask("ls", self._base, detail=False)
        except FileNotFoundError:
            bucket = self._base.partition("/")[0]
            if not self._ask("exists", bucket):
                raise ConfigError(
                    f"output.path: {self._protocol}://{bucket} is not there, or these credentials may not see it; "
                    "make the bucket first, or name another."
                ) from None
            return []
        return [name for path in found if (name := path.rstrip("/")[len(self._base) + 1 :])]

    def sizes(self) -> dict[str, int]:
        self._system.invalidate_cache()
        try:
            found = self._ask("find", self._base, patience=math.inf, detail=True)
        except FileNotFoundError:
            found = {}
        listed = {path[len(self._base) + 1 :]: info for path, info in found.items() if path != self._base}
        self._tags = {name: str(info.get("ETag") or info.get("etag") or "") for name, info in listed.items()}
        return {name: int(info["size"]) for name, info in listed.items()}

    def read(self, name: str) -> bytes:
        return bytes(self._ask("cat_file", self._path(name)))

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        asked = list(names)
        fresh = [
            name for name in asked if not self._tags.get(name) or self._tags[name] != self._known.get(name, "?")[0]
        ]
        # Not `cat`: that asks for each file, one by one, whether it is there.
        contents = self._ask("cat_ranges", [*map(self._path, fresh)], None, None, patience=math.inf)
        for name, content in zip(fresh, contents, strict=True):
            self._known.pop(name, None)
            if isinstance(content, bytes):
                self._known[name] = self._tags.get(name, ""), content
            elif not isinstance(content, FileNotFoundError):
                raise self._failure(content)
        return {name: self._known[name][1] for name in asked if name in self._known}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            # Readers of Parquet know what they want: each read is one request, and nothing is read ahead.
            with self._system.open(self._path(name), "rb", cache_type="none") as file:
                yield file
        except (FileNotFoundError, PipelineError, ValueError, LookupError):
            raise
        except Exception as error:  # as in _ask
            raise self._failure(error) from None

    def write(self, name: str, content: bytes) -> None:
        """Each run has such a file under the same name: it is replaced if it is still of the version that was seen."""
        self.check_held()
        if self._versions is None:
            self._ask("pipe_file", self._path(name), content, creates=True)
            return
        for _ in range(TRIES):
            try:
                self._versions[name] = self.replace(name, content, self._versions.get(name))
                return
            except UnsupportedError:  # no run has a lock there, as each was told --unlocked
                self._versions = None
                self.write(name, content)
                return
            except ConflictError:
                if self._lock is None:
                    break
                # It is still held: what a former holder has written late is replaced.
                self._lock.confirm()
                found = self.look(name)
                self._versions.pop(name, None)
                if found is not None:
                    self._versions[name] = found[1]
        raise PipelineError(f"{self.at(name)} was changed by another run meanwhile; run the same command again.")

    def look(self, name: str) -> tuple[bytes, str] | None:
        """An object's content and version, None where there is none."""
        try:
            # The version first: that of an older content is good for no write, that of a newer one would replace it.
            version = str(self._ask("info", self._path(name))["ETag"])
            return self.read(name), version
        except FileNotFoundError:
            return None

    def replace(self, name: str, content: bytes, version: str | None) -> str:
        """Write an object that is still of a version, or None: not there yet. Returns its new version.

        Raises:
            ConflictError: it is not.
            UnsupportedError: the store or its client refuses conditions.
        """
        if self._protocol not in CONDITIONAL:
            raise UnsupportedError(f"the client for {self._protocol}:// has no conditional writes")
        condition = "create" if version is None else "replace"
        options: dict[str, Any] = {"mode": "create"} if version is None else {"IfMatch": version}
        try:
            # In one request however large: the client would send a large one in parts, without the condition.
            answer = self._ask("pipe_file", self._path(name), content, condition=condition, chunksize=2**32, **options)
            return str(answer["ETag"])
        except ConflictError:
            found = self.look(name)
            if found is None or found[0] != content:
                raise
            return found[1]  # an earlier try of ours, whose answer was lost

    def commit(self, name: str, content: bytes) -> None:
        """An object that is there already was written by another process that did the same work."""
        self.check_held()
        try:
            self._ask("pipe_file", self._path(name), content, condition="create", mode="create")
        except UnsupportedError:  # the caller has said --unlocked
            self._ask("pipe_file", self._path(name), content, creates=True)
        except ConflictError:
            if self.read(name) != content:
                raise PipelineError(
                    f"{self.at(name)} was written by another process meanwhile, with other content; "
                    "see that all run the same versions, then run the same command again."
                ) from None

    def put(self, local: Path, name: str) -> None:
        """An upload that arrives late replaces nothing: what is there by then may differ in last digits."""
        patience = local.stat().st_size / 1e6
        if self._protocol in CONDITIONAL:
            self.check_held()
            with contextlib.suppress(ConflictError, UnsupportedError):
                self._ask(
                    "put_file", str(local), self._path(name), condition="create", patience=patience, mode="create"
                )
                return
        # What is there has no receipt: it is left of a run that was cut off.
        self.check_held()
        self._ask("put_file", str(local), self._path(name), creates=True, patience=patience)

    def delete(self, names: Iterable[str]) -> None:
        self.check_held()
        paths = [self._path(name) for name in names]
        if not paths:
            return
        try:
            self._ask("rm", paths)
        except FileNotFoundError:  # a protocol that minds
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._ask("rm_file", path)

    def scratch(self, name: str) -> contextlib.AbstractContextManager[Path]:
        del name
        return _temporary_folder()

    @contextlib.contextmanager
    def fetched(self, names: Iterable[str]) -> Iterator[Path]:
        wanted = list(names)
        with _temporary_folder() as folder:
            # However long it takes: the client gives up where nothing more arrives.
            local = [str(folder / name) for name in wanted]
            self._ask("get", [*map(self._path, wanted)], local, patience=math.inf)
            yield folder

    def staged(self, sizes: Mapping[str, int]) -> Iterator[Path]:
        part: dict[str, int] = {}
        for name, size in sizes.items():
            if part and sum(part.values()) + size > STAGED_BYTES:
                with self.fetched(part) as folder:
                    yield folder
                part = {}
            part[name] = size
        if part:
            with self.fetched(part) as folder:
                yield folder

    # ------------------------------------------------------------------------------------------------ the lock

    def refuse_links(self, name: str = "") -> None:
        del name  # there are none

    @contextlib.contextmanager
    def held(self, *, unlocked: bool = False) -> Iterator[None]:
        """By an object that its holder rewrites; where that ends without a word, the next run waits and takes over."""
        if unlocked:
            warn_unlocked(self.root)
            yield
            return
        lock = StoreLock(self)
        try:
            self.watch()
            # After the versions were seen: had another taken over before, they could be those that it has written.
            lock.confirm()
            self._lock, self.session = lock, lock.token
            yield
            self.check_held()
        finally:
            self._lock, self._versions, self.session = None, None, ""
            lock.release()

    def tidy(self) -> None:
        """Nothing is written aside."""

    def watch(self) -> None:
        if self._protocol in CONDITIONAL:
            self.sizes()
            self._versions = dict(self._tags)

    def check_held(self) -> None:
        if self._lock is not None:
            self._lock.check()

    # ---------------------------------------------------------------------------------------------- the client

    @property
    def _system(self) -> Any:
        system = self._systems.get(os.getpid())
        if system is None:
            options = storage_options(self.root).get(self._protocol, {})
            system = self._kind(skip_instance_cache=True, use_listings_cache=False, **options)
            if options:
                # Of s3fs's own, for connections that break, around those of its client.
                system.retries = 2
            self._systems[os.getpid()] = system
        return system

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _ask(
        self,
        verb: str,
        *arguments: Any,
        creates: bool = False,
        condition: str = "",
        patience: float = 0.0,
        **options: Any,
    ) -> Any:
        """Ask the client; what it cannot do is one sentence.

        Args:
            verb: a method of fsspec's, with its arguments and options.
            creates: that there is no such object is no answer.
            condition: of a write that has one: to `create` what is not there, or to `replace` a version.
            patience: seconds beyond the usual ones; infinite where the client itself gives up if nothing more arrives.

        Raises:
            FileNotFoundError: what is read is not there.
            ConflictError, UnsupportedError: of a write on a condition, as `replace`.
        """
        system = self._system
        if system.async_impl and patience < math.inf:
            options["timeout"] = PATIENCE_SECONDS + patience
        try:
            for _ in range(TRIES - 1):
                # All that is asked may be asked again: who creates knows what it has created.
                with contextlib.suppress(TimeoutError):
                    return getattr(system, verb)(*arguments, **options)
            return getattr(system, verb)(*arguments, **options)
        except Exception as error:  # a dozen exception types of five libraries
            if condition:
                _raise_conflict(error, condition)
            if isinstance(error, FileNotFoundError) and not creates and not condition:
                raise
            raise self._failure(error) from None

    def _failure(self, error: BaseException) -> PipelineError:
        """The sentence for what a client could not do. It may quote secrets, so its own exception goes no further."""
        kinds = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
        said = redact_answer((getattr(error, "strerror", None) or first_line(error)).rstrip("."))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return write_failure(self.disk, error)
        if kinds & {
            "NoCredentialsError",
            "PartialCredentialsError",
            "CredentialRetrievalError",
            "DefaultCredentialsError",
        }:
            return ConfigError(
                f"{self.root}: there are no credentials for it ({said}); set those of the store's own client, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        again = "What was committed is kept"
        if "PermissionError" in kinds:
            return PipelineError(
                f"{self.root} is refused to these credentials ({said}). {again}; use others, then run the same command "
                "again."
            )
        if kinds & {"TimeoutError", "HTTPClientError", "ReadTimeoutError", "ConnectTimeoutError"}:
            silent = "TimeoutError" in kinds or any("Timeout" in kind for kind in kinds)
            said = "it does not answer" if silent else f"it cannot be reached: {said}"
        return PipelineError(
            f"{self.root}: the store failed ({said}). {again}; when it answers, run the same command again."
        )


def storage_options(address: str) -> dict[str, dict[str, Any]]:
    """What fsspec is told of the client for an address, by protocol: how long it waits, never who we are."""
    protocol = address.partition("://")[0]
    if protocol not in ("s3", "s3a"):
        return {}
    client = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": SILENT_SECONDS,
        "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
        "max_pool_connections": CONNECTIONS,
    }
    # One part of a large file in memory at a time, and no request for the size of a small one before it is read.
    return {protocol: {"config_kwargs": client, "max_concurrency": 1}}


def _file_system(protocol: str) -> Any:
    """The class of fsspec for a protocol."""
    import fsspec

    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        mend = f"pip install {package}" if package else first_line(error).rstrip(".")
        raise ConfigError(f"output.path: {protocol}:// needs a package that is not installed: {mend}.") from None
    except ValueError:
        raise ConfigError(f"output.path: fsspec knows no protocol {protocol}://; s3:// and gs:// are two.") from None


def _raise_conflict(error: BaseException, condition: str) -> None:
    """Tell what a store says of a condition from what else can fail.

    Raises:
        ConflictError: the condition does not hold.
        UnsupportedError: the store knows no conditions.
    """
    answers = [getattr(cause, "response", None) for cause in causes(error)]
    status = next((answer["ResponseMetadata"]["HTTPStatusCode"] for answer in answers if answer), None)
    # What is to be replaced may be gone (404), or be written by another at this very moment (409).
    conflicts = (404, 409, 412) if condition == "replace" else (409, 412)
    if isinstance(error, FileExistsError) or status in conflicts:
        raise ConflictError from None
    if status == 501:
        raise UnsupportedError("the store refuses conditional writes") from None


def warn_unlocked(root: str) -> None:
    """Say that nothing keeps a second run out."""
    logger.warning("%s is not locked: see that no other run writes there before this one has ended.", root)


def _is_at(path: Path, handle: int) -> bool:
    """Whether what is open lies at a path still."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder in the temporary space, removed at the end. Those that killed processes left are removed first."""
    space = Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        with writing(space):
            for left in space.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(OSError), _abandoned(left):
                    shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=space))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            # Locked before it has the name by which it is known: another process may look for what is abandoned.
            marker = made / f"{MARKER}.tmp"
            marker.write_bytes(MARK)
            stack.enter_context(_locked(marker))
            marker.rename(made / MARKER)
            folder = made / "files"
            folder.mkdir()
        yield folder


@contextlib.contextmanager
def _abandoned(folder: Path) -> Iterator[None]:
    """Hold a temporary folder that a process of this user has made, and that no process uses any more.

    Raises:
        OSError: it is in use.
        FileNotFoundError: it is not such a folder.
    """
    marker, name = folder / MARKER, re.fullmatch(rf"{TEMPORARY}[a-z0-9_]{{8}}", folder.name)
    own = name and folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    if not own or marker.is_symlink() or marker.read_bytes() != MARK:
        raise FileNotFoundError(folder)
    with _locked(marker):
        yield


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock a file for as long as its process lives.

    Raises:
        OSError: it is locked.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the operating system refuses, as one sentence."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the operating system cannot read, as one sentence; what is not there is a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PipelineError(
            f"Cannot read {path}: {error.strerror or first_line(error)}; mend the disk or its permissions."
        ) from error
