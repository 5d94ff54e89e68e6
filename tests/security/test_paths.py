"""Where names, paths and links of others cannot lead, and what they cannot do to a terminal."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import pipeline.engine.decode
from pipeline.check.verify import verify
from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.engine.run import open_run
from pipeline.hub.upload import list_files
from pipeline.output.folder import FileEntry, OutputFolder
from pipeline.output.manifest import Manifest, contradictions, published, require_manifest
from pipeline.output.store import open_store
from pipeline.output.summary import inspect
from pipeline.read.load import _addresses
from pipeline.reporting.page import report
from tests.conftest import FACTORY, WriteConfig, fgsm, shard_path, write_sealed
from tests.support.forgery import make_consistent, with_own_id


@pytest.mark.parametrize(
    "path",
    [
        "../x.parquet",
        "/etc/x.parquet",
        "clean/../../x.parquet",
        "clean/.x.parquet",
        "other/x.parquet",
        "clean/a/b.parquet",
    ],
)
def test_a_receipt_names_files_of_its_own_only(path: str) -> None:
    with pytest.raises(ValidationError, match="path"):
        FileEntry(path=path, rows=1, bytes=1, sha256="")


@pytest.mark.parametrize("split", ["../../x", "/etc/x", "..", "a/b", ""])
def test_a_manifest_that_would_lead_out_changes_nothing(out: Path, split: str) -> None:
    content = json.loads((out / "manifest.json").read_text())
    neighbour = out.parent / f"x-00000-of-00002-{content['run_id']}.parquet"
    neighbour.write_text("a neighbour")
    content["split_rows"] = {split: 12}
    (out / "manifest.json").write_text(json.dumps(content))
    for arguments in (("verify",), ("verify", "--repair"), ("report",), ("inspect",)):
        result = fgsm(arguments[0], out, *arguments[1:])
        assert result.exit_code == 1
        assert f"Error: {out}/manifest.json " in result.stderr
    with pytest.raises(PipelineError, match=rf"^{out}/manifest\.json "):
        pipeline.training_dataset(out, "test")
    assert neighbour.read_text() == "a neighbour"


FILE: dict[str, Any] = {"path": "data/a.tar", "cuts": [4, 12]}


@pytest.mark.parametrize(
    ("split_rows", "streamed", "named"),
    [
        ({"test": None}, {}, "split_rows .* streamed"),
        ({"test": None}, {"test": []}, "streamed.test: .* 1 "),
        ({"test": 12}, {"train": [FILE]}, "streamed .* split_rows"),
        ({"test": 12, "train": None}, {"test": [FILE]}, "streamed .* split_rows"),
        ({"../x": 12}, {"../x": [FILE]}, "pattern"),
        *(
            ({"test": 12}, {"test": [{**FILE, "cuts": cuts}]}, "streamed.test.0.cuts: ")
            for cuts in ([], [12, 4], [4, 4], [0, 12], [0, 0])
        ),
        ({"test": 12}, {"test": [{**FILE, "cuts": [-1]}]}, "streamed.test.0.cuts.0: "),
        ({"test": 12}, {"test": [{**FILE, "cuts": [2**63]}]}, "streamed.test.0.cuts.0: "),
        *(
            ({"test": 12}, {"test": [{**FILE, "path": path}]}, "streamed.test.0.path")
            for path in ("", "/etc/passwd", "..", "../a.tar", "data/../../a.tar")
        ),
    ],
)
def test_a_manifest_whose_streamed_files_make_no_plan(
    out: Path, split_rows: dict[str, Any], streamed: dict[str, Any], named: str
) -> None:
    content = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**content, "split_rows": split_rows, "streamed": streamed}))
    for look in (verify, inspect, pipeline.training_dataset):
        with pytest.raises(PipelineError, match=rf"^{out}/manifest\.json .*{named}"):
            look(out)


def test_a_manifest_may_list_files_without_rows_and_of_unknown_length(out: Path) -> None:
    content = json.loads((out / "manifest.json").read_text())
    files = [{"path": "a..b/c.tar", "cuts": None}, {"path": "d.parquet", "cuts": [0]}]
    made = Manifest.model_validate({**content, "split_rows": {"test": None}, "streamed": {"test": files}})
    assert [shard.rows for shard in made.plan.shards] == [None, 0]


def test_a_plan_of_any_number_of_shards_is_not_made(out: Path) -> None:
    content = json.loads((out / "manifest.json").read_text())
    content["split_rows"] = content["identity"]["source.rows"] = {"test": 6 * 10**6 + 1}
    make_consistent(out, content)
    for look in (verify, inspect):
        with pytest.raises(ConfigError, match=r"^output\.images_per_shard: 6 .*6,000,001 .*\btest\b"):
            look(out)


def test_a_receipt_of_any_number_of_rows_is_damage(out: Path) -> None:
    """A plan of one shard of so many rows would be batches, and a permutation, that no memory holds."""
    content = json.loads((out / "manifest.json").read_text())
    content["split_rows"] = content["identity"]["source.rows"] = {"test": 2**62}
    content["config"]["output"]["images_per_shard"] = content["identity"]["output.images_per_shard"] = 2**61
    make_consistent(out, content)
    assert "test-00000-of-00002" in verify(out).damaged


@pytest.mark.parametrize("name", ["x", "test-00002-of-00003", "train-00000-of-00002"])
def test_files_that_a_manifest_lists_beside_its_plan_are_not_read(finished: Path, name: str) -> None:
    manifest = require_manifest(OutputFolder(finished))
    place = "s3://bucket/out"
    assert list(_addresses(place, manifest, "clean")) == ["test"]
    file = f"clean/{name}-{manifest.edition}.parquet"
    entry = manifest.files[0].model_copy(update={"path": file})
    other = manifest.model_copy(update={"files": (*manifest.files, entry)})
    with pytest.raises(ConfigError, match=rf"^{place}: .*manifest\.json .*{re.escape(file)}\b"):
        _addresses(place, other, "clean")


def test_features_are_those_of_the_config(out: Path) -> None:
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["attack"]["target"] = content["identity"]["attacks.fgsm.target"] = 1
    make_consistent(out, content)
    with pytest.raises(PipelineError, match=rf"^{out}/manifest\.json .*features"):
        verify(out)


def test_what_cannot_be_asked_again_is_a_sentence(out: Path) -> None:
    content = json.loads((out / "manifest.json").read_text())
    (key,) = [key for key in content["identity"] if key.startswith("models.") and key.endswith(".content")]
    del content["identity"][key]
    make_consistent(out, content)
    with pytest.raises(ConfigError, match=r"^model: "):
        verify(out, recompute=True)


def test_a_receipt_that_lists_a_file_elsewhere_is_damage_and_repair_deletes_its_own_only(out: Path) -> None:
    secret = out.parent / "secret.parquet"
    secret.write_text("keep")
    receipt = shard_path(out, ".run/receipts/test-00000-of-00002.json")
    content = json.loads(receipt.read_text())
    content["files"][0]["path"] = "../secret.parquet"
    write_sealed(receipt, content)
    result = fgsm("verify", out, "--repair")
    assert result.exit_code == 1
    assert f"{receipt.name} " in result.stderr
    assert secret.read_text() == "keep"
    assert not receipt.exists()


def link_run(out: Path, elsewhere: Path) -> None:
    shutil.move(out / ".run", elsewhere / "run")
    (out / ".run").symlink_to(elsewhere / "run")


def link_subset(out: Path, elsewhere: Path) -> None:
    shutil.move(out / "clean", elsewhere / "clean")
    (out / "clean").symlink_to(elsewhere / "clean")


def link_scratch(out: Path, elsewhere: Path) -> None:
    shutil.rmtree(out / ".run/tmp", ignore_errors=True)
    (out / ".run/tmp").symlink_to(elsewhere)


def link_lock(out: Path, elsewhere: Path) -> None:
    (out / ".run/lock").unlink()
    (out / ".run/lock").symlink_to(elsewhere / "precious")


@pytest.mark.parametrize("link", [link_run, link_subset, link_scratch, link_lock])
def test_nothing_is_deleted_through_a_link(out: Path, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("keep")
    (elsewhere / "tmp").mkdir()
    (elsewhere / "tmp/precious").write_text("keep")
    next((out / "eps-8").glob("*.parquet")).write_bytes(b"damaged")
    link(out, elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    result = fgsm("verify", out, "--repair")
    assert result.exit_code == 2, result.output
    assert re.search(rf"Error: {out}/\S+ .*\blink\b", result.stderr)
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_a_link_within_the_folder_is_fine(out: Path) -> None:
    (out / "assets/again.png").symlink_to(out / "assets/examples.png")
    open_store(out).refuse_links()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (tmp_path / ".manifest.json.tmp").symlink_to(precious)
    (tmp_path / "manifest.json").symlink_to(precious)
    open_store(tmp_path).write("manifest.json", b"new")
    assert precious.read_text() == "keep"
    assert (tmp_path / "manifest.json").read_text() == "new"


def test_no_picture_is_written_through_a_link(out: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(out / "assets")
    (out / "assets").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=rf"^{out}/assets .*\blink\b"):
        report(out)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["assets/key.png", "README.md", "report.html"])
def test_no_link_is_published(out: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "id_ed25519").write_text("a private key")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "id_ed25519")
    result = fgsm("publish", out, "user/name", "--dry-run")
    assert result.exit_code == 2
    assert re.search(rf"Error: {out}/{name} .*\blink\b", result.stderr)


# -------------------------------------------------------------------------------------------------------- the terminal


NASTY = "\x1b]0;title\x07\x1b[2J\x9b\u202e\r\nPublished: nothing"


def test_names_and_reasons_are_no_commands_to_a_terminal(out: Path) -> None:
    (out / "clean" / "\x1b[2Jevil\n.parquet").touch()
    path = shard_path(out, ".run/receipts/test-00000-of-00002.json")
    content = json.loads(path.read_text())
    content["skipped"] = [{"position": 0, "source_index": 0, "reason": NASTY}]
    write_sealed(path, content)
    for command in ("verify", "inspect"):
        result = fgsm(command, out)
        for text in (result.stdout, result.stderr):
            assert all(line.isprintable() for line in text.split("\n"))
            assert "\nPublished" not in text
        assert "\\x1b[2J" in result.stdout + result.stderr


def test_an_error_sentence_is_one_line_without_control_characters(tmp_path: Path) -> None:
    result = fgsm("inspect", str(tmp_path / NASTY.replace("/", "")))
    lines = result.stderr.rstrip("\n").split("\n")
    assert len(lines) == 1
    assert lines[0].isprintable()


def test_a_log_line_is_one_line() -> None:
    from pipeline.core.logs import LogFormatter

    record = logging.LogRecord("pipeline.flow", logging.INFO, "", 0, "%s", (NASTY,), None)
    assert LogFormatter("%(message)s").format(record).isprintable()
    record.name = "huggingface_hub"
    assert "\n" in LogFormatter("%(message)s").format(record)
    assert "\x1b" not in LogFormatter("%(message)s").format(record)


# ---------------------------------------------------------------------------------------------- this machine's folders


def test_nothing_that_is_published_names_this_machine_s_folders(out: Path, finished: Path) -> None:
    folder = OutputFolder(out)
    manifest = require_manifest(folder)
    here = str(finished.parent)
    assert here in (out / "manifest.json").read_text()  # by which verify --recompute finds the model
    for name, file in list_files(folder, manifest).items():
        assert here.encode() not in (file.content or folder.store.read(name)), name
    shown = published(manifest)
    assert shown.config["model"]["name"] == "victim.py:make"
    assert (shown.config["source"]["path"], shown.config["output"]["path"]) == ("source", "out")
    # What is left can still be read as a manifest, and has the same plan.
    again = Manifest.model_validate_json(shown.model_dump_json())
    assert (again.run_id, again.plan.shards) == (manifest.run_id, manifest.plan.shards)


@pytest.mark.parametrize("path", ["file:///home/me/a.tar", "simplecache::file:///home/me/a.tar", "local:///mnt/a.tar"])
def test_an_address_of_this_machine_is_published_without_its_folder(finished: Path, path: str) -> None:
    manifest = require_manifest(OutputFolder(finished))
    config = {**manifest.config, "source": {**manifest.config["source"], "path": path}}
    shown = published(manifest.model_copy(update={"config": config}))
    assert shown.config["source"]["path"] == "a.tar"
    remote = {"source": {**manifest.config["source"], "path": "s3://bucket/a.tar"}, "output": {"path": "out"}}
    assert published(manifest.model_copy(update={"config": remote})).config == remote


def test_an_identity_names_no_folders(write_config: WriteConfig, tmp_path: Path) -> None:
    """It is published as it is, as the run id is its digest."""
    code = tmp_path / "with_file.py"
    code.write_text(f"{FACTORY}\n\ndef load(file, note=None):\n    return Net()\n")
    identities = []
    for folder in ("a", "b"):
        kwargs = {"file": f"/home/{folder}/net.bin", "note": float("inf")}
        run = open_run(load_config(str(write_config(model={"name": f"{code}:load", "kwargs": kwargs}))))
        identities.append(run.identity)
    assert identities[0]["models.load.kwargs"] == {"file": "net.bin", "note": "Infinity"}
    assert identities[0] == identities[1]


def test_a_published_manifest_can_be_read(finished: Path, tmp_path: Path) -> None:
    names = ["/m/01yrx", "~", "./dog"]
    content = json.loads((finished / "manifest.json").read_text())
    content["config"]["source"]["classes"] = content["identity"]["source.classes"] = names
    content["dataset_classes"] = names
    for space in content["spaces"].values():
        space["recorded_classes"] = names
    manifest = Manifest.model_validate(with_own_id(content))
    assert contradictions(manifest) == []
    shown = published(manifest)
    (tmp_path / "manifest.json").write_text(shown.model_dump_json())
    assert require_manifest(OutputFolder(tmp_path)) == shown
    assert contradictions(shown) == []
