"""Sources: an image classification dataset as labels that are known and images that are not yet decoded.

`open_source` reads what is cheap (names, counts, labels) in the main process. Images are opened by the
loader's workers, row by row, through the openers that a split hands out.
"""

import contextlib
import functools
import glob
import hashlib
import inspect
import io
import json
import os
import re
import stat
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import SourceConfig
from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, PipelineError, first_line, shortened
from pipeline.core.images import (
    PILLOW_PIXELS,
    Opener,
    UndecodableError,
    image_suffixes,
    is_image_name,
    is_of_the_machine,
    open_image,
)
from pipeline.core.left_out import LeftOut, Tally
from pipeline.sources.origins import DIGITS, UNKNOWN, Origin, card_license, revision_of

# Refuses tars of which `datasets` would leave something out.
CheckTars = Callable[[Iterable[tuple[str, str]]], None]
# Evenly spaced images whose bytes enter a source's digest; sizes and labels of all rows enter it too.
DIGEST_SAMPLES = 64
# Rows of carried-through columns that are read at once for it.
DIGEST_BATCH = 1000

Labels = NDArray[np.int64]
Item = TypeVar("Item")


class Rows(Protocol):
    """The rows of a split, opened on demand; picklable, so that it reaches worker processes."""

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        """One opener for each row: it opens the image or raises."""

    def kept(self, rows: Sequence[int]) -> pa.Table:
        """The columns of `source.keep_columns` for these rows; most sources have none."""
        del rows
        return pa.table({})

    def file(self, row: int) -> str | None:
        """The name of a row's file within the source, where it has one; for people, in valid UTF-8."""
        del row
        return None


@dataclass(frozen=True)
class Split:
    """One split: its name, labels (N,) int64 with -1 for unlabelled, and its rows."""

    name: str
    labels: Labels
    rows: Rows


@dataclass(frozen=True)
class Source:
    """An opened dataset.

    `classes` is None where the dataset does not name its classes; then its labels are the model's own
    indices. `kept` maps carried-through columns to their `datasets` features. `digest` changes when the
    content does, and not when the dataset moves. `origin` is for the card. `left_out` says what of it is no row.
    """

    splits: tuple[Split, ...]
    classes: tuple[str, ...] | None
    digest: str
    kept: dict[str, Any] = field(default_factory=dict)
    origin: Origin = UNKNOWN
    left_out: tuple[LeftOut, ...] = ()


def open_source(config: SourceConfig, *, need_labels: bool, check_tars: CheckTars | None = None) -> Source:
    """Open the dataset that the config names.

    Args:
        config: the `source` section.
        need_labels: whether a dataset without a label column is an error.
        check_tars: looks through tars, by name and place, before `datasets` reads them.

    Raises:
        ConfigError: it is not there, is empty, or lacks the splits or columns that are asked for.
    """
    openers: dict[str, Callable[[SourceConfig, bool], Source]] = {
        "huggingface": functools.partial(_open_huggingface, check_tars=check_tars),
        "imagefolder": _open_imagefolder,
        "torchvision": _open_torchvision,
        "digits": _open_digits,
    }
    opened = openers[config.kind](config, need_labels)
    renamed = file_names({split.name: split for split in opened.splits})
    opened = replace(opened, splits=tuple(replace(split, name=name) for name, split in renamed.items()))
    for split in opened.splits:
        if len(split.labels) == 0:
            raise ConfigError(f"source: split {split.name} is empty.")
        if split.labels.min() < UNLABELLED:
            raise ConfigError(
                f"source: split {split.name} has a label {split.labels.min()}; labels are 0 or more, "
                "and -1 or null for unlabelled."
            )
        if need_labels and (split.labels == UNLABELLED).any():
            raise ConfigError(
                f"source: split {split.name} has {int((split.labels == UNLABELLED).sum())} unlabelled rows, and "
                "attack.label: dataset needs every label; drop those rows, or set attack.label=prediction."
            )
    return opened


def file_names(splits: Mapping[str, Item]) -> dict[str, Item]:
    """What belongs to each split, by the split's name in file names and on the Hub.

    Raises:
        ConfigError: two splits would have the same name, or one would have none that a file may have.
    """
    renamed = {re.sub(r"[^\w.]", "_", name): content for name, content in splits.items()}
    for name in renamed:
        if not re.match(r"\w", name):
            raise ConfigError(f"source.split: {name!r} cannot be the name of files; save the dataset under another.")
    if len(renamed) < len(splits):
        raise ConfigError("source.split: two splits would have the same name as files, where - becomes _.")
    return renamed


def digest_of(parts: Iterable[bytes | str]) -> str:
    """A sha256 over all parts, in order, that tells where each ends."""
    total = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part  # names of files may be no UTF-8
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def class_names(config: SourceConfig, own: Sequence[str] | None) -> tuple[str, ...] | None:
    """The dataset's class names: its own, or `source.classes` where it has none.

    Raises:
        ConfigError: both name them, and differ.
    """
    if own is None:
        return config.classes
    if config.classes is not None and tuple(config.classes) != tuple(own):
        raise ConfigError("source.classes: the source names its classes itself; remove the key.")
    return tuple(own)


# ---------------------------------------------------------------------------------------------- digits


@dataclass(frozen=True)
class ArrayRows(Rows):
    """Images that are already in memory, (N, H, W) uint8."""

    images: NDArray[np.uint8]

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        return [partial(Image.fromarray, self.images[row]) for row in rows]


def _open_digits(config: SourceConfig, need_labels: bool) -> Source:
    del need_labels  # every digit is labelled
    from pipeline.sources.digits import CLASSES, digits_split

    names = config.split or ("train", "test")
    _check_splits(names, ("train", "test"))
    arrays = {name: digits_split(name) for name in names}
    return Source(
        splits=tuple(Split(name, labels, ArrayRows(images)) for name, (images, labels) in arrays.items()),
        classes=class_names(config, CLASSES),
        digest=digest_of(part for images, labels in arrays.values() for part in (images.tobytes(), labels.tobytes())),
        origin=DIGITS,
    )


def chosen_splits(config: SourceConfig, there: Sequence[str]) -> Sequence[str]:
    """The splits that the config names, or the only one.

    Raises:
        ConfigError: it names one that is not there, or none where there are several.
    """
    if config.split is None and len(there) > 1:
        raise ConfigError(f"source.split: name one or more of the source's splits: {', '.join(there)}.")
    _check_splits(config.split or there, there)
    return config.split or there


def _check_splits(asked: Sequence[str], there: Sequence[str]) -> None:
    for name in asked:
        if name not in there:
            raise ConfigError(f"source.split: there is no split {name}; the source has {', '.join(there)}.")


# ----------------------------------------------------------------------------------------- imagefolder


@dataclass(frozen=True)
class FileRows(Rows):
    """Image files by their paths, below `root`."""

    paths: Sequence[str]
    root: str

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        return [partial(open_image, self.paths[row]) for row in rows]

    def file(self, row: int) -> str:
        return as_text(self.paths[row].removeprefix(f"{self.root}/"))


def as_text(name: str) -> str:
    """A file's name for people and files of text: bytes of it that are no UTF-8 become escapes such as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _open_imagefolder(config: SourceConfig, need_labels: bool) -> Source:
    del need_labels  # the folder of an image is its label
    root = _existing_folder(config)
    tally = Tally()
    try:
        folders = _split_folders(root, config)
        if config.split is None and root not in folders.values():
            for beside in sorted({*_subfolders(root)} - {*folders.values()}):
                tally.add("folders beside train, as source.split names none", as_text(beside.name))
        listed = {name: _ClassFolders(folder, root, tally).images for name, folder in folders.items()}
        classes = _common_classes(listed, root, tally)
        paths = {name: [path for own in images.values() for path in own] for name, images in listed.items()}
        listing = (
            f"{name}/{path.removeprefix(f'{folders[name]}/')}:{Path(path).stat().st_size}"
            for name, own in paths.items()
            for path in own
        )
        sampled = (Path(own[row]).read_bytes() for own in paths.values() for row in spread(len(own), DIGEST_SAMPLES))
        digest = digest_of([*listing, *sampled])
    except OSError as error:
        raise _unread(error) from None
    return Source(
        splits=tuple(
            Split(
                name,
                np.repeat(np.arange(len(images)), [len(own) for own in images.values()]).astype(np.int64),
                FileRows(paths[name], str(root)),
            )
            for name, images in listed.items()
        ),
        classes=class_names(config, classes),
        digest=digest,
        origin=Origin(name=as_text(root.resolve().name)),
        left_out=tally.left_out(),
    )


def _common_classes(listed: Mapping[str, Mapping[str, Sequence[str]]], root: Path, tally: Tally) -> list[str]:
    """The class names, which are the same for all splits; a class may be without images in some of them, not in all.

    Raises:
        ConfigError: there are none, they differ, or a folder without images may be a class or not.
    """
    first = next(iter(listed.values()))
    if not first:
        raise ConfigError(f"source.path: {root} is not a folder of class folders: there is no folder in it.")
    for name, images in listed.items():
        if [*images] != [*first]:
            raise ConfigError(f"source.path: the class folders of split {name} differ from those of the first split.")
        for empty in (kind for kind, own in images.items() if not own):
            tally.add("class folders without images (the class keeps its index)", as_text(f"{name}/{empty}"))
    for kind in first:
        if not any(images[kind] for images in listed.values()):
            raise ConfigError(
                f"source.path: {root} is not a folder of class folders: {as_text(kind)} holds no image; remove it, or "
                "put an image of that class there."
            )
    classes = [as_text(kind) for kind in first]
    if len(set(classes)) < len(classes):
        raise ConfigError(f"source.path: {root} has two class folders whose names read alike; rename one of them.")
    return classes


# Folders that systems and tools leave among the files of others, in lower case. What begins with a dot is hidden.
LITTER = (
    *(
        "__macosx",
        "@eadir",
        "#recycle",
        "@recycle",
        "@recently-snapshot",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
    ),
    "__pycache__",
)


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems and tools leave among the files of others."""
    return name.startswith(".") or name.lower() in LITTER


LITTER_REASON = "hidden files or folders, or ones that a system keeps"
# Archives of images that `datasets` unpacks.
ARCHIVES = (".zip", ".tar", ".tgz", ".gz")
NO_IMAGE = "files that are no image by their name"


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not is_litter(path.name)]


class _ClassFolders:
    """The image files below a folder of class folders, by class.

    Links are followed, and each folder is read once: those that lie there first, then those that links lead to. So no
    label depends on the order of names, and a loop of links ends. A link to a file that is read under its own name is
    left out too. Any other link to a file is an image: stores that keep equal files once are folders of such links.
    """

    def __init__(self, folder: Path, root: Path, tally: Tally) -> None:
        """List them.

        Args:
            folder: of the class folders.
            root: of the source, to which names in messages are relative.
            tally: counts what is left out.

        Raises:
            ConfigError: a link would make an image one of two classes.
            OSError: a file or folder cannot be read, or is not where a link leads to.
        """
        self.images: dict[str, list[str]] = {}
        self._root, self._tally = root, tally
        # The class and the path of each folder that was read, by its real path.
        self._read: dict[Path, tuple[str, str]] = {}
        # What is still to be read: class, path and real path.
        self._folders: deque[tuple[str, str, Path]] = deque()
        self._links: deque[tuple[str, str, Path]] = deque()
        self._file_links: list[tuple[str, str]] = []
        # The real paths of folders that links to files lead into.
        self._resolved: dict[Path, Path] = {}
        top = folder.resolve()
        for entry in self._entries(str(folder)):
            if entry.is_dir():
                self._found_folder(entry.name, entry, top)
            else:
                what = "images in no class folder" if is_image_name(entry.name) else NO_IMAGE
                self._leave_out(what, entry.path)
        while self._folders or self._links:
            self._read_folder(*(self._folders or self._links).popleft())
        for kind, path in self._file_links:
            self._take_link(kind, path)
        # In the order of torchvision's ImageFolder: by folder, then by name.
        self.images = {kind: sorted(self.images[kind], key=os.path.split) for kind in sorted(self.images)}

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What a folder holds, by name, but for litter."""
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if is_litter(entry.name):
                self._leave_out(LITTER_REASON, entry.path)
            elif entry.is_symlink():
                entry.stat()  # raises where it leads to nothing: a class or an image may be missing
        return [entry for entry in entries if not is_litter(entry.name)]

    def _leave_out(self, reason: str, path: str) -> None:
        self._tally.add(reason, self._name(path))

    def _name(self, path: str) -> str:
        return as_text(path.removeprefix(f"{self._root}/"))

    def _found_folder(self, kind: str, entry: os.DirEntry[str], real: Path) -> None:
        """Read a folder later, in a folder of this real path: links after all that lies there itself."""
        if not entry.is_symlink():
            self._folders.append((kind, entry.path, real / entry.name))
        else:
            target = Path(entry.path).resolve()
            if real.is_relative_to(target):
                self._leave_out("links to a folder that they lie in", entry.path)
                return
            self._links.append((kind, entry.path, target))
        self.images.setdefault(kind, [])

    def _read_folder(self, kind: str, path: str, real: Path) -> None:
        if real in self._read:
            self._leave_out_second(kind, path, *self._read[real])
            return
        self._read[real] = kind, path
        for entry in self._entries(path):
            if entry.is_dir():
                self._found_folder(kind, entry, real)
            elif not is_image_name(entry.name):
                self._leave_out(NO_IMAGE, entry.path)
            elif not entry.is_file():
                self._leave_out("pipes, sockets or devices", entry.path)  # opening a pipe would wait for ever
            elif entry.is_symlink():
                self._file_links.append((kind, entry.path))
            else:
                self.images[kind].append(entry.path)

    def _take_link(self, kind: str, path: str) -> None:
        # To resolve each link by itself would take most of the time of a folder of links alone.
        linked = Path(path).parent / Path(path).readlink()
        if linked.parent not in self._resolved:
            self._resolved[linked.parent] = linked.parent.resolve()
        target = self._resolved[linked.parent] / linked.name
        if target.is_symlink():
            target = target.resolve()
        if target.parent in self._read and is_image_name(target.name) and not is_litter(target.name):
            owner, its_path = self._read[target.parent]
            self._leave_out_second(kind, path, owner, f"{its_path}/{target.name}")
        else:
            self.images[kind].append(path)

    def _leave_out_second(self, kind: str, path: str, owner: str, first: str) -> None:
        """Leave out what a link leads to, and what is read already."""
        if kind != owner:
            raise _of_two_classes(self._name(path), self._name(first))
        self._leave_out("links to what is read already", path)


def _existing_folder(config: SourceConfig) -> Path:
    root = Path(str(config.path)).expanduser()
    if not root.is_dir():
        raise ConfigError(f"source.path: there is no folder {root}.")
    return root


def _split_folders(root: Path, config: SourceConfig) -> dict[str, Path]:
    """Where each split's class folders are: `root/<split>` if that holds folders, else `root` itself."""
    names = config.split or ("train",)
    folders = {name: root / name for name in names}
    nested = [name for name, folder in folders.items() if folder.is_dir() and _subfolders(folder)]
    if len(nested) == len(names):
        return folders
    if len(names) > 1:
        missing = next(name for name in names if name not in nested)
        raise ConfigError(f"source.split: there is no folder {root / missing} with class folders in it.")
    inside = [path for folder in _subfolders(root) for path in folder.iterdir() if not is_litter(path.name)]
    if any(map(Path.is_dir, inside)) and not any(is_image_name(path.name) and path.is_file() for path in inside):
        raise ConfigError(f"source.split: there is no folder {root / names[0]} with class folders in it.")
    return {names[0]: root}


# ----------------------------------------------------------------------------------------- torchvision

# Where torchvision's classification datasets keep the labels of all rows.
LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
SAMPLE_ATTRIBUTES = ("_samples", "samples", "imgs")


@dataclass(frozen=True)
class ItemRows(Rows):
    """A dataset whose items are (Pillow image, class)."""

    dataset: Any

    def _open(self, row: int) -> Image.Image:
        image, _ = self.dataset[row]
        return image  # type: ignore[no-any-return]

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        return [partial(self._open, int(row)) for row in rows]


def _open_torchvision(config: SourceConfig, need_labels: bool) -> Source:
    del need_labels  # a classification dataset has labels
    import torchvision

    kind = getattr(torchvision.datasets, str(config.path), None)
    if str(config.path).startswith("LSUN"):
        raise ConfigError(
            "source.path: torchvision reads LSUN through a pickle beside it, which anyone may have written."
        )
    if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise ConfigError(f"source.path: torchvision has no dataset class {config.path}; CIFAR10 is one.")
    names = config.split or ("train",)
    datasets = {name: _make_torchvision(kind, name, config) for name in names}
    labels = {name: _torchvision_labels(dataset, config) for name, dataset in datasets.items()}
    own = getattr(next(iter(datasets.values())), "classes", None)
    named = own if isinstance(own, list | tuple) and all(isinstance(name, str) for name in own) else None
    content: list[bytes | str] = []
    for name, dataset in datasets.items():
        content += [
            name,
            labels[name].tobytes(),
            *_sampled(
                partial(_pixels, opener) for opener in ItemRows(dataset).openers(spread(len(dataset), DIGEST_SAMPLES))
            ),
        ]
    options = {key: value for key, value in config.kwargs.items() if key not in ("root", "download")}
    return Source(
        splits=tuple(Split(name, labels[name], ItemRows(datasets[name])) for name in names),
        classes=class_names(config, named),
        digest=digest_of([str(config.path), json.dumps(options, sort_keys=True, default=str), *content]),
        origin=Origin(name=str(config.path), credit=f"torchvision.datasets.{config.path}"),
    )


def _make_torchvision(kind: Any, split: str, config: SourceConfig) -> Any:
    accepted = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    chooses = next((key for key in ("train", "split") if key in accepted), None)
    if chooses in config.kwargs:
        raise ConfigError(f"source.kwargs.{chooses}: name the split with source.split instead.")
    if chooses == "train":
        _check_splits([split], ("train", "test"))
        arguments: dict[str, Any] = {"train": split == "train"}
    elif chooses == "split":
        arguments = {"split": split}
    else:
        _check_splits([split], ("train",))
        arguments = {}
    try:
        return kind(**arguments, **config.kwargs)
    except (RuntimeError, ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"source: torchvision's {config.path} cannot be opened: {first_line(error)}") from None


def _torchvision_labels(dataset: Any, config: SourceConfig) -> Labels:
    values: Any = next((getattr(dataset, name) for name in LABEL_ATTRIBUTES if hasattr(dataset, name)), None)
    if values is None:
        samples = next((getattr(dataset, name) for name in SAMPLE_ATTRIBUTES if hasattr(dataset, name)), None)
        # Datasets without either are read once from end to end: slow, but right.
        values = [sample[1] for sample in (dataset if samples is None else samples)]
    labels = np.asarray(values) if len(dataset) else np.empty(0, np.int64)
    if labels.shape != (len(dataset),) or labels.dtype.kind not in "iu":
        raise ConfigError(f"source.path: {config.path} does not give one class for each image, so it cannot be used.")
    return labels.astype(np.int64)


def _unread(error: Exception) -> PipelineError:
    """The sentence for an image that the machine failed to read, or that is gone, before a run."""
    return PipelineError(
        f"source: an image or a folder cannot be read: {shortened(first_line(error))}; mend that first."
    )


def _sampled(reads: Iterable[Callable[[], bytes]]) -> Iterable[bytes]:
    """What some images hold, for a digest; what cannot be read is told apart by the kind of its error."""
    for read in reads:
        try:
            yield read()
        except ConfigError:
            raise
        except Exception as error:  # as in read_image
            if is_of_the_machine(error):
                raise _unread(error) from None
            yield type(error).__name__.encode()


def _pixels(opener: Opener) -> bytes:
    """The pixels of an image that a dataset of torchvision decodes by itself; none that Pillow would warn of."""
    # It may have been raised for what was read before.
    Image.MAX_IMAGE_PIXELS = PILLOW_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return np.asarray(opener()).tobytes()


def spread(count: int, samples: int) -> list[int]:
    """Up to `samples` row numbers, evenly spaced over `count` rows."""
    return np.unique(np.linspace(0, count - 1, min(samples, count)).astype(np.int64)).tolist() if count else []


# ----------------------------------------------------------------------------------------- huggingface


@dataclass(frozen=True)
class ArrowRows(Rows):
    """Rows of a `datasets.Dataset`; images stay encoded bytes until a worker opens them.

    Images given as a path are opened only below `allowed`: a dataset must not be able to read other files
    of the machine into a dataset that is published.
    """

    images: Any
    carried: Any | None
    allowed: tuple[Path, ...]

    def openers(self, rows: Sequence[int]) -> list[Opener]:
        return [partial(open_cell, cell, self.allowed) for cell in self.cells(rows)]

    def cells(self, rows: Sequence[int]) -> list[dict[str, Any] | None]:
        """The image cells as stored: {bytes, path}, or None."""
        cells: list[dict[str, Any] | None] = self.images[list(map(int, rows))].column(0).to_pylist()
        return cells

    def kept(self, rows: Sequence[int]) -> pa.Table:
        if self.carried is None:
            return pa.table({})
        return self.carried[list(map(int, rows))].replace_schema_metadata(None)

    def file(self, row: int) -> str | None:
        cell = self.cells([row])[0]
        if not cell or cell["bytes"] is not None or cell["path"] is None:
            return None
        path = Path(cell["path"])
        return next((str(path.relative_to(folder)) for folder in self.allowed if path.is_relative_to(folder)), None)


def open_cell(cell: Mapping[str, Any] | None, allowed: tuple[Path, ...]) -> Image.Image:
    """Open an image as `datasets` stores it, {bytes, path}; a path only below the folders that are allowed.

    Raises:
        UndecodableError: there is none, or its path leads elsewhere.
    """
    if cell and cell["bytes"] is not None:
        return open_image(io.BytesIO(cell["bytes"]))
    return open_image(_path_of(cell, allowed))


# What begins like an address, or is long and of base64's letters alone.
NO_PATH = re.compile(r"\w+://|data:|[\w+/=\s-]{100,}\Z")


def _path_of(cell: Mapping[str, Any] | None, allowed: tuple[Path, ...]) -> Path:
    if not cell or cell["path"] is None:
        raise UndecodableError("the row has no image")
    path = Path(cell["path"])
    candidates = [path] if path.is_absolute() else [folder / path for folder in allowed]
    for candidate in map(Path.resolve, candidates):
        if any(candidate.is_relative_to(folder) for folder in allowed):
            return candidate
    raise UndecodableError("its path leads out of the source's own folder")


def _file_digest(cell: Mapping[str, Any] | None, allowed: tuple[Path, ...]) -> bytes:
    path = _path_of(cell, allowed)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        text = str(cell and cell["path"])
        if not NO_PATH.match(text):
            raise
        raise ConfigError(
            f"source.image_column: it holds text that is no path, {text[:20]!r} and so on; base64, or an address? "
            "Store the images' bytes instead."
        ) from None


def _open_huggingface(config: SourceConfig, need_labels: bool, check_tars: CheckTars | None) -> Source:
    import datasets

    tally = Tally()
    opened, allowed = _load_splits(config, need_labels, tally, check_tars)
    first = next(iter(opened.values()))
    image_column = find_image_column(first.features, config)
    label_column = find_label_column(first.features, config, need_labels)
    _check_kept(first.features, config)
    _check_alike(opened, [image_column, *([label_column] if label_column else []), *config.keep_columns])
    labels, classes = _read_labels(opened, label_column, config)
    splits: list[Split] = []
    content: list[bytes | str] = []
    for name, dataset in opened.items():
        try:
            undecoded = dataset.cast_column(image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise ConfigError(
                f"source.image_column: {image_column} does not hold images: {first_line(error)}"
            ) from None
        images = undecoded.select_columns([image_column]).with_format("arrow")
        carried = (
            dataset.select_columns(list(config.keep_columns)).with_format("arrow") if config.keep_columns else None
        )
        rows = ArrowRows(images, carried, allowed)
        splits.append(Split(name, labels[name], rows))
        content += [name, labels[name].tobytes(), *_arrow_content(rows, len(dataset))]
    return Source(
        splits=tuple(splits),
        classes=classes,
        digest=digest_of([*content, json.dumps(sorted(config.keep_columns))]),
        kept={name: first.features[name] for name in config.keep_columns},
        origin=_huggingface_origin(config, first),
        left_out=tally.left_out(),
    )


def _huggingface_origin(config: SourceConfig, dataset: Any) -> Origin:
    """What a dataset of the Hub, or a local copy of one, says of itself; nothing is asked of the network for it."""
    from huggingface_hub import try_to_load_from_cache

    path, stated = str(config.path), str(dataset.info.license or "").strip() or None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return Origin(name=folder.resolve().name, license=stated or card_license(folder / "README.md"))
    revision = revision_of(dataset.cache_files)
    # `datasets` has just read the card of that commit.
    card = try_to_load_from_cache(path, "README.md", repo_type="dataset", revision=revision)
    return Origin(
        name=path.rpartition("/")[2],
        repository=path,
        revision=revision,
        license=stated or (card_license(Path(card)) if isinstance(card, str) else None),
    )


def _check_alike(opened: dict[str, Any], columns: Sequence[str]) -> None:
    """Splits that were saved together may still differ in a column, or in the order of its class names."""
    first = next(iter(opened.values()))
    for name, dataset in opened.items():
        for column in columns:
            if dataset.features.get(column) != first.features[column]:
                raise ConfigError(
                    f"source.split: column {column} of split {name} is missing or differs from the first split's."
                )


def _load_splits(
    config: SourceConfig, need_labels: bool, tally: Tally, check_tars: CheckTars | None
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The wanted splits as `datasets.Dataset`s, and the folders their image paths may lead to.

    `tally` counts the files of a local folder that are in none of them.
    """
    import datasets
    from huggingface_hub import constants

    path = str(config.path)
    folder = Path(path).expanduser()
    if "://" in path:
        raise ConfigError("source.path: a URL can be streamed only; set source.streaming: true.")
    if not folder.is_dir() and (path.startswith((".", "~", "/")) or path.count("/") > 1):
        raise ConfigError(f"source.path: there is no folder {folder}.")
    allowed: tuple[Path, ...] = (folder.resolve(),) if folder.is_dir() else ()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            if not any(folder.rglob("*.arrow")):
                raise ConfigError(f"source.path: {folder} has no rows.")
            _check_saved(folder)
            loaded = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            cache = Path(datasets.config.HF_DATASETS_CACHE) / f"fgsm-folder-{_listing_digest(folder)}"
            where = functools.partial(_folder_builder, folder.resolve(), config.name, cache_dir=str(cache))
            builder = _load_own(where, config, need_labels, check_tars)
            loaded = builder.as_dataset()
            _count_unread(builder, loaded, folder.resolve(), tally)
        else:
            cache, hub = Path(datasets.config.HF_DATASETS_CACHE).resolve(), Path(constants.HF_HUB_CACHE).resolve()
            own = path.replace("/", "--")
            allowed = (cache / "downloads", cache / path.replace("/", "___"), hub / f"datasets--{own}")
            where = functools.partial(datasets.load_dataset_builder, path, config.name, revision=config.revision)
            loaded = _load_own(where, config, need_labels, check_tars).as_dataset()
    except PipelineError:
        raise
    except Exception as error:  # a dozen exception types of three libraries; all mean the same here
        if "corresponds to no data" in str(error):
            raise ConfigError(f"source.path: {path} is empty: it has no rows.") from None
        looked = "" if folder.is_dir() else " (no such local folder, so it was looked up on the Hub)"
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise ConfigError(f"source.path: {path} cannot be opened{looked}: {first_line(cause or error)}") from error
    if isinstance(loaded, datasets.Dataset):
        # A saved slice is called `train[:10%]`, or `train+test`.
        loaded = {re.split(r"[^\w.-]", str(loaded.split or "train"))[0]: loaded}
    return {name: loaded[name] for name in chosen_splits(config, list(loaded))}, allowed


def _load_own(load: Callable[..., Any], config: SourceConfig, need_labels: bool, check_tars: CheckTars | None) -> Any:
    """A builder of `datasets` that has made the splits, out of files of its own only.

    Of Parquet it is told what to read where it would fail over other columns, or read other types out of the files of a
    split that nobody asked for. Told nothing, it finds what it has cached without a network too.
    """
    import datasets
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    builder = load()
    files = own_files(builder, config)
    if files and isinstance(builder, Parquet | Arrow):
        read_schema = pq.read_schema if isinstance(builder, Parquet) else _arrow_schema
        schemas: dict[str, pa.Schema] = {}
        sizes: dict[str, int] = {}
        wanted = chosen_splits(config, list(files))
        for split in wanted:
            # Of the Hub's files these are the copies in its cache, which the builder reads too.
            places = datasets.DownloadManager().download([place for _, place in files[split]])
            schemas |= {name: read_schema(place) for (name, _), place in zip(files[split], places, strict=True)}
            if isinstance(builder, Parquet) and not all(map(_begins_with_rows, places)):
                sizes = {"batch_size": DIGEST_BATCH}  # or it would take the rows of that row group, which are none
        stated = stated_features(builder, load)
        columns = find_columns(schemas, stated, config, need_labels)
        alike = all(_is_of_datasets(schema) and schema == next(iter(schemas.values())) for schema in schemas.values())
        if isinstance(builder, Parquet) and not (alike and (stated is not None or next(iter(files)) in wanted)):
            builder = load(columns=list(columns.features), features=datasets.Features(columns.features), **sizes)
        elif sizes:
            builder = load(**sizes)
    if isinstance(builder, WebDataset) and check_tars:
        listed = [file for own in files.values() for file in own]
        places = datasets.DownloadManager().download([place for _, place in listed])
        check_tars((name, place) for (name, _), place in zip(listed, places, strict=True))
    builder.download_and_prepare()
    return builder


def _begins_with_rows(path: str) -> bool:
    metadata = pq.read_metadata(path)
    return not metadata.num_row_groups or metadata.row_group(0).num_rows > 0


def _folder_builder(folder: Path, name: str | None, **options: Any) -> Any:
    """The builder of `datasets` for a local folder; of a folder of images it reads those that are read elsewhere here.

    Raises:
        ConfigError: an image's name is no UTF-8, or a link makes an image one of two classes.
    """
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    builder, failure = None, None
    try:
        builder = local_builder(folder, name, **options)
    except (datasets.exceptions.DataFilesNotFoundError, ValueError) as error:
        failure = error
    found = builder.config.data_files.values() if builder is not None else ()
    described = any(Path(file).name in ImageFolder.METADATA_FILENAMES for files in found for file in files)
    if builder is None or (described and not isinstance(builder, ImageFolder)):
        # A split may be of images alone whose endings its own list lacks, such as AVIF's.
        with literal_folders():
            images = datasets.load_dataset_builder("imagefolder", name, data_dir=str(folder), **options)
        if all(any(map(is_image_name, files)) for files in images.config.data_files.values()):
            builder = images
    if builder is None:
        assert failure is not None
        raise failure
    if isinstance(builder, ImageFolder):
        _take_images(builder, folder)
    return builder


def _take_images(builder: Any, folder: Path) -> None:
    """Have `datasets` read what Pillow opens, and no litter. Which file is of which split stays its choice."""
    from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns

    builder.EXTENSIONS = sorted(image_suffixes())
    found, place = builder.config.data_files, folder.as_posix()
    with literal_folders():
        every = DataFilesDict.from_patterns(get_data_patterns(place), base_path=place)
    for split, files in found.items():
        # Where a card says which files there are, it is left at that.
        more = every.get(split, [])
        taken = [
            file
            for file in (more if set(files) <= set(more) else files)
            if (is_image_name(file) or Path(file).suffix in ARCHIVES or Path(file).name in builder.METADATA_FILENAMES)
            and not any(map(is_litter, Path(file).relative_to(folder).parts))
        ]
        for file in taken:
            if not file.isascii() and as_text(file) != file:
                raise ConfigError(
                    f"source.path: the name of {as_text(file)} is no UTF-8, and `datasets` holds no other; rename it, "
                    "or set source.kind: imagefolder."
                )
        found[split] = DataFilesList(_without_second(taken), files.origin_metadata)


def _without_second(files: Sequence[str]) -> list[str]:
    """Files of which a link to another one of them is left out."""
    own, kept = set(files), []
    for file in files:
        target = Path(file).resolve() if Path(file).is_symlink() else None
        if str(target) not in own:
            kept.append(file)
        elif target is not None and target.parent != Path(file).parent:
            raise _of_two_classes(file, str(target))
    return kept


def _of_two_classes(link: str, first: str) -> ConfigError:
    return ConfigError(
        f"source.path: {link} leads to {first}, whose images would then be of two classes; remove the link."
    )


def _count_unread(builder: Any, loaded: Mapping[str, Any], folder: Path, tally: Tally) -> None:
    """Count the files of a local folder that `datasets` reads for no split, but for the card.

    Raises:
        OSError: a file is not where a link leads to.
    """
    read = {file for files in (builder.config.data_files or {}).values() for file in files}
    if any(Path(file).name in getattr(builder, "METADATA_FILENAMES", ()) for file in read):
        # Then only images that it names are rows.
        read = {file for file in read if not is_image_name(file)} | _named_images(loaded)
    waiting = deque([folder])
    while waiting:
        current = waiting.popleft()
        inside = sorted(current.iterdir())
        if not inside:
            tally.add("empty folders", as_text(str(current.relative_to(folder))))
        for path in inside:
            name = as_text(str(path.relative_to(folder)))
            if str(path) in read or path == folder / "README.md":
                continue
            if is_litter(path.name):
                tally.add(LITTER_REASON, name)
            elif stat.S_ISDIR(path.stat().st_mode):
                if path.is_symlink():
                    tally.add("links to folders, which `datasets` does not follow", name)
                else:
                    waiting.append(path)
            else:
                tally.add("files that `datasets` reads for no split", name)


def _named_images(loaded: Mapping[str, Any]) -> set[str]:
    import datasets

    columns = (
        dataset.data.table.column(name)
        for dataset in loaded.values()
        for name, feature in dataset.features.items()
        if isinstance(feature, datasets.Image)
    )
    return {path for column in columns for path in pc.struct_field(column, "path").to_pylist()}


def stated_features(builder: Any, load: Callable[..., Any]) -> Mapping[str, Any] | None:
    """The features that a dataset's card states; a builder may have those of its cache, which may be of other files.

    Args:
        builder: of the dataset.
        load: makes another one.
    """
    features: Mapping[str, Any] | None = builder.info.features
    if features is not None and Path(builder.cache_dir).exists():
        with tempfile.TemporaryDirectory() as empty:
            features = load(cache_dir=empty).info.features
    return features


def _arrow_schema(path: str) -> pa.Schema:
    with pa.OSFile(path) as file:
        try:
            return pa.ipc.open_stream(file).schema
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_file(file).schema


# Held while `datasets` looks for the files of a local folder.
_LISTING = threading.Lock()


@contextlib.contextmanager
def literal_folders() -> Iterator[None]:
    """Have `datasets` take local folders literally.

    It makes a folder's own name a part of the pattern of its files: of `run[1]` it finds none, and of `run*` those of
    other folders. So within this the function that resolves its patterns escapes the folder.
    """
    from datasets import data_files

    resolve = data_files.resolve_pattern

    @functools.wraps(resolve)
    def escaped(pattern: str, base_path: str, *arguments: Any, **keywords: Any) -> Any:
        return resolve(pattern, glob.escape(base_path), *arguments, **keywords)

    with _LISTING:
        data_files.resolve_pattern = escaped
        try:
            yield
        finally:
            data_files.resolve_pattern = resolve


def local_builder(folder: Path, name: str | None, **options: Any) -> Any:
    """The builder that `datasets` has for a local folder.

    Raises:
        ConfigError: its path can be none for `datasets`.
    """
    import datasets

    if "::" in str(folder.resolve()):
        raise ConfigError(f"source.path: `datasets` takes :: in a path for a chain of addresses; rename {folder}.")
    with literal_folders():
        return datasets.load_dataset_builder(str(folder.resolve()), name, **options)


def own_files(builder: Any, config: SourceConfig) -> dict[str, list[tuple[str, str]]]:
    """The (name, place) of the files of each split that a builder of `datasets` has found; nothing of them was read.

    A dataset's card may name any file of this machine, or of another dataset: only its own are read into one that is
    published. A link in a local folder is followed, as the cache of the Hub is made of them.

    Raises:
        ConfigError: one lies elsewhere.
    """
    folder = Path(str(config.path)).expanduser()
    hub = rf"hf://datasets/{re.escape(str(builder.repo_id))}@[^/]+/"
    start = re.compile(re.escape(f"{folder.resolve()}/") if folder.is_dir() else hub)
    files: dict[str, list[tuple[str, str]]] = {}
    for split, places in (builder.config.data_files or {}).items():
        for place in map(str, places):
            name = start.sub("", place, count=1)
            if not start.match(place) or ".." in name.split("/"):
                raise ConfigError(
                    f"source.path: the card of {config.path} names files elsewhere ({place.rpartition('/')[2]}), and "
                    "only a dataset's own are read."
                )
            files.setdefault(str(split), []).append((name, place))
    return files


def _check_saved(folder: Path) -> None:
    """What a `save_to_disk` folder lists of splits and files is its own: `datasets` would open any path there.

    Raises:
        ConfigError: it lists something else.
    """
    listed = []
    for path in (folder / "dataset_dict.json", *folder.rglob("state.json")):
        if path.is_file():
            content = json.loads(path.read_bytes())
            listed += [*content.get("splits", ()), *(file["filename"] for file in content.get("_data_files", ()))]
    for name in listed:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"source.path: {folder} lists {name!r}, which is no file of its own.")


def _listing_digest(folder: Path) -> str:
    """A digest of a folder's files by name, size and time.

    `datasets` keys its cache of a local folder that has a card by neither time nor content, and would
    return the rows it saw first.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = ((path.relative_to(folder), path.stat()) for path in files)
    listing = (f"{path}:{state.st_size}:{state.st_mtime_ns}" for path, state in states)
    return digest_of([str(folder.resolve()), *listing])


@dataclass(frozen=True)
class Columns:
    """Which columns of a table become what, and the features of `datasets` that they have."""

    image: str
    label: str | None
    kept: tuple[str, ...]
    features: Mapping[str, Any]


def find_columns(
    schemas: Mapping[str, pa.Schema], stated: Mapping[str, Any] | None, config: SourceConfig, need_labels: bool
) -> Columns:
    """The columns of a dataset's files that are used; they must mean the same in each file.

    Args:
        schemas: of the files, by their names.
        stated: the features that the dataset's card states, if it does.
        config: the `source` section.
        need_labels: whether a dataset without a label column is an error.

    Raises:
        ConfigError: a column is not there, or differs between two files: the same numbers would mean other classes.
    """
    first, schema = next(iter(schemas.items()))
    features = {**column_features(schema), **(stated or {})}
    image = find_image_column(features, config)
    label = find_label_column(features, config, need_labels)
    _check_kept(features, config)
    used = dict.fromkeys((image, *([label] if label else []), *config.keep_columns))
    for name in used:
        if isinstance(features[name], pa.DataType):
            raise ConfigError(f"source: column {name} holds {features[name]}, of which `datasets` has no type.")
    for file, other in schemas.items():
        own = column_features(other, used)
        for name in used:
            role = "image" if name == image else "label" if name == label else "kept"
            expected, here = (_meaning(features.get(name), role), _meaning(own.get(name), role))
            # A card may give a meaning to what files hold; but no other one than they state themselves.
            by_card = name in (stated or {}) and not here.startswith((CLASSES_OF, MISSING))
            if expected != here and not by_card:
                raise ConfigError(
                    f"source: column {name} holds {shortened(here)} in {file} and {shortened(expected)} in "
                    f"{'the card' if name in (stated or {}) else first}; the files of a dataset must agree, so write "
                    "one of them anew, or read them as two datasets."
                )
    return Columns(image, label, config.keep_columns, {name: features[name] for name in used})


def _check_kept(features: Mapping[str, Any], config: SourceConfig) -> None:
    for name in config.keep_columns:
        if name not in features:
            raise ConfigError(f"source.keep_columns: there is no column {name}; {column_listing(features)}.")


def column_features(schema: pa.Schema, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The features of `datasets` that some columns have, all by default; of a type without one, the type itself."""
    import datasets

    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        told = None
    features: dict[str, Any] = {}
    for name in schema.names if names is None else names:
        if (index := schema.get_field_index(name)) < 0:
            continue  # not there, or there twice
        kind = plain_type(schema.field(index).type)
        stated = told.get(name) if isinstance(told, dict) else None
        metadata = {"huggingface": json.dumps({"info": {"features": {name: stated}}})}
        features[name] = kind
        # What the metadata says may be of a version to come: then the type alone tells.
        for known in ([metadata] if stated else []) + [None]:
            with contextlib.suppress(Exception):  # the library has an error of its own for each case
                features[name] = datasets.Features.from_arrow_schema(pa.schema([(name, kind)], known))[name]
                break
    return features


def _is_of_datasets(schema: pa.Schema) -> bool:
    """Whether `datasets` has a type for each column of a file."""
    import datasets

    try:
        datasets.Features.from_arrow_schema(schema)
    except Exception:  # as in column_features
        return False
    return len(set(schema.names)) == len(schema.names) and all(plain_type(kind) == kind for kind in schema.types)


# How the two meanings begin that a card does not replace.
CLASSES_OF, MISSING = "the classes ", "nothing, as it is missing,"


def _meaning(feature: Any, role: str) -> str:
    """What a column holds, in words that are the same where it means the same."""
    import datasets

    if feature is None:
        return MISSING
    if isinstance(feature, datasets.ClassLabel):
        return f"{CLASSES_OF}{', '.join(feature.names or ())}"
    if role == "image" and not isinstance(feature, datasets.Value):
        return "structs of an image"
    kind = str(getattr(feature, "dtype", "")) if isinstance(feature, datasets.Value) else str(feature)
    if role == "label" and re.fullmatch(r"u?int\d+", kind):
        return "integers"
    return kind.replace("large_", "")


def plain_type(kind: pa.DataType) -> pa.DataType:
    """An Arrow type without dictionaries and views, which other libraries write for texts that repeat."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def column_listing(names: Iterable[str]) -> str:
    return f"the columns are {', '.join(names)}"


def _only(features: Mapping[str, Any], key: str, kind: Callable[[Any], bool], what: str) -> str | None:
    """The only column of that kind, None where there is none; several are an error."""
    found = [name for name, feature in features.items() if kind(feature)]
    if len(found) > 1:
        raise ConfigError(f"source.{key}: there are several {what} columns ({', '.join(found)}); name one.")
    return found[0] if found else None


def find_image_column(features: Mapping[str, Any], config: SourceConfig) -> str:
    import datasets

    if config.image_column is not None:
        if config.image_column not in features:
            raise ConfigError(
                f"source.image_column: there is no column {config.image_column}; {column_listing(features)}."
            )
        return config.image_column
    found = _only(features, "image_column", lambda feature: isinstance(feature, datasets.Image), "image")
    if found is None:
        raise ConfigError(f"source.image_column: no column holds images; {column_listing(features)}.")
    return found


def find_label_column(features: Mapping[str, Any], config: SourceConfig, need_labels: bool) -> str | None:
    import datasets

    if config.label_column is not None:
        if config.label_column not in features:
            raise ConfigError(
                f"source.label_column: there is no column {config.label_column}; {column_listing(features)}."
            )
        return config.label_column
    found = _only(features, "label_column", lambda feature: isinstance(feature, datasets.ClassLabel), "ClassLabel")
    if found is None and need_labels:
        raise ConfigError(
            "source.label_column: no column is a ClassLabel; name one of integers or strings "
            f"({column_listing(features)}), or set attack.label=prediction."
        )
    return found


def _read_labels(
    opened: dict[str, Any], column: str | None, config: SourceConfig
) -> tuple[dict[str, Labels], tuple[str, ...] | None]:
    """Labels of each split as class indices, and the class names if there are any."""
    import datasets

    if column is None:
        return {name: np.full(len(rows), UNLABELLED) for name, rows in opened.items()}, class_names(config, None)
    feature = next(iter(opened.values())).features[column]
    values = {
        name: rows.select_columns([column]).with_format("arrow")[:].column(0).combine_chunks()
        for name, rows in opened.items()
    }
    kind = next(iter(values.values())).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        found = sorted({text for array in values.values() for text in array.unique().to_pylist() if text is not None})
        classes = config.classes or tuple(found)
        unknown = [text for text in found if text not in classes]
        if unknown:
            raise ConfigError(f"source.classes: the label {unknown[0]!r} in column {column} is not among them.")
        indices = {name: pc.index_in(array, pa.array(classes, array.type)) for name, array in values.items()}
        return {name: _index_array(array) for name, array in indices.items()}, classes
    if not pa.types.is_integer(kind):
        raise ConfigError(f"source.label_column: {column} holds {kind}; labels are integers or strings.")
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    return {name: _index_array(array) for name, array in values.items()}, class_names(config, names)


def _index_array(array: pa.Array) -> Labels:
    filled = pc.fill_null(array.cast(pa.int64()), UNLABELLED)
    return np.array(filled.to_numpy(zero_copy_only=False), dtype=np.int64)


def _arrow_content(rows: ArrowRows, count: int) -> Iterable[bytes]:
    """The size of every image and the bytes of some: enough to notice a source that changed."""
    stored = pc.struct_field(rows.images.data.table.column(0), "bytes")
    yield pc.fill_null(pc.binary_length(stored), UNLABELLED).to_numpy().astype(np.int64).tobytes()
    for cell in rows.cells(spread(count, DIGEST_SAMPLES)):
        if cell and cell["bytes"] is not None:
            yield cell["bytes"]
        else:
            yield from _sampled([partial(_file_digest, cell, rows.allowed)])
    # Carried-through columns are copied as they are, so all of them count.
    for start in range(0, count if rows.carried is not None else 0, DIGEST_BATCH):
        table = rows.kept(range(start, min(start + DIGEST_BATCH, count))).combine_chunks()
        yield from (batch.serialize().to_pybytes() for batch in table.to_batches())
