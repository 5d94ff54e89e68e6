"""Datasets of torchvision, whose items are a Pillow image and its class."""

import inspect
import json
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.config.schema import SourceConfig
from pipeline.config.section import anchored, home
from pipeline.core.errors import ConfigError, explained
from pipeline.core.images import PILLOW_PIXELS
from pipeline.core.origin import Origin
from pipeline.sources.base import (
    DIGEST_SAMPLES,
    IndexedSource,
    Labels,
    check_splits,
    checked,
    class_names,
    digest_of,
    spread,
)
from pipeline.sources.files import sampled

# Where torchvision's classification datasets keep the labels of all rows.
LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
SAMPLE_ATTRIBUTES = ("_samples", "samples", "imgs")


class TorchvisionConfig(SourceConfig):
    """A dataset class of torchvision; `path` is its name."""

    kind: Literal["torchvision"]
    """A classification dataset of torchvision."""
    path: str
    """The name of the dataset's class, such as CIFAR10 or MNIST."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that class, such as {root: data, download: true}."""
    classes: tuple[str, ...] | None = None
    """The class names, in the order of the labels, for data that does not name them."""

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        kwargs = values.get("kwargs")
        if isinstance(kwargs, dict) and isinstance(kwargs.get("root"), str):
            kwargs["root"] = anchored(kwargs["root"], folder)

    @property
    def reads(self) -> tuple[Path, ...] | None:
        if not {"root"} <= self.kwargs.keys() <= {"root", "download"}:
            return None  # others may name further files
        return (home(self.kwargs["root"]),)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.classes


@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(IndexedSource[Any]):
    """Datasets of (Pillow image, class), by split."""

    def open(self, cell: Any) -> Image.Image:
        image, _ = self.rows[cell["split"]][cell["row"]]
        return image  # type: ignore[no-any-return]


def open_torchvision(config: TorchvisionConfig, *, need_labels: bool) -> TorchvisionSource:
    """Make the dataset of each split, all of whose images are labelled. Errors are those of
    `open_source`."""
    import torchvision

    kind = getattr(torchvision.datasets, str(config.path), None)
    if str(config.path).startswith("LSUN"):
        raise ConfigError(
            "source.path: torchvision reads LSUN through a pickle beside it, which anyone may have written."
        )
    if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise ConfigError(f"source.path: torchvision has no dataset class {config.path}; CIFAR10 is one.")
    datasets = {name: _make_torchvision(kind, name, config) for name in config.split or ("train",)}
    labels = {name: _torchvision_labels(dataset, config) for name, dataset in datasets.items()}
    own = getattr(next(iter(datasets.values())), "classes", None)
    named = own if isinstance(own, list | tuple) and all(isinstance(name, str) for name in own) else None
    source = TorchvisionSource(
        labels=labels,
        rows=datasets,
        classes=class_names(config, named),
        digest="",
        origin=Origin(name=str(config.path), credit=f"torchvision.datasets.{config.path}"),
        need_labels=need_labels,
    )
    return checked(replace(source, digest=_digest(source, config)))


def _digest(source: TorchvisionSource, config: TorchvisionConfig) -> str:
    """Of all labels, and the pixels of some images."""
    options = {key: value for key, value in config.kwargs.items() if key not in ("root", "download")}
    content: list[bytes | str] = [str(config.path), json.dumps(options, sort_keys=True, default=str)]
    for name, labels in source.labels.items():
        cells = ({"split": name, "row": row} for row in spread(len(labels), DIGEST_SAMPLES))
        content += [name, labels.tobytes(), *sampled(partial(_pixels, source, cell) for cell in cells)]
    return digest_of(content)


def _make_torchvision(kind: Any, split: str, config: TorchvisionConfig) -> Any:
    accepted = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    chooses = next((key for key in ("train", "split") if key in accepted), None)
    if chooses in config.kwargs:
        raise ConfigError(f"source.kwargs.{chooses}: name the split with source.split instead.")
    if chooses != "split":
        check_splits([split], ("train", "test") if chooses else ("train",))
    arguments = {chooses: split == "train" if chooses == "train" else split} if chooses else {}
    refused = (RuntimeError, ValueError, TypeError, OSError, ImportError)
    with explained(f"source: torchvision's {config.path} cannot be opened", errors=refused, kind=ConfigError):
        return kind(**arguments, **config.kwargs)


def _torchvision_labels(dataset: Any, config: TorchvisionConfig) -> Labels:
    values: Any = next((getattr(dataset, name) for name in LABEL_ATTRIBUTES if hasattr(dataset, name)), None)
    if values is None:
        samples = next((getattr(dataset, name) for name in SAMPLE_ATTRIBUTES if hasattr(dataset, name)), None)
        # Datasets without either are read once from end to end: slow, but right.
        values = [sample[1] for sample in (dataset if samples is None else samples)]
    labels = np.asarray(values) if len(dataset) else np.empty(0, np.int64)
    if labels.shape != (len(dataset),) or labels.dtype.kind not in "iu":
        raise ConfigError(f"source.path: {config.path} does not give one class for each image, so it cannot be used.")
    return labels.astype(np.int64)


def _pixels(source: TorchvisionSource, cell: Any) -> bytes:
    """The pixels of an image that a dataset of torchvision decodes by itself; none that Pillow would warn of."""
    # It may have been raised for what was read before.
    Image.MAX_IMAGE_PIXELS = PILLOW_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return np.asarray(source.open(cell)).tobytes()
