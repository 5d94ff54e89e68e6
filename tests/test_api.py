"""What users import: the functions of `pipeline`, and what a notebook shows of them."""

import ast
import html
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from pipeline.config.load import as_config, load_config
from pipeline.core.errors import ConfigError
from pipeline.output.manifest import SkippedRow
from pipeline.output.summary import Summary
from tests.conftest import REPOSITORY, WriteConfig, fgsm, generate_once, loaded_by

FUNCTIONS = {"generate", "plan", "verify", "inspect", "report", "load", "training_dataset"}
HEAVY = {"torch", "datasets", "torchvision", "numpy", "pyarrow", "rich", "typer"}


def unlogged(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The package's logger in a program that has set up no logging, as pytest itself has."""
    logger = logging.getLogger("pipeline")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    return logger


def test_importing_the_package_imports_nothing_that_takes_long() -> None:
    loaded = loaded_by("import pipeline; dir(pipeline)")
    assert not HEAVY & loaded
    assert not {name for name in loaded if name.startswith("pipeline.")}


def test_every_name_is_a_function_whatever_was_imported_before() -> None:
    assert {*pipeline.__all__} == {*dir(pipeline)} == {"__version__", *FUNCTIONS}
    package = Path(pipeline.__file__).parent
    for name in FUNCTIONS:
        # A module of this name would take the function's place when it is imported.
        assert not (package / name).exists()
        assert not (package / f"{name}.py").exists()
        assert getattr(pipeline, name).__doc__
    with pytest.raises(AttributeError):
        _ = pipeline.nothing


@pytest.mark.parametrize("kind", ["path", "text", "mapping", "config"])
def test_a_config_may_be_given_in_any_form(write_config: WriteConfig, tmp_path: Path, kind: str) -> None:
    path = write_config()
    content = yaml.safe_load(path.read_text())
    content["source"]["path"] = Path(content["source"]["path"])
    before = repr(content)
    forms: dict[str, Any] = {"path": path, "text": str(path), "mapping": content, "config": load_config(str(path))}
    result = pipeline.generate(forms[kind], output=tmp_path / "other", limit=8)
    assert result.path == str(tmp_path / "other")
    assert result.manifest.rows == 8
    assert result.manifest.run_id == pipeline.generate(path, output=result.path, limit=8).manifest.run_id
    assert repr(content) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config", [{"sauce": {}}, {"source": {"kind": "digits", "path": Path("x")}}, "no-such-config", Path("none.yaml")]
)
def test_a_config_that_cannot_be_is_a_config_error(config: Any) -> None:
    for function in (pipeline.generate, pipeline.plan):
        with pytest.raises(ConfigError):
            function(config)


def test_a_mapping_that_is_too_deep_is_a_config_error() -> None:
    config: dict[str, Any] = {}
    config["source"] = config
    with pytest.raises(ConfigError, match="deep"):
        pipeline.plan(config)


def test_a_result_is_shown_as_the_table(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    result = pipeline.inspect(tmp_path / "out")
    assert f"{result}\n" == f"{result!r}\n" == fgsm("inspect", tmp_path / "out").stdout
    page = result._repr_html_()
    cells = re.findall("<td>([^<]*)</td>", page)
    for subset in result.manifest.subsets:
        assert cells[cells.index(subset.subset) + 2] == f"{subset.rows:,}"
    assert result.manifest.run_id in page
    assert len(page) < 3_000


def test_what_a_notebook_shows_holds_no_markup_of_others(finished: Path) -> None:
    manifest = pipeline.inspect(finished).manifest
    skipped = SkippedRow(split="test", source_index=3, reason="<script>&\x1b", file="<b>")
    page = Summary(manifest.model_copy(update={"skipped": (skipped,)}))._repr_html_()
    assert "&lt;script&gt;&amp;" in page
    assert not {"<script", "<b>", "\x1b"} & {mark for mark in ("<script", "<b>", "\x1b") if mark in page}


def test_a_plan_is_values(write_config: WriteConfig) -> None:
    planned = pipeline.plan(write_config())
    assert (planned.source_images, planned.rows, planned.warnings) == (40, 120, [])
    assert re.search(r"^source images +40 ", str(planned), re.MULTILINE)


def test_a_notebook_shows_a_plan_as_a_table_without_markup_of_others(write_config: WriteConfig) -> None:
    planned = replace(pipeline.plan(write_config()), output="<b>&\x1b")
    page = planned._repr_html_()
    cells = re.findall("<td>([^<]*)</td>", page)
    rows = [f"{name} {value}" for name, value in zip(cells[::2], map(html.unescape, cells[1::2]), strict=True)]
    assert rows == [re.sub(" {2,}", " ", line) for line in str(planned).splitlines()]
    assert "&lt;b&gt;&amp;" in cells[-1]
    assert "\x1b" not in page


@pytest.fixture
def complete(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> Path:
    """The config of a run that is complete."""
    config = write_config(source={"limit": 8})
    generate_once(config)
    capsys.readouterr()
    return config


def test_lines_of_the_log_are_shown_for_as_long_as_it_runs(
    complete: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = unlogged(monkeypatch)
    pipeline.generate(complete)
    assert "already there" in capsys.readouterr().err
    assert not logger.handlers
    assert logger.level == logging.NOTSET


def test_a_program_that_logs_is_left_to_itself(
    complete: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = unlogged(monkeypatch)
    logging.getLogger().addHandler(logging.NullHandler())
    pipeline.generate(complete)
    assert capsys.readouterr().err == ""
    assert not logger.handlers


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.engine.estimate.CALIBRATION_SECONDS", 0.1)
    cells = (REPOSITORY / "docs/notebook.py").read_text().split("# %%\n")[1:]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        # As a notebook does: the last expression of a cell is shown.
        *body, last = ast.parse(cell).body
        ends = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if ends else [*body, last], []), "notebook", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
    tables = [value for value in shown if isinstance(value, Summary)]
    assert [table.path for table in tables] == ["out/notebook", "out/notebook-pgd"]
    assert Path(shown[-1]).read_text().startswith("<!doctype html>")
    said = capsys.readouterr().out
    assert re.search(r"^problems: \[\]$", said, re.MULTILINE)
    assert re.search(r"^loss \d", said, re.MULTILINE)


def test_the_page_on_python_names_every_function() -> None:
    page = (REPOSITORY / "docs/python.md").read_text()
    assert set(re.findall(r"\bpipeline\.(\w+)\(", page)) == FUNCTIONS
    assert len(page.splitlines()) < 100
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        ast.parse(code)


def test_a_checked_config_leaves_open_what_was_left_open(write_config: WriteConfig) -> None:
    """Sizes that nobody set are those of the weights, also the second time."""
    once = as_config(write_config(), limit=3)
    again = as_config(once)
    assert again == once
    for name in ("preprocess", "runtime", "output", "source"):
        assert getattr(again, name).model_fields_set == getattr(once, name).model_fields_set
    assert "resize" not in again.preprocess.model_fields_set


@pytest.mark.parametrize("config", [None, ["digits"], 5])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError):
        pipeline.generate(config)
