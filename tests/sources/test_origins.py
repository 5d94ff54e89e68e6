"""What is known of the source reaches the manifest, and decides nothing."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.core.origin import Origin
from pipeline.flow import generate
from pipeline.sources.digits import DIGITS
from pipeline.sources.origins import card_license, revision_of
from pipeline.sources.registry import open_source
from tests.conftest import CLASSES, WriteConfig, png_bytes, random_pixels, write_parquet
from tests.support.configs import section

PNGS = [png_bytes(image) for image in random_pixels(6)]


def origin_of(**config: Any) -> Origin:
    return open_source(section("source", **config), need_labels=True).origin


def test_the_digits_are_credited_and_licensed() -> None:
    assert origin_of(kind="digits") == DIGITS
    assert DIGITS.license == "cc-by-4.0"
    assert "Alpaydin" in (DIGITS.credit or "")


def test_of_a_folder_only_its_name_is_known(tmp_path: Path) -> None:
    for index, data in enumerate(PNGS):
        path = tmp_path / "photos" / CLASSES[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert origin_of(kind="imagefolder", path=str(tmp_path / "photos")) == Origin(name="photos")
    fake = origin_of(kind="torchvision", path="FakeData", kwargs={"size": 3})
    assert fake == Origin(name="FakeData", credit="torchvision.datasets.FakeData")


@pytest.mark.parametrize(
    ("front", "stated"),
    [
        ("license: mit", "mit"),
        ("license: [cc-by-4.0, mit]", "cc-by-4.0, mit"),
        ("license: [1, null]", None),
        ("license:", None),
        ("license: {a: b}", None),
        ("pretty_name: x", None),
        ("- a list", None),
        ("{", None),
    ],
)
def test_a_local_copy_of_a_hub_dataset_states_its_licence_in_its_card(
    tmp_path: Path, front: str, stated: str | None
) -> None:
    folder = write_parquet(tmp_path / "copy", PNGS, [0, 1, 2, 0, 1, 2])
    (folder / "README.md").write_text(f"---\n{front}\n---\n")
    assert card_license(folder / "README.md") == stated
    if front.startswith("license: ") and stated is not None:
        assert origin_of(kind="huggingface", path=str(folder)) == Origin(name="copy", license=stated)


def test_a_saved_dataset_may_carry_its_licence(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "source", PNGS, [0, 1, 2, 0, 1, 2])
    rows = datasets.load_dataset(str(folder), split="test")
    rows.info.license = "Ask Ian\n"
    rows.save_to_disk(str(tmp_path / "saved"))
    assert origin_of(kind="huggingface", path=str(tmp_path / "saved")) == Origin(name="saved", license="Ask Ian")


def test_no_card_no_licence(tmp_path: Path) -> None:
    assert card_license(tmp_path / "README.md") is None
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert card_license(tmp_path / "README.md") is None


def test_a_revision_is_that_of_the_cached_files() -> None:
    sha = "0123456789" * 4
    assert revision_of([{"filename": f"/cache/user___images/clean/0.0.0/{sha}/images-test.arrow"}]) == sha
    assert revision_of([{"filename": "/cache/parquet/clean/0.0.0/0123/images-test.arrow"}]) is None
    assert revision_of([]) is None


def test_the_licence_is_kept_in_the_manifest_and_is_no_part_of_the_run_id(
    write_config: WriteConfig, image_parquet: Path, tmp_path: Path
) -> None:
    config = write_config()
    generate(load_config(str(config)))
    before = json.loads((tmp_path / "out/manifest.json").read_text())
    assert before["origin"] == {**Origin().model_dump(), "name": "source"}
    (image_parquet / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    generate(load_config(str(config), output=str(tmp_path / "again")))
    after = json.loads((tmp_path / "again/manifest.json").read_text())
    assert after["origin"]["license"] == "cc-by-sa-4.0"
    assert after["run_id"] == before["run_id"]
    front = yaml.safe_load((tmp_path / "again/README.md").read_text().split("---\n")[1])
    assert front["license"] == "cc-by-sa-4.0"
