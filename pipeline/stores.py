"""Where an output lies: a folder on a disk, or a prefix in an object store such as `s3://bucket/prefix`.

A store has few verbs, over names relative to its root with `/` between their parts. On a disk a file is written aside,
synced and renamed; an object appears whole when its upload ends. So in either a reader sees a file or none.
Everything that fails is one sentence; only that something is not there is a `FileNotFoundError`.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config import check_address, is_address
from pipeline.errors import ConfigError, PipelineError, causes, first_line, write_failure
from pipeline.guard import redact_answer

LOCK = ".run/lock"
SCRATCH = ".run/tmp"

# Who holds an object store rewrites its lock this often; one that has not changed for so long is nobody's any more.
BEAT_SECONDS, STALE_SECONDS = 10.0, 30.0
# Longer than it takes to delete a lock that was read, and to make one.
SETTLE_SECONDS = 2.0
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
# Folders in the temporary space; a dot first until they are locked.
TEMPORARY = "fgsm-pipeline-"
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
    `local` says whether that is all of the dataset, rather than the shards in flight.
    """

    root: str
    disk: Path
    local: bool

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
    def held(self) -> contextlib.AbstractContextManager[None]:
        """Hold the place against a second run.

        Raises:
            ConfigError: a link in it leads elsewhere.
            PipelineError: another process holds it, or it cannot be written.
        """

    @abstractmethod
    def check_held(self) -> None:
        """See that the place is still held: whoever writes asks by itself, whoever has others write there asks this.

        Raises:
            PipelineError: it was taken over.
        """


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
        path = self.disk / name
        self._replace(path, content, path.with_name(f".{path.name}.tmp"))

    def commit(self, name: str, content: bytes) -> None:
        # Aside by a name of its own, as on a cluster two may write the same receipt; and where who holds the folder
        # next clears what a crash has left.
        self._replace(self.disk / name, content, self.disk / SCRATCH / f"{Path(name).name}.{secrets.token_hex(6)}")

    def _replace(self, path: Path, content: bytes, scratch: Path) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.parent.mkdir(parents=True, exist_ok=True)
            try:
                # A new file: one that is there is left from a crash, or a link to what must not be written.
                scratch.unlink(missing_ok=True)
                with scratch.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                scratch.rename(path)
            finally:
                scratch.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def put(self, local: Path, name: str) -> None:
        path = self.disk / name
        with writing(path):
            with local.open("rb") as file:
                os.fsync(file.fileno())
            path.parent.mkdir(exist_ok=True)
            local.rename(path)
            _sync_folder(path.parent)

    def delete(self, names: Iterable[str]) -> None:
        emptied = set()
        with writing(self.disk):
            for name in names:
                (self.disk / name).unlink(missing_ok=True)
                emptied.add((self.disk / name).parent)
        for folder in emptied - {self.disk}:
            if folder.parent == self.disk:  # not that of the receipts, by which a folder is known as ours
                with contextlib.suppress(OSError):
                    folder.rmdir()

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        # On the same disk, so that a file can be renamed into its place.
        # A name of its own: another try of the shard may still be under way, on a node that was given up.
        folder = self.disk / SCRATCH / f"{name}.{secrets.token_hex(6)}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
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
    def held(self) -> Iterator[None]:
        """The operating system lets go when the process ends."""
        self.refuse_links()
        try:
            (self.disk / ".run/receipts").mkdir(parents=True, exist_ok=True)
            there = self.disk.stat()
        except OSError as error:
            raise write_failure(self.disk, error) from None
        with self._held_here((there.st_dev, there.st_ino)), self._locked_out():
            shutil.rmtree(self.disk / SCRATCH, ignore_errors=True)
            try:
                yield
            finally:
                # What a node that was lost leaves: once all is there no command holds the folder again.
                shutil.rmtree(self.disk / SCRATCH, ignore_errors=True)

    def check_held(self) -> None:
        """The operating system gives it to nobody else."""

    @contextlib.contextmanager
    def _held_here(self, folder: tuple[int, int]) -> Iterator[None]:
        """Against other threads of this process."""
        with _HELD_LOCK:
            if folder in _HELD:
                raise _in_use(self.root, f"process {os.getpid()}")
            _HELD.add(folder)
        try:
            yield
        finally:
            with _HELD_LOCK:
                _HELD.discard(folder)

    @contextlib.contextmanager
    def _locked_out(self) -> Iterator[None]:
        """Against other processes."""
        try:
            lock = (self.disk / LOCK).open("a+")
        except OSError as error:
            raise write_failure(self.disk, error) from None
        with lock:
            try:
                # lockf, not flock: a worker inherits an flock, and would hold the folder for the seconds that it
                # outlives a killed run.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise write_failure(self.disk, error) from None  # a file system without locks
                lock.seek(0)
                raise _in_use(self.root, f"process {lock.read().strip()}") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


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
        # While it is held: what the lock says of us, and why it is ours no more.
        self._lost: str | None = None

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
        self.check_held()
        self._ask("pipe_file", self._path(name), content, creates=True)

    def commit(self, name: str, content: bytes) -> None:
        """An object that is there already was written by another process that did the same work."""
        self.check_held()
        try:
            self._ask("pipe_file", self._path(name), content, creates=True, mode="create")
        except FileExistsError:
            if self.read(name) != content:
                raise PipelineError(
                    f"{self.at(name)} was written by another process meanwhile, with other content; "
                    "see that all run the same versions, then run the same command again."
                ) from None

    def put(self, local: Path, name: str) -> None:
        self.check_held()
        patience = local.stat().st_size / 1e6
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
    def held(self) -> Iterator[None]:
        """By an object that its holder rewrites; where that ends without a word, the next run waits and takes over."""
        own = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8), "beat": 0}
        self._take(own)
        self._lost, over = None, threading.Event()
        beating = threading.Thread(target=self._keep, args=(own, over), daemon=True, name="lock")
        beating.start()
        try:
            yield
            self.check_held()
        finally:
            over.set()
            # It must not write the lock again; a store that hangs must not hold the end up for long.
            beating.join(30.0)
            lost, self._lost = self._lost, None
            if lost is None:
                with contextlib.suppress(PipelineError):
                    self.delete([LOCK])

    def _take(self, own: Mapping[str, Any]) -> None:
        """Make the lock; where there is one, see whether its holder lives."""
        waits = False
        while True:
            with contextlib.suppress(FileExistsError):
                self._write_lock(own, mode="create")
                if waits:
                    self._settle(own)
                return
            before = self._read_lock()
            if before is None:
                continue
            if before.get("token") == own["token"]:  # a first answer was lost, and the client asked again
                return
            logger.info("%s has a lock of %s; waiting to see whether that lives.", self.root, _holder(before))
            end = time.monotonic() + STALE_SECONDS
            while (now := self._read_lock()) == before and time.monotonic() < end:
                time.sleep(min(1.0, STALE_SECONDS / 10))
            if now == before:
                logger.warning("The lock of %s is taken over: it has not changed for %g s.", self.root, STALE_SECONDS)
                self.delete([LOCK])
                waits = True
            elif now is not None:
                raise _in_use(self.root, _holder(now))

    def _settle(self, own: Mapping[str, Any]) -> None:
        """Of two runs that took the same dead lock over at once, one has deleted the other's new one."""
        time.sleep(SETTLE_SECONDS)
        now = self._read_lock()
        if now is None or now.get("token") != own["token"]:
            raise _in_use(self.root, _holder(now or {}))

    def _keep(self, own: dict[str, Any], over: threading.Event) -> None:
        """Say every few seconds that the holder lives, until it is over."""
        while not over.wait(BEAT_SECONDS):
            # A store that fails for a while is no reason to give up: who writes a shard will hear of it.
            with contextlib.suppress(PipelineError):
                there = self._read_lock()
                if there is None or there.get("token") != own["token"]:
                    by = "removed" if there is None else f"taken over by another run ({_holder(there)})"
                    self._lost = f"The lock of {self.root} was {by}; let no more than one run write there."
                    return
                own["beat"] += 1
                self._write_lock(own)

    def check_held(self) -> None:
        if self._lost is not None:
            raise PipelineError(self._lost)

    def _write_lock(self, own: Mapping[str, Any], **mode: Any) -> None:
        self._ask("pipe_file", self._path(LOCK), json.dumps(own).encode(), creates=True, **mode)

    def _read_lock(self) -> dict[str, Any] | None:
        try:
            there = json.loads(self.read(LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            there = None
        return there if isinstance(there, dict) else {}

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

    def _ask(self, verb: str, *arguments: Any, creates: bool = False, patience: float = 0.0, **options: Any) -> Any:
        """Ask the client; what it cannot do is one sentence.

        Args:
            verb: a method of fsspec's, with its arguments and options.
            creates: that there is no such object is no answer.
            patience: seconds beyond the usual ones; infinite where the client itself gives up if nothing more arrives.

        Raises:
            FileNotFoundError: what is read is not there.
            FileExistsError: what is created is there.
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
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            if creates:  # there is no bucket any more
                raise self._failure(error) from None
            raise
        except Exception as error:  # a dozen exception types of five libraries; all mean the same here
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


def _in_use(root: str, holder: str) -> PipelineError:
    return PipelineError(f"{root} is in use by another run ({holder}); wait for it.")


def _holder(lock: Mapping[str, Any]) -> str:
    return f"process {lock.get('process', '?')} on {lock.get('host', '?')}"


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder in the temporary space, removed at the end. Those that killed processes left are removed first."""
    space = Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        with writing(space):
            for left in space.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(OSError), _locked(left):
                    shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=f".{TEMPORARY}", dir=space))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            stack.enter_context(_locked(made))
            folder = made.rename(space / made.name[1:])
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder for as long as its process lives.

    Raises:
        OSError: it is locked, or another user's.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
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


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk: the entry belongs to the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
