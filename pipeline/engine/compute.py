"""Compute: the attack as a lane runs it, and what is tried out before a run is fixed.

A rehearsal attacks a few batches of noise: it finds the batch size that fits, and compiles the victim. A check looks
at what a model makes of a few images of the source.
"""

import contextlib
import copy
import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.attacks.base import Attack, AttackedModel, Goal, Perturbed, direction_sign
from pipeline.core.errors import ConfigError, NonFiniteError, PipelineError, first_line
from pipeline.core.lanes import Lanes, chunk_images, to_host
from pipeline.core.lattice import step
from pipeline.models.base import Model

# Source images from which `compile: auto` compiles. On 2 CPU cores compiling ResNet-20 took 35 s, and saved
# 0.47 ms an image at 32 px: repaid after 75,000. At 224 px so many images take hours, of which the attempt is
# less than 1%. On CUDA the figure is an estimate.
COMPILE_FROM = {"cpu": 75_000, "cuda": 500_000}

# Batches for each lane of a rehearsal, so that their peaks meet as they will in the run.
REHEARSED_BATCHES = 3

# How far numbers may be apart, as a share of the largest: from call to call, where only the order of sums differs, in
# float32 and in less; and with another number of images in the batch, for which libraries have other code.
LAST_DIGITS, LOW_LAST_DIGITS, OTHER_BATCH = 1e-3, 3e-2, 3e-2
# How far the probabilities of an image may add up to something else than 1: those of bfloat16 are off by this.
SUM_SLACK = 1e-2
# The share of an attack's values that may be others the second time: those whose gradient is next to nothing.
OTHER_VALUES = 1e-2
# The share of values with gradient 0 that is worth a warning.
MANY_ZERO = 0.5
# A finding of chance must be so unlikely of a model that is a quarter of the way from chance to perfect.
UNLIKELY = 0.01

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attacked:
    """A batch at every epsilon, clean first.

    images: 1 + K times (N, C, H, W) uint8; sign: (N, C, H, W) int8, the direction in which they lie, or for an attack
    that is not on a ray, in which the last of them does; logits: (1 + K, N, classes) of exactly those images; classes:
    (N,) int64, whose loss was changed; zero_signs: how many values of valid rows the attack does not move: that
    direction is 0 there or, not on a ray, all images are the clean one; finite_logits and finite_gradient: whether
    those of valid rows are numbers, each a scalar tensor. Nothing here has waited for the device.
    """

    images: tuple[Tensor, ...]
    sign: Tensor
    logits: Tensor
    classes: Tensor
    zero_signs: Tensor
    finite_logits: Tensor
    finite_gradient: Tensor

    def check_finite(self) -> None:
        """Wait for the numbers, and look at them.

        Raises:
            NonFiniteError: logits or the loss gradient of a valid row hold NaN or infinity.
        """
        for finite, what in ((self.finite_logits, "logits"), (self.finite_gradient, "loss gradient")):
            if not bool(finite):
                raise NonFiniteError(f"The victim's {what} hold NaN or infinity")


def attack_images(
    attack: Attack,
    victim: Model,
    images_u8: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    levels: Sequence[int],
    goal: Goal,
    draws: Tensor,
) -> Attacked:
    """Attack one batch at several epsilons: what the attack takes, and a forward pass for each image.

    Args:
        attack: how.
        victim: the model.
        images_u8: (N, C, H, W) uint8.
        labels: (N,) int64 model indices, -1 for unlabelled.
        valid: (N,) bool: rows that count. Others are computed along and never looked at.
        levels: epsilons in grey levels, 1..255.
        goal: which class's loss is raised or lowered.
        draws: (N,) int64 random numbers for random targets, and for attacks that need them.
    """
    model = AttackedModel(victim, images_u8, targeted=goal.target is not None)
    classes = goal.classes(model.logits, labels, draws)
    perturbed = attack.perturb(model, images_u8, classes, levels, draws)
    stored = (images_u8, *perturbed.images)
    logits = torch.stack([model.logits, *(victim.predict(images) for images in perturbed.images)])
    rows = valid.view(-1, 1, 1, 1)
    if perturbed.direction is not None:
        sign = direction_sign(perturbed.direction)
        still = sign == 0
    else:
        last = perturbed.images[-1]
        sign = (last > images_u8).to(torch.int8) - (last < images_u8).to(torch.int8)
        still = torch.stack([images == images_u8 for images in perturbed.images]).all(0)
    return Attacked(
        images=stored,
        sign=sign,
        logits=logits,
        classes=classes,
        zero_signs=(still & rows).sum(),
        finite_logits=all_finite(logits, valid.view(1, -1, 1)),
        finite_gradient=(model.finite | ~valid).all(),
    )


def all_finite(values: Tensor, valid: Tensor) -> Tensor:
    """Whether all values of the valid rows are numbers, a scalar bool."""
    return (torch.isfinite(values) | ~valid).all()


@dataclass(frozen=True)
class Part:
    """The M valid rows of a chunk, attacked, on the CPU.

    pictures: what is stored of them, each (M, C, H, W) uint8; logits: (1 + K, M, classes), clean first;
    classes: (M,) int64, whose loss was changed; zero_signs: values whose gradient is exactly 0; evaluations: (E, 1 + K,
    M) int64, what each evaluator predicts, as its own index.
    """

    pictures: tuple[Tensor, ...]
    logits: Tensor
    classes: Tensor
    zero_signs: int
    evaluations: Tensor


@dataclass(frozen=True)
class Attacker:
    """The attack on chunks of rows; a lane calls it.

    stored: picks what is stored from the 1 + K images and the sign, so that nothing else leaves the device.
    evaluators: models that look at the same images, by their ids.
    """

    attack: Attack
    victim: Model
    goal: Goal
    levels: tuple[int, ...]
    stored: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]]
    evaluators: Mapping[str, Model] = field(default_factory=dict)

    def __call__(self, images_u8: Tensor, labels: Tensor, draws: Tensor, valid: Tensor) -> Part:
        """Attack a chunk and wait for the outcome.

        Args:
            images_u8: (N, C, H, W) uint8 on the device, as the other tensors.
            labels: (N,) int64 model indices, -1 for unlabelled.
            draws: (N,) int64 random numbers, as `attack_images`.
            valid: (N,) bool, the M rows that count.

        Raises:
            NonFiniteError: logits or the loss gradient of a valid row hold NaN or infinity, or an evaluator's logits.
        """
        victim = own_copy(self.victim)
        attacked = attack_images(
            self.attack, victim, images_u8, labels, valid, levels=self.levels, goal=self.goal, draws=draws
        )
        evaluations, finite = evaluate(self.evaluators, attacked.images, valid)
        pictures = self.stored(attacked.images, attacked.sign)
        *copies, logits, classes, evaluations, finite, kept = to_host(
            [*pictures, attacked.logits, attacked.classes, evaluations, finite, valid]
        )
        attacked.check_finite()
        check_evaluators(self.evaluators, finite)
        return Part(
            pictures=tuple(copies) if bool(kept.all()) else tuple(copy[kept] for copy in copies),
            logits=logits[:, kept],
            classes=classes[kept],
            zero_signs=int(attacked.zero_signs),
            evaluations=evaluations[:, :, kept],
        )


def evaluate(evaluators: Mapping[str, Model], images: Sequence[Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
    """What evaluators predict, without waiting for the device.

    Args:
        evaluators: by their ids.
        images: 1 + K times (N, C, H, W) uint8.
        valid: (N,) bool, the rows that count.

    Returns:
        (E, 1 + K, N) int64, and whether each one's logits of the valid rows are numbers, (E,) bool.
    """
    predictions = torch.zeros((len(evaluators), len(images), len(valid)), dtype=torch.int64, device=valid.device)
    finite = torch.ones(len(evaluators), dtype=torch.bool, device=valid.device)
    for index, victim in enumerate(map(own_copy, evaluators.values())):
        for place, pixels in enumerate(images):
            logits = victim.predict(pixels)
            predictions[index, place] = logits.argmax(1)
            finite[index] &= all_finite(logits, valid.view(-1, 1))
    return predictions, finite


def check_evaluators(evaluators: Mapping[str, Model], finite: Tensor) -> None:
    """Look at what `evaluate` says of its numbers.

    Raises:
        NonFiniteError: an evaluator's logits hold NaN or infinity.
    """
    for name, numbers in zip(evaluators, finite.tolist(), strict=True):
        if not numbers:
            raise NonFiniteError(f"The logits of the evaluator {name} hold NaN or infinity")


# Each lane's copies of victims; they go with its thread.
_own = threading.local()


def own_copy(victim: Model) -> Model:
    """A victim that no other lane calls: a copy with the same weights.

    A module may keep something in an attribute during its forward, which another lane must not overwrite. What is
    compiled keeps nothing, and is shared.
    """
    if victim.compiled:
        return victim
    copies: dict[Model, Model] = _own.__dict__.setdefault("copies", {})
    if victim not in copies:
        shared = {id(tensor): tensor for tensor in (*victim.parameters(), *victim.buffers())}
        copies[victim] = copy.deepcopy(victim, shared)
    return copies[victim]


def rehearse(
    attacker: Attacker,
    device: torch.device,
    shape: tuple[int, int, int],
    batch_size: int,
    *,
    lanes: int | None = None,
) -> None:
    """Attack batches of noise in all lanes at once, as the run will, or in a few.

    NaN is no failure here: what noise brings out need not be in the data.

    Raises:
        Exception: whatever the model raises; torch.OutOfMemoryError where the batch is too large.
    """
    zeros = torch.zeros(batch_size, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, *shape), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    with Lanes(device, chunk_images(device, batch_size, shape), lanes) as pool:
        batches = [
            pool.submit(attacker, images, zeros, zeros, valid=zeros == 0) for _ in range(REHEARSED_BATCHES * pool.count)
        ]
        for future in [future for futures in batches for future in futures]:
            with contextlib.suppress(NonFiniteError):
                future.result()


def fit_batch_size(attempt: Callable[[int], None], batch_size: int, *, quiet: bool = False) -> int:
    """Halve a batch until it fits in the device's memory.

    Args:
        attempt: computes a batch of that many rows; raises torch.OutOfMemoryError.
        batch_size: the size to begin with.
        quiet: say nothing of a smaller one.

    Raises:
        ConfigError: not even one image fits.
    """
    size = batch_size
    while not _fits(attempt, size):
        if size == 1:
            raise ConfigError("runtime.batch_size: not even one image fits in the device's memory.")
        # The failed attempt's tensors hang on its traceback, which hangs on itself.
        gc.collect()
        torch.cuda.empty_cache()
        size //= 2
    if size < batch_size and not quiet:
        logger.warning("A batch of %d does not fit in the device's memory; %d does.", batch_size, size)
    return size


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        return False
    return True


def repays(device: torch.device, images: int) -> bool:
    """Whether a run over so many source images is long enough to compile the victim.

    A function of the plan alone, not of a stopwatch: equal configs must stay equal runs.
    """
    return images >= COMPILE_FROM.get(device.type, images + 1)


def compile_victim(attacker: Attacker, device: torch.device, shape: tuple[int, int, int], batch_size: int) -> None:
    """Compile an attacker's victim and evaluators for batches of one size, and run them once to see that it works.

    Those that are compiled already are left alone.

    Raises:
        PipelineError: torch.compile fails, for want of a compiler or for a model's code; all then run as they are.
        torch.OutOfMemoryError: the batch is too large.
    """
    models = (attacker.victim, *attacker.evaluators.values())
    if all(model.compiled for model in models):
        return
    started = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(model.compiling())
            # In one lane: two that meet new code at once both compile it.
            rehearse(attacker, device, shape, batch_size, lanes=1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in their own ways
        raise PipelineError(
            f"torch.compile fails on this victim: {type(error).__name__}: {first_line(error)}"
        ) from error
    logger.info("Compiled the victim in %.1f s.", time.perf_counter() - started)


# --------------------------------------------------------------------------------------- a look at the model


def check_model(model: Model, images_u8: Tensor, labels: Tensor, goal: Goal | None, size: int) -> list[str]:
    """Look once at what a model makes of images of the source, before a run writes anything.

    Logits and gradients that are not numbers are left to the run, which finds them in every batch and names it.

    Args:
        model: a victim or an evaluator.
        images_u8: (N, C, H, W) uint8 on the model's device, N at least 1.
        labels: (N,) int64 model indices on the same device, -1 for unlabelled.
        goal: of the attack; None for a model that is not attacked.
        size: how many images are computed at once; where the run computes each alone, 1.

    Returns:
        What should be known, a sentence for each finding.

    Raises:
        ConfigError: the dataset would not be what it says that it is.
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
                "value), so clean and attacked images could not be compared; mend the model."
            )
        found += _check_gradient(one[1])
    return found + _check_accuracy(logits, labels)


def check_attack(attacker: Attacker, images_u8: Tensor, labels: Tensor) -> None:
    """Look once at what an attack makes of images of the source: whether it keeps what it promises.

    Args:
        attacker: the attack, the victim, the goal and the epsilons.
        images_u8: (N, C, H, W) uint8 on the victim's device.
        labels: (N,) int64 model indices on the same device, -1 for unlabelled.

    Raises:
        ConfigError: its images are none, leave the ball of their epsilon, do not lie along its direction, or are others
            the second time.
        torch.OutOfMemoryError: so many images do not fit.
    """
    draws, before = torch.arange(len(images_u8), device=images_u8.device), images_u8.clone()

    def perturb() -> Perturbed:
        model = AttackedModel(attacker.victim, images_u8, targeted=attacker.goal.target is not None)
        classes = attacker.goal.classes(model.logits, labels, draws)
        try:
            return attacker.attack.perturb(model, images_u8, classes, attacker.levels, draws)
        except (torch.OutOfMemoryError, PipelineError):
            raise
        except Exception as error:  # the attack may be the user's code
            raise ConfigError(f"attack.kind: it fails: {type(error).__name__}: {first_line(error)}") from error

    one, other = perturb(), perturb()
    if not torch.equal(before, images_u8):
        raise ConfigError("attack.kind: it changes the images that it is given; make new ones in their place.")
    for perturbed in (one, other):
        _check_perturbed(perturbed, attacker, images_u8)
    moved = max(float((a != b).double().mean()) for a, b in zip(one.images, other.images, strict=True))
    if moved > OTHER_VALUES:
        raise ConfigError(
            f"attack.kind: it is not deterministic: {moved:.1%} of the values of its images are others the second "
            "time; draw random numbers from `draws`, with needs_draws = True."
        )


def _check_perturbed(perturbed: Perturbed, attacker: Attacker, images_u8: Tensor) -> None:
    """Whether the images of an attack are such, and lie where it says."""
    shapes = [(tuple(images.shape), images.dtype) for images in perturbed.images]
    if shapes != [(tuple(images_u8.shape), torch.uint8)] * len(attacker.levels):
        raise ConfigError(
            f"attack.kind: it must return {len(attacker.levels)} times images of shape {tuple(images_u8.shape)} and "
            "type uint8, one for each epsilon."
        )
    if attacker.attack.on_ray != (perturbed.direction is not None):
        raise ConfigError("attack.kind: with on_ray = True it must return a direction, and without it none.")
    for level, images in zip(attacker.levels, perturbed.images, strict=True):
        farthest = int((images.to(torch.int16) - images_u8.to(torch.int16)).abs().amax())
        if farthest > level:
            raise ConfigError(
                f"attack.kind: its images at {level}/255 are up to {farthest} grey levels from the clean ones."
            )
        if perturbed.direction is not None and not torch.equal(
            step(images_u8, direction_sign(perturbed.direction), level), images
        ):
            raise ConfigError(
                f"attack.kind: its images at {level}/255 do not lie along the sign of its direction; make them with "
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
    try:
        logits = model.predict(images_u8)
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:  # the model is the user's code
        raise ConfigError(
            f"model: it takes one black image, and fails on {count} images of the source: {first_line(error)}"
        ) from error
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
    """What a model says of an image is to depend on that image alone.

    It is asked about half of them, and with black and white ones in place of the others.
    """
    some = images_u8[: (len(images_u8) + 1) // 2]
    others = torch.zeros_like(some)
    others[1::2] = 255
    batches = (some, torch.cat([some, others]))
    moved = max(_moved(logits[: len(some)], _logits(model, batch)[: len(some)]) for batch in batches)
    if moved > OTHER_BATCH:
        raise ConfigError(
            f"model: its logits for an image change with the other images of the batch (by {moved:.2g} of the largest "
            "value), as from batch norm without running statistics; mend the model, or set runtime.batch_size=1."
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
