"""Scores: what models say of a batch, the columns in which it is recorded, and what rows add up to."""

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.core.batches import UNLABELLED
from pipeline.core.variants import Variant
from pipeline.layouts.base import LABEL, VICTIM, Contents, Scores, evaluator_columns
from pipeline.models.label_space import LabelSpace
from pipeline.output.folder import VariantCounts, count_evaluator


def contents_of(
    config: Config, space: LabelSpace, evaluators: Mapping[str, LabelSpace], kept: Mapping[str, Any]
) -> Contents:
    """What the columns of a run's dataset follow from.

    Args:
        config: of the run.
        space: names of the dataset's classes and of the recorded predictions.
        evaluators: names of what each evaluator's predictions are, by its id.
        kept: features of the carried-through columns.
    """
    spaces = {VICTIM: space, **evaluators}
    names = {LABEL: space.dataset_classes, **{model: each.recorded_classes for model, each in spaces.items()}}
    return Contents(
        variants=config.variants,
        classes={
            of: datasets.Value("int64") if known is None else datasets.ClassLabel(names=list(known))
            for of, known in names.items()
        },
        kept=kept,
        targeted=config.attack.target is not None,
        streamed=config.source.streams,
    )


def score(
    variants: tuple[Variant, ...],
    logits: Tensor,
    labels: Tensor,
    target: Tensor | None,
    space: LabelSpace,
    evaluations: Iterable[Tensor] = (),
    evaluators: Mapping[str, LabelSpace] | None = None,
) -> Scores:
    """Predictions and confidences of the valid rows of a batch, on the CPU.

    Args:
        variants: V of them, clean first.
        logits: the victim's, (V, M, classes).
        labels: (M,) int64 dataset classes, -1 for unlabelled.
        target: (M,) int64 model indices, None for the plain attack.
        space: translates between the two.
        evaluations: what each evaluator predicts, (V, M) int64, in its own indices.
        evaluators: how theirs translate, by their ids.
    """
    spaces = {VICTIM: space, **(evaluators or {})}
    confidence, predicted = (probabilities := logits.float().softmax(-1)).max(-1)
    chosen = space.model_labels(labels).clamp(min=0).expand(len(logits), -1).unsqueeze(-1)
    predictions = zip(spaces.values(), [predicted, *evaluations], strict=True)
    return complete_scores(
        variants,
        np.stack([each.to_recorded[now.numpy()] for each, now in predictions]),
        confidence.numpy(),
        probabilities.gather(-1, chosen).squeeze(-1).numpy(),
        labels.numpy(),
        None if target is None else space.to_recorded[target.numpy()],
        spaces,
    )


def complete_scores(
    variants: tuple[Variant, ...],
    prediction: NDArray[np.int64],
    confidence: NDArray[np.float32],
    label_confidence: NDArray[np.float32],
    labels: NDArray[np.int64],
    target: NDArray[np.int64] | None,
    spaces: Mapping[str, LabelSpace],
) -> Scores:
    """Scores, with all that follows from predictions: what is correct, what is fooled, and what nobody can say.

    Args:
        variants, prediction, confidence, target: as in `Scores`.
        label_confidence: (V, M), of any value where a row is unlabelled.
        labels: (M,) dataset classes, -1 for unlabelled.
        spaces: of each model, the victim first under VICTIM.
    """
    unlabelled = labels == UNLABELLED
    wanted = np.stack([space.to_recorded[space.to_model[np.maximum(labels, 0)]] for space in spaces.values()])
    correct = prediction == wanted[:, None]
    fooled = correct[0, :1] & ~correct[0] if target is None else prediction[0] == target
    unknown = np.tile(unlabelled & (target is None), (len(variants), 1))
    unknown[0] = True
    return Scores(
        variants=variants,
        models=tuple(spaces),
        prediction=prediction,
        correct=_masked(correct, unlabelled),
        confidence=confidence,
        label_confidence=_masked(label_confidence, unlabelled),
        fooled=_masked(fooled, unknown),
        label=_masked(labels, unlabelled),
        target=target,
    )


def _masked(values: NDArray[Any], mask: NDArray[np.bool_]) -> Any:
    return np.ma.MaskedArray(values, np.broadcast_to(mask, values.shape))


def count(variant: Variant, rows: pa.Table, clean: pa.Table, evaluators: Iterable[str]) -> VariantCounts:
    """What rows of one variant add up to.

    Args:
        variant: which.
        rows: M of them, with the columns of layout images.
        clean: those of the same images when clean.
        evaluators: ids of those that have columns.
    """
    known = np.asarray(rows.column("label").is_valid())
    correct, fooled = (_flags(rows, name) for name in ("correct", "fooled"))
    answers = {}
    for name in evaluators:
        before, now = (_flags(table, evaluator_columns(name)[1])[known] for table in (clean, rows))
        answers[name] = count_evaluator(before, now, fooled[known])
    # Not checked: forged rows may say anything.
    return VariantCounts.model_construct(
        **vars(variant),
        rows=len(known),
        labelled=int(known.sum()),
        correct=int(correct.sum()),
        fooled=int(fooled.sum()),
        confidence_sum=float(rows.column("confidence").fill_null(0.0).to_numpy().sum(dtype=np.float64)),
        evaluators=answers,
    )


def _flags(rows: pa.Table, name: str) -> NDArray[np.bool_]:
    """A column of booleans, null as False."""
    flags: NDArray[np.bool_] = rows.column(name).fill_null(False).to_numpy()
    return flags.astype(np.bool_)
