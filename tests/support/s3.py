"""An object store on the loopback: moto's S3, over real sockets, for the real client; it can be told to fail."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from s3fs import S3FileSystem
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.conftest import (
    fgsm,
    without_run,
)
from tests.support.processes import run_fgsm

KEY, SECRET = "AKIAHUSHHUSH", "hush/hush+hush"
Answer = Callable[..., Any]


@dataclass
class Fault:
    """What goes wrong with the next requests that match: a status to answer; `hang`, never to answer; or `hold`, to
    serve it late. Either lasts until `released`, the end of the server. `who` is a key of whoever asks.
    """

    method: str
    path: str
    kind: int | str
    times: int
    after: int
    who: str = ""


@dataclass
class S3:
    """The server; `requests` lists what was asked of it, as (method, path and query, status).

    `conditions` says what it does with If-Match and If-None-Match: `honoured`, `ignored` or `refused`. `held` are
    the paths of requests that wait to be served late.
    """

    endpoint: str = ""
    conditions: str = "honoured"
    held: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    # Held while an object is written: moto sees whether a condition holds, and writes, in two steps.
    writing: threading.Lock = field(default_factory=threading.Lock)

    def fail(
        self, method: str, path: str, kind: int | str, *, times: int = 10**6, after: int = 0, who: str = ""
    ) -> None:
        """Let the next `times` requests fail that match, but for the first `after`."""
        self.faults.append(Fault(method, path, kind, times, after, who))

    def release(self) -> None:
        """Serve what is held."""
        self.released.set()
        self.released = threading.Event()

    def asked(self, method: str, path: str = "") -> list[str]:
        return [asked for verb, asked, _ in self.requests if re.fullmatch(method, verb) and re.search(path, asked)]

    @property
    def listings(self) -> list[str]:
        """Requests for all that is below a prefix."""
        return self.asked("GET", "list-type=2.*delimiter=&")

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this store and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "NO_PROXY": "127.0.0.1",
        }

    def make(self, bucket: str) -> None:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(bucket, "us-east-1")

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """What lies below a prefix, by names relative to it."""
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys
        return {name.removeprefix(prefix): key.value for name, key in sorted(keys.items()) if name.startswith(prefix)}

    def write(self, bucket: str, name: str, content: bytes | None) -> None:
        """Put an object there behind the client's back; None removes it."""
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        with self.writing:
            if content is None:
                backend.delete_object(bucket, name)
            else:
                backend.put_object(bucket, name, content)

    def _take(self, method: str, path: str, who: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                matches = re.fullmatch(fault.method, method) and re.search(fault.path, path) and fault.who in who
                if fault.times and matches:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def __call__(self, environ: dict[str, Any], start_response: Answer) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if environ.get("QUERY_STRING"):
            path = f"{path}?{environ['QUERY_STRING']}"
        fault = self._take(method, path, environ.get("HTTP_AUTHORIZATION", ""))
        if fault is not None and fault.kind == "hold":
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            released = self.released
            self.held.append(path)
            released.wait()
            self.held.remove(path)
        elif fault is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            self.requests.append((method, path, fault.kind if isinstance(fault.kind, int) else 0))
            if fault.kind == "hang":
                self.released.wait()
            return _refuse(fault.kind if isinstance(fault.kind, int) else 500, start_response)
        if self.conditions != "honoured" and method == "PUT":  # those of reads are as old as S3
            asked = [environ.pop(header, None) for header in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")]
            if self.conditions == "refused" and any(asked):
                return _refuse(501, start_response)

        def started(status: str, headers: Any, *rest: Any) -> Any:
            self.requests.append((method, path, int(status.split()[0])))
            return start_response(status, headers, *rest)

        if environ.get("CONTENT_LENGTH"):
            # Before the lock is taken: a client that was stopped may never send the rest.
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        with contextlib.nullcontext() if method in ("GET", "HEAD") else self.writing:
            answer: Iterable[bytes] = self.app(environ, started)
        return answer

    app: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))


def _refuse(status: int, start_response: Answer) -> list[bytes]:
    code = {403: "AccessDenied", 500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}[status]
    start_response(f"{status} {code}", [("Content-Type", "application/xml")])
    return [f"<Error><Code>{code}</Code><Message>an injected fault for {KEY}</Message></Error>".encode()]


class _Handler(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """The tests read `requests` instead."""


@contextlib.contextmanager
def running_s3() -> Iterator[S3]:
    """A store that serves until the end of the block."""
    s3 = S3()
    server = make_server("127.0.0.1", 0, s3, threaded=True, request_handler=_Handler)
    s3.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        s3.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def lock_of(objects: dict[str, bytes]) -> dict[str, Any] | None:
    """What the lock of a run says, None where there is none."""
    found = objects.get(".run/lock")
    content: dict[str, Any] = json.loads(found) if found else {"released": True}
    return None if content.get("released") else content


# ------------------------------------------------------------------- what tests of runs in a store need

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3
    # Clients that fsspec keeps for who asks alike would ask the server of the module before.
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """The store with nothing asked of it yet; its client is less patient than in life and has a temporary space."""
    server.requests.clear()
    server.faults.clear()
    server.conditions = "honoured"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.output.locks.BEAT_SECONDS", 0.4)
    monkeypatch.setattr("pipeline.output.locks.STALE_SECONDS", 3.0)
    monkeypatch.setattr("pipeline.output.objects.ATTEMPTS", 2)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield server
    assert not list((tmp_path / "temporary").glob("*fgsm-pipeline-*"))


@pytest.fixture
def bucket(s3: S3) -> str:
    name = f"bucket-{next(NUMBERS)}"
    s3.make(name)
    return name


@pytest.fixture
def out(bucket: str) -> str:
    return f"s3://{bucket}/some/where"


def there(s3: S3, out: str) -> dict[str, bytes]:
    bucket, _, prefix = out.removeprefix("s3://").partition("/")
    return s3.objects(bucket, f"{prefix}/")


def alter(s3: S3, out: str, name: str, content: bytes | None) -> None:
    bucket, _, prefix = out.removeprefix("s3://").partition("/")
    s3.write(bucket, f"{prefix}/{name}", content)


def shard_name(s3: S3, out: str, name: str) -> str:
    """The whole name of a shard's file, which ends in the run's id."""
    (found,) = (stored for stored in there(s3, out) if without_run(stored) == name)
    return found


def shards(objects: dict[str, bytes]) -> dict[str, str]:
    """sha256 of every Parquet object."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in objects.items() if name.endswith(".parquet")}


def failed(*arguments: str | Path, code: int = 1) -> str:
    """The sentence of a command that fails, without a secret in it."""
    result = fgsm(*arguments)
    assert result.exit_code == code, result.output
    assert "--debug" in arguments or "Traceback" not in result.output
    assert not any(secret in result.output for secret in (KEY, SECRET, "hush"))
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def run_there(environment: dict[str, str], temporary: str, cache: str, log: str, arguments: list[str]) -> None:
    """The body of a process that uses the store."""
    os.environ.update(environment)
    tempfile.tempdir = temporary
    run_fgsm(cache, log, arguments)
