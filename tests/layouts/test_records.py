"""Records: the columns that DESIGN.md lists, and what they say of a row."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.core.batches import Batch
from pipeline.core.errors import ConfigError
from pipeline.core.plan import Shard
from pipeline.layouts.records import LAYOUTS, Scores, encode_column, make_features, score
from pipeline.models.label_space import LabelSpace, join_labels
from pipeline.sources.digits import ArraySource
from tests.conftest import CLASSES, random_pixels


def space_of(
    classes: Sequence[str] | None = CLASSES,
    model_classes: Sequence[str] | None = CLASSES,
    count: int = 3,
    label_map: Mapping[str | int, str | int] | None = None,
) -> LabelSpace:
    labels = {"test": np.zeros(1, dtype=np.int64)}
    source = ArraySource(labels=labels, rows={}, classes=None if classes is None else tuple(classes), digest="")
    return join_labels(source, model_classes, count, label_map)


IMAGES = LAYOUTS["images"]
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


# ------------------------------------------------------------------------------------------------- features

COLUMNS = {
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "label": pa.int64(),
    "epsilon": pa.float64(),
    "prediction": pa.int64(),
    "confidence": pa.float32(),
    "label_confidence": pa.float32(),
    "correct": pa.bool_(),
    "clean_prediction": pa.int64(),
    "fooled": pa.bool_(),
    "source_index": pa.int64(),
}


@pytest.mark.parametrize("space", [SAME, TURNED, MANY_TO_ONE, UNNAMED])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_columns_are_those_of_the_contract(space: LabelSpace, targeted: bool) -> None:
    kept = {"caption": datasets.Value("string"), "rating": datasets.ClassLabel(names=["bad", "good"])}
    features = make_features(IMAGES, space, targeted=targeted, kept=kept)
    schema = features.arrow_schema
    expected = {
        **COLUMNS,
        **({"target": pa.int64()} if targeted else {}),
        "caption": pa.string(),
        "rating": pa.int64(),
    }
    assert {name: schema.field(name).type for name in schema.names} == expected
    assert all(schema.field(name).nullable for name in schema.names)
    assert schema.names[:2] == ["image", "label"]
    assert schema.names[-2:] == ["caption", "rating"]


def test_the_schema_tells_datasets_what_the_columns_are() -> None:
    schema = make_features(IMAGES, SAME, targeted=True, kept={"caption": datasets.Value("string")}).arrow_schema
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert described["image"] == {"_type": "Image"}
    for name in ("label", "prediction", "clean_prediction", "target"):
        assert described[name] == {"names": list(CLASSES), "_type": "ClassLabel"}
    assert datasets.Features.from_arrow_schema(schema) == make_features(
        IMAGES, SAME, targeted=True, kept={"caption": datasets.Value("string")}
    )


@pytest.mark.parametrize(
    ("space", "recorded"),
    [
        (SAME, datasets.ClassLabel(names=list(CLASSES))),
        (TURNED, datasets.ClassLabel(names=list(CLASSES))),
        (MANY_TO_ONE, datasets.ClassLabel(names=["fish", "mammal", "bird", "stone"])),
        (UNNAMED, datasets.Value("int64")),
    ],
    ids=["same", "turned", "many to one", "unnamed"],
)
def test_predictions_have_names_where_they_are_known(space: LabelSpace, recorded: Any) -> None:
    features = make_features(IMAGES, space, targeted=True, kept={})
    assert features["label"] == datasets.ClassLabel(names=list(CLASSES))
    assert features["prediction"] == features["clean_prediction"] == features["target"] == recorded


@pytest.mark.parametrize("name", [*COLUMNS, "target"])
def test_a_kept_column_must_not_have_the_name_of_ours(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_features(
            IMAGES, SAME, targeted=True, kept={"caption": datasets.Value("string"), name: datasets.Value("string")}
        )
    assert str(caught.value) == (f"source.keep_columns: {name} is a column of the output itself; rename it first.")


def test_a_kept_column_may_be_called_target_where_there_is_none() -> None:
    assert make_features(IMAGES, SAME, targeted=False, kept={"target": datasets.Value("string")})[
        "target"
    ] == datasets.Value("string")


# --------------------------------------------------------------------------------------------------- scores


def softmax(logits: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    exponents = np.exp(logits.double().numpy())
    result: np.ndarray[Any, np.dtype[np.float64]] = exponents / exponents.sum(-1, keepdims=True)
    return result


def one_hot(predictions: Sequence[Sequence[int]], classes: int) -> Tensor:
    """Logits (epsilons, rows, classes) whose largest is as given."""
    return 3 * torch.nn.functional.one_hot(torch.tensor(predictions), classes).float() + torch.rand(classes)


ALL = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidences_are_those_of_the_softmax(dtype: torch.dtype) -> None:
    logits = 2 * torch.randn(3, 4, 3, dtype=dtype)
    labels = torch.tensor([2, 0, -1, 1])
    scores = score(logits, labels, None, SAME)
    probabilities = softmax(logits)
    np.testing.assert_array_equal(scores.prediction, probabilities.argmax(-1))
    np.testing.assert_allclose(scores.confidence, probabilities.max(-1), rtol=1e-6)
    labelled = [0, 1, 3]
    expected = probabilities[:, labelled, labels[labelled].numpy()]
    np.testing.assert_allclose(scores.label_confidence[:, labelled], expected, rtol=1e-6)
    assert scores.confidence.dtype == scores.label_confidence.dtype == np.float32
    assert scores.prediction.dtype == scores.label.dtype == np.int64
    assert scores.labelled.tolist() == [True, True, False, True]
    assert scores.label.tolist() == labels.tolist()


def test_the_confidence_of_the_label_is_that_of_its_model_class() -> None:
    logits, labels = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    scores = score(logits, labels, None, MANY_TO_ONE)
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
    scores = score(one_hot([predicted], classes), torch.tensor([0, 1, 2, 2]), None, space)
    assert scores.prediction.tolist() == [recorded]
    assert scores.correct.tolist() == [correct]


def test_fooled_is_right_before_and_wrong_now() -> None:
    # Label 0 throughout: right then wrong, right then right, wrong then wrong, wrong then right.
    logits = one_hot([[0, 0, 1, 1], [1, 0, 2, 0]], 3)
    scores = score(logits, torch.zeros(4, dtype=torch.int64), None, SAME)
    assert scores.fooled[1].tolist() == [True, False, False, False]
    assert scores.target is None
    assert scores.fooled_known(0).tolist() == [False] * 4
    assert scores.fooled_known(1).tolist() == [True] * 4


def test_fooled_with_a_target_is_the_target_predicted() -> None:
    logits = one_hot([[0, 0, 1, 2], [1, 0, 1, 2]], 3)
    target = torch.tensor([1, 1, 1, 0])
    scores = score(logits, torch.tensor([0, 0, 0, -1]), target, TURNED)
    assert scores.fooled[1].tolist() == [True, False, True, False]
    assert scores.target is not None
    # In recorded classes: the model's 1 is the dataset's 0, its 0 the dataset's 2.
    assert scores.target.tolist() == [0, 0, 0, 2]
    assert scores.fooled_known(0).tolist() == [False] * 4
    assert scores.fooled_known(1).tolist() == [True] * 4, "a target needs no label"


# --------------------------------------------------------------------------------------------------- tables


def batch_of(labels: Tensor, valid: Tensor, kept: Mapping[str, Any] | None = None) -> Batch:
    rows = np.flatnonzero(valid.numpy()) + 100
    return Batch(
        shard=Shard("test", 0, 1, 0, len(labels)),
        place=slice(0, len(labels)),
        images=torch.zeros((len(labels), 3, 2, 2), dtype=torch.uint8),
        labels=labels,
        valid=valid,
        source_index=rows,
        kept=pa.table(dict(kept or {})),
        skipped=(),
        seconds=0.0,
    )


def tables(
    scores: Scores,
    batch: Batch,
    levels: Sequence[int],
    *,
    space: LabelSpace = SAME,
    kept: Mapping[str, Any] | None = None,
) -> list[pa.Table]:
    """The clean table, then one for each level."""
    schema = make_features(IMAGES, space, targeted=scores.target is not None, kept=kept or {}).arrow_schema
    pixels = torch.from_numpy(random_pixels(len(scores.label), side=2)).permute(0, 3, 1, 2)
    pictures = [pa.chunked_array([encode_column(pixels, "png")])] * (1 + len(levels))
    made = IMAGES.tables(schema, pictures, scores, (0, *levels), batch)
    for table in made:
        assert table.schema.equals(schema, check_metadata=True)
        table.validate(full=True)
    return made


def test_a_table_holds_one_row_for_each_valid_image() -> None:
    labels, valid = torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, True])
    logits = one_hot([[0, 0, 2, 2], [1, 1, 2, 1], [1, 2, 0, 0]], 3)
    scores = score(logits[:, valid], labels[valid], None, SAME)
    caption = {"caption": pa.chunked_array([["a"], ["b", "c"]])}
    clean, low, high = tables(
        scores, batch_of(labels, valid, caption), (4, 16), kept={"caption": datasets.Value("string")}
    )

    assert clean.drop_columns(["image", "confidence", "label_confidence"]).to_pydict() == {
        "label": [0, 2, 1],
        "epsilon": [0.0] * 3,
        "prediction": [0, 2, 2],
        "correct": [True, True, False],
        "clean_prediction": [0, 2, 2],
        "fooled": [None] * 3,
        "source_index": [100, 102, 103],
        "caption": ["a", "b", "c"],
    }
    assert low["epsilon"].to_pylist() == [4 / 255] * 3
    assert low["prediction"].to_pylist() == [1, 2, 1]
    assert low["correct"].to_pylist() == [False, True, True]
    assert low["fooled"].to_pylist() == [True, False, False]
    assert high["epsilon"].to_pylist() == [16 / 255] * 3
    assert high["fooled"].to_pylist() == [True, True, False]
    for index, table in enumerate((clean, low, high)):
        assert table["clean_prediction"].to_pylist() == [0, 2, 2]
        np.testing.assert_array_equal(table["confidence"].to_numpy(), scores.confidence[index])
        np.testing.assert_array_equal(table["label_confidence"].to_numpy(), scores.label_confidence[index])


def test_unlabelled_rows_have_nulls_where_the_label_is_needed() -> None:
    labels = torch.tensor([0, -1, -1, 1])
    scores = score(one_hot([[0, 0, 1, 1], [1, 1, 1, 1]], 3), labels, None, SAME)
    clean, attacked = tables(scores, batch_of(labels, ALL), (8,))
    for table in (clean, attacked):
        assert table["label"].to_pylist() == [0, None, None, 1]
        for name in ("correct", "label_confidence"):
            assert [value is None for value in table[name].to_pylist()] == [False, True, True, False]
        for name in ("prediction", "confidence", "clean_prediction", "epsilon", "source_index"):
            assert table[name].null_count == 0
    assert clean["fooled"].to_pylist() == [None] * 4
    assert attacked["fooled"].to_pylist() == [True, None, None, False]


def test_a_targeted_table_names_the_target_but_not_on_clean() -> None:
    labels, target = torch.tensor([0, 0, -1, 1]), torch.tensor([2, 1, 2, 0])
    scores = score(one_hot([[0, 0, 2, 1], [2, 0, 2, 1]], 3), labels, target, SAME)
    clean, attacked = tables(scores, batch_of(labels, ALL), (8,))
    assert clean["target"].to_pylist() == [None] * 4
    assert clean["fooled"].to_pylist() == [None] * 4
    assert attacked["target"].to_pylist() == [2, 1, 2, 0]
    assert attacked["fooled"].to_pylist() == [True, False, True, False]


def test_a_batch_without_a_valid_row_gives_empty_tables() -> None:
    labels, valid = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)
    scores = score(torch.randn(2, 0, 3), labels[valid], labels[valid], SAME)
    for table in tables(scores, batch_of(labels, valid), (8,)):
        assert table.num_rows == 0


def test_datasets_reads_a_table_as_images_and_classes() -> None:
    pixels = random_pixels(4, side=2)
    labels = torch.tensor([0, 2, -1, 1])
    scores = score(one_hot([[0, 0, 2, 1], [2, 0, 2, 1]], 3), labels, None, SAME)
    _, table = tables(scores, batch_of(labels, ALL), (8,))
    read = datasets.Dataset(table)
    assert read.features["prediction"].int2str(read["prediction"][:]) == ["eel", "cat", "eel", "dog"]
    for row, expected in zip(read, pixels, strict=True):
        assert isinstance(row["image"], Image.Image)
        np.testing.assert_array_equal(np.asarray(row["image"]), expected)
    for cell, expected in zip(table["image"].to_pylist(), pixels, strict=True):
        assert cell["path"] is None
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(cell["bytes"]))), expected)
