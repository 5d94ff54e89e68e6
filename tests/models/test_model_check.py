"""The look at a model before a run: what is refused, what is said, and what passes without a word."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.attacks.base import Goal
from pipeline.core.errors import CodeError, ConfigError, PipelineError
from pipeline.engine.model_check import _check_accuracy, check_model
from pipeline.models.base import Model
from tests.conftest import FACTORY, WriteConfig, digests, fgsm, generate, generate_once, manifest, shard_path

COLOURS = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220]]) / 255
PLAIN = Goal()
Forward = Callable[[Tensor], Tensor]


class Colours(nn.Module):
    """Names the colour of an image; `change` is made to its logits, and `before` to what it sees."""

    def __init__(self, change: Forward | None = None, before: Forward | None = None) -> None:
        super().__init__()
        self.colours = nn.Parameter(COLOURS.clone())
        self.change, self.before = change or _same, before or _same

    def forward(self, images: Tensor) -> Tensor:
        means = self.before(images).mean((2, 3))
        return self.change(-20 * (means[:, None] - self.colours).square().sum(-1))


def _same(values: Tensor) -> Tensor:
    return values


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    """(count, 3, 8, 8) uint8 in three colours by turns, and which, (count,) int64."""
    labels = torch.arange(count) % 3
    noise = torch.randint(-25, 25, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return (255 * COLOURS[labels].view(-1, 3, 1, 1) + noise).clamp(0, 255).to(torch.uint8), labels


def look(
    module: nn.Module, *, count: int = 32, size: int = 16, goal: Goal | None = PLAIN, labels: list[int] | None = None
) -> list[str]:
    pictures, right = images(count)
    return check_model(Model(module), pictures, right if labels is None else torch.tensor(labels), goal, size)


def counting() -> Forward:
    """Another answer at each call, and none of it random."""
    calls = itertools.count()
    return lambda logits: logits + 0.1 * next(calls) * torch.arange(3)


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.rand_like(gradient)


def without_statistics(values: Tensor) -> Tensor:
    return F.batch_norm(values, None, None, training=True)


@pytest.mark.parametrize(
    ("change", "before", "named"),
    [
        (lambda logits: logits.softmax(1), None, "probabilities"),
        (lambda logits: logits.bfloat16().softmax(1), None, "probabilities"),
        (lambda logits: torch.stack([logits[:, 0].sigmoid(), 1 - logits[:, 0].sigmoid()], 1), None, "probabilities"),
        (lambda logits: logits + torch.randn_like(logits), None, "deterministic"),
        (F.dropout, None, "deterministic"),
        (None, F.dropout, "deterministic"),
        (counting(), None, "deterministic"),
        (None, NoisyGradient.apply, "deterministic.*gradient"),
        (without_statistics, None, r"runtime\.batch_size=1"),
        (lambda logits: logits - logits.mean(0), None, r"runtime\.batch_size=1"),
        (lambda logits: logits * len(logits), None, r"runtime\.batch_size=1"),
        (None, lambda pixels: pixels / pixels.amax(), r"runtime\.batch_size=1"),
        (lambda logits: logits.mean(0, keepdim=True), None, r"\b16 .*\(1, 3\)"),
        (lambda logits: logits.reshape(1, -1), None, r"\b16 .*\(1, 48\)"),
        (lambda logits: logits.round(), None, r"gradient .*\b0\b"),
        (lambda logits: 0 * logits, None, r"gradient .*\b0\b"),
        (None, lambda pixels: (255 * pixels).round() / 255, r"gradient .*\b0\b"),
    ],
)
def test_what_no_dataset_could_be_made_with(change: Forward | None, before: Forward | None, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^model: .*{named}") as caught:
        look(Colours(change, before))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "before"),
    [
        (None, None),
        (lambda logits: logits.log_softmax(1), None),
        (lambda logits: logits.relu() + logits, None),
        (None, lambda pixels: pixels - pixels.mean((1, 2, 3), keepdim=True) + 0.3),
        # Of images that give no number the run speaks, if there are any.
        (lambda logits: logits.where(torch.arange(len(logits))[:, None] != 1, torch.nan), None),
        (lambda logits: logits / 0, None),
    ],
)
def test_what_is_right_passes_without_a_word(change: Forward | None, before: Forward | None) -> None:
    assert look(Colours(change, before)) == []


def test_a_model_that_raises_is_named_with_the_line() -> None:
    with pytest.raises(CodeError, match=rf"^model: {__file__} fails in line \d+: RuntimeError: shape") as caught:
        check_model(Model(Colours(lambda logits: logits.view(1, 3)), files=[__file__]), *images(), PLAIN, 16)
    assert "\n" not in str(caught.value)


def test_logits_that_depend_on_whether_a_gradient_is_wanted_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model: .*gradient"):
        look(Colours(lambda logits: logits if torch.is_grad_enabled() else -logits))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_model_of_torchscript_is_looked_at_as_any() -> None:
    torch.manual_seed(0)
    module = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()))
    assert look(module, labels=[-1] * 32) == []


def test_a_batch_of_one_has_no_neighbours() -> None:
    assert look(Colours(lambda logits: logits * (1 + len(logits))), size=1) == []


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_any_number_of_images_will_do(count: int) -> None:
    assert look(Colours(), count=count) == []
    with pytest.raises(ConfigError, match=r"^model: .*runtime\.batch_size=1"):
        look(Colours(before=lambda pixels: pixels / pixels.mean()), count=count)


def test_a_sigmoid_and_last_digits_are_said() -> None:
    (sentence,) = look(Colours(lambda logits: (logits + 4).sigmoid()))
    assert "lies in [0, 1]" in sentence
    (sentence,) = look(Colours(lambda logits: logits * (1 + 1e-6 * torch.rand(()))))
    assert "digits" in sentence


def test_a_gradient_that_is_mostly_zero_is_said_with_its_share() -> None:
    (sentence,) = look(Colours(before=lambda pixels: pixels[:, :, :2]))
    assert "75.0%" in sentence
    assert look(Colours(before=lambda pixels: pixels[:, :, :4])) == []


def test_who_only_looks_needs_no_gradient() -> None:
    assert look(Colours(lambda logits: logits.round()), goal=None) == []
    with pytest.raises(ConfigError, match=r"^model: .*probabilities"):
        look(Colours(lambda logits: logits.softmax(1)), goal=None)


@pytest.mark.parametrize(
    ("change", "labels", "count", "said"),
    [
        (lambda logits: logits.roll(1, 1), None, 32, "accuracy 0% on 32 "),
        # Always the same class: what it gets right is that class's share.
        (lambda logits: logits + 100 * torch.tensor([1.0, 0, 0]), None, 64, "accuracy 34% on 64"),
        # So few images could be chance.
        (lambda logits: logits.roll(1, 1), None, 5, None),
        # One class tells nothing of the order.
        (lambda logits: logits.roll(1, 1), [0] * 32, 32, None),
        (lambda logits: logits.roll(1, 1), [-1] * 32, 32, None),
        # Most images are of one class, and naming it always is not more than chance.
        (lambda logits: logits + 1e4 * torch.tensor([1.0, 0, 0]), [0] * 56 + [1] * 8, 64, None),
        # Half right is more than chance.
        (None, [index % 3 if index % 2 else 0 for index in range(64)], 64, None),
    ],
)
def test_accuracy_of_chance_is_said_where_the_images_can_tell(
    change: Forward | None, labels: list[int] | None, count: int, said: str | None
) -> None:
    found = look(Colours(change), count=count, goal=None, labels=labels)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


@pytest.mark.parametrize(("right", "said"), [(0, True), (1, True), (2, False), (60, False)])
def test_two_right_of_a_thousand_classes_are_more_than_chance(right: int, said: bool) -> None:
    labels = torch.arange(64)
    predictions = torch.where(labels < right, labels, labels + 100)
    assert bool(_check_accuracy(F.one_hot(predictions, 1000).float(), labels)) == said


# ------------------------------------------------------------------------------------------------- in a run

MODELS = (
    FACTORY
    + """

import os
import threading


class Softmax(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Corner(Net):
    '''Looks at a quarter of the image.'''

    def forward(self, x):
        return super().forward(x[:, :, :8, :8])


class Large(Net):
    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(x)


class Later(Net):
    '''Fails in the threads of a run, not in the look before it.'''

    def forward(self, x):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no such thing")
        return super().forward(x)


class Moody(Net):
    '''Draws random numbers where the environment says so.'''

    def forward(self, x):
        logits = super().forward(x)
        return logits + torch.randn_like(logits) if os.environ.get("MOODY") else logits
"""
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


def with_another(write_config: WriteConfig, name: str) -> Path:
    """A config with another model, `other`, that no attack names."""
    path = write_config(attack={"models": ["net"]})
    config = yaml.safe_load(path.read_text())
    config["models"] = {"net": config.pop("model"), "other": {"kind": "factory", "name": name}}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def test_a_run_is_refused_before_anything_is_written(write_config: WriteConfig, models: Path, tmp_path: Path) -> None:
    result = fgsm("generate", write_config(model={"name": f"{models}:Softmax"}))
    assert result.exit_code == ConfigError.exit_code
    assert re.search("Error: model: .*probabilities", result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_attack_names_is_looked_at_too(write_config: WriteConfig, models: Path, tmp_path: Path) -> None:
    result = fgsm("generate", with_another(write_config, f"{models}:Softmax"))
    assert result.exit_code == ConfigError.exit_code
    assert re.search(r"Error: models\.other: .*probabilities", result.stderr)
    assert not (tmp_path / "out").exists()


LEFT = "left 75.0% "


def test_a_run_that_moves_little_says_so_at_both_ends(
    write_config: WriteConfig, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = generate(write_config(model={"name": f"{models}:Corner"}))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum(sentence.startswith("model: ") and "75.0%" in sentence for sentence in said) == 1
    assert sum(LEFT in sentence for sentence in said) == 1
    assert f"fgsm on Corner {LEFT}" in output
    assert f"fgsm on Corner {LEFT}" in fgsm("inspect", tmp_path / "out").stdout


def test_a_run_that_moves_most_does_not(write_config: WriteConfig, tmp_path: Path) -> None:
    assert "of the pixel values as they are" not in generate(write_config())
    assert "of the pixel values as they are" not in fgsm("inspect", tmp_path / "out").stdout


def test_a_run_that_is_resumed_has_been_looked_at(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_once(write_config())
    before = digests(tmp_path / "out")
    shard_path(tmp_path / "out", ".run/receipts/test-00001-of-00003.json").unlink()
    monkeypatch.setattr("pipeline.engine.run.check_model", None)
    generate(write_config())
    assert digests(tmp_path / "out") == before


def test_so_many_images_are_looked_at_as_fit(
    write_config: WriteConfig, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def looking(*arguments: Any) -> list[str]:
        sizes.append(arguments[-1])
        return check_model(*arguments)

    monkeypatch.setattr("pipeline.engine.run.check_model", looking)
    result = fgsm("generate", write_config(model={"name": f"{models}:Large"}))
    assert sizes == [6, 3, 1]
    assert result.exit_code == PipelineError.exit_code, "on a CPU the run does not halve its batch"


@pytest.mark.parametrize("key", ["model", "models.other"])
def test_a_model_that_fails_in_a_batch_of_the_run_is_named(
    write_config: WriteConfig, models: Path, tmp_path: Path, key: str
) -> None:
    later = f"{models}:Later"
    path = write_config(model={"name": later}) if key == "model" else with_another(write_config, later)
    for options in ([], ["--debug"]):
        result = fgsm("generate", path, *options)
        assert result.exit_code == PipelineError.exit_code
        assert f"Error: {key}: {models} fails in line " in result.stderr
        assert "RuntimeError: no such thing (shard test-00000" in result.stderr
        assert ("Traceback" in result.stderr) == bool(options)
    assert not list((tmp_path / "out").glob("*/*.parquet"))


@pytest.mark.parametrize("key", ["model", "models.other"])
def test_verify_does_not_take_a_model_s_moods_for_damage(
    write_config: WriteConfig, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    moody = f"{models}:Moody"
    generate_once(write_config(model={"name": moody}) if key == "model" else with_another(write_config, moody))
    before = digests(tmp_path / "out")
    monkeypatch.setenv("MOODY", "1")
    result = fgsm("verify", tmp_path / "out", "--recompute", "--repair")
    assert result.exit_code == PipelineError.exit_code
    assert re.search(f"Error: {key}: .*deterministic", result.stderr)
    assert digests(tmp_path / "out") == before
    assert manifest(tmp_path / "out")["complete"]
    monkeypatch.delenv("MOODY")
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0
