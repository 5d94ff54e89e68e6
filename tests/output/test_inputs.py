"""Inputs: a complete run is said to be complete without PyTorch only while nothing that it is made of has changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.load import parse_config
from pipeline.config.schema import Config, PreprocessConfig
from pipeline.core.errors import ConfigError
from pipeline.models.digits_net import NETS
from pipeline.output import inputs
from pipeline.output.inputs import inputs_of
from tests.conftest import generate, png_bytes, random_pixels, shard_path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two classes, one of them behind a link, whose files count as settled at once."""
    monkeypatch.setattr(inputs, "SETTLED", 0)
    for name in ("root/cat/1.png", "root/cat/2.png", "elsewhere/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(random_pixels(1)[0]))
    (tmp_path / "weights.pt").write_bytes(b"weights")
    (tmp_path / "root/dog").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "root"


def config_of(folder: Path, **sections: Any) -> Config:
    """Photos and a checkpoint of torchvision's, but for what is given."""
    values = {
        "source": {"kind": "imagefolder", "path": str(folder / "root")},
        "model": {"kind": "torchvision", "name": "resnet18", "weights": str(folder / "weights.pt")},
        "attack": {"epsilons": ["8/255"]},
        "output": {"path": str(folder / "out")},
    }
    return parse_config({**values, **sections})


def digest(config: Config) -> str:
    found = inputs_of(config)
    assert found is not None
    return found


def rewrite(path: Path) -> None:
    """Other content under the same name, size and modification time."""
    before = path.stat()
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: rewrite(root / "cat/1.png"),
        lambda root: rewrite(root / "dog/1.png"),
        lambda root: rewrite(root.parent / "weights.pt"),
        lambda root: (root / "cat/1.png").unlink(),
        lambda root: (root / "cat/1.png").rename(root / "cat/3.png"),
        lambda root: (root / "eel").mkdir(),
        lambda root: (root / "eel").symlink_to(root / "cat"),
    ],
)
def test_a_changed_file_is_noticed(photos: Path, change: Callable[[Path], None]) -> None:
    config = config_of(photos.parent)
    before = digest(config)
    assert digest(config) == before
    change(photos)
    assert digest(config) != before


def test_a_changed_config_machine_or_package_is_noticed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [digest(config_of(photos.parent)), digest(config_of(photos.parent, runtime={"seed": 1}))]
    assert digest(config_of(photos.parent)) == seen[0]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    seen.append(digest(config_of(photos.parent)))
    monkeypatch.syspath_prepend(photos.parent / "site")
    (photos.parent / "site/torch-99.dist-info").mkdir(parents=True)
    seen.append(digest(config_of(photos.parent)))
    monkeypatch.setattr("platform.node", lambda: "another")
    seen.append(digest(config_of(photos.parent)))
    assert len(set(seen)) == len(seen)


def test_a_link_in_a_circle_ends(photos: Path) -> None:
    (photos / "cat/all").symlink_to(photos)
    assert digest(config_of(photos.parent))


@pytest.mark.parametrize(
    "sections",
    [
        {"source": {"kind": "huggingface", "path": "uoft-cs/cifar10"}},
        {"source": {"kind": "torchvision", "path": "CIFAR10", "kwargs": {"root": "data", "annFile": "a.json"}}},
        {"model": {"kind": "factory", "name": "own.py:make"}},
        {"model": {"kind": "timm", "name": "resnet18", "weights": "a1_in1k"}},
        {"model": {"kind": "transformers", "name": "google/vit-base-patch16-224", "weights": "google/vit"}},
        {"attack": {"kind": "own.py:Attack", "epsilons": ["8/255"]}},
    ],
)
def test_what_files_do_not_say_everything_of_is_opened(photos: Path, sections: dict[str, Any]) -> None:
    assert inputs_of(config_of(photos.parent, **sections)) is None


def test_what_cannot_be_read_is_opened(photos: Path) -> None:
    (photos / "cat/3.png").symlink_to(photos / "nowhere")
    assert inputs_of(config_of(photos.parent)) is None


def test_too_many_files_to_look_at_are_opened(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MOST_SECONDS", 0)
    assert inputs_of(config_of(photos.parent)) is None


def test_a_file_that_was_changed_a_moment_ago_settles_first(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest(config_of(photos.parent))
    monkeypatch.setattr(inputs, "SETTLED", 60 * 10**9)
    assert inputs_of(config_of(photos.parent)) is None


def test_a_value_that_is_set_is_another_than_the_same_by_default(photos: Path) -> None:
    """Sizes that are set are not replaced by those that were published with the weights."""
    asked = {"preprocess": {"interpolation": PreprocessConfig().interpolation}}
    assert digest(config_of(photos.parent)) != digest(config_of(photos.parent, **asked))


def test_a_link_that_was_put_back_is_noticed(photos: Path) -> None:
    before = digest(config_of(photos.parent))
    link = photos / "dog"
    (photos.parent / "kept").symlink_to(link.readlink())  # so that its number is not given out again
    link.unlink()
    link.symlink_to(photos.parent / "elsewhere")
    assert digest(config_of(photos.parent)) != before


# --------------------------------------------------------------------------------------------- with generate


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Makes digits of a checkpoint in `tmp_path`; says "opened" where it opens the run."""
    monkeypatch.setattr(inputs, "SETTLED", 0)
    monkeypatch.setattr("pipeline.output.inputs.PACKAGE", tmp_path / "package")
    (tmp_path / "package").mkdir()
    torch.manual_seed(0)
    safetensors.torch.save_file(NETS[None].make().state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "config.yaml").write_text(
        "source: {kind: digits, split: test, limit: 8}\npreprocess: {mode: L}\n"
        "model: {kind: digits, weights: net.safetensors}\nattack: {epsilons: [8/255]}\n"
        f"output: {{path: {tmp_path / 'out'}, images_per_shard: 4}}\nruntime: {{device: cpu}}\n"
    )
    opened: list[str] = []
    monkeypatch.setattr("pipeline.flow.say_loading", lambda *names: opened.extend(names))

    def make() -> str:
        opened.clear()
        said = generate(tmp_path / "config.yaml")
        return f"opened\n{said}" if opened else said

    assert make().startswith("opened")
    return make


def test_an_unchanged_run_is_not_opened(digits: Callable[[], str]) -> None:
    assert digits().startswith("All 2 shards are already there.")


def test_other_weights_are_noticed(digits: Callable[[], str], tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(tmp_path / "net.safetensors")
    safetensors.torch.save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "net.safetensors")
    with pytest.raises(ConfigError, match=r"models\.digits\.content"):
        digits()


def test_a_missing_shard_is_noticed(digits: Callable[[], str], tmp_path: Path) -> None:
    shard_path(tmp_path, "out/.run/receipts/test-00001-of-00002.json").unlink()
    assert digits().startswith("opened")
    assert not digits().startswith("opened")


def test_without_its_note_the_run_is_opened_and_noted_down_again(digits: Callable[[], str], tmp_path: Path) -> None:
    (tmp_path / "out/.run/inputs").unlink()
    assert digits().startswith("opened")
    assert not digits().startswith("opened")


def test_the_note_of_another_run_does_not_count(digits: Callable[[], str], tmp_path: Path) -> None:
    note = tmp_path / "out/.run/inputs"
    edition, rest = note.read_text().split()
    note.write_text(f"{edition[::-1]} {rest}\n")
    assert digits().startswith("opened")


def test_a_title_of_before_is_noticed_whatever_the_note_says(digits: Callable[[], str], tmp_path: Path) -> None:
    note, config, card = (tmp_path / name for name in ("out/.run/inputs", "config.yaml", "out/README.md"))
    before, text = note.read_bytes(), config.read_text()
    config.write_text(text.replace("output: {", "output: {title: Another, "))
    assert digits().startswith("opened")
    assert "# Another\n" in card.read_text()
    # As where the note could not be written a second time.
    note.write_bytes(before)
    config.write_text(text)
    assert digits().startswith("opened")
    assert "# Another\n" not in card.read_text()


@pytest.mark.parametrize(("edition", "said"), [("its own", True), ("0123456789abcdef", False)])
def test_a_warning_is_said_again_unopened(digits: Callable[[], str], tmp_path: Path, edition: str, said: bool) -> None:
    own = (tmp_path / "out/.run/inputs").read_text().split()[0]
    kept = {"edition": own if edition == "its own" else edition, "warnings": [{"text": "model: it is old"}]}
    (tmp_path / "out/.run/warnings").write_text(json.dumps(kept))
    again = digits()
    assert again.startswith("All 2 shards are already there.")
    assert ("model: it is old.\n" in again) == said


def test_warnings_that_cannot_be_read_are_none(digits: Callable[[], str], tmp_path: Path) -> None:
    (tmp_path / "out/.run/warnings").write_text("[")
    assert digits().startswith("All 2 shards are already there.")
