"""What tests share: small real datasets, a small real model, and the command line in this process."""

import gc
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
import typer
import yaml
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

import pipeline
import pipeline.flow
from pipeline.cli import app
from pipeline.config.load import load_config
from pipeline.core.images import decode_image
from pipeline.executors.part import parse_part
from pipeline.layouts import registry
from pipeline.output.folder import json_digest
from pipeline.output.summary import Summary
from tests.support.variants import fgsm_at

# Other tests run on the same cores: how long an example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

# What `datasets` reads of a card at each opening, by the parser in C: the same values in a tenth of the time.
yaml.SafeLoader = yaml.CSafeLoader  # type: ignore[assignment, misc]

# Processes that tests start, and workers of their DataLoaders, need not import torch each: they fork from a server that
# has. There is one, which has imported what was named before it started: also what a run imports on the way.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *(
            "pipeline.cli",
            "pipeline.flow",
            "pipeline.engine.job",
            "pipeline.read.training",
            "datasets",
            "s3fs",
            __name__,
        ),
        *("pipeline.sources.arrow", "pipeline.models.factory", "pipeline.attacks.fgsm"),
        *("pipeline.reporting.page", "pipeline.reporting.plots", "pipeline.reporting.gallery"),
    ]
)

REPOSITORY = Path(__file__).parent.parent
CLASSES = ("cat", "dog", "eel")
FACTORY = '''
import torch
from torch import nn


class Net(nn.Module):
    """Convolution, pooling, linear: small, smooth and not trivial."""

    def __init__(self, channels: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.linear = nn.Linear(6 * 16, classes)

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(torch.tanh(3 * self.conv(x)), 4)
        return 4 * self.linear(x.flatten(1))


def make(**kwargs):
    return Net(**kwargs)


class Broken(Net):
    def forward(self, x):
        return super().forward(x) / 0.0


not_callable = 3
'''


def shard_path(folder: Path, name: str) -> Path:
    """A file of a shard in an output folder, or below one: its name with the run's id at its end."""
    path = folder / name
    (manifest, *_) = (there for parent in path.parents if (there := parent / "manifest.json").exists())
    return path.with_name(f"{path.stem}-{json.loads(manifest.read_text())['run_id']}{path.suffix}")


def without_run(text: str) -> str:
    """A text in which names of shards' files do not end in a run's id."""
    return re.sub(r"(?<=-of-\d{5})-[0-9a-f]{16}(-\d+)?", "", text)


def random_pixels(count: int, side: int = 16, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """(count, side, side, channels) uint8: coloured noise, with black and white corners to hit the clamp."""
    pixels = np.random.RandomState(seed).randint(0, 256, (count, side, side, channels)).astype(np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = 0, 255
    return pixels


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """One (H, W, C) or (H, W) uint8 image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    folder: Path, images: Sequence[bytes | None], labels: Any, split: str = "test", **columns: Any
) -> Path:
    """A Hub-style folder with one Parquet file; integer labels become a ClassLabel of CLASSES."""
    folder.mkdir(parents=True, exist_ok=True)
    features: dict[str, Any] = {"image": datasets.Image()}
    rows: dict[str, Any] = {"image": [None if data is None else {"bytes": data, "path": None} for data in images]}
    if labels is not None:
        rows["label"] = list(labels)
        features["label"] = datasets.ClassLabel(names=list(CLASSES))
    for name, (feature, values) in columns.items():
        rows[name], features[name] = values, feature
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    dataset.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` must not see what another test or the user has cached, and shows no bars."""
    cache = tmp_path_factory.mktemp("datasets-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the gate kill processes and never the machine, so that what the system has taken is not lost."""
    if request.node.get_closest_marker("drill") is None:
        monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def factory_file(tmp_path: Path) -> Path:
    """A .py file whose `make` builds a small classifier of any size of image."""
    path = tmp_path / "victim.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture(scope="session")
def _images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [png_bytes(pixels) for pixels in random_pixels(40)]
    folder = write_parquet(tmp_path_factory.mktemp("images"), images, [i % 3 for i in range(40)])
    # With it `datasets` does not try 65 patterns of names that files may have, which takes longer than reading them.
    (folder / "README.md").write_text(
        "---\nconfigs: [{config_name: default, data_files: [{split: test, path: '*.parquet'}]}]\n---\n"
    )
    return folder


@pytest.fixture
def image_parquet(tmp_path: Path, _images: Path) -> Path:
    """40 random 16x16 RGB images in three classes, as a local Parquet dataset."""
    return shutil.copytree(_images, tmp_path / "source")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small complete dataset with its report, made once in a process of tests; who changes it changes a copy.

    11 images and one that cannot be decoded, in two shards, in each of clean and eps-8.
    """
    folder = tmp_path_factory.mktemp("finished")
    images = [png_bytes(image) for image in random_pixels(12)]
    write_parquet(folder / "source", [*images[:11], b"no image"], [i % 3 for i in range(12)])
    (folder / "victim.py").write_text(FACTORY)
    (folder / "config.yaml").write_text(
        f"""
source: {{kind: huggingface, path: {folder}/source}}
model: {{kind: factory, name: "{folder}/victim.py:make"}}
attack: {{epsilons: [8/255]}}
output: {{path: {folder}/out, images_per_shard: 6}}
runtime: {{device: cpu, workers: 0, batch_size: 6, max_skipped: 0.5}}
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        result = fgsm("generate", folder / "config.yaml")
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture(scope="session")
def processes() -> Any:
    """Starts real processes."""
    # Now: where it is started first, its socket would lie in the temporary space of a test, by too long a path.
    ensure_running()
    return PROCESSES


WriteConfig = Callable[..., Path]


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What the tests of a module share, which the first that needs it makes."""
    return {}


@pytest.fixture
def write_config(tmp_path: Path, factory_file: Path, image_parquet: Path) -> WriteConfig:
    """Write a config over the small dataset and model; keyword arguments update its sections."""

    def write(**sections: dict[str, Any]) -> Path:
        config: dict[str, dict[str, Any]] = {
            "source": {"kind": "huggingface", "path": str(image_parquet)},
            "model": {"kind": "factory", "name": f"{factory_file}:make"},
            "attack": {"epsilons": ["2/255", "8/255"]},
            "output": {"path": str(tmp_path / "out"), "images_per_shard": 16},
            "runtime": {"device": "cpu", "workers": 0, "batch_size": 6},
        }
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section}
        if "layout" in config["output"]:
            config["output"] |= output_of(config["output"]["layout"])
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def kept_parquet(folder: Path, labels: Sequence[int | None]) -> Path:
    """Random images with two columns to keep."""
    count = len(labels)
    return write_parquet(
        folder,
        [png_bytes(image) for image in random_pixels(count, seed=1)],
        labels,
        caption=(datasets.Value("string"), [f"number {i}" if i else None for i in range(count)]),
        boxes=(datasets.List(datasets.Value("int32")), [[i, i + 1][: i % 3] for i in range(count)]),
    )


def _kept(folder: Path, labels: Sequence[int | None]) -> dict[str, Any]:
    return {"path": str(kept_parquet(folder / "kept", labels)), "keep_columns": ["caption", "boxes"]}


LABELS = [i % 3 for i in range(20)]
# Runs that differ in what their rows hold: sections of a config for `write_config`, given a folder for their source.
KINDS: dict[str, Callable[[Path], dict[str, dict[str, Any]]]] = {
    "plain": lambda _: {},
    "gray": lambda _: {"preprocess": {"mode": "L"}, "model": {"kwargs": {"channels": 1}}},
    "targeted": lambda folder: {"source": _kept(folder, LABELS), "attack": {"target": "random"}},
    "unlabelled": lambda folder: {
        "source": _kept(folder, [None if i % 4 == 0 else label for i, label in enumerate(LABELS)]),
        "attack": {"label": "prediction"},
    },
}


def fgsm(*arguments: str | Path) -> Result:
    """Run the command line in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fgsm_without_run(*arguments: str | Path) -> Result:
    """As `fgsm`; in what it prints no name of a shard's file ends in a run's id."""
    result = fgsm(*arguments)
    for stream in ("stdout_bytes", "stderr_bytes", "output_bytes"):
        setattr(result, stream, without_run(getattr(result, stream).decode()).encode())
    return result


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write an altered manifest or receipt with the digest that it would have, as a liar does."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    path.write_text(json.dumps({**rest, "digest": json_digest(rest)}))


def some_slow(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test: those that are kept run in the gate, the others with what is slow."""
    return [pytest.param(value, marks=() if value in kept else pytest.mark.slow) for value in values]


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an object store, a browser and scripts are slow; what waits for processes comes first, not last."""
    for item in items:
        far = {"server", "browser"} & {*getattr(item, "fixturenames", ())} or item.path.parent.name == "scripts"
        if item.get_closest_marker("drill"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
        elif far:
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.name not in ("test_part.py", "test_processes.py"))


def pytest_collection_finish() -> None:
    """Collect garbage less often, and leave out what was imported: together a tenth of all that tests compute."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def let_go(caught: pytest.ExceptionInfo[BaseException]) -> None:
    """Let what a DataLoader has raised keep the loader's workers no longer.

    Their iterator would be part of a cycle, and where the garbage collector ends it each of them is waited for 5 s.
    """
    traceback.clear_frames(caught.tb)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the failure drill, as docs/reliability.md has it."""
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    others = {report.nodeid: report.outcome for report in reports if not report.passed}
    lines = []
    # A fixture fills them in as it ends, however the test did: figures are those of tests that passed.
    for report in reports:
        line = dict(report.user_properties).get("drill") if report.when == "teardown" else None
        if line:
            lines.append([line[0], others[report.nodeid], "", "", ""] if report.nodeid in others else line)
    if lines:
        terminalreporter.section("failure drill")
        for line in [["fault", "times", "rows lost", "bytes differing", "seconds"], ["---"] * 5, *lines]:
            terminalreporter.write_line(f"| {' | '.join(line)} |")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every Parquet file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


def generate(config: Path, *arguments: str) -> str:
    """What `fgsm generate` does but for the report, which costs more than all else in a small run: log and table."""
    command = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    options = command.make_context("generate", [str(config), *arguments]).params
    log, logger = io.StringIO(), logging.getLogger("pipeline")
    logger.handlers[:] = [logging.StreamHandler(log)]
    logger.setLevel(logging.INFO)
    loaded = load_config(str(config), options["overrides"] or (), output=options["output"], limit=options["limit"])
    table = Summary(
        pipeline.flow.generate(
            loaded,
            overwrite=options["overwrite"],
            executor=options["executor"],
            part=options["part"] and parse_part(options["part"]),
            unlocked=options["unlocked"],
        )
    )
    return f"{log.getvalue()}{table}"


# What `generate_once` has made: by a digest of its inputs, the folder that they were in and the files of the output.
_generated: dict[str, tuple[str, dict[str, bytes]]] = {}


def generate_once(config: Path, output: Path | None = None) -> None:
    """As `generate`, into the config's output or another, for a test that is about what comes after it.

    What a test before it in this process has made of the same files is copied, with the paths of this test's folder.
    """
    output = output or Path(yaml.safe_load(config.read_text())["output"]["path"])
    folder, total = str(config.parent), hashlib.sha256(str(output.relative_to(config.parent)).encode())
    for path in sorted(config.parent.rglob("*")):
        if path.is_file() and path.parent.name != "__pycache__":
            total.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes().replace(folder.encode(), b""))
    key = total.hexdigest()
    if key not in _generated:
        generate(config, "--output", str(output))
        files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
        _generated[key] = folder, files
        return
    former, files = _generated[key]
    for name, content in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    text = files["manifest.json"].decode().replace(former, folder)
    content = json.loads(text)
    digest = content.pop("digest")
    (output / "manifest.json").write_text(text.replace(digest, json_digest(content)))


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def rows(folder: Path, subset: str, split: str = "test") -> pandas.DataFrame:
    return pandas.concat(
        [pandas.read_parquet(path) for path in sorted((folder / subset).glob(f"{split}-*.parquet"))], ignore_index=True
    )


def pixels(frame: pandas.DataFrame) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.stack([decode_image(cell["bytes"]).numpy() for cell in frame["image"]]).astype(np.int16)


ROOM = """
import torch
from torch import nn


class Sums(nn.Module):
    '''Mean red against mean green against mean blue, in an order of its own.'''

    def __init__(self, order=(0, 1, 2), scale=1.0):
        super().__init__()
        self.order, self.scale = list(order), scale
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.weight * x.mean((2, 3))[:, self.order]


def make(**kwargs):
    return Sums(**kwargs)


def detached():
    class Detached(Sums):
        def forward(self, x):
            return super().forward(x.detach())

    return Detached()
"""


LAYOUTS = tuple(registry.LAYOUTS)


def output_of(layout: str) -> dict[str, str]:
    """The keys of section `output` for one of LAYOUTS, such as signs-bits."""
    return dict(zip(("layout", "sign_format"), layout.split("-"), strict=False))


def subset_of(layout: str, level: int) -> str:
    """The subset that holds the rows at an epsilon in grey levels."""
    return registry.LAYOUTS[layout].subset(fgsm_at(level)[-1])


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has after a statement."""
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
