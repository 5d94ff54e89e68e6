"""Records: how a batch of results is stored, in either layout, and read back.

Column types follow what `datasets` recognises by itself: an Image is a nullable struct<bytes, path>, a
ClassLabel an int64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.batches import UNLABELLED, Batch
from pipeline.core.errors import ConfigError
from pipeline.core.images import ImageFormat, encode_images
from pipeline.core.lattice import picture_to_sign, sign_to_picture, step
from pipeline.layouts.columns import (
    ATTACKS,
    EVALUATED,
    FILE,
    IMAGE,
    SIGN,
    MakeColumns,
    evaluator_columns,
    image_columns,
    one_level,
    sign_columns,
)
from pipeline.models.label_space import LabelSpace


@dataclass(frozen=True)
class Opinion:
    """What an evaluator says: prediction (1 + K, M), in its recorded indices, and correct (1 + K, M), which means
    nothing where a row is unlabelled."""

    prediction: NDArray[np.int64]
    correct: NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """What the victim says of the valid rows of a batch at every epsilon, clean first, and what others say.

    prediction (1 + K, M), in recorded indices; confidence, label_confidence (1 + K, M) in [0, 1]; correct,
    fooled (1 + K, M); label, labelled, target (M,), the last in recorded indices and None for the plain
    attack; evaluators: by their ids. Where a row is unlabelled, label_confidence and correct mean nothing; nor
    does fooled without a target.
    """

    prediction: NDArray[np.int64]
    confidence: NDArray[np.float32]
    label_confidence: NDArray[np.float32]
    correct: NDArray[np.bool_]
    fooled: NDArray[np.bool_]
    label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    target: NDArray[np.int64] | None
    evaluators: Mapping[str, Opinion] = field(default_factory=dict)

    def fooled_known(self, index: int) -> NDArray[np.bool_]:
        """(M,) where `fooled` says something: never on clean, and without a target on labelled rows."""
        if index == 0:
            return np.zeros_like(self.labelled)
        return self.labelled if self.target is None else np.ones_like(self.labelled)


def score(
    logits: Tensor,
    labels: Tensor,
    target: Tensor | None,
    space: LabelSpace,
    evaluators: Mapping[str, Opinion] | None = None,
) -> Scores:
    """Predictions and confidences of the valid rows of a batch, on the CPU.

    Args:
        logits: (1 + K, M, classes), clean first.
        labels: (M,) int64 dataset classes, -1 for unlabelled.
        target: (M,) int64 model indices, None for the plain attack.
        space: translates between the two.
        evaluators: what others say of the same rows.
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
        evaluators=evaluators or {},
    )


def opinions(evaluations: Tensor, labels: Tensor, spaces: Mapping[str, LabelSpace]) -> dict[str, Opinion]:
    """What evaluators say of the valid rows of a batch, in terms of the dataset.

    Args:
        evaluations: (E, 1 + K, M) int64, each one's own indices.
        labels: (M,) int64 dataset classes, -1 for unlabelled.
        spaces: translate for each of them, by its id.
    """
    return {
        name: Opinion(
            prediction=space.to_recorded[predicted.numpy()],
            correct=(predicted == space.model_labels(labels)).numpy(),
        )
        for (name, space), predicted in zip(spaces.items(), evaluations, strict=True)
    }


def encode_column(images_u8: Tensor, image_format: ImageFormat) -> pa.StructArray:
    """Images as an Arrow column of `datasets`, losslessly encoded.

    Args:
        images_u8: (N, C, H, W) uint8 on the CPU.
        image_format: as `encode_images`.
    """
    encoded = pa.array(encode_images(images_u8, image_format), pa.binary())
    return pa.StructArray.from_arrays([encoded, pa.nulls(len(encoded), pa.string())], ["bytes", "path"])


def _image_tables(
    schema: pa.Schema, pictures: Sequence[pa.ChunkedArray], scores: Scores, levels: Sequence[int], batch: Batch
) -> list[pa.Table]:
    unlabelled = ~scores.labelled
    tables = []
    for index, (level, picture) in enumerate(zip(levels, pictures, strict=True)):
        columns: dict[str, Any] = {
            IMAGE: picture,
            "epsilon": np.full(len(unlabelled), level / 255),
            "prediction": scores.prediction[index],
            "confidence": scores.confidence[index],
            "label_confidence": pa.array(scores.label_confidence[index], mask=unlabelled),
            "correct": pa.array(scores.correct[index], mask=unlabelled),
            "fooled": pa.array(scores.fooled[index], mask=~scores.fooled_known(index)),
            **_shared_columns(scores, batch),
            **_opinion_columns(scores, itemgetter(index), unlabelled),
        }
        if scores.target is not None:
            columns["target"] = pa.array(scores.target, mask=np.full(len(unlabelled), level == 0))
        tables.append(pa.table([columns[name] for name in schema.names], schema=schema))
    return tables


def _sign_tables(
    schema: pa.Schema, pictures: Sequence[pa.ChunkedArray], scores: Scores, levels: Sequence[int], batch: Batch
) -> list[pa.Table]:
    unlabelled = ~scores.labelled
    image, sign = pictures
    columns: dict[str, Any] = {
        IMAGE: image,
        SIGN: sign,
        "clean_confidence": scores.confidence[0],
        "clean_label_confidence": pa.array(scores.label_confidence[0], mask=unlabelled),
        "clean_correct": pa.array(scores.correct[0], mask=unlabelled),
        ATTACKS: _attacks(schema.field(ATTACKS).type, scores, levels),
        **_shared_columns(scores, batch),
    }
    for name, values in _opinion_columns(scores, itemgetter(0), unlabelled).items():
        columns[f"clean_{name}"] = values
    if scores.target is not None:
        columns["target"] = scores.target
    return [pa.table([columns[name] for name in schema.names], schema=schema)]


def _shared_columns(scores: Scores, batch: Batch) -> dict[str, Any]:
    """What both layouts have under one name, the same for every epsilon."""
    return {
        "label": pa.array(scores.label, mask=~scores.labelled),
        "clean_prediction": scores.prediction[0],
        FILE: pa.repeat(batch.shard.file or "", len(batch.source_index)),
        "source_index": batch.source_index,
        **{name: batch.kept.column(name) for name in batch.kept.column_names},
    }


def _opinion_columns(
    scores: Scores, pick: Callable[[NDArray[Any]], NDArray[Any]], unlabelled: NDArray[np.bool_]
) -> dict[str, Any]:
    """What evaluators say, of those of the values (1 + K, M) that are picked."""
    columns: dict[str, Any] = {}
    for name, opinion in scores.evaluators.items():
        prediction, correct = evaluator_columns(name)
        columns[prediction] = pa.array(pick(opinion.prediction))
        columns[correct] = pa.array(pick(opinion.correct), mask=unlabelled)
    return columns


def _attacks(kind: pa.ListType, scores: Scores, levels: Sequence[int]) -> pa.ListArray:
    """The list of every row: what the victim says at each epsilon but the clean one."""
    epsilons, rows = len(levels) - 1, len(scores.label)
    known = [scores.fooled_known(index) for index in range(1, len(levels))]
    unlabelled = np.repeat(~scores.labelled, epsilons)

    def by_row(values: NDArray[Any] | Sequence[NDArray[Any]]) -> NDArray[Any]:
        """(K, M) to (M * K,): row after row, each with all epsilons."""
        return np.stack(list(values)).T.ravel()

    columns = {
        "epsilon": pa.array(np.tile(np.array(levels[1:]) / 255, rows)),
        "prediction": pa.array(by_row(scores.prediction[1:])),
        "confidence": pa.array(by_row(scores.confidence[1:])),
        "label_confidence": pa.array(by_row(scores.label_confidence[1:]), mask=unlabelled),
        "correct": pa.array(by_row(scores.correct[1:]), mask=unlabelled),
        "fooled": pa.array(by_row(scores.fooled[1:]), mask=~by_row(known)),
        **_opinion_columns(scores, lambda values: by_row(values[1:]), unlabelled),
    }
    fields = list(kind.value_type)
    entries = pa.StructArray.from_arrays([columns[field.name] for field in fields], fields=fields)
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * epsilons, entries, type=kind)


def _from_signs(pictures: Sequence[Tensor], levels: Sequence[int]) -> list[Tensor]:
    image, sign = pictures[0], picture_to_sign(pictures[1])
    return [image, *(step(image, sign, level) for level in levels[1:])]


def _split_levels(tables: Sequence[pa.Table], levels: Sequence[int]) -> list[pa.Table]:
    (rows,) = tables
    lists, recorded = rows.column(ATTACKS), levels[1:]
    # A null list has no length, and `equal` says null of it.
    if lists.null_count or not pc.all(pc.equal(pc.list_value_length(lists), len(recorded)), min_count=0).as_py():
        raise ValueError(f"the attacks of a row are not the run's {len(recorded)}")
    return [pa.table(one_level(rows, level, recorded)) for level in levels]


@dataclass(frozen=True)
class Layout:
    """How a batch at 1 + K epsilons, clean first, becomes rows, and rows a batch again.

    pictures: the Image columns of a row. columns: our own columns as features. stored: the images that are
    encoded, for each subset one for each picture, from the 1 + K images (N, C, H, W) uint8 and the sign (N, C,
    H, W) int8. tables: a table of the schema for each subset, from those images as columns, the scores, the
    levels and the batch that they are of.

    Backwards, images: the 1 + K images from the decoded pictures and the levels; a ValueError says what is
    wrong with them. by_level: for each epsilon a table with the columns of layout images but the image, from the tables
    of the subsets and the levels; a ValueError as there.
    """

    pictures: tuple[str, ...]
    columns: MakeColumns
    stored: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]]
    tables: Callable[[pa.Schema, Sequence[pa.ChunkedArray], Scores, Sequence[int], Batch], list[pa.Table]]
    images: Callable[[Sequence[Tensor], Sequence[int]], list[Tensor]]
    by_level: Callable[[Sequence[pa.Table], Sequence[int]], list[pa.Table]]


LAYOUTS = {
    "images": Layout(
        pictures=(IMAGE,),
        columns=image_columns,
        stored=lambda images, _: tuple(images),
        tables=_image_tables,
        images=lambda pictures, _: list(pictures),
        by_level=lambda tables, _: list(tables),
    ),
    "signs": Layout(
        pictures=(IMAGE, SIGN),
        columns=sign_columns,
        stored=lambda images, sign: (images[0], sign_to_picture(sign)),
        tables=_sign_tables,
        images=_from_signs,
        by_level=_split_levels,
    ),
}


def make_features(
    layout: Layout,
    space: LabelSpace,
    *,
    targeted: bool,
    kept: Mapping[str, Any],
    evaluators: Mapping[str, LabelSpace] | None = None,
    streamed: bool = False,
) -> datasets.Features:
    """The columns of every subset of a layout, in order, as `datasets` features.

    Args:
        layout: how a batch is stored.
        space: names of the dataset's classes and of the recorded predictions.
        targeted: whether there is a `target` column.
        kept: features of the carried-through columns.
        evaluators: names of what each evaluator's predictions are, by its id.
        streamed: whether there is a `source_file` column.

    Raises:
        ConfigError: a carried-through column has the name of one of ours.
    """
    label = datasets.ClassLabel(names=list(space.dataset_classes))
    predicted = _predicted(space)
    others = {name: _predicted(other) for name, other in (evaluators or {}).items()}
    ours = layout.columns(label, predicted, targeted, others, streamed=streamed)
    # Every layout is read back as layout images, whose names must be free as well.
    for name in kept:
        if EVALUATED.fullmatch(name):
            raise ConfigError(f"source.keep_columns: {name} could be taken for an evaluator's column; rename it first.")
        if name in ours or name in image_columns(label, predicted, targeted, others, streamed=True):
            raise ConfigError(f"source.keep_columns: {name} is a column of the output itself; rename it first.")
    return datasets.Features({**ours, **kept})


def _predicted(space: LabelSpace) -> Any:
    """The feature of a model's predictions."""
    if space.recorded_classes is None:
        return datasets.Value("int64")
    return datasets.ClassLabel(names=list(space.recorded_classes))
