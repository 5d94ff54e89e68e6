"""Attacks of the user's own: the page's example as it stands there, one that takes steps, and what is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from pipeline.check.verify import verify
from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.own_code import import_own
from pipeline.engine.run import open_run
from tests.conftest import REPOSITORY, fgsm, generate, manifest, rows

# Several steps, each within the ball.
STEPS = """
import torch
from pipeline.attacks.base import Perturbed


class Steps:
    on_ray = False
    needs_draws = False

    def __init__(self, steps=3, size=3):
        self.steps, self.size = steps, size

    def perturb(self, model, images, classes, levels, draws):
        clean, made = images.to(torch.int16), []
        for level in levels:
            x = images
            for _ in range(self.steps):
                moved = x + self.size * model.gradient(x, classes).sign().to(torch.int16)
                x = moved.clamp(clean - level, clean + level).clamp(0, 255).to(torch.uint8)
            made.append(x)
        return Perturbed(tuple(made))


class Drawn(Steps):
    on_ray = True
    needs_draws = True

    def perturb(self, model, images, classes, levels, draws):
        generators = [torch.Generator().manual_seed(int(draw)) for draw in draws]
        rows = [torch.randn(images.shape[1:], generator=generator) for generator in generators]
        return Perturbed.along(images, torch.stack(rows), levels)


class Broken(Steps):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.on_ray = how in ("off the ray", "no direction", "NaN", "small")
        self.calls = 0

    def perturb(self, model, images, classes, levels, draws):
        self.calls += 1
        made = super().perturb(model, images, classes, levels, draws).images
        match self.how:
            case "too far":
                return Perturbed(tuple(image ^ 128 for image in made))
            case "random":
                return Perturbed(tuple(torch.where(torch.rand(i.shape) < 0.5, i, images) for i in made))
            case "float":
                return Perturbed(tuple(image.float() for image in made))
            case "one short":
                return Perturbed(made[1:])
            case "off the ray":
                return Perturbed(made, torch.ones(images.shape))
            case "in place":
                images += 1
            case "raises":
                raise RuntimeError("no such thing")
            case "NaN":
                return Perturbed.along(images, images.float() / images.float(), levels)
            case "small":
                return Perturbed.along(images, images[:1].float(), levels)
            case "list":
                return list(made)
            case "float gradient":
                model.gradient(images / 255, classes)
            case "fewer":
                model.gradient(images[:1], classes[:1])
            case "float prediction":
                model.predict(images / 255)
            case "undeclared draws":
                draws % 2
            case "seeded":
                torch.manual_seed(0)
                return Perturbed(tuple(torch.where(torch.rand(i.shape) < 0.5, i, images) for i in made))
            case "whole batch":
                bright = images > images.float().mean()
                return Perturbed(tuple(torch.where(bright, i, images) for i in made))
            case "raises later" if self.calls > 3:
                raise RuntimeError("no such thing")
            case "later" if self.calls > 3:
                return Perturbed(tuple(image ^ 128 for image in made))
        return Perturbed(made)


class Unsaid:
    def perturb(self, model, images, classes, levels, draws):
        return None


class Without:
    on_ray = needs_draws = True


def make():
    return Steps()
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The files of docs/extending.md, and a file of the attacks above; the config's path."""
    page = (REPOSITORY / "docs/extending.md").read_text()
    code, config = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("python", "yaml"))
    (tmp_path / "blurred.py").write_text(code)
    (tmp_path / "steps.py").write_text(STEPS)
    # The page's config, but for a few images on a CPU.
    config = yaml.safe_load(config)
    config["source"] |= {"limit": 12, "split": "test"}
    config |= {"output": {"path": f"{tmp_path}/out"}, "runtime": {"device": "cpu", "workers": 0, "batch_size": 8}}
    (tmp_path / "blurred.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "blurred.yaml"


def other(example: Path, kind: str, **sections: dict[str, Any]) -> Path:
    """The example's config with another attack."""
    config = yaml.safe_load(example.read_text())
    config["attack"] = {"kind": kind, "epsilons": ["4/255", "8/255"]}
    for name, section in sections.items():
        config[name] = {**config[name], **section}
    path = example.with_name("other.yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def recomputed(example: Path) -> None:
    findings = verify(example.parent / "out", recompute=True)
    assert (findings.problems, findings.mismatches) == ([], 0)
    assert findings.recomputed == 36


def test_the_example_of_the_page_runs_and_is_verified(example: Path) -> None:
    assert len(re.findall(r"\n(?=.)", (example.parent / "blurred.py").read_text())) < 20
    generate(example)
    result = fgsm("verify", example.parent / "out", "--recompute")
    assert result.exit_code == 0, result.output
    attacked = rows(example.parent / "out", "eps-8")
    assert {*zip(attacked["attack"], attacked["model"], strict=True)} == {("Blurred", "digits")}
    assert re.search(r"\b36 predictions .* 0 differ", result.stdout)
    # Any epsilon can be made of it, as of FGSM.
    assert len(pipeline.load(example.parent / "out", ["16/255"], "test")) == 12


def test_code_and_arguments_are_part_of_the_run(example: Path) -> None:
    """Where the file lies is not."""
    identity = _identity(example)
    own = {key.removeprefix("attacks.Blurred.") for key in identity if key.startswith("attacks.")}
    others = {key.removeprefix("attacks.fgsm.") for key in _identity(example, "fgsm", kwargs=None)}
    assert own - others == {"kwargs", "content"}
    (example.parent / "moved").mkdir()
    shutil.copy(example.parent / "blurred.py", example.parent / "moved/blurred.py")
    assert _identity(example, "moved/blurred.py:Blurred") == identity
    assert _identity(example, kwargs={"sigma": 1.0}) != identity
    code = example.parent / "blurred.py"
    (example.parent / "changed.py").write_text(code.read_text() + "\n")
    assert _identity(example, "changed.py:Blurred") != identity


def _identity(example: Path, kind: str | None = None, **attack: Any) -> dict[str, Any]:
    config = yaml.safe_load(example.read_text())
    config["attack"] |= {**({"kind": kind} if kind else {}), **attack}
    path = example.with_name("identity.yaml")
    path.write_text(yaml.safe_dump(config))
    return open_run(load_config(str(path))).manifest().identity


def test_recompute_refuses_code_that_has_changed(example: Path) -> None:
    generate(example)
    assert manifest(example.parent / "out")["config"]["attack"]["kind"] == f"{example.parent}/blurred.py:Blurred"
    (example.parent / "blurred.py").write_text((example.parent / "blurred.py").read_text() + "# changed\n")
    with pytest.raises(ConfigError, match=r"^attack: "):
        verify(example.parent / "out", recompute=True)
    assert verify(example.parent / "out").problems == []


def test_recompute_warns_of_code_and_runs_none_out_of_the_dataset(
    example: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate(example)
    verify(example.parent / "out")
    assert "blurred.py" not in caplog.text
    verify(example.parent / "out", recompute=True)
    assert f"{example.parent}/blurred.py:Blurred" in caplog.text
    inside = example.parent / "out/blurred.py"
    shutil.copy(example.parent / "blurred.py", inside)
    shutil.rmtree(example.parent / "out/.run/receipts")
    config = other(example, str(inside) + ":Blurred", output={"path": f"{example.parent}/out"})
    assert fgsm("generate", config, "--overwrite").exit_code == 0
    with pytest.raises(ConfigError, match=rf"^attack\.kind: {re.escape(str(inside))}"):
        verify(example.parent / "out", recompute=True)


@pytest.mark.parametrize("target", [None, "random"])
def test_an_attack_that_takes_steps(example: Path, target: str | None) -> None:
    config = other(example, "steps.py:Steps")
    content = yaml.safe_load(config.read_text())
    content["attack"]["target"] = target
    config.write_text(yaml.safe_dump(content))
    generate(config)
    recomputed(example)
    out = example.parent / "out"
    assert manifest(out)["identity"]["attacks.Steps.on_ray"] is False
    for read in (pipeline.load, pipeline.training_dataset):
        with pytest.raises(ConfigError, match=r"^epsilons: 6/255 .* 4/255, 8/255\.$"):
            read(out, epsilons=["6/255"], split="test")
    assert len(pipeline.load(out, ["8/255"], "test")) == 12


def test_recompute_finds_images_that_the_attack_does_not_make(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(other(example, "steps.py:Steps"))
    steps: Any = import_own(f"{example.parent}/steps.py:Steps", "attack.kind")
    monkeypatch.setattr(steps.__init__, "__defaults__", (2, 3))
    findings = verify(example.parent / "out", recompute=True)
    assert len(findings.damaged) == 1
    assert re.search(r"eps-4/test-00000\S* .* 8 images .*attack", findings.problems[0])


def test_what_is_drawn_follows_from_seed_and_row(example: Path) -> None:
    generate(other(example, "steps.py:Drawn"))
    recomputed(example)
    first = pipeline.load(example.parent / "out", ["8/255"], "test")
    generate(other(example, "steps.py:Drawn", output={"path": f"{example.parent}/again"}, runtime={"batch_size": 5}))
    again = pipeline.load(example.parent / "again", ["8/255"], "test")
    assert [row["image"].tobytes() for row in first] == [row["image"].tobytes() for row in again]


def test_one_sign_cannot_hold_an_attack_that_takes_steps(example: Path) -> None:
    result = fgsm("generate", other(example, "steps.py:Steps", output={"layout": "signs"}))
    assert result.exit_code == 2
    assert re.search(r"Error: output\.layout: signs .*steps\.py:Steps .* images or wide", result.stderr)
    generate(other(example, "steps.py:Drawn", output={"layout": "signs"}))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("too far", r"attack\.kind: .*steps\.py .* 4/255 .* \d+ grey"),
        ("random", r"attack\.kind: .*steps\.py .*deterministic"),
        ("float", r"attack\.kind: .*steps\.py .* 2 .*shape .* uint8, .* float32"),
        ("one short", r"attack\.kind: .*steps\.py .* 2 .*shape "),
        ("off the ray", r"attack\.kind: .*steps\.py .* 4/255 .* sign\b"),
        ("no direction", r"attack\.kind: .*steps\.py .* on_ray = True,.* direction"),
        ("in place", r"attack\.kind: .*steps\.py changes .*images"),
        ("raises", r"attack\.kind: .*steps\.py .* line \d+: RuntimeError: "),
        ("NaN", r"attack\.kind: .*steps\.py .* direction .* NaN"),
        ("small", r"attack\.kind: .*steps\.py .* direction .* \(1, 1, 64, 64\)"),
        ("list", r"attack\.kind: perturb .*steps\.py .* list\b"),
        ("float gradient", r"attack\.kind: .*model\.gradient .* uint8 .* float32"),
        ("fewer", r"attack\.kind: .*model\.gradient .* uint8 .* \(1, 1, 64, 64\)"),
        ("float prediction", r"attack\.kind: .*model\.predict .* uint8"),
        ("undeclared draws", r"attack\.kind: .*steps\.py .* line \d+: TypeError: .*NoneType"),
        ("seeded", r"attack\.kind: .*steps\.py .*torch\.manual_seed"),
        ("whole batch", r"attack\.kind: .*steps\.py .* rows .*\d%"),
    ],
)
def test_an_attack_that_does_not_keep_its_promise(example: Path, how: str, named: str) -> None:
    config = other(example, "steps.py:Broken")
    content = yaml.safe_load(config.read_text())
    content["attack"]["kwargs"] = {"how": how}
    config.write_text(yaml.safe_dump(content))
    result = fgsm("generate", config)
    assert result.exit_code == 2
    assert re.search(f"Error: {named}", result.stderr)
    assert not (example.parent / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("later", r"attack\.kind: .*steps\.py made images .* than their epsilon; clamp"),
        (
            "raises later",
            r"attack\.kind: .*steps\.py fails in line \d+: RuntimeError: no such thing \(shard test-00000",
        ),
    ],
)
def test_an_attack_that_fails_later_ends_the_run(example: Path, how: str, sentence: str) -> None:
    """Not in the images that are looked at before, but in a batch of the run."""
    config = other(example, "steps.py:Broken")
    content = yaml.safe_load(config.read_text())
    content["attack"]["kwargs"] = {"how": how}
    config.write_text(yaml.safe_dump(content))
    for options in ([], ["--debug"]):
        result = fgsm("generate", config, "--overwrite", *options)
        assert result.exit_code == PipelineError.exit_code
        assert re.search(f"Error: {sentence}", result.stderr)
        assert ("Traceback" in result.stderr) == bool(options)
    assert not list((example.parent / "out").glob("*/*.parquet"))


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        ({"kind": "gone.py:Attack"}, r"attack\.kind: .*gone\.py"),
        ({"kind": "steps.py:Nobody"}, r"attack\.kind: .*steps\.py .* Nobody"),
        ({"kind": "steps.py"}, r"attack\.kind: .*'steps\.py'.*'fgsm', .*'path/to/file\.py:Attack'"),
        ({"kind": "steps.py:make"}, r"attack\.kind: .*steps\.py:make .* class\b.* function"),
        ({"kind": "steps.py:Unsaid"}, r"attack\.kind: .* on_ray"),
        ({"kind": "steps.py:Without"}, r"attack\.kind: .* perturb"),
        ({"kind": "steps.py:Steps", "kwargs": {"x": 1}}, r"attack\.kwargs: .* TypeError: .*'x'"),
    ],
)
def test_attacks_that_cannot_be_loaded(example: Path, attack: dict[str, Any], named: str) -> None:
    config = other(example, "fgsm")
    content = yaml.safe_load(config.read_text())
    content["attack"] |= attack
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(PipelineError, match=f"^{named}"):
        open_run(load_config(str(config)))
