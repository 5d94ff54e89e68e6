"""Label spaces that meet in different ways, and logits with given predictions."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.core.variants import Variant
from pipeline.engine.scores import score
from pipeline.layouts.base import Scores
from pipeline.models.label_space import LabelSpace, join_labels
from tests.conftest import CLASSES


def space_of(
    classes: Sequence[str] | None = CLASSES,
    model_classes: Sequence[str] | None = CLASSES,
    count: int = 3,
    label_map: Mapping[str | int, str | int] | None = None,
) -> LabelSpace:
    return join_labels(classes, {"test": np.zeros(1, dtype=np.int64)}, model_classes, count, label_map)


SAME = space_of()
# The model knows the same classes in another order.
TURNED = space_of(model_classes=("eel", "cat", "dog"), label_map={"cat": "cat", "dog": "dog", "eel": "eel"})
# Two of the dataset's classes are one of the model's, which knows two more.
MANY_TO_ONE = space_of(
    model_classes=("fish", "mammal", "bird", "stone"),
    count=4,
    label_map={"cat": "mammal", "dog": "mammal", "eel": "fish"},
)
UNNAMED = space_of(model_classes=None, count=4, label_map={"cat": 1, "dog": 1, "eel": 0})


def scored(
    variants: tuple[Variant, ...], logits: Tensor, labels: Tensor, target: Tensor | None, space: LabelSpace
) -> Scores:
    """What one model says of images in some variants.

    Args:
        variants: V of them, clean first.
        logits: (V, M, classes).
        labels: (M,) classes of the dataset, -1 for unlabelled.
        target: (M,) indices of the model, None without.
        space: of the model.
    """
    targets = [None, *[target] * (len(variants) - 1)]
    return score(variants, list(logits), logits.argmax(-1).unsqueeze(0), labels, targets, {"make": space})


def one_hot(predictions: Sequence[Sequence[int]], classes: int) -> Tensor:
    """Logits (epsilons, rows, classes) whose largest is as given."""
    return 3 * torch.nn.functional.one_hot(torch.tensor(predictions), classes).float() + torch.rand(classes)
