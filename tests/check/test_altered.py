"""Altered documents: whatever is changed in a manifest or a receipt is found, and that file is named.

Without a new digest any change is. With one, as a liar makes it, everything is found that follows from something else;
the rest is listed in FREE.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from pipeline.check.verify import verify
from pipeline.core.errors import PipelineError
from pipeline.output.folder import OutputFolder, read_receipts
from pipeline.output.manifest import require_manifest
from tests.conftest import CLASSES, FACTORY, ROOM, fgsm, generate, png_bytes, random_pixels, write_parquet, write_sealed
from tests.support.forgery import agree

Place = tuple[str | int, ...]

# What only the digest guards: where things lay, how the run was carried out, and texts of others.
FREE = {
    "manifest.json": (
        *(f"config.source.{key}" for key in ("path", "name", "revision", "image_column", "label_column")),
        *(
            "config.model.weights",
            "config.models.*.weights",
            "config.models.*.title",
            "config.model.title",
            "config.output.path",
            "config.output.title",
        ),
        *("config.runtime.workers", "asked_batch_size", "origin.*"),
    ),
    # The manifest's digest of all receipts tells that one of them is altered, but not which.
    "receipt": ("versions.*", "skipped.*.reason", "skipped.*.file"),
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


# Values that the others share with `images`: only the drill alters them in all four.
ALIKE = (
    *("identity.*", "versions.*", "features.*", "origin.*", "spaces.*", "dataset_classes"),
    *("config.model*", "config.preprocess.*", "config.output.*", "config.runtime.*"),
)
LABEL_MAP = {"label_map": dict(zip(CLASSES, (1, 2, 0), strict=True))}
KINDS: dict[str, dict[str, Any]] = {
    # Two attacked models and one that only looks; an attack on a ray, one on none with a target, and noise.
    "images": {
        "models": {"net": {}, "sums": {"file": "sums.py"}, "other": {"kwargs": {"channels": 3}, **LABEL_MAP}},
        "attacks": {
            "fgsm": {"epsilons": ["2/255", 0.031], "models": ["net", "sums"]},
            "noise": {"kind": "noise", "epsilons": ["2/255", "9/255"]},
            "pgd": {"kind": "pgd", "epsilons": ["2/255", 0.031], "steps": 2, "models": ["net"], "target": "random"},
        },
        "source": {"keep_columns": ["note"]},
    },
    "signs": {
        "models": {"net": LABEL_MAP, "other": {"file": "sums.py", "kwargs": {"order": [2, 0, 1]}}},
        "attack": {"epsilons": ["2/255", 0.3], "models": ["net"]},
        "output": {"layout": "signs"},
    },
    "targeted": {"attack": {"target": "random"}, "source": {"split": ["train", "test"], "limit": 6}},
    "streamed": {"source": {"streaming": True}},
}


# The third and the fourth read and write as the first does.
@pytest.fixture(
    scope="module",
    params=["images", "signs", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("targeted", "streamed"))],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small complete dataset of one kind, with a skipped row and at least two shards."""
    folder, sections = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    make_rows(folder, "train", 7, 1)
    make_rows(folder, "test", 8, 2, broken=3)
    (folder / "victim.py").write_text(FACTORY)
    (folder / "sums.py").write_text(ROOM)

    def model(section: dict[str, Any]) -> dict[str, Any]:
        section = dict(section)
        return {"kind": "factory", "name": f"{folder}/{section.pop('file', 'victim.py')}:make", **section}

    config = {
        "source": {"kind": "huggingface", "path": f"{folder}/source", "split": "test", **sections.get("source", {})},
        "output": {"path": f"{folder}/out", "images_per_shard": 5, **sections.get("output", {})},
        "runtime": {"device": "cpu", "workers": 0, "batch_size": 4, "max_skipped": 0.5},
    }
    if "models" in sections:
        config["models"] = {name: model(section) for name, section in sections["models"].items()}
    else:
        config["model"] = model({})
    if "attacks" in sections:
        config["attacks"] = sections["attacks"]
    else:
        config["attack"] = {"epsilons": ["2/255", 0.031], **sections.get("attack", {})}
    (folder / "config.yaml").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        generate(folder / "config.yaml")
    return folder / "out"


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a document that holds no others, with its place; what is empty is one too."""
    if isinstance(value, dict | list) and value:
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, (*place, key))
    else:
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


# Names that a config chooses: of three models the manifest says the same things.
NAMES = re.compile(r"\b(net|sums|other|fgsm|noise|pgd)\b|\b\d+\b")


def one_of_each(places: Sequence[Place]) -> list[Place]:
    """The last of those that differ only in numbers and names, such as the rows of each subset."""
    return [*{NAMES.sub("*", ".".join(map(str, place))): place for place in places}.values()]


@pytest.fixture(params=["manifest.json", "receipt"])
def document(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> tuple[str, Path]:
    """The manifest, or the receipt of the shard with the skipped row, of a copy of a dataset."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    if request.param == "manifest.json":
        return request.param, out / request.param
    return request.param, receipt_path(out)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_a_change_is_found_and_its_file_named(
    every: bool, document: tuple[str, Path], made: Path, tmp_path: Path
) -> None:
    """Of each value in the drill; here of one in each list."""
    kind, path = document
    out, name = tmp_path / "out", str(path.relative_to(tmp_path / "out"))
    assert problems(out) == []
    original = json.loads(path.read_text())
    places = [place for place, _ in leaves(original)]
    assert len(places) > 40
    if not every:
        places = one_of_each(places)
        if not made.parent.name.startswith("images"):
            places = [place for place in places if not any(fnmatch(".".join(map(str, place)), key) for key in ALIKE)]
    wrong: list[tuple[str, str, list[str]]] = []
    for place in places:
        changed = altered(original, place)
        key = ".".join(map(str, place))
        path.write_text(json.dumps(changed))
        if not is_refused(out, path):
            wrong.append((key, "as it is", []))
        if key == "digest":
            continue
        write_sealed(path, changed)
        found = problems(out)
        if not any(fnmatch(key, pattern) for pattern in FREE[kind]):
            sound = all_of(found, name)
        else:
            sound = not found if kind == "manifest.json" else all_of(found, ".run/receipts holds an altered receipt")
        if not sound:
            wrong.append((key, "with a digest", found))
    assert wrong == []


def is_refused(out: Path, path: Path) -> bool:
    """Whether a manifest or a receipt is not taken for one; whoever reads it reads it so."""
    folder = OutputFolder(out)
    if path.name != folder.manifest:
        return read_receipts(folder)[1] == [path.name]
    with pytest.raises(PipelineError, match=re.escape(str(path))):
        require_manifest(folder)
    return True


def all_of(found: list[str], name: str) -> bool:
    return bool(found) and all(problem.startswith(name) for problem in found)


def receipt_path(out: Path) -> Path:
    """A receipt with a skipped row."""
    receipts = sorted((out / ".run/receipts").glob("*.json"))
    return next(path for path in receipts if json.loads(path.read_text())["skipped"])


def less_confidence(receipt: Any) -> None:
    receipt["counts"][-1]["confidence_sum"] -= 1e-4


def another_split(receipt: Any) -> None:
    receipt["split"] = "other"


def more_zeros(receipt: Any) -> None:
    receipt["counts"][-1]["zero_signs"] += 10**4


def more_zeros_at_one_epsilon(receipt: Any) -> None:
    """Of layout images the rows do not tell one that is clipped from one that is not moved."""
    receipt["counts"][1]["zero_signs"] += 1


def zeros_of_clean(receipt: Any) -> None:
    receipt["counts"][0]["zero_signs"] += 1


def other_versions(receipt: Any) -> None:
    receipt["versions"]["torch"] = "1.0"


def fewer_versions(receipt: Any) -> None:
    del receipt["versions"]["torch"]


def no_skipped_row(receipt: Any) -> None:
    receipt["skipped"] = []


def another_row_skipped(receipt: Any) -> None:
    receipt["skipped"][0]["source_index"] += 1


def one_row_more(receipt: Any) -> None:
    """Adds up, and is not the plan's."""
    receipt["planned"] += 1
    receipt["rows"] += 1


def skipped_twice(receipt: Any) -> None:
    receipt["skipped"] *= 2
    receipt["rows"] -= 1
    for part in (*receipt["counts"], *receipt["files"]):
        part["rows"] -= 1


def an_epsilon_less(receipt: Any) -> None:
    receipt["counts"].pop()


def another_attack_counted(receipt: Any) -> None:
    receipt["counts"][-1]["attack"] = "mine"


def another_model_counted(receipt: Any) -> None:
    receipt["counts"][-1]["model"] = "other"


def a_model_more(receipt: Any) -> None:
    receipt["counts"][0]["models"]["x"] = {"correct": 0, "lost": 0, "exposed": 0, "transferred": 0}


def a_model_less(receipt: Any) -> None:
    del receipt["counts"][-1]["models"]["other"]


def models_exchanged(receipt: Any) -> None:
    counts = next(count["models"] for count in receipt["counts"] if count["models"]["net"] != count["models"]["other"])
    counts["net"], counts["other"] = counts["other"], counts["net"]


def one_less_lost(receipt: Any) -> None:
    counts = (counts for count in receipt["counts"] for counts in count["models"].values())
    next(own for own in counts if own["lost"])["lost"] -= 1


def another_subset_counted(receipt: Any) -> None:
    receipt["counts"][-1]["subset"] = "eps-9"


def counts_in_another_order(receipt: Any) -> None:
    receipt["counts"][1:3] = receipt["counts"][2:0:-1]


EDITS = [
    *(less_confidence, another_split, more_zeros, more_zeros_at_one_epsilon, zeros_of_clean, other_versions),
    fewer_versions,
    *(no_skipped_row, another_row_skipped, one_row_more, skipped_twice, an_epsilon_less, a_model_more, a_model_less),
    *(another_attack_counted, another_model_counted, models_exchanged, one_less_lost, another_subset_counted),
    counts_in_another_order,
]


@pytest.mark.parametrize("made", ["images", "signs"], indirect=True)
@pytest.mark.parametrize("edit", [less_confidence, skipped_twice])
def test_generate_does_not_believe_an_altered_receipt(made: Path, tmp_path: Path, edit: Callable[[Any], None]) -> None:
    """Its shard is written anew, with the bytes that it had."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = contents(out)
    path = receipt_path(out)
    receipt = json.loads(path.read_text())
    edit(receipt)
    path.write_text(json.dumps(receipt))
    assert [problem.split()[0] for problem in problems(out)] == [f".run/receipts/{path.name}"]
    generate(made.parent / "config.yaml", "--output", str(out))
    assert contents(out) == before
    assert problems(out) == []


@pytest.mark.parametrize("made", ["images", "signs"], indirect=True)
@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit is not other_versions])
def test_a_receipt_with_a_digest_that_fits_is_compared_with_its_rows(
    made: Path, tmp_path: Path, edit: Callable[[Any], None]
) -> None:
    """Manifest and card follow from it, as after a run that believed it."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    path = receipt_path(out)
    receipt = json.loads(path.read_text())
    edit(receipt)
    write_sealed(path, receipt)
    agree(out)
    found = problems(out)
    assert all_of(found, f".run/receipts/{path.name}"), found


def contents(out: Path) -> dict[str, bytes]:
    """What a run has written, but for how fast it was and its report."""
    kept = (out / "manifest.json", out / "README.md", *out.glob("*/*.parquet"), *out.glob(".run/receipts/*"))
    return {str(path.relative_to(out)): path.read_bytes() for path in kept if path.name != "manifest.json"}


@pytest.mark.parametrize("made", ["images", "signs"], indirect=True)
def test_a_copied_receipt_commits_no_other_shard(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = contents(out)
    first, second = sorted((out / ".run/receipts").glob("*.json"))
    shutil.copy(first, second)
    assert all_of(problems(out), f".run/receipts/{second.name} is of another shard")
    generate(made.parent / "config.yaml", "--output", str(out))
    assert contents(out) == before
    assert problems(out) == []


def test_an_altered_manifest_is_not_resumed_from(made: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", made.parent / "config.yaml"
    shutil.copytree(made, out)
    path = out / "manifest.json"
    text, before = path.read_text(), contents(out)
    content = json.loads(text)
    for changed in ({**content, "rows": 0}, {**content, "identity": {**content["identity"], "runtime.seed": 1}}):
        path.write_text(json.dumps(changed))
        result = fgsm("generate", config, "--output", out)
        assert (result.exit_code, contents(out)) == (1, before)
        assert re.search(rf"Error: {path} .*\bdigest\b", result.stderr)
        assert path.read_text() == json.dumps(changed)
    write_sealed(path, changed)
    assert re.search(rf"Error: {path} .*\bidentity\b", fgsm("generate", config, "--output", out).stderr)
    path.unlink()
    generate(config, "--output", str(out))
    assert problems(out) == []
    assert {**json.loads(path.read_text()), "config": {}, "digest": ""} == {**content, "config": {}, "digest": ""}


def test_a_manifest_of_another_run_damages_no_shard(made: Path, tmp_path: Path) -> None:
    """Otherwise a repair would remove them all."""
    out, config = tmp_path / "out", made.parent / "config.yaml"
    shutil.copytree(made, out)
    before = contents(out)
    generate(config, "--output", str(tmp_path / "other"), "--set", "runtime.seed=1")
    shutil.copy(tmp_path / "other/manifest.json", out)
    result = fgsm("verify", out, "--repair")
    assert result.exit_code == 1
    assert re.search(r"manifest\.json .*\brun\b", result.stderr)
    assert "1 problem," in result.stderr
    assert "0 damaged shards" in result.stderr
    assert contents(out) == before
    # As the message advises.
    (out / "manifest.json").unlink()
    generate(config, "--output", str(out))
    assert fgsm("verify", out).exit_code == 0


def test_a_file_of_another_shard_is_found(made: Path, tmp_path: Path) -> None:
    """With receipt and manifest that agree with it: it says of itself what it is."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    path = receipt_path(out)
    receipt = json.loads(path.read_text())
    subset = receipt["files"][0]["path"].partition("/")[0]
    file = out / receipt["files"][0]["path"]
    pq.write_table(pq.read_table(file), file)  # without what it says of itself
    receipt["files"][0].update(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    write_sealed(path, receipt)
    agree(out)
    assert all_of(found := problems(out), f"{subset}/{file.name}"), found


@pytest.mark.parametrize("made", ["images"], indirect=True)
def test_columns_that_are_carried_through_are_the_files(made: Path, tmp_path: Path) -> None:
    """Of these only the manifest can lie, as the digest of the file is that of its receipt."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    content = json.loads((out / "manifest.json").read_text())
    content["features"]["note"]["dtype"] = "binary"
    write_sealed(out / "manifest.json", content)
    assert all_of(found := problems(out), "manifest.json was altered: its features"), found
