"""Columns: what a row holds in either layout, and one epsilon's rows out of rows that hold them all.

Layout images has a row for each image and epsilon, layout signs one for each source image. What a column
says of one epsilon lies in `attacks` there, or in `clean_...` where it is epsilon 0. What an evaluator says
follows our own columns, under names that end in its id; carried-through columns come last.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

IMAGE, SIGN, ATTACKS = "image", "sign", "attacks"
# Where a source is streamed, the file that a row is of.
FILE = "source_file"
# The last of our own columns; the evaluators' follow, and those that are carried through.
LAST = "source_index"
# Names that only evaluators' columns have.
EVALUATED = re.compile(r"(?:clean_)?(?:prediction|correct)_(.+)", re.DOTALL)
# What the victim says of one image, and what layout signs calls it for the clean one.
ANSWER = {
    "prediction": "clean_prediction",
    "confidence": "clean_confidence",
    "label_confidence": "clean_label_confidence",
    "correct": "clean_correct",
}

Features = dict[str, Any]
MakeColumns = Callable[..., Features]


def image_columns(
    label: Any, predicted: Any, targeted: bool, evaluators: Mapping[str, Any], *, streamed: bool = False
) -> Features:
    """Our own columns of layout images, in order, as `datasets` features.

    Args:
        label: feature of the labels.
        predicted: feature of the predictions.
        targeted: whether there is a `target` column.
        evaluators: feature of each evaluator's predictions, by its id.
        streamed: whether there is a `source_file` column.
    """
    return {
        IMAGE: datasets.Image(),
        "label": label,
        "epsilon": datasets.Value("float64"),
        **_answer(predicted),
        "clean_prediction": predicted,
        "fooled": datasets.Value("bool"),
        **({"target": predicted} if targeted else {}),
        **({FILE: datasets.Value("string")} if streamed else {}),
        LAST: datasets.Value("int64"),
        **_evaluated(evaluators),
    }


def sign_columns(
    label: Any, predicted: Any, targeted: bool, evaluators: Mapping[str, Any], *, streamed: bool = False
) -> Features:
    """Our own columns of layout signs, as `image_columns`."""
    return {
        IMAGE: datasets.Image(),
        SIGN: datasets.Image(),
        "label": label,
        **{ANSWER[name]: feature for name, feature in _answer(predicted).items()},
        ATTACKS: datasets.List(
            {
                "epsilon": datasets.Value("float64"),
                **_answer(predicted),
                "fooled": datasets.Value("bool"),
                **_evaluated(evaluators),
            }
        ),
        **({"target": predicted} if targeted else {}),
        **({FILE: datasets.Value("string")} if streamed else {}),
        LAST: datasets.Value("int64"),
        **{f"clean_{name}": feature for name, feature in _evaluated(evaluators).items()},
    }


def _answer(predicted: Any) -> Features:
    value = datasets.Value
    features = (predicted, value("float32"), value("float32"), value("bool"))
    return dict(zip(ANSWER, features, strict=True))


def _evaluated(evaluators: Mapping[str, Any]) -> Features:
    columns: Features = {}
    for name, predicted in evaluators.items():
        columns |= dict(zip(evaluator_columns(name), (predicted, datasets.Value("bool")), strict=True))
    return columns


def evaluator_columns(name: str) -> tuple[str, str]:
    """What an evaluator says of one image: its prediction, and whether that is right."""
    return f"prediction_{name}", f"correct_{name}"


def evaluator_ids(names: Iterable[str]) -> list[str]:
    """The evaluators that have columns among those of either layout, in order."""
    found = filter(None, map(EVALUATED.fullmatch, names))
    return list(dict.fromkeys(match[1] for match in found))


def kept_columns(names: Sequence[str]) -> list[str]:
    """The carried-through ones among the columns of either layout."""
    return [name for name in names[list(names).index(LAST) + 1 :] if not EVALUATED.fullmatch(name)]


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
    evaluated = [column for name in evaluator_ids(rows.column_names) for column in evaluator_columns(name)]
    clean_names = {**ANSWER, **{name: f"clean_{name}" for name in evaluated}}
    fooled = pa.nulls(rows.num_rows, pa.bool_())
    if not level:
        epsilon = np.zeros(rows.num_rows)
        answer = {name: rows.column(clean) for name, clean in clean_names.items()}
    elif level in recorded:
        # Row after row, each with all epsilons: every len(recorded)-th entry is of this one.
        entries = rows.column(ATTACKS).combine_chunks().flatten()[recorded.index(level) :: len(recorded)]
        columns = dict(zip([field.name for field in attacks], entries.flatten(), strict=True))
        epsilon, fooled = columns["epsilon"], columns["fooled"]
        answer = {name: columns[name] for name in clean_names}
    else:
        epsilon = np.full(rows.num_rows, level / 255)
        answer = {name: pa.nulls(rows.num_rows, attacks.field(name).type) for name in clean_names}
    target = {}
    if "target" in rows.column_names:
        target["target"] = rows.column("target") if level else pa.nulls(rows.num_rows, pa.int64())
    return {
        "label": rows.column("label"),
        "epsilon": pa.array(epsilon),
        **{name: answer[name] for name in ANSWER},
        "clean_prediction": rows.column("clean_prediction"),
        "fooled": fooled,
        **target,
        **({FILE: rows.column(FILE)} if FILE in rows.column_names else {}),
        LAST: rows.column(LAST),
        **{name: answer[name] for name in evaluated},
        **{name: rows.column(name) for name in kept_columns(rows.column_names)},
    }
