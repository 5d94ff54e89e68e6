"""Folders of class folders: an image's folder is its class, as in torchvision's ImageFolder."""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.config.schema import SourceConfig
from pipeline.config.section import anchored, home
from pipeline.core.errors import ConfigError
from pipeline.core.images import is_image_name, open_image
from pipeline.core.left_out import Tally
from pipeline.core.origin import Origin
from pipeline.sources.base import DIGEST_SAMPLES, IndexedSource, checked, digest_of, spread, tell_unsplit
from pipeline.sources.files import LITTER_REASON, as_text, is_litter, of_two_classes, unread


class ImageFolderConfig(SourceConfig):
    """A folder with a folder of images for each class."""

    kind: Literal["imagefolder"]
    """A folder with a folder of images for each class."""
    path: str
    """The folder of the class folders. Where it holds split folders, `path/train/cat/1.jpg`, name them in `split`."""

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        if isinstance(path := values.get("path"), str):
            values["path"] = anchored(path, folder)

    @property
    def folder(self) -> Path:
        return home(self.path)

    def check_paths(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(f"source.path: there is no folder {self.folder}.")

    @property
    def reads(self) -> tuple[Path, ...]:
        return (self.folder,)


@dataclass(frozen=True, kw_only=True)
class FolderSource(IndexedSource[Sequence[str]]):
    """Image files by their paths, below `root`."""

    root: str

    def open(self, cell: Any) -> Image.Image:
        return open_image(self.rows[cell["split"]][cell["row"]])

    def name_of(self, cell: Any) -> str:
        return as_text(self.rows[cell["split"]][cell["row"]].removeprefix(f"{self.root}/"))


def open_imagefolder(config: ImageFolderConfig, *, need_labels: bool) -> FolderSource:
    """Find the images of each class, all of which are labelled. Errors are those of
    `open_source`."""
    config.check_paths()
    root = config.folder
    tally = Tally()
    try:
        folders = _split_folders(root, config)
        if config.split is None and root not in folders.values():
            for beside in sorted({*_subfolders(root)} - {*folders.values()}):
                tally.add("folders beside train, as source.split names none", as_text(beside.name))
        listed = {name: _ClassFolders(folder, root, tally).images for name, folder in folders.items()}
        classes = _common_classes(listed, root, tally)
        paths = {name: [path for own in images.values() for path in own] for name, images in listed.items()}
        digest = _digest(paths, folders)
    except OSError as error:
        raise unread(error) from None
    if config.split is None and root in folders.values():
        tell_unsplit(as_text(str(root)))
    counts = {name: [len(own) for own in images.values()] for name, images in listed.items()}
    return checked(
        FolderSource(
            labels={name: np.repeat(np.arange(len(own)), own).astype(np.int64) for name, own in counts.items()},
            rows=paths,
            root=str(root),
            classes=tuple(classes),
            digest=digest,
            origin=Origin(name=as_text(root.resolve().name)),
            left_out=tally.left_out(),
            need_labels=need_labels,
        )
    )


def _digest(paths: Mapping[str, Sequence[str]], folders: Mapping[str, Path]) -> str:
    """Of the names and sizes of all images, and the bytes of some."""
    listing = (
        f"{name}/{path.removeprefix(f'{folders[name]}/')}:{Path(path).stat().st_size}"
        for name, own in paths.items()
        for path in own
    )
    sampled = (Path(own[row]).read_bytes() for own in paths.values() for row in spread(len(own), DIGEST_SAMPLES))
    return digest_of([*listing, *sampled])


def _common_classes(listed: Mapping[str, Mapping[str, Sequence[str]]], root: Path, tally: Tally) -> list[str]:
    """The class names, which are the same for all splits; a class may be without images in some of them, not in all."""
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
        raise ConfigError(f"source.path: {root} has two class folders whose names look the same; rename one of them.")
    return classes


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not is_litter(path.name)]


class _ClassFolders:
    """The image files below a folder of class folders, by class.

    Links are followed, and each folder is read once: those that lie there first, then those that links lead to. So no
    label depends on the order of names, and a loop of links ends. A link to a file that is read under its own name is
    left out too. Any other link to a file is an image: stores that keep equal files once are folders of such links.

    Raises:
        ConfigError: a link would make an image one of two classes.
        OSError: a file or folder cannot be read, or is not where a link leads to.
    """

    def __init__(self, folder: Path, root: Path, tally: Tally) -> None:
        self.images: dict[str, list[str]] = {}
        # Names in messages are relative to the root.
        self._root, self._tally = root, tally
        # The class and the path of each folder that was read, by its real path.
        self._read: dict[Path, tuple[str, str]] = {}
        # What is still to be read: class, path and real path; the folder of class folders has no class.
        self._folders: deque[tuple[str | None, str, Path]] = deque([(None, str(folder), folder.resolve())])
        self._links: deque[tuple[str, str, Path]] = deque()
        self._file_links: list[tuple[str, str]] = []
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

    def _read_folder(self, kind: str | None, path: str, real: Path) -> None:
        if kind is not None:
            if real in self._read:
                self._leave_out_second(kind, path, *self._read[real])
                return
            self._read[real] = kind, path
        for entry in self._entries(path):
            if entry.is_dir():
                self._found_folder(kind or entry.name, entry, real)
            elif not is_image_name(entry.name):
                self._leave_out("files that are no image by their name", entry.path)
            elif kind is None:
                self._leave_out("images in no class folder", entry.path)
            elif not entry.is_file():
                self._leave_out("pipes, sockets or devices", entry.path)  # opening a pipe would wait for ever
            elif entry.is_symlink():
                self._file_links.append((kind, entry.path))
            else:
                self.images[kind].append(entry.path)

    def _take_link(self, kind: str, path: str) -> None:
        target = Path(path).resolve()
        if target.parent in self._read and is_image_name(target.name) and not is_litter(target.name):
            owner, its_path = self._read[target.parent]
            self._leave_out_second(kind, path, owner, f"{its_path}/{target.name}")
        else:
            self.images[kind].append(path)

    def _leave_out_second(self, kind: str, path: str, owner: str, first: str) -> None:
        """Leave out what a link leads to, and what is read already."""
        if kind != owner:
            raise of_two_classes(self._name(path), self._name(first))
        self._leave_out("links to what is read already", path)


def split_folders(root: Path) -> list[str]:
    """The names of the split folders of a folder, sorted; none where its folders hold images, and so are classes."""
    folders = _subfolders(root)
    inside = [path for folder in folders for path in folder.iterdir() if not is_litter(path.name)]
    if not any(map(Path.is_dir, inside)) or any(is_image_name(path.name) and path.is_file() for path in inside):
        return []
    return sorted(folder.name for folder in folders if _subfolders(folder))


def _split_folders(root: Path, config: ImageFolderConfig) -> dict[str, Path]:
    """Where each split's class folders are: `root/<split>` if that holds folders, else `root` itself."""
    names = config.split or ("train",)
    folders = {name: root / name for name in names}
    missing = [folder for folder in folders.values() if not (folder.is_dir() and _subfolders(folder))]
    if not missing:
        return folders
    if len(names) > 1 or split_folders(root):
        raise ConfigError(f"source.split: there is no folder {missing[0]} with class folders in it.")
    return {names[0]: root}
