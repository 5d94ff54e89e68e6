"""On a real Ray cluster: the same bytes as in one process, and what a failure costs."""

import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

import pipeline.executors.ray
from pipeline.config.load import load_config
from pipeline.config.schema import RuntimeConfig
from pipeline.core.errors import ConfigError, PipelineError, ShardsFailedError
from pipeline.engine.job import Job
from pipeline.engine.run import open_run
from pipeline.executors.ray import Resources, WorkerContext, at_work, listening, share_out, write_on_worker
from pipeline.output.folder import OutputFolder, committed
from pipeline.output.manifest import require_manifest
from tests.conftest import (
    CLASSES,
    FACTORY,
    WriteConfig,
    digests,
    fgsm,
    generate,
    generate_once,
    manifest,
    png_bytes,
    random_pixels,
    shard_path,
    without_run,
    write_parquet,
)
from tests.support.files import images, stream, write_files, write_tar
from tests.support.processes import GATED, driver_of, lose_a_node, receipts, run_fgsm, wait_for
from tests.support.s3 import S3, lock_of, running_s3
from tests.support.several import EVERY_KIND, ON_RAYS, write_several

# A worker imports torch, which takes long where all else is tested at the same time.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# A victim that does what files beside it say, and notes which processes load it, with how many cores. It fails no
# earlier than when the run has begun, of which the opening looks at images too.
WATCHED = """

import os, pathlib, signal, time

from pipeline.core.cores import available_cores

HERE = pathlib.Path(__file__).parent


class Watched(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with (HERE / "loads").open("a") as file:
            file.write(f"{os.getpid()} {available_cores()}\\n")

    def forward(self, x):
        values = x.flatten(1)
        if len(x) > 1:
            if (HERE / "slow").exists():
                time.sleep(0.1)
        if not (HERE / "out/manifest.json").exists():
            return super().forward(x)
        if len(x) > 1:
            try:
                (HERE / "kill once").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            except FileNotFoundError:
                pass
        if (HERE / "raise").exists() and (values.amin(1) == 1).any():
            raise ArithmeticError("a white image")
        if (HERE / "die").exists() and (values.amax(1) == 0).any() and len(x) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Iterator[str]:
    """A Ray cluster of one node with two CPUs, on the loopback only; this process is connected to it.

    What its processes have in their environment they have from here: it names the object store.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("ray-datasets")))
        patch.delenv("RAY_ADDRESS", raising=False)
        context: Any = ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture
def watched_config(write_config: WriteConfig, factory_file: Path, tmp_path: Path) -> Path:
    """48 images in 6 shards of two batches; row 20 is white and row 42 is black."""
    factory_file.write_text(FACTORY + WATCHED)
    images = random_pixels(48)
    images[20], images[42] = 255, 0
    write_parquet(tmp_path / "many", [png_bytes(image) for image in images], [i % 3 for i in range(48)])
    return write_config(
        source={"path": str(tmp_path / "many"), "shuffle": False},
        model={"name": f"{factory_file}:Watched"},
        output={"images_per_shard": 8},
        runtime={"batch_size": 4, "ray": {"workers": 2}},
    )


def on_ray(config: Path, *arguments: str) -> str:
    return generate(config, "--executor", "ray", *arguments)


# A worker that is ended takes seconds to replace, as each imports torch: where it will be, there is one.
ONE = ("--set", "runtime.ray.workers=1")


# ---------------------------------------------------------------------------------------------- bytes


def test_two_workers_write_the_local_executor_s_bytes(cluster: str, watched_config: Path, tmp_path: Path) -> None:
    del cluster
    said = on_ray(watched_config)
    assert re.search(r"\bworkers: 2\b.* 1 CPU\b", said)
    assert re.search(r"Busy: load \d+%, attack \d+%, encode \d+%, write \d+%; [\d,.]+ images/s", said)
    loads = [line.split() for line in (tmp_path / "loads").read_text().splitlines()]
    workers = [process for process, _ in loads]
    assert len(set(workers)) == len(workers) <= 2, "a worker loads the victim once"
    assert {cores for _, cores in loads} == {"1"}
    assert str(os.getpid()) not in workers, "the driver opens nothing"
    local = tmp_path / "local"
    generate(watched_config, "--output", str(local))
    assert digests(tmp_path / "out") == digests(local)
    there, here = manifest(tmp_path / "out"), manifest(local)
    assert there == {
        **here,
        "config": {**here["config"], "output": there["config"]["output"]},
        "digest": there["digest"],
    }
    (session,) = map(json.loads, (tmp_path / "out/.run/sessions.jsonl").read_text().splitlines())
    assert session["images"] == 48
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("attacks", "layout"), [(EVERY_KIND, "images"), (ON_RAYS, "signs-bits")])
def test_a_run_of_several_models_and_attacks_is_the_same_there(
    write_config: WriteConfig, tmp_path: Path, attacks: dict[str, Any], layout: str
) -> None:
    config = write_several(write_config, tmp_path, attacks, output={"layout": layout})
    generate(config, "--output", str(tmp_path / "local"))
    generate(config, "--executor", "ray")
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    kept = ("run_id", "identity", "subsets", "transfer", "spaces", "features", "files")
    there, here = (manifest(tmp_path / name) for name in ("out", "local"))
    assert {key: there[key] for key in kept} == {key: here[key] for key in kept}


def test_a_local_run_goes_on_there_and_what_is_committed_is_not_written_again(
    cluster: str, watched_config: Path, tmp_path: Path
) -> None:
    del cluster
    generate(watched_config)
    out = tmp_path / "out"
    before = digests(out)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    shard_path(out, ".run/receipts/test-00002-of-00006.json").unlink()
    assert "5 of 6 shards" in on_ray(watched_config)
    changed = {without_run(path.name) for path, then in written.items() if path.stat().st_mtime_ns != then}
    assert changed == {"test-00002-of-00006.parquet"}
    assert digests(out) == before
    assert "All 6 shards" in on_ray(watched_config)


def test_workers_write_into_an_object_store(
    cluster: str, s3: S3, watched_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    s3.make("shared")
    with monkeypatch.context() as here:
        # What waits for its upload lies on the workers' disks.
        here.setattr("pipeline.output.disk.free_bytes", lambda _: 0)
        on_ray(watched_config, "--output", "s3://shared/some/where")
    generate(watched_config)
    there, local = s3.objects("shared", "some/where/"), tmp_path / "out"
    shards = {name: content for name, content in there.items() if name.endswith(".parquet")}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in shards.items()} == digests(local)
    assert sum(name.startswith(".run/receipts/") for name in there) == 6
    assert lock_of(there) is None
    assert "complete; 48 of 48 " in fgsm("inspect", "s3://shared/some/where").stdout


def test_workers_stream_files_of_which_some_are_not_images(
    cluster: str, write_config: WriteConfig, tmp_path: Path
) -> None:
    """How many rows there are nobody knows before: the driver judges the share of those that were read."""
    del cluster
    cells = images()
    cells[7] = cells[31] = b"no image"
    samples = [{"png": cell, "cls": str(i % 3).encode()} for i, cell in enumerate(cells)]
    for file in range(4):
        write_tar(tmp_path / f"tars/test-{file}.tar", samples[10 * file : 10 * file + 10], 10 * file)
    source = stream(tmp_path / "tars", classes=list(CLASSES))
    config = write_config(source=source, runtime={"max_skipped": 0.001, "ray": {"workers": 2}})
    result = fgsm("generate", config, "--executor", "ray")
    assert result.exit_code == 1
    assert re.search(
        r"Error: source: 2 of \d+ .*runtime\.max_skipped = 0\.001 .* [71] of test-[03]\.tar ", result.stderr
    )
    on_ray(config, "--set", "runtime.max_skipped=0.01")
    generate(config, "--set", "runtime.max_skipped=0.01", "--output", str(tmp_path / "local"))
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    assert manifest(tmp_path / "out")["skipped"] == manifest(tmp_path / "local")["skipped"]
    assert len(manifest(tmp_path / "out")["skipped"]) == 2


def test_workers_stream_row_groups(cluster: str, write_config: WriteConfig, tmp_path: Path) -> None:
    del cluster
    folder = write_files(tmp_path / "parquet", images(), [i % 3 for i in range(40)])
    config = write_config(source=stream(folder))
    on_ray(config)
    generate(config, "--output", str(tmp_path / "local"))
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


# ------------------------------------------------------------------------------------------- failures


def test_a_worker_that_is_killed_costs_its_shard_in_flight(cluster: str, watched_config: Path, tmp_path: Path) -> None:
    del cluster
    generate(watched_config, "--output", str(tmp_path / "local"))
    (tmp_path / "kill once").touch()
    on_ray(watched_config)
    assert not (tmp_path / "kill once").exists()
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


def test_shards_that_always_fail_are_named_and_the_others_finish(
    cluster: str, watched_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    monkeypatch.setattr("pipeline.executors.ray.RETRIES", 1)
    (tmp_path / "raise").touch()
    (tmp_path / "die").touch()
    result = fgsm("generate", watched_config, "--executor", "ray")
    assert result.exit_code == 3, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(r"Error: 2 of 6 .* 1 .*: test-00002-of-00006, test-00005-of-00006; ", last)
    assert "ArithmeticError: a white image (shard test-00002-of-00006, rows 4 to 7)" in last
    assert re.search(r"\btest-00005-of-00006 .*: .*worker died", result.stderr)
    assert receipts(tmp_path / "out") == 4
    assert manifest(tmp_path / "out")["rows"] == 32
    (tmp_path / "raise").unlink()
    (tmp_path / "die").unlink()
    assert "4 of 6 shards" in on_ray(watched_config)
    generate(watched_config, "--output", str(tmp_path / "local"))
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


def test_skipped_rows_are_counted_over_all_shards(cluster: str, write_config: WriteConfig, tmp_path: Path) -> None:
    del cluster
    images = [png_bytes(image) for image in random_pixels(40)]
    for row in (3, 4, 36):  # two of them in one shard
        images[row] = b"no image"
    source = {"path": str(write_parquet(tmp_path / "broken", images, [0] * 40)), "shuffle": False}
    config = write_config(source=source, runtime={"max_skipped": 0.04})
    result = fgsm("generate", config, "--executor", "ray")
    assert result.exit_code == 1
    assert re.search(
        r"Error: source: [23] of 40 .*runtime\.max_skipped = 0\.04 .* (4|36) of split test ", result.stderr
    )
    on_ray(config, "--set", "runtime.max_skipped=0.1")
    assert [row["source_index"] for row in manifest(tmp_path / "out")["skipped"]] == [3, 4, 36]


@pytest.mark.parametrize("wrong", ["image", "label"])
def test_a_row_that_may_not_be_ends_the_run_as_it_does_here(
    cluster: str, write_config: WriteConfig, tmp_path: Path, wrong: str
) -> None:
    """At once, and not as a shard that failed each time it was tried."""
    del cluster
    cells: list[bytes | None] = [*images()]
    labels: list[int | None] = [i % 3 for i in range(40)]
    if wrong == "image":
        cells[3] = b"no image"
    else:
        labels[3] = None
    folder = write_files(tmp_path / "parquet", cells, labels)
    config = write_config(source=stream(folder), runtime={"on_error": "fail"}, attack={"label": "dataset"})
    here, there = fgsm("generate", config), fgsm("generate", config, "--executor", "ray", "--overwrite")
    assert here.exit_code == there.exit_code == 1
    assert here.stderr.splitlines()[-1] == there.stderr.splitlines()[-1]
    assert "Shard" not in there.stderr


def test_what_a_lost_worker_has_committed_is_not_written_again(watched_config: Path, tmp_path: Path) -> None:
    """Ray tries its task again, perhaps on a machine whose last digits differ from those that the receipt records."""
    generate_once(watched_config)
    there = require_manifest(OutputFolder(tmp_path / "out"))
    job = Job(load_config(str(watched_config)), str(tmp_path / "out"), there, there.generation)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    shard = there.plan.shards[2]
    (again,) = write_on_worker(WorkerContext(str(Path.cwd()), "cpu", cores=1, gpus=1), job.write, shard)  # type: ignore[misc]
    assert again.receipt == committed(OutputFolder(tmp_path / "out"), there.edition, [shard])[shard.name]
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_a_folder_that_shows_late_what_a_worker_wrote_is_waited_for(
    cluster: str, watched_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    asked: list[int] = []

    def late(*arguments: Any) -> Any:
        asked.append(1)
        return {} if len(asked) < 5 else committed(*arguments)

    monkeypatch.setattr("pipeline.flow.committed", late)
    on_ray(watched_config, *ONE)
    generate(watched_config, "--output", str(tmp_path / "local"))
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


def test_a_store_that_another_run_takes_over_is_left_to_it(
    cluster: str, s3: S3, watched_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers hold no lock: the driver ends them, long before the night is over."""
    del cluster
    monkeypatch.setattr("pipeline.output.locks.BEAT_SECONDS", 0.2)
    s3.make("taken")
    (tmp_path / "slow").touch()

    def written() -> int:
        return sum("receipts" in name for name in s3.objects("taken"))

    def take_over() -> None:
        wait_for(lambda: written() >= 1, 100)
        lock = lock_of(s3.objects("taken", "out/"))
        s3.write("taken", "out/.run/lock", json.dumps({**(lock or {}), "token": "another"}).encode())

    thread = threading.Thread(target=take_over)
    thread.start()
    with pytest.raises(PipelineError, match=r"^s3://taken/out: .*\block\b.*\bprocess\b"):
        on_ray(watched_config, "--output", "s3://taken/out", *ONE)
    thread.join()
    there = written()
    assert 1 <= there < 6
    time.sleep(1.5)  # longer than a shard takes
    assert written() == there, "no worker goes on"


def test_a_folder_that_the_nodes_do_not_share_is_told(
    cluster: str, watched_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    monkeypatch.setattr("pipeline.flow.SHARED_SECONDS", 1.0)
    monkeypatch.setattr("pipeline.flow.committed", lambda *_: {})
    with pytest.raises(
        PipelineError, match=rf"^output\.path: .*test-\d{{5}}-of-00006\b.*{watched_config.parent}/out\b"
    ):
        on_ray(watched_config, *ONE)


@pytest.mark.drill
def test_a_node_that_reads_another_source_is_told(
    cluster: str, watched_config: Path, factory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The victim's file changes after the run was opened: what a worker opens then is another run."""
    del cluster

    def change(*_: object, **__: object) -> None:
        factory_file.write_text(factory_file.read_text() + "\n# another\n")
        # As on a node that joins now: nothing is held.
        ray.get([ray.remote(num_cpus=1)(_let_go).remote() for _ in range(4)])

    monkeypatch.setattr("pipeline.executors.ray.RETRIES", 0)
    monkeypatch.setattr("pipeline.flow.check_disk", change)
    with pytest.raises(ShardsFailedError, match=r"models\.\w+\.content"):
        on_ray(watched_config)


def _let_go() -> None:
    time.sleep(0.2)  # so that each worker gets one
    pipeline.engine.job.close()


def test_what_the_config_names_wrongly_is_the_same_sentence_as_here(cluster: str, write_config: WriteConfig) -> None:
    del cluster
    config = write_config(model={"kwargs": {"classes": 5}})
    here, there = fgsm("generate", config), fgsm("generate", config, "--executor", "ray")
    assert here.exit_code == there.exit_code == 2
    assert here.stderr.splitlines()[-1] == there.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------------- the driver's end


@pytest.mark.drill
def test_a_driver_that_is_interrupted_or_killed_goes_on_from_the_receipts(
    cluster: str, watched_config: Path, tmp_path: Path, processes: Any
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    (tmp_path / "slow").touch()

    def start() -> Any:
        # One worker: each has to import torch.
        arguments = ["generate", str(watched_config), "--executor", "ray", "--set", "runtime.ray.workers=1"]
        target = (str(tmp_path / "c"), str(log), arguments, driver_of(cluster))
        process = processes.Process(target=run_fgsm, args=target)
        process.start()
        return process

    def more_than(count: int, process: Any) -> bool:
        return not process.is_alive() or receipts(out) > count

    interrupted = start()
    wait_for(partial(more_than, 0, interrupted), 100)
    began = time.monotonic()
    os.kill(interrupted.pid, signal.SIGTERM)
    interrupted.join(10)
    assert time.monotonic() - began < 5
    assert interrupted.exitcode == 143, log.read_text()
    assert f": fgsm generate {watched_config} --executor ray --set" in log.read_text()
    assert "Traceback" not in log.read_text()
    committed = receipts(out)
    assert 1 <= committed < 5
    assert manifest(out)["rows"] == 8 * committed
    time.sleep(1.5)  # longer than a shard takes
    assert receipts(out) == committed, "no worker goes on"
    killed = start()
    wait_for(partial(more_than, committed, killed), 100)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert receipts(out) < 6
    (tmp_path / "slow").unlink()
    assert re.search(r"[2-5] of 6 shards", on_ray(watched_config))
    generate(watched_config, "--output", str(tmp_path / "local"))
    assert digests(out) == digests(tmp_path / "local")
    assert not list((out / ".run/tmp").glob("*"))


# ------------------------------------------------------------------------------------------- resources

CPU_NODE, GPU_NODE = {"CPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("asked", "device", "nodes", "expected", "room"),
    [
        ({}, "auto", [CPU_NODE, CPU_NODE], Resources(8, 0, None), 2),
        ({}, "auto", [{"CPU": 1.0}, {"CPU": 64.0}, {"CPU": 64.0}], Resources(64, 0, None), 2),
        ({}, "auto", [{"CPU": 4.0}, CPU_NODE], Resources(4, 0, None), 3),
        ({}, "auto", [{"CPU": 0.0}, CPU_NODE], Resources(8, 0, None), 1),
        ({"workers": 2}, "cpu", [CPU_NODE], Resources(4, 0, 2), 2),
        ({"workers": 3}, "cpu", [CPU_NODE, CPU_NODE], Resources(4, 0, 3), 3),
        ({"workers": 9}, "cpu", [CPU_NODE], Resources(1, 0, 9), 8),
        ({"cpus_per_worker": 2}, "cpu", [CPU_NODE], Resources(2, 0, None), 4),
        ({}, "auto", [CPU_NODE, GPU_NODE], Resources(8, 1, None), 8),
        ({}, "cuda", [GPU_NODE, {"CPU": 8.0, "GPU": 2.0}], Resources(4, 1, None), 10),
        ({"gpus_per_worker": 0.5}, "cuda", [GPU_NODE], Resources(4, 0.5, None), 16),
        ({"gpus_per_worker": 2, "workers": 3}, "cuda", [GPU_NODE], Resources(16, 2, 3), 3),
        ({"gpus_per_worker": 0}, "auto", [GPU_NODE], Resources(64, 0, None), 1),
        ({}, "cpu", [GPU_NODE], Resources(64, 0, None), 1),
        ({}, "cuda", [{"CPU": 2.0, "GPU": 8.0}], Resources(1, 1, None), 2),
    ],
)
def test_what_a_worker_is_given(
    asked: dict[str, Any], device: str, nodes: Sequence[Mapping[str, float]], expected: Resources, room: int
) -> None:
    workers = share_out(RuntimeConfig.model_validate({"device": device, "ray": asked}), nodes)
    assert workers == expected
    assert workers.room(nodes) == room


@pytest.mark.parametrize(
    ("gpus", "device", "seen", "share"),
    [(0.0, "auto", "", None), (0.0, "cuda", "0,1", None), (1.0, "auto", "0,1", None), (0.5, "auto", "0,1", 0.5)],
)
def test_a_worker_sees_what_it_was_given_of_the_gpus(
    gpus: float,
    device: str,
    seen: str,
    share: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[float] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", shares.append)
    with at_work(WorkerContext(str(Path.cwd()), device, 1, gpus)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert shares == ([] if share is None else [share])


def test_a_worker_names_no_credential_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver, which has others, could not take it out."""
    monkeypatch.setenv("NODE_SECRET", "hush-hush-hush")
    with pytest.raises(PipelineError) as caught, at_work(WorkerContext(str(Path.cwd()), "auto", 1, 1)):
        try:
            raise OSError(5, "refused hush-hush-hush")
        except OSError as error:
            raise PipelineError("no answer to hush-hush-hush") from error
    assert str(caught.value) == "no answer to ***"
    assert "hush" not in repr(caught.value.__cause__)
    with listening() as said:
        logging.getLogger("pipeline.any").warning("signed with %s", "hush-hush-hush")
    assert said == [(logging.WARNING, "signed with ***")]


@pytest.mark.parametrize(
    ("asked", "device", "needed"),
    [
        ({"cpus_per_worker": 9}, "cpu", "9 CPU,"),
        ({"gpus_per_worker": 0.5}, "auto", r"1 CPU and 0\.5 GPU,"),
        ({}, "cuda", "1 CPU and 1 GPU,"),
    ],
)
def test_a_demand_that_no_node_can_satisfy_is_told(asked: dict[str, Any], device: str, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^runtime\.ray: .* {needed} .* 8 CPU, 0"):
        share_out(RuntimeConfig.model_validate({"device": device, "ray": asked}), [CPU_NODE, CPU_NODE])


def test_an_impossible_demand_ends_instead_of_waiting(cluster: str, write_config: WriteConfig) -> None:
    del cluster
    began = time.monotonic()
    result = fgsm("generate", write_config(runtime={"ray": {"cpus_per_worker": 64}}), "--executor", "ray")
    assert time.monotonic() - began < 10
    assert result.exit_code == 2
    assert re.search(r"Error: runtime\.ray: .* 64 CPU,.* 2 CPU, 0 GPU", result.stderr)


def test_resources_do_not_enter_the_run_id(write_config: WriteConfig) -> None:
    ids = {
        open_run(load_config(str(write_config(runtime={"ray": resources})))).run_id
        for resources in ({}, {"workers": 3, "gpus_per_worker": "auto", "cpus_per_worker": 2})
    }
    assert len(ids) == 1


# ------------------------------------------------------------------------------------------ connecting


@pytest.mark.parametrize("named", [True, False])
def test_an_address_that_does_not_answer_is_told_within_seconds(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named:
        monkeypatch.setenv("RAY_ADDRESS", where)
    monkeypatch.setattr("pipeline.executors.ray.read_ray_address", lambda: None if named else where)
    began = time.monotonic()
    with pytest.raises(PipelineError, match=rf"^RAY_ADDRESS: .* {re.escape(where)} \("):
        pipeline.executors.ray._connect()
    assert time.monotonic() - began < 5


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Have `ray.init` fail, as there is no cluster of another version here; the addresses that it is asked for."""
    addresses: list[object] = []

    def init(address: object = None, **_: object) -> None:
        addresses.append(address)
        raise error

    monkeypatch.setattr("ray.init", init)
    return addresses


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Version mismatch: the cluster was started with Ray 1.0.\nMore."),
        ray.exceptions.AuthenticationError("there is no token"),
        ConnectionError("it went."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_cluster_that_does_not_take_this_process_is_not_replaced_by_a_local_one(
    error: Exception, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = fail_with(error, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("pipeline.executors.ray.read_ray_address", lambda: None if named else where)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if named:
            monkeypatch.setenv("RAY_ADDRESS", where)
        with pytest.raises(PipelineError) as caught:
            pipeline.executors.ray._connect()
    reason = str(error).splitlines()[0].rstrip(".")
    assert re.match(rf"RAY_ADDRESS: .* {where} .*\({re.escape(reason)}.*\blocal\b", str(caught.value))
    assert addresses == [None]


@pytest.mark.parametrize("where", ["local", None])
@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup."),
        TimeoutError("Timed out while waiting for the file."),
        RuntimeError("Failed to start GCS."),
        ConnectionError("The GCS is gone."),
        ray.exceptions.RayError("no raylet"),
        OSError("AF_UNIX path length cannot exceed 107 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_local_cluster_that_does_not_start_is_one_sentence(
    where: str | None, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where:
        monkeypatch.setenv("RAY_ADDRESS", where)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fail_with(error, monkeypatch)
    monkeypatch.setattr("pipeline.executors.ray.read_ray_address", lambda: None)
    with pytest.raises(PipelineError, match=r"^Ray .*\(.*RAY_TMPDIR"):
        pipeline.executors.ray._connect()


@pytest.mark.drill
def test_a_temporary_folder_with_a_long_name_is_told(tmp_path: Path) -> None:
    (tmp_path / ("long" * 20)).mkdir()
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / ("long" * 20)), "RAY_ADDRESS": "local"}
    script = (
        "from pipeline.config.schema import RuntimeConfig\nfrom pipeline.executors.ray import RayExecutor\n"
        "with RayExecutor(RuntimeConfig()): pass"
    )
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    sentence = ended.stderr.splitlines()[-1]
    assert re.search(r"PipelineError: Ray .*\(.*RAY_TMPDIR", sentence)


@pytest.mark.drill
def test_a_node_without_memory_fails_the_run_instead_of_holding_it_up(write_config: WriteConfig) -> None:
    """Ray by itself tries without end what it has ended for want of memory."""
    scarce = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100", "RAY_ADDRESS": "local"}
    command = [sys.executable, "-m", "pipeline", "generate", str(write_config()), "--executor", "ray"]
    ended = subprocess.run(command, env={**os.environ, **scarce}, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert re.search(r"\bRay\b.*\bmemory\.$", ended.stderr.splitlines()[-1])


def test_without_ray_the_sentence_names_what_to_install(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "pipeline.executors.ray")
    result = fgsm("generate", write_config(), "--executor", "ray")
    assert result.exit_code == 2
    assert "pip install 'fgsm-pipeline[ray]'" in result.stderr


# --------------------------------------------------------------------------------------- a node is lost


@pytest.mark.drill
@pytest.mark.timeout(400)
def test_a_node_that_is_lost_costs_its_shards_in_flight(
    write_config: WriteConfig, factory_file: Path, tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory_file.write_text(FACTORY + GATED)
    images = random_pixels(48)
    images[20] = 255
    write_parquet(tmp_path / "many", [png_bytes(image) for image in images], [i % 3 for i in range(48)])
    config = write_config(
        source={"path": str(tmp_path / "many"), "shuffle": False},
        model={"name": f"{factory_file}:Gated"},
        output={"images_per_shard": 8},
        runtime={"batch_size": 4},
    )
    generate(config, "--output", str(tmp_path / "local"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")

    def start(address: str) -> tuple[Any, Path]:
        arguments, log = ["generate", str(config), "--executor", "ray"], tmp_path / "log"
        target = (str(tmp_path / "cache"), str(log), arguments, driver_of(address))
        driver = processes.Process(target=run_fgsm, args=target)
        driver.start()
        return driver, log

    lose_a_node(tmp_path, start)
    assert receipts(tmp_path / "out") == 6
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0
