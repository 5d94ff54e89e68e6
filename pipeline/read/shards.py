"""The files of one split of a dataset, and where in them the images of its variants are.

A piece is the rows between two places where a row group ends in every subset. Rows are read a piece at a time.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import PipelineError, explained
from pipeline.core.images import ImageFormat, UndecodableError, decode_images
from pipeline.core.lattice import step_array, stored_sign
from pipeline.core.sign_bits import decode_cells
from pipeline.core.variants import CLEAN, Variant
from pipeline.layouts.base import LABEL, LAST, Picture
from pipeline.output.manifest import Manifest

# How Arrow says that a file is damaged or gone.
UNREADABLE = (OSError, ValueError, pa.ArrowException)

# What can come with an image.
COLUMNS = (LABEL, "epsilon", "attack", "model", "fooled", LAST)

# Columns by which variants can be chosen row by row.
Only = Literal["fooled", "correct"]

# A stored picture, and for an image that is made on reading the one that says in which direction its values move: each
# as the fields of its column.
Cell = list[tuple[bytes, ...]]


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
        variants: (V,) of them, by whose index all else names them.
        shows_clean: whether the clean image is ever shown as it is.
        pairs: whether the clean image comes with each image.
    """

    def __init__(
        self, root: Path, manifest: Manifest, variants: Sequence[Variant], *, shows_clean: bool, pairs: bool
    ) -> None:
        output = manifest.resolved.output
        layout, recorded = manifest.layout, manifest.variants
        self.root, self.shape, self.layout, self.pairs = root, manifest.shape, layout, pairs
        self.variants, self.recorded = tuple(variants), recorded
        self.levels = np.array([variant.level for variant in variants], dtype=np.int16)
        self.image_format: ImageFormat = "webp" if output.image_format == "webp" else "png"
        sources = [layout.source(one, recorded) if one != CLEAN or shows_clean else () for one in variants]
        # Whether an image of a variant is made on reading, from the clean one and another.
        self.made = np.array([len(source) > 1 for source in sources])
        if pairs:
            sources = [tuple(dict.fromkeys((layout.picture(CLEAN), *source))) for source in sources]
        # A clean image comes before what says where it moves to, and before the attacked one.
        pictures = [picture for picture in layout.pictures(recorded) if any(picture in source for source in sources)]
        self.columns: list[Picture] = pictures
        self.subsets = tuple(dict.fromkeys(column.subset for column in self.columns))
        # Whether a column is read for an image of a variant.
        self.used = np.array([[column in source for source in sources] for column in self.columns])
        self.pieces: tuple[Piece, ...] = ()
        self._kept: dict[Path, pq.ParquetFile] | None = None

    def open(self, entries: Mapping[str, int]) -> None:
        """Read the footers of the files, given by their names relative to the folder with their sizes.

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

    @contextlib.contextmanager
    def keeping_open(self) -> Iterator["Shards"]:
        """The same shards, which open each file once meanwhile, however many of its columns are read.

        They are a copy, as another thread may read as well.
        """
        shards, kept = copy.copy(self), dict[Path, pq.ParquetFile]()
        shards._kept = kept
        try:
            yield shards
        finally:
            for file in kept.values():
                file.close()

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
            contextlib.ExitStack() as opened,
        ):
            file = None if self._kept is None else self._kept.get(path)
            if file is None:
                # Fetching ahead is for files that are far away.
                file = pq.ParquetFile(path, pre_buffer=False)
                if self._kept is None:
                    opened.callback(file.close)
                else:
                    self._kept[path] = file
            # Threads of Arrow's would be one more pool in every worker, for columns that have no use for them.
            return file.read_row_groups(range(*piece.groups[subset]), names, use_threads=False)

    def decode(self, cells: Sequence[Cell], drawn: NDArray[np.int64]) -> Tensor:
        """Images from N cells and the variant of each, by its index.

        Returns:
            (N, C, H, W) uint8, channels last in memory; with `pairs` (N, 2, C, H, W), the clean image first.

        Raises:
            PipelineError: a picture is damaged.
        """
        what = f"{self.root}: a stored picture is damaged"
        with explained(what, "fgsm verify names its file", errors=(UndecodableError, ValueError)):
            images = self._decode([cell[0] for cell in cells])
            shown = images.copy() if self.pairs else images
            two = np.array([index for index, cell in enumerate(cells) if len(cell) > 1], dtype=np.int64)
            if len(two):
                others = self._decode([cells[index][1] for index in two])
                made = np.flatnonzero(self.made[drawn[two]])
                if len(made):
                    # These others are no images: they say in which direction the clean ones move.
                    pictures, steps = images[two[made]], self.levels[drawn[two[made]]][:, None, None, None]
                    sign = stored_sign(pictures, others[made], is_map=self.layout.stores_sign)
                    others[made] = step_array(pictures, sign, steps)
                shown[two] = others
        return torch.from_numpy(np.stack([images, shown], axis=1) if self.pairs else shown).movedim(-1, -3)

    def _decode(self, pictures: Sequence[tuple[bytes, ...]]) -> NDArray[np.uint8]:
        return decode_cells(pictures, self.shape, lambda data: decode_images(data, self.image_format, self.shape))
