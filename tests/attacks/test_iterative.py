"""BIM, PGD and MI-FGSM: against references, and the properties that make the stored dataset right."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.attacks.base import Attack, Goal
from pipeline.attacks.fgsm import FGSM
from pipeline.attacks.iterative import BIM, MIFGSM, PGD, _normalised
from pipeline.attacks.load import load_attack
from pipeline.attacks.noise import Noise
from pipeline.models.attacked import AttackedModel
from pipeline.models.base import Model
from pipeline.models.load import load_model
from pipeline.sources.digits import digits_split
from tests.conftest import random_pixels, some_slow
from tests.support.configs import section

KINDS = ("bim", "pgd", "mifgsm")
LEVELS = (1, 2, 3, 7, 16, 40)
DRAWS = torch.from_numpy(np.random.RandomState(5).randint(0, 2**31, 12))
IMAGES = torch.from_numpy(random_pixels(12)).permute(0, 3, 1, 2).contiguous()
LABELS = torch.arange(12) % 7


def conv_net(seed: int) -> nn.Sequential:
    """Random weights, sharp enough that gradients turn from step to step; in double precision signs are exact."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 7),
    )
    return net.double().eval()


def made(kind: str, levels: tuple[int, ...] = LEVELS, **settings: Any) -> tuple[Attack, dict[int, tuple[int, int]]]:
    """An attack as a config makes it, and how many steps of which length it takes at each level."""
    config = section("attack", kind=kind, epsilons=[f"{level}/255" for level in levels], **settings)
    return load_attack(config).attack, config.schedule


def attacked(
    attack: Attack,
    victim: Model,
    images: Tensor = IMAGES,
    labels: Tensor = LABELS,
    levels: tuple[int, ...] = LEVELS,
    goal: Goal | None = None,
    draws: Tensor = DRAWS,
) -> Tensor:
    """What is stored, (K, N, C, H, W) uint8."""
    goal = goal or Goal()
    model = AttackedModel(victim, images, targeted=goal.target is not None)
    classes = goal.classes(model.logits, labels, draws)
    perturbed = attack.perturb(model, images, classes, levels, draws)
    assert perturbed.direction is None
    assert all(made.dtype == torch.uint8 for made in perturbed.images)
    return torch.stack(perturbed.images)


# ------------------------------------------------------------------------------------------------ references


def reference(
    net: nn.Module,
    images: Tensor,
    classes: Tensor,
    *,
    level: int,
    steps: int,
    size: int,
    start: Tensor | None = None,
    decay: float | None = None,
    targeted: bool = False,
) -> Tensor:
    """As the papers have it: images in [0, 1], cross-entropy, no lattice; (N, C, H, W) float64 in grey levels."""
    clean = images.double() / 255
    x, momentum = (clean if start is None else start.double() / 255).clone(), torch.zeros_like(clean)
    for _ in range(steps):
        x.requires_grad_()
        loss = F.cross_entropy(net(x), classes, reduction="sum")
        (gradient,) = torch.autograd.grad(-loss if targeted else loss, x)
        if decay is not None:
            momentum = decay * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
            gradient = momentum
        x = x.detach() + size / 255 * gradient.sign()
        x = torch.max(torch.min(x, clean + level / 255), clean - level / 255).clamp(0, 1)
    return 255 * x


def word(draw: int, value: int) -> int:
    """The random word of a value, with Python's own numbers."""

    def mixed(x: int) -> int:
        for _ in range(2):
            x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        return (x >> 16) ^ x

    return mixed(mixed(value) ^ mixed(draw ^ 0x50474400))


@cache
def words() -> Tensor:
    """Those of all values of IMAGES."""
    values = range(IMAGES[0].numel())
    return torch.tensor([[word(int(draw), value) for value in values] for draw in DRAWS]).view(IMAGES.shape)


def starts(images: Tensor, level: int) -> Tensor:
    """Where PGD begins."""
    return (images + words() % (2 * level + 1) - level).clamp(0, 255)


# What an attack aims at and its steps do not touch each other: each is varied beside the default of the other.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("goal", "wanted", "levels", "settings"),
    [
        (Goal(), lambda _: LABELS, LEVELS, {}),
        (Goal(), lambda _: LABELS, LEVELS, {"steps": 6}),
        (Goal(), lambda _: LABELS, LEVELS[2:], {"step": "3/255"}),
        (Goal(), lambda _: LABELS, LEVELS[1:], {"steps": 13, "step": "2/255"}),
        (Goal(label="prediction"), lambda logits: logits.argmax(1), LEVELS, {}),
        (Goal(target=2), lambda _: torch.full_like(LABELS, 2), LEVELS, {"steps": 6}),
        (Goal(target="least_likely"), lambda logits: logits.argmin(1), LEVELS[2:], {"step": "3/255"}),
    ],
)
def test_the_images_are_those_of_the_papers(
    kind: str, goal: Goal, wanted: Callable[[Tensor], Tensor], levels: tuple[int, ...], settings: dict[str, Any]
) -> None:
    net = conv_net(0)
    attack, schedule = made(kind, levels, **settings)
    found = attacked(attack, Model(copy.deepcopy(net)), levels=levels, goal=goal)
    classes = wanted(net(IMAGES.double() / 255))
    for level, images in zip(levels, found, strict=True):
        steps, size = schedule[level]
        expected = reference(
            net,
            IMAGES,
            classes,
            level=level,
            steps=steps,
            size=size,
            start=starts(IMAGES, level) if kind == "pgd" else None,
            decay=1.0 if kind == "mifgsm" else None,
            targeted=goal.target is not None,
        )
        torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_decay(decay: float) -> None:
    net = conv_net(1)
    attack, schedule = made("mifgsm", decay=decay)
    found = attacked(attack, Model(copy.deepcopy(net)))
    for level, images in zip(LEVELS, found, strict=True):
        steps, size = schedule[level]
        expected = reference(net, IMAGES, LABELS, level=level, steps=steps, size=size, decay=decay)
        torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)


# foolbox 3.3.4 imports scipy.ndimage.filters, which scipy has moved.
@pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", ["bim", "pgd"])
def test_the_images_are_those_of_foolbox(kind: str, targeted: bool) -> None:
    from eagerpy.astensor import astensor
    from foolbox.attacks.basic_iterative_method import LinfBasicIterativeAttack
    from foolbox.attacks.projected_gradient_descent import LinfProjectedGradientDescentAttack
    from foolbox.criteria import Misclassification, TargetedMisclassification
    from foolbox.models.pytorch import PyTorchModel

    class FromOurStart(LinfProjectedGradientDescentAttack):
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            del x0
            return astensor(starts(IMAGES, round(255 * epsilon)).double() / 255)

    net = conv_net(3)
    attack, schedule = made(kind)
    found = attacked(attack, Model(copy.deepcopy(net)), goal=Goal(target=2 if targeted else None))
    theirs = {"bim": LinfBasicIterativeAttack, "pgd": FromOurStart}[kind]
    criterion = TargetedMisclassification(torch.full_like(LABELS, 2)) if targeted else Misclassification(LABELS)
    model = PyTorchModel(net, bounds=(0, 1), device="cpu")
    for level, images in zip(LEVELS, found, strict=True):
        steps, size = schedule[level]
        run = theirs(abs_stepsize=size / 255, steps=steps, random_start=kind == "pgd").run
        expected = run(model, IMAGES.double() / 255, criterion, epsilon=level / 255)
        torch.testing.assert_close(images.double() / 255, expected, rtol=0, atol=1e-9)


# As above.
@pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")
def test_pgd_from_the_clean_image_is_that_of_foolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Foolbox as it is: the first step to the pixel, and how many images hold at the end."""
    from foolbox.attacks.projected_gradient_descent import LinfProjectedGradientDescentAttack
    from foolbox.criteria import Misclassification
    from foolbox.models.pytorch import PyTorchModel

    monkeypatch.setattr("pipeline.attacks.iterative._starts", lambda images, levels, _: [images] * len(levels))
    net, victim = conv_net(3), Model(conv_net(3))
    labels = victim.predict(IMAGES).argmax(1)
    model, criterion = PyTorchModel(net, bounds=(0, 1), device="cpu"), Misclassification(labels)
    _, schedule = made("pgd")
    held = []
    for level, (steps, size) in schedule.items():
        for count in (1, steps):
            ours = attacked(PGD({level: (count, size)}), victim, labels=labels, levels=(level,))[0]
            run = LinfProjectedGradientDescentAttack(abs_stepsize=size / 255, steps=count, random_start=False).run
            theirs = run(model, IMAGES.double() / 255, criterion, epsilon=level / 255)
            if count == 1:
                assert torch.equal(ours, (255 * theirs).round().to(torch.uint8))
        held.append(int((victim.predict(ours).argmax(1) == labels).sum()))
        assert held[-1] == int((net(theirs).argmax(1) == labels).sum())
    assert len({*held}) > 2, "levels at which all fall, or none, would show nothing"


# ------------------------------------------------------------------------------------------------ the lattice


@pytest.mark.parametrize("kind", KINDS)
def test_images_stay_in_the_ball_and_fill_it(kind: str) -> None:
    before = IMAGES.clone()
    found = attacked(made(kind)[0], Model(conv_net(0)))
    assert torch.equal(before, IMAGES)
    for level, images in zip(LEVELS, found, strict=True):
        moved = (images.int() - IMAGES.int()).abs()
        assert int(moved.max()) <= level
        assert int(moved.max()) == level
    # Clipping at black and at white is part of the test.
    assert {0, 255} <= {*found[-1].flatten().tolist()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_without_influence_stays_where_it_starts(kind: str) -> None:
    class Half(nn.Module):
        """Looks at the left half alone."""

        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net(0)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(torch.cat([images[..., :8], torch.zeros_like(images[..., 8:])], 3))
            return logits

    found = attacked(made(kind)[0], Model(Half()))
    for level, images in zip(LEVELS, found, strict=True):
        expected = starts(IMAGES, level) if kind == "pgd" else IMAGES
        assert torch.equal(images[..., 8:].int(), expected[..., 8:].int())
        assert not torch.equal(images[..., :8].int(), expected[..., :8].int())


def test_where_pgd_starts_is_uniform_in_the_ball() -> None:
    images, draws = torch.full((12, 3, 32, 32), 128, dtype=torch.uint8), DRAWS
    # No step is taken: where it starts is what is made.
    schedule = dict.fromkeys((1, 4, 100), (0, 1))
    model = AttackedModel(Model(conv_net(0)), IMAGES, targeted=False)
    found = PGD(schedule).perturb(model, images, LABELS, (1, 4, 100), draws)
    for level, start in zip((1, 4, 100), found.images, strict=True):
        moves = (start.int() - 128).flatten()
        counts = torch.bincount(moves + level, minlength=2 * level + 1)
        expected = moves.numel() / (2 * level + 1)
        assert len(counts) == 2 * level + 1
        assert float((counts - expected).abs().max()) < 7 * expected**0.5


# -------------------------------------------------------------------------------------------- gradients that fail


class Flat(nn.Module):
    """Logits that are the same for all images, with a gradient of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(7, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return self.bias + 0 * images.mean((1, 2, 3)).unsqueeze(1)


class NanOnWhite(nn.Module):
    """Images that are nearly white give NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net(0)

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3)).unsqueeze(1)
        logits: Tensor = self.net(images)
        return logits + torch.where(mean > 0.9, torch.nan, 0.0) * mean


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_gradient_stays_where_it_starts(kind: str) -> None:
    found = attacked(made(kind)[0], Model(Flat()))
    for level, images in zip(LEVELS, found, strict=True):
        assert torch.equal(images.int(), (starts(IMAGES, level) if kind == "pgd" else IMAGES).int())


def test_normalised_gradients() -> None:
    gradient = torch.randn((4, 3, 16, 16), dtype=torch.float16)
    gradient[1] = 0
    gradient[2] *= 1000  # whose sum is more than float16 holds
    found = _normalised(gradient)
    assert not found[1].any()
    torch.testing.assert_close(found.abs().sum((1, 2, 3)), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(found[2], gradient[2].float() / gradient[2].float().abs().sum())


@pytest.mark.parametrize("kind", some_slow(KINDS, "pgd"))
def test_rows_do_not_depend_on_batches_order_or_neighbours(kind: str) -> None:
    attack, victim = made(kind)[0], Model(NanOnWhite())
    whole = attacked(attack, victim)
    for size in (1, 5):
        parts = [
            attacked(attack, victim, IMAGES[i : i + size], LABELS[i : i + size], draws=DRAWS[i : i + size])
            for i in range(0, 12, size)
        ]
        assert torch.equal(torch.cat(parts, 1), whole)
    order = torch.randperm(12)
    assert torch.equal(attacked(attack, victim, IMAGES[order], LABELS[order], draws=DRAWS[order]), whole[:, order])
    images, others = IMAGES.clone(), torch.arange(12) != 7
    images[7] = 255
    assert torch.equal(attacked(attack, victim, images)[:, others], whole[:, others])


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_alone_gives_what_it_gives_beside_others(kind: str) -> None:
    attack, victim = made(kind)[0], Model(conv_net(2))
    whole = attacked(attack, victim)
    for place, level in enumerate(LEVELS):
        assert torch.equal(attacked(attack, victim, levels=(level,))[0], whole[place])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_no_number_is_seen(kind: str) -> None:
    images = IMAGES.clone()
    images[7] = 255
    model = AttackedModel(Model(NanOnWhite()), images, targeted=False)
    made(kind)[0].perturb(model, images, LABELS, LEVELS, DRAWS)
    assert model.finite.tolist() == [row != 7 for row in range(12)]


# ------------------------------------------------------------------------------------------------ how strong


@pytest.fixture(scope="module")
def digits() -> tuple[Model, Tensor, Tensor]:
    """The packaged model, and test images with their labels."""
    victim = load_model(section("model", kind="digits"), seed=0, device=torch.device("cpu"))
    images, labels = digits_split("test")
    return victim, torch.from_numpy(images[:100]).unsqueeze(1), torch.from_numpy(labels[:100])


@pytest.mark.parametrize("level", some_slow([8, 16, 32, 64], 8, 32))
def test_several_steps_are_stronger_than_one_and_one_than_noise(
    level: int, digits: tuple[Model, Tensor, Tensor]
) -> None:
    victim, images, labels = digits

    def loss(attack: Attack) -> float:
        model = AttackedModel(victim, images, targeted=False)
        draws = torch.arange(100) * 7919
        (stored,) = attack.perturb(model, images, labels, (level,), draws).images
        return float(F.cross_entropy(victim.predict(stored).double(), labels))

    losses = {kind: loss(made(kind, (level,))[0]) for kind in KINDS}
    one, none, random = loss(FGSM()), float(F.cross_entropy(victim.predict(images).double(), labels)), loss(Noise())
    assert all(several > one for several in losses.values())
    assert random < none + 0.2 * (one - none)


# ------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    ("attack", "most"),
    [
        # Of 2 + 3 + 5 + 10 steps levels share those that cannot leave their balls.
        (lambda: made("bim", (1, 2, 4, 8))[0], 13),
        (lambda: made("pgd", (1, 2, 4, 8))[0], 40),
        # The first gradient is that of the clean images for each level.
        (lambda: made("mifgsm", (1, 2, 4, 8))[0], 1 + 4 * 9),
    ],
)
def test_gradients_that_levels_share_are_computed_once(attack: Callable[[], Attack], most: int) -> None:
    count = 0

    class Counting(AttackedModel):
        def gradient(self, images_u8: Tensor, classes: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return super().gradient(images_u8, classes)

    attack().perturb(Counting(Model(conv_net(0)), IMAGES, targeted=False), IMAGES, LABELS, (1, 2, 4, 8), DRAWS)
    assert count == most


def test_the_classes_say_what_they_need() -> None:
    assert [(kind.on_ray, kind.needs_draws) for kind in (BIM, PGD, MIFGSM)] == [
        (False, False),
        (False, True),
        (False, False),
    ]
