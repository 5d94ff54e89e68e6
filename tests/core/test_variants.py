"""Variants: their order, and the names of their subsets."""

import re

import pytest

from pipeline.core.variants import CLEAN, ID, SUBSET, Variant, at_levels, group_variants, make_variants, plain_id


def subsets(**attacks: tuple[list[str | None], list[int]]) -> list[str]:
    return [variant.subset for variant in make_variants(attacks)]


def test_what_there_is_one_of_is_left_out_of_the_names() -> None:
    assert subsets(fgsm=(["resnet20"], [8, 2])) == ["clean", "eps-2", "eps-8"]
    assert subsets(fgsm=(["resnet20", "vgg"], [8])) == ["clean", "resnet20-eps-8", "vgg-eps-8"]
    assert subsets(fgsm=(["vgg"], [8]), pgd=(["vgg"], [4])) == ["clean", "fgsm-eps-8", "pgd-eps-4"]
    assert subsets(fgsm=(["a", "b"], [8]), pgd=(["b"], [8])) == [
        "clean",
        "fgsm-a-eps-8",
        "fgsm-b-eps-8",
        "pgd-b-eps-8",
    ]


def test_an_attack_of_no_model_names_none() -> None:
    variants = make_variants({"fgsm": (["a", "b"], [8]), "noise": ([None], [8])})
    assert [variant.subset for variant in variants] == ["clean", "fgsm-a-eps-8", "fgsm-b-eps-8", "noise-eps-8"]
    assert (variants[-1].attack, variants[-1].model) == ("noise", None)


def test_a_variant_has_an_epsilon_and_a_column() -> None:
    clean, attacked = make_variants({"fgsm": (["vgg"], [51])})
    assert clean == CLEAN
    assert (clean.epsilon, clean.column) == (0, "clean")
    assert (attacked.epsilon, attacked.column) == (0.2, "eps_51")


def test_names_are_of_the_form_that_readers_know() -> None:
    names = subsets(fgsm=(["a_1", "b"], [1, 255]), pgd=(["b"], [8]))
    assert all(re.fullmatch(SUBSET, name) for name in names)
    assert not any(re.fullmatch(SUBSET, name) for name in ("eps-", "a-b-c-eps-8", "../eps-8", "eps-8/x", "1a-eps-8"))


def test_what_an_attack_makes_at_other_levels_is_named_as_its_own() -> None:
    recorded = make_variants({"fgsm": (["a", "b"], [8]), "noise": ([None], [8])})
    assert at_levels(recorded, [0, 8]) == recorded
    assert at_levels(recorded, [3]) == (
        Variant(3, "fgsm", "a", "fgsm-a-eps-3"),
        Variant(3, "fgsm", "b", "fgsm-b-eps-3"),
        Variant(3, "noise", None, "noise-eps-3"),
    )
    assert at_levels(make_variants({"fgsm": (["vgg"], [8])}), [255])[0].subset == "eps-255"
    # Of a dataset without rows nobody knows the attack.
    assert at_levels([CLEAN], [8]) == (Variant(8, None, None, "eps-8"),)


def test_variants_follow_from_what_rows_say() -> None:
    variants = make_variants({"fgsm": (["a", "b"], [2, 8]), "noise": ([None], [4])})
    said = [(variant.level, str(variant.attack), variant.model) for variant in variants[1:]]
    assert group_variants(said) == variants


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", "resnet50"),
        ("google/vit-base-patch16-224", "vit_base_patch16_224"),
        ("path/to/file.py:make", "make"),
        ("/models/vit/", "vit"),
        ("50_layers", "m_50_layers"),
        ("***", "m_"),
        ("x" * 100, "x" * 64),
    ],
)
def test_an_id_follows_from_a_name(name: str, expected: str) -> None:
    assert plain_id(name) == expected
    assert re.fullmatch(ID, expected)
