"""A Hub on the loopback: enough of the Hugging Face Hub's HTTP API, over real sockets, for its real client.

Datasets only: create, info, tree, preupload, Git LFS, Xet's token, commit, download. It checks tokens and
permissions, pages its listings, refuses a commit of what was never uploaded, and can be told to fail.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Entries of a page of the tree: few, so that every listing of a test has several.
PAGE = 5
# What a request that is to wait waits: more than the client's display takes to say something.
WAIT_SECONDS = 1.5
# What the Hub's own .gitattributes keeps in LFS, of what a test uploads.
LFS_SUFFIXES = (".parquet", ".png")


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and whether it may write."""

    name: str
    writes: bool = True


@dataclass(frozen=True)
class Blob:
    """A file of a commit. `content` is None where only Xet's storage has it."""

    size: int
    oid: str
    sha256: str | None = None
    content: bytes | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def git_blob(content: bytes) -> Blob:
    """A file that Git holds itself."""
    return Blob(len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), None, content)


def lfs_blob(sha256: str, size: int, content: bytes | None) -> Blob:
    """A file that Git holds a pointer to."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Blob(size, git_blob(pointer).oid, sha256, content)


@dataclass
class Repository:
    """A dataset repository: its commits, each a whole tree, the newest last."""

    private: bool
    commits: list[dict[str, Blob]] = field(default_factory=lambda: [{".gitattributes": git_blob(b"*.parquet lfs\n")}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[-1]

    def sha(self, index: int = -1) -> str:
        number = index % len(self.commits)
        return hashlib.sha1(f"{number} {sorted(self.commits[number].items())!r}".encode()).hexdigest()

    def at(self, revision: str) -> dict[str, Blob] | None:
        shas = {self.sha(index): commit for index, commit in enumerate(self.commits)}
        return self.files if revision == "main" else shas.get(revision)


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    kind: a status to answer, or `drop` (the connection is reset in the middle of the body), `lose` (the request is
    served and its answer never arrives), `hang` (no answer until the Hub is released), `wait` (served after a while).
    `after` requests that match are served before.
    """

    method: str
    path: str
    kind: int | str
    times: int
    after: int
    body: str


class Hub(ThreadingHTTPServer):
    """The server; `requests` lists what was asked of it, as (method, path, status)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.users = {"hf_writer": User("user"), "hf_reader": User("user", writes=False), "hf_other": User("other")}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.xet_folder: Path | None = None
        self.requests: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.hanging = threading.Event()
        self.released = threading.Event()
        self.lock = threading.RLock()

    def fail(
        self,
        method: str,
        path: str,
        kind: int | str,
        *,
        times: int = 1,
        after: int = 0,
        body: str = "an injected fault",
    ) -> None:
        """Let the next `times` requests fail that match: a method, and a regular expression for the path."""
        self.faults.append(Fault(method, path, kind, times, after, body))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if not fault.times or fault.method != method or not re.search(fault.path, path):
                    continue
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def asked(self, method: str, path: str = "") -> list[str]:
        """The paths of the requests by that method that match a regular expression."""
        return [there for verb, there, _ in self.requests if verb == method and re.search(path, there)]

    @property
    def writes(self) -> list[str]:
        """Requests that change what the Hub holds."""
        return self.asked("PUT") + self.asked("POST", "/commit/|/repos/create")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed and connections that are dropped are what the tests are about."""


def push(hub: "Hub", folder: Path, ignore: str = ".run", to: str = "user/name") -> None:
    """Commit the files of a folder, but those below another, to a dataset, which is made where it is not there."""
    files = {path.relative_to(folder): path for path in folder.rglob("*.*") if path.is_file()}
    repository = hub.repositories.setdefault(to, Repository(private=False))
    repository.commits.append(
        {str(name): git_blob(path.read_bytes()) for name, path in files.items() if name.parts[0] != ignore}
    )


def environment(hub: "Hub", home: Path, **more: str) -> dict[str, str]:
    """What a process needs to see no other Hub than this one."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


def read_back(script: str, *arguments: str, hub: "Hub", folder: Path, **more: str) -> list[str]:
    """What a script prints, line by line, that sees this Hub, in a folder where no name of a repository is a folder."""
    read = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment(hub, folder / "home", PYTHONPATH=str(Path.cwd()), **more),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=folder,
    )
    assert read.returncode == 0, read.stderr
    return read.stdout.splitlines()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that serves until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class _RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: without this the second waits 40 ms for an acknowledgement of the first.
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """The tests read `requests` instead."""

    def _serve(self) -> None:
        fault = self.server.take_fault(self.command, self.path)
        if fault is not None and fault.kind == "drop":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            return self._reset()
        self.body = self._read_body()
        if fault is not None and fault.kind == "hang":
            self.server.hanging.set()
            self.server.released.wait()
            return self._reset()
        if fault is not None and isinstance(fault.kind, int):
            return self._answer(fault.kind, fault.body.encode(), {"Content-Type": "text/plain"})
        if fault is not None and fault.kind == "wait":
            time.sleep(WAIT_SECONDS)
        self.lost = fault is not None and fault.kind == "lose"
        try:
            with self.server.lock:
                self._route()
        except _RefusedError as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            self._json({"error": refused.message}, refused.status, headers)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reset(self) -> None:
        """Close the connection the hard way, as a network that breaks does."""
        self.server.requests.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if getattr(self, "lost", False):
            return self._reset()
        self.server.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return None

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    # ------------------------------------------------------------------------------------------ routing

    def _route(self) -> None:
        self.path_only, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        dataset = r"/api/datasets/([^/]+/[^/]+)"
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("GET", dataset, self._info),
            ("GET", dataset + r"/revision/([^/]+)", self._info),
            ("GET", dataset + r"/tree/([^/]+)(?:/(.*))?", self._tree),
            ("POST", dataset + r"/paths-info/([^/]+)", self._paths_info),
            ("POST", dataset + r"/preupload/main", self._preupload),
            ("POST", dataset + r"/commit/main", self._commit),
            ("GET", dataset + r"/xet-write-token/main", self._xet_token),
            ("POST", r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._lfs_put),
            ("POST", r"/lfs/([0-9a-f]{64})/verify", self._lfs_verify),
            ("HEAD", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("GET", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for method, pattern, serve in routes:
            found = re.fullmatch(pattern, self.path_only)
            if found and method == self.command:
                return serve(*(part and unquote(part) for part in found.groups()))
        raise _RefusedError(404, f"this Hub does not know {self.command} {self.path_only}")

    def _user(self) -> User | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in self.server.users:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return self.server.users[given]

    def _writer(self, namespace: str) -> None:
        user = self._user()
        if user is None:
            raise _RefusedError(401, "Invalid username or password.")
        if user.name != namespace or not user.writes:
            raise _RefusedError(403, f"You don't have the rights to write to the namespace {namespace}")

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        user, repository = self._user(), self.server.repositories.get(name)
        if repository is None or (repository.private and (user is None or user.name != name.split("/")[0])):
            raise _RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._writer(name.split("/")[0])
        return repository

    # ---------------------------------------------------------------------------------------------- API

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _RefusedError(401, "Invalid username or password.")
        self._json({"name": user.name, "type": "user"})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        self._writer(asked["organization"])
        url = f"{self.server.endpoint}/datasets/{name}"
        if name in self.server.repositories:
            return self._json({"error": "You already created this dataset repo", "url": url}, 409)
        self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self._json({"url": url})

    def _validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        if not re.match(r"---\n[\s\S]*?\n---\n", content):
            return self._json({"errors": [{"message": "there is no YAML"}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        files = self._files(repository, revision)
        sha = repository.sha() if revision == "main" else revision
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "private": repository.private, "sha": sha, "siblings": siblings, "tags": []})

    def _files(self, repository: Repository, revision: str) -> dict[str, Blob]:
        files = repository.at(revision)
        if files is None:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return files

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.sha256 is not None:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        return entry

    def _tree(self, name: str, revision: str, folder: str | None) -> None:
        files = self._files(self._repository(name), revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(prefix)}
        folders = {prefix + path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
        ]
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries += [self._entry(path, blob) for path, blob in inside.items() if deep or "/" not in path[len(prefix) :]]
        if not inside:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            follow = f"{self.server.endpoint}{self.path_only}?recursive={deep}&cursor={start + PAGE}"
            headers["Link"] = f'<{follow}>; rel="next"'
        self._json(entries[start : start + PAGE], headers=headers)

    def _paths_info(self, name: str, revision: str) -> None:
        files = self._files(self._repository(name), revision)
        form = parse_qs(self.body.decode())
        asked = form.get("paths") or json.loads(self.body)["paths"]
        entries = [self._entry(path, files[path]) for path in asked if path in files]
        for path in asked:
            if path not in files and any(there.startswith(f"{path.rstrip('/')}/") for there in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self._json(entries)

    def _preupload(self, name: str) -> None:
        there = self._repository(name, write=True).files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].etag if file["path"] in there else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def _lfs_batch(self, name: str) -> None:
        self._repository(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.server.objects:
                # A signature, as the real one's addresses have: it must not reach a log.
                put = f"{self.server.endpoint}/lfs/{wanted['oid']}"
                entry["actions"] = {
                    "upload": {"href": f"{put}?X-Amz-Signature=signed"},
                    "verify": {"href": f"{put}/verify"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, "the content is not what its address says")
        self.server.objects[oid] = self.body
        self._answer(200)

    def _lfs_verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        if oid not in self.server.objects or len(self.server.objects[oid]) != asked["size"]:
            raise _RefusedError(404, "no such object")
        self._json({})

    def _xet_token(self, name: str) -> None:
        self._repository(name, write=True)
        address = f"local://{self.server.xet_folder}"
        expires = int(time.time()) + 3600
        self._json(
            {"casUrl": address, "accessToken": "xet_secret", "exp": expires},
            headers={
                "X-Xet-Cas-Url": address,
                "X-Xet-Access-Token": "xet_secret",
                "X-Xet-Token-Expiration": str(expires),
            },
        )

    def _commit(self, name: str) -> None:
        repository = self._repository(name, write=True)
        files, message = dict(repository.files), ""
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = git_blob(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                content = self.server.objects.get(value["oid"])
                if content is None and self.server.xet_folder is None:
                    raise _RefusedError(400, f"{value['path']} was never uploaded")
                files[value["path"]] = lfs_blob(value["oid"], value["size"], content)
            elif files.pop(value["path"], None) is None:
                raise _RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        repository.commits.append(files)
        repository.messages.append(message)
        url = f"{self.server.endpoint}/datasets/{name}/commit/{repository.sha()}"
        self._json({"commitUrl": url, "commitOid": repository.sha(), "success": True})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        blob = self._files(repository, revision).get(path)
        if blob is None:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        assert blob.content is not None, "what lies in Xet's storage cannot be read through this Hub"
        sha = repository.sha() if revision == "main" else revision
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._answer(200, blob.content, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or blob.size), blob.size - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
        return self._answer(206, blob.content[start:stop], headers)
