"""Lanes: chunks in order, one core each, and the same numbers as a plain call."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.attacks.base import Goal
from pipeline.core.cores import available_cores, given_cores
from pipeline.core.lanes import Lanes, chunk_images, lane_count, to_host
from pipeline.engine.compute import Part
from pipeline.models.base import Model
from tests.conftest import WriteConfig, digests, generate
from tests.support.attacks import LEVELS, attack_one, attacker_of

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 7))


def noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def joined(parts: list[Part]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    pictures = [torch.cat([part.pictures[index] for part in parts]) for index in range(1 + len(LEVELS))]
    logits = torch.stack([torch.cat(own) for own in zip(*(part.logits for part in parts), strict=True)])
    return (
        pictures,
        logits,
        torch.cat([part.classes[0] for part in parts]),
        torch.stack([part.zero_signs for part in parts]).sum(0),
    )


@pytest.mark.parametrize(
    ("device", "batch_size", "shape", "expected"),
    [
        ("cpu", 256, (3, 32, 32), 64),
        ("cpu", 256, (3, 224, 224), 8),
        ("cpu", 256, (3, 96, 96), 32),
        ("cpu", 256, (3, 1024, 1024), 8),
        ("cpu", 5, (3, 32, 32), 5),
        ("cuda", 256, (3, 224, 224), 256),
    ],
)
def test_chunks_stay_in_the_cache(device: str, batch_size: int, shape: tuple[int, int, int], expected: int) -> None:
    assert chunk_images(torch.device(device), batch_size, shape) == expected


def test_chunks_come_back_in_order_and_empty_ones_are_left_out() -> None:
    rows, valid = torch.arange(10), torch.tensor([1, 1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    with Lanes(CPU, 2) as lanes:
        futures = lanes.submit(lambda part, mask: (part.tolist(), mask.tolist()), rows, valid=valid)
        assert [future.result() for future in futures] == [([0, 1], [True, True]), ([6, 7], [True, False])]


def test_lanes_and_who_feeds_them_have_one_thread_and_the_caller_gets_its_own_back() -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_threads_of_lanes(2)
    finally:
        torch.set_num_threads(own)


def check_threads_of_lanes(before: int) -> None:
    together = threading.Barrier(available_cores(), timeout=30)

    def look(rows: Tensor, valid: Tensor) -> tuple[int, int]:
        del rows, valid
        together.wait()  # breaks where there are fewer lanes than cores
        return threading.get_ident(), torch.get_num_threads()

    count = available_cores()
    with Lanes(CPU, 1) as lanes:
        seen = [f.result() for f in lanes.submit(look, torch.arange(count), valid=torch.ones(count, dtype=torch.bool))]
        beside = torch.get_num_threads()  # of who feeds the lanes
    assert beside == 1
    assert len({thread for thread, _ in seen}) == count
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == before
    # A thread that is started now inherits nothing from the lanes.
    inherited: list[int] = []
    thread = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inherited == [before]


@pytest.mark.parametrize("name", DEVICES)
def test_lanes_attack_as_a_plain_call_does(name: str) -> None:
    """On CUDA batches overlap on two streams; nothing may be read before it is there."""
    device = torch.device(name)
    victim, goal = Model(conv_net()).to(device), Goal(target="random")
    batches = [noise(32).roll(shift, 0) for shift in range(12)]
    if name == "cuda":
        batches = [images.pin_memory() for images in batches]  # else copies would wait for each other
    labels, draws = torch.arange(32) % 7, torch.arange(32) * 5
    valid = torch.arange(32) % 5 != 1
    chunk = 8 if name == "cpu" else 32
    with Lanes(device, chunk) as lanes:
        attacker = attacker_of(victim, goal=goal)
        waiting = [lanes.submit(attacker, images, labels.unsqueeze(1), draws, valid=valid) for images in batches]
        found = [joined([future.result() for future in futures]) for futures in waiting]
    for images, (pictures, logits, classes, zero_signs) in zip(batches, found, strict=True):
        plain = [
            attack_one(
                victim,
                *(tensor[rows].to(device) for tensor in (images, labels)),
                goal=goal,
                valid=valid[rows].to(device),
                draws=draws[rows].to(device),
            )
            for rows in (slice(start, start + chunk) for start in range(0, 32, chunk))
        ]
        for index, picture in enumerate(pictures):
            expected = torch.cat([part.images[index] for part in plain]).cpu()[valid]
            assert (picture != expected).float().mean() < 1e-3, "but for signs of gradients next to nothing"
        expected_logits = torch.cat([torch.stack(part.logits) for part in plain], 1).cpu()[:, valid]
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-3)
        assert torch.equal(classes, torch.cat([part.classes[0] for part in plain]).cpu()[valid])
        assert zero_signs.tolist() == torch.stack([part.zero_signs for part in plain]).sum(0).tolist()


@pytest.mark.parametrize("cores", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_cores(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    # Three chunks a batch: every lane has something to do.
    monkeypatch.setattr("pipeline.core.lanes.CHUNK_IMAGES", (2, 2))
    config = write_config()
    generate(config, "--output", str(tmp_path / "here"))
    monkeypatch.setattr("pipeline.core.lanes.available_cores", lambda: cores)
    generate(config, "--output", str(tmp_path / "there"))
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


@pytest.mark.parametrize("name", DEVICES)
def test_what_comes_to_the_host_is_complete(name: str) -> None:
    tensors = [torch.full((2_000_000,), value, device=name) for value in (1.0, 2.0)]
    assert [float(copy.sum()) for copy in to_host(tensors)] == [2_000_000.0, 4_000_000.0]
    assert all(copy.device == CPU for copy in to_host(tensors))


def test_a_process_that_was_given_fewer_cores_takes_no_more() -> None:
    before = available_cores()
    with given_cores(1):
        assert available_cores() == lane_count(CPU) == 1
        with given_cores(before + 7):
            assert available_cores() == before, "nobody can give what is not there"
        assert available_cores() == 1
    assert available_cores() == before


@pytest.mark.parametrize(("kind", "expected"), [("cpu", 0.005), ("meta", 0.0002)])
def test_lanes_of_an_accelerator_get_the_interpreter_promptly(kind: str, expected: float) -> None:
    sys.setswitchinterval(0.005)
    with Lanes(torch.device(kind), 1, count=1):
        assert sys.getswitchinterval() == pytest.approx(expected)
    assert sys.getswitchinterval() == pytest.approx(0.005)
