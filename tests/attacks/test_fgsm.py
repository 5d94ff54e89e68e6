"""The attack: by hand, against foolbox, and the properties that make the stored dataset right."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.attacks.base import Goal
from pipeline.core.errors import NonFiniteError
from pipeline.core.lattice import step
from pipeline.engine.compute import Attacked
from pipeline.models.attacked import AttackedModel
from pipeline.models.base import Model
from tests.conftest import random_pixels
from tests.support.attacks import attack_one, attacker_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(*arguments: Any, **settings: Any) -> Attacked:
    """As `attack_one`; all logits and gradients are numbers."""
    attacked = attack_one(*arguments, **settings)
    assert attacked.finite_logits.all()
    assert attacked.finite_gradient.all()
    return attacked


def pixels(attacked: Attacked) -> Tensor:
    """(1 + K, N, C, H, W) uint8."""
    return torch.stack(attacked.images)


def logits_of(attacked: Attacked) -> Tensor:
    """(1 + K, N, classes)."""
    return torch.stack(attacked.logits)


def noise(count: int, side: int = 16, seed: int = 0) -> Tensor:
    """(count, 3, side, side) uint8."""
    return torch.from_numpy(random_pixels(count, side, seed=seed)).permute(0, 3, 1, 2).contiguous()


def linear(weights: list[list[float]], bias: list[float] | None = None, dtype: torch.dtype = torch.float64) -> Model:
    """A victim whose logits are `weights @ pixels + bias`."""
    layer = nn.Linear(len(weights[0]), len(weights), dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights, dtype=dtype))
        layer.bias.copy_(torch.tensor(bias or [0.0] * len(weights), dtype=dtype))
    return Model(nn.Sequential(nn.Flatten(), layer))


def random_linear(values: int, classes: int = 5) -> Model:
    return linear(torch.randn(classes, values, dtype=torch.float64).tolist())


def conv_net(seed: int, classes: int = 7) -> nn.Sequential:
    """Random weights, sharp enough that gradients are far from uniform."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, classes),
    ).eval()


# ----------------------------------------------------------------------------------------------- by hand

BY_HAND = torch.tensor([0, 5, 100, 250, 255], dtype=torch.uint8).view(1, 1, 1, 5)


@pytest.mark.parametrize(
    ("goal", "label", "expected"),
    [
        # With two classes the gradient of J(y) is a positive multiple of W[other] - W[y] = [-2, -1, 0, 3, 1].
        (Goal(), 0, {1: [0, 4, 100, 251, 255], 10: [0, 0, 100, 255, 255], 255: [0, 0, 100, 255, 255]}),
        (Goal(), 1, {1: [1, 6, 100, 249, 254], 10: [10, 15, 100, 240, 245], 255: [255, 255, 100, 0, 0]}),
        (Goal(target=0), 0, {1: [1, 6, 100, 249, 254], 10: [10, 15, 100, 240, 245]}),
        (Goal(target=1), 0, {1: [0, 4, 100, 251, 255], 10: [0, 0, 100, 255, 255]}),
    ],
)
def test_exact_pixels_where_the_gradient_is_known(goal: Goal, label: int, expected: dict[int, list[int]]) -> None:
    # The third pixel has no influence at all: its sign is 0.
    victim = linear([[1.0, 1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 0.0, 2.0, 1.0]])
    attacked = run(victim, BY_HAND, torch.tensor([label]), levels=tuple(expected), goal=goal)
    assert all(images.dtype == torch.uint8 for images in attacked.images)
    assert [images.flatten().tolist() for images in attacked.images] == [BY_HAND.flatten().tolist(), *expected.values()]
    assert attacked.classes.tolist() == [[label if goal.target is None else goal.target]]
    assert attacked.zero_signs.tolist() == [0, *[1] * len(expected)]


# --------------------------------------------------------------------------- an independent implementation


# foolbox 3.3.4 imports scipy.ndimage.filters, which scipy has moved.
@pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")
@pytest.mark.parametrize("seed", range(4))
def test_the_images_are_those_of_foolbox(seed: int) -> None:
    from foolbox.attacks.fast_gradient_method import LinfFastGradientAttack
    from foolbox.criteria import Misclassification
    from foolbox.models.pytorch import PyTorchModel

    levels = (1, 3, 8, 64)
    net, images = conv_net(seed), noise(8, seed=seed)
    labels = torch.from_numpy(np.random.RandomState(seed).randint(0, 7, 8))
    victim = Model(net, mean=MEAN, std=STD)
    attacked = run(victim, images, labels, levels=levels)
    assert (attacked.logits[0].argmax(1) != labels).any(), "a label other than the prediction is part of the test"

    reference = PyTorchModel(
        net, bounds=(0, 1), device="cpu", preprocessing={"mean": list(MEAN), "std": list(STD), "axis": -3}
    )
    _, theirs, _ = LinfFastGradientAttack()(
        reference, images.float() / 255, Misclassification(labels), epsilons=[k / 255 for k in levels]
    )

    # Where |gradient| is below a millionth of the image's largest, two float32 programs may differ in sign.
    exact = Model(copy.deepcopy(net).double(), mean=MEAN, std=STD)
    unit = exact.unit(images).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(exact(unit), labels, reduction="sum"), unit)
    clear = gradient.abs() > 1e-6 * gradient.abs().amax((1, 2, 3), keepdim=True)
    assert clear.float().mean() > 0.999

    for level, ours, image in zip(levels, attacked.images[1:], theirs, strict=True):
        torch.testing.assert_close((ours.float() / 255)[clear], image[clear], rtol=0, atol=1e-6)
        beyond = images + level * gradient.sign()
        assert (beyond > 255).any(), "clamping at white is part of the test"
        assert (beyond < 0).any(), "clamping at black is part of the test"


# --------------------------------------------------------------------------------------------- the lattice

PIXELS = arrays.arrays(np.uint8, (3, 4, 5))
SIGNS = arrays.arrays(np.int8, (3, 4, 5), elements=st.integers(-1, 1))
LEVELS = st.integers(0, 255)


def stepped(x: NDArray[np.uint8], s: NDArray[np.int8], k: int) -> NDArray[np.int64]:
    result = step(torch.from_numpy(x), torch.from_numpy(s), k)
    assert result.dtype == torch.uint8
    return result.numpy().astype(np.int64)


# Compiling nothing and touching no file, an example takes well under a millisecond; a busy machine may not.
@settings(deadline=None)
@given(PIXELS, SIGNS, LEVELS)
def test_a_step_stays_on_the_lattice_and_in_the_ball(x: NDArray[np.uint8], s: NDArray[np.int8], k: int) -> None:
    result, before = stepped(x, s, k), x.astype(np.int64)
    np.testing.assert_array_equal(result, np.minimum(np.maximum(before + k * s.astype(np.int64), 0), 255))
    assert (abs(result - before) <= k).all()
    assert ((result >= 0) & (result <= 255)).all()
    np.testing.assert_array_equal(result[s == 0], before[s == 0])
    np.testing.assert_array_equal(stepped(x, s, 0), before)


@settings(deadline=None)
@given(PIXELS, SIGNS, LEVELS, LEVELS)
def test_a_larger_step_goes_at_least_as_far(x: NDArray[np.uint8], s: NDArray[np.int8], k: int, other: int) -> None:
    near, far = stepped(x, s, min(k, other)), stepped(x, s, max(k, other))
    assert ((far - near) * s >= 0).all()


def test_a_step_leaves_its_input_alone() -> None:
    images, sign = noise(1), torch.ones((1, 3, 16, 16), dtype=torch.int8)
    before = images.clone()
    step(images, sign, 255)
    assert torch.equal(images, before)
    assert bool((sign == 1).all())


# --------------------------------------------------------------------------------------- rows and batches


class NanOnWhite(nn.Module):
    """Linear, but an all-white image gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 5, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        logits: Tensor = self.linear(pixels) + 0 / (1 - pixels.mean(1, keepdim=True))
        return logits


@pytest.mark.parametrize("goal", [Goal(), Goal(label="prediction"), Goal(target="random"), Goal(target="least_likely")])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_batch_size_does_not_matter(size: int, goal: Goal) -> None:
    victim, images = random_linear(48), noise(12, side=4)
    labels, draws = torch.arange(12) % 5, torch.arange(12) * 7
    whole = run(victim, images, labels, levels=(1, 8, 64), goal=goal, draws=draws)
    for start in range(0, 12, size):
        rows = slice(start, start + size)
        part = run(victim, images[rows], labels[rows], levels=(1, 8, 64), goal=goal, draws=draws[rows])
        assert torch.equal(pixels(part), pixels(whole)[:, rows])
        assert torch.equal(part.classes, whole.classes[:, rows])
        torch.testing.assert_close(logits_of(part), logits_of(whole)[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", ["black", "white", "noise"])
def test_neighbours_and_masked_rows_do_not_change_a_row(garbage: str) -> None:
    victim, images = Model(NanOnWhite()), noise(6, side=4)
    labels, valid = torch.arange(6) % 5, torch.tensor([True, False, True, True, False, True])
    alone = run(victim, images[valid], labels[valid])
    masked = int((~valid).sum())
    images[~valid] = {
        "black": torch.zeros(masked, 3, 4, 4, dtype=torch.uint8),
        "white": torch.full((masked, 3, 4, 4), 255, dtype=torch.uint8),  # their logits and loss are NaN
        "noise": noise(masked, side=4, seed=9),
    }[garbage]
    labels[~valid] = -1
    together = run(victim, images, labels, valid=valid)
    assert torch.equal(pixels(together)[:, valid], pixels(alone))
    torch.testing.assert_close(logits_of(together)[:, valid], logits_of(alone), rtol=0, atol=1e-12)
    assert torch.equal(together.zero_signs, alone.zero_signs)


def test_zero_signs_are_counted_in_valid_rows_only() -> None:
    # The second pixel has no influence, so each row has one zero sign.
    victim = linear([[1.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    images = torch.randint(0, 256, (5, 1, 1, 3), dtype=torch.uint8)
    assert run(victim, images).zero_signs.tolist() == [0, 5, 5]
    assert run(victim, images, valid=torch.tensor([True, False, True, False, False])).zero_signs.tolist() == [0, 2, 2]
    assert run(victim, images, valid=torch.zeros(5, dtype=torch.bool)).zero_signs.tolist() == [0, 0, 0]


@pytest.mark.parametrize("levels", [(4,), (1, 2, 8, 255)])
def test_what_comes_back_belongs_to_the_stored_pixels(levels: tuple[int, ...]) -> None:
    victim, images = Model(conv_net(0), mean=MEAN, std=STD), noise(4)
    before = images.clone()
    attacked = run(victim, images, levels=levels)
    assert [images.shape for images in attacked.images] == [(4, 3, 16, 16)] * (1 + len(levels))
    assert logits_of(attacked).shape == (1 + len(levels), 4, 7)
    assert torch.equal(attacked.predictions, logits_of(attacked).argmax(-1).unsqueeze(0))
    assert torch.equal(images, before)
    assert torch.equal(attacked.images[0], before)
    for stored, logits in zip(attacked.images, attacked.logits, strict=True):
        torch.testing.assert_close(logits, victim(victim.unit(stored)), rtol=0, atol=1e-6)
    assert not any(logits.requires_grad for logits in attacked.logits)


# ------------------------------------------------------------------------------------------- one gradient


class Counting(nn.Module):
    """A convolution net that notes its forwards (with a gradient or not) and its backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net(0)
        self.forwards: list[bool] = []
        self.backwards = 0

    def _count_backward(self, gradient: Tensor) -> None:
        del gradient
        self.backwards += 1

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        self.forwards.append(logits.requires_grad)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits


def test_one_gradient_serves_every_epsilon() -> None:
    module = Counting()
    victim = Model(module, mean=MEAN, std=STD)
    run(victim, noise(4), levels=(1, 2, 4, 8))
    assert module.forwards == [True, False, False, False, False]
    assert module.backwards == 1
    # Of other images it costs both passes.
    model = AttackedModel(victim, noise(4), targeted=False)
    del module.forwards[:]
    for images in (noise(4, seed=1), noise(4, seed=2)):
        model.gradient(images, torch.zeros(4, dtype=torch.int64))
    assert module.forwards == [True, True]
    assert module.backwards == 3
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in victim.parameters())


def test_the_loss_is_summed() -> None:
    # So sure of itself that the gradient is exp(-98) = 2.7e-43, near the smallest float32: a mean over
    # 1,024 images leaves nothing of it. Pixels come in equal pairs, so that the margin is the same for all.
    victim = linear([[0.0] * 8, [1.0, -1.0] * 4], [98.0, 0.0], dtype=torch.float32)
    images = torch.randint(1, 255, (1024, 1, 1, 4), dtype=torch.uint8).repeat_interleave(2, 3)
    labels = torch.zeros(1024, dtype=torch.int64)

    unit = victim.unit(images).requires_grad_()
    (mean,) = torch.autograd.grad(F.cross_entropy(victim(unit), labels, reduction="mean"), unit)
    assert not mean.any(), "the test needs a mean that underflows"

    attacked = run(victim, images, labels, levels=(1,))
    assert not attacked.zero_signs.any()
    moved = attacked.images[1].to(torch.int16) - images.to(torch.int16)
    assert torch.equal(moved, torch.tensor([1, -1] * 4, dtype=torch.int16).expand(1024, 1, 1, 8))


class HalfInside(nn.Module):
    """Single precision outside, half precision inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.float16):
            logits: Tensor = self.module(images)
        return logits


@pytest.mark.parametrize("half", [nn.Module.float, nn.Module.half, HalfInside, nn.Module.bfloat16])
@pytest.mark.parametrize("goal", [Goal(), Goal(target="random")])
def test_every_precision_keeps_the_gradient_of_a_sure_model(half: Callable[[nn.Module], nn.Module], goal: Goal) -> None:
    # So sure that what is left to other classes, about 1e-9, is 0 in half precision, and lost beside 1 in float32.
    net, images = conv_net(2), noise(8)
    last = net[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        logits = net(images / 255)
        last.weight.mul_(20)
        last.bias.copy_(20 * last.bias - 20 * logits.mean(0) + 20 * torch.eye(7)[3])
        sure = net(images / 255)
    assert (sure.softmax(1)[:, 3] > 1 - 1e-7).all(), "the test needs a model that is sure"
    labels, draws = torch.full((8,), 3), torch.zeros(8, dtype=torch.int64)
    expected, _ = gradient(Model(copy.deepcopy(net).double()), images, labels, goal, draws)
    found, _ = gradient(Model(half(net)), images, labels, goal, draws)
    assert torch.isfinite(found).all()
    assert (found == 0).float().mean() < 0.01
    clear = expected.abs() > 0.1 * expected.abs().amax((1, 2, 3), keepdim=True)
    assert (found.sign() == expected.sign())[clear].float().mean() > 0.99


@pytest.mark.parametrize("goal", [Goal(), Goal(target=2)])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_the_direction_is_the_gradient_of_the_cross_entropy(sharpness: float, goal: Goal) -> None:
    net, images, labels = conv_net(1).double(), noise(16), torch.arange(16) % 7
    victim = Model(nn.Sequential(net, Scaled(sharpness)))
    found, classes = gradient(victim, images, labels, goal, labels)
    unit = victim.unit(images).requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(victim(unit), classes, reduction="sum"), unit)
    clear = expected.abs() > 1e-9 * expected.abs().amax((1, 2, 3), keepdim=True)
    assert clear.float().mean() > 0.999
    assert torch.equal(found.sign()[clear], (expected if goal.target is None else -expected).sign()[clear])


def gradient(victim: Model, images: Tensor, labels: Tensor, goal: Goal, draws: Tensor) -> tuple[Tensor, Tensor]:
    """What an attack is given for the clean images, and the classes whose loss is changed."""
    model = AttackedModel(victim, images, targeted=goal.target is not None)
    classes = goal.classes(model.logits, labels, draws)
    return model.gradient(images, classes), classes


class Scaled(nn.Module):
    """Logits times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits


def test_the_sign_is_the_direction_of_the_attack() -> None:
    victim, images, labels = random_linear(48), noise(3, side=4), torch.tensor([0, 1, 2])
    raised, lowered = run(victim, images, labels), run(victim, images, labels, goal=Goal(target=1))
    (up,), (down,) = raised.directions, lowered.directions
    assert up.dtype == torch.int8
    assert up.shape == images.shape
    assert raised.classes.tolist() == [[0, 1, 2]]
    assert torch.equal(down[1], -up[1]), "lowering a loss is the opposite of raising it"


# -------------------------------------------------------------------------------------- labels and targets


def test_prediction_ignores_the_labels_and_unlabelled_rows_fall_back_to_it() -> None:
    victim, images = random_linear(48), noise(20, side=4)
    predictions = victim(victim.unit(images)).argmax(1)
    labels = (predictions + 1) % 5
    by_prediction = run(victim, images, labels, goal=Goal(label="prediction"))
    assert torch.equal(by_prediction.classes[0], predictions)
    assert torch.equal(pixels(by_prediction), pixels(run(victim, images, predictions)))

    half = torch.where(torch.arange(20) % 2 == 0, labels, -1)
    mixed = run(victim, images, half)
    assert torch.equal(mixed.classes[0], torch.where(half >= 0, labels, predictions))
    assert torch.equal(pixels(mixed)[:, 1::2], pixels(by_prediction)[:, 1::2])
    assert not torch.equal(pixels(mixed)[:, 0::2], pixels(by_prediction)[:, 0::2])


@pytest.mark.parametrize("goal", [Goal(target="least_likely"), Goal(target="random"), Goal(target=3)])
def test_a_target_becomes_more_likely(goal: Goal) -> None:
    victim, images = Model(conv_net(1), mean=MEAN, std=STD), noise(16)
    draws = torch.arange(16) * 31
    attacked = run(victim, images, torch.arange(16) % 7, levels=(1, 2), goal=goal, draws=draws)
    losses = [F.cross_entropy(logits, attacked.classes[0], reduction="none") for logits in attacked.logits]
    assert (losses[1] < losses[0]).all()
    assert (losses[2] < losses[1]).all()


def test_the_plain_attack_raises_the_loss_of_the_label() -> None:
    victim, images, labels = Model(conv_net(1), mean=MEAN, std=STD), noise(16), torch.arange(16) % 7
    attacked = run(victim, images, labels, levels=(1, 2))
    losses = [F.cross_entropy(logits, labels, reduction="none") for logits in attacked.logits]
    assert (losses[1] > losses[0]).all()
    assert (losses[2] > losses[1]).all()


def test_target_classes() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    labels, draws = torch.tensor([2, -1]), torch.tensor([0, 1])
    expected = {"least_likely": [1, 0], "random": [0, 0], 2: [2, 2]}
    for target, classes in expected.items():
        goal = Goal(target=target)  # type: ignore[arg-type]
        assert goal.classes(logits, labels, draws).tolist() == classes


@pytest.mark.parametrize("label", ["dataset", "prediction"])
def test_random_targets_are_any_class_but_the_own(label: Any) -> None:
    count, classes = 6000, 5
    logits = torch.randn(count, classes)
    labels = torch.from_numpy(np.random.RandomState(1).randint(-1, classes, count))
    draws = torch.from_numpy(np.random.RandomState(2).randint(0, 2**31, count))
    goal = Goal(label=label, target="random")
    targets = goal.classes(logits, labels, draws)
    assert torch.equal(targets, goal.classes(logits, labels, draws))

    predictions = logits.argmax(1)
    own = predictions if label == "prediction" else torch.where(labels >= 0, labels, predictions)
    assert bool(((targets >= 0) & (targets < classes) & (targets != own)).all())
    # 300 of each of the 20 pairs are expected; five standard deviations are 85.
    pairs = torch.bincount(own * classes + targets, minlength=classes**2).view(classes, classes)
    expected = pairs.sum(1, keepdim=True) / (classes - 1)
    others = ~torch.eye(classes, dtype=torch.bool)
    assert bool(((pairs - expected).abs() < 5 * expected.sqrt())[others].all())


# ------------------------------------------------------------------------------------------- NaN, infinity


class Logits(nn.Module):
    """Two logits, s(x) and -s(x), of a function of the pixels (N, values)."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        values = self.scale * self.function(images.flatten(1))
        return torch.stack([values, -values], 1)


def nan_on_black(pixels: Tensor) -> Tensor:
    return pixels.sum(1) / pixels.sum(1)


def nan_gradient_on_black(pixels: Tensor) -> Tensor:
    """The distance from black, whose gradient at black is 0/0."""
    return pixels.square().sum(1).sqrt()


def infinite_on_white(pixels: Tensor) -> Tensor:
    return 1 / (1 - pixels.mean(1))


@pytest.mark.parametrize(
    ("function", "bad", "what"),
    [
        (nan_on_black, 0, "logits"),
        (nan_gradient_on_black, 0, "loss gradient"),
        (infinite_on_white, 255, "logits"),
        # Finite as it stands; infinite once the attack has made it white.
        (infinite_on_white, 250, "logits"),
    ],
)
def test_nan_and_infinity_stop_the_run_in_valid_rows_only(
    function: Callable[[Tensor], Tensor], bad: int, what: str
) -> None:
    victim = Model(Logits(function))
    images = torch.full((3, 1, 2, 2), 100, dtype=torch.uint8)
    images[1] = bad
    labels = torch.ones(3, dtype=torch.int64)
    attack, zeros = attacker_of(victim, levels=(4, 5)), torch.zeros_like(labels)
    with pytest.raises(NonFiniteError, match=rf"^The {what} .* net\b"):
        attack(images, labels.unsqueeze(1), zeros, zeros == 0)
    others = attack(images, labels.unsqueeze(1), zeros, torch.tensor([True, False, True]))
    assert torch.isfinite(torch.stack(others.logits)).all()


def test_infinite_logits_are_found_at_the_epsilon_that_makes_them() -> None:
    victim = Model(Logits(infinite_on_white))
    images = torch.full((1, 1, 2, 2), 250, dtype=torch.uint8)
    run(victim, images, torch.ones(1, dtype=torch.int64), levels=(4,))


# --------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "noise_floor", "tolerance"), [("float64", 1e-9, 1e-9), ("float32", 1e-3, 1e-3)])
def test_cuda_attacks_as_the_cpu_does(dtype: str, noise_floor: float, tolerance: float) -> None:
    """Pixels whose |gradient| is above `noise_floor` of the image's largest, and logits of the same pixels."""
    cuda, net, levels = torch.device("cuda"), conv_net(0).to(getattr(torch, dtype)), (1, 8, 64)
    images, labels = noise(32), torch.arange(32) % 7
    host = Model(copy.deepcopy(net), mean=MEAN, std=STD)
    device = Model(net, mean=MEAN, std=STD).to(cuda)

    here = run(host, images, labels, levels=levels)
    # As in a run: by default cuDNN convolves in tf32, with errors near a thousandth.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        there = run(device, images.to(cuda), labels.to(cuda), levels=levels)
    assert there.images[0].device.type == "cuda"

    unit = host.unit(images).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(host(unit), labels, reduction="sum"), unit)
    clear = gradient.abs() > noise_floor * gradient.abs().amax((1, 2, 3), keepdim=True)
    assert clear.float().mean() > 0.95
    for found, expected in zip(there.images, here.images, strict=True):
        assert torch.equal(found.cpu()[clear], expected[clear])
    for stored, logits in zip(there.images, there.logits, strict=True):
        torch.testing.assert_close(logits.cpu(), host(host.unit(stored.cpu())), rtol=tolerance, atol=tolerance)
