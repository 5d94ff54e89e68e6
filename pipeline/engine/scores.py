"""Scores: what models say of a batch, the columns in which it is recorded, and what rows add up to."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.core.batches import UNLABELLED
from pipeline.core.variants import Variant, own_model
from pipeline.layouts.base import LABEL, OWN, Contents, Scores, model_columns
from pipeline.models.label_space import LabelSpace
from pipeline.output.folder import VariantCounts, count_model


def contents_of(config: Config, spaces: Mapping[str, LabelSpace], kept: Mapping[str, Any]) -> Contents:
    """What the columns of a run's dataset follow from. `spaces` are by model, `kept` the features of kept columns."""
    recorded = [space.recorded_classes for space in spaces.values()]
    # Rows of several models share a column: it has names where they mean the same by an index.
    common = recorded[0] if all(classes == recorded[0] for classes in recorded) else None
    names = {LABEL: next(iter(spaces.values())).dataset_classes, OWN: common}
    return Contents(
        variants=config.variants,
        models=tuple(spaces),
        classes={
            of: datasets.Value("int64") if known is None else datasets.ClassLabel(names=list(known))
            for of, known in {**names, **dict(zip(spaces, recorded, strict=True))}.items()
        },
        kept=kept,
        targeted=any(attack.target is not None for attack in config.all_attacks.values()),
        streamed=config.source.streams,
    )


def score(
    variants: tuple[Variant, ...],
    logits: Sequence[Tensor],
    predictions: Tensor,
    labels: Tensor,
    targets: Sequence[Tensor | None],
    spaces: Mapping[str, LabelSpace],
) -> Scores:
    """Predictions and confidences of the valid rows of a batch, on the CPU.

    Args:
        variants: V of them, clean first.
        logits: V times (M, classes), by the row's own model.
        predictions: (E, V, M) int64, of every model, in its own indices.
        labels: (M,) int64 dataset classes, -1 for unlabelled.
        targets: V times (M,) int64 indices of the row's own model, None where a variant has no target.
        spaces: how the classes of each model translate, by its id.
    """
    own = [spaces[name] for name in own_models(variants, list(spaces))]
    wanted = [space.model_labels(labels).clamp(min=0).unsqueeze(-1) for space in own]
    probabilities = [answers.float().softmax(-1) for answers in logits]
    aimed = [torch.zeros_like(labels) if target is None else target for target in targets]
    return complete_scores(
        variants,
        np.stack([space.to_recorded[now.numpy()] for space, now in zip(spaces.values(), predictions, strict=True)]),
        torch.stack([each.amax(-1) for each in probabilities]).numpy(),
        torch.cat([each.gather(-1, label) for each, label in zip(probabilities, wanted, strict=True)], 1).T.numpy(),
        labels.numpy(),
        np.ma.MaskedArray(
            np.stack([space.to_recorded[target.numpy()] for space, target in zip(own, aimed, strict=True)]),
            np.stack([np.full(len(labels), target is None) for target in targets]),
        ),
        spaces,
    )


def complete_scores(
    variants: tuple[Variant, ...],
    prediction: NDArray[np.int64],
    confidence: NDArray[np.float32],
    label_confidence: NDArray[np.float32],
    labels: NDArray[np.int64],
    target: np.ma.MaskedArray[Any, np.dtype[np.int64]],
    spaces: Mapping[str, LabelSpace],
) -> Scores:
    """Scores, with all that follows from predictions: what is correct, what is fooled, and what nobody can say.

    Args:
        variants, prediction, confidence, target: as in `Scores`.
        label_confidence: (V, M), of any value where a row is unlabelled.
        labels: (M,) dataset classes, -1 for unlabelled.
        spaces: of each model, by its id.
    """
    models = list(spaces)
    own = np.array([models.index(name) for name in own_models(variants, models)])
    unlabelled = labels == UNLABELLED
    wanted = np.stack([space.to_recorded[space.to_model[np.maximum(labels, 0)]] for space in spaces.values()])
    correct = prediction == wanted[:, None]
    untargeted, now = np.ma.getmaskarray(target), prediction[own, np.arange(len(own))]
    lost = correct[own, 0] & ~correct[own, np.arange(len(own))]
    unknown = untargeted & unlabelled
    unknown[0] = True
    return Scores(
        variants=variants,
        models=tuple(models),
        own=own,
        prediction=prediction,
        correct=_masked(correct, unlabelled),
        confidence=confidence,
        label_confidence=_masked(label_confidence, unlabelled),
        fooled=_masked(np.where(untargeted, lost, now == target.data), unknown),
        label=_masked(labels, unlabelled),
        target=target,
    )


def own_models(variants: Sequence[Variant], models: Sequence[str]) -> list[str]:
    """`own_model` of each variant."""
    return [own_model(variant, models) for variant in variants]


def _masked(values: NDArray[Any], mask: NDArray[np.bool_]) -> Any:
    return np.ma.MaskedArray(values, np.broadcast_to(mask, values.shape))


def count(
    variant: Variant, rows: pa.Table, clean: pa.Table, models: Sequence[str], zero_signs: int = 0
) -> VariantCounts:
    """What rows of one variant add up to.

    Args:
        variant: which.
        rows, clean: M rows of layout images, and those of the same images when clean.
        models: the ids of all.
        zero_signs: how many values the attack does not move.
    """
    known = np.asarray(rows.column("label").is_valid())
    correct, fooled = (_flags(rows, name) for name in ("correct", "fooled"))
    answers = {}
    for name in models:
        column = model_columns(name)[1] if len(models) > 1 else "correct"
        before, now = (_flags(table, column)[known] for table in (clean, rows))
        answers[name] = count_model(before, now, fooled[known])
    # Not checked: forged rows may say anything.
    return VariantCounts.model_construct(
        **vars(variant),
        rows=len(known),
        labelled=int(known.sum()),
        correct=int(correct.sum()),
        fooled=int(fooled.sum()),
        confidence_sum=float(rows.column("confidence").fill_null(0.0).to_numpy().sum(dtype=np.float64)),
        zero_signs=zero_signs,
        models=answers,
    )


def _flags(rows: pa.Table, name: str) -> NDArray[np.bool_]:
    """A column of booleans, null as False."""
    flags: NDArray[np.bool_] = rows.column(name).fill_null(False).to_numpy()
    return flags.astype(np.bool_)
