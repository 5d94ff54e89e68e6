"""Object stores: the real client against moto's S3 on the loopback, which breaks, refuses and forgets to answer."""

import fcntl
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest
import torch
from fsspec.registry import _registry
from huggingface_hub import close_session, constants
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

import pipeline
from pipeline.card import moved_card
from pipeline.errors import ConfigError, PipelineError
from pipeline.guard import redact_answer
from pipeline.manifest import require_manifest
from pipeline.outputs import OutputFolder, committed
from pipeline.stores import LocalStore, ObjectStore, open_store
from tests.conftest import FACTORY, WriteConfig, fgsm, png_bytes, random_pixels, write_parquet
from tests.hub import running_hub
from tests.s3 import KEY, S3, SECRET, lock_of, running_s3
from tests.test_generate import digests, generate
from tests.test_processes import SLOW, run_fgsm, wait_for

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """The store with nothing asked of it yet; its client is less patient than in life and has a temporary space."""
    server.requests.clear()
    server.faults.clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.stores.BEAT_SECONDS", 0.2)
    monkeypatch.setattr("pipeline.stores.STALE_SECONDS", 3.0)
    monkeypatch.setattr("pipeline.stores.ATTEMPTS", 2)
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


# --------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("layout", ["images", "signs"])
def test_a_run_into_a_store_equals_a_local_one(
    layout: str, s3: S3, out: str, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(output={"layout": layout, "images_per_shard": 16})
    generate(config)
    generate(config, "--output", out)
    objects, local = there(s3, out), tmp_path / "out"
    assert shards(objects) == digests(local)
    names = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert set(objects) == names - {".run/lock"}
    for receipt in (local / ".run/receipts").iterdir():
        assert objects[f".run/receipts/{receipt.name}"] == receipt.read_bytes()
    # One PUT for each file, the receipt after all files of its shard.
    puts = [path.partition("some/where/")[2] for path in s3.asked("PUT", r"parquet|receipts/")]
    assert len(puts) == len(set(puts))
    subsets = 1 if layout == "signs" else 3
    assert [index for index, path in enumerate(puts) if "receipts" in path] == [
        subsets, 2 * subsets + 1, 3 * subsets + 2
    ]  # fmt: skip
    verified = fgsm("verify", out, "--recompute")
    assert verified.exit_code == 0, verified.output
    assert "0 differ" in verified.output
    assert fgsm("inspect", f"{out}/").output == fgsm("inspect", local).output
    s3.requests.clear()
    assert "All 3 shards are already there" in generate(config, "--output", out)
    assert not s3.asked("PUT|POST|DELETE")
    # Rows as from the folder, read ahead or as they come, at an epsilon of which nothing is stored too.
    for streaming in (False, True):
        for epsilons in (None, ["0", "3/255"]):
            rows, expected = (
                list(pipeline.load(place, epsilons, split="test", streaming=streaming)) for place in (out, local)
            )
            assert [{**row, "image": row["image"].tobytes()} for row in rows] == [
                {**row, "image": row["image"].tobytes()} for row in expected
            ]
    assert set(pipeline.load(out)) == {"test"}
    with pytest.raises(ConfigError, match=r"^split: s3://.* has no split 'train'; it has test\.$"):
        pipeline.load(out, split="train")


def test_to_find_what_is_done_is_one_listing_however_many_shards(s3: S3, out: str, write_config: WriteConfig) -> None:
    listings = []
    for images in (20, 4):
        place = f"{out}/{images}"
        config = write_config(output={"path": place, "images_per_shard": images})
        generate(config)
        alter(s3, place, f"eps-8/test-00001-of-{40 // images:05}.parquet", b"")
        s3.requests.clear()
        folder = OutputFolder(place)
        manifest = require_manifest(folder)
        found = committed(folder, manifest.run_id, manifest.plan.shards)
        assert len(found) == 40 // images - 1
        assert len(s3.listings) == 1
        # Receipts are read once, until one changes.
        assert len(s3.asked("GET", "receipts/")) == 40 // images
        assert committed(folder, manifest.run_id, manifest.plan.shards) == found
        assert len(s3.asked("GET", "receipts/")) == 40 // images
        assert not s3.asked("HEAD")
        name = sorted(found)[0]
        content = json.loads(there(s3, place)[f".run/receipts/{name}.json"])
        alter(s3, place, f".run/receipts/{name}.json", json.dumps({**content, "run_id": "0" * 16}).encode())
        assert set(committed(folder, manifest.run_id, manifest.plan.shards)) == set(found) - {name}
        s3.requests.clear()
        generate(config)
        listings.append(len(s3.listings))
        assert len(s3.asked("PUT", "parquet")) == 3 * (1 if images == 20 else 2) + 3 * (images == 20)
    assert listings[0] == listings[1] == 3


def test_overwriting_leaves_nothing_of_another_run(s3: S3, out: str, write_config: WriteConfig) -> None:
    alter(s3, out, "eps-4/test-00000-of-00001.parquet", b"of another run")
    alter(s3, out, ".run/receipts/test-00000-of-00009.json", b"of another run")
    generate(write_config(output={"path": out}))
    assert "eps-4/test-00000-of-00001.parquet" in there(s3, out)
    generate(write_config(output={"path": out}), "--overwrite")
    assert {name.split("/")[0] for name in shards(there(s3, out))} == {"clean", "eps-2", "eps-8"}
    assert len([name for name in there(s3, out) if "receipts" in name]) == 3


def test_a_place_that_holds_something_else_is_refused(s3: S3, out: str, write_config: WriteConfig) -> None:
    alter(s3, out, "photos/cat.jpg", b"cat")
    sentence = failed("generate", write_config(output={"path": out}), code=2)
    assert sentence == (f"output.path: {out} is not empty and holds no run (there is photos); choose another folder.")


def test_the_end_of_generate_and_the_card_name_what_works(s3: S3, out: str, write_config: WriteConfig) -> None:
    result = fgsm("generate", write_config(output={"path": out}))
    assert result.exit_code == 0, result.output
    assert f"Next: fgsm verify {out} --recompute" in result.stderr
    assert f"Report: {out}/report.html" in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "python -c" in line]
    assert line.strip() == f"""python -c 'import pipeline; print(pipeline.load("{out}"))'"""
    objects = there(s3, out)
    assert {"report.html", "assets/accuracy.png", "assets/examples.png"} <= set(objects)
    assert b"fgsm-receipts" in objects["report.html"]
    # Its examples run as they stand.
    blocks = re.findall(r"```python\n(.*?)```", objects["README.md"].decode(), re.DOTALL)
    seen: dict[str, Any] = {}
    for block in blocks:
        exec(block, seen)
    assert len(seen["rows"]) == 80
    assert len(seen["table"].fetchall()) == 3
    duckdb.unregister_filesystem("s3")
    # Moved to the Hub it is the card that a folder's would be.
    manifest = require_manifest(OutputFolder(out))
    from pipeline.card import render_card

    assert moved_card(objects["README.md"].decode(), manifest, "me/it") == render_card(manifest, "me/it")


def test_a_dataset_is_verified_mended_and_reported(s3: S3, out: str, write_config: WriteConfig) -> None:
    config = write_config(output={"path": out})
    generate(config)
    before = there(s3, out)
    altered, gone = "eps-2/test-00000-of-00003.parquet", "clean/test-00002-of-00003.parquet"
    alter(s3, out, altered, before[altered][:-1] + b"x")
    alter(s3, out, gone, None)
    alter(s3, out, "clean/test-extra.parquet", b"x")
    found = fgsm("verify", out)
    assert found.exit_code == 1
    assert f"{altered} was altered: its sha256 is not its receipt's." in found.output
    assert f"{gone} is missing." in found.output
    assert "clean/test-extra.parquet belongs to no shard of this run" in found.output
    alter(s3, out, "clean/test-extra.parquet", None)
    assert "2 damaged shards dropped" in fgsm("verify", out, "--repair").output
    assert len(shards(there(s3, out))) == 3
    assert fgsm("report", out).stdout.strip() == f"{out}/report.html"
    generate(config)
    assert shards(there(s3, out)) == shards(before)
    assert fgsm("verify", out).exit_code == 0


# ------------------------------------------------------------------------------------- killed and resumed


def run_there(environment: dict[str, str], temporary: str, cache: str, log: str, arguments: list[str]) -> None:
    """The body of a process that uses the store."""
    os.environ.update(environment)
    tempfile.tempdir = temporary
    run_fgsm(cache, log, arguments)


@pytest.mark.drill
def test_a_killed_run_resumes_to_the_same_bytes(
    s3: S3, out: str, write_config: WriteConfig, factory_file: Path, tmp_path: Path, processes: Any
) -> None:
    factory_file.write_text(FACTORY + SLOW)
    images = [png_bytes(pixels) for pixels in random_pixels(80)]
    write_parquet(tmp_path / "many", images, [i % 3 for i in range(80)])
    config = write_config(
        source={"path": str(tmp_path / "many")},
        model={"name": f"{factory_file}:Slow"},
        output={"images_per_shard": 8},
        runtime={"batch_size": 4, "workers": 1},
    )
    generate(config)
    for enough in (2, 5):
        process = processes.Process(
            target=run_there,
            args=(
                {**s3.environment}, str(tmp_path / "temporary"), str(tmp_path / "cache"), str(tmp_path / "log"),
                ["generate", str(config), "--output", out],
            ),
        )  # fmt: skip
        process.start()
        wait_for(lambda enough=enough: sum("receipts" in name for name in there(s3, out)) >= enough)  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lock = lock_of(there(s3, out))
        assert lock is not None
        assert lock["process"] == process.pid
        assert len(there(s3, out)) < 40
        # The next process takes the lock over, as it does not change any more; here it is not made to wait 30 s.
        alter(s3, out, ".run/lock", None)
    # The lock of the last one is back, to be taken over.
    alter(s3, out, ".run/lock", json.dumps(lock).encode())
    log = generate(config, "--output", out)
    assert f"The lock of {out} is taken over: it has not changed for 3 s." in log
    assert re.search(r"[5-9] of 10 shards are already there\.", log)
    assert shards(there(s3, out)) == digests(tmp_path / "out")
    assert lock_of(there(s3, out)) is None
    assert fgsm("verify", out).exit_code == 0


def test_what_killed_processes_left_in_the_temporary_space_is_removed(out: str, tmp_path: Path) -> None:
    space = tmp_path / "temporary"
    process = subprocess.Popen([sys.executable, "-c", HOLD_SCRATCH, out], env={**os.environ, "TMPDIR": str(space)})
    wait_for(lambda: len(list(space.glob("*/half"))) == 1)
    with ObjectStore(out).scratch("another"):
        assert len(list(space.glob("fgsm-*"))) == 2, "that of a process that lives stays"
    process.kill()
    process.wait()
    with ObjectStore(out).scratch("another") as folder:
        assert list(space.glob("fgsm-*")) == [folder]


# A process that dies in the middle of a shard.
HOLD_SCRATCH = """
import sys, time

from pipeline.stores import ObjectStore

with ObjectStore(sys.argv[1]).scratch("shard") as folder:
    (folder / "half").write_bytes(b"half")
    time.sleep(60)
"""


# ------------------------------------------------------------------------------------------------ the lock


def test_a_second_run_says_who_holds_the_place(s3: S3, out: str, write_config: WriteConfig) -> None:
    config = write_config(output={"path": out})
    with OutputFolder(out).held():
        sentence = failed("generate", config)
        assert re.fullmatch(
            rf"{out} is in use by another run \(process {os.getpid()} on \S+\); wait for it\.", sentence
        )
    assert lock_of(there(s3, out)) is None
    generate(config)


@pytest.mark.drill
def test_the_lock_of_a_run_that_died_is_taken_over(s3: S3, out: str, caplog: pytest.LogCaptureFixture) -> None:
    alter(s3, out, ".run/lock", b'{"host": "elsewhere", "process": 7, "token": "x", "beat": 3}')
    began = time.monotonic()
    with caplog.at_level(logging.INFO), OutputFolder(out).held():
        assert time.monotonic() - began >= 3
        assert lock_of(there(s3, out)) != {"host": "elsewhere", "process": 7, "token": "x", "beat": 3}
    assert "has a lock of process 7 on elsewhere; waiting to see whether that lives" in caplog.text
    alter(s3, out, ".run/lock", b"no JSON")
    with OutputFolder(out).held():
        pass
    assert there(s3, out) == {}


def test_a_lock_that_goes_away_meanwhile_is_made_at_once(s3: S3, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stores.STALE_SECONDS", 600.0)
    alter(s3, out, ".run/lock", b"{}")
    threading.Timer(0.3, alter, (s3, out, ".run/lock", None)).start()
    began = time.monotonic()
    with OutputFolder(out).held():
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("other", [b'{"host": "elsewhere", "process": 7, "token": "x"}', None])
def test_a_holder_whose_lock_is_another_s_writes_no_more(s3: S3, out: str, other: bytes | None) -> None:
    folder = OutputFolder(out)
    said = "removed" if other is None else r"taken over by another run \(process 7 on elsewhere\)"
    refused = pytest.raises(PipelineError, match=rf"^The lock of {out} was {said}; let no more than one run write")
    with refused, folder.held():
        alter(s3, out, ".run/lock", other)
        time.sleep(1)
        folder.store.write("manifest.json", b"{}")
    assert there(s3, out) == ({} if other is None else {".run/lock": other}), "and leaves what is not its own"
    with pytest.raises(PipelineError, match=r"^The lock of"), OutputFolder(f"{out}/2").held():
        alter(s3, f"{out}/2", ".run/lock", None)
        time.sleep(1)


def test_a_lock_is_rewritten_through_a_store_that_fails_for_a_while(s3: S3, out: str) -> None:
    with OutputFolder(out).held():
        s3.fail("GET", r"\.run/lock", 500, times=2)
        wait_for(lambda: (lock_of(there(s3, out)) or {})["beat"] >= 2)


# --------------------------------------------------------------------------------------------- one object


def test_a_receipt_is_written_once(s3: S3, out: str) -> None:
    store = ObjectStore(out)
    store.commit(".run/receipts/a.json", b"one")
    store.commit(".run/receipts/a.json", b"one")
    with pytest.raises(PipelineError, match=r"a\.json was written by another process meanwhile, with other content"):
        store.commit(".run/receipts/a.json", b"two")
    assert there(s3, out) == {".run/receipts/a.json": b"one"}


def test_the_receipt_of_a_shard_that_is_written_anew_is_dropped_first(
    s3: S3, out: str, write_config: WriteConfig
) -> None:
    config = write_config(output={"path": out})
    generate(config)
    name = ".run/receipts/test-00001-of-00003.json"
    alter(s3, out, name, b"half a rec")
    generate(config)
    assert json.loads(there(s3, out)[name])["rows"] == 16


def test_a_large_file_goes_in_parts(s3: S3, out: str, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(100 * 2**20 + 1)
        file.write(b"start")
    ObjectStore(out).put(large, "clean/large")
    assert len(s3.asked("PUT", "partNumber=")) == 3
    ((name, content),) = there(s3, out).items()
    assert (name, content == large.read_bytes()) == ("clean/large", True)


def test_a_file_is_read_in_parts(s3: S3, out: str) -> None:
    alter(s3, out, "clean/file", bytes(range(256)) * 4096)
    with ObjectStore(out).open("clean/file") as file:
        file.seek(256)
        assert file.read(3) == b"\x00\x01\x02"
        s3.fail("GET", "clean/file", 500)
    refused = pytest.raises(PipelineError, match=rf"^{out}: the store failed \(.+\)\. What was committed is kept; when")
    with refused, ObjectStore(out).open("clean/file") as file:
        file.read(3)
    with pytest.raises(FileNotFoundError), ObjectStore(out).open("clean/none"):
        pass


def test_files_are_fetched_in_bounded_parts(s3: S3, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stores.STAGED_BYTES", 10)
    sizes = {"clean/a": 4, "clean/b": 6, "clean/c": 1, "eps-8/d": 20}
    for name, size in sizes.items():
        alter(s3, out, name, b"x" * size)
    parts = []
    for folder in ObjectStore(out).staged(sizes):
        parts.append([str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()])
        assert len(list((tmp_path / "temporary").glob("fgsm-*"))) == 1
    assert parts == [["clean/a", "clean/b"], ["clean/c"], ["eps-8/d"]]
    with pytest.raises(FileNotFoundError), ObjectStore(out).fetched(["clean/a", "clean/none"]):
        pass


def test_a_forked_process_makes_a_client_of_its_own(out: str) -> None:
    store = ObjectStore(out)
    store.write("manifest.json", b"before")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=store.write, args=("manifest.json", b"after"))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert store.read("manifest.json") == b"after"


def test_workers_of_a_loader_stream_from_a_store(out: str, write_config: WriteConfig) -> None:
    generate(write_config(output={"path": out, "layout": "signs"}))
    rows = pipeline.load(out, ["3/255"], split="test", streaming=True).select_columns(["source_index"])
    loader = torch.utils.data.DataLoader(rows, num_workers=2, batch_size=None, multiprocessing_context="fork")
    assert sorted(row["source_index"] for row in loader) == list(range(40))


# ---------------------------------------------------------------------------------------- what goes wrong


def test_a_store_that_fails_for_a_while_is_asked_again(
    s3: S3, out: str, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stores.ATTEMPTS", 4)
    s3.fail("PUT", "eps-8/test-00001", 500, times=2)
    s3.fail("PUT", "receipts/test-00000", 500, times=1)
    s3.fail("GET", "list-type=2", 500, times=1, after=1)
    generate(write_config(output={"path": out}))
    assert not any(fault.times for fault in s3.faults)
    generate(write_config())
    assert shards(there(s3, out)) == digests(tmp_path / "out")


@pytest.mark.parametrize(("kind", "said"), [(500, "an injected fault for ***"), ("hang", "it does not answer")])
def test_a_store_that_fails_for_good_is_one_sentence_and_loses_nothing(
    kind: int | str, said: str, s3: S3, out: str, write_config: WriteConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.stores.PATIENCE_SECONDS", 1.0 if kind == "hang" else 30.0)
    config = write_config(output={"path": out})
    s3.fail("PUT", "eps-8/test-00001", kind)
    began = time.monotonic()
    sentence = failed("generate", config)
    assert time.monotonic() - began < 30
    assert sentence == (
        f"{out}: the store failed ({said}). What was committed is kept; when it answers, run the same command again."
    )
    objects = there(s3, out)
    assert [name for name in objects if "receipts" in name] == [".run/receipts/test-00000-of-00003.json"]
    assert json.loads(objects["manifest.json"])["rows"] == 16
    assert lock_of(objects) is None
    s3.faults.clear()
    assert "1 of 3 shards are already there" in generate(config)
    generate(write_config(output={"path": str(tmp_path / "out")}))
    assert shards(there(s3, out)) == digests(tmp_path / "out")


def test_a_request_that_neither_ends_nor_fails_is_given_up(s3: S3, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stores.PATIENCE_SECONDS", 0.5)
    s3.fail("GET", "manifest.json", "hang")
    assert failed("inspect", out).startswith(f"{out}: the store failed (it does not answer). ")


@pytest.mark.parametrize("kind", ["credentials", "bucket", "forbidden", "unreachable"])
def test_a_store_that_cannot_be_used_is_one_sentence(
    kind: str, s3: S3, out: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = 1
    if kind == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        expected, code = rf"{out}: there are no credentials for it \(.+\); set those of the store's own client, ", 2
    elif kind == "bucket":
        out = "s3://no-such-bucket/x"
        expected, code = r"output\.path: s3://no-such-bucket is not there, or these credentials may not see it; ", 2
    elif kind == "forbidden":
        s3.fail(".*", "", 403)
        expected = rf"{out} is refused to these credentials \(.+\)\. What was committed is kept; use others, "
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush@127.0.0.1:9")
        expected = rf"{out}: the store failed \(it cannot be reached: .+\)\. What was committed"
    sentence = failed("generate", write_config(output={"path": out}), "--debug", code=code)
    assert re.match(expected, sentence), sentence


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_goes_away_is_one_sentence() -> None:
    with pytest.raises(PipelineError, match=r"^s3://no-such-bucket/x: the store failed \(The specified bucket does"):
        ObjectStore("s3://no-such-bucket/x").write("manifest.json", b"{}")


def test_a_place_without_a_dataset_is_one_sentence(out: str) -> None:
    expected = f"{out} holds no dataset of ours: there is no manifest.json."
    for command in ("verify", "inspect", "report"):
        assert failed(command, out, code=2) == expected
    with pytest.raises(ConfigError, match="holds no dataset of ours"):
        pipeline.load(out)


def test_an_address_with_credentials_is_refused_without_quoting_them(write_config: WriteConfig) -> None:
    for place in ("s3://id:hush/hush@bucket/x", "s3://hush@bucket/x", "s3://bucket/x?secret=hush"):
        said = failed("generate", write_config(), "--output", place, code=2)
        assert "holds more than a bucket and a prefix" in said or "output.path holds a credential" in said
        assert "holds more than a bucket and a prefix" in failed("verify", place, code=2)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for place, mend in (("s3://b/x", r"pip install 'fgsm-pipeline\[s3\]'"), ("gs://b/x", "pip install gcsfs")):
        with pytest.raises(ConfigError, match=rf"^output\.path: ..?:// needs a package .* installed: {mend}\.$"):
            open_store(place)
    with pytest.raises(ConfigError, match=r"^output\.path: fsspec knows no protocol s4://"):
        open_store("s4://b/x")


def test_only_the_shards_in_flight_need_room_on_the_disk(
    out: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = write_config(output={"images_per_shard": 10})
    # 40 images of 16 px are about 100 KB at three epsilons, 10 of them a fourth of it.
    monkeypatch.setattr("pipeline.estimate.free_bytes", lambda _: 60_000)
    assert "are needed and" in failed("generate", config)
    plan = fgsm("plan", config, "--output", out)
    assert "Warning" not in plan.output
    assert re.search(rf"60\.0 KB free in {tmp_path}/temporary, where about \S+ KB lie at once", plan.stdout)
    generate(config, "--output", out)
    monkeypatch.setattr("pipeline.estimate.free_bytes", lambda _: 6_000)
    sentence = failed("generate", config, "--output", f"{out}/2")
    assert re.fullmatch(
        rf"output\.path: about \S+ KB are needed for a shard before its upload and {tmp_path}/temporary has 6\.0 KB "
        r"free; name a larger one with TMPDIR, or make output\.images_per_shard smaller\.", sentence
    )  # fmt: skip


def test_training_from_a_store_is_refused(out: str) -> None:
    with pytest.raises(ConfigError, match=rf"^training_dataset reads .* on a disk: copy {out} into a folder first"):
        pipeline.training_dataset(out)


def test_messages_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-hush")
    assert (
        redact_answer('to "https://me:pw@host/b?X-Amz-Signature=s" with token-hush')
        == 'to "https://***@host/b?..." with ***'
    )


# ------------------------------------------------------------------------------------------------- publish


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_a_dataset_in_a_store_is_published(
    s3: S3, out: str, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(write_config(output={"path": out}))
    monkeypatch.setattr("pipeline.stores.STAGED_BYTES", 30_000)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
        disable_progress_bars()
        try:
            listed = fgsm("publish", out, "user/images", "--dry-run")
            assert "clean/test-00000-of-00003.parquet" in listed.output
            assert not hub.requests
            result = fgsm("publish", out, "user/images")
            assert result.exit_code == 0, result.output
            again = fgsm("publish", out, "user/images")
            assert "are already there" in again.output
        finally:
            close_session()
            enable_progress_bars()
        repository = hub.repositories["user/images"]
        objects = {name: data for name, data in there(s3, out).items() if not name.startswith(".run/")}
        assert "report.html" in objects
        assert set(repository.files) - {".gitattributes"} == set(objects)
        # That goes without what it says of this machine.
        del objects["manifest.json"]
        for name, data in objects.items():
            assert repository.files[name].etag in (
                hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            )  # fmt: skip
        # Several groups, each a commit of its own, before what makes them a dataset.
        assert sum(message.startswith("Upload shards") for message in repository.messages) > 1
        assert b'load_dataset("user/images"' in objects["README.md"]


def test_two_runs_in_one_process_cannot_hold_one_folder(tmp_path: Path) -> None:
    """Locks of POSIX are a process's: it would get the same one twice, and lose it with either."""
    folder, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(folder)
    said: list[str] = []

    def second() -> None:
        for place in (folder, link):
            with pytest.raises(PipelineError) as refused, open_store(place).held():
                pass
            said.append(str(refused.value))

    with open_store(folder).held(), open_store(tmp_path / "other").held():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert said == [
            f"{place} is in use by another run (process {os.getpid()}); wait for it." for place in (folder, link)
        ]
        # And it is still kept from others.
        process = multiprocessing.get_context("fork").Process(target=_hold, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 1
    with pytest.raises(KeyError), open_store(folder).held():
        raise KeyError
    with open_store(folder).held():
        pass


def _hold(folder: Path) -> None:
    with (folder / ".run/lock").open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os._exit(1)
    os._exit(0)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [Path.mkdir, link_to_itself])
def test_a_manifest_that_cannot_be_read_is_a_sentence(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "manifest.json")
    for command in ("inspect", "verify"):
        sentence = failed(command, tmp_path)
        assert sentence.startswith(f"Cannot read {tmp_path}/manifest.json: ")
        assert sentence.endswith("; mend the disk or its permissions.")


def test_a_folder_that_cannot_be_listed_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / ".run").mkdir()
    link_to_itself(tmp_path / ".run/receipts")
    with pytest.raises(PipelineError, match=rf"^Cannot read {tmp_path}/\.run/receipts: Too many levels of symbolic"):
        open_store(tmp_path).sizes()


def test_a_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        assert failed(command, tmp_path / ("x" * 300)).startswith(f"Cannot read {tmp_path}/xxx")


def test_a_local_folder_is_a_store_of_its_own_kind(tmp_path: Path) -> None:
    store = open_store(tmp_path / "out")
    assert isinstance(store, LocalStore)
    assert store.entries() == []
    assert store.sizes() == {}
    store.write("clean/a", b"1")
    store.write(".run/receipts/a.json", b"12")
    (tmp_path / "out/.git").mkdir()
    (tmp_path / "out/.git/x").write_text("not ours")
    assert store.sizes() == {"clean/a": 1, ".run/receipts/a.json": 2}
    assert store.read_all(["clean/a", "clean/b"]) == {"clean/a": b"1"}
    with pytest.raises(FileNotFoundError), store.fetched(["clean/b"]):
        pass
    store.delete(["clean/a", "clean/b", ".run/receipts/a.json"])
    assert not (tmp_path / "out/clean").exists()
    assert (tmp_path / "out/.run/receipts").is_dir()
