"""Object stores: the real client against moto's S3 on the loopback, which breaks, refuses and forgets to answer."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest
import torch
from huggingface_hub import close_session, constants
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

import pipeline
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.output.card import moved_card
from pipeline.output.folder import OutputFolder, committed
from pipeline.output.local import MARK
from pipeline.output.manifest import require_manifest
from pipeline.output.objects import ObjectStore
from tests.conftest import (
    FACTORY,
    LAYOUTS,
    WriteConfig,
    digests,
    fgsm,
    generate,
    png_bytes,
    random_pixels,
    without_run,
    write_parquet,
)
from tests.support.hub import running_hub
from tests.support.processes import SLOW, wait_for
from tests.support.s3 import S3, alter, failed, lock_of, run_there, shard_name, shards, there
from tests.support.s3 import bucket as bucket
from tests.support.s3 import out as out
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server

# --------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_into_a_store_equals_a_local_one(
    layout: str, s3: S3, out: str, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(output={"layout": layout, "images_per_shard": 16})
    generate(config)
    generate(config, "--output", out)
    objects, local = there(s3, out), tmp_path / "out"
    assert shards(objects) == digests(local)
    names = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert set(objects) == names
    for receipt in (local / ".run/receipts").iterdir():
        assert objects[f".run/receipts/{receipt.name}"] == receipt.read_bytes()
    # One PUT for each file, the receipt after all files of its shard.
    puts = [path.partition("some/where/")[2] for path in s3.asked("PUT", r"parquet|receipts/")]
    assert len(puts) == len(set(puts))
    subsets = 3 if layout == "images" else 1
    assert [index for index, path in enumerate(puts) if "receipts" in path] == [
        subsets, 2 * subsets + 1, 3 * subsets + 2
    ]  # fmt: skip
    verified = fgsm("verify", out, "--recompute")
    assert verified.exit_code == 0, verified.output
    assert "0 differ" in verified.output
    assert fgsm("inspect", f"{out}/").output == fgsm("inspect", local).output
    s3.requests.clear()
    assert "All 3 shards" in generate(config, "--output", out)
    assert not s3.asked("PUT|POST|DELETE")
    # Rows as from the folder, read ahead or as they come, at an epsilon of which nothing is stored too.
    epsilons: list[str] | None
    for streaming, epsilons in ((False, None), (True, ["0", "3/255"])):
        rows, expected = (
            list(pipeline.load(place, epsilons, split="test", streaming=streaming)) for place in (out, local)
        )
        assert [{**row, "image": row["image"].tobytes()} for row in rows] == [
            {**row, "image": row["image"].tobytes()} for row in expected
        ]
    assert set(pipeline.load(out)) == {"test"}
    with pytest.raises(ConfigError, match=rf"^split: {out} .*'train'; .* test\.$"):
        pipeline.load(out, split="train")


def test_to_find_what_is_done_is_one_listing_however_many_shards(s3: S3, out: str, write_config: WriteConfig) -> None:
    listings = []
    for images in (20, 8):
        place = f"{out}/{images}"
        config = write_config(output={"path": place, "images_per_shard": images})
        generate(config)
        alter(s3, place, shard_name(s3, place, f"eps-8/test-00001-of-{40 // images:05}.parquet"), b"")
        s3.requests.clear()
        folder = OutputFolder(place)
        manifest = require_manifest(folder)
        found = committed(folder, manifest.edition, manifest.plan.shards)
        assert len(found) == 40 // images - 1
        assert len(s3.listings) == 1
        # Receipts are read once, until one changes.
        assert len(s3.asked("GET", "receipts/")) == 40 // images
        assert committed(folder, manifest.edition, manifest.plan.shards) == found
        assert len(s3.asked("GET", "receipts/")) == 40 // images
        assert not s3.asked("HEAD")
        name = sorted(found)[0]
        file = shard_name(s3, place, f".run/receipts/{name}.json")
        content = json.loads(there(s3, place)[file])
        alter(s3, place, file, json.dumps({**content, "run_id": "0" * 16}).encode())
        assert set(committed(folder, manifest.edition, manifest.plan.shards)) == set(found) - {name}
        s3.requests.clear()
        generate(config)
        listings.append(len(s3.listings))
        # Each is asked for twice: it is there, and has no receipt.
        assert len(set(s3.asked("PUT", "parquet"))) == 3 * (1 if images == 20 else 2) + 3 * (images == 20)
    assert listings[0] == listings[1] == 4


def test_overwriting_removes_another_run_and_nothing_else(s3: S3, out: str, write_config: WriteConfig) -> None:
    generate(write_config(output={"path": out, "images_per_shard": 20}))
    former = there(s3, out)
    mine = {"clean/data.csv": b"mine", "clean/mine.parquet": b"mine", "assets/mine.png": b"mine", "notes.txt": b"mine"}
    for name, content in mine.items():
        alter(s3, out, name, content)
    said = generate(write_config(output={"path": out}), "--overwrite")
    assert ": clean/data.csv, clean/mine.parquet, notes.txt." in said
    objects = there(s3, out)
    assert {name: objects[name] for name in mine} == mine
    assert not {name for name in former if "-of-" in name} & set(objects)
    assert len([name for name in objects if "receipts" in name]) == 3
    verified = fgsm("verify", out)
    assert verified.exit_code == 0, verified.output
    # The names of the same run's files are others after each time, so that what is removed late is not theirs.
    before = set(shards(objects)) - set(mine)
    generate(write_config(output={"path": out}), "--overwrite")
    assert not before & set(there(s3, out))


def test_a_place_that_holds_something_else_is_refused(s3: S3, out: str, write_config: WriteConfig) -> None:
    alter(s3, out, "photos/cat.jpg", b"cat")
    sentence = failed("generate", write_config(output={"path": out}), code=2)
    assert re.match(rf"output\.path: {out} .*\bphotos\b", sentence)


def test_the_end_of_generate_and_the_card_name_what_works(s3: S3, out: str, write_config: WriteConfig) -> None:
    result = fgsm("generate", write_config(output={"path": out}))
    assert result.exit_code == 0, result.output
    assert f" fgsm verify {out} --recompute" in result.stderr
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
    from pipeline.output.card import render_card

    assert moved_card(objects["README.md"].decode(), manifest, "me/it") == render_card(manifest, "me/it")


def test_a_dataset_is_verified_mended_and_reported(s3: S3, out: str, write_config: WriteConfig) -> None:
    config = write_config(output={"path": out})
    generate(config)
    before = there(s3, out)
    altered = shard_name(s3, out, "eps-2/test-00000-of-00003.parquet")
    gone = shard_name(s3, out, "clean/test-00002-of-00003.parquet")
    extra = altered.replace("eps-2/test-00000", "clean/test-00009")
    alter(s3, out, altered, before[altered][:-1] + b"x")
    alter(s3, out, gone, None)
    alter(s3, out, "clean/mine.parquet", b"x")
    alter(s3, out, extra, b"x")
    found = fgsm("verify", out)
    assert found.exit_code == 1
    assert f"{altered} has sha256 " in found.output
    assert f"{gone} is missing" in found.output
    assert f"{extra} belongs" in found.output
    assert ": clean/mine.parquet" in found.output
    alter(s3, out, extra, None)
    assert "2 damaged shards" in fgsm("verify", out, "--repair").output
    assert len(shards(there(s3, out))) == 4
    assert fgsm("report", out).stdout.strip() == f"{out}/report.html"
    generate(config)
    alter(s3, out, "clean/mine.parquet", None)
    assert shards(there(s3, out)) == shards(before)
    assert fgsm("verify", out).exit_code == 0


# ------------------------------------------------------------------------------------- killed and resumed


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
    assert re.search(rf"{out}: .*\block\b.* 3 s\.", log)
    assert re.search(r"[5-9] of 10 shards", log)
    assert shards(there(s3, out)) == digests(tmp_path / "out")
    assert lock_of(there(s3, out)) is None
    assert fgsm("verify", out).exit_code == 0


def test_what_killed_processes_left_in_the_temporary_space_is_removed(out: str, tmp_path: Path) -> None:
    space = tmp_path / "temporary"
    process = subprocess.Popen([sys.executable, "-c", HOLD_SCRATCH, out], env={**os.environ, "TMPDIR": str(space)})
    wait_for(lambda: len(list(space.glob("*/*/half"))) == 1)
    with ObjectStore(out).scratch("another"):
        assert len(list(space.glob("fgsm-*"))) == 2, "that of a process that lives stays"
    process.kill()
    process.wait()
    with ObjectStore(out).scratch("another") as folder:
        assert list(space.glob("fgsm-*")) == [folder.parent]


@pytest.mark.parametrize("name", ["fgsm-pipeline-main", "fgsm-pipeline-abcd1234", "fgsm-pipeline-1.0", "linked"])
def test_folders_of_others_in_the_temporary_space_stay(name: str, out: str, tmp_path: Path) -> None:
    """A repository's archive unpacks as a folder with our name; so may anything else be called."""
    space = tmp_path / "temporary"
    place = tmp_path / "elsewhere" if name == "linked" else space / name
    place.mkdir()
    (place / "work.py").write_text("mine")
    if name == "linked":
        (place / ".fgsm-pipeline").write_bytes(MARK)
        (space / "fgsm-pipeline-abcd1234").symlink_to(place)
    with ObjectStore(out).scratch("shard"):
        pass
    assert (place / "work.py").read_text() == "mine"
    shutil.rmtree(place)
    (space / "fgsm-pipeline-abcd1234").unlink(missing_ok=True)


# A process that dies in the middle of a shard.
HOLD_SCRATCH = """
import sys, time

from pipeline.output.objects import ObjectStore

with ObjectStore(sys.argv[1]).scratch("shard") as folder:
    (folder / "half").write_bytes(b"half")
    time.sleep(60)
"""


# --------------------------------------------------------------------------------------------- one object


def test_a_receipt_is_written_once(s3: S3, out: str) -> None:
    store = ObjectStore(out)
    store.commit(".run/receipts/a.json", b"one")
    store.commit(".run/receipts/a.json", b"one")
    with pytest.raises(PipelineError, match=rf"^{out}/\.run/receipts/a\.json .*content"):
        store.commit(".run/receipts/a.json", b"two")
    assert there(s3, out) == {".run/receipts/a.json": b"one"}


def test_the_receipt_of_a_shard_that_is_written_anew_is_dropped_first(
    s3: S3, out: str, write_config: WriteConfig
) -> None:
    config = write_config(output={"path": out})
    generate(config)
    name = shard_name(s3, out, ".run/receipts/test-00001-of-00003.json")
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
    refused = pytest.raises(PipelineError, match=rf"^{out}: .*\(.+\)")
    with refused, ObjectStore(out).open("clean/file") as file:
        file.read(3)
    with pytest.raises(FileNotFoundError), ObjectStore(out).open("clean/none"):
        pass


def test_files_are_fetched_in_bounded_parts(s3: S3, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.objects.STAGED_BYTES", 10)
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


# ------------------------------------------------------------------------------------------------- publish


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_a_dataset_in_a_store_is_published(
    s3: S3, out: str, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(write_config(output={"path": out}))
    monkeypatch.setattr("pipeline.output.objects.STAGED_BYTES", 30_000)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
        disable_progress_bars()
        try:
            listed = fgsm("publish", out, "user/images", "--dry-run")
            assert "clean/test-00000-of-00003.parquet" in without_run(listed.output)
            assert not hub.requests
            result = fgsm("publish", out, "user/images")
            assert result.exit_code == 0, result.output
            again = fgsm("publish", out, "user/images")
            assert re.search(r"\bAll \d+ files\b", again.output)
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


def test_a_deleted_manifest_is_written_anew_also_after_a_start_over(
    write_config: WriteConfig, s3: S3, out: str
) -> None:
    """The names of the shards bear the generation, which the manifest that is gone had."""
    generate(write_config(output={"path": out}))
    generate(write_config(output={"path": out}), "--overwrite")
    before = shards(there(s3, out))
    alter(s3, out, "manifest.json", None)
    assert "3 of 3 shards" in generate(write_config(output={"path": out}))
    assert shards(there(s3, out)) == before
    assert fgsm("verify", out).exit_code == 0
