"""Columns: what a row holds in either layout, and one epsilon's rows out of rows that hold them all.

Layout images has a row for each image and epsilon, layout signs one for each source image. What a column
says of one epsilon lies in `attacks` there, or in `clean_...` where it is epsilon 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

IMAGE, SIGN, ATTACKS = "image", "sign", "attacks"
# The last of our own columns; those that are carried through follow.
LAST = "source_index"
# What the victim says of one image, and what layout signs calls it for the clean one.
ANSWER = {
    "prediction": "clean_prediction",
    "confidence": "clean_confidence",
    "label_confidence": "clean_label_confidence",
    "correct": "clean_correct",
}

Features = dict[str, Any]
MakeColumns = Callable[[Any, Any, bool], Features]


def image_columns(label: Any, predicted: Any, targeted: bool) -> Features:
    """Our own columns of layout images, in order, as `datasets` features.

    Args:
        label: feature of the labels.
        predicted: feature of the predictions.
        targeted: whether there is a `target` column.
    """
    return {
        IMAGE: datasets.Image(),
        "label": label,
        "epsilon": datasets.Value("float64"),
        **_answer(predicted),
        "clean_prediction": predicted,
        "fooled": datasets.Value("bool"),
        **({"target": predicted} if targeted else {}),
        LAST: datasets.Value("int64"),
    }


def sign_columns(label: Any, predicted: Any, targeted: bool) -> Features:
    """Our own columns of layout signs, as `image_columns`."""
    return {
        IMAGE: datasets.Image(),
        SIGN: datasets.Image(),
        "label": label,
        **{ANSWER[name]: feature for name, feature in _answer(predicted).items()},
        ATTACKS: datasets.List(
            {"epsilon": datasets.Value("float64"), **_answer(predicted), "fooled": datasets.Value("bool")}
        ),
        **({"target": predicted} if targeted else {}),
        LAST: datasets.Value("int64"),
    }


def _answer(predicted: Any) -> Features:
    value = datasets.Value
    features = (predicted, value("float32"), value("float32"), value("bool"))
    return dict(zip(ANSWER, features, strict=True))


def kept_columns(names: Sequence[str]) -> list[str]:
    """The carried-through ones among the columns of either layout."""
    return list(names[list(names).index(LAST) + 1 :])


def one_level(rows: pa.Table, level: int, recorded: Sequence[int]) -> dict[str, Any]:
    """The columns of layout images at one epsilon, without the image, out of rows of layout signs.

    Args:
        rows: N of them, each with as many `attacks` as there are recorded epsilons.
        level: the epsilon in grey levels; 0 is clean. Of one that is not recorded the victim's answers are null.
        recorded: the epsilons of `attacks`, in grey levels, in order.

    Returns:
        Arrow columns of N rows, by name and in order.
    """
    attacks = rows.schema.field(ATTACKS).type.value_type
    fooled = pa.nulls(rows.num_rows, pa.bool_())
    if not level:
        epsilon = np.zeros(rows.num_rows)
        answer = {name: rows.column(clean) for name, clean in ANSWER.items()}
    elif level in recorded:
        # Row after row, each with all epsilons: every len(recorded)-th entry is of this one.
        entries = rows.column(ATTACKS).combine_chunks().flatten()[recorded.index(level) :: len(recorded)]
        columns = dict(zip([field.name for field in attacks], entries.flatten(), strict=True))
        epsilon, fooled = columns["epsilon"], columns["fooled"]
        answer = {name: columns[name] for name in ANSWER}
    else:
        epsilon = np.full(rows.num_rows, level / 255)
        answer = {name: pa.nulls(rows.num_rows, attacks.field(name).type) for name in ANSWER}
    target = {}
    if "target" in rows.column_names:
        target["target"] = rows.column("target") if level else pa.nulls(rows.num_rows, pa.int64())
    return {
        "label": rows.column("label"),
        "epsilon": pa.array(epsilon),
        **answer,
        "clean_prediction": rows.column("clean_prediction"),
        "fooled": fooled,
        **target,
        LAST: rows.column(LAST),
        **{name: rows.column(name) for name in kept_columns(rows.column_names)},
    }
