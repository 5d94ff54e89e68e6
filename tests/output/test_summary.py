"""`fgsm inspect`: tables that fit a terminal, however many models there are."""

import re
from pathlib import Path

import pytest

from tests.conftest import WriteConfig, fgsm, generate_once, manifest
from tests.support.several import write_several


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
    said = fgsm("inspect", tmp_path / "out").stdout
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
