"""Compute: the attack as a lane runs it, and what is tried out before a run is fixed.

A rehearsal attacks a few batches of noise: it finds the batch size that fits, and compiles the victim.
"""

import contextlib
import copy
import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.errors import ConfigError, NonFiniteError, PipelineError, first_line
from pipeline.fgsm import Goal, all_finite, attack
from pipeline.lanes import Lanes, chunk_images, to_host
from pipeline.victims import Victim

# Source images from which `compile: auto` compiles. On 2 CPU cores compiling ResNet-20 took 35 s, and saved
# 0.47 ms an image at 32 px: repaid after 75,000. At 224 px so many images take hours, of which the attempt is
# less than 1%. On CUDA the figure is an estimate.
COMPILE_FROM = {"cpu": 75_000, "cuda": 500_000}

# Batches for each lane of a rehearsal, so that their peaks meet as they will in the run.
REHEARSED_BATCHES = 3

logger = logging.getLogger(__name__)


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

    victim: Victim
    goal: Goal
    levels: tuple[int, ...]
    stored: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]]
    evaluators: Mapping[str, Victim] = field(default_factory=dict)

    def __call__(self, images_u8: Tensor, labels: Tensor, draws: Tensor, valid: Tensor) -> Part:
        """Attack a chunk and wait for the outcome.

        Args:
            images_u8: (N, C, H, W) uint8 on the device, as the other tensors.
            labels: (N,) int64 model indices, -1 for unlabelled.
            draws: (N,) int64 random numbers for random targets.
            valid: (N,) bool, the M rows that count.

        Raises:
            NonFiniteError: logits or the loss gradient of a valid row hold NaN or infinity, or an evaluator's logits.
        """
        attacked = attack(
            own_copy(self.victim), images_u8, labels, valid, levels=self.levels, goal=self.goal, draws=draws
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


def evaluate(evaluators: Mapping[str, Victim], images: Sequence[Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
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


def check_evaluators(evaluators: Mapping[str, Victim], finite: Tensor) -> None:
    """Look at what `evaluate` says of its numbers.

    Raises:
        NonFiniteError: an evaluator's logits hold NaN or infinity.
    """
    for name, numbers in zip(evaluators, finite.tolist(), strict=True):
        if not numbers:
            raise NonFiniteError(f"The logits of the evaluator {name} hold NaN or infinity")


# Each lane's copies of victims; they go with its thread.
_own = threading.local()


def own_copy(victim: Victim) -> Victim:
    """A victim that no other lane calls: a copy with the same weights.

    A module may keep something in an attribute during its forward, which another lane must not overwrite. What is
    compiled keeps nothing, and is shared.
    """
    if victim.compiled:
        return victim
    copies: dict[Victim, Victim] = _own.__dict__.setdefault("copies", {})
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


def fit_batch_size(attempt: Callable[[int], None], batch_size: int) -> int:
    """Halve a batch until it fits in the device's memory.

    Args:
        attempt: computes a batch of that many rows; raises torch.OutOfMemoryError.
        batch_size: the size to begin with.

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
    if size < batch_size:
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
