"""Resolved: what is said before a run begins."""

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import WriteConfig, fgsm, generate, generate_once, shard_path


def test_a_run_says_what_it_was_resolved_to(write_config: WriteConfig) -> None:
    said = generate(write_config(source={"limit": 4}, model={"mean": [0.1, 0.2, 0.3]}))
    assert "Images: test 4; 16x16 RGB; 3 classes: cat, dog, eel\n" in said
    assert "Model make: mean 0.1 0.2 0.3, std 1 (mean from the config, std by default)\n" in said
    assert "Computes on cpu in fp32, 4 images a batch\n" in said


def test_what_weights_were_published_with_is_said(tmp_path: Path) -> None:
    said = generate(Path("digits"), "--limit", "4", "--output", str(tmp_path / "out"))
    assert "Model digits: mean 0, std 1 (published with it)\n" in said
    assert "model.mean" not in said


def test_a_complete_run_says_nothing_of_it(write_config: WriteConfig) -> None:
    generate_once(write_config())
    assert "Images: " not in generate(write_config())


@pytest.mark.parametrize("several", [False, True])
def test_a_normalisation_that_nobody_states_is_a_warning(write_config: WriteConfig, several: bool) -> None:
    config, key = write_config(source={"limit": 2}, model={"mean": [0.0]}), "model"
    if several:
        values, key = yaml.safe_load(config.read_text()), "models.net"
        config.write_text(yaml.safe_dump({**values, "model": None, "models": {"net": values["model"]}}))
    said = generate(config)
    assert f"\n{key}.std: neither the config" in said
    assert "neither the config" not in generate(config, "--overwrite", "--set", f"{key}.std=[1.0]")


def test_a_warning_is_said_again_as_long_as_its_run_is_there(write_config: WriteConfig, tmp_path: Path) -> None:
    config, warning = write_config(source={"limit": 32}), "neither the config"
    assert warning in generate(config)
    again = generate(config)
    assert "All 2 shards are already there." in again
    assert again.count(warning) == 1
    shard_path(tmp_path, "out/.run/receipts/test-00001-of-00002.json").unlink()
    assert generate(config).count(warning) == 1
    # What took its place was not warned of.
    stated = write_config(source={"limit": 32}, model={"mean": [0.5], "std": [0.5]})
    assert warning not in generate(stated, "--overwrite")
    assert warning not in generate(stated)


@pytest.mark.parametrize("again", [(), ("--overwrite",)])
def test_a_warning_of_the_normalisation_ends_when_that_is_stated(
    write_config: WriteConfig, again: tuple[str, ...]
) -> None:
    """What was taken without a word is stated now: the run is the same, and is warned of no more."""
    warning = "neither the config"
    assert warning in generate(write_config(source={"limit": 2}))
    stated = write_config(source={"limit": 2}, model={"mean": [0.0], "std": [1.0]})
    assert warning not in generate(stated, *again)
    said = generate(stated)
    assert "already there" in said
    assert warning not in said


def test_kept_warnings_that_cannot_be_read_are_none(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(source={"limit": 2})
    assert "neither the config" in generate(config)
    (tmp_path / "out/.run/warnings").unlink()
    (tmp_path / "out/.run/warnings").mkdir()
    assert "neither the config" not in generate(config)


def test_a_warning_says_that_it_is_one(write_config: WriteConfig) -> None:
    said = fgsm("generate", write_config(source={"limit": 2})).stderr
    assert re.search(r"^[\d-]+ [\d:,]+ Warning: model\.mean and model\.std: ", said, re.MULTILINE)
    assert not re.search("Warning: Opening", said)


@pytest.mark.parametrize(("epsilon", "said"), [("8/255", []), ("0.0313725490", []), ("0.0315", ["0.0315", "8/255"])])
def test_epsilons_are_said_where_others_are_stored(epsilon: str, said: list[str]) -> None:
    result = fgsm("generate", "digits", "--set", f"attack.epsilons=[{epsilon}]", "--set", "model.weights=/no/such.pt")
    lines = [line for line in result.stderr.splitlines() if line.startswith("epsilon ")]
    assert all(part in line for line in lines for part in said)
    assert len(lines) == bool(said)
