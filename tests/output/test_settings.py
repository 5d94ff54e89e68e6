"""Settings: what makes a config another run than the one in its output is refused before anything is opened."""

from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError
from tests.conftest import WriteConfig, generate, generate_once


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("attack.epsilons=[2/255, 9/255]", "attacks.fgsm.epsilons"),
        ("attack.label=prediction", "attacks.fgsm.label"),
        ("source.limit=7", "source.limit"),
        ("runtime.seed=1", "runtime.seed"),
        ("output.layout=wide", "output.layout"),
        ("preprocess.resize=8", "preprocess.resize"),
        ("model.kwargs={classes: 3}", "models.make.kwargs"),
    ],
)
def test_other_settings_are_refused_unopened(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, setting: str, key: str
) -> None:
    generate_once(write_config())
    monkeypatch.setattr("pipeline.engine.job.open_run", None)
    with pytest.raises(ConfigError, match=rf"differs in .*{key}"):
        generate(write_config(), "--set", setting)


def test_a_folder_of_another_place_is_no_other_setting(
    write_config: WriteConfig, factory_file: Path, tmp_path: Path
) -> None:
    generate_once(write_config())
    moved = factory_file.rename(tmp_path / "renamed.py")
    assert "already there" in generate(write_config(model={"name": f"{moved}:make"}))
