"""The benchmark: its arithmetic, its tables, and one tiny run of our own contender and its bound."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from pipeline.models.resnet20 import resnet20
from tests.conftest import REPOSITORY

# Scripts are no package: they see each other because Python puts a script's own folder first.
sys.path.append(str(REPOSITORY / "scripts"))

import benchmark
import workloads
from benchmark import Case, Measurement


def case(contender: str, variant: str = "eager") -> Case:
    return Case(contender, variant, levels=(1, 2), images=100)


def measured(rate: float, compile_s: float | None = None, stored: float | None = 1000.0) -> Measurement:
    return Measurement(rate, 2.0, compile_s, stored, 5e8, None, 0.1, {"load": 9.0, "attack": 90.0})


def test_a_steady_rate_leaves_the_first_third_out() -> None:
    # Launched at 100, first commit of 10 images at 108, another 20 while a second process starts, then 10 a second.
    rate, startup = benchmark.steady([(108.0, 10), (112.0, 30), (114.0, 50), (118.0, 90)], launched=100.0)
    assert rate == 10
    assert startup == 9
    assert benchmark.steady([(1.0, 10), (2.0, 11)], launched=0.0)[1] == 0
    with pytest.raises(benchmark.BenchmarkError, match="two batches"):
        benchmark.steady([(1.0, 10)], launched=0.0)


@pytest.mark.parametrize(("images", "batch_size"), [(20_000, 256), (512, 64), (2_048, 256), (100, 256)])
def test_shards_are_whole_batches_and_eight_where_there_are_as_many(images: int, batch_size: int) -> None:
    size = benchmark.images_per_shard(images, batch_size)
    assert size % batch_size == 0
    assert -(-images // size) >= min(benchmark.SHARDS, images // batch_size)


def test_each_round_begins_with_another_case() -> None:
    cases = [case("ours"), case("bound"), case("plain")]
    assert benchmark.rotated(cases, 0) == cases
    assert [benchmark.rotated(cases, turn)[0] for turn in range(4)] == [*cases, cases[0]]
    order = []

    def measure(one: Case) -> Measurement:
        order.append(one.contender)
        return measured(10)

    counts = [[len(known[one]) for one in cases] for known in benchmark.run_rounds(cases, 2, measure)]
    assert counts == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 2, 1], [1, 2, 2], [2, 2, 2]]
    assert order == ["ours", "bound", "plain", "bound", "plain", "ours"]


def test_the_line_is_that_of_least_squares() -> None:
    slope, intercept = benchmark.fit_line({1: 5.0, 2: 8.0, 4: 14.0, 8: 26.0})
    assert slope == pytest.approx(3)
    assert intercept == pytest.approx(2)


def test_a_compilation_repays_itself_only_where_it_is_faster() -> None:
    assert benchmark.break_even(10.0, eager=100.0, compiled=200.0) == pytest.approx(2000)
    assert benchmark.break_even(10.0, eager=100.0, compiled=90.0) is None


def test_rows_hold_medians_and_comparisons() -> None:
    rounds = {
        case("ours"): [measured(100), measured(300), measured(200)],
        case("ours", "compiled"): [measured(400, compile_s=30.0), measured(400, compile_s=1.0)],
        case("ours", "compiled-signs"): [measured(400, compile_s=2.0)],
        case("ours", "eager-signs"): [measured(200, stored=250.0)],
        case("bound"): [measured(250, stored=None)],
        case("torchattacks"): [measured(50, stored=2000.0)],
    }
    rows = benchmark.compare([benchmark.summarise(one, known) for one, known in rounds.items()])
    ours, compiled, cached, signs, bound, peer = rows
    assert (ours["images_per_s"], ours["slowest"], ours["fastest"]) == (200, 100, 300)
    assert ours["adversarial_images_per_s"] == 400
    assert ours["share_of_bound"] == pytest.approx(0.8)
    assert ours["ratio_to"] == {"torchattacks": 4}
    assert ours["break_even_images"] is None
    assert compiled["compile_s"] == 30
    assert compiled["break_even_images"] == pytest.approx(30 / (1 / 200 - 1 / 400))
    assert cached["compile_s"] == 2
    assert cached["break_even_images"] == pytest.approx(30 / (1 / 200 - 1 / 400)), "what it took with an empty cache"
    assert compiled["share_of_bound"] is None, "its bound was not measured"
    assert signs["share_of_bound"] == pytest.approx(0.8), "the layout is no part of the bound"
    assert signs["bytes_share_of"] == {"ours eager": 0.25, "torchattacks": 0.125}
    assert "ratio_to" not in bound
    assert "ratio_to" not in peer
    text = benchmark.describe({"title": "a title", "contenders": rows, "epsilon_cost": []})
    lines = text.splitlines()
    assert lines[0] == "a title"
    assert lines[3].split()[:6] == ["ours", "eager", "200.0", "100.0..300.0", "400.0", "80%"]
    assert "ours compiled: its compilation of 30.0 s repays itself from 12,000 images on." in lines
    assert "ours eager-signs: bytes per image 0.250 of ours eager, 0.125 of torchattacks." in lines
    assert "GPU memory" not in text


def test_what_was_measured_before_a_case_failed_is_reported(tmp_path: Path) -> None:
    class Failing(benchmark.Bench):
        def measure(self, case: Case) -> Measurement:
            if case.contender == "bound":
                raise benchmark.BenchmarkError("it failed")
            return measured(100)

    cases = [case("ours"), case("bound")]
    cost = [replace(case("ours"), levels=(1,))]
    reports = benchmark.run_workload(Failing(workloads.WORKLOADS["digits"], None, tmp_path), cases, cost, rounds=1)
    report = next(reports)
    assert [row["name"] for row in report["contenders"]] == ["ours eager"]
    assert report["epsilon_cost"] == []
    with pytest.raises(benchmark.BenchmarkError):
        next(reports)


def test_the_cost_of_an_epsilon_is_a_line_for_each_contender() -> None:
    cases = [replace(case("ours"), levels=levels) for levels in benchmark.COST_LEVELS.values()]
    rows = [benchmark.summarise(one, [measured(1000 / (2 + 3 * len(one.levels)))]) for one in cases]
    assert benchmark.cost_table(benchmark.fit_cost(rows)).splitlines()[1].split() == (
        ["ours", "eager", "5.00", "8.00", "14.00", "26.00", "2.00", "3.00"]
    )


def test_columns_line_up() -> None:
    assert benchmark.table(["a", "b"], [["long", "1"], ["x", "234"]]) == "a       b\nlong    1\nx     234"


def test_ours_runs_in_each_variant_and_has_a_bound_for_each_way_to_compute() -> None:
    work = replace(workloads.WORKLOADS["resnet18"], images=512, peer_images=192)
    cases = benchmark.list_cases(work, benchmark.CONTENDERS, ["eager", "eager-signs", "bf16"], [])
    names = [one.name for one in cases]
    assert names[:5] == ["ours eager", "ours eager-signs", "ours bf16", "bound eager", "bound bf16"]
    assert names[5:] == ["plain", "torchattacks", "foolbox", "art"]
    assert {one.name: one.images for one in cases}["bound bf16"] == 512
    assert {one.name: one.images for one in cases}["art"] == 192
    several = benchmark.list_cases(work, ["ours", "bound"], ["eager"], [1, 4])
    assert [one.name for one in several] == ["ours eager x1", "ours eager x4", "bound eager"]
    cost = benchmark.list_cost_cases(work, benchmark.CONTENDERS)
    assert {len(one.levels) for one in cost} == {1, 2, 4, 8}
    assert {one.contender for one in cost} == {"ours", *benchmark.PEERS}


def test_a_peer_that_is_not_installed_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "PEERS", ("no_such_library",))
    benchmark.check_installed(["ours"])
    with pytest.raises(benchmark.BenchmarkError, match=r"no_such_library .*pip install -e '\.\[bench\]'"):
        benchmark.check_installed(["no_such_library"])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"\bfast .*\beager, "):
        benchmark.check_choice("--variant", ["fast"], list(benchmark.VARIANTS))


def test_a_contender_that_fails_shows_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('the reason')"]
    with pytest.raises(benchmark.BenchmarkError, match="the reason"):
        benchmark.watch(command, {}, tmp_path / "log")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    child = "import time; held = b'x' * 60_000_000; time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    watched = benchmark.watch([sys.executable, "-c", parent], {}, tmp_path / "log")
    assert watched.memory is not None
    assert 60e6 < watched.memory < 120e6
    assert watched.others is not None
    assert 0 <= watched.others < 1000


def test_a_synthetic_photograph_is_as_large_as_a_real_one() -> None:
    images = workloads.encoded_images(workloads.WORKLOADS["resnet18"], None, None)
    mean = sum(len(data) for data, _ in images) / len(images)
    assert 70_000 < mean < 130_000


def test_the_source_repeats_its_images(tmp_path: Path) -> None:
    images = [(b"one", 1), (b"two", 2), (b"three", 3)]
    workloads.write_source(images, 1000, tmp_path / "source")
    again = workloads.encoded_images(workloads.WORKLOADS["cifar"], tmp_path / "source", None)
    assert len(again) == 1000
    assert again[:4] == [*images, images[0]]
    with pytest.raises(ValueError, match=f"{tmp_path}/nothing .*Parquet"):
        workloads.encoded_images(workloads.WORKLOADS["cifar"], tmp_path / "nothing", None)
    with pytest.raises(ValueError, match=f"{tmp_path}/nothing .*JPEG"):
        workloads.encoded_images(workloads.WORKLOADS["resnet50"], None, tmp_path / "nothing")


def test_resnet20_is_the_paper_s() -> None:
    model = resnet20()
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert {"conv1.weight", "layer3.2.bn2.running_var", "linear.bias"} <= set(model.state_dict())


@pytest.mark.drill
def test_ours_and_its_bound_on_digits(tmp_path: Path) -> None:
    options = ["--workload", "digits", "--variant", "eager", "--contender", "ours", "--contender", "bound"]
    sizes = ["--limit", "64", "--batch-size", "8", "--rounds", "1", "--json", str(tmp_path / "report.json")]
    command = [sys.executable, str(benchmark.__file__), *options, *sizes]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    ours, bound = report["workloads"][0]["contenders"]
    assert ours["images_per_s"] > 0
    assert ours["share_of_bound"] > 0
    assert ours["bytes_per_image"] > 1000
    assert bound["bytes_per_image"] is None
    assert report["machine"]["cores"] >= 1
    assert "torch" in report["machine"]["versions"]
    assert result.stdout.startswith("digits: digits CNN")
