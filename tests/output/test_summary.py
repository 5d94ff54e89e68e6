"""`fgsm inspect`: tables that fit a terminal, however many models there are."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console, ConsoleOptions
from rich.table import Table

from pipeline.core.console import UNLIMITED, as_text
from pipeline.core.variants import make_variants
from pipeline.output.manifest import Subset
from pipeline.output.summary import _subset_table, inspect
from pipeline.output.transfer import Transfer, few_right
from tests.conftest import WriteConfig, generate_once, manifest
from tests.support.several import write_several


def counted(ids: int, size: int | None = 123_400_000) -> list[Subset]:
    """What two attacks on two models add up to, each with an id of so many letters."""
    models, attacks = ([letter * ids for letter in letters] for letters in ("mn", "ab"))
    return [
        Subset(
            split="test",
            attack=one.attack,
            model=one.model,
            level=one.level,
            subset=one.subset,
            rows=10_000,
            labelled=10_000,
            correct=10_000,
            fooled=10_000 if one.level else 0,
            confidence_sum=10_000,
            bytes=size,
        )
        for one in make_variants({attack: (models, [255]) for attack in attacks})
    ]


@dataclass
class Subsets:
    """The table of some subsets, as `Summary` draws it."""

    subsets: list[Subset]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield _subset_table(self.subsets, console, options)


def shown(subsets: list[Subset], width: int = 80) -> list[str]:
    return as_text(Subsets(subsets), width).splitlines()


@pytest.mark.parametrize(("ids", "epsilon"), [(1, True), (3, True), (4, False), (12, False)])
def test_the_table_of_subsets_fits_a_terminal(ids: int, epsilon: bool) -> None:
    head, *lines = shown(counted(ids))
    assert {len(line) for line in (head, *lines)} == {len(head)}
    assert len(head) <= 80
    # What is left out is the epsilon, in which a subset's name ends.
    assert ("epsilon" in head) == epsilon
    assert lines[-1].split() == [
        *("test", f"{'b' * ids}-{'n' * ids}-eps-255"),
        *(["255/255"] if epsilon else []),
        *("10,000", "100.00%", "1.000", "10,000", "123.4", "MB"),
    ]


def test_a_column_without_a_value_is_left_out() -> None:
    head, *lines = shown(counted(1, size=None))
    assert head.split() == ["split", "subset", "epsilon", "rows", "accuracy", "confidence", "fooled"]
    assert len(lines) == 5
    assert len(shown([])) == 1


def test_no_name_is_cut_where_it_is_too_long() -> None:
    _, *lines = shown(counted(60), 80)
    text = "".join(re.findall(r"^(?:test)? +(\S+)", "\n".join(lines), re.MULTILINE))
    assert f"{'b' * 60}-{'n' * 60}-eps-255" in text
    (line,) = [line for line in shown(counted(60), UNLIMITED) if f" {'b' * 60}-{'n' * 60}-eps-255 " in line]
    assert "255/255" in line


@pytest.mark.parametrize("prefix", ["m", "a_model_with_a_long_name_"])
def test_the_matrix_of_many_models_fits_a_terminal(write_config: WriteConfig, tmp_path: Path, prefix: str) -> None:
    attacks = {
        "fgsm": {"epsilons": ["2/255", "8/255"]},
        "noise": {"kind": "noise", "epsilons": ["8/255"]},
    }
    path = write_several(write_config, tmp_path, attacks, source={"limit": 6})
    text = path.read_text()
    for index, name in enumerate(("net", "sums", "turned")):
        text = re.sub(rf"^  {name}:", f"  {prefix}{index}:", text, flags=re.MULTILINE)
    path.write_text(text)
    generate_once(path)
    said = as_text(inspect(tmp_path / "out"), 80)
    matrix = said[said.index("Transfer") : said.index("\nrun ")].splitlines()
    assert max(map(len, matrix)) <= 80
    # Each cell of the matrix stands in it once, below its epsilon.
    cells = [cell for cell in manifest(tmp_path / "out")["transfer"] if cell["level"] == 8]
    block = said[said.index("test 8/255") : said.index("\nrun ")]
    answers = sorted(re.findall(r"[\d.]+, (?:[\d.]+|-)", block))
    assert answers == sorted(
        f"{100 * cell['correct'] / cell['images']:.1f}, "
        + (f"{100 * cell['lost'] / cell['clean_correct']:.1f}" if cell["clean_correct"] else "-")
        for cell in cells
    )
    assert len(answers) == 4 * 3
    # Beside it stands which models are seldom right.
    seldom = {cell["looking"] for cell in cells if cell["clean_correct"] < cell["images"] / 2}
    assert {line.split()[0] for line in said.splitlines() if " is right in only " in line} == seldom != set()


def test_why_little_transfers_to_a_model_that_is_seldom_right() -> None:
    cells = [
        Transfer(
            split="test",
            attack="fgsm",
            model="good",
            level=level,
            looking=looking,
            images=100,
            correct=0,
            clean_correct=clean,
            lost=0,
        )
        for level in (4, 8)
        for looking, clean in (("good", 50), ("poor", 18))
    ]
    (said,) = few_right(cells)
    assert said.startswith("poor is right in only 18 of 100 clean test images (18.0%)")
    assert few_right([cell.model_copy(update={"images": 0}) for cell in cells]) == []
