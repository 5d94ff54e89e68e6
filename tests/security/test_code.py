"""What a dataset, a checkpoint or an output folder from elsewhere cannot run."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pydantic import ValidationError

import pipeline.engine.decode
from pipeline.check.verify import verify
from pipeline.config.schema import SourceConfig
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.models.digits import DigitsConfig
from pipeline.models.load import load_model
from pipeline.models.timm import TimmConfig
from pipeline.models.torchvision import TorchvisionConfig
from pipeline.models.transformers import TransformersConfig
from pipeline.reporting.page import report
from pipeline.sources.base import Source
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.registry import open_source
from pipeline.sources.torchvision import TorchvisionConfig as TorchvisionSourceConfig
from tests.conftest import FACTORY, fgsm, png_bytes, random_pixels, shard_path, write_parquet, write_sealed
from tests.support.configs import section
from tests.support.forgery import Payload, make_consistent
from tests.support.hub import Repository, git_blob, lfs_blob, running_hub
from tests.support.sources import openers_of


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
    with pytest.raises(ConfigError, match=rf"^source\.path: {folder}\S* "):
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
    with pytest.raises(ConfigError, match=r"^source\.path: .*card of .*/source .*\(test-00000-of-"):
        open_any(HuggingFaceConfig(kind="huggingface", path=str(folder), streaming=streaming))
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")), "nothing of it was read"


def open_any(config: SourceConfig) -> Source:
    return open_source(config, need_labels=True)


# Opens datasets of the Hub, both ways, and prints how many rows each has, or why it has none.
OPENED = """
import sys
from pipeline.config.schema import SourceConfig
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.core.errors import ConfigError
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.registry import open_source
from pipeline.sources.torchvision import TorchvisionConfig as TorchvisionSourceConfig
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
    assert all(re.search(r"source\.path: .*user/(local|other) ", said) for said in refused), refused
    assert len(list((tmp_path / "home").rglob("*.arrow"))) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_links_in_a_folder_of_one_s_own_are_followed(tmp_path: Path, private: Path, streaming: bool) -> None:
    """As the Hub's client keeps a dataset: a folder of links."""
    folder = with_card(tmp_path / "source", data_files=f"{tmp_path}/source/data/*.parquet")
    (folder / "data/test.parquet").symlink_to(next(private.iterdir()))
    source = open_any(HuggingFaceConfig(kind="huggingface", path=str(folder), streaming=streaming))
    assert source.splits == {"train": 4}


def test_torchvisions_lsun_is_refused_for_its_pickle() -> None:
    with pytest.raises(ConfigError, match=r"^source\.path: .*LSUN .*pickle"):
        open_source(TorchvisionSourceConfig(kind="torchvision", path="LSUN"), need_labels=True)


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
    with pytest.raises(ConfigError, match=r"^model.*resnet18"):
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
    with pytest.raises(ConfigError, match=r"^model.*test_resnet"):
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
        with pytest.raises(ConfigError, match=f"^model.*{folder}"):
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
    with pytest.raises(ConfigError, match=rf"^{out}\b.*{out.name}\.py"):
        pipeline.load(out, split="test")
    (out / f"{out.name}.py").unlink()
    pipeline.load(out, split="test")[0]
    for path in (out / "manifest.json", shard_path(out, ".run/receipts/test-00000-of-00002.json")):
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Payload(canary)))
        try:
            assert verify(out).problems
        except PipelineError as error:
            assert str(path) in str(error)
        path.write_bytes(before)
    assert not canary.exists()


# ----------------------------------------------------------------------------------------------------------- factories


def test_code_that_a_manifest_names_is_said_before_it_runs(out: Path) -> None:
    code = (out.parent.parent / "said.py").resolve()
    code.write_text(f"import sys\nsys.stderr.write('it runs\\n')\n{FACTORY}")
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["model"]["name"] = f"{code}:make"
    write_sealed(out / "manifest.json", content)
    lines = fgsm("verify", out, "--recompute").stderr.splitlines()
    said = next(index for index, line in enumerate(lines) if f"{code}:make" in line)
    assert re.search(r"\btrust\b", lines[said])
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
    assert re.search(rf"Error: model\.name: {name.format(out=out)} ", result.stderr)
    assert not canary.exists()


def test_a_module_in_the_dataset_never_runs(out: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "evil_module.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    monkeypatch.chdir(out)
    content = json.loads((out / "manifest.json").read_text())
    content["config"]["model"]["name"] = "evil_module:make"
    content["identity"]["models.make.name"] = "evil_module:make"
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
