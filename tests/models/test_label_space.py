"""Labels: when a dataset's classes and a model's agree, and what `label_map` makes of those that do not."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.models.label_space import LabelSpace, join_labels

PETS = ("cat", "dog", "eel")
LabelMap = Mapping[str | int, str | int] | str | None


def join(
    classes: Sequence[str] | None,
    model_classes: Sequence[str] | None,
    label_map: LabelMap = None,
    *,
    count: int | None = None,
    labels: Sequence[int] = (0, 1, 2, 0),
) -> LabelSpace:
    count = len(model_classes or ()) if count is None else count
    return join_labels(classes, {"test": np.array(labels, dtype=np.int64)}, model_classes, count, label_map)


@pytest.mark.parametrize(
    ("classes", "model_classes"),
    [
        (PETS, PETS),
        (PETS, None),
        (("tench, Tinca tinca", "great_white_shark", "Hen"), ("tench", "great white shark", "hen")),
        # Names that only one side uses tell nothing about the order.
        (("cat", "dog", "eel"), ("LABEL_0", "LABEL_1", "LABEL_2")),
        (("0 - zero", "1 - one", "2 - two"), ("0", "1", "2")),
        (("cat", "hound", "eel"), ("cat", "dog", "conger")),
    ],
)
def test_classes_that_agree(classes: Sequence[str], model_classes: Sequence[str] | None) -> None:
    space = join(classes, model_classes, count=3)
    assert space.dataset_classes == space.recorded_classes == tuple(classes)
    assert space.to_model.tolist() == space.to_recorded.tolist() == [0, 1, 2]


def test_imagenet_as_the_hub_and_as_torchvision_name_it_agree() -> None:
    categories = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    # ILSVRC/imagenet-1k calls the bird `crane` and the machine `crane2`, torchvision `crane bird` and `crane`.
    hub = list(categories)
    hub[134], hub[517] = "crane", "crane2"
    assert (categories[134], categories[517]) == ("crane bird", "crane")
    space = join(hub, categories, labels=range(1000))
    assert space.to_model.tolist() == space.to_recorded.tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("classes", "model_classes", "named"),
    [
        (PETS, ("dog", "cat", "eel"), r"class 0 .*'cat' .*'dog'"),
        (PETS, ("cat", "eel", "dog"), r"class 1 .*'dog' .*'eel'"),
        (("Cat", "dog_", "eel"), ("CAT", "Eel, conger", "dog_"), r"class 1 .*'dog_'"),
        (("cat", "dog", "bird"), ("dog", "kitty", "bird"), r"class 0 .*'cat'"),
        (PETS, (*PETS, "fox"), r"3 class.* 4;"),
        (PETS, PETS[:2], r"3 class.* 2;"),
    ],
)
def test_classes_that_differ_need_a_map(
    classes: Sequence[str], model_classes: Sequence[str] | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.label_map: .*\b{named}"):
        join(classes, model_classes)


def test_count_differs_from_a_model_without_names() -> None:
    with pytest.raises(ConfigError, match=r"^model\.label_map: .* 3 class.* 10;"):
        join(PETS, None, count=10)


@pytest.mark.parametrize(
    ("classes", "label_map", "to_model"),
    [
        (PETS, {"cat": "dog", "dog": "cat", "eel": "eel"}, [1, 0, 2]),
        (PETS, {"cat": 1, "dog": 0, "eel": 2}, [1, 0, 2]),
        (PETS, {0: "eel", 1: "cat", 2: "dog"}, [2, 0, 1]),
        (PETS, {2: 0, "cat": 2, "dog": "dog"}, [2, 1, 0]),
        # Where the names are numbers, a number is a name.
        (("2", "1", "0"), {0: "cat", 1: "dog", 2: "eel"}, [2, 1, 0]),
        (None, {0: 2, 1: 0, 2: 1}, [2, 0, 1]),
        (None, {"0": "eel", "1": "cat", "2": "dog"}, [2, 0, 1]),
    ],
)
def test_map_one_to_one_gives_predictions_back_as_dataset_classes(
    classes: Sequence[str] | None, label_map: LabelMap, to_model: list[int]
) -> None:
    space = join(classes, PETS, label_map)
    assert space.to_model.tolist() == to_model
    assert space.dataset_classes == space.recorded_classes == (tuple(classes) if classes else ("0", "1", "2"))
    assert space.to_recorded[space.to_model].tolist() == [0, 1, 2]


@given(st.permutations(range(6)))
def test_any_one_to_one_map_is_inverted(to_model: list[int]) -> None:
    names = [f"class {index}" for index in range(6)]
    space = join(names, None, dict(enumerate(to_model)), count=6)
    assert space.to_model.tolist() == to_model
    assert space.to_recorded[space.to_model].tolist() == list(range(6))
    assert space.recorded_classes == tuple(names)


@pytest.mark.parametrize(
    ("classes", "label_map", "to_model"),
    [
        (("kitten", "cat", "dog"), {"kitten": "cat", "cat": "cat", "dog": "dog"}, [0, 0, 1]),
        (("dog", "eel"), {"dog": "dog", "eel": "eel"}, [1, 2]),
        (("a", "b", "c", "d"), {"a": 0, "b": 1, "c": 2, "d": 0}, [0, 1, 2, 0]),
    ],
)
def test_map_that_is_not_one_to_one_records_the_models_own_classes(
    classes: Sequence[str], label_map: LabelMap, to_model: list[int]
) -> None:
    space = join(classes, PETS, label_map, labels=[0, 1])
    assert space.dataset_classes == tuple(classes)
    assert space.to_model.tolist() == to_model
    assert space.recorded_classes == PETS
    assert space.to_recorded.tolist() == [0, 1, 2]


def test_map_onto_a_model_without_names() -> None:
    space = join(("dog", "eel"), None, {"dog": 7, "eel": 2}, count=10, labels=[0, 1])
    assert space.to_model.tolist() == [7, 2]
    assert space.recorded_classes is None
    assert space.to_recorded.tolist() == list(range(10))


@pytest.mark.parametrize("swapped", [(0, 1), (17, 180)])
def test_two_swapped_classes_of_many_are_another_order(swapped: tuple[int, int]) -> None:
    names = [f"class {index}" for index in range(200)]
    first, second = swapped
    others = [*names]
    others[first], others[second] = names[second], names[first]
    with pytest.raises(ConfigError, match=rf"^model\.label_map: .*class {first} .*{names[second]!r}"):
        join_labels(names, {}, others, 200, None)


@pytest.mark.parametrize(
    ("label_map", "named"),
    [
        ({"cat": 0, "dog": 1}, r".*'eel' "),
        ({"cat": 0}, r".*'dog', 'eel' "),
        ({}, r".*'cat', 'dog', 'eel' "),
        ({"cats": 0, "dog": 1, "eel": 2}, r"'cats' .*dataset.*'cat'\?"),
        ({"zzz": 0}, r"'zzz' .*dataset.*\('cat', 'dog', 'eel'\)"),
        ({3: 0}, r"3 .*dataset"),
        ({-1: 0}, r"-1 .*dataset"),
        ({"cat": "tigr"}, r"'tigr' .*model.*'tiger'\?"),
        ({"cat": "zzz"}, r"'zzz' .*model.*\('tiger', 'wolf', 'moray'\)"),
        ({"cat": 3}, r"3 .*model"),
        ({"cat": -1}, r"-1 .*model"),
    ],
)
def test_map_that_is_wrong(label_map: LabelMap, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.label_map: {named}"):
        join(PETS, ("tiger", "wolf", "moray"), label_map)


def test_long_lists_of_names_are_cut_short() -> None:
    names = [f"class {index}" for index in range(9)]
    with pytest.raises(ConfigError, match=r"^model\.label_map: .*'class 4' and 4 "):
        join(names, None, {}, count=9)


def test_map_onto_a_model_without_names_takes_no_names() -> None:
    with pytest.raises(ConfigError, match=r"^model\.label_map: 'tiger' "):
        join(PETS, None, {"cat": "tiger"}, count=3)


def test_identity_overrules_names_and_a_smaller_count() -> None:
    swapped = join(PETS, ("dog", "cat", "eel"), "identity")
    assert swapped.to_model.tolist() == swapped.to_recorded.tolist() == [0, 1, 2]
    assert swapped.recorded_classes == PETS
    fewer = join(PETS, ("dog", "cat", "eel", "fox"), "identity")
    assert fewer.dataset_classes == PETS
    assert fewer.to_model.tolist() == [0, 1, 2]
    assert fewer.recorded_classes == ("dog", "cat", "eel", "fox")
    assert fewer.to_recorded.tolist() == [0, 1, 2, 3]


def test_identity_cannot_hold_for_more_classes_than_the_model_has() -> None:
    with pytest.raises(ConfigError, match=r"^model\.label_map: identity .* 3 .* 2\."):
        join(PETS, PETS[:2], "identity")


@pytest.mark.parametrize("label_map", [None, "identity"])
def test_dataset_without_names_takes_the_models(label_map: LabelMap) -> None:
    assert join(None, PETS, label_map).dataset_classes == PETS
    unnamed = join(None, None, label_map, count=4)
    assert unnamed.dataset_classes == unnamed.recorded_classes == ("0", "1", "2", "3")
    assert unnamed.to_model.tolist() == unnamed.to_recorded.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("classes", "label_map"),
    [(None, None), (PETS, None), (PETS, "identity"), (PETS, {"cat": 0, "dog": 1, "eel": 2})],
)
def test_label_outside_the_classes(classes: Sequence[str] | None, label_map: LabelMap) -> None:
    labels = {"split0": np.array([0, 1]), "split1": np.array([2, 3])}
    with pytest.raises(ConfigError, match=r"^source: .*split1 .* 3, .* 3 class.*\b2\)"):
        join_labels(classes, labels, PETS, 3, label_map)


def test_unlabelled_rows_are_no_label_outside_the_classes() -> None:
    assert join(PETS, PETS, labels=[-1, -1]).to_model.tolist() == [0, 1, 2]
    assert join(None, PETS, labels=[-1, -1]).dataset_classes == PETS


@pytest.mark.parametrize(
    ("names", "distinct"),
    [
        (("crane", "hen", "crane"), ("crane", "hen", "crane (2)")),
        (("a", "a", "a"), ("a", "a (1)", "a (2)")),
        # A name that is already taken by what a later one would become.
        (("a", "a (2)", "a"), None),
    ],
)
def test_equal_names_are_made_distinct(names: Sequence[str], distinct: Sequence[str] | None) -> None:
    space = join(names, names)
    assert len(space.dataset_classes) == len(set(space.dataset_classes)) == len(names)
    assert space.recorded_classes == space.dataset_classes
    assert distinct is None or space.dataset_classes == tuple(distinct)


WILD = ("wolf", "tiger", "moray", "dog")


@pytest.mark.parametrize(
    ("classes", "model_classes", "label_map", "target", "index"),
    [
        (PETS, PETS, None, "dog", 1),
        (PETS, PETS, None, 2, 2),
        # One to one: the dataset's classes are recorded, so its names and numbers count.
        (PETS, WILD[:3], {"cat": 1, "dog": 0, "eel": 2}, "cat", 1),
        (PETS, WILD[:3], {"cat": 1, "dog": 0, "eel": 2}, 0, 1),
        # Otherwise the model's numbers are. A name is still the dataset's, though the model has it for another class.
        (("dog", "eel"), WILD, {"dog": 0, "eel": 2}, "eel", 2),
        (("dog", "eel"), WILD, {"dog": 0, "eel": 2}, "dog", 0),
        (("dog", "eel"), WILD, {"dog": 0, "eel": 2}, 1, 1),
        (PETS, ("dog", *WILD), "identity", "dog", 1),
        # What only the model knows is its own.
        (("dog", "eel"), WILD, {"dog": 0, "eel": 2}, "tiger", 1),
        (("dog", "eel"), None, {"dog": 0, "eel": 2}, "eel", 2),
    ],
)
def test_a_target_is_a_class_of_the_dataset_or_else_of_the_model(
    classes: Sequence[str], model_classes: Sequence[str] | None, label_map: LabelMap, target: str | int, index: int
) -> None:
    count = len(model_classes or WILD)
    space = join(classes, model_classes, label_map, count=count, labels=[0, 1])
    assert space.target_index(target, space.dataset_classes) == index


def test_a_target_is_a_class_of_the_label_column_whatever_a_model_calls_its_own() -> None:
    """A source that names no classes has those of the first model."""
    first, other = join(None, PETS, None), join(None, None, None, count=2, labels=[0, 1])
    assert other.target_index("dog", first.dataset_classes) == 1
    with pytest.raises(ConfigError, match=r"^attack\.target: "):
        other.target_index("eel", first.dataset_classes)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("dogs", "'dog'?"),
        ("zzz", "('cat', 'dog', 'eel')"),
        (3, "3"),
        (-1, "-1"),
    ],
)
def test_target_that_is_no_class(target: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=r"^attack\.target: ") as caught:
        join(PETS, PETS).target_index(target, PETS, "the model vgg")
    assert named in str(caught.value)
    assert "the model vgg" in str(caught.value)
