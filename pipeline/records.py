"""Records: what a row of the dataset is.

The schema, and one batch of results as Arrow tables. Column types follow what `datasets` recognises by
itself: an Image is a nullable struct<bytes, path>, a ClassLabel an int64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.labels import LabelSpace
from pipeline.loader import Batch
from pipeline.sources import UNLABELLED

IMAGE = "image"


def make_features(space: LabelSpace, *, targeted: bool, kept: Mapping[str, Any]) -> datasets.Features:
    """The columns of every subset, in order, as `datasets` features.

    Args:
        space: names of the dataset's classes and of the recorded predictions.
        targeted: whether there is a `target` column.
        kept: features of the carried-through columns.

    Raises:
        ConfigError: a carried-through column has the name of one of ours.
    """
    value = datasets.Value
    predicted = datasets.ClassLabel(names=list(space.recorded_classes)) if space.recorded_classes else value("int64")
    features: dict[str, Any] = {
        IMAGE: datasets.Image(),
        "label": datasets.ClassLabel(names=list(space.dataset_classes)),
        "epsilon": value("float64"),
        "prediction": predicted,
        "confidence": value("float32"),
        "label_confidence": value("float32"),
        "correct": value("bool"),
        "clean_prediction": predicted,
        "fooled": value("bool"),
        **({"target": predicted} if targeted else {}),
        "source_index": value("int64"),
    }
    clashes = [name for name in kept if name in features]
    if clashes:
        raise ConfigError(f"source.keep_columns: {clashes[0]} is a column of the output itself; rename it first.")
    return datasets.Features({**features, **kept})


@dataclass(frozen=True)
class Scores:
    """What the victim says of the valid rows of a batch at every epsilon, clean first.

    prediction (1 + K, M), in recorded indices; confidence, label_confidence (1 + K, M) in [0, 1]; correct,
    fooled (1 + K, M); label, labelled, target (M,), the last in recorded indices and None for the plain
    attack. Where a row is unlabelled, label_confidence and correct mean nothing; nor does fooled without
    a target.
    """

    prediction: NDArray[np.int64]
    confidence: NDArray[np.float32]
    label_confidence: NDArray[np.float32]
    correct: NDArray[np.bool_]
    fooled: NDArray[np.bool_]
    label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    target: NDArray[np.int64] | None

    def fooled_known(self, index: int) -> NDArray[np.bool_]:
        """(M,) where `fooled` says something: never on clean, and without a target on labelled rows."""
        if index == 0:
            return np.zeros_like(self.labelled)
        return self.labelled if self.target is None else np.ones_like(self.labelled)


def score(logits: Tensor, labels: Tensor, target: Tensor | None, space: LabelSpace) -> Scores:
    """Predictions and confidences of the valid rows of a batch, on the CPU.

    Args:
        logits: (1 + K, M, classes), clean first.
        labels: (M,) int64 dataset classes, -1 for unlabelled.
        target: (M,) int64 model indices, None for the plain attack.
        space: translates between the two.
    """
    to_recorded = torch.from_numpy(space.to_recorded)
    probabilities = logits.float().softmax(-1)
    confidence, predicted = probabilities.max(-1)
    wanted = space.model_labels(labels).clamp(min=0)
    label_confidence = probabilities.gather(-1, wanted.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
    correct = predicted == wanted
    fooled = correct[:1] & ~correct if target is None else predicted == target
    return Scores(
        prediction=to_recorded[predicted].numpy(),
        confidence=confidence.numpy(),
        label_confidence=label_confidence.numpy(),
        correct=correct.numpy(),
        fooled=fooled.numpy(),
        label=labels.numpy(),
        labelled=(labels != UNLABELLED).numpy(),
        target=None if target is None else to_recorded[target].numpy(),
    )


def make_table(
    schema: pa.Schema, images: Sequence[bytes], scores: Scores, index: int, level: int, batch: Batch
) -> pa.Table:
    """One batch at one epsilon, as a table of the schema.

    Args:
        schema: of the features.
        images: the M encoded images.
        scores: of the same batch.
        index: which epsilon of the scores; 0 is clean.
        level: that epsilon in grey levels.
        batch: where the rows come from, and their carried-through columns.
    """
    count, unlabelled = len(images), ~scores.labelled
    encoded = pa.array(images, pa.binary())
    columns: dict[str, Any] = {
        IMAGE: pa.StructArray.from_arrays([encoded, pa.nulls(count, pa.string())], ["bytes", "path"]),
        "label": pa.array(scores.label, mask=unlabelled),
        "epsilon": np.full(count, level / 255),
        "prediction": scores.prediction[index],
        "confidence": scores.confidence[index],
        "label_confidence": pa.array(scores.label_confidence[index], mask=unlabelled),
        "correct": pa.array(scores.correct[index], mask=unlabelled),
        "clean_prediction": scores.prediction[0],
        "fooled": pa.array(scores.fooled[index], mask=~scores.fooled_known(index)),
        "source_index": batch.source_index,
        **{name: batch.kept.column(name) for name in batch.kept.column_names},
    }
    if scores.target is not None:
        columns["target"] = pa.array(scores.target, mask=np.full(count, index == 0))
    return pa.table([columns[name] for name in schema.names], schema=schema)
