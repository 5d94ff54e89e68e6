"""Sources in files, and a server of files on the loopback."""

import contextlib
import hashlib
import http.server
import io
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import (
    CLASSES,
    png_bytes,
    random_pixels,
)

# Rows of the three files of a source, and of their row groups.
FILES, GROUP = (20, 14, 6), 5
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})


def images(count: int = 40) -> list[bytes]:
    return [png_bytes(pixels) for pixels in random_pixels(count)]


def write_files(
    folder: Path, cells: Sequence[bytes | None], labels: Sequence[int | None], counts: Sequence[int] = FILES
) -> Path:
    """A Hub-style folder of Parquet files of so many rows, in row groups of GROUP."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    start = 0
    for index, count in enumerate(counts):
        some = slice(start, start := start + count)
        table = pa.table(
            {"image": [{"bytes": cell, "path": None} for cell in cells[some]], "label": list(labels[some])},
            schema=FEATURES.arrow_schema,
        )
        pq.write_table(table, folder / f"data/test-{index:05d}-of-{len(counts):05d}.parquet", row_group_size=GROUP)
    return folder


def write_tar(path: Path, samples: Sequence[dict[str, bytes]], start: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, sample in enumerate(samples):
            for name, content in sample.items():
                member = tarfile.TarInfo(f"images/{start + index:06d}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def stream(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "streaming": True, **more}


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, with ranges and ETags; `requests` are (method, file, first byte, bytes)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str, int, int]] = []
        # Of a file, the first byte that is refused.
        self.broken: dict[str, int] = {}
        self.hangs = False
        self.hanging, self.released = threading.Event(), threading.Event()

    def fetched(self, name: str) -> int:
        """Bytes of a file that were sent."""
        return sum(count for method, file, _, count in self.requests if method == "GET" and file == name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are what the tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """The tests read `requests` instead."""

    def _serve(self) -> None:
        name = self.path.lstrip("/")
        path = self.server.folder / name
        if not path.exists():
            return self.send_error(404)
        listing = "".join(f'<a href="{file.name}">{file.name}</a>' for file in sorted(self.server.folder.iterdir()))
        content = listing.encode() if path.is_dir() else path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        stop = min(int(wanted[2] or len(content)), len(content) - 1) + 1 if wanted else len(content)
        self.server.requests.append((self.command, name, start, 0 if self.command == "HEAD" else stop - start))
        if self.command == "GET" and start <= self.server.broken.get(name, len(content)) < stop:
            if self.server.hangs:
                self.server.hanging.set()
                self.server.released.wait()
            return self.send_error(503)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start:stop])
        return None

    do_GET = do_HEAD = _serve  # noqa: N815


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serves Parquet files that are larger than the 64 KiB which Arrow takes of an end to find the footer."""
    cells = [png_bytes(pixels) for pixels in random_pixels(40, side=64)]
    with serving(write_files(tmp_path / "served", cells, [i % 3 for i in range(40)]) / "data") as server:
        yield server


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
