"""Parts of a run: real processes side by side in one output, on a folder and in an object store."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pipeline.engine.run
from pipeline.engine.job import Job
from pipeline.output.folder import OutputFolder, committed
from pipeline.output.manifest import require_manifest
from tests.conftest import (
    FACTORY,
    WriteConfig,
    digests,
    fgsm,
    generate,
    generate_once,
    png_bytes,
    random_pixels,
    without_run,
    write_parquet,
)
from tests.support.processes import run_fgsm, wait_for
from tests.support.s3 import S3, run_there, there
from tests.support.s3 import bucket as bucket
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server
from tests.support.several import EVERY_KIND, ON_RAYS, write_several

# A victim that does what files beside it say, in all processes but the one of the tests: wait until so many processes
# attack, wait at a gate, or die at the white image, which is in the third shard.
WATCHED = """

import os, pathlib, signal, time

HERE = pathlib.Path(__file__).parent


class Watched(Net):
    def forward(self, x):
        if (HERE / "tests").read_text() == str(os.getpid()) or len(x) < 2:
            return super().forward(x)
        (HERE / f"attacks {os.getpid()}").touch()
        while (HERE / "meet").exists() and len(list(HERE.glob("attacks *"))) < int((HERE / "meet").read_text()):
            time.sleep(0.01)
        while (HERE / "gate").exists():
            time.sleep(0.01)
        if (x.flatten(1).amin(1) == 1).any():
            try:
                (HERE / "kill once").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            except FileNotFoundError:
                pass
        return super().forward(x)
"""


def run_impatient(run: Callable[..., None], *arguments: Any) -> None:
    """The body of a process that takes a lock for one of the dead after seconds."""
    import pipeline.output.locks

    pipeline.output.locks.BEAT_SECONDS, pipeline.output.locks.STALE_SECONDS = 0.4, 3.0
    run(*arguments)


@dataclass
class Place:
    """An output, and how processes are started that write there."""

    out: str
    begin: Callable[..., Any]
    shards: Callable[[], dict[str, str]]
    folder: Path

    def start(self, config: Path, *arguments: str) -> Any:
        return self.begin("generate", str(config), "--output", self.out, *arguments)

    def ends(self, process: Any, code: int = 0) -> str:
        """What a process has said that ends with a code."""
        process.join(100)
        said: str = process.log.read_text()
        assert process.exitcode == code, said
        assert "Traceback" not in said
        return said

    @property
    def attacking(self) -> int:
        return len(list(self.folder.glob("attacks *")))


@pytest.fixture(params=["folder", pytest.param("object store", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path, processes: Any) -> Iterator[Place]:
    numbers, started = itertools.count(), []
    cache = str(tmp_path / "cache")
    if request.param == "folder":
        out = str(tmp_path / "out")
        run: Callable[..., None] = run_fgsm
        first: tuple[Any, ...] = (cache,)
    else:
        s3: S3 = request.getfixturevalue("s3")
        out, run = request.getfixturevalue("out_there"), run_there
        first = (s3.environment, str(tmp_path / "temporary"), cache)

    def begin(*arguments: str) -> Any:
        log = tmp_path / f"log-{next(numbers)}"
        process = processes.Process(target=run_impatient, args=(run, *first, str(log), [*arguments]))
        process.start()
        process.log = log
        started.append(process)
        return process

    def shards() -> dict[str, str]:
        if request.param == "folder":
            return digests(tmp_path / "out")
        objects = there(s3, out)
        return {name: hashlib.sha256(data).hexdigest() for name, data in objects.items() if name.endswith(".parquet")}

    yield Place(out, begin, shards, tmp_path)
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def out_there(bucket: str) -> str:
    return f"s3://{bucket}/some/where"


@pytest.fixture
def config(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> Path:
    """48 images in 6 shards of two batches; row 20, in the third, is white."""
    factory_file.write_text(FACTORY + WATCHED)
    (tmp_path / "tests").write_text(str(os.getpid()))
    images = random_pixels(48)
    images[20] = 255
    write_parquet(tmp_path / "many", [png_bytes(image) for image in images], [i % 3 for i in range(48)])
    return write_config(
        source={"path": str(tmp_path / "many"), "shuffle": False},
        model={"name": f"{factory_file}:Watched"},
        output={"images_per_shard": 8},
        runtime={"batch_size": 4},
    )


@pytest.fixture
def local(config: Path, tmp_path: Path) -> dict[str, str]:
    """What one process writes alone, and what its manifest says."""
    generate_once(config, tmp_path / "local")
    return digests(tmp_path / "local")


def summary(out: str) -> dict[str, Any]:
    """What the manifest says of the dataset, whoever wrote it and where."""
    content = json.loads(OutputFolder(out).store.read("manifest.json"))
    return {key: value for key, value in content.items() if key not in ("config", "digest")}


# ------------------------------------------------------------------------------------------- side by side


@pytest.mark.slow
def test_two_parts_write_what_one_process_writes(place: Place, config: Path, local: dict[str, str]) -> None:
    (place.folder / "meet").write_text("2")
    parts = [place.start(config, "--part", f"{index}/2") for index in range(2)]
    said = [place.ends(part) for part in parts]
    assert place.attacking == 2, "both were at work at once"
    assert place.shards() == local
    assert summary(place.out) == summary(str(place.folder / "local"))
    left = [int(re.findall(r"Part \d of 2 .*; (\d) of 6 ", log)[0]) for log in said]
    assert min(left) == 0
    assert [("INCOMPLETE" in log) for log in said] == [count > 0 for count in left]
    store = OutputFolder(place.out).store
    assert len(store.read(".run/sessions.jsonl").splitlines()) == 2
    assert b"<html" in store.read("report.html"), "the last one makes the report"
    assert fgsm("verify", place.out, "--recompute").exit_code == 0
    assert "All 6 shards" in generate(config, "--output", place.out, "--part", "1/2")


@pytest.mark.parametrize(("attacks", "layout"), [(EVERY_KIND, "images"), (ON_RAYS, "signs-bits")])
def test_parts_of_a_run_of_several_models_and_attacks_write_what_one_process_writes(
    write_config: WriteConfig, tmp_path: Path, attacks: dict[str, Any], layout: str
) -> None:
    config = write_several(write_config, tmp_path, attacks, output={"layout": layout})
    generate(config, "--output", str(tmp_path / "local"))
    for part in ("1/2", "0/2"):
        generate(config, "--part", part)
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    assert summary(str(tmp_path / "out")) == summary(str(tmp_path / "local"))


def begin_here(place: Place, config: Path) -> None:
    """Write the last shard in this process: who joins looks at no image before it writes."""
    generate(config, "--output", place.out, "--part", "5/6")


def test_a_part_that_is_killed_goes_on_with_the_same_command(place: Place, config: Path, local: dict[str, str]) -> None:
    begin_here(place, config)
    for name in ("meet", "kill once"):
        (place.folder / name).write_text("2")
    parts = [place.start(config, "--part", f"{index}/2") for index in range(2)]  # the white image is of part 0
    place.ends(parts[1])
    place.ends(parts[0], -9)
    before = place.shards()
    manifest = require_manifest(OutputFolder(place.out))
    assert 3 <= len(committed(OutputFolder(place.out), manifest.edition, manifest.plan.shards)) <= 4
    assert not manifest.complete
    said = place.ends(place.start(config, "--part", "0/2"))
    assert re.search("Part 0 of 2 .*; 0 of 6 ", said)
    assert before.items() <= place.shards().items()
    assert place.shards() == local
    assert summary(place.out) == summary(str(place.folder / "local"))
    # What the killed part has left aside is gone, and so is its lock.
    assert "All 6 shards" in generate(config, "--output", place.out)
    assert not list((place.folder / "out/.run/tmp").glob("*"))


def test_what_parts_have_not_written_a_later_run_writes(place: Place, config: Path, local: dict[str, str]) -> None:
    said = place.ends(place.start(config, "--part", "2/4"))
    assert re.search("Part 2 of 4 .*; 5 of 6 ", said)
    assert "Report" not in said
    assert {without_run(name) for name in place.shards()} == {
        f"{subset}/test-00002-of-00006.parquet" for subset in ("clean", "eps-2", "eps-8")
    }
    assert "1 of 6 shards" in generate(config, "--output", place.out)
    assert place.shards() == local
    assert summary(place.out) == summary(str(place.folder / "local"))


@pytest.mark.slow
def test_who_may_write_beside_a_part(place: Place, config: Path, local: dict[str, str]) -> None:
    begin_here(place, config)
    before = place.shards()
    (place.folder / "gate").touch()
    part = place.start(config, "--part", "0/2")
    wait_for(lambda: place.attacking == 1 or not part.is_alive())
    for arguments in ([], ["--overwrite"], ["--part", "0/2"], ["--part", "1/3"]):
        result = fgsm("generate", config, "--output", place.out, *arguments)
        assert result.exit_code == 1, result.output
        assert re.search(rf"Error: {place.out} .*process {part.pid}\b", result.stderr)
    assert place.shards() == before
    assert re.search("Part 1 of 2 .*; 3 of 6 ", generate(config, "--output", place.out, "--part", "1/2"))
    (place.folder / "gate").unlink()
    assert re.search("Part 0 of 2 .*; 0 of 6 ", place.ends(part))
    assert place.shards() == local


@pytest.mark.slow
def test_a_run_that_is_under_way_lets_no_part_in(
    place: Place, config: Path, local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.output.store.TURN_SECONDS", 0.3)
    begin_here(place, config)
    (place.folder / "gate").touch()
    run = place.start(config)
    wait_for(lambda: place.attacking == 1 or not run.is_alive())
    result = fgsm("generate", config, "--output", place.out, "--part", "0/2")
    assert result.exit_code == 1
    assert re.search(rf"Error: {place.out} .*process {run.pid}\b", result.stderr)
    (place.folder / "gate").unlink()
    place.ends(run)
    assert place.shards() == local


# ------------------------------------------------------------------------------------------- one run


def test_a_part_of_another_config_is_refused(place: Place, config: Path) -> None:
    generate(config, "--output", place.out, "--part", "0/2")
    before = place.shards()
    result = fgsm("generate", config, "--output", place.out, "--part", "1/2", "--set", "attack.epsilons=[4/255]")
    assert result.exit_code == 2
    assert re.search(rf"Error: output\.path: {place.out} .*attacks\.fgsm\.epsilons", result.stderr)
    assert place.shards() == before


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True])
def test_a_part_that_finds_the_run_begun_meanwhile_resolves_nothing_anew(
    other: bool, place: Place, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has halved its batches, for want of memory; or it is of another config."""
    opening = Job.open

    def late(job: Job) -> Any:
        opened = opening(job)
        monkeypatch.setattr(Job, "open", opening)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.engine.run, "_resolve_compile", lambda *_: (False, 2))
            seed = ["--set", "runtime.seed=1"] if other else []
            generate(config, "--output", place.out, "--part", "1/2", *seed)
        return opened

    monkeypatch.setattr(Job, "open", late)
    result = fgsm("generate", config, "--output", place.out, "--part", "0/2")
    if other:
        assert result.exit_code == 2
        assert re.search(rf"Error: output\.path: {place.out} .*runtime\.seed", result.stderr)
        return
    assert result.exit_code == 0, result.output
    found = require_manifest(OutputFolder(place.out))
    assert found.complete
    assert found.resolved.runtime.batch_size == 2
    assert fgsm("verify", place.out).exit_code == 0


def test_a_part_counts_only_its_own_images_as_its_own(config: Path, local: dict[str, str]) -> None:
    del local
    generate(config, "--part", "0/4")  # 2 of 6 shards
    (session,) = map(json.loads, (config.parent / "out/.run/sessions.jsonl").read_text().splitlines())
    assert session["images"] == 16


def test_rows_that_other_parts_skip_count(write_config: WriteConfig, tmp_path: Path) -> None:
    images = [png_bytes(image) for image in random_pixels(40)]
    images[3] = images[30] = b"no image"
    source = {"path": str(write_parquet(tmp_path / "broken", images, [0] * 40)), "shuffle": False}
    config = write_config(source=source, output={"images_per_shard": 20}, runtime={"max_skipped": 0.03})
    generate(config, "--part", "0/2")
    result = fgsm("generate", config, "--part", "1/2")
    assert result.exit_code == 1
    assert re.search(r"Error: source: 2 of 40 .*runtime\.max_skipped = 0\.03", result.stderr)


def test_a_shard_of_a_part_that_is_removed_meanwhile_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(config, "--part", "1/2")
    write = pipeline.engine.job.Job.write

    def removing(job: Job, *arguments: Any, **options: Any) -> Any:
        for written in write(job, *arguments, **options):
            if written.receipt.shard == "test-00002-of-00006":
                (tmp_path / "out" / written.receipt.files[0].path).unlink()
            yield written

    monkeypatch.setattr(Job, "write", removing)
    result = fgsm("generate", config, "--part", "0/2")
    assert result.exit_code == 1
    assert re.search(rf"Error: {tmp_path}/out: 1 of 3 .*test-00002-of-00006", result.stderr)


# ------------------------------------------------------------------------------------------- bad usage


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--part", "2/2"], " 2 of 2; "),
        (["--part", "0/0"], " 0 of 0; "),
        (["--part", "one"], "'one'; .*I/N"),
        (["--part", "-1/2"], "'-1/2'"),
        (["--part", "0/2/3"], "'0/2/3'"),
        (["--part", "0/2", "--executor", "ray"], "--executor ray"),
        (["--part", "0/2", "--overwrite"], "--overwrite"),
        (["--part", "0/2", "--unlocked"], "--unlocked"),
    ],
)
def test_what_is_no_part_is_told(arguments: list[str], named: str, write_config: WriteConfig, tmp_path: Path) -> None:
    result = fgsm("generate", write_config(), *arguments)
    assert result.exit_code == 2
    assert re.search(f"Error: --part: .*{named}", result.stderr)
    assert not (tmp_path / "out").exists()


def test_an_executor_that_is_not_there_is_told(write_config: WriteConfig) -> None:
    result = fgsm("generate", write_config(), "--executor", "slurm")
    assert result.exit_code == 2
    assert re.match("Error: --executor: .*'slurm'.*: local, ray", result.stderr.splitlines()[-1])


def test_help_says_from_where_parts_count() -> None:
    assert "0 to N-1" in " ".join(fgsm("generate", "--help").stdout.replace("│", " ").split())
