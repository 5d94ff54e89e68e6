"""A dataset of several models and attacks in every layout, made once for all tests of reading, and a Hub."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import yaml

from pipeline.output import shards
from tests.conftest import FACTORY, LAYOUTS, generate, output_of, png_bytes, random_pixels, write_parquet
from tests.support.hub import Hub, Repository, running_hub
from tests.support.several import ON_RAYS, write_several


@pytest.fixture(scope="package")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each layout, 40 images in three files and in row groups that do not lie side by side in all subsets;
    and `stepped`, in layout images, with an attack that lies on no ray."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "net.py").write_text(FACTORY)
    images = [png_bytes(pixels // 128 * 255 if i % 2 else pixels) for i, pixels in enumerate(random_pixels(40))]
    write_parquet(folder / "source", images, [i % 3 for i in range(40)])

    def write(output: dict[str, str]) -> Path:
        config = {
            "source": {"kind": "huggingface", "path": str(folder / "source")},
            "model": {"kind": "factory", "name": f"{folder / 'net.py'}:make"},
            "attack": {},
            "output": {"images_per_shard": 16, **output},
            "runtime": {"device": "cpu", "workers": 0, "batch_size": 6},
        }
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(shards, "ROW_GROUP_ROWS", 7)
        for layout in LAYOUTS:
            # Of layout images a row holds one picture, of the others several.
            patch.setattr(shards, "ROW_GROUP_BYTES", 5_000 if layout == "images" else 20_000)
            output = {**output_of(layout), "path": str(folder / layout)}
            generate(write_several(write, folder, ON_RAYS, output=output))
        patch.setattr(shards, "ROW_GROUP_BYTES", 5_000)
        generate(write_several(write, folder, output={"path": str(folder / "stepped")}))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A loopback Hub with an empty dataset, `user/name`, that anybody may read."""
    from huggingface_hub import constants

    with running_hub() as hub:
        hub.repositories["user/name"] = Repository(private=False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
