"""Altered documents: whatever is changed in a manifest or a receipt is found, and that file is named.

Without a new digest any change is. With one, as a liar makes it, everything is found that follows from something else;
the rest is listed in FREE.
"""

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from pipeline.errors import PipelineError
from pipeline.verify import verify
from tests.conftest import CLASSES, FACTORY, fgsm, png_bytes, random_pixels, write_parquet, write_sealed

Place = tuple[str | int, ...]

# What only the digest guards: where things lay, how the run was carried out, and texts of others.
FREE = {
    "manifest.json": (
        *(f"config.source.{key}" for key in ("path", "name", "revision", "image_column", "label_column")),
        *("config.model.weights", "config.evaluators.*.weights", "config.output.path"),
        *("config.runtime.workers", "asked_batch_size", "origin.*"),
    ),
    # The manifest's digest of all receipts tells that one of them is altered, but not which.
    "receipt": ("versions.*", "skipped.*.reason"),
}


def make_rows(folder: Path, split: str, count: int, seed: int, broken: int | None = None) -> None:
    cells: list[bytes | None] = [png_bytes(pixels) for pixels in random_pixels(count, side=8, seed=seed)]
    if broken is not None:
        cells[broken] = b"no image"
    notes = (datasets.Value("string"), [f"note {i}" for i in range(count)])
    write_parquet(folder / "source", cells, [i % 3 for i in range(count)], split, note=notes)
    # A shard of a streamed source is one or more row groups.
    path = next((folder / "source").glob(f"{split}-*"))
    pq.write_table(pq.read_table(path), path, row_group_size=2)


EVALUATOR = {"id": "other", "kind": "factory", "kwargs": {"channels": 3}}
LABEL_MAP = {"label_map": dict(zip(CLASSES, (1, 2, 0), strict=True))}
KINDS: dict[str, dict[str, Any]] = {
    "images": {"evaluators": [{**EVALUATOR, **LABEL_MAP}], "source": {"keep_columns": ["note"]}},
    "signs": {"evaluators": [EVALUATOR], "output": {"layout": "signs"}, "model": LABEL_MAP},
    "targeted": {"attack": {"target": "random"}, "source": {"split": ["train", "test"], "limit": 6}},
    "streamed": {"source": {"streaming": True}},
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small complete dataset of one kind, with a skipped row and at least two shards."""
    folder, sections = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    make_rows(folder, "train", 7, 1)
    make_rows(folder, "test", 8, 2, broken=3)
    (folder / "victim.py").write_text(FACTORY)
    name = f"{folder}/victim.py:make"
    config = {
        "source": {"kind": "huggingface", "path": f"{folder}/source", "split": "test", **sections.get("source", {})},
        "model": {"kind": "factory", "name": name, **sections.get("model", {})},
        "attack": {"epsilons": ["2/255", 0.031], **sections.get("attack", {})},
        "evaluators": [{"name": name, **other} for other in sections.get("evaluators", [])],
        "output": {"path": f"{folder}/out", "images_per_shard": 5, **sections.get("output", {})},
        "runtime": {"device": "cpu", "workers": 0, "batch_size": 4, "max_skipped": 0.5},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        result = fgsm("generate", folder / "config.yaml")
    assert result.exit_code == 0, result.output
    return folder / "out"


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a document that holds no others, with its place; what is empty is one too."""
    if isinstance(value, dict | list) and value:
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, (*place, key))
    elif place != ("digest",):
        yield place, value


def other_value(value: Any) -> Any:
    """A value of the same type that is another."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case None:
            return "x"
        case dict():
            return {"x": "x"}
    return ["x"]


def altered(document: Any, place: Place) -> Any:
    """A copy of a document with another value at one place."""
    copy = json.loads(json.dumps(document))
    inside = copy
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = other_value(inside[place[-1]])
    return copy


def problems(out: Path) -> list[str]:
    """What `verify` finds, without the folder."""
    try:
        return verify(out).problems
    except PipelineError as error:
        return [str(error).removeprefix(f"{out}/")]


@pytest.fixture(params=["manifest.json", "receipt"])
def document(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> tuple[str, Path]:
    """The manifest, or the receipt of the shard with the skipped row, of a copy of a dataset."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    if request.param == "manifest.json":
        return request.param, out / request.param
    receipts = sorted((out / ".run/receipts").glob("*.json"))
    return request.param, next(path for path in receipts if json.loads(path.read_text())["skipped"])


def test_every_change_is_found_and_its_file_named(document: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = document
    out, name = tmp_path / "out", str(path.relative_to(tmp_path / "out"))
    assert problems(out) == []
    original = json.loads(path.read_text())
    places = [place for place, _ in leaves(original)]
    assert len(places) > 40
    wrong = []
    for place in places:
        changed = altered(original, place)
        key = ".".join(map(str, place))
        path.write_text(json.dumps(changed))
        if not all_of(found := problems(out), name):
            wrong.append((key, "as it is", found))
        write_sealed(path, changed)
        found = problems(out)
        if not any(fnmatch(key, pattern) for pattern in FREE[kind]):
            sound = all_of(found, name)
        else:
            sound = not found if kind == "manifest.json" else all_of(found, "A file in .run/receipts was altered")
        if not sound:
            wrong.append((key, "with a digest", found))
    assert wrong == []


def all_of(found: list[str], name: str) -> bool:
    return bool(found) and all(problem.startswith(name) for problem in found)
