"""What is tried out before a run is fixed: the batch that fits, the compiled victim; and precision."""

import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError
from pipeline.core.lanes import Lanes
from pipeline.engine.compute import COMPILE_FROM, fit_batch_size, own_copy, rehearse, worth_compiling
from pipeline.engine.run import choose_device, open_run
from pipeline.models.base import Model
from pipeline.models.factory import FactoryConfig
from pipeline.models.load import load_model
from tests.conftest import FACTORY, WriteConfig, digests, fgsm, generate, manifest, shard_path
from tests.support.attacks import LEVELS, attacker_of

CPU = torch.device("cpu")
# A victim whose memory ends: torch raises the same error where a device's does.
SMALL_MEMORY = (
    FACTORY
    + """

class Hungry(Net):
    calls = 0

    def forward(self, x):
        Hungry.calls += 1
        if Hungry.calls > {most}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(x)
"""
)


def break_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave no C++ compiler, and nothing that was compiled earlier."""
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def compilations(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.message.startswith("Compiled ") for record in caplog.records)


def resolved(folder: Path) -> dict[str, Any]:
    runtime: dict[str, Any] = manifest(folder)["config"]["runtime"]
    return runtime


# -------------------------------------------------------------------------------------------- batch size


@pytest.mark.parametrize(("fits", "expected"), [(256, 256), (255, 128), (33, 32), (1, 1)])
def test_a_batch_is_halved_until_it_fits(fits: int, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit_batch_size(attempt, 256) == expected
    assert tried == [256 >> halvings for halvings in range(len(tried))]
    assert len(caplog.records) == (expected < 256)


def test_where_no_image_fits_the_sentence_says_so() -> None:
    def attempt(size: int) -> None:
        raise torch.OutOfMemoryError(f"{size}")

    with pytest.raises(ConfigError, match=r"^runtime\.batch_size: "):
        fit_batch_size(attempt, 6)


def test_other_errors_do_not_make_a_batch_smaller() -> None:
    def attempt(size: int) -> None:
        raise KeyError(size)

    with pytest.raises(KeyError, match=r"^6$"):
        fit_batch_size(attempt, 6)


def test_the_size_that_fitted_stays_with_the_run(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = write_config(runtime={"batch_size": 6}), tmp_path / "out"
    monkeypatch.setattr("pipeline.engine.run.fit_batch_size", lambda *_, **__: 3)
    generate(config)
    before = digests(out)
    assert resolved(out)["batch_size"] == 3
    assert manifest(out)["asked_batch_size"] == 6
    # Later, or elsewhere, all six would fit; the run has decided.
    monkeypatch.setattr("pipeline.engine.run.fit_batch_size", lambda *_, **__: 6)
    shard_path(out, ".run/receipts/test-00001-of-00003.json").unlink()
    generate(config)
    assert digests(out) == before
    # Who asks for another size asks for another run; who asks for the size that fitted, for this one.
    result = fgsm("generate", config, "--set", "runtime.batch_size=5")
    assert result.exit_code == 2
    assert re.search(r"runtime\.batch_size \(3 .*5 ", result.stderr)
    generate(config, "--set", "runtime.batch_size=3")


def test_memory_that_ends_later_is_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    path = tmp_path / "hungry.py"
    # Before the run it runs 13 times; per batch of 6 three times; the third batch of the first shard is its last.
    path.write_text(SMALL_MEMORY.format(most=13 + 12))
    result = fgsm("generate", write_config(model={"name": f"{path}:Hungry"}))
    assert result.exit_code == 1
    assert "--set runtime.batch_size=3 --overwrite" in result.stderr
    assert "Traceback" not in result.stderr


# Its backward pass adds in any order there, which PyTorch says once.
@pytest.mark.filterwarnings("ignore:adaptive_avg_pool2d_backward_cuda:UserWarning")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_finds_the_batch_that_fits(write_config: WriteConfig, tmp_path: Path) -> None:
    path = tmp_path / "greedy.py"
    path.write_text(
        FACTORY
        + "\n\nclass Greedy(Net):\n    def forward(self, x):\n"
        # Kept for the backward pass, and as much again for the product: a batch of 16 is more than there is.
        + "        share = torch.cuda.get_device_properties(x.device).total_memory // 30 // 4\n"
        + "        hog = torch.zeros(len(x) * share, device=x.device)\n"
        + "        return super().forward(x) + (hog * x.mean()).sum()\n"
    )
    config = write_config(model={"name": f"{path}:Greedy"}, runtime={"device": "cuda", "batch_size": 16})
    output = generate(config)
    assert re.search(r"^runtime\.batch_size: .* 16\b", output, re.M)
    assert resolved(tmp_path / "out")["batch_size"] in (4, 8), "two lanes of 8 may or may not meet at their peaks"
    assert fgsm("verify", tmp_path / "out", "--recompute").exit_code == 0


STANDARDISED = (
    FACTORY
    + """

class Standardised(Net):
    def forward(self, x):
        return super().forward(x / x.std((1, 2, 3), keepdim=True))
"""
)


@pytest.mark.parametrize("constant", [False, True])
def test_a_rehearsal_asks_nothing_of_its_images(tmp_path: Path, constant: bool) -> None:
    """A victim that cannot take a constant image, or any image at all, fails in the run and there by name."""
    path = tmp_path / "victim.py"
    path.write_text(STANDARDISED.replace("std((1, 2, 3), keepdim=True)", "std() * 0") if constant else STANDARDISED)
    config = FactoryConfig(kind="factory", name=f"{path}:Standardised")
    victim = load_model(config, seed=0, device=CPU)
    rehearse(attacker_of(victim), CPU, (3, 16, 16), 8)


def test_each_lane_has_its_own_copy_of_a_victim_and_all_share_its_weights() -> None:
    """A module that keeps its features in an attribute must find its own there."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 16 * 16, 4)

        def forward(self, images: Tensor) -> Tensor:
            self.features = images.flatten(1)
            time.sleep(0.002)  # another lane's turn
            logits: Tensor = self.linear(self.features)
            return logits

    victim = Model(Stateful())
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    zeros = torch.zeros(64, dtype=torch.int64)
    with Lanes(CPU, 4, count=4) as lanes:
        futures = lanes.submit(attacker_of(victim), images, zeros.unsqueeze(1), zeros, valid=zeros == 0)
        parts = [future.result() for future in futures]
    for index in range(1 + len(LEVELS)):
        stored = torch.cat([part.pictures[index] for part in parts])
        torch.testing.assert_close(torch.cat([part.logits[index] for part in parts]), victim(victim.unit(stored)))
    copy = own_copy(victim)
    assert copy is not victim
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in victim.parameters()]


# -------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize(("device", "images"), COMPILE_FROM.items())
def test_auto_compiles_where_the_run_is_long_enough(device: str, images: int) -> None:
    assert worth_compiling(torch.device(device), images)
    assert not worth_compiling(torch.device(device), images - 1)
    assert not worth_compiling(torch.device("mps"), 10**12)


@pytest.mark.drill
def test_a_compiled_run_resumes_and_verifies_exactly(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch._dynamo.reset()
    monkeypatch.setattr("pipeline.engine.compute.COMPILE_FROM", {"cpu": 40})
    config, out = write_config(), tmp_path / "out"
    generate(config)
    assert compilations(caplog) == 1
    assert resolved(out)["compile"] is True
    before = digests(out)
    # Nothing is compiled where nothing is written.
    generate(config)
    assert compilations(caplog) == 1
    shard_path(out, ".run/receipts/test-00001-of-00003.json").unlink()
    # A shorter run would not compile; this one has decided.
    monkeypatch.setattr("pipeline.engine.compute.COMPILE_FROM", {})
    generate(config)
    assert compilations(caplog) == 2
    assert digests(out) == before
    result = fgsm("verify", out, "--recompute")
    assert re.search(r"\b120 predictions .* 0 differ", result.stdout)
    assert compilations(caplog) == 3
    # The same run uncompiled is another run: last digits differ.
    result = fgsm("generate", config, "--set", "runtime.compile=false")
    assert result.exit_code == 2
    assert re.search(r"runtime\.compile \(true .*false ", result.stderr)
    # Where it can no longer be compiled it is not resumed with other digits, and not verified as if they were its own.
    break_compiler(monkeypatch, tmp_path)
    result = fgsm("verify", out, "--recompute")
    assert re.search(r"WARNING .*runtime\.compile\b", caplog.text)
    assert "another environment" in result.stdout
    shard_path(out, ".run/receipts/test-00001-of-00003.json").unlink()
    result = fgsm("generate", config)
    assert result.exit_code == 1
    assert re.search(r"Error: runtime\.compile: ", result.stderr)


@pytest.mark.drill
def test_every_model_of_a_process_is_compiled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, factory_file: Path
) -> None:
    """The compiler counts how often it meets the same code, and runs it as it is from the ninth time on."""
    monkeypatch.setattr(logging.getLogger("torch._dynamo"), "propagate", True)
    models = [
        load_model(FactoryConfig(kind="factory", name=f"{factory_file}:make"), seed=seed, device=CPU)
        for seed in range(3)
    ]
    images = torch.zeros((4, 3, 16, 16), dtype=torch.uint8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for model in models:
            with model.compiling():
                model.predict(images)
    assert not [record for record in caplog.records if "recompile_limit" in record.getMessage()]


@pytest.mark.slow
def test_auto_goes_on_without_a_compiler_and_says_so_once(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_compiler(monkeypatch, tmp_path)
    config = write_config()
    generate(config, "--output", str(tmp_path / "plain"))
    monkeypatch.setattr("pipeline.engine.compute.COMPILE_FROM", {"cpu": 1})
    generate(config)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (sentence,) = [warning for warning in warnings if "torch.compile" in warning]
    assert "\n" not in sentence
    assert resolved(tmp_path / "out")["compile"] is False
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


@pytest.mark.slow
def test_compilation_that_was_asked_for_must_work(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_compiler(monkeypatch, tmp_path)
    result = fgsm("generate", write_config(runtime={"compile": True}))
    assert result.exit_code == 2
    assert "Error: runtime.compile: " in result.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- precision


def test_bf16_is_recorded_and_verified(write_config: WriteConfig, tmp_path: Path) -> None:
    generate(write_config(), "--output", str(tmp_path / "fp32"))
    generate(write_config(runtime={"precision": "bf16"}))
    assert manifest(tmp_path / "out")["identity"]["runtime.precision"] == "bf16"
    assert digests(tmp_path / "out") != digests(tmp_path / "fp32")
    result = fgsm("verify", tmp_path / "out", "--recompute")
    assert result.exit_code == 0
    assert re.search(r"\b120 predictions .* 0 differ", result.stdout)


def test_bf16_is_near_fp32(write_config: WriteConfig) -> None:
    """And not equal to it: the logits really come from another precision."""
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    runs = [
        open_run(load_config(str(write_config(runtime={"precision": precision})))) for precision in ("fp32", "bf16")
    ]
    full, half = (run.models["make"].predict(images) for run in runs)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.2


def test_tf32_needs_cuda(write_config: WriteConfig) -> None:
    result = fgsm("generate", write_config(runtime={"precision": "tf32"}))
    assert result.exit_code == 2
    assert re.search(r"Error: runtime\.precision: tf32 .*\bcpu\b", result.stderr)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_the_matrix_units_round_only_where_asked(precision: str, allowed: bool) -> None:
    choose_device("cuda", precision)
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
