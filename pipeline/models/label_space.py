"""Where a dataset's classes and a model's classes meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, listing


@dataclass(frozen=True)
class LabelSpace:
    """How labels and predictions translate.

    dataset_classes: names of the `label` column. to_model: (dataset classes,) int64, the model's index of
    each. recorded_classes: names of the `prediction` column, None where unknown. to_recorded: (model
    classes,) int64, what is recorded for each model index: the dataset's class where the two spaces match
    one to one, else the model's own index.
    """

    dataset_classes: tuple[str, ...]
    to_model: NDArray[np.int64]
    recorded_classes: tuple[str, ...] | None
    to_recorded: NDArray[np.int64]

    def model_labels(self, labels: Tensor) -> Tensor:
        """(N,) int64 dataset classes as the model's indices, on the same device; -1, unlabelled, stays."""
        to_model = torch.from_numpy(self.to_model).to(labels.device)
        return torch.where(labels == UNLABELLED, UNLABELLED, to_model[labels.clamp(min=0)])

    def target_index(self, target: str | int, classes: Sequence[str], model: str = "the model") -> int:
        """The model's index of a class that the config names as a target.

        A name is that of a class of the dataset; only where the dataset has none of that name is it one of the model's
        own. A number is that of a class as it stands in the `prediction` column.

        Args:
            target: the class.
            classes: the names of the `label` column. Where the dataset names no classes, these are the first model's,
                and another model's `dataset_classes` may be its own.
            model: what a message calls the model.

        Raises:
            ConfigError: there is no such class.
        """
        if isinstance(target, str) and target in classes[: len(self.to_model)]:
            return int(self.to_model[classes.index(target)])
        names, of = self.recorded_classes or (), f"the dataset or of {model}"
        recorded = _class_index(target, names, len(self.to_recorded), "attack.target", of)
        return int(np.flatnonzero(self.to_recorded == recorded)[0])


def join_labels(
    classes: Sequence[str] | None,
    labels: Mapping[str, NDArray[np.int64]],
    model_classes: Sequence[str] | None,
    count: int,
    label_map: Mapping[str | int, str | int] | str | None,
) -> LabelSpace:
    """Decide how the dataset's classes and the model's meet.

    Args:
        classes: the dataset's class names, None where unknown.
        labels: of each split whose rows are known, (N,) int64, -1 for unlabelled.
        model_classes: the model's class names, None where unknown.
        count: the number of the model's classes.
        label_map: {dataset class: model class}, `identity`, or None.

    Raises:
        ConfigError: they differ in count or in order and `label_map` does not say how they meet, it is
            incomplete, or a label lies outside the classes.
    """
    if isinstance(label_map, Mapping):
        classes = classes or _numbered(labels)
        to_model = map_classes(label_map, classes, model_classes, count)
    else:
        if classes is not None and label_map is None:
            _check_agreement(classes, model_classes, count)
        if classes is not None and len(classes) > count:
            raise ConfigError(
                f"model.label_map: identity is not possible: the dataset has {len(classes)} classes, the model {count}."
            )
        # A dataset that does not name its classes holds the model's own indices.
        classes = classes or tuple(model_classes or map(str, range(count)))
        to_model = np.arange(len(classes))
    _check_range(labels, len(classes))
    recorded = classes if is_one_to_one(to_model, count) else model_classes
    return LabelSpace(
        _distinct(classes),
        to_model.astype(np.int64),
        _distinct(recorded) if recorded else None,
        recorded_indices(to_model, count),
    )


def is_one_to_one(to_model: NDArray[np.int64], count: int) -> bool:
    """Whether each of a model's `count` classes is one class of the dataset."""
    return len(to_model) == count and len(np.unique(to_model)) == count


def recorded_indices(to_model: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """What is recorded for each of a model's `count` classes, as `LabelSpace.to_recorded`."""
    return (np.argsort(to_model) if is_one_to_one(to_model, count) else np.arange(count)).astype(np.int64)


def _numbered(labels: Mapping[str, NDArray[np.int64]]) -> tuple[str, ...]:
    """Names for classes that have none, as many as the labels need."""
    if not labels:
        raise ConfigError(
            "source.classes: name the classes that model.label_map maps, as a streamed source is not read ahead to "
            "find them."
        )
    return tuple(map(str, range(1 + max(int(own.max()) for own in labels.values()))))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """ClassLabel refuses equal names, and ImageNet has two cranes: the later one gets its index."""
    distinct: dict[str, None] = {}
    for index, name in enumerate(names):
        while name in distinct:
            name = f"{name} ({index})"
        distinct[name] = None
    return tuple(distinct)


def map_classes(
    label_map: Mapping[str | int, str | int], classes: Sequence[str], model_classes: Sequence[str] | None, count: int
) -> NDArray[np.int64]:
    """The model's index of each dataset class, as `label_map` says; a ConfigError where it does not say all."""
    translated: dict[str, int] = {}
    for key, value in label_map.items():
        name = (
            classes[key] if isinstance(key, int) and 0 <= key < len(classes) and str(key) not in classes else str(key)
        )
        if name not in classes:
            raise ConfigError(f"model.label_map: {key!r} is no class of the dataset{_near(name, classes)}.")
        translated[name] = _class_index(value, model_classes or (), count, "model.label_map")
    missing = [name for name in classes if name not in translated]
    if missing:
        raise ConfigError(f"model.label_map: the dataset's {listing([repr(name) for name in missing])} are not in it.")
    return np.array([translated[name] for name in classes])


def _class_index(value: str | int, names: Sequence[str], count: int, key: str, of: str = "the model") -> int:
    """The index of one of `count` classes of a model that a key of the config names; `of` is for the message."""
    if isinstance(value, int) and 0 <= value < count:
        return value
    if isinstance(value, str) and value in names:
        return names.index(value)
    raise ConfigError(f"{key}: {value!r} is no class of {of}{_near(str(value), names)}.")


def _check_agreement(classes: Sequence[str], model_classes: Sequence[str] | None, count: int) -> None:
    """Without a map, both must have the same classes in the same order, as far as names tell."""
    if len(classes) != count:
        raise ConfigError(
            f"model.label_map: the dataset has {len(classes)} classes and the model {count}; say which belong together."
        )
    names = [_plain(name) for name in classes]
    others = [_plain(name) for name in model_classes or ()]
    # Names that only one side uses tell nothing: `0 - zero` may well be `0`.
    moved = [index for index, other in enumerate(others) if other != names[index] and other in names]
    # A homonym is no other order: of ImageNet's 1,000 classes the Hub and torchvision call different ones `crane`.
    # But where both sides know both names of a place, or many have moved, it is one.
    if any(names[index] in others for index in moved) or len(moved) > count / 100:
        ours, other = classes[moved[0]], (model_classes or ())[moved[0]]
        raise ConfigError(
            f"model.label_map: the dataset and the model name their classes in another order (class {moved[0]} is "
            f"{ours!r} in the dataset, {other!r} in the model); say which belong together."
        )


def _plain(name: str) -> str:
    """A name without what differs between copies: the Hub's ImageNet says `tench, Tinca tinca`."""
    return name.split(",")[0].strip().replace("_", " ").casefold()


def _check_range(labels: Mapping[str, NDArray[np.int64]], count: int) -> None:
    for split, own in labels.items():
        highest = int(own.max())
        if highest >= count and highest != UNLABELLED:
            raise ConfigError(
                f"source: split {split} has label {highest}, outside the {count} classes (0 to {count - 1}); "
                "a model with more classes is needed, or model.label_map."
            )


def _near(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" ({listing([repr(name) for name in names])})" if names else ""
