"""Verify: images are the attack, digits of another environment are no damage, and nor is what cannot be read now."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.attacks.base import Perturbed, direction_sign
from pipeline.attacks.fgsm import FGSM
from pipeline.check.findings import Findings
from pipeline.check.verify import verify
from pipeline.core.errors import NonFiniteError, PipelineError
from pipeline.core.images import decode_image, encode_images
from pipeline.core.lattice import common_sign, step
from pipeline.output.local import LocalStore
from tests.conftest import (
    FACTORY,
    KINDS,
    LAYOUTS,
    WriteConfig,
    digests,
    generate,
    generate_once,
    png_bytes,
    random_pixels,
    shard_path,
    without_run,
    write_parquet,
    write_sealed,
)
from tests.conftest import fgsm_without_run as fgsm
from tests.support.forgery import FILE, SHARD, agree, forge
from tests.support.s3 import S3
from tests.support.s3 import bucket as bucket
from tests.support.s3 import out as out
from tests.support.s3 import s3 as s3
from tests.support.s3 import server as server

CLEAN, SMALL = f"clean/{SHARD}.parquet", f"eps-2/{SHARD}.parquet"
Columns = dict[str, list[Any]]


def edit_receipt(out: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = shard_path(out, f".run/receipts/{SHARD}.json")
    receipt = json.loads(path.read_text())
    edit(receipt)
    write_sealed(path, receipt)
    agree(out)


def move_elsewhere(out: Path, package: str = "torch") -> None:
    """Let the receipt say that another environment wrote the shard."""
    edit_receipt(out, lambda receipt: receipt["versions"].update({package: "1.0"}))


def found(out: Path, **options: bool) -> Findings:
    """Findings of damage in the one shard that was forged."""
    findings = verify(out, **options)
    assert (len(findings.problems), findings.damaged) == (1, {SHARD}), findings.problems
    return findings


# ------------------------------------------------------------------------------------- images without the victim


def pictures(out: Path, file: str) -> Tensor:
    """(N, C, H, W) uint8."""
    return torch.stack(
        [decode_image(cell["bytes"]) for cell in pq.read_table(shard_path(out, file)).column("image").to_pylist()]
    )


def put(images: Tensor) -> Callable[[Columns], None]:
    """Put images into a file's rows."""

    def edit(columns: Columns) -> None:
        columns["image"] = [{"bytes": data, "path": None} for data in encode_images(images, "webp")]

    return edit


def images_of_another_epsilon(images: Sequence[Tensor]) -> Tensor:
    return images[1]


def clean_images(images: Sequence[Tensor]) -> Tensor:
    return images[0]


def noise_in_the_ball(images: Sequence[Tensor]) -> Tensor:
    return (images[0].to(torch.int16) + torch.randint(-8, 9, images[0].shape)).clamp(0, 255).to(torch.uint8)


def random_signs(images: Sequence[Tensor]) -> Tensor:
    return step(images[0], at_random(images[0]), 8)


def one_pixel_turned(images: Sequence[Tensor]) -> Tensor:
    clean, _, large = images
    turned = large.clone()
    turned[4, 1, 5, 6] = step(clean, -common_sign([clean, large], [0, 8]), 8)[4, 1, 5, 6]
    assert not torch.equal(turned, large)
    return turned


def one_pixel_short(images: Sequence[Tensor]) -> Tensor:
    clean, _, large = images
    short = step(clean, common_sign([clean, large], [0, 8]), 7)
    return torch.cat([large[:4], short[4:5], large[5:]])


def rows_exchanged(images: Sequence[Tensor]) -> Tensor:
    return images[2][[1, 0, *range(2, len(images[2]))]]


@pytest.mark.parametrize(
    "make",
    [
        images_of_another_epsilon,
        clean_images,
        noise_in_the_ball,
        random_signs,
        one_pixel_turned,
        one_pixel_short,
        rows_exchanged,
    ],
)
def test_images_that_are_not_clean_ones_moved_along_one_sign_are_found(
    write_config: WriteConfig, tmp_path: Path, make: Callable[[Sequence[Tensor]], Tensor]
) -> None:
    generate_once(write_config())
    out = tmp_path / "out"
    forge(out, put(make([pictures(out, file) for file in (CLEAN, SMALL, FILE)])))
    found(out)


def test_a_sign_is_told_from_all_levels_and_where_they_differ_by_most_of_them() -> None:
    clean = torch.tensor([10, 255, 0, 250], dtype=torch.uint8)
    sign = torch.tensor([1, 1, -1, 1], dtype=torch.int8)
    images = [step(clean, sign, level) for level in (0, 1, 2, 8)]
    hidden = torch.tensor([1, 0, 0, 1], dtype=torch.int8)
    assert torch.equal(common_sign(images, [0, 1, 2, 8]), hidden)
    images[1] = step(clean, -sign, 1)
    assert common_sign(images, [0, 1, 2, 8])[0] == 1
    # Of two, the one that is a whole step away.
    images[1] = clean + torch.tensor([0, 0, 0, 3], dtype=torch.uint8)
    assert torch.equal(common_sign([images[0], images[1], images[3]], [0, 1, 8]), hidden)


# --------------------------------------------------------------------------- images that only the gradient tells


def turn_one(sign: Tensor) -> Tensor:
    turned = sign.clone()
    turned[0, 1, 5, 6] *= -1
    return turned


def at_random(sign: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(sign))
    return torch.randint(0, 2, sign.shape, generator=generator, dtype=torch.int8) * 2 - 1


def not_at_all(sign: Tensor) -> Tensor:
    return torch.zeros_like(sign)


def of_other_rows(sign: Tensor) -> Tensor:
    return sign.roll(1, 0)


def generate_along(config: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Attack along another sign. All that is recorded, predictions too, is of the images that this makes."""

    perturb = FGSM.perturb

    def changed(*arguments: Any) -> Perturbed:
        _, _, images, _, levels, _ = arguments
        direction = perturb(*arguments).direction
        assert direction is not None
        return Perturbed.along(images, change(direction_sign(direction)).float(), levels)

    with monkeypatch.context() as patch:
        patch.setattr(FGSM, "perturb", changed)
        patch.setattr("pipeline.engine.run.check_attack", lambda *_: None)
        generate(config)


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        *(("images", change) for change in (turn_one, at_random, not_at_all, of_other_rows, torch.neg)),
        *((layout, turn_one) for layout in LAYOUTS if layout != "images"),
    ],
)
def test_recompute_finds_images_that_do_not_follow_the_gradient(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensor], Tensor],
    layout: str,
) -> None:
    config = write_config(output={"layout": layout}, source={"limit": 6}, attack={"epsilons": ["8/255"]})
    generate_along(config, monkeypatch, change)
    assert verify(tmp_path / "out").problems == []
    findings = verify(tmp_path / "out", recompute=True)
    assert (len(findings.damaged), findings.mismatches, findings.last_digits) == (1, 0, 0)
    assert "direction" in findings.problems[0]


@pytest.mark.parametrize(
    ("attack", "change"),
    [
        *(({}, change) for change in (at_random, not_at_all, of_other_rows, torch.neg)),
        ({"target": "least_likely"}, at_random),
        ({"label": "prediction"}, torch.neg),
    ],
)
def test_elsewhere_too(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensor], Tensor],
    attack: dict[str, Any],
) -> None:
    generate_along(write_config(attack=attack), monkeypatch, change)
    move_elsewhere(tmp_path / "out")
    findings = verify(tmp_path / "out", recompute=True)
    assert len(findings.damaged) == 3
    assert all("direction" in problem for problem in findings.problems)


def test_elsewhere_a_sign_that_rounding_may_turn_is_counted(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_along(write_config(output={"images_per_shard": 40}), monkeypatch, turn_one)
    path = next((tmp_path / "out/.run/receipts").iterdir())
    receipt = json.loads(path.read_text())
    write_sealed(path, {**receipt, "versions": {**receipt["versions"], "torch": "1.0"}})
    agree(tmp_path / "out")
    findings = verify(tmp_path / "out", recompute=True)
    assert findings.problems == []
    # One in each batch of 6, unless clipping hides it.
    assert 5 <= findings.near_tie_signs <= 7
    monkeypatch.setattr("pipeline.check.recompute.SIGN_TOLERANCE", {"fp32": 1e-7})
    assert verify(tmp_path / "out", recompute=True).damaged


# Of the class 0 it is as sure as 1 - 1e-7.
SURE = """

class Sure(Net):
    def forward(self, x):
        return super().forward(x) * 0.1 + torch.tensor([16.5, 0.0, 0.0])
"""


def test_a_gradient_that_is_all_rounding_says_nothing_elsewhere(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory_file: Path
) -> None:
    factory_file.write_text(FACTORY + SURE)
    config = write_config(model={"name": f"{factory_file}:Sure"}, attack={"label": "prediction"})
    generate_along(config, monkeypatch, at_random)
    move_elsewhere(tmp_path / "out")
    findings = verify(tmp_path / "out", recompute=True)
    # In the two other shards, of the recorded environment, every sign counts.
    assert (len(findings.damaged), SHARD in findings.damaged) == (2, False)
    assert findings.near_tie_signs > 1000


SOUND: list[Callable[[Path], dict[str, dict[str, Any]]]] = [
    *KINDS.values(),
    lambda _: {"attack": {"target": "least_likely"}},
    lambda _: {"attack": {"target": "dog", "label": "prediction"}},
    lambda _: {"attack": {"target": "random", "label": "prediction"}},
    lambda _: {"source": {"streaming": True}, "attack": {"target": "random"}},
]


@pytest.mark.parametrize(
    ("layout", "sections"),
    [
        *(("images", sections) for sections in SOUND),
        *((layout, KINDS[kind]) for layout in LAYOUTS if layout != "images" for kind in ("gray", "targeted")),
    ],
)
def test_sound_images_follow_the_gradient_to_the_last_sign(
    write_config: WriteConfig, tmp_path: Path, sections: Callable[[Path], dict[str, dict[str, Any]]], layout: str
) -> None:
    chosen = sections(tmp_path)
    generate_once(write_config(**{**chosen, "output": {"layout": layout}}))
    findings = verify(tmp_path / "out", recompute=True, source=True)
    assert (findings.problems, findings.changes) == ([], set())
    assert (findings.near_ties, findings.near_tie_signs, findings.last_digits) == (0, 0, 0)
    assert findings.compared == findings.recomputed // 3 > 0


@pytest.mark.parametrize("target", ["least_likely", "random", "eel"])
def test_targets_that_are_not_the_attack_s_are_found(write_config: WriteConfig, tmp_path: Path, target: str) -> None:
    generate_once(write_config(attack={"target": target, "epsilons": ["8/255"]}))

    def another(columns: Columns) -> None:
        columns["target"][2] = (columns["target"][2] + 1) % 3
        columns["fooled"][2] = columns["target"][2] == columns["prediction"][2]

    forge(tmp_path / "out", another)
    assert any("target" in problem for problem in verify(tmp_path / "out", recompute=True).problems)


@pytest.mark.parametrize("column", ["label", "prediction", "target"])
def test_a_class_that_there_is_not_is_found(write_config: WriteConfig, tmp_path: Path, column: str) -> None:
    generate_once(write_config(attack={"target": "random"}))

    def set_it(columns: Columns) -> None:
        if columns[column][2] is not None:
            columns[column][2] = 9
        if column == "prediction":
            columns["clean_prediction"][2] = 9

    for file in (CLEAN, SMALL, FILE):
        forge(tmp_path / "out", set_it, file)
    assert column in found(tmp_path / "out", recompute=True).problems[0]


# -------------------------------------------------------------------------------------------------- environments


@pytest.mark.slow
def test_other_kernels_are_another_environment(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
    command = [sys.executable, "-m", "pipeline", "verify", str(tmp_path / "out"), "--recompute", "--repair"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\bdefault\b.*MKL_CBWR=COMPATIBLE", done.stdout)
    assert verify(tmp_path / "out").problems == []


def test_resuming_under_other_settings_is_warned_of(
    write_config: WriteConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_once(write_config())
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with caplog.at_level(logging.WARNING):
        generate(write_config())
    assert re.search("settings default .*MKL_CBWR=COMPATIBLE", caplog.text)


def alter_confidence(by: float) -> Callable[[Columns], None]:
    def edit(columns: Columns) -> None:
        columns["confidence"][5] += by

    return edit


def test_last_digits_are_counted_where_all_that_is_recorded_is_the_same(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    generate_once(write_config())
    forge(tmp_path / "out", alter_confidence(1e-5))
    findings = verify(tmp_path / "out", recompute=True)
    assert (findings.problems, findings.last_digits, findings.changes) == ([], 1, set())
    assert "exactly" not in fgsm("verify", tmp_path / "out", "--recompute").stdout


@pytest.mark.parametrize("by", [-2e-3, float("nan")])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_confidence_beyond_tolerance_is_damage_everywhere(
    write_config: WriteConfig, tmp_path: Path, by: float, elsewhere: bool
) -> None:
    generate_once(write_config())
    forge(tmp_path / "out", alter_confidence(by))
    if elsewhere:
        move_elsewhere(tmp_path / "out")
    assert "confidence" in found(tmp_path / "out", recompute=True).problems[0]


TIED = """

class Tied(Net):
    def forward(self, x):
        logits = super().forward(x)[:, :1]
        return torch.cat([logits, logits - 1e-6, logits - 5], 1)
"""


@pytest.mark.parametrize(("elsewhere", "to", "damaged"), [(True, 1, False), (True, 2, True), (False, 1, True)])
def test_a_prediction_is_excused_only_elsewhere_and_close_to_the_top(
    write_config: WriteConfig, tmp_path: Path, factory_file: Path, elsewhere: bool, to: int, damaged: bool
) -> None:
    factory_file.write_text(FACTORY + TIED)
    generate_once(write_config(model={"name": f"{factory_file}:Tied"}))

    def fall_otherwise(columns: Columns) -> None:
        # One that is wrong either way: nothing else follows.
        row = columns["label"].index(3 - to)
        assert columns["prediction"][row] == 0
        columns["prediction"][row] = to

    forge(tmp_path / "out", fall_otherwise)
    if elsewhere:
        move_elsewhere(tmp_path / "out")
    findings = verify(tmp_path / "out", recompute=True)
    assert (bool(findings.damaged), findings.near_ties) == (damaged, int(not damaged))


CHANGING = """
import os


class Changing(Net):
    def forward(self, x):
        if "FGSM_TEST_NAN" in os.environ:
            return super().forward(x) / 0.0 * 0.0
        return super().forward(x) + torch.rand(3) * ("FGSM_TEST_NOISE" in os.environ)
"""


@pytest.mark.parametrize(
    ("variable", "error", "named"),
    [("FGSM_TEST_NOISE", PipelineError, "^model: .*deterministic"), ("FGSM_TEST_NAN", NonFiniteError, "NaN")],
)
def test_a_model_that_answers_otherwise_each_time_or_fails_here_is_no_damage(
    write_config: WriteConfig,
    tmp_path: Path,
    factory_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    error: type[Exception],
    named: str,
) -> None:
    factory_file.write_text(FACTORY + CHANGING)
    generate_once(write_config(model={"name": f"{factory_file}:Changing"}))
    before = digests(tmp_path / "out")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(error, match=named):
        verify(tmp_path / "out", recompute=True, repair=True)
    assert digests(tmp_path / "out") == before


# ----------------------------------------------------------------------------------------------------- the source


def exchange_images(columns: Columns) -> None:
    columns["image"][:2] = columns["image"][1::-1]


def another_label(columns: Columns) -> None:
    columns["label"][0] = (columns["label"][0] + 1) % 3


def another_caption(columns: Columns) -> None:
    columns["caption"][1] = "of another row"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("edit", "named"), [(exchange_images, "images"), (another_label, "label")])
def test_rows_that_are_not_the_source_s_are_found(
    write_config: WriteConfig, tmp_path: Path, edit: Callable[[Columns], None], named: str, streaming: bool
) -> None:
    generate_once(write_config(source={"streaming": streaming}))
    out = tmp_path / "out"
    (shard, *_) = sorted(without_run(path.stem) for path in (out / "clean").iterdir())
    for subset in ("clean", "eps-2", "eps-8"):
        forge_in(out, edit, subset, shard)
    (problem,) = verify(out, source=True).problems
    assert named in problem
    assert fgsm("verify", out, "--source").exit_code == 1


def forge_in(out: Path, edit: Callable[[Columns], None], subset: str, shard: str) -> None:
    """`forge`, in another shard than its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.check.test_verify.SHARD", shard)
        forge(out, edit, f"{subset}/{shard}.parquet")


def test_kept_columns_that_are_not_the_source_s_are_found(write_config: WriteConfig, tmp_path: Path) -> None:
    source = KINDS["targeted"](tmp_path)["source"]
    generate_once(write_config(source=source, output={"images_per_shard": 7}))
    out = tmp_path / "out"
    for file in (CLEAN, SMALL, FILE):
        forge(out, another_caption, file)
    assert verify(out).problems == []
    assert "caption" in found(out, source=True).problems[0]


def test_other_pixels_are_no_damage_where_another_pillow_decodes(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    out = tmp_path / "out"
    for file in (CLEAN, SMALL, FILE):
        forge(out, exchange_images, file)
    move_elsewhere(out, "pillow")
    findings = verify(out, source=True, repair=True)
    assert (len(findings.problems), findings.damaged) == (1, set())
    assert re.search(r"clean/.*pillow 1\.0 ", findings.problems[0])


def remove_source(folder: Path) -> None:
    shutil.rmtree(folder)


def change_source(folder: Path) -> None:
    write_parquet(folder, [png_bytes(pixels) for pixels in random_pixels(40, seed=7)], [0] * 40)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", [remove_source, change_source])
def test_a_source_that_is_gone_or_another_one_is_said_and_is_no_damage(
    write_config: WriteConfig, tmp_path: Path, image_parquet: Path, change: Callable[[Path], None], streaming: bool
) -> None:
    generate_once(write_config(source={"streaming": streaming}))
    change(image_parquet)
    assert verify(tmp_path / "out").problems == []
    findings = verify(tmp_path / "out", source=True, repair=True)
    assert (len(findings.problems), findings.damaged, findings.compared) == (1, set(), 0)
    assert "source" in findings.problems[0]
    assert fgsm("verify", tmp_path / "out", "--source").exit_code == 1


def test_a_source_that_fails_on_the_way_is_said_once(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_once(write_config())
    monkeypatch.setattr("pipeline.engine.loader.read_image", Mock(side_effect=PipelineError("source: cannot be read")))
    findings = verify(tmp_path / "out", source=True)
    assert (len(findings.problems), findings.damaged, findings.compared, findings.rows) == (1, set(), 0, 120)


# -------------------------------------------------------------------------------------------- what cannot be read


def assert_kept(out: Path, before: dict[str, str]) -> None:
    """What could not be read is a problem, and nothing of it is dropped."""
    findings = verify(out, repair=True)
    assert (len(findings.problems), findings.damaged, findings.unread) == (1, set(), 1), findings.problems
    assert fgsm("verify", out, "--repair").exit_code == 1
    assert shard_path(out, f".run/receipts/{SHARD}.json").exists()
    assert digests(out) == before


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read, as Linux has")
def test_a_file_that_the_disk_does_not_give_is_no_damage(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config())
    out = tmp_path / "out"
    # Reading there is an I/O error, for root too; its size is 0.
    shard_path(out, FILE).unlink()
    shard_path(out, FILE).symlink_to("/proc/self/mem")

    def claim_nothing(receipt: dict[str, Any]) -> None:
        next(entry for entry in receipt["files"] if without_run(entry["path"]) == FILE)["bytes"] = 0

    edit_receipt(out, claim_nothing)
    findings = verify(out, repair=True)
    assert (len(findings.problems), findings.damaged, findings.unread) == (1, set(), 1)
    assert os.strerror(errno.EIO) in findings.problems[0]
    assert shard_path(out, f".run/receipts/{SHARD}.json").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize(
    "reader", ["pipeline.check.integrity.pq.ParquetFile", "pipeline.check.integrity.hashlib.file_digest"]
)
def test_an_error_of_the_machine_is_no_damage(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, number: int
) -> None:
    generate_once(write_config(output={"images_per_shard": 40}))
    out, before = tmp_path / "out", digests(tmp_path / "out")
    monkeypatch.setattr(reader, Mock(side_effect=OSError(number, os.strerror(number))))
    findings = verify(out, repair=True)
    assert (len(findings.problems), findings.damaged, findings.unread) == (1, set(), 1)
    assert digests(out) == before


def test_a_file_that_goes_away_after_the_listing_is_no_damage(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_once(write_config())
    out = tmp_path / "out"
    sizes = LocalStore(out).sizes()
    shard_path(out, FILE).unlink()
    before = digests(out)
    monkeypatch.setattr(LocalStore, "sizes", lambda _: sizes)
    assert_kept(out, before)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("pipeline.core.images.open_stored", MemoryError()),
        ("pipeline.check.integrity.decode_image", MemoryError()),
        ("pipeline.check.integrity.pq.ParquetFile", pa.ArrowMemoryError("malloc of size 64 failed")),
    ],
)
def test_want_of_memory_is_no_damage(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    generate(write_config())
    before = digests(tmp_path / "out")
    monkeypatch.setattr(place, Mock(side_effect=error))
    result = fgsm("verify", tmp_path / "out", "--repair")
    assert (result.exit_code, "memory" in result.stderr) == (1, True)
    assert digests(tmp_path / "out") == before


def test_a_store_that_fails_for_one_file_hides_nothing_else(
    s3: S3, out: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(write_config(output={"path": out}))
    s3.fail("GET", FILE.removesuffix(".parquet"), 503)
    findings = verify(out, repair=True)
    assert (len(findings.problems), findings.damaged, findings.unread) == (1, set(), 1)
    assert (findings.shards, findings.rows) == (2, 3 * 24)
    monkeypatch.setattr("pipeline.check.verify.MOST_UNREAD", 1)
    # The two problems: the shard, and that the one after it was not tried.
    assert len(verify(out).problems) == 2
    s3.faults.clear()
    assert verify(out).problems == []
