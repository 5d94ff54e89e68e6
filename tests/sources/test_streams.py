"""Sources that are streamed: their files are the shards, nothing of them is stored, and a run that broke goes on."""

import hashlib
import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.utils.logging import set_verbosity

import pipeline.sources.parquet
import pipeline.sources.tar
from pipeline.check.verify import verify
from pipeline.config.load import load_config
from pipeline.core.batches import Batch
from pipeline.core.errors import ConfigError, PipelineError, TemporaryError, causes
from pipeline.core.plan import stream_plan
from pipeline.engine.loader import Reader, load_batches
from pipeline.engine.progress import Progress
from pipeline.engine.run import open_run
from pipeline.sources.base import Source
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.registry import open_source
from pipeline.sources.streams import SourceFile
from tests.conftest import (
    CLASSES,
    LAYOUTS,
    WriteConfig,
    digests,
    fgsm,
    generate,
    manifest,
    png_bytes,
    random_pixels,
    rows,
    shard_path,
    subset_of,
    without_run,
)
from tests.support.files import FILES, Server, images, serving, stream, write_files, write_tar
from tests.support.files import server as server
from tests.support.forgery import forge
from tests.support.hub import Repository, git_blob, lfs_blob, running_hub
from tests.support.processes import Start
from tests.support.processes import start as start
from tests.support.sources import plan_for


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_files(tmp_path / "parquet", images(), [i % 3 for i in range(40)])


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    samples = [{"png": cell, "cls": f"{i % 3}\n".encode(), "txt": f"n {i}".encode()} for i, cell in enumerate(images())]
    start = 0
    for index, count in enumerate(FILES):
        write_tar(tmp_path / f"tars/test-{index}.tar", samples[start : start + count], start)
        start += count
    return tmp_path / "tars"


# -------------------------------------------------------------------------------------------- the same rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_streamed_folder_gives_the_rows_of_the_same_folder_read_at_once(
    write_config: WriteConfig, parquet: Path, tmp_path: Path, layout: str
) -> None:
    generate(write_config(source={"path": str(parquet), "shuffle": False}, output={"layout": layout}))
    generate(write_config(source=stream(parquet), output={"layout": layout, "path": str(tmp_path / "stream")}))
    subset = subset_of(layout, 8)
    streamed, at_once = rows(tmp_path / "stream", subset), rows(tmp_path / "out", subset)
    files = [f"data/test-{i:05d}-of-00003.parquet" for i in range(3)]
    assert streamed["source_file"].tolist() == [file for file, n in zip(files, FILES, strict=True) for _ in range(n)]
    assert streamed["source_index"].tolist() == [row for count in FILES for row in range(count)]
    same = [name for name in at_once.columns if name not in ("source_index", "confidence", "attacks")]
    assert streamed[same].equals(at_once[same])
    findings = verify(tmp_path / "stream", recompute=True)
    assert (findings.problems, findings.mismatches, findings.recomputed) == ([], 0, 120)


def test_a_tar_gives_the_same_rows(write_config: WriteConfig, parquet: Path, tars: Path, tmp_path: Path) -> None:
    generate(write_config(source=stream(parquet), output={"images_per_shard": 100}))
    source = stream(tars, classes=list(CLASSES), keep_columns=["txt", "__key__"])
    log = generate(write_config(source=source, output={"path": str(tmp_path / "tar")}))
    assert "40 of 40 " in log
    streamed, other = rows(tmp_path / "tar", "eps-8"), rows(tmp_path / "out", "eps-8")
    same = [name for name in other.columns if name != "source_file"]
    assert streamed[same].equals(other[same])
    assert streamed["source_file"].unique().tolist() == ["test-0.tar", "test-1.tar", "test-2.tar"]
    assert streamed["txt"].tolist() == [f"n {i}" for i in range(40)]
    assert streamed["__key__"].tolist() == [f"images/{i:06d}" for i in range(40)]
    assert [file["cuts"] for file in manifest(tmp_path / "tar")["streamed"]["test"]] == [None] * 3
    findings = verify(tmp_path / "tar", recompute=True)
    assert (findings.problems, findings.mismatches, findings.recomputed) == ([], 0, 120)
    complete = digests(tmp_path / "tar")
    shard_path(tmp_path, "tar/clean/test-00001-of-00003.parquet").write_bytes(b"damaged")
    assert verify(tmp_path / "tar", repair=True).damaged == {"test-00001-of-00003"}
    assert " 0 skipped" in fgsm("inspect", tmp_path / "tar").stdout
    generate(write_config(source=source, output={"path": str(tmp_path / "tar")}))
    assert digests(tmp_path / "tar") == complete


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_reads_back_and_trains(write_config: WriteConfig, parquet: Path, tmp_path: Path, layout: str) -> None:
    generate(write_config(source=stream(parquet), output={"layout": layout}))
    assert datasets.load_dataset(str(tmp_path / "out"), split="test")["source_file"][-1] == (
        "data/test-00002-of-00003.parquet"
    )
    read = pipeline.load(tmp_path / "out", ["8/255", "3/255"], split="test")
    assert read["source_file"][:40] == read["source_file"][40:]
    assert read["source_index"][:40] == [row for count in FILES for row in range(count)]
    assert next(iter(pipeline.training_dataset(tmp_path / "out", "test")))[0].shape == (3, 16, 16)
    assert fgsm("report", tmp_path / "out").exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "the file of the source that the row is in" in card
    assert "row in that file" in card


# ------------------------------------------------------------------------------------------------ the plan


def test_a_file_is_cut_where_row_groups_end() -> None:
    def cuts(groups: Sequence[int], most: int) -> tuple[int, ...] | None:
        return SourceFile("", "", 0, "", tuple((rows, 0) for rows in groups), sum(groups)).cuts(most)

    assert cuts([5, 5, 5, 5], 16) == (15, 20)
    assert cuts([5, 5, 5], 15) == (15,)
    assert cuts([30, 5, 30], 16) == (30, 35, 65), "a row group is never cut"
    assert cuts([0, 5, 0], 4) == (5,)
    assert cuts([], 4) == (0,)
    assert SourceFile("", "", 0, "").cuts(4) is None


def test_shards_of_a_stream() -> None:
    plan = stream_plan({"train": [("a", (4, 6)), ("b", None)], "test": [("c", (0,))]}, batch_size=4)
    assert [(shard.name, shard.file, shard.start, shard.stop) for shard in plan.shards] == [
        ("train-00000-of-00003", "a", 0, 4),
        ("train-00001-of-00003", "a", 4, 6),
        ("train-00002-of-00003", "b", 0, None),
        ("test-00000-of-00001", "c", 0, 0),
    ]
    assert (plan.total, plan.batch_size) == (None, 4)
    assert plan.rows(plan.shards[1]).tolist() == [4, 5]
    assert plan.rows(plan.shards[2], slice(4, 7)).tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match=re.escape(plan.shards[2].name)):
        len(plan.shards[2])
    assert len(plan.shards[2].with_rows(7)) == 7
    assert stream_plan({"train": [("a", (4, 6))]}, batch_size=9).batch_size == 4
    assert stream_plan({"train": [("a", (4, 6))]}, batch_size=9).total == 6


@pytest.mark.parametrize(("limit", "files", "shards"), [(1, 1, 2), (20, 1, 2), (21, 2, 3), (999, 3, 4)])
def test_a_limit_takes_whole_files(
    write_config: WriteConfig, parquet: Path, tars: Path, limit: int, files: int, shards: int
) -> None:
    for source, count in ((parquet, shards), (tars, files)):
        run = open_run(load_config(str(write_config(source=stream(source, classes=None)))).model_copy(), None)
        limited = run.config.source.model_copy(update={"limit": limit})
        opened = open_source(limited, need_labels=True)
        assert len(opened.files(16)["test"]) == files
        # The samples of a tar are counted too, so that its length is known.
        assert opened.splits == {"test": sum(FILES[:files])}
        plan = open_run(run.config.model_copy(update={"source": limited})).plan
        assert (len(plan.shards), plan.total) == (count, sum(FILES[:files]))


def test_no_tar_is_counted_that_a_limit_does_not_need(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    count = pipeline.sources.tar._count_samples
    monkeypatch.setattr(
        "pipeline.sources.tar._count_samples",
        lambda file: counted.append(file.name) or count(file),  # type: ignore[func-returns-value]
    )
    for limit, names in ((None, []), (20, ["test-0.tar"]), (21, ["test-0.tar", "test-1.tar"])):
        counted.clear()
        config = HuggingFaceConfig(kind="huggingface", path=str(tars), streaming=True, limit=limit)
        open_source(config, need_labels=True)
        assert counted == names


def test_a_glob_has_the_signs_of_fsspec(parquet: Path, tmp_path: Path) -> None:
    def names(pattern: str) -> list[str]:
        path = f"file://{pattern}"
        source = open_source(HuggingFaceConfig(kind="huggingface", path=path, streaming=True), need_labels=True)
        return [name for name, _ in source.files(16)["train"]]

    first, second = "test-00000-of-00003.parquet", "test-00001-of-00003.parquet"
    assert names(f"{parquet}/data/test-0000[01]*") == [first, second]
    assert names(f"{parquet}/dat?/test-00001*") == [f"data/{second}"]
    braces = tmp_path / "a{b}"
    parquet.rename(braces)
    assert names(f"{braces}/data/{first}") == [first], "no sign, so the name of a file"
    assert names(f"{braces}/data/*0-of*") == [first]
    for inside in ("00000..00001", "00000,00001"):
        with pytest.raises(ConfigError, match=r"^source\.path: .*file://.*\{"):
            names(f"{braces}/data/test-{{{inside}}}-of-00003.parquet")


def test_a_file_without_rows_is_a_shard_without_rows(write_config: WriteConfig, tmp_path: Path) -> None:
    source = write_files(tmp_path / "some", images(12), [0] * 12, (7, 0, 5))
    generate(write_config(source=stream(source)))
    assert manifest(tmp_path / "out")["complete"]
    assert len(pq.read_table(shard_path(tmp_path, "out/clean/test-00001-of-00003.parquet"))) == 0
    assert verify(tmp_path / "out", recompute=True).problems == []
    assert len(datasets.load_dataset(str(tmp_path / "out"), "clean", split="test")) == 12
    assert "already there" in generate(write_config(source=stream(source)))


def test_an_empty_tar_between_others_is_committed(write_config: WriteConfig, tars: Path, tmp_path: Path) -> None:
    write_tar(tars / "test-1.tar", [])
    generate(write_config(source=stream(tars)))
    assert manifest(tmp_path / "out")["rows"] == 26
    assert verify(tmp_path / "out").problems == []


def test_a_plan_says_what_it_does_not_know(write_config: WriteConfig, parquet: Path, tars: Path) -> None:
    known = fgsm("plan", write_config(source=stream(parquet)))
    assert re.search(r"source images +40 \(test 40\), 16x16", known.stdout), known.output
    unknown = fgsm("plan", write_config(source=stream(tars)))
    assert unknown.exit_code == 0, unknown.output
    assert re.search(r"source images +unknown \(test unknown\), 16x16", unknown.stdout)
    assert re.search(r"bytes +unknown \(webp\)", unknown.stdout)
    assert re.search(r"time +unknown on cpu, [\d.,]+ images/s", unknown.stdout)


def test_progress_without_a_total_names_no_share() -> None:
    with Progress(None, 5, ["clean"]) as progress:
        progress.update(7, 7, {"clean": 7})
        assert re.fullmatch(r"12 images, [\d,.]+ images/s, clean 100%", progress.line())


def test_the_plan_of_many_files_stays_small(write_config: WriteConfig, parquet: Path) -> None:
    run = open_run(load_config(str(write_config(source=stream(parquet)))))
    (first,) = run.manifest().streamed["test"][:1]
    many = [first.model_copy(update={"path": f"data/test-{i:05d}-of-20000.parquet"}) for i in range(20_000)]
    text = run.manifest().model_copy(update={"streamed": {"test": tuple(many)}}).model_dump_json(indent=1)
    assert len(text) < 3_000_000


def test_a_manifest_of_a_source_that_is_not_streamed_lists_no_files(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config())
    assert manifest(tmp_path / "out")["streamed"] == {}


# ------------------------------------------------------------------------------------------- over a network


def config_of(server: Server, write_config: WriteConfig, **more: Any) -> Path:
    return write_config(source=stream(f"{server.url}/*.parquet", split="test"), **more)


def test_over_http_each_row_group_is_fetched_once(server: Server, write_config: WriteConfig, tmp_path: Path) -> None:
    generate(config_of(server, write_config))
    files = [path.name for path in sorted(server.folder.iterdir())]
    assert rows(tmp_path / "out", "clean")["source_file"].unique().tolist() == files
    source = open_source(load_config(str(config_of(server, write_config))).source, need_labels=True)
    server.requests.clear()
    batches_of(source, 6, 2, side=64)
    for name in files:
        size = (server.folder / name).stat().st_size
        read = [(start, n) for method, file, start, n in server.requests if file == name and method == "GET"]
        footers = [start for start, n in read if start + n == size]
        groups = sorted(place for place in read if sum(place) != size)
        assert len(footers) == 1
        assert len(groups) == {20: 4, 14: 3, 6: 2}[FILES[files.index(name)]]
        assert all(start + n <= later for (start, n), (later, _) in itertools.pairwise(groups))


# With one row in a batch few are on their way when the source breaks off, so some shards are there by then.
ONE_ROW = {"batch_size": 1}
# Then one row tells the size of all images.
CROP = {"resize": 64, "crop": 32}


def test_a_run_that_loses_its_source_goes_on_and_reads_no_row_twice(
    server: Server, write_config: WriteConfig, tmp_path: Path
) -> None:
    files = [path.name for path in sorted(server.folder.iterdir())]
    generate(
        config_of(server, write_config, runtime=ONE_ROW, preprocess=CROP), "--output", str(tmp_path / "undisturbed")
    )
    server.broken = {files[2]: 10}
    config = config_of(server, write_config, runtime=ONE_ROW, preprocess=CROP)
    broken = fgsm("generate", config)
    assert broken.exit_code == 75, broken.output
    assert re.search(rf"source: {files[2]} .*503", broken.stderr)
    assert "Traceback" not in broken.stderr
    committed = sorted(without_run(path.stem) for path in (tmp_path / "out/.run/receipts").glob("*.json"))
    assert committed[:2] == ["test-00000-of-00004", "test-00001-of-00004"], "all of the first file"
    server.broken.clear()
    server.requests.clear()
    generate(config)
    size = (server.folder / files[0]).stat().st_size
    of_first = [(method, start + n == size) for method, file, start, n in server.requests if file == files[0] and n]
    assert of_first
    assert all(method == "GET" and to_the_end for method, to_the_end in of_first), "only the footer, to plan with"
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_killed_while_the_source_hangs_it_goes_on_to_the_same_bytes(
    server: Server, write_config: WriteConfig, tmp_path: Path, start: Start
) -> None:
    generate(
        config_of(server, write_config, runtime=ONE_ROW, preprocess=CROP), "--output", str(tmp_path / "undisturbed")
    )
    files = [path.name for path in sorted(server.folder.iterdir())]
    server.broken, server.hangs = {files[2]: 10}, True
    config = config_of(server, write_config, runtime=ONE_ROW, preprocess=CROP)
    process = start("generate", config)
    receipts = tmp_path / "out/.run/receipts"
    for _ in range(600):
        if server.hanging.is_set() and len(list(receipts.glob("*.json"))) >= 2:
            break
        time.sleep(0.1)
    process.kill()
    process.join()
    assert 2 <= len(list(receipts.glob("*.json"))) < 4
    server.hangs = False
    server.broken.clear()
    generate(config)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    there, other = manifest(tmp_path / "out"), manifest(tmp_path / "undisturbed")
    own = {"config": {}, "digest": ""}
    assert {**there, **own} == {**other, **own}


def test_ctrl_c_does_not_wait_for_a_source_that_hangs(
    server: Server, write_config: WriteConfig, tmp_path: Path, start: Start
) -> None:
    files = [path.name for path in sorted(server.folder.iterdir())]
    server.broken, server.hangs = {files[1]: 10}, True
    process = start("generate", config_of(server, write_config))
    assert server.hanging.wait(60)
    time.sleep(0.5)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert time.monotonic() - started < 6
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 130, log
    assert log.splitlines()[-1].startswith("Interrupted")


def test_a_source_that_changed_is_refused(server: Server, write_config: WriteConfig, tmp_path: Path) -> None:
    config = config_of(server, write_config)
    generate(config)
    before = digests(tmp_path / "out")
    path = server.folder / "test-00001-of-00003.parquet"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    refused = fgsm("generate", config)
    assert refused.exit_code == 2
    assert "source.content" in refused.stderr
    assert digests(tmp_path / "out") == before


def test_a_local_source_that_changed_is_refused_and_a_moved_one_is_not(
    write_config: WriteConfig, parquet: Path, tmp_path: Path
) -> None:
    generate(write_config(source=stream(parquet)))
    moved = parquet.rename(tmp_path / "moved")
    assert "already there" in generate(write_config(source=stream(moved)))
    write_files(moved, images()[::-1], [i % 3 for i in range(40)])
    refused = fgsm("generate", write_config(source=stream(moved)))
    assert refused.exit_code == 2
    assert "source.content" in refused.stderr


HUB = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}


# Makes a run for each line that it reads, in a process forked for it, and says how that ended.
GENERATE = """
import os
import sys

from pipeline.config.load import load_config
from pipeline.flow import generate

for _ in sys.stdin:
    process = os.fork()
    if process == 0:
        generate(load_config(sys.argv[1]))
        os._exit(0)
    print(os.waitpid(process, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed_and_never_stored(
    write_config: WriteConfig, parquet: Path, tmp_path: Path
) -> None:
    files = {
        str(path.relative_to(parquet)): lfs_blob(hashlib.sha256(content).hexdigest(), len(content), content)
        for path in sorted(parquet.rglob("*.parquet"))
        for content in [path.read_bytes()]
    }
    stored = sum(blob.size for blob in files.values())
    config = write_config(source=stream("user/images"))
    with running_hub() as hub:
        card = {"README.md": git_blob(b"---\nlicense: mit\n---\n")}
        hub.repositories["user/images"] = Repository(private=False, commits=[{**files, **card}], messages=["one"])
        environment = {**os.environ, **HUB, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", GENERATE, str(config)]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runs:
            assert runs.stdin
            assert runs.stdout
            runs.stdin.write(b"\n")
            runs.stdin.flush()
            assert runs.stdout.readline() == b"0\n"
            cached = sum(path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file())
            assert cached < 2000 < stored, "the card, and no row"
            shard_path(tmp_path, "out/.run/receipts/test-00003-of-00004.json").unlink()
            before = digests(tmp_path / "out")
            hub.requests.clear()
            runs.stdin.write(b"\n")
            runs.stdin.flush()
            assert runs.stdout.readline() == b"0\n"
        assert len(hub.asked("GET", "test-00000-of-00003")) == 1, "the footer, for the rows and for the columns"
        assert len(hub.asked("GET", "test-00001-of-00003")) == 1, "the footer"
    assert digests(tmp_path / "out") == before
    assert manifest(tmp_path / "out")["origin"] == {
        "name": "images",
        "repository": "user/images",
        "revision": hub.repositories["user/images"].sha(),
        "license": "mit",
        "credit": None,
    }
    generate(write_config(source=stream(parquet), output={"path": str(tmp_path / "local")}))
    for subset in ("clean", "eps-2", "eps-8"):
        assert rows(tmp_path / "out", subset).equals(rows(tmp_path / "local", subset))


def test_a_commit_is_no_user_name() -> None:
    path = f"hf://datasets/user/images@{'0' * 40}/data/*.parquet"
    assert HuggingFaceConfig(kind="huggingface", path=path, streaming=True).path == path


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_an_object_store_is_streamed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    local = open_source(
        HuggingFaceConfig(kind="huggingface", path=str(request.getfixturevalue(kind)), streaming=True), need_labels=True
    )
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store = fsspec.filesystem("s3")
        store.mkdir(f"streamed-{kind}")
        folder = Path(request.getfixturevalue(kind))
        names = [name for name, _ in local.files(16)["test"]]
        for name in names:
            store.put_file(str(folder / name), f"streamed-{kind}/data/{Path(name).name}")
        url = f"s3://streamed-{kind}/data/*.{'tar' if kind == 'tars' else kind}"
        source = open_source(
            HuggingFaceConfig(kind="huggingface", path=url, split="test", streaming=True), need_labels=True
        )
        assert [name for name, _ in source.files(16)["test"]] == [Path(name).name for name in names]
        for there, here in zip(batches_of(source, 6, 2), batches_of(local, 6, 2), strict=True):
            assert torch.equal(there.images, here.images)
            assert torch.equal(there.labels, here.labels)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


# --------------------------------------------------------------------------------------- servers that hang


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that accepts and says nothing, with clients that wait for it half a second."""
    monkeypatch.setattr("pipeline.sources.files.SILENT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def timed_out(error: BaseException) -> bool:
    """Whether an error comes from a time-out: Python's own, or one of a client."""
    return any("Timeout" in type(cause).__name__ for cause in causes(error))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("*.parquet", r"^source\.path: http://.*/\*\.parquet "),
        ("a.parquet", r"^source: a\.parquet "),
        ("a.tar", r"^source: a\.tar "),
    ],
)
def test_planning_ends_where_a_server_says_nothing(silent: str, name: str, named: str) -> None:
    config = HuggingFaceConfig(kind="huggingface", path=f"{silent}/{name}", streaming=True)
    with pytest.raises(TemporaryError, match=named) as error:
        open_source(config, need_labels=True)
    assert timed_out(error.value)


def test_planning_ends_where_the_hub_says_nothing(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client waits for ever for what is no file, and says what it tries, into the tests that follow."""
    set_verbosity(logging.ERROR)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", silent)
    with pytest.raises(TemporaryError, match=r"^source\.path: user/images ") as error:
        open_source(HuggingFaceConfig(kind="huggingface", path="user/images", streaming=True), need_labels=True)
    assert timed_out(error.value)


@pytest.mark.parametrize("part", ["_footer", "glob"])
def test_planning_does_not_wait_for_a_client_that_does(
    parquet: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    over = threading.Event()
    monkeypatch.setattr("pipeline.sources.files.SILENT_SECONDS", 0.2)
    place = (
        "pipeline.sources.parquet._footer" if part == "_footer" else "fsspec.implementations.local.LocalFileSystem.glob"
    )
    monkeypatch.setattr(place, lambda *_, **__: over.wait())
    with pytest.raises(TemporaryError, match=r"^source") as error:
        open_source(
            HuggingFaceConfig(kind="huggingface", path=f"file://{parquet}/data/*.parquet", streaming=True),
            need_labels=True,
        )
    over.set()
    assert timed_out(error.value)


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_reading_ends_where_a_server_says_nothing(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = Path(request.getfixturevalue(kind))
    with serving(folder / "data" if kind == "parquet" else folder) as server:
        path = f"{server.url}/*.{'tar' if kind == 'tars' else kind}"
        with monkeypatch.context() as patient:
            source = open_source(HuggingFaceConfig(kind="huggingface", path=path, streaming=True), need_labels=True)
            patient.undo()
        server.broken, server.hangs = {name: 0 for name, _ in source.files(16)["train"]}, True
        monkeypatch.setattr("pipeline.sources.files.SILENT_SECONDS", 0.5)
        with pytest.raises(TemporaryError, match=r"^source: \S+\.(parquet|tar) ") as error:
            batches_of(source, 6, 2)
        assert timed_out(error.value)


def test_reading_does_not_wait_for_a_client_that_does(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(HuggingFaceConfig(kind="huggingface", path=str(parquet), streaming=True), need_labels=True)
    over = threading.Event()
    monkeypatch.setattr("pipeline.sources.files.SILENT_SECONDS", 0.2)
    monkeypatch.setattr("pipeline.sources.parquet.SLOW_BYTES", 10**12)
    monkeypatch.setattr("pipeline.sources.parquet._row_group", lambda *_: over.wait())
    with pytest.raises(TemporaryError, match=r"^source: \S*test-00000-of-00003\.parquet ") as error:
        batches_of(source, 6, 2)
    over.set()
    assert timed_out(error.value)


# ---------------------------------------------------------------------------------- what rows may not be


def refused(config: Path, code: int = 2) -> str:
    result = fgsm("generate", config)
    assert result.exit_code == code, result.output
    *_, sentence = result.stderr.splitlines()
    assert sentence.startswith("Error: "), result.stderr
    return sentence.removeprefix("Error: ")


@pytest.mark.parametrize(
    ("labels", "label", "named"),
    [
        ([0] * 15 + [None] + [1] * 24, "dataset", r"15 of data/test-00000-of-00003\.parquet "),
        ([0] * 30 + [-1] + [1] * 9, "dataset", r"10 of data/test-00001-of-00003\.parquet "),
        ([0] * 30 + [3] + [1] * 9, "prediction", r"test-00001-of-00003\.parquet .* 3\b.* 3 classes"),
        ([0] * 30 + [-2] + [1] * 9, "prediction", r"test-00001-of-00003\.parquet .* -2\b"),
    ],
)
def test_labels_are_checked_where_they_are_met(
    write_config: WriteConfig, tmp_path: Path, labels: list[int | None], label: str, named: str
) -> None:
    source = write_files(tmp_path / "odd", images(), labels)
    log = fgsm("generate", write_config(source=stream(source), attack={"label": label}))
    assert log.exit_code == 1
    assert re.search(f"Error: source: .*{named}", log.stderr)


def test_unlabelled_rows_are_stored_as_null_where_predictions_are_attacked(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    source = write_files(tmp_path / "some", images(), [None if i % 4 else i % 3 for i in range(40)])
    generate(write_config(source=stream(source), attack={"label": "prediction"}))
    assert rows(tmp_path / "out", "clean")["label"].isna().sum() == 30


def plain_parquet(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "test.parquet")
    return folder


def test_string_labels_need_the_names_of_classes(write_config: WriteConfig, tmp_path: Path) -> None:
    cells = pa.array([{"bytes": cell, "path": None} for cell in images(6)])
    folder = plain_parquet(tmp_path / "named", {"img": cells, "animal": ["eel", "cat", "dog"] * 2})
    source = stream(folder, image_column="img", label_column="animal")
    assert re.match(r"source\.classes: .*\banimal ", refused(write_config(source=source)))
    generate(write_config(source={**source, "classes": list(CLASSES)}))
    assert rows(tmp_path / "out", "clean")["label"].tolist() == [2, 0, 1] * 2
    other = write_config(source={**source, "classes": ["cat", "dog", "ant"]}, output={"path": str(tmp_path / "other")})
    result = fgsm("generate", other)
    assert result.exit_code == 1
    assert re.search(r"Error: source\.classes: .*'eel' in test\.parquet ", result.stderr)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"image_column": "x"}, r"source\.image_column: .* x; "),
        ({"image_column": "number", "label_column": "number"}, r"source\.image_column: number .* int64\b"),
        ({"image_column": "img", "label_column": "part"}, r"source\.label_column: part .* double\b"),
        ({"image_column": "img"}, r"source\.label_column: .*ClassLabel; .*number, part"),
        ({"image_column": "img", "label_column": "number", "keep_columns": ["x"]}, r"source\.keep_columns: .* x; "),
        ({"split": "train"}, r"source\.split: .* train; .* test\b"),
    ],
)
def test_columns_that_cannot_be_used(
    write_config: WriteConfig, tmp_path: Path, more: dict[str, Any], named: str
) -> None:
    columns = {"img": pa.array(images(2)), "number": [0, 1], "part": [0.5, 1.5]}
    folder = plain_parquet(tmp_path / "plain", columns)
    assert re.match(named, refused(write_config(source=stream(folder, **more))))


def test_plain_bytes_and_numbers_are_images_and_labels(write_config: WriteConfig, tmp_path: Path) -> None:
    folder = plain_parquet(tmp_path / "plain", {"img": pa.array(images(4)), "number": [0, 1, 2, 0], "text": [*"abcd"]})
    source = stream(folder, image_column="img", label_column="number", keep_columns=["text"])
    generate(write_config(source=source))
    assert rows(tmp_path / "out", "clean")[["label", "text"]].to_numpy().tolist() == [
        [0, "a"],
        [1, "b"],
        [2, "c"],
        [0, "d"],
    ]


@pytest.mark.parametrize(
    ("sample", "more", "named"),
    [
        ({"cls": b"1"}, {}, r"source\.image_column: .* 0 .*x\.tar .*__key__, cls"),
        ({"a.png": b"1", "b.jpg": b""}, {}, r"source\.image_column: .* 2 .*x\.tar .*a\.png, b\.jpg"),
        ({"png": b"1"}, {}, r"source\.label_column: .* cls\b"),
        ({"png": b"1", "cls": b"0"}, {"label_column": "y"}, r"source\.label_column: .* y "),
        ({"png": b"1", "cls": b"0"}, {"keep_columns": ["y"]}, r"source\.keep_columns: .* y; "),
    ],
)
def test_samples_that_cannot_be_used(
    write_config: WriteConfig, tmp_path: Path, sample: dict[str, bytes], more: dict[str, Any], named: str
) -> None:
    write_tar(tmp_path / "one/x.tar", [sample])
    assert re.match(named, refused(write_config(source=stream(tmp_path / "one", **more))))


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        ({"cls": b"wolf"}, r"source\.classes: .*'wolf' in x\.tar "),
        ({"cls": b"-3"}, r"source\.classes: .*'-3' in x\.tar "),
        ({"txt": b"\xff"}, r"source\.keep_columns: txt in x\.tar "),
    ],
)
def test_values_in_tars_that_cannot_be_read(
    write_config: WriteConfig, tmp_path: Path, sample: dict[str, bytes], named: str
) -> None:
    good = {"png": images(1)[0], "cls": b"0", "txt": b"fine"}
    write_tar(tmp_path / "one/x.tar", [good, {**good, **sample}])
    config = write_config(source=stream(tmp_path / "one", keep_columns=["txt"]))
    result = fgsm("generate", config)
    assert result.exit_code == 1
    assert re.search(f"Error: {named}", result.stderr)


Place = Callable[[tarfile.TarInfo], int]
# What befalls a tar at a byte that is told from the header of the png of its sixth sample of fourteen.
BREAKS: dict[str, tuple[Place, Callable[[bytes, int], bytes]]] = {
    "a flipped bit in a header": (
        lambda png: png.offset,
        lambda tar, at: tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :],
    ),
    "a header of zeros": (lambda png: png.offset, lambda tar, at: tar[:at] + bytes(512) + tar[at + 512 :]),
    "cut between samples": (lambda png: png.offset, lambda tar, at: tar[:at]),
    "cut within a header": (lambda png: png.offset + 100, lambda tar, at: tar[:at]),
    "cut within an image": (lambda png: png.offset_data + 100, lambda tar, at: tar[:at]),
    "cut between an image and its class": (
        lambda png: png.offset_data + -(-png.size // 512) * 512,
        lambda tar, at: tar[:at],
    ),
    "another tar behind": (lambda _: 0, lambda tar, _: tar + tar),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_tar_that_breaks_off_is_named(tars: Path, how: str) -> None:
    path, (place, damage) = tars / "test-1.tar", BREAKS[how]
    with tarfile.open(path) as archive:
        at = place(archive.getmember("images/000025.png"))
    path.write_bytes(damage(path.read_bytes(), at))
    config = HuggingFaceConfig(kind="huggingface", path=str(tars), streaming=True)
    source = open_source(config, need_labels=True)
    with pytest.raises(PipelineError, match=r"^source: test-1\.tar "):
        batches_of(source, 6, 2)
    # To count its samples it is read too.
    with pytest.raises(ConfigError, match=r"^source: test-1\.tar "):
        open_source(config.model_copy(update={"limit": 40}), need_labels=True)


def test_a_run_ends_where_a_tar_breaks_off(write_config: WriteConfig, tars: Path, tmp_path: Path) -> None:
    path = tars / "test-1.tar"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    with tarfile.open(path) as archive:
        damaged[archive.getmember("images/000025.cls").offset] ^= 1
    path.write_bytes(damaged)
    # One after the other, so that the first is there when the second breaks.
    config = write_config(source=stream(tars), runtime={"batch_size": 1})
    result = fgsm("generate", config)
    assert result.exit_code == 1
    assert re.search(r"Error: source: test-1\.tar .*checksum", result.stderr)
    path.write_bytes(whole)
    generate(config)
    assert manifest(tmp_path / "out")["rows"] == 40


@pytest.mark.parametrize("written", ["ustar", "gnu", "pax", "tar", "padded"])
def test_tars_of_any_writer_are_read(tars: Path, tmp_path: Path, written: str) -> None:
    """Names past 100 letters, which each format keeps in another way."""
    source, folder = tars / "test-2.tar", tmp_path / "unpacked" / ("long" * 20) / ("name" * 10)
    folder.mkdir(parents=True)
    with tarfile.open(source) as archive:
        for member in archive:
            (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    source.unlink()
    names = sorted(path.relative_to(tmp_path / "unpacked") for path in folder.iterdir())
    if written == "tar":
        subprocess.run(["tar", "-cf", source, *names], cwd=tmp_path / "unpacked", check=True)
    else:
        form = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT}.get(written, tarfile.PAX_FORMAT)
        with tarfile.open(source, "w", format=form) as archive:
            for name in names:
                archive.add(tmp_path / "unpacked" / name, name)
    if written == "padded":
        source.write_bytes(source.read_bytes() + bytes(100_000))
    config = HuggingFaceConfig(kind="huggingface", path=str(tars), streaming=True)
    assert sum(len(batch.source_index) for batch in batches_of(open_source(config, need_labels=True), 6, 2)) == 40
    assert open_source(config.model_copy(update={"limit": 40}), need_labels=True).splits == {"test": 40}


def test_other_kinds_of_source_are_refused(write_config: WriteConfig, parquet: Path, tars: Path) -> None:
    (parquet / "data/test.csv").write_text("a,b")
    (parquet / "only").mkdir()
    (parquet / "only/test.csv").write_text("a,b")
    assert re.match(r"source\.path: \S*test\.csv ", refused(write_config(source=stream(parquet / "only"))))
    url = stream(f"file://{tars.parent}/*/*t*0*")
    assert re.match(r"source\.path: \S+\.parquet and \S+\.(csv|tar) ", refused(write_config(source=url)))
    nothing = refused(write_config(source=stream(f"file://{tars}/*.parquet")))
    assert nothing.startswith(f"source.path: file://{tars}/*.parquet ")
    two = refused(write_config(source=stream(f"file://{tars}/*.tar", split=["train", "test"])))
    assert two.startswith("source.split: ")
    unstreamed = refused(write_config(source={"path": f"file://{tars}/*.tar"}))
    assert re.match(r"source\.path: .*source\.streaming: true", unstreamed)


def test_sources_without_rows_are_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    empty = write_files(tmp_path / "empty", [], [], (0, 0))
    assert re.match(r"source: .*\btest\b.*empty", refused(write_config(source=stream(empty))))
    assert re.match(r"source\.path: .*/no/such\b", refused(write_config(source=stream("/no/such"))))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"shuffle": True}, "source.shuffle "),
        ({"path": "https://me:secret@host/a.parquet"}, "source.path .*credential"),
        ({"path": "sftp://me@host/a.parquet"}, "source.path .*credential"),
        ({"path": "https://host/a.parquet?X-Amz-Signature=1"}, "source.path .*credential"),
        ({"path": "https://host/a.parquet?version=1"}, "source.path .*query"),
        ({"streaming": "yes"}, "source.streaming: "),
    ],
)
def test_configs_that_are_refused(write_config: WriteConfig, source: dict[str, Any], named: str) -> None:
    sentence = refused(write_config(source={"path": "a/b", "streaming": True, **source}))
    assert re.match(named, sentence)
    assert "secret" not in sentence


# -------------------------------------------------------------------------------------- skipped rows, shapes


def test_skipped_rows_name_their_file(write_config: WriteConfig, tmp_path: Path) -> None:
    cells: list[bytes | None] = [*images()]
    cells[3], cells[21], cells[39] = b"no image", None, b"none"
    source = write_files(tmp_path / "some", cells, [0] * 40)
    log = generate(write_config(source=stream(source), runtime={"max_skipped": 0.1}))
    assert [(row["source_file"], row["source_index"]) for row in manifest(tmp_path / "out")["skipped"]] == [
        ("data/test-00000-of-00003.parquet", 3),
        ("data/test-00001-of-00003.parquet", 1),
        ("data/test-00002-of-00003.parquet", 5),
    ]
    assert "data/test-00001-of-00003.parquet row 1: " in log
    assert verify(tmp_path / "out", recompute=True).problems == []
    assert fgsm("report", tmp_path / "out").exit_code == 0
    assert "data/test-00001-of-00003.parquet" in (tmp_path / "out/report.html").read_text()


def test_too_many_skipped_rows_fail_where_the_number_of_rows_is_known(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    source = write_files(tmp_path / "some", [*images(39), b"none"], [0] * 40)
    result = fgsm("generate", write_config(source=stream(source)))
    assert result.exit_code == 1
    assert re.search(r"Error: source: 1 of 40 .* 5 of data/test-00002-of-00003\.parquet ", result.stderr)


@pytest.mark.parametrize(("among", "fails"), [(1000, False), (100, True)])
def test_where_it_is_not_known_skipped_rows_are_a_share_of_those_read(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, among: int, fails: bool
) -> None:
    monkeypatch.setattr("pipeline.engine.execute.SKIPPED_AMONG", among)
    samples = [{"png": cell, "cls": b"0"} for cell in images(20)]
    samples[4]["png"] = samples[5]["png"] = b"broken"
    write_tar(tmp_path / "one/x.tar", samples)
    result = fgsm("generate", write_config(source=stream(tmp_path / "one")))
    assert result.exit_code == (1 if fails else 0), result.output
    assert ("Error: source: 2 of 6 " in result.stderr) == fails


def test_mixed_sizes_are_found_at_the_head(write_config: WriteConfig, tmp_path: Path) -> None:
    cells = [png_bytes(pixels[: 12 if i == 9 else 16]) for i, pixels in enumerate(random_pixels(40))]
    source = write_files(tmp_path / "some", cells, [0] * 40)
    sentence = refused(write_config(source=stream(source)))
    assert re.match(r"source: .* 16x16 .* 9 of data/test-00000-of-00003\.parquet .* 16x12\b", sentence)


def test_the_first_row_that_can_be_decoded_gives_the_size(write_config: WriteConfig, tmp_path: Path) -> None:
    source = write_files(tmp_path / "some", [*[b"broken"] * 20, *images(20)], [0] * 40)
    generate(write_config(source=stream(source), runtime={"max_skipped": 0.5}))
    assert manifest(tmp_path / "out")["rows"] == 20
    nothing = write_files(tmp_path / "nothing", [b"broken"] * 40, [0] * 40)
    config = write_config(source=stream(nothing), output={"path": str(tmp_path / "nowhere")})
    assert re.match(r"source: none of .*data/test-\d+-of-00003\.parquet", refused(config, 1))


def test_random_targets_differ_between_files(write_config: WriteConfig, tmp_path: Path) -> None:
    source = write_files(tmp_path / "same", images(20) + images(20), [0] * 40, (20, 20))
    generate(write_config(source=stream(source), attack={"target": "random"}))
    target = rows(tmp_path / "out", "eps-2")["target"].tolist()
    assert target[:20] != target[20:]


# ------------------------------------------------------------------------------------------------- loading


def batches_of(source: Source, batch_size: int, workers: int, side: int = 16) -> list[Batch]:
    plan = stream_plan(source.files(16), batch_size=batch_size)
    config = load_config("digits").preprocess.model_copy(update={"mode": "RGB"})
    return list(load_batches(Reader(source, config, 10_000, (3, side, side), 3), plan, plan.shards, workers))


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_batches_do_not_depend_on_threads_and_know_their_shard_s_end(request: pytest.FixtureRequest, kind: str) -> None:
    path = str(request.getfixturevalue(kind))
    source = open_source(HuggingFaceConfig(kind="huggingface", path=path, streaming=True), need_labels=True)
    for size in (1, 4, 5, 7, 64):
        one, many = batches_of(source, size, 0), batches_of(source, size, 3)
        assert [(batch.name, batch.ends_shard) for batch in one] == [(batch.name, batch.ends_shard) for batch in many]
        assert all(torch.equal(a.images, b.images) for a, b in zip(one, many, strict=True))
        ends = {"parquet": (15, 5, 14, 6), "tars": FILES}[kind]
        assert [batch.place.stop for batch in one if batch.ends_shard] == list(ends)
        assert sum(int(batch.valid.sum()) for batch in one) == 40


def test_few_row_groups_are_on_their_way_at_a_time(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(HuggingFaceConfig(kind="huggingface", path=str(parquet), streaming=True), need_labels=True)
    footer = pq.read_metadata(min((parquet / "data").iterdir()))
    size = footer.row_group(0).total_byte_size
    counted: list[int] = []
    real = pipeline.sources.parquet._row_group

    def counting(*arguments: Any) -> pa.Table:
        counted.append(1)
        return real(*arguments)

    monkeypatch.setattr("pipeline.sources.parquet._row_group", counting)
    for bound, most in ((2.5 * size, 2), (0, 1), (100 * size, 8)):
        monkeypatch.setattr("pipeline.sources.parquet.BYTES_AHEAD", bound)
        counted.clear()
        plan = plan_for(source)
        tables = source.tables(plan, plan.shards)
        next(tables)
        time.sleep(0.3)
        assert len(counted) <= most
        tables.close()
        assert len(counted) <= most


def test_a_file_that_changes_while_it_is_read_is_named(parquet: Path) -> None:
    source = open_source(HuggingFaceConfig(kind="huggingface", path=str(parquet), streaming=True), need_labels=True)
    write_files(parquet, images(34), [0] * 34, (14, 14, 6))
    with pytest.raises(PipelineError, match=r"^source: data/test-00000-of-00003\.parquet .*changed"):
        batches_of(source, 4, 1)


def test_verify_names_rows_of_another_file(write_config: WriteConfig, parquet: Path, tmp_path: Path) -> None:
    def move(columns: dict[str, list[Any]]) -> None:
        columns["source_file"] = ["data/other.parquet"] * len(columns["source_file"])

    generate(write_config(source=stream(parquet)))
    file = sorted((tmp_path / "out/clean").iterdir())[2]
    forge(tmp_path / "out", move, f"clean/{without_run(file.name)}")
    assert any("has other values in source_file" in problem for problem in verify(tmp_path / "out").problems)
