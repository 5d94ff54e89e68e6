"""Five small runs whose ids and bytes are recorded: they hold until the stored format is changed on purpose.

After such a change `python -m tests.test_golden` records them anew. Last digits of confidences depend on packages and
on the processor: in the environment of the record every file is compared by its sha256, elsewhere what the rows say.
"""

import hashlib
import importlib.metadata
import io
import json
import platform
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import CLASSES, FACTORY, generate, png_bytes, random_pixels, without_run, write_parquet

GOLDEN = Path(__file__).with_name("golden.json")
PACKAGES = ("torch", "torchvision", "datasets", "pyarrow", "pillow", "imagecodecs", "numpy", "scikit-learn")
# What differs in its last digits from processor to processor.
CONFIDENCES = ("confidence", "label_confidence", "clean_confidence", "clean_label_confidence")


def _factory(folder: Path, name: str = "victim") -> str:
    (folder / f"{name}.py").write_text(FACTORY)
    return f"{folder}/{name}.py:make"


def digits(_: Path) -> dict[str, Any]:
    return {
        "source": {"kind": "digits", "limit": 48},
        "preprocess": {"mode": "L"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": ["8/255", "32/255"]},
        "output": {"images_per_shard": 32},
    }


def parquet(folder: Path) -> dict[str, Any]:
    images = [png_bytes(pixels) for pixels in random_pixels(20)]
    caption = (datasets.Value("string"), [f"number {i}" if i else None for i in range(20)])
    write_parquet(folder / "source", [*images[:19], b"no image"], [i % 3 for i in range(20)], caption=caption)
    return {
        "source": {"kind": "huggingface", "path": f"{folder}/source", "keep_columns": ["caption"]},
        "model": {"kind": "factory", "name": _factory(folder)},
        "attack": {"epsilons": ["2/255", "8/255"]},
        "output": {"images_per_shard": 8},
        "runtime": {"max_skipped": 0.5},
    }


def imagefolder(folder: Path) -> dict[str, Any]:
    for i, pixels in enumerate(random_pixels(9, side=30, seed=2)):
        name = folder / "source" / "train" / CLASSES[i % 3] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((240 + 10 * i, 260)).save(name)
    return {
        "source": {"kind": "imagefolder", "path": f"{folder}/source", "split": "train"},
        "preprocess": {"resize": 232, "crop": 224},
        "models": {
            "victim": {"kind": "factory", "name": _factory(folder)},
            "other": {"kind": "factory", "name": _factory(folder, "other")},
        },
        "attack": {"epsilons": ["4/255"], "models": ["victim"]},
        "output": {"images_per_shard": 6},
    }


def streamed_tar(folder: Path) -> dict[str, Any]:
    (folder / "source").mkdir()
    for number in range(2):
        with tarfile.open(folder / "source" / f"train-{number}.tar", "w") as tar:
            for i, pixels in enumerate(random_pixels(7, seed=number)):
                for suffix, data in (("png", png_bytes(pixels)), ("cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return {
        "source": {
            "kind": "huggingface",
            "path": f"{folder}/source",
            "streaming": True,
            "image_column": "png",
            "label_column": "cls",
            "classes": list(CLASSES),
        },
        "model": {"kind": "factory", "name": _factory(folder)},
        "attack": {"epsilons": ["8/255"], "label": "prediction"},
    }


def targeted_signs(folder: Path) -> dict[str, Any]:
    images = [png_bytes(pixels) for pixels in random_pixels(10, seed=3)]
    write_parquet(folder / "source", images, [None, *(i % 3 for i in range(1, 10))])
    return {
        "source": {"kind": "huggingface", "path": f"{folder}/source"},
        "model": {"kind": "factory", "name": _factory(folder)},
        "attack": {"epsilons": ["4/255", "16/255"], "target": "random", "label": "prediction"},
        "output": {"layout": "signs"},
    }


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    make.__name__: make for make in (digits, parquet, imagefolder, streamed_tar, targeted_signs)
}


def environment() -> dict[str, str]:
    """What decides last digits, as far as a package or a kind of processor does."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        **found,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """Make a run, and say what became of it: its id, what its rows say and the sha256 of its files."""
    config = RUNS[name](folder)
    config["output"] = {"path": f"{folder}/out", **config.get("output", {})}
    config["runtime"] = {"device": "cpu", "workers": 0, "batch_size": 6, **config.get("runtime", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    generate(folder / "config.yaml")
    out = folder / "out"
    files = {str(path.relative_to(out)): path for path in sorted(out.rglob("*.parquet"))}
    return {
        "run_id": json.loads((out / "manifest.json").read_text())["run_id"],
        "rows": {without_run(name): digest_of_rows(path) for name, path in files.items()},
        "files": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
    }


def digest_of_rows(path: Path) -> str:
    """A digest of all pixels and values of a file but the confidences."""
    total = hashlib.sha256()
    for row in pq.read_table(path).to_pylist():
        for cell in row.values():
            if isinstance(cell, dict) and "bytes" in cell:
                with Image.open(io.BytesIO(cell.pop("bytes"))) as image:
                    total.update(np.asarray(image).tobytes())
        total.update(json.dumps(_without_confidences(row), sort_keys=True).encode())
    return total.hexdigest()


def _without_confidences(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_confidences(inside) for key, inside in value.items() if key not in CONFIDENCES}
    return [_without_confidences(inside) for inside in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_made_again(name: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    expected, found = golden["runs"][name], outcome(name, tmp_path)
    assert found["rows"] == expected["rows"]
    if environment() == golden["environment"]:
        assert found == expected


def record() -> None:
    """Record all runs anew, as this environment makes them."""
    runs = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = outcome(name, Path(folder))
    GOLDEN.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    record()
