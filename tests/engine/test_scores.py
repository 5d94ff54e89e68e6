"""Scores: what is recorded of logits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.models.label_space import LabelSpace
from tests.support.scores import MANY_TO_ONE, SAME, TURNED, UNNAMED, one_hot, scored
from tests.support.variants import fgsm_at


def softmax(logits: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    exponents = np.exp(logits.double().numpy())
    result: np.ndarray[Any, np.dtype[np.float64]] = exponents / exponents.sum(-1, keepdims=True)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidences_are_those_of_the_softmax(dtype: torch.dtype) -> None:
    logits = 2 * torch.randn(3, 4, 3, dtype=dtype)
    labels = torch.tensor([2, 0, -1, 1])
    scores = scored(fgsm_at(0, 4, 8), logits, labels, None, SAME)
    probabilities = softmax(logits)
    np.testing.assert_array_equal(scores.prediction[0], probabilities.argmax(-1))
    np.testing.assert_allclose(scores.confidence, probabilities.max(-1), rtol=1e-6)
    labelled = [0, 1, 3]
    expected = probabilities[:, labelled, labels[labelled].numpy()]
    np.testing.assert_allclose(scores.label_confidence[:, labelled], expected, rtol=1e-6)
    assert scores.confidence.dtype == scores.label_confidence.dtype == np.float32
    assert scores.prediction.dtype == scores.label.dtype == np.int64
    assert scores.label.tolist() == [2, 0, None, 1]
    assert (
        np.ma.getmaskarray(scores.label_confidence).tolist()
        == np.ma.getmaskarray(scores.correct)[0].tolist()
        == [[False, False, True, False]] * 3
    )


def test_the_confidence_of_the_label_is_that_of_its_model_class() -> None:
    logits, labels = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    scores = scored(fgsm_at(0, 8), logits, labels, None, MANY_TO_ONE)
    expected = softmax(logits)[:, [0, 1, 2], [1, 1, 0]]
    np.testing.assert_allclose(scores.label_confidence, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("space", "predicted", "recorded", "correct"),
    [
        (SAME, [0, 1, 2, 0], [0, 1, 2, 0], [True, True, True, False]),
        # The model's 1, 2, 0 are the dataset's cat, dog, eel.
        (TURNED, [1, 2, 0, 2], [0, 1, 2, 1], [True, True, True, False]),
        # Recorded is the model's own class: fish 0, mammal 1, bird 2, stone 3.
        (MANY_TO_ONE, [1, 1, 0, 3], [1, 1, 0, 3], [True, True, True, False]),
        (UNNAMED, [1, 1, 3, 0], [1, 1, 3, 0], [True, True, False, True]),
    ],
    ids=["same", "turned", "many to one", "unnamed"],
)
def test_predictions_are_recorded_in_the_dataset_s_classes_where_the_two_meet(
    space: LabelSpace, predicted: list[int], recorded: list[int], correct: list[bool]
) -> None:
    classes = len(space.to_recorded)
    scores = scored(fgsm_at(0), one_hot([predicted], classes), torch.tensor([0, 1, 2, 2]), None, space)
    assert scores.prediction.tolist() == [[recorded]]
    assert scores.correct.tolist() == [[correct]]


def test_fooled_is_right_before_and_wrong_now() -> None:
    # Label 0 throughout: right then wrong, right then right, wrong then wrong, wrong then right.
    logits = one_hot([[0, 0, 1, 1], [1, 0, 2, 0]], 3)
    scores = scored(fgsm_at(0, 8), logits, torch.zeros(4, dtype=torch.int64), None, SAME)
    assert scores.fooled[1].tolist() == [True, False, False, False]
    assert np.ma.getmaskarray(scores.target).all()
    assert np.ma.getmaskarray(scores.fooled)[0].tolist() == [True] * 4
    assert np.ma.getmaskarray(scores.fooled)[1].tolist() == [False] * 4


def test_fooled_with_a_target_is_the_target_predicted() -> None:
    logits = one_hot([[0, 0, 1, 2], [1, 0, 1, 2]], 3)
    target = torch.tensor([1, 1, 1, 0])
    scores = scored(fgsm_at(0, 8), logits, torch.tensor([0, 0, 0, -1]), target, TURNED)
    assert scores.fooled[1].tolist() == [True, False, True, False]
    # In recorded classes: the model's 1 is the dataset's 0, its 0 the dataset's 2.
    assert scores.target.tolist() == [[None] * 4, [0, 0, 0, 2]]
    assert np.ma.getmaskarray(scores.fooled)[0].tolist() == [True] * 4
    assert np.ma.getmaskarray(scores.fooled)[1].tolist() == [False] * 4, "a target needs no label"
