"""Sources that are streamed: their files are the shards, nothing of them is stored, and a run that broke goes on."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipeline
from pipeline.config import SourceConfig, load_config
from pipeline.errors import ConfigError, PipelineError
from pipeline.loader import Batch, Reader, load_batches
from pipeline.manifest import plan_of
from pipeline.outputs import OutputFolder
from pipeline.plan import stream_plan
from pipeline.progress import Progress
from pipeline.runs import open_run
from pipeline.streams import StreamedFile, StreamedSource, open_stream
from pipeline.verify import verify
from tests.conftest import CLASSES, WriteConfig, fgsm, png_bytes, random_pixels, write_parquet
from tests.hub import Hub, Repository, git_blob, lfs_blob, running_hub
from tests.test_generate import digests, generate, manifest, rows

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


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_files(tmp_path / "parquet", images(), [i % 3 for i in range(40)])


def write_tar(path: Path, samples: Sequence[dict[str, bytes]], start: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, sample in enumerate(samples):
            for name, content in sample.items():
                member = tarfile.TarInfo(f"images/{start + index:06d}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    samples = [{"png": cell, "cls": f"{i % 3}\n".encode(), "txt": f"n {i}".encode()} for i, cell in enumerate(images())]
    start = 0
    for index, count in enumerate(FILES):
        write_tar(tmp_path / f"tars/test-{index}.tar", samples[start : start + count], start)
        start += count
    return tmp_path / "tars"


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
        self.hang = threading.Event()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """The tests read `requests` instead."""

    def _serve(self) -> None:
        name = self.path.lstrip("/")
        path = self.server.folder / name
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        stop = min(int(wanted[2] or len(content)), len(content) - 1) + 1 if wanted else len(content)
        self.server.requests.append((self.command, name, start, 0 if self.command == "HEAD" else stop - start))
        if self.command == "GET" and start <= self.server.broken.get(name, len(content)) < stop:
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
def server(parquet: Path) -> Iterator[Server]:
    with serving(parquet / "data") as server:
        yield server


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.hang.set()
        server.shutdown()
        server.server_close()
        thread.join()


# -------------------------------------------------------------------------------------------- the same rows


@pytest.mark.parametrize("layout", ["images", "signs"])
def test_a_streamed_folder_gives_the_rows_of_the_same_folder_read_at_once(
    write_config: WriteConfig, parquet: Path, tmp_path: Path, layout: str
) -> None:
    generate(write_config(source={"path": str(parquet), "shuffle": False}, output={"layout": layout}))
    generate(write_config(source=stream(parquet), output={"layout": layout, "path": str(tmp_path / "stream")}))
    subset = {"images": "eps-8", "signs": "signs"}[layout]
    streamed, at_once = rows(tmp_path / "stream", subset), rows(tmp_path / "out", subset)
    files = [f"data/test-{i:05d}-of-00003.parquet" for i in range(3)]
    assert streamed["source_file"].tolist() == [file for file, n in zip(files, FILES, strict=True) for _ in range(n)]
    assert streamed["source_index"].tolist() == [row for count in FILES for row in range(count)]
    same = [name for name in at_once.columns if name not in ("source_index", "confidence", "attacks")]
    assert streamed[same].equals(at_once[same])
    findings = verify(tmp_path / "stream", recompute=True)
    assert (findings.problems, findings.mismatches, findings.recomputed) == ([], 0, 120)


