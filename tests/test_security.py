"""Security: what a dataset, a checkpoint, an output folder or a config from elsewhere cannot do."""

import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError

import pipeline.engine.decode
from pipeline.check.verify import verify
from pipeline.config import sources
from pipeline.config.load import load_config
from pipeline.config.schema import PreprocessConfig
from pipeline.config.sources import HuggingFaceConfig, SourceConfig
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.images import OtherShapeError, UndecodableError, decode_image, open_image
from pipeline.core.redaction import find_secret, presentable, redact
from pipeline.engine.decode import read_image
from pipeline.engine.run import open_run
from pipeline.hub.upload import list_files
from pipeline.models.digits import DigitsConfig
from pipeline.models.load import load_model
from pipeline.models.timm import TimmConfig
from pipeline.models.torchvision import TorchvisionConfig
from pipeline.models.transformers import TransformersConfig
from pipeline.output.folder import FileEntry, OutputFolder, Receipt
from pipeline.output.manifest import Manifest, contradictions, published, require_manifest, run_id_of
from pipeline.output.store import open_store
from pipeline.output.summary import inspect
from pipeline.read.load import _addresses
from pipeline.report.page import report
from pipeline.sources.base import Source
from pipeline.sources.origins import front_matter
from pipeline.sources.registry import open_source
from tests.conftest import FACTORY, WriteConfig, fgsm, png_bytes, random_pixels, shard_path, write_parquet, write_sealed
from tests.support.configs import section
from tests.support.hub import Repository, git_blob, lfs_blob, running_hub
from tests.support.sources import openers_of

SECRET = "hf_" + "S3cretS3cret" * 3


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy" / "out"))


# ------------------------------------------------------------------------------------------- no pickle


class Payload:
    """What a pickle runs when it is opened: it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is there once a payload has run; that it would be is shown first."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


def plant_script(folder: Path, canary: Path) -> None:
    for name in (f"{folder.name}.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")


def plant_pickles(folder: Path, canary: Path) -> None:
    for name in ("data.pkl", "test.pickle", "test.pth", "test.npy", "cache", "state.pkl", "_cache_"):
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))


def plant_extension_type(folder: Path, canary: Path) -> None:
    """Arrow once kept Python's extension types as pickles in the metadata of a field."""
    file = next(folder.glob("*.parquet"))
    table = pq.read_table(file)
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(canary)),
    }
    column = pa.field("label", pa.int64(), metadata=metadata)
    index = table.schema.get_field_index("label")
    pq.write_table(table.set_column(index, column, table.column("label")), file)


@pytest.mark.parametrize("plant", [plant_script, plant_pickles, plant_extension_type])
def test_a_source_folder_runs_nothing(tmp_path: Path, canary: Path, plant: Callable[[Path, Path], None]) -> None:
    folder = write_parquet(tmp_path / "data", [png_bytes(image) for image in random_pixels(4)], [0, 1, 2, 0])
    plant(folder, canary)
    try:
        source = open_source(HuggingFaceConfig(kind="huggingface", path=str(folder)), need_labels=True)
        openers_of(source, "test")[0]()
    except ConfigError as error:
        assert "Traceback" not in str(error)
    assert not canary.exists()


def saved_dataset(folder: Path) -> Path:
    images = [{"bytes": png_bytes(image), "path": None} for image in random_pixels(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
    datasets.DatasetDict({"test": rows}).save_to_disk(str(folder))
    return folder


def test_a_saved_dataset_runs_nothing(tmp_path: Path, canary: Path) -> None:
    folder = saved_dataset(tmp_path / "saved")
    plant_script(folder, canary)
    plant_pickles(folder / "test", canary)
    source = open_source(HuggingFaceConfig(kind="huggingface", path=str(folder)), need_labels=True)
    assert source.splits == {"test": 4}
    assert not canary.exists()


@pytest.mark.parametrize("what", ["split", "file"])
def test_a_saved_dataset_does_not_list_files_of_others(tmp_path: Path, what: str) -> None:
    other, folder = saved_dataset(tmp_path / "other"), saved_dataset(tmp_path / "saved")
    if what == "split":
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../other/test"]}))
    else:
        state = json.loads((folder / "test/state.json").read_text())
        name = state["_data_files"][0]["filename"]
        state["_data_files"] = [{"filename": f"../../other/test/{name}"}]
        (folder / "test/state.json").write_text(json.dumps(state))
    assert other.is_dir()
    with pytest.raises(ConfigError, match="which is no file of its own"):
        open_source(HuggingFaceConfig(kind="huggingface", path=str(folder)), need_labels=True)


def with_card(folder: Path, **config: Any) -> Path:
    """A dataset's folder whose card says what the dataset is made of."""
    (folder / "data").mkdir(parents=True)
    card = {"configs": [{"config_name": "default", **config}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return folder


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder of this machine that is no part of any dataset."""
    return write_parquet(tmp_path / "private", [png_bytes(image) for image in random_pixels(4)], [0, 1, 2, 0])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"data_files": "../private/*.parquet"},
        {"data_files": "data/../../private/*.parquet"},
        {"data_files": "{private}/*.parquet"},
        {"data_files": "file://{private}/*.parquet"},
        {"data_files": [{"split": "test", "path": ["own.parquet", "{private}/*.parquet"]}]},
        {"data_dir": "../private"},
        {"data_dir": "{private}"},
    ],
)
def test_a_card_does_not_name_files_of_others(
    tmp_path: Path, private: Path, config: dict[str, Any], streaming: bool
) -> None:
    folder = with_card(tmp_path / "source", **json.loads(json.dumps(config).replace("{private}", str(private))))
    shutil.copy(next(private.iterdir()), folder / "own.parquet")
    with pytest.raises(
        ConfigError, match=r"^source\.path: the card of .*/source names files elsewhere \(test-00000-of-"
    ):
        open_any(HuggingFaceConfig(kind="huggingface", path=str(folder), streaming=streaming))
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")), "nothing of it was read"


def open_any(config: SourceConfig) -> Source:
    return open_source(config, need_labels=True)


# Opens datasets of the Hub, both ways, and prints how many rows each has, or why it has none.
OPENED = """
import sys
from pipeline.config.sources import HuggingFaceConfig, SourceConfig
from pipeline.core.errors import ConfigError
from pipeline.sources.registry import open_source
for path in sys.argv[1:]:
    for streaming in (False, True):
        config = HuggingFaceConfig(kind="huggingface", path=path, streaming=streaming)
        try:
            print(dict(open_source(config, need_labels=True).splits))
        except ConfigError as error:
            print(error)
"""


def test_a_card_of_the_hub_does_not_name_files_of_others(tmp_path: Path, private: Path) -> None:
    rows = next(private.iterdir()).read_bytes()
    file = {"test.parquet": lfs_blob(hashlib.sha256(rows).hexdigest(), len(rows), rows)}
    with running_hub() as hub:
        places = {"own": "*.parquet", "local": f"{private}/*.parquet", "other": "hf://datasets/user/own@main/*.parquet"}
        for name, place in places.items():
            card = git_blob((with_card(tmp_path / name, data_files=place) / "README.md").read_bytes())
            commit = {"README.md": card, **(file if name == "own" else {})}
            hub.repositories[f"user/{name}"] = Repository(private=False, commits=[commit], messages=["one"])
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}
        environment = {**os.environ, **quiet, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", OPENED, *(f"user/{name}" for name in places)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    own, refused = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    assert own == ["{'train': 4}"] * 2
    assert len(refused) == 4
    assert all("names files elsewhere" in said or "Data files don't belong to" in said for said in refused), refused
    assert len(list((tmp_path / "home").rglob("*.arrow"))) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_links_in_a_folder_of_one_s_own_are_followed(tmp_path: Path, private: Path, streaming: bool) -> None:
    """As the Hub's client keeps a dataset: a folder of links."""
    folder = with_card(tmp_path / "source", data_files=f"{tmp_path}/source/data/*.parquet")
    (folder / "data/test.parquet").symlink_to(next(private.iterdir()))
    source = open_any(HuggingFaceConfig(kind="huggingface", path=str(folder), streaming=streaming))
    assert source.splits == {"train": 4}


def test_torchvisions_lsun_is_refused_for_its_pickle() -> None:
    with pytest.raises(ConfigError, match="reads LSUN through a pickle"):
        open_source(sources.TorchvisionConfig(kind="torchvision", path="LSUN"), need_labels=True)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_checkpoint_runs_nothing(tmp_path: Path, canary: Path, suffix: str) -> None:
    weights = tmp_path / f"weights{suffix}"
    weights.write_bytes(pickle.dumps(Payload(canary)))
    zipped = tmp_path / f"zipped{suffix}"
    torch.save({"weight": Payload(canary)}, zipped)
    for path in (weights, zipped):
        with pytest.raises(ConfigError, match=r"model\.weights"):
            load_model(DigitsConfig(kind="digits", weights=str(path)), seed=0, device=torch.device("cpu"))
    assert not canary.exists()


def test_weights_that_a_library_finds_in_its_own_cache_run_nothing(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchvision asks PyTorch for a whole pickle, and does not check the digest of a file that is there already.
    from torchvision.models import ResNet18_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(Payload(canary), file)
    config = TorchvisionConfig(kind="torchvision", name="resnet18", weights="IMAGENET1K_V1")
    with pytest.raises(ConfigError, match="torchvision cannot make resnet18"):
        load_model(config, seed=0, device=torch.device("cpu"))
    assert not canary.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("transformers", {"use_kernels": True}),
        ("transformers", {"trust_remote_code": True}),
        ("transformers", {"attn_implementation": "someone/kernel"}),
    ],
)
def test_kwargs_that_run_code_are_refused(kind: Any, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=rf"kwargs\.{next(iter(kwargs))}"):
        section("model", kind=kind, name="any", kwargs=kwargs)


@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_weights_that_timm_is_pointed_to_run_nothing(tmp_path: Path, canary: Path, way: str) -> None:
    file = str(tmp_path / "evil.pth")
    torch.save(Payload(canary), file)
    kwargs = {way: file if way == "checkpoint_path" else {"file": file}}
    weights = None if way == "checkpoint_path" else "r160_in1k"
    config = TimmConfig(kind="timm", name="test_resnet", weights=weights, kwargs=kwargs)
    with pytest.raises(ConfigError, match="timm cannot make test_resnet"):
        load_model(config, seed=0, device=torch.device("cpu"))
    assert not canary.exists()


def test_a_transformers_folder_with_code_runs_nothing(tmp_path: Path, canary: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    plant_script(folder, canary)
    auto = {name: f"model.{name}" for name in ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")}
    (folder / "config.json").write_text(json.dumps({"model_type": "made-up", "auto_map": auto}))
    for weights in (None, str(folder)):
        with pytest.raises(ConfigError, match="transformers cannot make"):
            load_model(
                TransformersConfig(kind="transformers", name=str(folder), weights=weights),
                seed=0,
                device=torch.device("cpu"),
            )
    assert not canary.exists()


def test_an_output_folder_runs_nothing(out: Path, canary: Path) -> None:
    plant_script(out, canary)
    plant_pickles(out, canary)
    plant_pickles(out / ".run", canary)
    (out / ".run/sessions.jsonl").write_bytes(pickle.dumps(Payload(canary)))
    verify(out)
    report(out)
    pipeline.training_dataset(out, "test")
    with pytest.raises(ConfigError, match="Dataset scripts are no longer supported"):
        pipeline.load(out, split="test")
    (out / f"{out.name}.py").unlink()
    pipeline.load(out, split="test")[0]
    for path in (out / "manifest.json", shard_path(out, ".run/receipts/test-00000-of-00002.json")):
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Payload(canary)))
        try:
            assert verify(out).problems
        except PipelineError as error:
            assert "cannot be read" in str(error)
        path.write_bytes(before)
    assert not canary.exists()


# ------------------------------------------------------------------------------------------------ bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, data: bytes = b"\0" * 100) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data, 9))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "WEBP", lossless=True)
    frame = bytes(6) + (1).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + buffer.getvalue()[12:]
    parts = [(b"VP8X", b"\2\0\0\0" + canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    data = b"WEBP" + b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts)
    return b"RIFF" + struct.pack("<I", len(data)) + data


def tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(12)


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x08\x01\0\0"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6) + frame + b";"


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue().replace(
        struct.pack(">BHH", 8, 8, 8), struct.pack(">BHH", 8, min(height, 65535), min(width, 65535)), 1
    )


BOMBS = {
    "png": png(60_000, 60_000),
    "png-absurd": png(2**31 - 1, 2**31 - 1),
    "webp": webp(60_000, 60_000),
    "tiff": tiff(60_000, 60_000),
    "tiff-absurd": tiff(2**32 - 1, 2**32 - 1),
    "gif": gif(60_000, 60_000),
    "bmp": bmp(2**31 - 1, 2**31 - 1),
    "jpeg": jpeg(60_000, 60_000),
}


def packed_bombs() -> dict[str, bytes]:
    """Small images with 300 MB of zeros in them, which take seconds to pack."""
    zeros = zlib.compress(bytes(300_000_000), 9)
    return {
        "png-text": png(8, 8, *[chunk(b"zTXt", b"a%d\0\0" % i + zeros) for i in range(3)]),
        "png-itxt": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros)),
        "png-iccp": png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros)),
        "png-idat": png(8, 8, data=bytes(300_000_000)),
    }


# The script that a subprocess runs on each: how much more memory it came to hold, and what it answered.
BOUNDED = """
import io, resource, sys, time
from pathlib import Path
from pipeline.config.schema import PreprocessConfig
from pipeline.core.images import UndecodableError, open_image, decode_image
from pipeline.engine.decode import read_image
read = lambda data: read_image(lambda: open_image(io.BytesIO(data)), PreprocessConfig(resize=8, crop=8), 10_000_000)
read(Path(sys.argv[1]).read_bytes())
for path in sys.argv[2:]:
    data = Path(path).read_bytes()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for attempt in (read, lambda data: decode_image(data, (3, 8, 8))):
        try:
            answer = str(tuple(attempt(data).shape))
        except UndecodableError as error:
            answer = str(error)
        spent = time.process_time() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(Path(path).name, grown, round(spent, 1), answer, sep="\\t")
"""


def test_bombs_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(png_bytes(random_pixels(1)[0]))
    packed = packed_bombs()
    bombs = {**BOMBS, **packed}
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-c", BOUNDED, str(tmp_path / "good")]
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in bombs)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(bombs)
    for name, grown, seconds, answer in lines:
        # 64 MB is what Pillow lets all texts of a PNG come to.
        assert int(grown) < 100, (name, grown)
        assert float(seconds) < 5, (name, seconds)
        if name not in packed:
            assert answer[0] != "(", (name, answer)


@pytest.mark.parametrize("name", ["png", "webp", "gif", "jpeg", "tiff"])
@pytest.mark.filterwarnings("ignore")
def test_the_refusal_names_the_key_that_raises_the_limit(name: str) -> None:
    with pytest.raises(UndecodableError, match=r"runtime\.max_pixels = 10000000"):
        read_image(lambda: open_image(io.BytesIO(BOMBS[name])), PreprocessConfig(), 10_000_000)


def test_pillows_own_limit_stays_for_what_decodes_by_itself() -> None:
    read_image(lambda: open_image(io.BytesIO(png_bytes(random_pixels(1)[0]))), PreprocessConfig(), 1000)
    assert Image.MAX_IMAGE_PIXELS is not None
    with pytest.raises(UndecodableError, match=r"its pixels are more than runtime\.max_pixels = 1000"):
        # As a dataset of torchvision does it.
        read_image(lambda: Image.open(io.BytesIO(BOMBS["png"])).convert("RGB"), PreprocessConfig(), 1000)


def test_no_image_is_opened_to_open_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cells are paths, the digest takes the files, whatever they claim to hold."""
    monkeypatch.setattr("pipeline.sources.cells.open_image", lambda _: pytest.fail("an image was opened"))
    digests = set()
    for data in (b"one", b"two", b"one"):
        (tmp_path / "photos/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos/a/0.png").write_bytes(png(12_000, 12_000, data=data))
        digests.add(
            open_source(HuggingFaceConfig(kind="huggingface", path=str(tmp_path / "photos")), need_labels=False).digest
        )
    assert len(digests) == 2


def test_a_digest_of_a_torchvision_dataset_takes_no_image_past_pillows_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes decode by themselves; what they would be warned of has its error in the digest instead."""
    for name in ("train", "val"):
        (tmp_path / "imagenette2" / name / "n01440764").mkdir(parents=True)
    file = tmp_path / "imagenette2/train/n01440764/0.JPEG"
    file.write_bytes(png_bytes(random_pixels(1, side=40)[0]))
    config = sources.TorchvisionConfig(
        kind="torchvision", path="Imagenette", kwargs={"root": str(tmp_path), "download": False, "size": "full"}
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**9)
    whole = open_source(config, need_labels=True).digest
    monkeypatch.setattr("pipeline.sources.torchvision.PILLOW_PIXELS", 1000)
    assert open_source(config, need_labels=True).digest != whole


def test_a_stored_picture_of_another_shape_is_not_decoded() -> None:
    with pytest.raises(OtherShapeError, match=r"^9000x9000 in mode RGB$"):
        decode_image(png(9_000, 9_000), (3, 8, 8))


def test_no_manifest_makes_room_for_a_bomb(out: Path) -> None:
    """Not by the shape that it claims, nor by a config in which the limit was raised."""
    content = json.loads((out / "manifest.json").read_text())
    assert Manifest.model_validate({**content, "shape": [3, 10_000, 10_000]}).shape == (3, 10_000, 10_000)
    content["shape"] = [3, 10_000, 10_001]
    content["config"]["runtime"]["max_pixels"] = 2**40
    (out / "manifest.json").write_text(json.dumps(content))
    looks: list[Callable[[], object]] = [lambda: verify(out), lambda: report(out), lambda: inspect(out)]
    looks.append(lambda: pipeline.training_dataset(out, "test"))
    for look in looks:
        with pytest.raises(
            PipelineError, match=r"shape: 10001x10000 is more than the 100,000,000 pixels that an image"
        ):
            look()


def test_nothing_is_stored_that_could_not_be_read_again(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.loader.MOST_PIXELS", 16 * 16 - 1)
    result = fgsm("generate", write_config(runtime={"max_pixels": 2**40}))
    assert result.exit_code == 2
    assert "is 16x16, and an image of a dataset has at most 255 pixels" in result.stderr
    assert not (tmp_path / "out/manifest.json").exists()
    smaller = write_config(runtime={"max_pixels": 2**40}, preprocess={"resize": 15})
    assert fgsm("generate", smaller).exit_code == 0


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "PDF", "SGI"])
def test_formats_that_no_dataset_needs_are_not_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript ran"))
    with pytest.raises(UndecodableError, match="cannot identify"):
        read_image(lambda: open_image(io.BytesIO(buffer.getvalue())), PreprocessConfig(), 10_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_that_datasets_use_are_opened(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    pixels = read_image(lambda: open_image(io.BytesIO(buffer.getvalue())), PreprocessConfig(), 10_000)
    assert pixels.shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["huggingface", "imagefolder"])
def test_a_source_opens_no_other_format(tmp_path: Path, kind: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "EPS")
    if kind == "huggingface":
        folder = write_parquet(tmp_path / "data", [png_bytes(random_pixels(1)[0]), buffer.getvalue()], [0, 1])
    else:
        folder = tmp_path / "data"
        (folder / "a").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "a/0.png")
        (folder / "a/1.png").write_bytes(buffer.getvalue())
    source = open_source(section("source", kind=kind, path=str(folder)), need_labels=True)
    opener = openers_of(source, next(iter(source.splits)))[1]
    with pytest.raises(UndecodableError, match="cannot identify"):
        read_image(opener, PreprocessConfig(), 10_000)


# ----------------------------------------------------------------------------- names, paths and links


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


def with_own_id(content: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds, with the run id that follows from its identity, in the names of its files too."""
    renamed: dict[str, Any] = json.loads(json.dumps(content).replace(content["run_id"], run_id_of(content["identity"])))
    return renamed


def make_consistent(out: Path, content: dict[str, Any]) -> None:
    """Write an altered manifest, and receipts, with the run id, the names and the digests that they would have."""
    former, run_id = content["run_id"], run_id_of(content["identity"])
    write_sealed(out / "manifest.json", with_own_id(content))
    for path in (out / ".run/receipts").iterdir():
        write_sealed(path, json.loads(path.read_text().replace(former, run_id)))
    for path in list(out.rglob(f"*-{former}.*")):
        path.rename(path.with_name(path.name.replace(former, run_id)))


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
        assert "manifest.json cannot be read" in result.stderr
    with pytest.raises(PipelineError, match="cannot be read"):
        pipeline.training_dataset(out, "test")
    assert neighbour.read_text() == "a neighbour"


FILE: dict[str, Any] = {"path": "data/a.tar", "cuts": [4, 12]}


@pytest.mark.parametrize(
    ("split_rows", "streamed", "said"),
    [
        ({"test": None}, {}, "streamed lists no files"),
        ({"test": None}, {"test": []}, "streamed.test: Tuple should have at least 1 item"),
        ({"test": 12}, {"train": [FILE]}, "streamed lists other splits than split_rows"),
        ({"test": 12, "train": None}, {"test": [FILE]}, "streamed lists other splits than split_rows"),
        ({"../x": 12}, {"../x": [FILE]}, "String should match pattern"),
        *(
            ({"test": 12}, {"test": [{**FILE, "cuts": cuts}]}, "streamed.test.0.cuts: the rows at which shards end")
            for cuts in ([], [12, 4], [4, 4], [0, 12], [0, 0])
        ),
        ({"test": 12}, {"test": [{**FILE, "cuts": [-1]}]}, "streamed.test.0.cuts.0: Input should be greater than"),
        ({"test": 12}, {"test": [{**FILE, "cuts": [2**63]}]}, "streamed.test.0.cuts.0: Input should be less than"),
        *(
            ({"test": 12}, {"test": [{**FILE, "path": path}]}, "streamed.test.0.path")
            for path in ("", "/etc/passwd", "..", "../a.tar", "data/../../a.tar")
        ),
    ],
)
def test_a_manifest_whose_streamed_files_make_no_plan(
    out: Path, split_rows: dict[str, Any], streamed: dict[str, Any], said: str
) -> None:
    content = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**content, "split_rows": split_rows, "streamed": streamed}))
    for look in (verify, inspect, pipeline.training_dataset):
        with pytest.raises(PipelineError, match=rf"^{out}/manifest\.json cannot be read \(.*{said}.*\)\. Restore it"):
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
        with pytest.raises(ConfigError, match=r"^output\.images_per_shard: 6 cuts 6,000,001 rows of test into more"):
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
    with pytest.raises(ConfigError, match=rf"^{place}: its manifest\.json lists {re.escape(file)}, which is no"):
        _addresses(place, other, "clean")


def test_features_are_those_of_the_config(out: Path) -> None:
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["attack"]["target"] = content["identity"]["attack.target"] = 1
    make_consistent(out, content)
    with pytest.raises(PipelineError, match="its features are not those that a run of its config writes"):
        verify(out)


def test_what_cannot_be_asked_again_is_a_sentence(out: Path) -> None:
    content = json.loads((out / "manifest.json").read_text())
    del content["identity"]["model.content"]
    make_consistent(out, content)
    with pytest.raises(ConfigError, match="the victim that the config names has changed since the run"):
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
    assert f"{receipt.name} was altered, or is no receipt" in result.stderr
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
    assert "is a link that leads out of the dataset's folder" in result.stderr
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
    with pytest.raises(ConfigError, match="is a link that leads out"):
        report(out)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["assets/key.png", "README.md", "report.html"])
def test_no_link_is_published(out: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "id_ed25519").write_text("a private key")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "id_ed25519")
    result = fgsm("publish", out, "user/name", "--dry-run")
    assert result.exit_code == 2
    assert f"{name} is a link that leads out of the dataset's folder" in result.stderr


# --------------------------------------------------------------------------------------- the terminal

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
    from pipeline.cli import _Formatter

    record = logging.LogRecord("pipeline.generate", logging.INFO, "", 0, "%s", (NASTY,), None)
    assert _Formatter("%(message)s").format(record).isprintable()
    record.name = "huggingface_hub"
    assert "\n" in _Formatter("%(message)s").format(record)
    assert "\x1b" not in _Formatter("%(message)s").format(record)


# ------------------------------------------------------------------------------------------- factories


def test_code_that_a_manifest_names_is_said_before_it_runs(out: Path) -> None:
    code = (out.parent.parent / "said.py").resolve()
    code.write_text(f"import sys\nsys.stderr.write('it runs\\n')\n{FACTORY}")
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["model"]["name"] = f"{code}:make"
    write_sealed(out / "manifest.json", content)
    lines = fgsm("verify", out, "--recompute").stderr.splitlines()
    said = next(index for index, line in enumerate(lines) if f"Running code that the manifest names: {code}" in line)
    assert "Only for datasets that you trust." in lines[said]
    assert said < lines.index("it runs")


@pytest.mark.parametrize("name", ["{out}/evil.py:make", "evil.py:make", "out/evil.py:make"])
def test_code_in_the_dataset_itself_never_runs(
    out: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (out / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    monkeypatch.chdir(out if name == "evil.py:make" else out.parent)
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["model"]["name"] = name.format(out=out)
    write_sealed(out / "manifest.json", content)
    result = fgsm("verify", out, "--recompute")
    assert result.exit_code == 2
    assert "would be code out of the dataset itself, which is never run" in result.stderr
    assert not canary.exists()


def test_a_module_in_the_dataset_never_runs(out: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "evil_module.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    monkeypatch.chdir(out)
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["model"]["name"] = content["identity"]["model.name"] = "evil_module:make"
    make_consistent(out, content)
    assert fgsm("verify", out, "--recompute").exit_code == 2
    assert not canary.exists()


def test_only_recompute_runs_the_code_that_a_manifest_names(out: Path, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["model"]["name"] = f"{tmp_path}/evil.py:make"
    write_sealed(out / "manifest.json", content)
    for arguments in (("verify",), ("inspect",), ("report",)):
        fgsm(*arguments, out)
    fgsm("publish", out, "user/name", "--dry-run")
    pipeline.training_dataset(out, "test")
    pipeline.load(out, split="test")[0]
    assert not canary.exists()
    fgsm("verify", out, "--recompute")
    assert canary.exists()


# ---------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"source.kwargs={{token: {SECRET}}}", "source.kwargs.token"),
        ("source.kwargs={a: {storage: [{password: swordfish}]}}", "source.kwargs.a.storage.password"),
        ("model.kwargs={use_auth_token: swordfish}", "model.kwargs.use_auth_token"),
        ("model.kwargs={api_key: swordfish}", "model.kwargs.api_key"),
        ("model.kwargs={aws_secret_access_key: swordfish}", "model.kwargs.aws_secret_access_key"),
        (f"source.path={SECRET}", "source.path"),
        ("source.path=https://user:swordfish@host/data", "source.path"),
        ("source.path=https://host/data?X-Amz-Signature=swordfish", "source.path"),
        ("output.path=s3://key:swordfish@bucket/x", "output.path"),
        ("model.weights=swordfish-of-the-environment", "model.weights"),
        ("source.kwargs={connection_string: swordfish}", "source.kwargs.connection_string"),
        ("source.kwargs={a: 'AccountName=a;AccountKey=swordfish/+==;EndpointSuffix=b'}", "source.kwargs.a"),
        ("source.kwargs={a: 'Authorization: Basic swordfish'}", "source.kwargs.a"),
        (f"nonsense={SECRET}", "nonsense"),
    ],
)
def test_a_config_with_a_credential_is_refused_without_showing_it(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish-of-the-environment")
    for debug in ((), ("--debug",)):
        result = fgsm("generate", write_config(), "--set", override, *debug)
        assert result.exit_code == 2
        assert f"{key} holds a credential" in result.stderr
        assert "swordfish" not in result.output
        assert SECRET not in result.output


@pytest.mark.parametrize(
    "path",
    [
        "simplecache::https://host/a.tar?auth=1",
        "zip://a.parquet::https://host/a.zip#auth=1",
        "HTTPS://host/a.tar?auth=1",
    ],
)
def test_no_part_of_a_chain_of_addresses_has_a_query(write_config: WriteConfig, path: str) -> None:
    source = {"path": path, "streaming": True}
    with pytest.raises(ConfigError, match=r"^source\.path has a query in it"):
        load_config(str(write_config(source=source)))
    with pytest.raises(ConfigError, match=r"^output\.path: the address holds more than a bucket and a prefix"):
        load_config(str(write_config(output={"path": path})))


def test_classes_may_be_named_as_credentials_are() -> None:
    classes = {"password": "token", "api_key": 3}
    model = {"label_map": classes}
    assert find_secret({"model": model, "evaluators": [model]}) is None
    assert find_secret({"model": {"label_map": {**classes, "cat": SECRET}}}) == "model.label_map.cat"
    assert find_secret({"model": {"label_map": {SECRET: 3}}}) == "model.label_map"
    assert find_secret({"model": {"kwargs": model}}) == "model.kwargs.label_map.password"


def test_secrets_may_begin_as_paths_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for secret in ("/swordfish/of+the", "/" + "s" * 300):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        assert redact(f"with {secret}.") == "with ***."
        assert find_secret({"model": {"name": secret}}) == "model.name"
    (tmp_path / "token").touch()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{tmp_path}/token")
    assert redact(f"in {tmp_path}/token") == f"in {tmp_path}/token"


@pytest.mark.parametrize(
    "name", ["AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "DB_PASS"]
)
def test_credentials_of_other_stores_are_known(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "swordfish+of/the/sea==")
    assert redact("with swordfish+of/the/sea==.") == "with ***."
    assert find_secret({"source": {"path": "swordfish+of/the/sea=="}}) == "source.path"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("AccountName=me;AccountKey=abc/def+ghi==;Endpoint=x", "AccountName=me;AccountKey=***;Endpoint=x"),
        ("Endpoint=x;SharedAccessKey=abc/def+ghi==", "Endpoint=x;SharedAccessKey=***"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic ***'}"),
        ("sent Bearer abc4defgh", "sent Bearer ***"),
    ],
)
def test_what_signs_a_request_is_no_text(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text", ["a cup bearer standing", "the standard bearer 8", "AccountKey=None", "monkey=business"]
)
def test_words_stay_words(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KEYBOARD", "standing")
    monkeypatch.setenv("BY_PASSING", "business")
    monkeypatch.setenv("SORT_KEY", "cup")
    assert redact(text) == text


@pytest.mark.parametrize("key", ["source.path", "source.kwargs.root", "model.weights"])
def test_a_password_in_an_address_is_found_where_a_path_belongs(write_config: WriteConfig, key: str) -> None:
    """Made a path, https:// would have one slash, and the password would be quoted as a folder that is not there."""
    result = fgsm(
        "generate", write_config(), "--set", "source.kind=imagefolder", "--set", f"{key}=https://me:hush@host/x.pt"
    )
    assert result.exit_code == 2
    assert f"{key} holds a credential" in result.stderr
    assert "hush" not in result.output


@pytest.mark.parametrize("text", ["glass-bottles-and-other-containers", "glove-compartments-of-cars-v2"])
def test_names_that_begin_like_tokens_are_no_secrets(text: str) -> None:
    assert find_secret({"source": {"path": f"data/{text}", "classes": [text]}}) is None
    assert redact(text) == text


# Put together here, so that no scanner takes this file for a leak.
ISSUED = [
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 20,
    "glpat-" + "a1B2" * 5,
    "sk-" + "a1B2" * 12,
    "sk-proj-" + "a1-B_" * 8,
    "sk-ant-api03-" + "a1-B_" * 8,
    "sk_live_" + "a1B2" * 6,
    "AKIA" + "A1B2" * 4,
    "ASIA" + "A1B2" * 4,
    "AIza" + "a1B2c" * 7,
    "xoxb-" + "123456789012-" * 2 + "abcdef",
    "hf_" + "aB" * 17,
    "npm_" + "a1B2" * 9,
    "eyJ" + "hbGciOiJ9." + "eyJ" + "zdWIiOiJ9.dozjgNryP4",
    "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE\nabcd\n-----END RSA PRIVATE " + "KEY-----",
    "-----BEGIN PRIVATE " + "KEY-----\nMIIE",
    "-----BEGIN OPENSSH PRIVATE " + "KEY-----\nb3Bl",
]


@pytest.mark.parametrize("token", ISSUED)
def test_tokens_are_known_by_how_their_issuers_write_them(token: str) -> None:
    assert find_secret({"model": {"kwargs": {"a": [token]}}}) == "model.kwargs.a"
    assert find_secret({"source": {"path": f"https://host/{token}/x"}}) == "source.path"
    assert redact(f"read with {token}") == "read with ***"


@pytest.mark.parametrize(
    "key",
    [
        "pwd",
        "pass",
        "passwd",
        "PASSWORD",
        "db_pass",
        "cookie",
        "Set-Cookie",
        "X-Api-Token",
        "X-Api-Key",
        "auth_token",
        "Authorization",
        "Proxy-Authorization",
        "sas_token",
        "client_secret",
        "private-key",
        "auth",
    ],
)
def test_keys_that_name_credentials(key: str) -> None:
    assert find_secret({"source": {"kwargs": {"headers": {key: "swordfish"}}}}) == f"source.kwargs.headers.{key}"
    assert find_secret({"source": {"kwargs": {key: True}}}) is None, "a switch"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("to=https%3A%2F%2Fme%3Apw%40host%2Fx", "to=https%3A%2F%2F***%40host%2Fx"),
        (
            "u=https%3A%2F%2Fhost%2Fx%3FX-Amz-Signature%3Dabc%26b%3D2",
            "u=https%3A%2F%2Fhost%2Fx%3FX-Amz-Signature%3D***%26b%3D2",
        ),
        ("https%3A%2F%2Fhost%2Fx%3Fa%3D1%26sig%3Dab%252Fc", "https%3A%2F%2Fhost%2Fx%3Fa%3D1%26sig%3D***"),
        ("https://host/x?sv=1&sig=abc%2Fd&se=2", "https://host/x?sv=1&sig=***&se=2"),
        ("https://host/x?a=1&amp;access_token=abc", "https://host/x?a=1&amp;access_token=***"),
        ("got sword%2Ffish%2Bof%2Fthe%20sea", "got ***"),
        ("got sword/fish%2Bof/the%20sea", "got ***"),
        ("Cookie: session=abcdefgh", "Cookie: ***"),
        ("{'X-Api-Token': 'abcdefgh'}", "{'X-Api-Token': '***'}"),
        ("Server=h;Uid=me;Pwd=swordfish;", "Server=h;Uid=me;Pwd=***;"),
    ],
)
def test_credentials_are_known_within_addresses_and_headers(
    monkeypatch: pytest.MonkeyPatch, text: str, shown: str
) -> None:
    monkeypatch.setenv("MY_SECRET", "sword/fish+of/the sea")
    assert redact(text) == shown


@pytest.mark.parametrize(
    "value",
    [
        "resnet50-0676ba61.pth",
        "weights/sk-resnet-50-imagenet-224-epoch-100.safetensors",
        "0123456789abcdef0123456789abcdef01234567",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "550e8400-e29b-41d4-a716-446655440000",
        "vit_base_patch16_clip_quickgelu_224.dfn2b_s39b_in12k",
        "hf-hub:timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
        "models.my_very_long_package_name:build_a_model_with_a_long_name_2",
        "/data/AsiaFaces2020Collection/asia1234567890123456/train",
        "data/mask-0123456789abcdef0123456789abcdef.png",
        "s3://bucket/a@b/pass/token=1",
        "abfs://container@account.dfs.core.windows.net/x",
        "https://host/a/b%40c?page=2",
        "https%3A%2F%2Fhost%2Fa%40b",
        "n02124075, Egyptian cat; the pass of the cookie",
        "-----BEGIN PUBLIC KEY-----",
    ],
)
def test_ordinary_values_are_no_credentials(value: str) -> None:
    assert find_secret({"model": {"weights": value, "kwargs": {"a": [value]}}, "source": {"classes": [value]}}) is None
    assert redact(value) == value


@pytest.mark.parametrize("key", ["passes", "bypass", "num_pass", "compass", "author", "token_size", "keypass_dim"])
def test_keys_that_only_look_like_those_of_credentials(key: str) -> None:
    assert find_secret({"model": {"kwargs": {key: "x"}}}) is None


@pytest.mark.parametrize(
    "kwargs", [{"class_token": True}, {"reg_tokens": 4}, {"global_pool": "token"}, {"token": None}, {"num_tokens": 1}]
)
def test_parameters_of_models_are_no_credentials(kwargs: dict[str, Any]) -> None:
    assert find_secret({"model": {"kwargs": kwargs}}) is None


def test_messages_lose_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish/of+the/environment")
    monkeypatch.setenv("MY_TOKEN", "short")
    text = f"{SECRET} https://me:pw@host/x?a=1&sig=abc&b=2 swordfish/of+the/environment short"
    assert redact(text) == "*** https://***@host/x?a=1&sig=***&b=2 *** short"
    assert presentable(f"\x1b{SECRET}") == "\\x1b***"


def test_a_bug_s_traceback_shows_no_credential() -> None:
    code = (
        "import pipeline.cli, pipeline.output.summary, sys\n"
        "address, secret = 'https://me:pw@host/x?X-Amz-Signature=abc', sys.argv[1]\n"
        "def broken(*_): raise RuntimeError(f'GET {address} {secret}')\n"
        "pipeline.output.summary.inspect, sys.argv[1:] = broken, ['inspect', 'out']\n"
        "pipeline.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, SECRET], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: GET https://***@host/x?X-Amz-Signature=*** ***" in done.stderr
    assert SECRET not in done.stderr


def test_a_token_of_the_environment_is_in_no_file(
    write_config: WriteConfig, tmp_path: Path, factory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a factory logs it and quotes it, and a decoder quotes it about an image."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    careless = """
import logging, os
logging.getLogger("pipeline.factory").warning("logged %s", os.environ["HF_TOKEN"])

def fail(**kwargs):
    raise RuntimeError("quoted " + os.environ["HF_TOKEN"])
"""
    factory_file.write_text(factory_file.read_text() + careless)
    config = write_config(runtime={"max_skipped": 0.5})
    broken = fgsm("generate", config, "--set", f"model.name={factory_file}:fail", "--debug")
    assert broken.exit_code == 2
    assert "logged ***" in broken.stderr
    assert "quoted ***" in broken.stderr

    whole, seen = pipeline.engine.decode._upright, []

    def quoting(image: Image.Image) -> Image.Image:
        seen.append(image)
        if len(seen) % 7 == 0:
            raise ValueError(f"read with {SECRET}")
        return whole(image)

    monkeypatch.setattr("pipeline.engine.decode._upright", quoting)
    done = fgsm("generate", config, "--debug")
    assert done.exit_code == 0
    inspected = fgsm("inspect", tmp_path / "out")
    assert "read with ***" in inspected.stdout
    files = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    reasons = [name for name, path in files.items() if b"read with ***" in path.read_bytes()]
    assert {"manifest.json", "report.html"} <= {*reasons}
    assert any(name.startswith(".run/receipts/") for name in reasons)
    assert "README.md" in files
    for said in (broken.output, done.output, inspected.output):
        assert SECRET not in said
    for path in files.values():
        assert SECRET.encode() not in path.read_bytes()


# -------------------------------------------------------------------------------- this machine's folders


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
    assert identities[0]["model.kwargs"] == {"file": "net.bin", "note": "Infinity"}
    assert identities[0] == identities[1]


def test_a_published_manifest_can_be_read(finished: Path, tmp_path: Path) -> None:
    names = ["/m/01yrx", "~", "./dog"]
    content = json.loads((finished / "manifest.json").read_text())
    content["config"]["source"]["classes"] = content["identity"]["source.classes"] = names
    content["dataset_classes"] = content["recorded_classes"] = names
    manifest = Manifest.model_validate(with_own_id(content))
    assert contradictions(manifest) == []
    shown = published(manifest)
    (tmp_path / "manifest.json").write_text(shown.model_dump_json())
    assert require_manifest(OutputFolder(tmp_path)) == shown
    assert contradictions(shown) == []


# -------------------------------------------------------------------------------------------- configs


# A billion laughs: ten aliases of the line before, eight times.
PAIRS = [*itertools.pairwise("abcdefghi")]
LAUGHS = "a: &a [x, x]\n" + "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in PAIRS)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LAUGHS, "it holds an alias"),
        ("source: &a [*a]", "it holds an alias"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("[" * 5000, "nested more than 50 deep"),
        ("runtime: {seed: " + "9" * 5000 + "}", "not valid YAML"),
        ("runtime: {seed: 0x" + "f" * 5000 + "}", "more than 64 bits"),
        ("source: {path: 2001-99-99}", "not valid YAML"),
        ('source: {path: "\\ud800"}', "a character that no path"),
        ('source: {path: "\\0"}', "a character that no path"),
        ("source: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("a: 1\na: 2", "stands there twice"),
    ],
)
def test_a_config_that_is_a_bomb(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(str(path))
    assert sentence in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 1000
    if "\n" not in text:
        with pytest.raises(ConfigError, match="is not a YAML value"):
            load_config(
                "digits", [f"source.path={text.partition(': ')[2] if text.startswith(('source', 'runtime')) else text}"]
            )


@pytest.mark.parametrize(
    "front",
    [
        LAUGHS,
        # Merged, they are a billion pairs that PyYAML itself writes out.
        "a: &a {x: 1}\n"
        + "".join(f"{name}: &{name} {{<<: [{', '.join([f'*{former}'] * 10)}]}}\n" for former, name in PAIRS),
        "a: " + "[" * 60 + "]" * 60,
    ],
)
def test_a_card_that_is_a_bomb_has_no_front_matter(front: str) -> None:
    began = time.process_time()
    assert front_matter(f"---\nlicense: mit\n{front}\n---\nText.".encode()) is None
    assert time.process_time() - began < 5
    assert front_matter(b"---\na: [mit]\nlicense: mit\n---\nText.") == {"a": ["mit"], "license": "mit"}


def test_messages_quote_values_in_part_only(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"source": ["x" * 1000] * 50}))
    with pytest.raises(ConfigError) as refused:
        load_config(str(path))
    assert len(str(refused.value)) < 400


def test_a_receipt_is_as_strict_as_it_was(out: Path) -> None:
    content = json.loads(shard_path(out, ".run/receipts/test-00000-of-00002.json").read_text())
    assert Receipt.model_validate(content).shard == "test-00000-of-00002"
    with pytest.raises(ValidationError):
        Receipt.model_validate({**content, "split": "../x"})


def test_a_manifest_nested_without_end(out: Path) -> None:
    (out / "manifest.json").write_text('{"format": 3, "config": ' + "[" * 200_000)
    with pytest.raises(PipelineError, match="cannot be read"):
        require_manifest(OutputFolder(out))


def test_want_of_memory_is_a_sentence(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any) -> str:
        raise MemoryError

    monkeypatch.setattr("pipeline.output.summary.inspect", greedy)
    result = fgsm("inspect", out)
    assert result.exit_code == 1
    assert "Error: There is not enough memory" in result.stderr
