"""Train on a dataset: uint8 images and labels in an order of their own each epoch, clean or attacked by lot.

Every epoch shows every source image once: clean with a given probability, else in a variant drawn for it. What is
drawn for a row depends on seed, epoch and row alone, so neither workers nor ranks change what an epoch holds.

Files are read front to back, a piece at a time: a piece is the rows between two places where a row group ends in
every subset. The pieces of an epoch come in random order, and the rows of a few neighbours in it, a window, are
mixed. A consumer (a worker of a rank) reads a stretch of that order, so that the stretches differ by one row at most
and fit together whatever the number of row groups; a resumed one starts its stretch later.

Nothing here can make a dataset: reading needs neither the attack nor a victim, nor the library `datasets`.
"""

import hashlib
import logging
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.core.addresses import is_address
from pipeline.core.epsilon import reading_levels
from pipeline.core.errors import ConfigError, PipelineError, explained
from pipeline.core.images import ImageFormat, UndecodableError, decode_images
from pipeline.core.lattice import step_array, stored_sign
from pipeline.core.sign_bits import decode_cells
from pipeline.core.variants import CLEAN, Variant
from pipeline.layouts.base import LABEL, LAST, Picture
from pipeline.output.folder import OutputFolder, local_folder, split_of
from pipeline.output.manifest import Manifest, require_manifest, warn_if_incomplete
from pipeline.read.choice import Ids, draw_shares, variants_to_read
from pipeline.read.epochs import EpochCounter
from pipeline.read.repository import manifest_folder

# A window closes at whichever comes first; a consumer holds the encoded images of one. Shards are cut from a
# permutation already, so a few row groups mix the classes well.
WINDOW_ROWS = 4096
WINDOW_BYTES = 64 * 2**20
# Values that are decoded and stepped at once: 85 images at 32 px, one at 224. More would leave the cache.
BLOCK_VALUES = 2**18

# How Arrow says that a file is damaged or gone.
UNREADABLE = (OSError, ValueError, pa.ArrowException)

# What is drawn from a seed, each from a stream of its own.
VARIANTS, ORDER, WITHIN = range(3)

# What can come with an image.
COLUMNS = (LABEL, "epsilon", "attack", "model", "fooled", LAST)

# Columns by which variants can be chosen row by row.
Only = Literal["fooled", "correct"]

# A stored picture, and for an image that is made on reading the one that says in which direction its values move: each
# as the fields of its column.
Cell = list[tuple[bytes, ...]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `start + rows` of a file, at most `bytes` of pictures in each subset.

    groups: in each subset, the first of its row groups that hold them and the one after the last.
    """

    file: str
    shard: int
    start: int
    rows: int
    bytes: int
    groups: Mapping[str, tuple[int, int]]


class Shards:
    """The files of one split, and where in them the images of some variants are.

    It holds paths and row counts, no image: that is what a worker process is given.

    Args:
        root: the dataset's folder.
        manifest: the dataset's.
        variants: (V,) of them, by whose index all else names them.
        shows_clean: whether the clean image is ever shown as it is.
    """

    def __init__(self, root: Path, manifest: Manifest, variants: Sequence[Variant], *, shows_clean: bool) -> None:
        output = manifest.resolved.output
        layout, recorded = manifest.layout, manifest.variants
        self.root, self.shape, self.layout = root, manifest.shape, layout
        self.variants, self.recorded = tuple(variants), recorded
        self.levels = np.array([variant.level for variant in variants], dtype=np.int16)
        self.image_format: ImageFormat = "webp" if output.image_format == "webp" else "png"
        sources = [layout.source(one, recorded) if one != CLEAN or shows_clean else () for one in variants]
        # A clean image comes before what says where it moves to.
        pictures = [picture for picture in layout.pictures(recorded) if any(picture in source for source in sources)]
        self.columns: list[Picture] = pictures
        self.subsets = tuple(dict.fromkeys(column.subset for column in self.columns))
        # Whether a column is read for an image of a variant.
        self.used = np.array([[column in source for source in sources] for column in self.columns])
        self.pieces: tuple[Piece, ...] = ()

    def open(self, entries: Mapping[str, int]) -> None:
        """Read the footers.

        Args:
            entries: the files of every subset relative to the folder, and their sizes.

        Raises:
            PipelineError: a file is missing, is not the one that the manifest lists, or is listed in one subset only.
        """
        names = sorted({Path(path).name for path in entries})
        self.pieces = tuple(
            piece for shard, name in enumerate(names) for piece in self._pieces_of(shard, name, entries)
        )

    def _pieces_of(self, shard: int, name: str, entries: Mapping[str, int]) -> list[Piece]:
        ends, sizes = {}, {}
        for subset in self.subsets:
            path = self.root / subset / name
            size = entries.get(f"{subset}/{name}")
            if size is None:
                raise PipelineError(f"manifest.json lists {name} elsewhere and not {path}; see fgsm verify.")
            with explained(f"{path} is not the file that manifest.json lists", "see fgsm verify", errors=UNREADABLE):
                if path.stat().st_size != size:
                    raise ValueError("its size is another")
                footer = pq.read_metadata(path)
            row_groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
            ends[subset] = [0, *accumulate(group.num_rows for group in row_groups)]
            sizes[subset] = [0, *accumulate(group.total_byte_size for group in row_groups)]
        common = sorted(set.intersection(*map(set, ends.values())))
        pieces = []
        for start, stop in pairwise(common):
            groups = {subset: (there.index(start), there.index(stop)) for subset, there in ends.items()}
            largest = max(sizes[subset][last] - sizes[subset][first] for subset, (first, last) in groups.items())
            pieces.append(Piece(name, shard, start, stop - start, largest, groups))
        return pieces

    def read(self, piece: Piece, rows: NDArray[np.int64], drawn: NDArray[np.int64]) -> list[Cell]:
        """The encoded pictures of some rows of a piece.

        Args:
            piece: one of `pieces`.
            rows: (N,) which of its rows.
            drawn: (N,) the variant of each, by its index.
        """
        cells: list[Cell] = [[] for _ in rows]
        # A column at a time, of which only what was drawn is kept.
        for column, used in zip(self.columns, self.used, strict=True):
            wanted = np.flatnonzero(used[drawn])
            if len(wanted):
                subset, name = column
                fields = self._table(piece, subset, [f"{name}.{field}" for field in self.layout.fields(name)])
                pictures = fields.flatten().take(pa.array(rows[wanted]))
                for index, *picture in zip(
                    wanted.tolist(), *map(pa.ChunkedArray.to_pylist, pictures.columns), strict=True
                ):
                    cells[index].append(tuple(picture))
        return cells

    def values(
        self, piece: Piece, rows: NDArray[np.int64], drawn: NDArray[np.int64], columns: Sequence[str]
    ) -> list[list[Any]]:
        """What columns hold of some rows of a piece, N values for each column. Arguments as of `read`, and their names.

        Of a clean image `attack` and `model` are empty and `fooled` is false, so that batches can be made of them.
        """
        found: list[list[Any]] = []
        for column in columns:
            if column == "fooled":
                found.append(self.flags(piece, "fooled")[rows, drawn].tolist())
            elif column in (LABEL, LAST):
                found.append(self._column(piece, self.subsets[0], column).take(pa.array(rows)).to_pylist())
            else:
                shown = [self.variants[index] for index in drawn.tolist()]
                found.append([one.level / 255 if column == "epsilon" else getattr(one, column) or "" for one in shown])
        return found

    def flags(self, piece: Piece, name: Only) -> NDArray[np.bool_]:
        """(rows, V) of a piece: whether a column is true of a row's image in each variant; false on clean."""
        flags = np.zeros((piece.rows, len(self.variants)), dtype=np.bool_)
        with explained(f"{piece.file} in {self.root} cannot be read", "see fgsm verify", errors=UNREADABLE):
            answers = self.layout.answers(name, self.variants[1:], self.recorded, partial(self._column, piece))
            for index, answer in enumerate(answers, start=1):
                flags[:, index] = answer.fill_null(False).to_numpy(zero_copy_only=False)
        return flags

    def without(self, name: Only) -> int:
        """For how many rows a column is true in no variant."""
        found = 0
        # A file at a time, which is faster than by pieces.
        for _, pieces in groupby(self.pieces, key=lambda piece: piece.file):
            first, *_, last = [*pieces] * 2
            groups = {subset: (start, last.groups[subset][1]) for subset, (start, _) in first.groups.items()}
            whole = Piece(first.file, first.shard, 0, last.start + last.rows, 0, groups)
            found += int((~self.flags(whole, name).any(axis=1)).sum())
        return found

    def _column(self, piece: Piece, subset: str, name: str) -> pa.ChunkedArray:
        return self._table(piece, subset, [name]).column(0)

    def _table(self, piece: Piece, subset: str, names: list[str]) -> pa.Table:
        path = self.root / subset / piece.file
        with (
            explained(f"{path} cannot be read", "see fgsm verify", errors=UNREADABLE),
            pq.ParquetFile(path) as file,
        ):
            # Threads of Arrow's would be one more pool in every worker, for columns that have no use for them.
            return file.read_row_groups(range(*piece.groups[subset]), names, use_threads=False)

    def decode(self, cells: Sequence[Cell], drawn: NDArray[np.int64]) -> Tensor:
        """Images (N, C, H, W) uint8, channels last in memory, from N cells and the variant of each, by its index.

        Raises:
            PipelineError: a picture is damaged.
        """
        what = f"{self.root}: a stored picture is damaged"
        with explained(what, "fgsm verify names its file", errors=(UndecodableError, ValueError)):
            images = self._decode([cell[0] for cell in cells])
            made = [index for index, cell in enumerate(cells) if len(cell) > 1]
            if made:
                directions = self._decode([cells[index][1] for index in made])
                pictures, steps = images[made], self.levels[drawn[made]][:, None, None, None]
                sign = stored_sign(pictures, directions, is_map=self.layout.stores_sign)
                images[made] = step_array(pictures, sign, steps)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _decode(self, pictures: Sequence[tuple[bytes, ...]]) -> NDArray[np.uint8]:
        return decode_cells(pictures, self.shape, lambda data: decode_images(data, self.image_format, self.shape))


class TrainingDataset(IterableDataset[tuple[Any, ...]]):
    """What `training_dataset` returns.

    `classes`: names of the labels. `shape`: (C, H, W) of every image. `rows`: images of an epoch, over all ranks.
    `columns`: what comes with an image.
    """

    def __init__(
        self,
        shards: Shards,
        manifest: Manifest,
        *,
        shares: NDArray[np.float64],
        clean: float,
        only: Only | None,
        shuffle: bool,
        seed: int,
        columns: tuple[str, ...],
        place: tuple[int, int] | None,
    ) -> None:
        # shares: (V,) how often each of the variants of `shards` is drawn where no clean image is shown, in proportion.
        self.shards, self.shares, self.clean, self.only = shards, shares, clean, only
        self.shuffle, self.seed, self.columns = shuffle, seed, columns
        self.classes, self.shape = manifest.dataset_classes, manifest.shape
        self.rows = sum(piece.rows for piece in shards.pieces)
        # What decides the order and content of an epoch: a state belongs to it.
        files = [piece.file for piece in shards.pieces]
        order = (manifest.receipts, self.rows, files, shuffle, seed, WINDOW_ROWS, WINDOW_BYTES)
        drawn = (shards.variants, shares.tolist(), clean, only)
        self.digest = hashlib.sha256(repr((order, drawn)).encode()).hexdigest()[:16]
        self._epochs = EpochCounter()
        # Shared, so that workers hear of a state that cannot reach them: one that was loaded in the main process, and
        # that no iteration there has taken yet.
        self._pending = torch.zeros((), dtype=torch.bool).share_memory_()
        self._place = place
        # Epoch, and rows that were given: of the next iteration, where a state was loaded, and of the one under way.
        self._resume: tuple[int, int] | None = None
        self._reading = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        # A worker process need not know of torch.distributed.
        return {**self.__dict__, "_place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy's is not, but for one that is sent to a process which this one starts.
        self._pending.share_memory_()

    @property
    def place(self) -> tuple[int, int]:
        """Rank and world size: as given, else torch.distributed's.

        Raises:
            ConfigError: they were not given, and accelerate runs in several processes.
        """
        if self._place is not None:
            return self._place
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        rank, world = distributed.get_rank(), distributed.get_world_size()
        accelerate = sys.modules.get("accelerate.state")
        if world > 1 and accelerate and accelerate.is_initialized():
            # It shares out what a prepared loader reads, and nothing says which loader will be prepared.
            raise ConfigError(
                f"rank, world_size: accelerate runs in {world} processes; give rank=0, world_size=1 for a loader that "
                "it prepares, whose batches it shares out itself, or rank=accelerator.process_index, "
                "world_size=accelerator.num_processes for one that you do not give to prepare()."
            )
        return rank, world

    def __len__(self) -> int:
        """The images of an epoch on this rank; those of two ranks differ by one at most."""
        start, stop = _share(0, self.rows, *self.place)
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of. The one after it is of the next epoch, and the first is of epoch 0.

        A loaded state is kept for its own epoch and forgotten for any other.

        Raises:
            ConfigError: it is below 0.
        """
        if epoch < 0:
            raise ConfigError(f"epoch: got {epoch}; epochs are counted from 0.")
        self._epochs.set(epoch, self.place)
        if self._resume is not None and self._resume[0] != epoch:
            self._resume = None
            self._pending.fill_(False)

    def state_dict(self) -> dict[str, Any]:
        """Where this consumer stands. In a worker, StatefulDataLoader asks; in the main process it is right only
        without workers."""
        rank, world, _, workers = self._consumer()
        epoch, rows = self._reading
        return {"epoch": epoch, "rows": rows, "of": self.digest, "consumers": [rank, world, workers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration, and only that, begin where a consumer stood; what lies before is neither read nor
        decoded.

        In a worker, StatefulDataLoader calls it. In the main process it is for a loader without workers: an iteration
        with workers refuses to begin.

        Raises:
            ConfigError: the state is that of another dataset, mix, seed, number of ranks or of workers.
        """
        if state["of"] != self.digest:
            raise ConfigError(
                "state: it is that of another dataset, or of another split, models, attacks, epsilons, clean, weights, "
                "only, shuffle or seed."
            )
        rank, world, _, workers = self._consumer()
        there, here = state["consumers"], [rank, world, workers]
        if there != here:
            told = ["rank {} of {} with {} readers".format(*consumers) for consumers in (there, here)]
            raise ConfigError(
                f"state: it is of {told[0]}, and this is {told[1]}; resume with as many ranks and workers."
            )
        self._resume = state["epoch"], state["rows"]
        if get_worker_info() is None:
            self._pending.fill_(True)

    def _consumer(self) -> list[int]:
        """Rank, world size, worker, workers."""
        worker = get_worker_info()
        return [*self.place, *((0, 1) if worker is None else (worker.id, worker.num_workers))]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        rank, world, worker, workers = self._consumer()
        start, stop = _share(*_share(0, self.rows, rank, world), worker, workers)
        # Now, not with the first row: StatefulDataLoader asks for the state before.
        resumed, self._resume = self._resume, None
        epoch, done = resumed or (None, 0)
        self._reading = self._epochs.begin(rank, epoch), done
        if get_worker_info() is None:
            self._pending.fill_(False)
        return self._counted(start, stop)

    def _counted(self, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        if self._pending and get_worker_info() is not None:
            # With the first row, not before: a worker that stays would end without a word.
            raise ConfigError(
                "state: it was loaded into the dataset, where workers do not see it; load it into torchdata's "
                "StatefulDataLoader."
            )
        epoch, done = self._reading
        for row in self._rows(epoch, start + done, stop):
            done += 1
            self._reading = epoch, done
            yield row

    def _rows(self, epoch: int, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
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
                order = self._random(epoch, WITHIN, number).permutation(rows)
            yield from self._shown(epoch, window, order[here.start : here.stop])

    def _shown(self, epoch: int, window: Sequence[Piece], chosen: NDArray[np.int64]) -> Iterator[tuple[Any, ...]]:
        """The chosen rows of a window, decoded a block at a time. What was gathered is let go of with the window."""
        cells, drawn, values = self._gather(epoch, window, chosen)
        block = max(1, BLOCK_VALUES // int(np.prod(self.shape)))
        for first in range(0, len(cells), block):
            part = slice(first, first + block)
            images = self.shards.decode(cells[part], drawn[part])
            yield from zip(images, *(column[part] for column in values), strict=True)

    def _windows(self, epoch: int) -> Iterator[list[Piece]]:
        """The pieces in the order of an epoch, neighbours together."""
        pieces = self.shards.pieces
        order = self._random(epoch, ORDER).permutation(len(pieces)) if self.shuffle else range(len(pieces))
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
            if len(there):
                drawn[there] = self._drawn(epoch, piece)[rows]
                for index, cell in zip(there.tolist(), self.shards.read(piece, rows, drawn[there]), strict=True):
                    cells[index] = cell
                values[:, there] = self.shards.values(piece, rows, drawn[there], self.columns)
        return cells, drawn, values.tolist()

    def _drawn(self, epoch: int, piece: Piece) -> NDArray[np.int64]:
        """The variant of each row of a piece, (rows,), 0 for clean; a shard's rows are the same in every layout, and so
        are these."""
        lots = self._random(epoch, VARIANTS, piece.shard, skip=2 * piece.start).random_sample((piece.rows, 2))
        shares = self.shares[None]
        if self.only is not None:
            shares = shares * self.shards.flags(piece, self.only)
        # Each variant is a stretch of 0..total, as long as its share.
        ends = np.cumsum(shares, axis=1)
        total = ends[:, -1]
        attacked = (ends[:, :-1] <= (lots[:, 1] * total)[:, None]).sum(axis=1)
        return np.where((lots[:, 0] < self.clean) | (total == 0), 0, attacked)

    def _random(self, epoch: int, *stream: int, skip: int = 0) -> np.random.RandomState:
        # RandomState's streams are frozen for good, those of Generator are not.
        return np.random.RandomState(np.random.PCG64([self.seed, epoch, *stream]).advance(skip))


def _share(start: int, stop: int, index: int, count: int) -> tuple[int, int]:
    """The index-th of `count` stretches of start..stop; earlier ones are longer by one where they differ."""
    each, more = divmod(stop - start, count)
    first = start + index * each + min(index, more)
    return first, first + each + (index < more)


def training_dataset(
    path_or_repo: str | Path,
    split: str = "train",
    *,
    models: Ids | None = None,
    attacks: Ids | None = None,
    epsilons: Sequence[str | float] | None = None,
    clean: float = 0.5,
    weights: Mapping[str, float] | None = None,
    only: Only | None = None,
    columns: Sequence[str] = (LABEL,),
    shuffle: bool = True,
    seed: SupportsIndex = 0,
    rank: int | None = None,
    world_size: int | None = None,
    allow_incomplete: bool = False,
) -> TrainingDataset:
    """Open a dataset for training, any layout: images (C, H, W) uint8 and labels int64, for a DataLoader.

        data = pipeline.training_dataset("out/cifar10", "train", clean=0.5)
        loader = DataLoader(data, batch_size=128, num_workers=4)
        for epoch in range(90):
            for images_u8, labels in loader:
                logits = model(images_u8.to(device).float() / 255)  # normalisation belongs to the model

    Every epoch has every source image once. An order and a draw belong to a seed and an epoch; they do not depend on
    workers, ranks or machine. The first iteration is of epoch 0, and each that begins after it of the next, also where
    the one before was left early. `data.set_epoch(epoch)` says which comes next.

    An image that is not shown clean is shown in a variant that is drawn for it: first a model among those that are
    attacked, then an attack among those on that model and those that ask no model (noise), then one of the attack's
    epsilons. At each of these draws all are as likely, or as `weights` says:

        # Images that fool their model, those of pgd drawn twice as often as those of any other attack on a model.
        pipeline.training_dataset("out/cifar10", "train", clean=0.2, weights={"pgd": 2}, only="fooled")
        # Adversarial images of one model only, and none of noise.
        pipeline.training_dataset("out/cifar10", "train", models="resnet20", attacks=["fgsm", "pgd"])

    Distributed: every rank constructs the same dataset. Ranks differ by one image at most, so DDP, which needs as many
    steps on each of them, takes the first `data.rows // (world_size * batch_size)` batches of its loader
    (`itertools.islice`); every rank has at least that many, unless `drop_last` takes them away.

    Every worker ends with a short batch of its own, so with several there may be more batches than `len(loader)` says;
    with `drop_last` each of them drops its own.

    Lightning takes the loader as it is. It stops after `len(loader)` batches, so with several workers it leaves the
    last short batches of an epoch out unless the batch size divides every worker's share. On several devices give
    `Trainer(limit_train_batches=data.rows // (world_size * batch_size))`. Use torchdata's StatefulDataLoader to
    resume from a checkpoint within an epoch.

    accelerate in one process takes the loader as it is, too. In several it shares out itself what a prepared loader
    reads, so give `rank=0, world_size=1`; without them this is an error. It fills the last batches up with images that
    were shown already, unless `drop_last=True` or the batches come out even. Every process, or the first for all of
    them, then reads all images. Where reading is the bottleneck do not prepare the loader: give
    `rank=accelerator.process_index, world_size=accelerator.num_processes`, and move batches to the device yourself.

    Shuffling takes row groups in any order and mixes the rows of a few. That is as good as a permutation where the
    dataset was made with `source.shuffle: true`, the default. One made with `source.shuffle: false` has the source's
    neighbours in a row group, and shuffling is weak: if the source is sorted by class, batches hold few classes.

    Resuming in the middle of an epoch is exact with the `state_dict` of torchdata's StatefulDataLoader, workers or not,
    and without workers with the dataset's own. Images that were given are neither read nor decoded again.

    Layouts images and wide read a row group of each variant to show one image of it; layout signs reads what it shows.
    So where reading, not decoding, is the bottleneck, name few variants or take signs. A reader (a worker, or the
    process itself without any) holds the encoded images of a window, 64 MB and one row group more.

    Args:
        path_or_repo: an output folder, or a Hub id, of which the files needed are downloaded first.
        split: one of the dataset's.
        models, attacks: the id of one, or a list of them: variants of these only. What is of no model is left out by
            `attacks` alone. None: all.
        epsilons: to draw from: `k/255` or a decimal as in the config (rounded down), of every attack that is chosen.
            Those that are not recorded are made exactly, where an attack's images lie along one direction; other
            attacks are left out at them, or refused, as `pipeline.load` does. None: all that are recorded.
        clean: share of images that are shown clean, 0..1.
        weights: how much more likely than others something is where it is drawn, by the id of a model or of an attack
            (of both, where they have the same) or by an epsilon, `k/255`: 2 for twice. What is missing weighs 1. What
            weighs 0 is never shown.
        only: "fooled": an image is drawn among its variants that fool the model which they attack (noise: the dataset's
            first), as column `fooled` says, or "correct": among those that it gets right. The shares of those that are
            left stay in proportion. An image that has none is shown clean; for how many that holds is logged when the
            dataset is opened. None: among all.
        columns: what comes with each image, in this order, some of "label", "epsilon" (float, in 0..1; 0 when clean),
            "attack", "model" (ids; "" where there is none), "fooled" (bool, as column `fooled` of that very image says,
            False when clean) and "source_index" (int, its row in the source's split). A batch of them is a tensor, one
            of ids a list. They change neither order nor draws.
        shuffle: in an order of each epoch's own; else as stored.
        seed: of order and draws, 0 or more.
        rank, world_size: which part of how many; None: torch.distributed's where it is initialised, else all. Needed
            where accelerate runs in several processes.
        allow_incomplete: do not warn where shards of an output folder are missing.

    Raises:
        ConfigError: there is no such dataset, split, model or attack, an argument is out of range, an epsilon cannot be
            made, or images have no label.
        PipelineError: a file is missing or damaged.
    """
    place = _place(rank, world_size)
    asked = None if epsilons is None else reading_levels(epsilons)
    _check_numbers(seed, clean, asked)
    _check_columns(columns)
    if is_address(path_or_repo):
        raise ConfigError(
            f"{path_or_repo}: training_dataset reads its files again in every epoch, so they must be on a disk: copy "
            "them into a folder first, for instance with `aws s3 sync`, or let pipeline.load stream them."
        )
    local, name = local_folder(path_or_repo), str(path_or_repo)
    root = local or manifest_folder(name)
    manifest = require_manifest(OutputFolder(root))
    variants = variants_to_read(manifest, asked, models=models, attacks=attacks)
    attacked = [variant for variant in variants if variant != CLEAN]
    shares = draw_shares(attacked, weights or {})
    if only is not None:
        _check_only(only, attacked, manifest)
    if local and not allow_incomplete:
        warn_if_incomplete(OutputFolder(root), manifest)
    _check_split(manifest, split, name)
    # What is never drawn is not looked for.
    drawn = [index for index, share in enumerate(shares) if share and clean < 1]
    only = only if drawn else None
    shown = [CLEAN, *(attacked[index] for index in drawn)]
    if "fooled" in columns:
        _check_recorded("columns", shown, manifest)
    shards = Shards(root, manifest, shown, shows_clean=clean > 0 or only is not None)
    files = (entry for entry in manifest.files if split_of(entry.path) == split)
    entries = {entry.path: entry.bytes for entry in files if entry.path.split("/")[0] in shards.subsets}
    if local is None:
        _download(name, root, list(entries))
    shards.open(entries)
    data = TrainingDataset(
        shards,
        manifest,
        shares=np.array([0, *shares[drawn]]),
        clean=float(clean),
        only=only,
        shuffle=shuffle,
        seed=operator.index(seed),
        columns=tuple(columns),
        place=place,
    )
    _ = data.place  # refused where it cannot be known
    if only is not None:
        _tell_without(data, only, split)
    return data


def _check_numbers(seed: SupportsIndex, clean: float, levels: Sequence[int] | None) -> None:
    """Refuse numbers that cannot be; the levels are epsilons in grey levels."""
    if not isinstance(seed, SupportsIndex) or operator.index(seed) < 0:
        raise ConfigError(f"seed: got {seed}; it is a whole number, 0 or more.")
    if isinstance(clean, bool) or not 0 <= clean <= 1:
        raise ConfigError(f"clean: got {clean}; it is the share of clean images, from 0 to 1.")
    if levels is not None and 0 in levels:
        raise ConfigError("epsilons: 0 is the clean image, whose share is `clean`; leave it out.")


def _check_columns(columns: Sequence[str]) -> None:
    unknown = [columns] if isinstance(columns, str) else [name for name in columns if name not in COLUMNS]
    if unknown or not columns:
        got = repr(unknown[0]) if unknown else "none"
        raise ConfigError(f"columns: got {got}; it is a list of some of {', '.join(COLUMNS)}.")


def _place(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Rank and world size, None where neither is given."""
    place = None if rank is None or world_size is None else (rank, world_size)
    if (rank, world_size) != (None, None) and (place is None or not 0 <= place[0] < place[1]):
        raise ConfigError(f"rank, world_size: got {rank} of {world_size}; ranks run from 0 to world_size - 1.")
    return place


def _download(name: str, root: Path, files: list[str]) -> None:
    """Fetch files of a Hub dataset, at the revision whose manifest lies in the folder."""
    from huggingface_hub import snapshot_download

    with explained(f"{name} cannot be read from the Hub"):
        snapshot_download(name, repo_type="dataset", revision=root.name, allow_patterns=files)


def _tell_without(data: TrainingDataset, only: Only, split: str) -> None:
    """Say of how many images `only` leaves no variant."""
    none = data.shards.without(only)
    logger.log(
        logging.WARNING if none else logging.INFO,
        "only=%r: %s of %s images in %r have no such variant%s.",
        *(only, f"{none:,}", f"{data.rows:,}", split, " and are always shown clean" if none else ""),
    )


def _check_only(only: str, attacked: Sequence[Variant], manifest: Manifest) -> None:
    if only not in get_args(Only):
        raise ConfigError(f"only: got {only!r}; it is one of {', '.join(get_args(Only))}, or None.")
    _check_recorded("only", attacked, manifest)


def _check_recorded(key: str, variants: Sequence[Variant], manifest: Manifest) -> None:
    """Refuse images of which nobody knows what they do, where an argument asks for that."""
    made = [variant for variant in variants if variant not in manifest.variants]
    if made:
        raise ConfigError(
            f"{key}: {made[0].level}/255 is not recorded of attack {made[0].attack}, so what its images do is unknown; "
            "leave it out of epsilons."
        )


def _check_split(manifest: Manifest, split: str, name: str) -> None:
    if split not in manifest.split_rows:
        raise ConfigError(f"split: {name} has no split {split!r}; it has {', '.join(manifest.split_rows)}.")
    clean = next((subset for subset in manifest.subsets if (subset.split, subset.level) == (split, 0)), None)
    if clean is None or not clean.rows:
        raise ConfigError(f"split: {name} has no images in {split!r} yet; run fgsm generate to its end.")
    if clean.labelled < clean.rows:
        raise ConfigError(
            f"{name}: {clean.rows - clean.labelled:,} of the {clean.rows:,} images in {split!r} have no label; "
            "a classifier is trained on labelled ones."
        )
