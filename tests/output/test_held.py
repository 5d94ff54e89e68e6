"""What a run holds, writes and removes on a disk: its own, wherever that has gone, and nothing of anybody else's."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline
import pipeline.check.verify
from pipeline.core.errors import PipelineError
from pipeline.output.local import LocalStore
from pipeline.output.shards import ShardWriter
from tests.conftest import WriteConfig, digests, fgsm, generate, generate_once, manifest, shard_path, write_sealed


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def midway(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has something happen right after a run's first commit."""
    commit = ShardWriter.commit

    def arrange(action: Callable[[], object]) -> None:
        def committing(writer: ShardWriter, *arguments: object) -> object:
            receipt = commit(writer, *arguments)  # type: ignore[arg-type]
            monkeypatch.setattr(ShardWriter, "commit", commit)
            action()
            return receipt

        monkeypatch.setattr(ShardWriter, "commit", committing)

    return arrange


# ------------------------------------------------------------------------------------------- what a run writes


def test_a_folder_that_is_moved_gets_nothing_more(
    write_config: WriteConfig, tmp_path: Path, midway: Callable[..., None]
) -> None:
    out, moved, config = tmp_path / "out", tmp_path / "moved", write_config()
    midway(lambda: out.rename(moved))
    with pytest.raises(PipelineError, match=rf"^{tmp_path}/out\b"):
        generate(config)
    assert not out.exists()
    assert len(list((moved / ".run/receipts").iterdir())) == 1
    assert not list((moved / ".run").glob("tmp/*"))
    generate(config, "--output", str(moved))
    generate(config)
    assert digests(moved) == digests(out)


def test_a_folder_that_is_replaced_by_another_dataset_is_left_alone(
    write_config: WriteConfig, tmp_path: Path, midway: Callable[..., None]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    generate(write_config(attack={"epsilons": ["4/255"]}), "--output", str(other))
    (other / ".run/tmp/half").mkdir(parents=True)
    (other / ".run/tmp/half/file").write_text("of a run that is under way there")
    before = contents(other)

    def exchange() -> None:
        out.rename(tmp_path / "moved")
        other.rename(out)

    midway(exchange)
    with pytest.raises(PipelineError, match=rf"^{out}\b"):
        generate(write_config())
    assert contents(out) == before


def test_a_folder_that_is_removed_is_no_success(
    write_config: WriteConfig, tmp_path: Path, midway: Callable[..., None]
) -> None:
    midway(lambda: shutil.rmtree(tmp_path / "out"))
    result = fgsm("generate", write_config())
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_without_its_lock_a_run_writes_nothing_more(
    write_config: WriteConfig, tmp_path: Path, midway: Callable[..., None]
) -> None:
    lock = tmp_path / "out/.run/lock"
    midway(lock.unlink)
    with pytest.raises(PipelineError, match=f"^{lock} "):
        generate(write_config())
    assert len(list((tmp_path / "out/.run/receipts").iterdir())) == 1
    assert not list((tmp_path / "out/.run").glob("tmp/*"))
    generate(write_config())
    assert manifest(tmp_path / "out")["complete"]


def test_without_its_lock_a_run_removes_nothing_of_the_run_that_has_it(
    write_config: WriteConfig, tmp_path: Path, midway: Callable[..., None]
) -> None:
    out = tmp_path / "out"

    def exchange() -> None:
        (out / ".run/lock").unlink()
        (out / ".run/tmp/half").mkdir()
        (out / ".run/tmp/half/file").write_text("of the run that has the folder now")

    midway(exchange)
    with pytest.raises(PipelineError, match=f"^{out}/.run/lock "):
        generate(write_config())
    assert (out / ".run/tmp/half/file").exists()


def test_a_repair_drops_nothing_of_a_run_that_has_begun_meanwhile(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drop, after = tmp_path / "out", pipeline.check.verify._drop, {}
    generate_once(write_config())
    shard_path(out, "eps-8/test-00001-of-00003.parquet").write_bytes(b"x")

    def late(*arguments: Any) -> None:
        generate(write_config(attack={"epsilons": ["4/255"]}), "--overwrite")
        after.update(contents(out))
        drop(*arguments)

    monkeypatch.setattr("pipeline.check.verify._drop", late)
    result = fgsm("verify", out, "--repair")
    assert result.exit_code == 1
    assert f"Error: {out} " in result.stderr
    assert contents(out) == after


@pytest.mark.parametrize("folder", ["eps-8", ".run/receipts", ".run/tmp"])
def test_a_folder_that_becomes_a_link_is_not_followed(
    folder: str, write_config: WriteConfig, tmp_path: Path, midway: Callable[..., None]
) -> None:
    inside, outside = tmp_path / "out" / folder, tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")

    def exchange() -> None:
        inside.rename(tmp_path / "aside")
        inside.symlink_to(outside)

    midway(exchange)
    with pytest.raises(PipelineError):
        generate(write_config())
    assert contents(outside) == {"mine": b"mine"}


@pytest.mark.parametrize("what", ["receipt", "file"])
def test_a_shard_that_is_removed_meanwhile_is_named(
    what: str, write_config: WriteConfig, tmp_path: Path, midway: Callable[..., None]
) -> None:
    name = {"receipt": "out/.run/receipts/test-00000-of-00003.json", "file": "out/eps-8/test-00000-of-00003.parquet"}
    midway(lambda: shard_path(tmp_path, name[what]).unlink())
    result = fgsm("generate", write_config())
    assert result.exit_code == 1
    assert "test-00000-of-00003" in result.stderr
    assert not manifest(tmp_path / "out")["complete"]
    generate(write_config())
    assert manifest(tmp_path / "out")["complete"]


# ------------------------------------------------------------------------------------------- what it removes


def app(folder: Path) -> dict[str, bytes]:
    """A web application, which has a manifest and assets too."""
    for name in ("manifest.json", "README.md", "clean/data.csv", "assets/logo.png", "report.html", "eps-1/a.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"name": "app", "format": 3}' if name == "manifest.json" else name)
    return contents(folder)


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_folder_that_is_not_ours_is_neither_taken_nor_changed(
    options: tuple[str, ...], write_config: WriteConfig, tmp_path: Path
) -> None:
    before = app(tmp_path / "out")
    result = fgsm("generate", write_config(), *options)
    assert result.exit_code == 2
    assert "--overwrite" not in result.stderr
    for command in (["verify", "--repair"], ["inspect"], ["report"], ["publish", "me/it", "--dry-run"]):
        named = fgsm(command[0], tmp_path / "out", *command[1:])
        assert named.exit_code in (1, 2)
        assert "--overwrite" not in named.stderr
    assert contents(tmp_path / "out") == before


def test_overwriting_removes_what_is_the_run_s_and_names_the_rest(write_config: WriteConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fgsm("generate", write_config(output={"images_per_shard": 20})).exit_code == 0
    former = set(contents(out))
    mine = ("clean/data.csv", "clean/test-00000-of-00003.parquet", "assets/mine.png", "notes/a.txt", "eps-2/x/y.txt")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    said = fgsm("generate", write_config(attack={"epsilons": ["4/255"]}), "--overwrite").stderr
    now = contents(out)
    assert all(now[name] == b"mine" for name in mine)
    assert not {name for name in former if "-of-" in name} & set(now)
    for name in mine:
        if not name.startswith("assets/"):
            assert name in said
    assert not (out / "eps-8").exists()
    assert fgsm("verify", out).exit_code == 0


def test_overwriting_keeps_copies_of_shards_in_folders_of_the_user_s(write_config: WriteConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate_once(write_config())
    for name in ("backup", "backup/eps-8", "clean/old", ".old"):
        shutil.copytree(out / "eps-8", out / name)
    (out / ".README.md.tmp").write_text("mine")
    before = contents(out)
    generate(write_config(attack={"epsilons": ["4/255"]}), "--overwrite")
    mine = {name for name in before if "backup" in name or "old/" in name or name == ".README.md.tmp"}
    assert len(mine) == 13
    now = contents(out)
    assert all(now.get(name) == before[name] for name in mine)


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_readme_of_the_user_is_not_replaced(
    options: tuple[str, ...], write_config: WriteConfig, tmp_path: Path
) -> None:
    generate_once(write_config())
    before = contents(tmp_path / "out")
    (tmp_path / "out/README.md").write_text("# my own notes")
    result = fgsm("generate", write_config(), *options)
    assert result.exit_code == 1
    assert f"Error: {tmp_path}/out/README.md " in result.stderr
    assert contents(tmp_path / "out") == {**before, "README.md": b"# my own notes"}
    (tmp_path / "out/README.md").unlink()
    generate(write_config())
    assert fgsm("verify", tmp_path / "out").exit_code == 0


def test_overwriting_removes_a_dataset_of_another_version(write_config: WriteConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate_once(write_config(output={"images_per_shard": 20}))
    content = {**manifest(out), "format": 5}
    (out / "manifest.json").write_text(json.dumps(content))
    refused = fgsm("generate", write_config())
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    generate(write_config(), "--overwrite")
    assert len(list(out.rglob("*.parquet"))) == 9
    assert fgsm("verify", out).exit_code == 0


def test_a_manifest_that_is_damaged_is_known_as_ours_by_its_receipts(write_config: WriteConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate_once(write_config(output={"images_per_shard": 20}))
    (out / "manifest.json").write_text("{")
    assert fgsm("generate", write_config()).exit_code == 1
    generate(write_config(), "--overwrite")
    assert len(list(out.rglob("*.parquet"))) == 9


def test_a_removal_that_is_cut_off_goes_on_with_the_next_run(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, unlink = tmp_path / "out", os.unlink
    generate_once(write_config(output={"images_per_shard": 20}))
    left = 3

    def failing(path: str, *, dir_fd: int | None = None) -> None:
        nonlocal left
        if str(path).endswith(".parquet"):
            left -= 1
            if left < 0:
                raise OSError(5, "Input/output error")
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", failing)
    with pytest.raises(PipelineError):
        generate(write_config(), "--overwrite")
    monkeypatch.setattr(os, "unlink", unlink)
    assert manifest(out)["supersedes"]
    generate(write_config())
    assert not manifest(out)["supersedes"]
    assert len(list(out.rglob("*.parquet"))) == 9
    assert len(list((out / ".run/receipts").iterdir())) == 3


# ------------------------------------------------------------------------------------------- who reads it


def test_a_file_that_goes_away_hides_no_other(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor's or another command's temporary file may be gone when its size is asked for."""
    store, scandir = LocalStore(finished), os.scandir
    before = store.sizes()

    class Gone:
        name = "gone.tmp"

        def is_file(self) -> bool:
            return True

        def stat(self) -> None:
            raise FileNotFoundError

    @contextlib.contextmanager
    def scanning(folder: Path) -> Iterator[Any]:
        with scandir(folder) as entries:
            yield [Gone(), *entries]

    monkeypatch.setattr(os, "scandir", scanning)
    assert store.sizes() == before


def test_readers_of_an_incomplete_dataset_are_warned(write_config: WriteConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate_once(write_config())
    pipeline.load(out)
    pipeline.training_dataset(out, "test")
    for subset in ("clean", "eps-2", "eps-8"):
        shard_path(out, f"{subset}/test-00001-of-00003.parquet").unlink()
    with pytest.warns(UserWarning, match=r"2 of 3 shards .*67%"):
        pipeline.load(out)
    pipeline.load(out, allow_incomplete=True)
    generate(write_config(), "--limit", "20", "--output", str(tmp_path / "half"))
    half = tmp_path / "half"
    content = manifest(half)
    assert content["complete"]
    shard_path(half, ".run/receipts/test-00001-of-00002.json").unlink()
    for subset in ("clean", "eps-2", "eps-8"):
        shard_path(half, f"{subset}/test-00001-of-00002.parquet").unlink()
    fgsm("verify", half)
    files = [file for file in content["files"] if "test-00001" not in file["path"]]
    write_sealed(half / "manifest.json", {**content, "files": files, "complete": False})
    with pytest.warns(UserWarning, match=r"1 of 2 shards"):
        pipeline.training_dataset(half, "test")
    pipeline.training_dataset(half, "test", allow_incomplete=True)
