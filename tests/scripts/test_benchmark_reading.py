"""The reading benchmark: its arithmetic, and one small run of every reader."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pipeline.core.errors import PipelineError
from tests.conftest import REPOSITORY, WriteConfig, generate

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import benchmark_reading
from benchmark_reading import Epoch


def run(*arguments: str | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(benchmark_reading.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_ours_is_compared_with_the_fastest_other_of_as_many_workers() -> None:
    rates = {
        (benchmark_reading.OURS, 0): [300.0, 100.0, 200.0],
        ("datasets", 0): [100.0],
        ("image folder", 0): [160.0],
        (benchmark_reading.OURS, 2): [400.0],
        ("datasets", 2): [200.0],
    }
    rows = benchmark_reading.compare(
        [
            benchmark_reading.summarise(name, workers, [Epoch(10, rate, rate / 2, 0.5, 0.0) for rate in values])
            for (name, workers), values in rates.items()
        ]
    )
    assert (rows[0]["rows_per_s"], rows[0]["slowest"], rows[0]["fastest"]) == (200, 100, 300)
    assert (rows[0]["x_fastest"], rows[0]["x_datasets"]) == (1.25, 2)
    assert (rows[3]["x_fastest"], rows[3]["x_datasets"]) == (2, 2)
    assert "x_fastest" not in rows[1]
    lines = benchmark_reading.describe(rows).splitlines()
    assert len(lines) == 6
    assert lines[1].split()[:5] == ["training_dataset", "0", "200", "100..300", "1.25"]


def test_a_rate_leaves_start_and_end_out() -> None:
    def batches() -> Iterator[tuple[None, list[int]]]:
        for pause, rows in ((0.3, 4), (0.1, 4), (0.1, 2)):
            time.sleep(pause)
            yield None, [0] * rows
        time.sleep(0.3)

    epoch = benchmark_reading.measure(batches)
    assert epoch.rows == 10
    assert epoch.rows_per_core_s > 100  # it slept
    assert 15 < epoch.rows_per_s < 31
    assert epoch.others_cores >= 0
    with pytest.raises(PipelineError, match="two batches"):
        benchmark_reading.measure(lambda: [(None, [0])])


@pytest.mark.drill
def test_all_readers_give_all_rows(write_config: WriteConfig, tmp_path: Path) -> None:
    for layout in ("images", "signs", "signs-bits"):
        generate(write_config(output={"layout": layout, "path": str(tmp_path / layout)}))
    options = ["--workers", "0", "--batch-size", "8", "--rounds", "1", "--json", str(tmp_path / "reading.json")]
    result = run(tmp_path / "images", tmp_path / "signs", tmp_path / "signs-bits", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "reading.json").read_text())
    assert [row["reader"] for row in report["readers"]] == [
        "training_dataset, images, at 8/255",
        "training_dataset, images, mixed",
        "training_dataset, signs, at 8/255",
        "training_dataset, signs, mixed",
        "training_dataset, signs-bits, at 8/255",
        "training_dataset, signs-bits, mixed",
        "datasets",
        "datasets, streaming",
        "image folder",
    ]
    assert all(epoch["rows"] == 40 for row in report["readers"] for epoch in row["rounds"])
    assert report["title"] == "40 images of shape 3x16x16, batch 8, rounds: 1"
    assert result.stdout.splitlines()[0] == report["title"]


@pytest.mark.parametrize("layout", [None, "signs"])
def test_what_cannot_be_read_is_one_sentence(write_config: WriteConfig, tmp_path: Path, layout: str | None) -> None:
    sentence = f"{tmp_path / 'out'} holds no dataset of fgsm-pipeline: there is no manifest.json."
    if layout:
        generate(write_config(output={"layout": layout}))
        sentence = f"{tmp_path / 'out'} is not of layout images; name that one first."
    result = run(tmp_path / "out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == f"Error: {sentence}\n"
