"""An output in a folder on a disk: who holds it, and what cannot be read."""

import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError
from pipeline.output.local import LocalStore
from pipeline.output.store import open_store
from tests.conftest import WriteConfig, generate_once, shard_path
from tests.support.s3 import failed


def test_two_runs_in_one_process_cannot_hold_one_folder(tmp_path: Path) -> None:
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
        for place, sentence in zip((folder, link), said, strict=True):
            assert re.match(rf"{place} .*process {os.getpid()}\b", sentence)
        # And it is still kept from others.
        process = multiprocessing.get_context("fork").Process(target=_hold, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 1
    with pytest.raises(KeyError), open_store(folder).held():
        raise KeyError
    with open_store(folder).held():
        pass


def test_a_process_that_inherits_what_holds_a_folder_holds_it_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "out")
    with store.held():
        beside = subprocess.Popen(["sleep", "100"], pass_fds=store.handles())
    try:
        with pytest.raises(PipelineError, match=f"process {os.getpid()}"), store.held():
            pass
    finally:
        beside.kill()
        beside.wait()
    with store.held():
        pass
    assert list(store.handles()) == []


@pytest.mark.parametrize(("written", "said"), [("4711", "process 4711"), ("", "process unknown")])
def test_a_process_that_has_just_taken_the_lock_has_time_to_say_who_it_is(
    tmp_path: Path, written: str, said: str
) -> None:
    (tmp_path / ".run").mkdir()
    with (tmp_path / ".run/lock").open("w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        late = threading.Timer(0.2, lambda: print(written, end="", file=lock, flush=True))
        late.start()
        with pytest.raises(PipelineError, match=said), open_store(tmp_path).held():
            pass
        late.join()


def _hold(folder: Path) -> None:
    with (folder / ".run/lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        assert f" {tmp_path}/manifest.json: " in sentence


def test_a_folder_that_cannot_be_listed_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / ".run").mkdir()
    link_to_itself(tmp_path / ".run/receipts")
    with pytest.raises(PipelineError, match=rf"{tmp_path}/\.run/receipts: {os.strerror(errno.ELOOP)}"):
        open_store(tmp_path).sizes()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_link_that_leads_nowhere_is_named(below: str, write_config: WriteConfig, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    sentence = failed("generate", write_config(), "--output", f"{link}{below}", code=2)
    assert sentence.startswith(f"output.path: {link} ")


def test_a_folder_in_the_place_of_a_file_is_named_when_it_cannot_be_removed(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    generate_once(write_config())
    file = shard_path(tmp_path / "out", "eps-8/test-00001-of-00003.parquet")
    file.unlink()
    file.mkdir()
    assert f" {file}: " in failed("verify", tmp_path / "out", "--repair")


def test_a_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        assert f" {tmp_path}/xxx" in failed(command, tmp_path / ("x" * 300))


def test_a_local_folder_is_a_store_of_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    store = open_store(tmp_path / "out")
    assert isinstance(store, LocalStore)
    assert store.entries() == []
    assert store.sizes() == {}
    store.write("clean/a", b"1")
    store.write(".run/receipts/a.json", b"12")
    (tmp_path / "out/.git").mkdir()
    (tmp_path / "out/.git/x").write_text("not ours")
    (tmp_path / "out/clean/b/.c").mkdir(parents=True)
    (tmp_path / "out/clean/b/.c/d").write_text("123")
    (tmp_path / "out/clean/b/circle").symlink_to(tmp_path / "out")
    (tmp_path / "out/.run/receipts/b").mkdir()
    (tmp_path / "out/.run/receipts/b/a.json").write_text("no receipt")
    assert store.sizes() == {"clean/a": 1, "clean/b/.c/d": 3, ".run/receipts/a.json": 2}
    shutil.rmtree(tmp_path / "out/clean/b")
    assert store.read_all(["clean/a", "clean/b"]) == {"clean/a": b"1"}
    with pytest.raises(FileNotFoundError), store.fetched(["clean/b"]):
        pass
    store.delete(["clean/a", "clean/b", ".run/receipts/a.json"])
    assert not (tmp_path / "out/clean").exists()
    assert (tmp_path / "out/.run/receipts").is_dir()
