"""The contact sheet of a dataset of several attacks: no picture of it is one that is not stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import pipeline
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import require_manifest
from pipeline.reporting.gallery import Cell, Group, hero, make_groups
from pipeline.reporting.sample import read_sample
from tests.conftest import WriteConfig, generate_once


@pytest.mark.parametrize("layout", ["images", "wide"])
@pytest.mark.parametrize("first", ["fgsm", "mifgsm"])
def test_pictures_of_attacks_that_lie_on_no_ray_are_the_stored_ones(
    layout: str, first: str, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(output={"layout": layout})
    content = yaml.safe_load(config.read_text())
    attack = content.pop("attack")
    kinds = [first, *{"fgsm", "mifgsm"} - {first}]
    config.write_text(json.dumps({**content, "attacks": {kind: {**attack, "kind": kind} for kind in kinds}}))
    generate_once(config)
    folder = OutputFolder(tmp_path / "out")
    manifest = require_manifest(folder)
    sample = read_sample(folder, manifest, "test", 10_000)
    assert sample is not None
    groups = make_groups(folder, manifest, sample, sample.variants, str)
    stored = pipeline.load(tmp_path / "out", split="test")
    pixels = {np.asarray(image).tobytes() for image in stored["image"]}
    for group in groups:
        for clean, _, *attacked in group.examples:
            assert len(attacked) == 2
            assert all(np.asarray(cell.image).tobytes() in pixels for cell in (clean, *attacked))


def example(*answers: tuple[str, float]) -> tuple[Cell, ...]:
    """Clean, the sign map, and images whose answer is right where it is `right`."""
    image = Image.new("L", (2, 2))
    clean, *cells = (
        Cell(f"{index}/255", image, answer, sure, wrong=answer != "right", succeeds=answer != "right")
        for index, (answer, sure) in enumerate(answers)
    )
    return clean, Cell("sign map", image), *cells


def test_the_hero_is_the_surest_mistake_at_the_smallest_epsilon() -> None:
    resists = example(("right", 1.0), ("right", 1.0), ("right", 0.999))
    unsure = example(("right", 0.6), ("cat", 0.7), ("cat", 0.9))
    surest = example(("right", 0.5), ("right", 0.6), ("dog", 0.994))
    sooner = example(("right", 0.4), ("eel", 0.99), ("eel", 0.993))
    groups = [Group("", "", examples) for examples in ((resists, unsure), (surest, sooner))]
    assert hero(groups) == (*sooner[:2], sooner[2])
    assert hero(groups[:1]) == (*unsure[:2], unsure[3])
    assert hero([Group("", "", (resists,))]) == (*resists[:2], resists[3])
