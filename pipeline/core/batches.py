"""Batches: rows of one shard on their way from a source to a layout."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.left_out import LeftOut, Skipped
from pipeline.core.plan import Shard

if TYPE_CHECKING:
    from torch import Tensor

# The label of a row that has none.
UNLABELLED = -1


@dataclass(frozen=True)
class Batch:
    """Up to N rows of one shard, padded to N. The last one's shard always has a length.

    images: (N, C, H, W) uint8, channels last in memory; labels: (N,) int64, -1 for unlabelled; valid: (N,)
    bool, false for padding and skipped rows. source_index: (valid rows,) int64; kept: carried-through
    columns of the valid rows; seconds: of a core, that reading took; left_out: of the source, since the batch before.
    """

    shard: Shard
    place: slice
    images: "Tensor"
    labels: "Tensor"
    valid: "Tensor"
    source_index: NDArray[np.int64]
    kept: pa.Table
    skipped: tuple[Skipped, ...]
    seconds: float
    left_out: tuple[LeftOut, ...] = ()

    @property
    def ends_shard(self) -> bool:
        return bool(self.place.stop == self.shard.rows)

    @property
    def name(self) -> str:
        """For messages: the shard and the rows within it."""
        return f"shard {self.shard.name}, rows {self.place.start} to {self.place.stop - 1}"

    def pin_memory(self) -> "Batch":
        """The same with its tensors in page-locked memory, so that copies to CUDA can be asynchronous."""
        return replace(
            self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), valid=self.valid.pin_memory()
        )
