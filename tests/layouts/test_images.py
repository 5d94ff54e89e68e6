"""Layout images: the columns that DESIGN.md lists, and what they say of a row."""

import io
import json
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.load import parse_config
from pipeline.core.batches import Batch
from pipeline.core.errors import ConfigError
from pipeline.core.plan import Shard
from pipeline.engine.scores import contents_of
from pipeline.layouts.base import Scores, encode_column, make_features
from pipeline.layouts.images import Images
from pipeline.models.label_space import LabelSpace
from tests.conftest import CLASSES, random_pixels
from tests.support.scores import MANY_TO_ONE, SAME, TURNED, UNNAMED, one_hot, scored
from tests.support.variants import fgsm_at

IMAGES = Images()


def features_of(space: LabelSpace, *, targeted: bool, kept: Mapping[str, Any]) -> datasets.Features:
    attack = {"epsilons": ["4/255", "16/255"], "target": "random" if targeted else None}
    sections = {"source": {"kind": "digits"}, "model": {"kind": "digits"}, "output": {"path": "out"}}
    features: datasets.Features = make_features(
        IMAGES, contents_of(parse_config({**sections, "attack": attack}), {"digits": space}, kept)
    )
    return features


# ------------------------------------------------------------------------------------------------- features

COLUMNS = {
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "label": pa.int64(),
    "epsilon": pa.float64(),
    "attack": pa.string(),
    "model": pa.string(),
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
    features = features_of(space, targeted=targeted, kept=kept)
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
    schema = features_of(SAME, targeted=True, kept={"caption": datasets.Value("string")}).arrow_schema
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert described["image"] == {"_type": "Image"}
    for name in ("label", "prediction", "clean_prediction", "target"):
        assert described[name] == {"names": list(CLASSES), "_type": "ClassLabel"}
    assert datasets.Features.from_arrow_schema(schema) == features_of(
        SAME, targeted=True, kept={"caption": datasets.Value("string")}
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
    features = features_of(space, targeted=True, kept={})
    assert features["label"] == datasets.ClassLabel(names=list(CLASSES))
    assert features["prediction"] == features["clean_prediction"] == features["target"] == recorded


@pytest.mark.parametrize("name", [*COLUMNS, "target"])
def test_a_kept_column_must_not_have_the_name_of_ours(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^source\.keep_columns: {name} "):
        features_of(SAME, targeted=True, kept={"caption": datasets.Value("string"), name: datasets.Value("string")})


def test_a_kept_column_may_be_called_target_where_there_is_none() -> None:
    assert features_of(SAME, targeted=False, kept={"target": datasets.Value("string")})["target"] == datasets.Value(
        "string"
    )


# --------------------------------------------------------------------------------------------------- tables


ALL = torch.ones(4, dtype=torch.bool)


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
    *,
    space: LabelSpace = SAME,
    kept: Mapping[str, Any] | None = None,
) -> list[pa.Table]:
    """The clean table, then one for each level."""
    schema = features_of(space, targeted=not np.ma.getmaskarray(scores.target).all(), kept=kept or {}).arrow_schema
    pixels = torch.from_numpy(random_pixels(len(scores.label), side=2)).permute(0, 3, 1, 2)
    pictures = [pa.chunked_array([encode_column(pixels, "png")])] * len(scores.variants)
    made = IMAGES.tables(batch, scores, pictures, schema)
    for table in made:
        assert table.schema.equals(schema, check_metadata=True)
        table.validate(full=True)
    return made


def test_a_table_holds_one_row_for_each_valid_image() -> None:
    labels, valid = torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, True])
    logits = one_hot([[0, 0, 2, 2], [1, 1, 2, 1], [1, 2, 0, 0]], 3)
    scores = scored(fgsm_at(0, 4, 16), logits[:, valid], labels[valid], None, SAME)
    caption = {"caption": pa.chunked_array([["a"], ["b", "c"]])}
    clean, low, high = tables(scores, batch_of(labels, valid, caption), kept={"caption": datasets.Value("string")})

    assert clean.drop_columns(["image", "confidence", "label_confidence"]).to_pydict() == {
        "label": [0, 2, 1],
        "epsilon": [0.0] * 3,
        "attack": [None] * 3,
        "model": [None] * 3,
        "prediction": [0, 2, 2],
        "correct": [True, True, False],
        "clean_prediction": [0, 2, 2],
        "fooled": [None] * 3,
        "source_index": [100, 102, 103],
        "caption": ["a", "b", "c"],
    }
    assert low["epsilon"].to_pylist() == [4 / 255] * 3
    assert low["attack"].to_pylist() == ["fgsm"] * 3
    assert low["model"].to_pylist() == ["make"] * 3
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
    scores = scored(fgsm_at(0, 8), one_hot([[0, 0, 1, 1], [1, 1, 1, 1]], 3), labels, None, SAME)
    clean, attacked = tables(scores, batch_of(labels, ALL))
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
    scores = scored(fgsm_at(0, 8), one_hot([[0, 0, 2, 1], [2, 0, 2, 1]], 3), labels, target, SAME)
    clean, attacked = tables(scores, batch_of(labels, ALL))
    assert clean["target"].to_pylist() == [None] * 4
    assert clean["fooled"].to_pylist() == [None] * 4
    assert attacked["target"].to_pylist() == [2, 1, 2, 0]
    assert attacked["fooled"].to_pylist() == [True, False, True, False]


def test_a_batch_without_a_valid_row_gives_empty_tables() -> None:
    labels, valid = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)
    scores = scored(fgsm_at(0, 8), torch.randn(2, 0, 3), labels[valid], labels[valid], SAME)
    for table in tables(scores, batch_of(labels, valid)):
        assert table.num_rows == 0


def test_datasets_reads_a_table_as_images_and_classes() -> None:
    pixels = random_pixels(4, side=2)
    labels = torch.tensor([0, 2, -1, 1])
    scores = scored(fgsm_at(0, 8), one_hot([[0, 0, 2, 1], [2, 0, 2, 1]], 3), labels, None, SAME)
    _, table = tables(scores, batch_of(labels, ALL))
    read = datasets.Dataset(table)
    assert read.features["prediction"].int2str(read["prediction"][:]) == ["eel", "cat", "eel", "dog"]
    for row, expected in zip(read, pixels, strict=True):
        assert isinstance(row["image"], Image.Image)
        np.testing.assert_array_equal(np.asarray(row["image"]), expected)
    for cell, expected in zip(table["image"].to_pylist(), pixels, strict=True):
        assert cell["path"] is None
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(cell["bytes"]))), expected)
