"""Compute: the attack as a lane runs it, and what is tried out before a run is fixed.

A rehearsal attacks a few batches of noise: it finds the batch size that fits, and compiles the victim.
"""

import contextlib
import copy
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ConfigError, NonFiniteError, PipelineError, first_line
from pipeline.fgsm import Goal, attack
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
    classes: (M,) int64, whose loss was changed; zero_signs: values whose gradient is exactly 0.
    """

    pictures: tuple[Tensor, ...]
    logits: Tensor
    classes: Tensor
    zero_signs: int


@dataclass(frozen=True)
class Attacker:
    """The attack on chunks of rows; a lane calls it.

    stored: picks what is stored from the 1 + K images and the sign, so that nothing else leaves the device.
    """

    victim: Victim
    goal: Goal
    levels: tuple[int, ...]
    stored: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]]

    def __call__(self, images_u8: Tensor, labels: Tensor, draws: Tensor, valid: Tensor) -> Part:
        """Attack a chunk and wait for the outcome.

        Args:
            images_u8: (N, C, H, W) uint8 on the device, as the other tensors.
            labels: (N,) int64 model indices, -1 for unlabelled.
            draws: (N,) int64 random numbers for random targets.
            valid: (N,) bool, the M rows that count.

        Raises:
            NonFiniteError: logits or the loss gradient of a valid row hold NaN or infinity.
        """
        attacked = attack(
            own_copy(self.victim), images_u8, labels, valid, levels=self.levels, goal=self.goal, draws=draws
        )
        pictures = self.stored(attacked.images, attacked.sign)
        *copies, logits, classes, kept = to_host([*pictures, attacked.logits, attacked.classes, valid])
        attacked.check_finite()
        return Part(
            pictures=tuple(copies) if bool(kept.all()) else tuple(copy[kept] for copy in copies),
            logits=logits[:, kept],
            classes=classes[kept],
            zero_signs=int(attacked.zero_signs),
        )


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
    """Compile an attacker's victim for batches of one size, and run it once to see that it works.

    A victim that is compiled already is left alone.

    Raises:
        PipelineError: torch.compile fails, for want of a compiler or for the model's code; the victim then
            runs as it is.
        torch.OutOfMemoryError: the batch is too large.
    """
    if attacker.victim.compiled:
        return
    started = time.perf_counter()
    try:
        with attacker.victim.compiling():
            # In one lane: two that meet new code at once both compile it.
            rehearse(attacker, device, shape, batch_size, lanes=1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in their own ways
        raise PipelineError(
            f"torch.compile fails on this victim: {type(error).__name__}: {first_line(error)}"
        ) from error
    logger.info("Compiled the victim in %.1f s.", time.perf_counter() - started)
