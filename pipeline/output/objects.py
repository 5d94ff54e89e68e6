"""An output under a prefix of an object store, through fsspec. `locks.py` says why late requests do no harm.

Credentials come from the environment, as the protocol's own client finds them.
"""

import contextlib
import errno
import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.addresses import check_address
from pipeline.core.errors import (
    ConfigError,
    PipelineError,
    TemporaryError,
    causes,
    explained,
    first_line,
    is_temporary,
    write_failure,
)
from pipeline.core.redaction import redact_answer
from pipeline.output.local import temporary_folder
from pipeline.output.locks import LOCK, ConflictError, StoreLock, UnsupportedError, part_locks, refuse_parts
from pipeline.output.store import Store

# The S3 client ends an attempt after so long without a byte, and makes so many: half a minute in all where the store
# answers with errors at once.
CONNECT_SECONDS, SILENT_SECONDS, ATTEMPTS = 10.0, 30.0, 8
# The client's own time-outs do not end an upload that is never answered (s3fs 2026.9). It is given up after this, and a
# second more for each megabyte, and tried so often.
PATIENCE_SECONDS, TRIES = 200.0, 3
# Requests for small files under way at once.
CONNECTIONS = 32
# Bytes of a dataset that lie on the local disk at once while it is published from an object store.
STAGED_BYTES = 4 * 10**9
S3 = ("s3", "s3a")
# Protocols whose client can write on the condition that an object is still of some version.
CONDITIONAL = S3


class ObjectStore(Store):
    """A prefix in an object store.

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
        from fsspec.registry import get_filesystem_class

        cannot = f"output.path: {self._protocol}:// cannot be used"
        with explained(cannot, errors=(ImportError, ValueError), kind=ConfigError):
            self._kind = get_filesystem_class(self._protocol)
        self._base: str = self._kind._strip_protocol(self.root)
        # One client for each process: its connections and threads do not survive a fork.
        self._systems: dict[int, Any] = {}
        # The version of each file in the last listing; small files that were read, with the version that they had.
        self._tags: dict[str, str] = {}
        self._known: dict[str, tuple[str, bytes]] = {}
        self._lock: StoreLock | None = None
        # Whether the store can write on the condition that an object is still of some version, or not there.
        self._conditional = self._protocol in CONDITIONAL
        # The versions of the files that are written on conditions, None where there are no conditions.
        self._versions: dict[str, str | None] | None = None

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    # ---------------------------------------------------------------------------------------------- what is read

    def entries(self) -> list[str]:
        try:
            found = self._ask("ls", self._base, detail=False)
        except FileNotFoundError:
            bucket = self._base.partition("/")[0]
            if not self._ask("exists", bucket):
                raise ConfigError(
                    f"output.path: {self._protocol}://{bucket} does not exist, or these credentials may not see "
                    "it; create the bucket first, or name another."
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

    def look(self, name: str) -> tuple[bytes, str] | None:
        """An object's content and version, None where there is none."""
        try:
            # The version first: with that of an older content no write succeeds, with that of a newer one it would.
            version = str(self._ask("info", self._path(name))["ETag"])
            return self.read(name), version
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def fetched(self, names: Iterable[str]) -> Iterator[Path]:
        wanted = list(names)
        with temporary_folder() as folder:
            # However long it takes: the client gives up where nothing more arrives.
            local = [str(folder / name) for name in wanted]
            self._ask("get", [*map(self._path, wanted)], local, patience=math.inf)
            yield folder

    def staged(self, sizes: Mapping[str, int]) -> Iterator[Path]:
        waiting = list(sizes)
        while waiting:
            totals = itertools.accumulate(sizes[name] for name in waiting)
            fitting = max(1, sum(total <= STAGED_BYTES for total in totals))
            with self.fetched(waiting[:fitting]) as folder:
                yield folder
            waiting = waiting[fitting:]

    # ------------------------------------------------------------------------------------------- what is written

    def write(self, name: str, content: bytes) -> None:
        """Every run has a file of this name: replace it if it is still of the version that this run has seen."""
        self.check_held()
        if self._versions is None or not self._conditional:
            self._ask("pipe_file", self._path(name), content)
            return
        for _ in range(TRIES):
            try:
                self._versions[name] = self.replace(name, content, self._versions.get(name))
                return
            except UnsupportedError:  # no run has a lock there, as each was told --unlocked
                self.write(name, content)
                return
            except ConflictError:
                if self._lock is None:
                    break
                # The lock is still held: replace what a former holder has written late.
                self._lock.confirm()
                found = self.look(name)
                self._versions[name] = found[1] if found else None
        raise PipelineError(f"{self.at(name)} was changed by another run meanwhile; run the same command again.")

    def replace(self, name: str, content: bytes, version: str | None) -> str:
        """Write an object that is still of a version, or None: not there yet. Returns its new version.

        An object that has the content already is one that this process, or another that did the same work, has written.

        Raises:
            ConflictError: it is not.
            UnsupportedError: the store or its client refuses conditions.
        """
        if not self._conditional:
            raise UnsupportedError(f"{self._protocol}:// has no conditional writes")
        condition: dict[str, Any] = {"mode": "create"} if version is None else {"IfMatch": version}
        try:
            # In one request however large: the client would send a large one in parts, without the condition.
            return str(self._ask("pipe_file", self._path(name), content, chunksize=2**32, **condition)["ETag"])
        except ConflictError:
            found = self.look(name)
            if found is None or found[0] != content:
                raise
            return found[1]

    def commit(self, name: str, content: bytes) -> None:
        self.check_held()
        try:
            self.replace(name, content, None)
        except UnsupportedError:  # the caller has said --unlocked
            self._ask("pipe_file", self._path(name), content)
        except ConflictError:
            raise PipelineError(
                f"{self.at(name)} was written by another process meanwhile, with other content; "
                "see that all run the same versions, then run the same command again."
            ) from None

    def put(self, local: Path, name: str) -> None:
        """An upload that arrives late replaces nothing: a file that exists by then may differ in last digits."""
        upload, patience = ("put_file", str(local), self._path(name)), local.stat().st_size / 1e6
        self.check_held()
        if self._conditional:
            with contextlib.suppress(ConflictError, UnsupportedError):
                self._ask(*upload, patience=patience, mode="create")
                return
            self.check_held()
        # The file that exists has no receipt: a run that was cut off has left it.
        self._ask(*upload, patience=patience)

    def delete(self, names: Iterable[str]) -> None:
        self.check_held()
        paths = [self._path(name) for name in names]
        if not paths:
            return
        try:
            self._ask("rm", paths)
        except FileNotFoundError:  # some protocols refuse the whole list for one that is gone
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._ask("rm_file", path)

    def scratch(self, name: str) -> AbstractContextManager[Path]:
        del name
        return temporary_folder()

    # ------------------------------------------------------------------------------------------------ the lock

    @contextlib.contextmanager
    def _locked(self, name: str, patience: float = 0.0) -> Iterator[StoreLock]:
        """An object that the holder rewrites every few seconds. When it stops, the next run waits and takes over."""
        outer, lock = self._lock, StoreLock(self, name, patience)
        try:
            self._lock = lock
            yield lock
            self.check_held()
        finally:
            self._lock = outer
            lock.release()

    @contextlib.contextmanager
    def _exclusive(self, patience: float = 0.0) -> Iterator[None]:
        with self._locked(LOCK, patience) as lock:
            try:
                self.watch()
                # After the versions were seen: had another taken over before, they could be those that it has written.
                lock.confirm()
                refuse_parts(self, part_locks(self._tags, self._part))
                self.session = lock.token
                yield
            finally:
                self._versions, self.session = None, ""

    def watch(self) -> None:
        if self._conditional:
            self.sizes()
            self._versions = {**self._tags}

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
                # s3fs's own retries for connections that break, around those of its client.
                system.retries = 2
            self._systems[os.getpid()] = system
        return system

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _ask(self, verb: str, *arguments: Any, patience: float = 0.0, **options: Any) -> Any:
        """Call a method of the client. An error is raised as one sentence; a missing file that is read stays a
        FileNotFoundError.

        A write has a condition with `mode="create"` (the object does not exist), or with `IfMatch` (it is still of that
        version), and may raise what `replace` does. `patience` are seconds beyond the usual ones; infinite where the
        client itself gives up if nothing more arrives.
        """
        system = self._system
        if system.async_impl and patience < math.inf:
            options["timeout"] = PATIENCE_SECONDS + patience
        try:
            for _ in range(TRIES - 1):
                # Every request may be sent again: whoever creates an object knows what it has created.
                with contextlib.suppress(TimeoutError):
                    return getattr(system, verb)(*arguments, **options)
            return getattr(system, verb)(*arguments, **options)
        except Exception as error:  # a dozen exception types of five libraries
            if "IfMatch" in options or "mode" in options:
                self._raise_conflict(error, replaces="IfMatch" in options)
            if isinstance(error, FileNotFoundError) and verb not in ("pipe_file", "put_file"):
                raise
            raise self._failure(error) from None

    def _raise_conflict(self, error: BaseException, *, replaces: bool) -> None:
        """Tell a store's answer to a condition from all else that can fail. `replaces`: the condition was `IfMatch`."""
        answers = [getattr(cause, "response", None) for cause in causes(error)]
        status = next((answer["ResponseMetadata"]["HTTPStatusCode"] for answer in answers if answer), None)
        # Another may write the object at this very moment (409); what is to be replaced may be gone (404).
        if isinstance(error, FileExistsError) or status in (409, 412) or (status == 404 and replaces):
            raise ConflictError from None
        if status == 501:
            self._conditional = False
            raise UnsupportedError("the store refuses conditional writes") from None

    def _failure(self, error: BaseException) -> PipelineError:
        """The sentence for what a client could not do. It may quote secrets, so its own exception goes no further."""
        kinds = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
        said = redact_answer((getattr(error, "strerror", None) or first_line(error)).rstrip("."))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return write_failure(self.disk, error)
        if any("Credential" in kind for kind in kinds):
            return ConfigError(
                f"{self.root}: there are no credentials for it ({said}); set those of the store's own client, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        again = "Finished shards are kept"
        if "PermissionError" in kinds:
            return PipelineError(
                f"{self.root}: access denied ({said}). {again}; use other credentials, then run the same command again."
            )
        if any("Timeout" in kind for kind in kinds):
            said = "it does not answer"
        elif "HTTPClientError" in kinds:
            said = f"it cannot be reached: {said}"
        return (TemporaryError if is_temporary(error) else PipelineError)(
            f"{self.root}: the store failed ({said}). {again}; when it answers, run the same command again."
        )


def storage_options(address: str) -> dict[str, dict[str, Any]]:
    """What fsspec is told of the client for an address, by protocol: how long it waits, never who we are."""
    protocol = address.partition("://")[0]
    if protocol not in S3:
        return {}
    client = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": SILENT_SECONDS,
        "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
        "max_pool_connections": CONNECTIONS,
    }
    # One part of a large file in memory at a time, and no request for the size of a small one before it is read.
    return {protocol: {"config_kwargs": client, "max_concurrency": 1}}
