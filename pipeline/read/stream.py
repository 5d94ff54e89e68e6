"""The rows of one dataset as an endless stream: epoch after epoch, each in an order and with draws of its own.

Every epoch has every source image once. What is drawn for a row depends on seed, epoch and row alone, so neither
workers nor ranks change what an epoch holds.

Files are read front to back, a piece at a time. The pieces of an epoch come in random order, and the rows of a few
neighbours in it, a window, are mixed. Any stretch of the stream can be read; what lies before is not.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.read.shards import Cell, Only, Piece, Shards

# A window closes at whichever comes first; a consumer holds the encoded images of one. Shards are cut from a
# permutation already, so a few row groups mix the classes well.
WINDOW_ROWS = 4096
WINDOW_BYTES = 64 * 2**20
# Values that are decoded and stepped at once: 85 images at 32 px, one at 224. More would leave the cache.
BLOCK_VALUES = 2**18

# What is drawn from a seed, each from a stream of its own.
VARIANTS, ORDER, WITHIN = range(3)


@dataclass(frozen=True)
class Draws:
    """What is drawn for a row.

    shares: (V,) how often each of the variants is drawn where no clean image is shown, in proportion; 0 of clean.
    clean: how often the clean image is shown. only: see `training_dataset`. seed: of draws and order. number: of the
    dataset among those that are read together, so that each of them has other draws.
    """

    shares: NDArray[np.float64]
    clean: float
    only: Only | None
    seed: int
    number: int = 0

    def random(self, epoch: int, stream: int, *place: int, skip: int = 0) -> np.random.RandomState:
        """The random numbers of one of VARIANTS, ORDER and WITHIN, at a place in an epoch."""
        # RandomState's streams are frozen for good, those of Generator are not.
        entropy = [self.seed, epoch, stream + 3 * self.number, *place]
        return np.random.RandomState(np.random.PCG64(entropy).advance(skip))


class Stream:
    """See the module. `columns` come with an image; `receipts` is a digest of the receipts of the dataset, that is of
    what its files hold. Unless they shuffle, epochs are in the order in which rows are stored."""

    def __init__(
        self, shards: Shards, draws: Draws, *, columns: tuple[str, ...], shuffle: bool, receipts: str | None
    ) -> None:
        self.shards, self.draws, self.columns, self.shuffle = shards, draws, columns, shuffle
        self.rows = sum(piece.rows for piece in shards.pieces)
        # What decides the order and content of an epoch: a state belongs to it.
        files = [piece.file for piece in shards.pieces]
        order = (receipts, self.rows, files, shuffle, draws.seed, WINDOW_ROWS, WINDOW_BYTES)
        drawn = (shards.variants, draws.shares.tolist(), draws.clean, draws.only)
        self.digest = hashlib.sha256(repr((order, drawn)).encode()).hexdigest()[:16]

    def read(self, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        """The rows `start` to `stop` of the stream: an image and its columns each."""
        while start < stop:
            epoch, first = divmod(start, self.rows)
            last = min(self.rows, first + stop - start)
            yield from self._epoch(epoch, first, last)
            start += last - first

    def _epoch(self, epoch: int, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        """The rows `start` to `stop` of an epoch's order."""
        begin = 0
        for number, window in enumerate(self._windows(epoch)):
            rows = sum(piece.rows for piece in window)
            here = range(max(start - begin, 0), min(stop - begin, rows))
            begin += rows
            if begin - rows >= stop:
                return
            if not here:
                continue
            order = np.arange(rows)
            if self.shuffle:
                order = self.draws.random(epoch, WITHIN, number).permutation(rows)
            yield from self._shown(epoch, window, order[here.start : here.stop])

    def _shown(self, epoch: int, window: Sequence[Piece], chosen: NDArray[np.int64]) -> Iterator[tuple[Any, ...]]:
        """The chosen rows of a window, decoded a block at a time. What was gathered is let go of with the window."""
        cells, drawn, values = self._gather(epoch, window, chosen)
        block = max(1, BLOCK_VALUES // int(np.prod(self.shards.shape)))
        for first in range(0, len(cells), block):
            part = slice(first, first + block)
            images = self.shards.decode(cells[part], drawn[part])
            yield from zip(images, *(column[part] for column in values), strict=True)

    def _windows(self, epoch: int) -> Iterator[list[Piece]]:
        """The pieces in the order of an epoch, neighbours together."""
        pieces = self.shards.pieces
        order = self.draws.random(epoch, ORDER).permutation(len(pieces)) if self.shuffle else range(len(pieces))
        window: list[Piece] = []
        for index in order:
            window.append(pieces[index])
            rows, size = sum(piece.rows for piece in window), sum(piece.bytes for piece in window)
            if rows >= WINDOW_ROWS or size >= WINDOW_BYTES:
                yield window
                window = []
        if window:
            yield window

    def _gather(
        self, epoch: int, window: Sequence[Piece], chosen: NDArray[np.int64]
    ) -> tuple[list[Cell], NDArray[np.int64], list[list[Any]]]:
        """Cells, variants and columns of the chosen rows of a window, in the order in which they are chosen."""
        cells: list[Cell] = [[] for _ in chosen]
        drawn = np.zeros(len(chosen), dtype=np.int64)
        values = np.empty((len(self.columns), len(chosen)), dtype=object)
        first = 0
        for piece in window:
            there = np.flatnonzero((chosen >= first) & (chosen < first + piece.rows))
            rows = chosen[there] - first
            first += piece.rows
            if not len(there):
                continue
            drawn[there] = self._drawn(epoch, piece)[rows]
            with self.shards.keeping_open() as shards:
                for index, cell in zip(there.tolist(), shards.read(piece, rows, drawn[there]), strict=True):
                    cells[index] = cell
                values[:, there] = shards.values(piece, rows, drawn[there], self.columns)
        return cells, drawn, values.tolist()

    def _drawn(self, epoch: int, piece: Piece) -> NDArray[np.int64]:
        """The variant of each row of a piece, (rows,), 0 for clean; a shard's rows are the same in every layout, and so
        are these."""
        lots = self.draws.random(epoch, VARIANTS, piece.shard, skip=2 * piece.start).random_sample((piece.rows, 2))
        shares = self.draws.shares[None]
        if self.draws.only is not None:
            shares = shares * self.shards.flags(piece, self.draws.only)
        # Each variant is a stretch of 0..total, as long as its share.
        ends = np.cumsum(shares, axis=1)
        total = ends[:, -1]
        attacked = (ends[:, :-1] <= (lots[:, 1] * total)[:, None]).sum(axis=1)
        return np.where((lots[:, 0] < self.draws.clean) | (total == 0), 0, attacked)
