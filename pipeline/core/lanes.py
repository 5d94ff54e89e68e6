"""Lanes: the threads that drive the device.

On a CPU each core has a lane that computes alone, a chunk of a batch at a time: nothing waits at the end of
every operator for a thread that the encoders have held up, activations stay in the cache, and the bits do
not depend on the number of cores. Measured on 2 cores (ResNet-20 at 32 px, beside the encoders): 278
images/s in lanes, 215 with two threads in every operator.

On an accelerator a lane has a stream of its own and takes whole batches: while one waits for its copies,
the other computes.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.core.cores import available_cores

# Lanes of an accelerator: one computes while the other's copies are under way.
DEVICE_LANES = 2
# A chunk on a CPU: 8 images at 224 px and 64 at 32 px were fastest, 20% ahead of a whole batch of 256.
CHUNK_VALUES = 8 * 3 * 224 * 224
CHUNK_IMAGES = (8, 64)

# A lane of an accelerator needs the interpreter for every operator that it starts, while threads decode and encode
# beside it: Python lets one of them go on for so many seconds before another gets its turn, 5 ms unless it is told.
# With ResNet-50 on an H200, from JPEGs, 386 images/s became 428.
SWITCH_SECONDS = 0.0002

Result = TypeVar("Result")


def chunk_images(device: torch.device, batch_size: int, shape: tuple[int, int, int]) -> int:
    """Rows that are computed at once: part of a batch on a CPU, all of it elsewhere. `shape` is (C, H, W)."""
    if device.type != "cpu":
        return batch_size
    least, most = CHUNK_IMAGES
    fitting = max(least, min(most, CHUNK_VALUES // (shape[0] * shape[1] * shape[2])))
    # A power of two divides most batches: chunks of one shape are compiled once.
    return min(batch_size, 1 << (fitting.bit_length() - 1))


def lane_count(device: torch.device) -> int:
    """How many lanes keep a device busy."""
    return {"cpu": available_cores(), "cuda": DEVICE_LANES}.get(device.type, 1)


class Lanes:
    """Threads that run functions of a batch's rows on a device; a context that waits for them."""

    def __init__(self, device: torch.device, chunk: int, count: int | None = None) -> None:
        self.device, self.chunk = device, chunk
        self.count = count or lane_count(device)
        self._local = threading.local()
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, "lane", self._open)
        self._switch_seconds = sys.getswitchinterval()

    def _open(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        elif self.device.type == "cuda":
            self._local.stream = torch.cuda.Stream(self.device)

    def __enter__(self) -> "Lanes":
        # Who feeds the lanes works on small tensors: waiting for a second thread takes longer than the work.
        torch.set_num_threads(1)
        if self.device.type != "cpu":
            sys.setswitchinterval(SWITCH_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # Threads started later would take over the lanes' single one.
        torch.set_num_threads(self._threads)
        sys.setswitchinterval(self._switch_seconds)

    def submit(self, function: Callable[..., Result], *rows: Tensor, valid: Tensor) -> list[Future[Result]]:
        """Run a function over the chunks of a batch, in the order of their rows.

        Args:
            function: called with the device's part of each tensor of `rows` and of `valid`; what it returns must
                be on the CPU.
            rows: tensors (N, ...) on the CPU.
            valid: (N,) bool on the CPU. A chunk without a valid row is left out.
        """
        chunks = zip(*(tensor.split(self.chunk) for tensor in (*rows, valid)), strict=True)
        return [self._pool.submit(self._run, function, parts) for parts in chunks if parts[-1].any()]

    def _run(self, function: Callable[..., Result], parts: Sequence[Tensor]) -> Result:
        if self.device.type != "cuda":
            return function(*(part.to(self.device) for part in parts))
        with torch.cuda.stream(self._local.stream):
            return function(*(part.to(self.device, non_blocking=True) for part in parts))


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU, all under way at once; from CUDA into page-locked memory, over the lane's own stream."""
    if not tensors or tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors]
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies
