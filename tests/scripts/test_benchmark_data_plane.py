"""The benchmark of the data plane: its arithmetic, its floor, and one small run."""

import io
import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import PreprocessConfig
from pipeline.core.images import decode_images, open_image
from pipeline.core.sign_bits import ZERO
from pipeline.engine.decode import read_image
from tests.conftest import REPOSITORY

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import benchmark_data_plane
import workloads
from benchmark_data_plane import STAGES, Case, Measurement, Spent


def spent(seconds: float, cpu: float, wall: float) -> Spent:
    return Spent(dict.fromkeys(STAGES, seconds), cpu, wall, 10**9)


def test_start_up_is_no_part_of_what_an_image_takes() -> None:
    found = benchmark_data_plane.difference(spent(1.0, 7.0, 5.0), spent(1.5, 10.0, 6.0), 100, 0.2)
    assert found.stages == dict.fromkeys(STAGES, 5.0)
    assert (found.sum, found.images_per_s) == (30, 100)


def test_threads_are_counted_by_the_stage_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "run", threading.Thread.run)  # put back afterwards
    seconds = benchmark_data_plane.count_threads()
    for name in ("decode_0", "fetch", "lane_1", "other"):
        thread = threading.Thread(target=sum, args=[range(10**6)], name=name)
        thread.start()
        thread.join()
    assert seconds.keys() == {"load", "attack", "rest"}
    assert all(each > 0 for each in seconds.values())
    assert seconds["load"] > seconds["attack"]


def test_a_row_holds_medians_and_an_estimate() -> None:
    def measured(ms: float, rate: float) -> Measurement:
        return Measurement(dict.fromkeys(STAGES, ms), 6 * ms, rate, 10**9, 0.1)

    rounds = {1: [measured(9, 50)], 2: [measured(1, 80), measured(3, 90), measured(2, 100)]}
    alone = {"load": 1.0, "encode": 2.0, "write": 0.5}
    row = benchmark_data_plane.summarise(Case(224, "images", 4), rounds, alone, 0.25)
    assert row["ms"] == dict.fromkeys(STAGES, 2)
    assert (row["sum_ms"], row["least_ms"], row["most_ms"]) == (12, 6, 18)
    assert row["images_per_s"] == {1: 50, 2: 90}
    assert row["estimated_images_per_s"] == 50 + 15 * 40
    assert benchmark_data_plane.line_through({2: 90.0}, 16) is None
    header, line = benchmark_data_plane.describe([row]).splitlines()
    assert len(header) == len(line)
    assert line.split()[4:12] == [*["2.00"] * 6, "12.00", "6.00..18.00"]
    assert line.split()[12:17] == ["3.50", "1.00", "2.00", "0.50", "0.25"]


@pytest.mark.parametrize("layout", ["images", "bits"])
def test_the_floor_makes_what_a_run_makes(layout: str, tmp_path: Path) -> None:
    photograph, _ = workloads.encoded_images(benchmark_data_plane.SOURCES[224], None, None)[0]
    case, preprocess = Case(224, layout, 4), PreprocessConfig.model_validate(workloads.WORKLOADS["resnet18"].preprocess)
    pixels = benchmark_data_plane.decode(photograph, workloads.WORKLOADS["resnet18"].preprocess)
    ours = read_image(partial(open_image, io.BytesIO(photograph)), preprocess, 10**6)
    assert np.array_equal(pixels, ours.permute(1, 2, 0))
    pictures = benchmark_data_plane.attacked(case, pixels[None])
    cells = benchmark_data_plane.encode(case, pictures)
    assert np.array_equal(decode_images(cells["0"].to_pylist(), "webp", (3, 224, 224))[0], pixels)
    assert cells.num_columns == (5 if layout == "images" else 2)
    if layout == "bits":
        assert len(cells["1"][0][ZERO].as_py()) == 3 * 224 * 224 // 8
    else:
        assert np.abs(np.int16(pictures[4]) - np.int16(pictures[0])).max() == 8
    stages = benchmark_data_plane.floor(case, [photograph], tmp_path / "floor.parquet")
    assert stages.keys() == {"load", "encode", "write"}
    assert stages["load"] > 0


@pytest.mark.drill
def test_a_small_run_has_nothing_that_is_not_accounted_for(tmp_path: Path) -> None:
    options = ["--side", "32", "--layout", "bits", "--epsilons", "1", "--rounds", "1", "--no-one-core"]
    sizes = ["--few", "8", "--more", "2048", "--batch-size", "32", "--json", str(tmp_path / "report.json")]
    sampled = ["--lock"] if shutil.which("py-spy") else []
    command = [sys.executable, str(benchmark_data_plane.__file__), *options, *sizes, *sampled]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["cases"]
    assert all(row["ms"][stage] > 0 for stage in ("load", "attack", "encode", "write"))
    assert row["ms"]["rest"] < 0.05 * row["sum_ms"]
    assert row["peak_memory"] > 10**8
    assert (row["lock_ms"] is not None) == bool(sampled)
    if sampled:
        assert 0 < row["lock_ms"] < row["sum_ms"]
    assert report["machine"]["cores"] >= 1
    assert "torch" in report["machine"]["versions"]
