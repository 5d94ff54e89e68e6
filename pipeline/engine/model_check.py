"""Model check: a look at what models and attacks make of images of the source, before a run writes anything."""

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.attacks.base import Goal, Perturbed, direction_sign
from pipeline.core.errors import ConfigError
from pipeline.core.lattice import distance, step
from pipeline.core.own_code import source_file
from pipeline.engine.compute import ModelAttack
from pipeline.models.attacked import AttackedModel
from pipeline.models.base import Model
from pipeline.output.manifest import MANY_ZERO

# How far numbers may be apart, as a share of the largest: from call to call, where only the order of sums differs, in
# float32 and in less; and with another number of images in the batch, for which libraries have other code.
LAST_DIGITS, LOW_LAST_DIGITS, OTHER_BATCH = 1e-3, 3e-2, 3e-2
# How far the probabilities of an image may add up to something else than 1: those of bfloat16 are off by this.
SUM_SLACK = 1e-2
# The share of an attack's values that may be others the second time: those whose gradient is next to nothing.
OTHER_VALUES = 1e-2
# A finding of chance must be so unlikely of a model that is a quarter of the way from chance to perfect.
UNLIKELY = 0.01


def check_model(model: Model, images_u8: Tensor, labels: Tensor, goal: Goal | None, size: int) -> list[str]:
    """Look once at what a model makes of images of the source, before a run writes anything.

    Logits and gradients that are not numbers are left to the run, which finds them in every batch and names it.

    Args:
        model: that is attacked, or that looks.
        images_u8: (N, C, H, W) uint8 on the model's device, N at least 1.
        labels: (N,) int64 model indices on the same device, -1 for unlabelled.
        goal: of the attack; None for a model that is not attacked.
        size: how many images are computed at once; where the run computes each alone, 1.

    Returns:
        What should be known, a sentence for each finding.

    Raises:
        ConfigError: the dataset would not be what it says that it is.
        CodeError: the model raises something.
        torch.OutOfMemoryError: so many images do not fit.
    """
    logits = torch.cat([_logits(model, chunk) for chunk in images_u8.split(size)])
    found = _check_range(logits)
    chunk, first = images_u8[:size], logits[:size]
    pairs = {"logits": [(first, model.predict(chunk))]}
    if goal is not None:
        one, other = (_attacked_as(goal, model, chunk, labels[:size]) for _ in range(2))
        pairs |= {"logits": [*pairs["logits"], (one[0], other[0])], "gradient": [(one[1], other[1])]}
    found += _check_repeated(model, pairs)
    if size > 1:
        _check_neighbours(model, chunk, first)
    if goal is not None:
        moved = _moved(first, one[0])
        if moved > OTHER_BATCH:
            raise ConfigError(
                f"model: its logits without a gradient differ from those with one (by {moved:.2g} of the largest "
                "value), so clean and attacked images could not be compared; fix the model."
            )
        found += _check_gradient(one[1])
    return found + _check_accuracy(logits, labels)


def check_attack(attack: ModelAttack, model: Model, images_u8: Tensor, labels: Tensor) -> None:
    """Look once at what an attack makes of images of the source: whether it keeps what it promises.

    Args:
        attack, model: the attack with its goal and its epsilons, on this model.
        images_u8: (N, C, H, W) uint8 on the model's device.
        labels: (N,) int64 model indices on the same device, -1 for unlabelled.

    Raises:
        ConfigError: what it returns is no `Perturbed` of such images, leaves the ball of their epsilon, does not lie
            along its direction, is another the second time or among other rows, or follows from random numbers that
            are not the rows' own.
        CodeError: the attack raises something.
        torch.OutOfMemoryError: so many images do not fit.
    """
    key = f"{attack.key}.kind: {source_file(type(attack.attack))}"
    draws = torch.arange(len(images_u8), device=images_u8.device)
    before = _random_state(images_u8.device)
    model.predict(images_u8)
    state = _random_state(images_u8.device)
    some = (len(images_u8) + 1) // 2
    # The second time with other rows beside them, black and white ones in turn.
    beside = images_u8.clone()
    beside[some::2], beside[some + 1 :: 2] = 0, 255
    one, other = (_perturb(attack, model, images, labels, draws) for images in (images_u8, beside))
    mixed = _other_values(one, other, some)
    if mixed > OTHER_VALUES:
        moved = _other_values(one, _perturb(attack, model, images_u8, labels, draws))
        if moved > OTHER_VALUES:
            raise ConfigError(
                f"{key} is not deterministic: {moved:.1%} of the values of its images differ the second time; draw "
                "random numbers from `draws`, with needs_draws = True."
            )
    # A model may draw numbers that change nothing in what it says.
    if before == state != _random_state(images_u8.device):
        raise ConfigError(
            f"{key} draws or seeds the random numbers of the whole process, as torch.rand and torch.manual_seed do, so "
            "an image would depend on the others of its batch; make random numbers "
            "from `draws`, with needs_draws = True."
        )
    if mixed > OTHER_VALUES:
        raise ConfigError(
            f"{key} makes different images of a row when the batch holds other rows ({mixed:.1%} of the values); do "
            "not mix rows, as a mean over the batch does."
        )


def _perturb(attack: ModelAttack, model: Model, images_u8: Tensor, labels: Tensor, draws: Tensor) -> Perturbed:
    """What an attack returns, which has the form that it must have."""
    key, file = f"{attack.key}.kind", source_file(type(attack.attack))
    attacked = AttackedModel(model, images_u8, targeted=attack.goal.target is not None)
    classes = attack.goal.classes(attacked.logits, labels, draws) if attack.asks_model else labels
    given = {"images": images_u8, "classes": classes, "draws": draws, "logits": attacked.logits}
    before = {name: values.clone() for name, values in given.items()}
    perturbed = attack.perturb(attacked, images_u8, classes, draws)
    for name, values in given.items():
        if not torch.equal(before[name].nan_to_num(), values.nan_to_num()):
            raise ConfigError(f"{key}: {file} changes the {name} that it is given; make new ones in their place.")
    if not isinstance(perturbed, Perturbed):
        raise ConfigError(
            f"{key}: perturb in {file} returns {type(perturbed).__name__}; return Perturbed(images), or "
            "Perturbed.along(images, direction, levels)."
        )
    _check_perturbed(perturbed, attack, images_u8, attacked.finite)
    return perturbed


def _other_values(these: Perturbed, those: Perturbed, rows: int | None = None) -> float:
    """The largest share of values, at any epsilon, that are not the same in the first rows of both."""
    pairs = zip(these.images, those.images, strict=True)
    return max(float((one[:rows] != other[:rows]).double().mean()) for one, other in pairs)


def _random_state(device: torch.device) -> list[str]:
    """The state of every generator that the process shares, in a form that can be compared."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [*(str(state.tolist()) for state in states), str(random.getstate()), str(np.random.get_state(legacy=False))]


def _check_perturbed(perturbed: Perturbed, attack: ModelAttack, images_u8: Tensor, sound: Tensor) -> None:
    """Whether the images of an attack are such, and lie where it says.

    Of rows that are not `sound`, (N,) bool, the model's own gradient is no number: the run finds that and names them.
    """
    key, levels = f"{attack.key}.kind: {source_file(type(attack.attack))}", attack.levels
    tensors = [images for images in perturbed.images if isinstance(images, Tensor)]
    shapes = [(tuple(images.shape), images.dtype) for images in tensors]
    if shapes != [(tuple(images_u8.shape), torch.uint8)] * len(levels) or len(perturbed.images) != len(levels):
        returned = [f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in shapes]
        raise ConfigError(
            f"{key} must return {len(levels)} times images of shape {tuple(images_u8.shape)} and type uint8, one for "
            f"each epsilon; it returns {', '.join(returned) or 'none'}."
        )
    if attack.attack.on_ray != (perturbed.direction is not None):
        does = "returns no direction; use Perturbed.along" if attack.attack.on_ray else "returns a direction"
        raise ConfigError(f"{key} says on_ray = {attack.attack.on_ray}, and {does}, or set on_ray the other way.")
    if perturbed.direction is not None:
        if perturbed.direction.shape != images_u8.shape:
            raise ConfigError(
                f"{key} returns a direction of shape {tuple(perturbed.direction.shape)}; its images have "
                f"{tuple(images_u8.shape)}, and so must it."
            )
        if not bool(torch.isfinite(perturbed.direction[sound]).all()):
            raise ConfigError(f"{key} returns a direction that holds NaN or infinity; see what it divides by.")
    for level, images in zip(levels, perturbed.images, strict=True):
        farthest = int(distance(images, images_u8).amax())
        if farthest > level:
            raise ConfigError(
                f"{key} makes images at {level}/255 that are up to {farthest} grey levels from the clean ones; clamp "
                "them to clean - level and clean + level."
            )
        if perturbed.direction is not None and not torch.equal(
            step(images_u8, direction_sign(perturbed.direction), level), images
        ):
            raise ConfigError(
                f"{key} makes images at {level}/255 that do not lie along the sign of its direction; make them with "
                "Perturbed.along, or set on_ray = False."
            )


def _attacked_as(goal: Goal, model: Model, images_u8: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and gradient as an attack of that goal meets them."""
    attacked = AttackedModel(model, images_u8, targeted=goal.target is not None)
    classes = goal.classes(attacked.logits, labels, torch.zeros_like(labels))
    return attacked.logits, attacked.gradient(images_u8, classes)


def _logits(model: Model, images_u8: Tensor) -> Tensor:
    """(N, classes), of more images than the one that classes were counted with."""
    count = len(images_u8)
    logits = model.predict(images_u8)
    if logits.ndim != 2 or len(logits) != count:
        raise ConfigError(
            f"model: for {count} images it returned a tensor of shape {tuple(logits.shape)}; logits (images, classes) "
            "are needed."
        )
    return logits


def _check_range(logits: Tensor) -> list[str]:
    """Whether they are logits and not what a softmax or a sigmoid made of them."""
    if not bool(((logits >= 0) & (logits <= 1)).all()):
        return []
    if bool(((logits.sum(1) - 1).abs() < SUM_SLACK).all()):
        raise ConfigError(
            "model: it returns probabilities (in [0, 1], and for each image their sum is 1), and logits are needed; "
            "leave out its softmax."
        )
    return ["model: all that it returns lies in [0, 1]; if that is a sigmoid's output, leave the sigmoid out"]


def _moved(before: Tensor, after: Tensor) -> float:
    """The largest difference as a share of the largest value; what is not a number counts as 0."""
    before, after = (values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for values in (before, after))
    largest = before.abs().amax().clamp(min=torch.finfo(before.dtype).tiny)
    return float((after - before).abs().amax() / largest)


def _check_repeated(model: Model, pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> list[str]:
    """Compare what a model gave the first time and the second, by what it is."""
    low = model.bf16 or model.mean.dtype in (torch.float16, torch.bfloat16)
    for what, answers in pairs.items():
        moved = max(_moved(*answer) for answer in answers)
        if moved > (LOW_LAST_DIGITS if low else LAST_DIGITS):
            raise ConfigError(
                f"model: it is not deterministic: the same images gave other values of its {what} the second time "
                f"({moved:.2g} of the largest value away), so what is recorded of them could not be found again; "
                "switch off what draws random numbers (dropout, noise) or remembers earlier calls."
            )
        if moved:
            return [
                f"model: the last digits of its {what} differ from call to call (by {moved:.1g} of the largest value), "
                "and so may a run that is resumed or verified"
            ]
    return []


def _check_neighbours(model: Model, images_u8: Tensor, logits: Tensor) -> None:
    """What a model says of an image is to depend on that image alone."""
    # It is asked about half of them, and with black and white ones in place of the others.
    some = images_u8[: (len(images_u8) + 1) // 2]
    others = torch.zeros_like(some)
    others[1::2] = 255
    batches = (some, torch.cat([some, others]))
    moved = max(_moved(logits[: len(some)], _logits(model, batch)[: len(some)]) for batch in batches)
    if moved > OTHER_BATCH:
        raise ConfigError(
            f"model: its logits for an image change with the other images of the batch (by {moved:.2g} of the largest "
            "value), as from batch norm without running statistics; fix the model, or set runtime.batch_size=1."
        )


def _check_gradient(gradient: Tensor) -> list[str]:
    """Whether the attack has something to follow."""
    numbers = gradient[torch.isfinite(gradient).flatten(1).all(1)]
    share = float((numbers == 0).double().mean()) if len(numbers) else 0.0
    if share == 1:
        raise ConfigError(
            f"model: the gradient of the loss is 0 in every pixel of the {len(numbers)} images looked at, so the "
            "attack would change nothing; its output may be rounded or constant, or so sure that its softmax is 0 or 1."
        )
    if share <= MANY_ZERO:
        return []
    return [
        f"model: the gradient of the loss is 0 on {share:.1%} of the pixel values of the {len(numbers)} images looked "
        "at, which the attack does not move"
    ]


def _check_accuracy(logits: Tensor, labels: Tensor) -> list[str]:
    """Whether a model does better than chance, where labels of several classes tell."""
    known = (labels >= 0) & torch.isfinite(logits).all(1)
    labels, predictions = labels[known], logits[known].argmax(1)
    if len(labels.unique()) < 2:
        return []
    count, right = len(labels), int((predictions == labels).sum())
    # The same predictions, dealt out to these images at random.
    shares = [values.bincount(minlength=logits.shape[1]) / count for values in (predictions, labels)]
    chance = float((shares[0] * shares[1]).sum())
    clearly_above = 1 - _at_most(right - 1, count, chance) < UNLIKELY
    if clearly_above or _at_most(right, count, chance + (1 - chance) / 4) > UNLIKELY:
        return []
    return [
        f"model: accuracy {right / count:.0%} on {count} images of the source, where chance gives {chance:.0%}; check "
        "its weights, mean and std, and the order of its classes"
    ]


def _at_most(successes: int, tries: int, chance: float) -> float:
    """The probability of no more successes than that, of the binomial distribution."""
    return sum(
        math.comb(tries, count) * chance**count * (1 - chance) ** (tries - count) for count in range(successes + 1)
    )
