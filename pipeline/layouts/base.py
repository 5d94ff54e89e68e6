"""What a layout is, and the columns of a dataset, each declared once for all layouts.

A layout says how an image, clean and at every epsilon, is stored: in which subsets, as which pictures, in which rows.
Every layout is read back as rows of the plainest one: a row for each image and epsilon, in which the columns below
stand under their own names. A layout with a row for each source image keeps what is said of the clean image in
`clean_...` and the rest in a list `attacks`.

To add a column, add it to COLUMNS. What each of several models says follows our own columns, under names that end in
its id; columns that are carried through from the source come last.

Nothing here needs torch or `datasets` before a run is made, so that `fgsm inspect` answers at once.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from pipeline.core.variants import CLEAN, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.core.batches import Batch
    from pipeline.core.images import ImageFormat

IMAGE, LABEL, EPSILON, ATTACK, MODEL, ATTACKS = "image", "label", "epsilon", "attack", "model", "attacks"
# Where a source is streamed, the file that a row is of.
FILE = "source_file"
# Of an encoded image as `datasets` stores it, the fields that hold bytes.
IMAGE_FIELDS = ("bytes",)
# The last of our own columns.
LAST = "source_index"
# The row's own model: the one that its image was made of; the first of a row that is of none.
OWN = ""
# Names that only columns of one of several models have.
OF_MODEL = re.compile(r"(?:clean_)?(?:prediction|correct)_(.+)", re.DOTALL)


class Picture(NamedTuple):
    """A column of pictures in one subset."""

    subset: str
    column: str


# Reads a column of a subset, given the names of both.
ColumnReader = Callable[[str, str], pa.ChunkedArray]


@dataclass(frozen=True)
class Scores:
    """What E models say of the M valid rows of a batch in V variants, clean first.

    models: their ids. own: (V,), the index of the rows' own model.
    prediction (E, V, M) int64, in recorded indices; correct (E, V, M) bool, masked where a row is unlabelled.
    Of the own model alone: confidence (V, M) float32 in [0, 1]; label_confidence (V, M) likewise, masked where a row is
    unlabelled; fooled (V, M) bool, masked on clean and, without a target, where a row is unlabelled.
    label (M,) int64, masked where there is none; target (V, M) int64 in recorded indices, masked where there is none.
    """

    variants: tuple[Variant, ...]
    models: tuple[str, ...]
    own: NDArray[np.int64]
    prediction: NDArray[np.int64]
    correct: np.ma.MaskedArray[Any, np.dtype[np.bool_]]
    confidence: NDArray[np.float32]
    label_confidence: np.ma.MaskedArray[Any, np.dtype[np.float32]]
    fooled: np.ma.MaskedArray[Any, np.dtype[np.bool_]]
    label: np.ma.MaskedArray[Any, np.dtype[np.int64]]
    target: np.ma.MaskedArray[Any, np.dtype[np.int64]]

    def of_own(self, values: Any) -> Any:
        """(E, V, M) to (V, M): what the own model of each variant's rows says."""
        return values[self.own, np.arange(len(self.own))]


@dataclass(frozen=True)
class Column:
    """One column of a dataset.

    meaning: for the card. clean_meaning: that of `clean_...`, None where a clean image has no such value of its own.
    value: from scores and the batch that they are of; without it, what the scores have under the column's name. (V, M),
    or (M,) where it is not `per_variant`; masked is null. of_variant: it is the same in all rows of a variant, which
    has it under the column's name.
    dtype: of the values; `classes`: whose classes they are, LABEL for the dataset's or a model's id, if they are some.
    optional: not every run has it. of_clean: the column whose value for the clean image, by the row's own model, it
    repeats; where a row is of a source image, that stands in `clean_...` already. of_attack: the same at each epsilon
    of one attack on one model; where a run has one such pair and a row is of a source image, it stands there once.
    """

    name: str
    meaning: str
    clean_meaning: str | None = None
    value: "Callable[[Scores, Batch], Any] | None" = None
    dtype: str = "int64"
    classes: str | None = None
    per_variant: bool = True
    of_variant: bool = False
    optional: bool = False
    of_clean: str | None = None
    of_attack: bool = False

    @property
    def clean_name(self) -> str | None:
        """Its name in rows of a source image for what is said of the clean one; None where there is no such column."""
        return None if self.clean_meaning is None else f"clean_{self.name}"

    @property
    def type(self) -> pa.DataType:
        """The Arrow type of its values."""
        return pa.type_for_alias(self.dtype)

    def values(self, scores: Scores, batch: "Batch") -> Any:
        """Its values in a batch; see `value`."""
        return getattr(scores, self.name) if self.value is None else self.value(scores, batch)

    def blank(self, variant: Variant, rows: int) -> pa.Array:
        """Its values in rows of which only the variant is known: null but where it follows from that."""
        value = getattr(variant, self.name) if self.of_variant else None
        return pa.repeat(pa.scalar(value, self.type), rows)


COLUMNS = (
    Column(LABEL, "null if the source has none", classes=LABEL, per_variant=False),
    Column(EPSILON, "k/255; 0 is clean", dtype="float64", of_variant=True),
    Column(ATTACK, "what made the image; null on clean images", dtype="string", of_variant=True),
    Column(MODEL, "the attacked model; null if there is none", dtype="string", of_variant=True),
    Column(
        "prediction",
        "the model's prediction for these pixels",
        "the model's prediction for the clean image",
        lambda scores, _: scores.of_own(scores.prediction),
        classes=OWN,
    ),
    Column("confidence", "probability of the prediction", "probability of that prediction", dtype="float32"),
    Column(
        "label_confidence", "probability of the label", "probability of the label, for the clean image", dtype="float32"
    ),
    Column(
        "correct",
        "whether the prediction is the label",
        "whether the clean prediction is the label",
        lambda scores, _: scores.of_own(scores.correct),
        dtype="bool",
    ),
    Column(
        "clean_prediction",
        "the model's prediction for the clean image",
        value=lambda scores, _: scores.prediction[scores.own, 0],
        classes=OWN,
        of_clean="prediction",
    ),
    Column("fooled", "whether it was right when clean and is wrong now; null on clean images", dtype="bool"),
    Column(
        "target",
        "the target class of the attack; null if it has none",
        classes=OWN,
        optional=True,
        of_attack=True,
    ),
    Column(
        FILE,
        "the file of the source that the row is in",
        value=lambda _, batch: np.full(len(batch.source_index), batch.shard.file),
        dtype="string",
        per_variant=False,
        optional=True,
    ),
    Column(LAST, "row in the source's split", value=lambda _, batch: batch.source_index, per_variant=False),
)


def model_columns(name: str) -> tuple[str, str]:
    """What one of several models says of one image: its prediction, and whether that is right."""
    return f"prediction_{name}", f"correct_{name}"


def _of_model(model: str) -> tuple[Column, Column]:
    """The columns of one of several models."""

    def column(name: str, **options: Any) -> Column:
        def value(scores: Scores, _: "Batch") -> Any:
            return getattr(scores, name)[scores.models.index(model)]

        same, clean = f"as {name}, of model {model}", f"as clean_{name}, of model {model}"
        return Column(f"{name}_{model}", same, clean, value, **options)

    return column("prediction", classes=model), column("correct", dtype="bool")


def columns_of(names: Sequence[str]) -> list[Column]:
    """The columns that a dataset has, in the order of layout images, from the names of those of any layout.

    What is carried through is not among them.
    """
    # A column that is carried through may be called `target` in a run that has none.
    own = names[: list(names).index(LAST)]
    ours = [column for column in COLUMNS if not column.optional or column.name in own]
    return [*ours, *(column for model in model_ids(names) for column in _of_model(model))]


def model_ids(names: Iterable[str]) -> list[str]:
    """The models that have columns of their own among those of any layout, in order."""
    found = filter(None, map(OF_MODEL.fullmatch, names))
    return list(dict.fromkeys(match[1] for match in found))


def kept_columns(names: Sequence[str]) -> list[str]:
    """The carried-through ones among the columns of any layout."""
    return [name for name in names[list(names).index(LAST) + 1 :] if not OF_MODEL.fullmatch(name)]


@dataclass(frozen=True)
class Contents:
    """What the columns of a dataset follow from, in any layout.

    variants: those that are recorded, clean first. models: their ids. classes: the feature of the labels, by LABEL, of
    the predictions of a row's own model, by OWN, and of each model's, by its id. kept: features of the columns that are
    carried through. targeted, streamed: whether there is a `target`, and a `source_file`.
    """

    variants: tuple[Variant, ...]
    models: tuple[str, ...]
    classes: Mapping[str, Any]
    kept: Mapping[str, Any]
    targeted: bool
    streamed: bool

    @property
    def columns(self) -> list[Column]:
        """Our own and those of several models, in the order of layout images."""
        optional = {"target": self.targeted, FILE: self.streamed}
        ours = [column for column in COLUMNS if optional.get(column.name, True)]
        models = self.models if len(self.models) > 1 else ()
        return [*ours, *(column for model in models for column in _of_model(model))]

    def feature(self, column: Column) -> Any:
        """The feature of `datasets` that a column has."""
        import datasets

        return datasets.Value(column.dtype) if column.classes is None else self.classes[column.classes]


class Layout(ABC):
    """How a dataset is stored, and read back.

    subsets: a regular expression of the names of subsets that it may have. per_image: whether a row is of a source
    image, with all variants, rather than of one variant. stores_sign: whether the picture that says in which direction
    an image moves is a sign map, rather than an attacked image, in which clipping hides some signs.
    """

    subsets: str
    per_image: bool
    stores_sign = False

    def subset(self, variant: Variant) -> str:
        """The subset in which the rows of a recorded variant are."""
        return self.picture(variant).subset

    @abstractmethod
    def picture(self, variant: Variant) -> Picture:
        """The image of a recorded variant, or with `stores_sign` the sign map that leads to it."""

    def pictures(self, variants: Sequence[Variant]) -> tuple[Picture, ...]:
        """All pictures of a source image, the clean image first."""
        return tuple(dict.fromkeys(map(self.picture, variants)))

    def ray(self, variant: Variant, variants: Sequence[Variant]) -> tuple[Picture, Picture]:
        """The clean image, and a picture that says in which direction a variant's attack moves it: from these any x_k
        follows. `variants` are those that are recorded."""
        # Any image of the same attack on the same model says in which direction.
        attacked = next(other for other in variants if variant.at(other.level) == other)
        return self.picture(CLEAN), self.picture(attacked)

    def source(self, variant: Variant, variants: Sequence[Variant]) -> tuple[Picture, ...]:
        """From what the image of a variant, recorded or not, is read: the picture itself, or the two of its `ray`."""
        stored = variant == CLEAN or (variant in variants and not self.stores_sign)
        return (self.picture(variant),) if stored else self.ray(variant, variants)

    @abstractmethod
    def features(self, contents: Contents) -> dict[str, Any]:
        """The columns of every subset as features of `datasets`, in order."""

    def fields(self, column: str) -> tuple[str, ...]:
        """The fields of a column of pictures that hold bytes: a picture is stored as one value of each."""
        return IMAGE_FIELDS

    def encode(self, column: str, pictures_u8: "Tensor", image_format: "ImageFormat") -> pa.StructArray:
        """What a column of pictures holds of those that `stored` gives, (N, C, H, W) uint8 on the CPU; lossless."""
        return encode_column(pictures_u8, image_format)

    def stored(self, images: "Sequence[Tensor]", directions: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        """What is encoded, (N, C, H, W) uint8, one for each of `pictures`.

        Args:
            images: V times (N, C, H, W) uint8, clean first.
            directions: (N, C, H, W) int8 in -1, 0, 1, one for each attack on each model, in the order of the variants.
        """
        return tuple(images)

    @abstractmethod
    def tables(
        self, batch: "Batch", scores: Scores, pictures: Sequence[pa.ChunkedArray], schema: pa.Schema
    ) -> list[pa.Table]:
        """A batch as it is written: a table of the schema for each subset; `pictures` are the encoded ones."""

    @abstractmethod
    def rows(self, tables: Mapping[str, pa.Table], variant: Variant, variants: Sequence[Variant]) -> pa.Table:
        """What is recorded of N source images in one variant: the columns of layout images but the image.

        Args:
            tables: N rows each of the subsets that `source` names; pictures may be left out.
            variant: which. Of one that is not recorded the models' answers are null.
            variants: those that are recorded, clean first.

        Raises:
            ValueError: the rows are not those of a dataset with these variants.
        """

    @abstractmethod
    def answers(
        self, name: str, variants: Sequence[Variant], recorded: Sequence[Variant], read: ColumnReader
    ) -> list[pa.Array]:
        """What one column of layout images, not of pictures, says of N source images in some recorded variants.

        Args:
            name: of the column, one that is `per_variant` and in `attacks` where rows are of a source image.
            variants: which, without clean.
            recorded: all that are recorded, clean first.
            read: reads a column, of N rows, of one of the subsets; a dotted name is one field of it, as in Parquet.

        Returns:
            (N,) for each of `variants`.

        Raises:
            ValueError: the rows are not those of a dataset with these variants.
        """

    @abstractmethod
    def recorded(self, subsets: Sequence[str], first: Callable[[str, str], Any]) -> tuple[Variant, ...] | None:
        """The recorded variants, clean first, of a dataset that has no manifest; None where it is not of this layout.

        Where only names were looked at, attack and model of a variant are None, and its rows say them.

        Args:
            subsets: the names of its subsets.
            first: reads the first value of a column in a subset; None where there is none.
        """

    def describe(self, picture: Picture) -> str:
        """What the card says of a picture."""
        return "lossless"

    @abstractmethod
    def summary(self, subset: str, variants: Sequence[Variant]) -> str:
        """What the card says of a subset."""

    def example(self, variants: Sequence[Variant]) -> str:
        """Markdown for the card: how attacked images are read from a row without this package; empty if plainly."""
        return ""


def subsets_of(layout: Layout, variants: Sequence[Variant]) -> tuple[str, ...]:
    """The subsets that a layout stores of the recorded variants: each is a folder, and a config of the Hub's."""
    return tuple(dict.fromkeys(picture.subset for picture in layout.pictures(variants)))


def picture_columns(layout: Layout, variants: Sequence[Variant]) -> tuple[str, ...]:
    """The names of the columns that hold pictures."""
    return tuple(dict.fromkeys(picture.column for picture in layout.pictures(variants)))


def make_features(layout: Layout, contents: Contents) -> Any:
    """The columns of every subset of a dataset, in order, as `datasets.Features`.

    Raises:
        ConfigError: a carried-through column has the name of one of ours.
    """
    import datasets

    ours = layout.features(contents)
    # Every layout is read back as layout images, whose names must be free as well.
    taken = {*ours, IMAGE, FILE, *(column.name for column in contents.columns)}
    for name in contents.kept:
        if OF_MODEL.fullmatch(name):
            raise ConfigError(f"source.keep_columns: {name} could be taken for a column of a model; rename it first.")
        if name in taken:
            raise ConfigError(f"source.keep_columns: {name} is a column of the output itself; rename it first.")
    return datasets.Features({**ours, **contents.kept})


def encode_column(images_u8: "Tensor", image_format: "ImageFormat", *, smooth: bool = True) -> pa.StructArray:
    """Images, (N, C, H, W) uint8 on the CPU, as an Arrow column of `datasets`, encoded as by `encode_images`."""
    from pipeline.core.images import encode_images

    pictures = encode_images(images_u8, image_format, smooth=smooth)
    ends = np.cumsum([0, *map(len, pictures)], dtype=np.int32)
    # Joined first: Python lets other threads go on meanwhile, and Arrow does not while it copies values one by one.
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(pictures))]
    encoded = pa.Array.from_buffers(pa.binary(), len(pictures), buffers)
    return pa.StructArray.from_arrays([encoded, pa.nulls(len(encoded), pa.string())], ["bytes", "path"])
