"""What README and docs/ say is right: configs load, commands have these options, links lead somewhere, recipes run."""

import itertools
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from pipeline.cli import app
from pipeline.config.load import load_config
from tests.conftest import REPOSITORY, generate_once

README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *DOCS]


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page in some languages, block by block."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_figure_is_still_to_come(page: Path) -> None:
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|[A-Z]+(?:TABLE|TIME))\b", page.read_text())


def test_the_readme_stays_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", [page for page in (README, *DOCS) if blocks(page, "yaml")], ids=name_of)
def test_the_configs_of_a_page_are_valid(page: Path, tmp_path: Path) -> None:
    """Those that are a part of a config are put into the README's."""
    whole = yaml.safe_load(blocks(README, "yaml")[0])
    (tmp_path / "blurred.py").write_text("class Blurred: ...")
    for block in blocks(page, "yaml"):
        part = yaml.safe_load(block) or {}  # a comment is a block, too
        rest = {key: value for key, value in whole.items() if f"{key}s" not in part}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**rest, **part}))
        load_config(str(path))


def test_the_readme_s_model_is_that_of_the_shipped_config(tmp_path: Path) -> None:
    path = tmp_path / "cifar10.yaml"
    path.write_text(blocks(README, "yaml")[0])
    config, shipped = load_config(str(path)), load_config("cifar10").model
    assert config.all_attacks["fgsm"].levels == (1, 2, 4, 8)
    assert config.model is not None
    assert shipped is not None
    same = {"kind", "name", "kwargs", "mean", "std"}
    assert config.model.model_dump(include=same) == shipped.model_dump(include=same)


def test_the_subsets_of_several_models_are_those_of_the_page(tmp_path: Path) -> None:
    whole = yaml.safe_load(blocks(README, "yaml")[0])
    (several,) = blocks(REPOSITORY / "docs/attacks.md", "yaml")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({key: whole[key] for key in ("source", "output")}) + several)
    subsets = [variant.subset for variant in load_config(str(path)).variants]
    assert {"fgsm-resnet-eps-8", "noise-eps-8"} <= {*subsets}


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `fgsm` command in a page, also of one that another program starts."""
    for block in blocks(page, "sh", "bash"):
        for part in re.split(r"\n|&&", block):
            words = [*itertools.takewhile(lambda word: word not in (">", "|", "&"), shlex.split(part, comments=True))]
            for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
                if word.endswith("fgsm") and (not before or after in COMMANDS):
                    yield words[words.index(word) + 1 :]
                    break


@pytest.mark.parametrize("page", [page for page in (README, *DOCS) if [*commands(page)]], ids=name_of)
def test_the_commands_of_a_page_have_these_options(page: Path) -> None:
    for name, *arguments in commands(page):
        COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        name, _, heading = "".join(link).partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    # The changelog tells of files that are gone, too; NAME is anybody's.
    if page.name != "CHANGELOG.md":
        named = re.findall(r"`((?:scripts|tests|pipeline|configs|docs)/[\w./-]+?\.\w+)(?:[` ]|::)", page.read_text())
        assert [name for name in named if "NAME" not in name and not (REPOSITORY / name).exists()] == []


# ------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder of a recipe: out/digits is there, of fewer images."""
    config = yaml.safe_load((REPOSITORY / "configs/digits.yaml").read_text())
    config["source"]["limit"] = 96
    config["output"]["path"] = str(tmp_path / "out/digits")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    generate_once(tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize(
    "recipe",
    [
        "PyTorch",
        pytest.param("Lightning", marks=pytest.mark.slow),
        pytest.param("accelerate", marks=pytest.mark.slow),
        "Notebooks",
    ],
)
def test_a_recipe_runs(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip({"PyTorch": "torch", "Notebooks": "pandas"}.get(recipe, recipe.lower()))
    section = (REPOSITORY / "docs/recipes.md").read_text().partition(f"\n## {recipe}\n")[2].partition("\n## ")[0]
    codes = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert codes
    names: dict[str, object] = {"__name__": "recipe"}
    with warnings.catch_warnings():
        # Those of the libraries themselves, of a machine with few cores or without a GPU.
        warnings.simplefilter("ignore")
        for code in codes:
            exec(compile(code, recipe, "exec"), names)
    if recipe == "PyTorch":
        assert re.findall(r"^(\S+): \d", capsys.readouterr().out, re.MULTILINE) == ["clean", "8/255", "32/255"]
    if recipe == "Notebooks":
        assert list(names["summary"].index) == [level / 255 for level in (0, 8, 16, 32, 64)]  # type: ignore[attr-defined]
        assert names["image"].size == (64, 64)  # type: ignore[attr-defined]
    # A loader that the garbage collector finds later, in a cycle, waits ten seconds for its workers: in another test.
    names.clear()
