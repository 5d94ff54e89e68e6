"""Image folders from end to end: what is left out or skipped is named; and a working folder that was removed."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError
from pipeline.output.card import render_card
from pipeline.output.folder import OutputFolder, read_receipts
from pipeline.output.manifest import read_manifest
from pipeline.reporting.page import report
from tests.conftest import CLASSES, WriteConfig, fgsm, png_bytes, random_pixels


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Nine images in three classes, one that cannot be decoded, and what is no image; some names are no UTF-8."""
    root = tmp_path / "pets"
    for index, pixels in enumerate(random_pixels(9)):
        (root / CLASSES[index % 3]).mkdir(parents=True, exist_ok=True)
        (root / CLASSES[index % 3] / f"{index}.png").write_bytes(png_bytes(pixels))
    (root / "dog" / os.fsdecode(b"br\xe9ak.png")).write_bytes(b"no image")
    (root / "cat/._0.png").touch()
    (root / "eel" / os.fsdecode(b"caf\xe9.txt")).touch()
    return root


def config_of(write_config: WriteConfig, pets: Path, skipped: float = 0.2) -> Path:
    return write_config(
        source={"kind": "imagefolder", "path": str(pets)},
        attack={"epsilons": ["8/255"]},
        runtime={"max_skipped": skipped, "compile": False},
    )


def test_what_is_left_out_or_skipped_is_named_wherever_people_look(
    write_config: WriteConfig, pets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pipeline"):
        done = fgsm("generate", config_of(write_config, pets))
    assert done.exit_code == 0, done.output
    folder = OutputFolder(tmp_path / "out")
    manifest = read_manifest(folder)
    assert manifest is not None
    broken, hidden, text = r"dog/br\xe9ak.png", "cat/._0.png", r"eel/caf\xe9.txt"
    assert [(kind.count, kind.first) for kind in manifest.left_out] == [(1, (hidden,)), (1, (text,))]
    assert [row.file for row in manifest.skipped] == [broken]
    assert [row.file for receipt in read_receipts(folder)[0].values() for row in receipt.skipped] == [broken]
    said = [record.getMessage() for record in caplog.records]
    shown = fgsm("inspect", tmp_path / "out").stdout
    for name in (hidden, text):
        assert sum(name in line for line in said) == 1
        assert name in shown
    assert broken in shown
    assert "Left out" in render_card(manifest)
    assert broken in Path(report(tmp_path / "out")).read_text()
    (tmp_path / "out/manifest.json").read_bytes().decode()
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


def test_the_message_that_ends_a_run_names_the_file(write_config: WriteConfig, pets: Path) -> None:
    failed = fgsm("generate", config_of(write_config, pets, skipped=0.01))
    assert failed.exit_code == 1
    assert r"dog/br\xe9ak.png" in failed.stderr


def test_a_source_of_undecodable_images_names_one(write_config: WriteConfig, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("I", (4, 4)).save(tmp_path / "pets" / name / "0.tif")
    failed = fgsm("generate", config_of(write_config, tmp_path / "pets"))
    assert failed.exit_code == 1
    assert any(f"{name}/0.tif" in failed.stderr for name in CLASSES)


def test_what_is_left_out_is_said_before_it_makes_the_run_fail(
    write_config: WriteConfig, pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pets / "ant").mkdir()
    Image.new("L", (4, 4)).save(pets / "ant/0.png")
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert fgsm("generate", config_of(write_config, pets)).exit_code == 2
    assert any("cat/._0.png" in record.getMessage() for record in caplog.records)


def test_a_path_that_is_no_utf_8_is_refused_as_nothing_can_record_it(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(source={"kind": "imagefolder", "path": "pets"})
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"^output\.path: "):
        load_config(str(config), output=str(latin))
    latin.mkdir()
    with pytest.raises(ConfigError, match=r"^source\.path: "):
        load_config(str(config.rename(latin / "config.yaml")))


# Runs each line of its input as a command, from a folder that it has removed.
IN_A_REMOVED_FOLDER = """
import os, sys, tempfile
from pipeline.cli import app
for line in sys.stdin.read().splitlines():
    folder = tempfile.mkdtemp(dir=sys.argv[1])
    os.chdir(folder)
    os.rmdir(folder)
    try:
        app(line.split("|"), prog_name="fgsm")
    except SystemExit as end:
        print("ended with", end.code)
"""


def in_a_removed_folder(tmp_path: Path, *commands: list[str]) -> list[str]:
    """What commands end with where the working folder was removed, one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_REMOVED_FOLDER, str(tmp_path)],
        input="\n".join("|".join(command) for command in commands),
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("ended with")]


def test_from_a_folder_that_was_removed_nothing_is_done(write_config: WriteConfig, pets: Path, tmp_path: Path) -> None:
    config, out = str(config_of(write_config, pets)), str(tmp_path / "out")
    ends = in_a_removed_folder(tmp_path, ["generate", config], ["plan", config], ["verify", out], ["inspect", out])
    assert ends == ["ended with 2"] * 4
    assert not (tmp_path / "out").exists()
