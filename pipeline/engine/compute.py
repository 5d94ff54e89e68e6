"""Compute: the attacks as a lane runs them, and what is tried out before a run is fixed.

A rehearsal attacks a few batches of noise: it finds the batch size that fits, and compiles the models.
"""

import contextlib
import copy
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.attacks.base import Attack, Goal, Perturbed, direction_sign
from pipeline.core.errors import CodeError, ConfigError, NonFiniteError, PipelineError, first_line
from pipeline.core.lanes import Lanes, chunk_images, to_host
from pipeline.core.lattice import distance, sign_towards
from pipeline.core.own_code import naming_failure, source_file
from pipeline.models.attacked import AttackedModel, finite_rows
from pipeline.models.base import Model

# Source images from which `compile: auto` compiles. On 2 CPU cores compiling ResNet-20 took 35 s, and saved
# 0.47 ms an image at 32 px: repaid after 75,000. At 224 px so many images take hours, of which the attempt is
# less than 1%. On CUDA the figure is an estimate.
COMPILE_FROM = {"cpu": 75_000, "cuda": 500_000}

# Batches for each lane of a rehearsal, so that their peaks meet as they will in the run.
REHEARSED_BATCHES = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelAttack:
    """One attack on one model, as a run has it.

    attack: how. key: of the attack's section in the config, for messages. model: the id of the model whose gradient it
    follows or, of an attack that asks no model, that looks at its images. asks_model: which of the two. levels:
    epsilons in grey levels, rising, each in 1..255. goal: which class's loss is raised or lowered.
    """

    attack: Attack
    key: str
    model: str
    asks_model: bool
    levels: tuple[int, ...]
    goal: Goal

    def perturb(self, model: AttackedModel, images_u8: Tensor, classes: Tensor, draws: Tensor) -> Perturbed:
        """Attack a batch; see `Attack.perturb`. An attack that does not say it needs random numbers is given none.

        Raises:
            CodeError: the attack, or the model that it asks, raises something.
        """
        given: Any = draws if self.attack.needs_draws else None
        with naming_failure(f"{self.key}.kind", [source_file(type(self.attack))]):
            return self.attack.perturb(model, images_u8, classes, self.levels, given)


@dataclass(frozen=True)
class Attacked:
    """A batch in V variants, clean first; of A attacks, each on one model.

    images: V times (N, C, H, W) uint8. directions: A times (N, C, H, W) int8, the direction in which the images of an
    attack lie, or where they lie on no ray, in which the last of them does. logits: V times (N, classes), of exactly
    those images, by the row's own model. predictions: (E, V, N) int64, of every model. classes: (A, N) int64, the
    model's class whose loss was changed. zero_signs: (V,) int64, how many values of valid rows the attack does not
    move: that direction is 0 there or, on no ray, the image is the clean one. finite_logits: (E,) bool, and
    finite_gradient: (A,) bool, of the gradients and of the direction: whether those of valid rows are numbers.
    in_ball: (A,) bool: whether no value of a valid row is further than its level from the clean one. Nothing here has
    waited for the device.
    """

    images: tuple[Tensor, ...]
    directions: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    predictions: Tensor
    classes: Tensor
    zero_signs: Tensor
    finite_logits: Tensor
    finite_gradient: Tensor
    in_ball: Tensor


def attack_images(
    models: Mapping[str, Model],
    attacks: Sequence[ModelAttack],
    images_u8: Tensor,
    labels: Tensor,
    valid: Tensor,
    draws: Tensor,
) -> Attacked:
    """Attack one batch: what the attacks take, and a forward pass of every model for each image.

    Args:
        models: E of them by their ids; the first looks at the clean images.
        attacks: A of them, in the order of the variants.
        images_u8: (N, C, H, W) uint8.
        labels: (N, E) int64, of each model its own index; -1 for unlabelled.
        valid: (N,) bool: rows that count. Others are computed along and never looked at.
        draws: (N,) int64 random numbers for random targets, and for attacks that need them.
    """
    order = list(models)
    ignored = ~valid.view(-1, 1)
    images, own, directions, classes, zero_signs = [images_u8], [order[0]], [], [], []
    finite, in_ball = [], []
    # Attacks with one goal on one model share its forward pass of the clean images, and their gradient.
    attacked: dict[tuple[str, Goal, bool], tuple[AttackedModel, Tensor]] = {}
    for each in attacks:
        key = each.model, each.goal, each.asks_model
        if key not in attacked:
            model = AttackedModel(models[each.model], images_u8, targeted=each.goal.target is not None)
            wanted = labels[:, order.index(each.model)]
            attacked[key] = model, each.goal.classes(model.logits, wanted, draws) if each.asks_model else wanted
        model, own_classes = attacked[key]
        perturbed = each.perturb(model, images_u8, own_classes, draws)
        images += perturbed.images
        own += [each.model] * len(each.levels)
        classes.append(own_classes)
        finite.append((model.finite | ~valid).all())
        moved = [distance(image, images_u8) for image in perturbed.images]
        inside = [(far.amax((1, 2, 3)) <= k) | ~valid for far, k in zip(moved, each.levels, strict=True)]
        in_ball.append(torch.stack(inside).all())
        if perturbed.direction is not None:
            finite[-1] &= (finite_rows(perturbed.direction) | ~valid).all()
            directions.append(direction_sign(perturbed.direction))
            zero_signs += [count_zeros(directions[-1].abs(), valid)] * len(each.levels)
        else:
            directions.append(sign_towards(images_u8, perturbed.images[-1]))
            zero_signs += [count_zeros(far.clamp(max=1), valid) for far in moved]
    clean = {name: model.logits for (name, *_), (model, _) in reversed(attacked.items()) if model.went_forward}
    logits: dict[int, Tensor] = {}
    predictions, finite_logits = [], []
    for name, answers in look(models, images, clean):
        finite_logits.append(torch.stack([(torch.isfinite(values) | ignored).all() for values in answers]).all())
        predictions.append(torch.stack([values.argmax(1) for values in answers]))
        logits |= {index: values for index, values in enumerate(answers) if own[index] == name}
    return Attacked(
        images=tuple(images),
        directions=tuple(directions),
        logits=tuple(logits[index] for index in range(len(images))),
        predictions=torch.stack(predictions),
        classes=torch.stack(classes),
        zero_signs=torch.stack([torch.zeros_like(zero_signs[0]), *zero_signs]),
        finite_logits=torch.stack(finite_logits),
        finite_gradient=torch.stack(finite),
        in_ball=torch.stack(in_ball),
    )


def look(
    models: Mapping[str, Model], images: Sequence[Tensor], clean: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the id of each model, and its logits of V times (N, C, H, W) uint8 images, clean first.

    `clean` are the logits of the clean images, of models that were asked for their gradient.
    """
    for name, model in models.items():
        yield name, [clean[name] if name in clean else model.predict(images[0]), *map(model.predict, images[1:])]


def count_zeros(values: Tensor, valid: Tensor) -> Tensor:
    """How many values of valid rows are 0, a scalar int64. Values are 0 or 1, (N, C, H, W), of 8 bits."""
    # To add them up takes a seventh of what comparing each with 0 does.
    return ((values[0].numel() - values.sum((1, 2, 3))) * valid).sum()


@dataclass(frozen=True)
class Part:
    """The M valid rows of a chunk, attacked, on the CPU.

    pictures: what is stored of them, each (M, C, H, W) uint8. predictions: (E, V, M) int64, each model's own indices.
    The others are as in `Attacked`, of M rows.
    """

    pictures: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    predictions: Tensor
    classes: Tensor
    zero_signs: Tensor


@dataclass(frozen=True)
class Attacker:
    """All attacks of a run on chunks of rows; a lane calls it.

    models: by their ids. attacks: in the order of the variants. stored: picks what is stored from the V images and the
    A directions, so that nothing else leaves the device.
    """

    models: Mapping[str, Model]
    attacks: tuple[ModelAttack, ...]
    stored: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]

    def __call__(self, images_u8: Tensor, labels: Tensor, draws: Tensor, valid: Tensor) -> Part:
        """Attack a chunk and wait for the outcome.

        Args:
            images_u8, labels, draws, valid: as `attack_images`, on the device; M rows are valid.

        Raises:
            CodeError: a model or an attack raises something.
            NonFiniteError: logits or a loss gradient of a valid row hold NaN or infinity.
            PipelineError: an attack made an image outside the ball of its epsilon.
        """
        models = {name: own_copy(model) for name, model in self.models.items()}
        attacked = attack_images(models, self.attacks, images_u8, labels, valid, draws)
        pictures = self.stored(attacked.images, attacked.directions)
        small = [attacked.predictions, attacked.classes, attacked.zero_signs]
        checks = [attacked.finite_logits, attacked.finite_gradient, attacked.in_ball, valid]
        copies = to_host([*pictures, *attacked.logits, *small, *checks])
        *copies, predictions, classes, zero_signs, finite_logits, finite_gradient, in_ball, kept = copies
        self._check(finite_logits, finite_gradient, in_ball)
        stored, logits = copies[: len(pictures)], copies[len(pictures) :]
        if not bool(kept.all()):
            stored, logits = ([copy[kept] for copy in copies] for copies in (stored, logits))
        return Part(tuple(stored), tuple(logits), predictions[:, :, kept], classes[:, kept], zero_signs)

    def _check(self, logits: Tensor, gradient: Tensor, in_ball: Tensor) -> None:
        for name, finite in zip(self.models, logits.tolist(), strict=True):
            if not finite:
                raise NonFiniteError(f"The logits of the model {name} hold NaN or infinity")
        for each, finite, inside in zip(self.attacks, gradient.tolist(), in_ball.tolist(), strict=True):
            if not finite:
                raise NonFiniteError(
                    f"The loss gradient of the model {each.model}, as {each.key} follows it, holds NaN or infinity"
                )
            if not inside:
                raise PipelineError(
                    f"{each.key}.kind: {source_file(type(each.attack))} made images that are further from the clean "
                    "ones than their epsilon; clamp them to clean - level and clean + level."
                )


# Each lane's copies of models; they go with its thread.
_own = threading.local()


def own_copy(model: Model) -> Model:
    """A model that no other lane calls: a copy with the same weights.

    A module may keep something in an attribute during its forward, which another lane must not overwrite. What is
    compiled keeps nothing, and is shared.
    """
    if model.compiled:
        return model
    copies: dict[Model, Model] = _own.__dict__.setdefault("copies", {})
    if model not in copies:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        copies[model] = copy.deepcopy(model, shared)
    return copies[model]


def rehearse(
    attacker: Attacker,
    device: torch.device,
    shape: tuple[int, int, int],
    batch_size: int,
    *,
    lanes: int | None = None,
) -> None:
    """Attack batches of noise in all lanes at once, as the run will, or in a few.

    What the attacker refuses, such as NaN, is no failure here: what noise brings out need not be in the data.

    Raises:
        CodeError: a model or an attack raises something.
        torch.OutOfMemoryError: the batch is too large.
    """
    zeros = torch.zeros(batch_size, dtype=torch.int64)
    labels = torch.zeros((batch_size, len(attacker.models)), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, *shape), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    with Lanes(device, chunk_images(device, batch_size, shape), lanes) as pool:
        batches = [
            pool.submit(attacker, images, labels, zeros, valid=zeros == 0)
            for _ in range(REHEARSED_BATCHES * pool.count)
        ]
        for future in [future for futures in batches for future in futures]:
            try:
                future.result()
            except CodeError:
                raise
            except PipelineError:
                pass


def fit_batch_size(attempt: Callable[[int], None], batch_size: int, *, quiet: bool = False) -> int:
    """Halve a batch until it fits in the device's memory; returns how many rows do.

    Args:
        attempt: computes a batch of so many rows; raises torch.OutOfMemoryError where they do not fit.
        batch_size: rows to begin with.
        quiet: do not warn of a smaller batch.

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
        logger.warning(
            "runtime.batch_size: a batch of %d does not fit in the device's memory; %d does.", batch_size, size
        )
    return size


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        return False
    return True


def worth_compiling(device: torch.device, images: int) -> bool:
    """Whether a run over so many source images is long enough to compile the models.

    A function of the plan alone, not of a stopwatch: equal configs must stay equal runs.
    """
    return images >= COMPILE_FROM.get(device.type, images + 1)


def compile_models(attacker: Attacker, device: torch.device, shape: tuple[int, int, int], batch_size: int) -> None:
    """Compile an attacker's models for batches of one size, and run them once to see that it works.

    Those that are compiled already are left alone.

    Raises:
        PipelineError: torch.compile fails, for want of a compiler or for a model's code; all then run as they are.
        torch.OutOfMemoryError: the batch is too large.
    """
    models = tuple(attacker.models.values())
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
        cause = error.__cause__ if isinstance(error, CodeError) and error.__cause__ else error
        raise PipelineError(
            f"torch.compile fails on the models: {type(cause).__name__}: {first_line(cause)}"
        ) from error
    logger.info("Compiled the models in %.1f s.", time.perf_counter() - started)
