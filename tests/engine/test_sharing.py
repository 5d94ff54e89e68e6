"""What attacks of one run share: how often models are asked and images decoded; none changes what another is given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.attacks.base import Goal, Perturbed
from pipeline.attacks.fgsm import FGSM
from pipeline.attacks.load import load_attack
from pipeline.core.errors import ConfigError
from pipeline.core.images import open_image
from pipeline.engine.compute import Attacked, ModelAttack, attack_images
from pipeline.engine.model_check import check_attack
from pipeline.models.base import Model
from tests.conftest import WriteConfig, generate, manifest
from tests.support.attacks import on_model
from tests.support.configs import section
from tests.support.several import ATTACKS, write_several

LEVELS = (1, 2, 8)
IMAGES = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 5
DRAWS = torch.arange(6) * 7919


class Counting(nn.Module):
    """Counts its forward passes, with a gradient and without, and its backward passes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
        self.differentiable = self.plain = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        if logits.requires_grad:
            self.differentiable += 1
            logits.register_hook(self._count)
        else:
            self.plain += 1
        return logits

    def _count(self, gradient: Tensor) -> None:
        del gradient
        self.backwards += 1

    @property
    def passes(self) -> tuple[int, int, int]:
        return self.differentiable, self.backwards, self.plain


def made(kind: str, model: str = "net", **settings: Any) -> ModelAttack:
    """An attack of the package on a model."""
    config = section("attack", kind=kind, epsilons=[f"{level}/255" for level in LEVELS], **settings)
    goal = Goal(config.label, config.target)
    return on_model(load_attack(config).attack, model, LEVELS, goal, asks_model=config.asks_model)


def attacked(models: dict[str, Model], *attacks: ModelAttack, labels: Tensor = LABELS) -> Attacked:
    return attack_images(
        models,
        attacks,
        IMAGES.clone(),
        labels.unsqueeze(1).expand(-1, len(models)),
        torch.ones(len(IMAGES), dtype=torch.bool),
        DRAWS,
    )


# Gradients at images other than the clean ones, at 1/255, 2/255 and 8/255. BIM takes 2, 3 and 10 steps and shares those
# that leave no ball; MI-FGSM takes 10 at each epsilon.
STEPS = {"fgsm": 0, "bim": (1 + 1) + (6 + 3) - 1 + 1, "mifgsm": 3 * 9}


@pytest.mark.parametrize("kinds", [["fgsm"], ["bim"], ["mifgsm"], ["fgsm", "bim", "mifgsm"], ["mifgsm", "bim", "fgsm"]])
def test_attacks_of_one_goal_share_the_clean_images_forward_and_gradient(kinds: list[str]) -> None:
    module, looking = Counting(), Counting(1)
    attacked({"net": Model(module), "looking": Model(looking)}, *map(made, kinds))
    gradients = 1 + sum(STEPS[kind] for kind in kinds)
    assert module.passes == (gradients, gradients, len(LEVELS) * len(kinds))
    # Another model looks once at each image, and the clean ones are among them.
    assert looking.passes == (0, 0, 1 + len(LEVELS) * len(kinds))


def test_another_goal_or_model_pays_for_its_own_gradient() -> None:
    one, other = Counting(), Counting(1)
    models = {"net": Model(one), "other": Model(other)}
    attacked(models, made("fgsm"), made("fgsm", target=2), made("fgsm", "other"))
    assert one.passes == (2, 2, 9)
    assert other.passes == (1, 1, 9)


def test_noise_asks_a_model_for_no_gradient() -> None:
    module = Counting()
    attacked({"net": Model(module)}, made("noise"))
    assert module.passes == (0, 0, 4)
    attacked({"net": Model(module)}, made("noise"), made("fgsm"))
    assert module.passes == (1, 1, 4 + 6)


class InPlace(FGSM):
    """Follows the gradient, and leaves something else of what it was given."""

    needs_draws = True

    def __init__(self, change: str) -> None:
        self.change = change

    def perturb(self, model: Any, images: Tensor, classes: Tensor, levels: Any, draws: Tensor) -> Perturbed:
        gradient = model.gradient(images, classes)
        perturbed = Perturbed.along(images, gradient.clone(), levels)
        given = {"gradient": gradient, "logits": model.logits, "classes": classes, "draws": draws}
        given[self.change].zero_()
        return perturbed


def equal(one: Attacked, other: Attacked) -> bool:
    pairs = [*zip((*one.images, *one.logits), (*other.images, *other.logits), strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["fgsm", "bim", "mifgsm"])
def test_a_gradient_that_an_attack_changes_in_place_does_not_reach_the_next(kind: str) -> None:
    models = {"net": Model(Counting())}
    expected = attacked(models, on_model(levels=LEVELS), made(kind))
    assert equal(attacked(models, on_model(InPlace("gradient"), levels=LEVELS), made(kind)), expected)


@pytest.mark.parametrize("change", ["logits", "classes", "draws"])
def test_what_else_an_attack_changes_in_place_is_refused_before_the_run(change: str) -> None:
    attack = on_model(InPlace(change))
    with pytest.raises(ConfigError, match=rf"^attack\.kind: .*\b{change}\b"):
        check_attack(attack, Model(Counting()), IMAGES.clone(), LABELS.clone())


@pytest.mark.parametrize("labels", [LABELS, torch.full_like(LABELS, -1)])
@pytest.mark.parametrize("order", [1, -1])
def test_noise_does_not_choose_the_classes_of_an_attack_on_predictions(labels: Tensor, order: int) -> None:
    models = {"net": Model(Counting())}
    alone = attacked(models, made("fgsm", label="prediction"), labels=labels)
    beside = attacked(models, *[made("noise"), made("fgsm", label="prediction")][::order], labels=labels)
    place = slice(4, None) if order == 1 else slice(1, 4)
    assert all(torch.equal(a, b) for a, b in zip(beside.images[place], alone.images[1:], strict=True))
    own = 0 if order == -1 else 1
    assert torch.equal(beside.classes[own], models["net"].predict(IMAGES).argmax(1))


def test_an_image_is_decoded_once_whatever_looks_at_it_and_attacks_it(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def counted(file: Any, opening: Callable[[Any], Any] = open_image) -> Any:
        opened.append(1)
        return opening(file)

    monkeypatch.setattr("pipeline.sources.cells.open_image", counted)
    counts = []
    for name, attacks in (("one", {"noise": ATTACKS["noise"]}), ("all", ATTACKS)):
        del opened[:]
        generate(write_several(write_config, tmp_path, attacks), "--output", str(tmp_path / name))
        counts.append(len(opened))
    assert len(manifest(tmp_path / "all")["subsets"]) == 7
    assert 40 <= counts[0] == counts[1]
