"""The shipped configs, CI and the table of the failure drill."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tests.conftest
import tests.test_drill
from pipeline.config.load import load_config, packaged_configs

pytest_plugins = ["pytester"]

ROOT = tests.conftest.REPOSITORY


@pytest.mark.parametrize("name", [path.stem for path in packaged_configs().glob("*.yaml")])
def test_a_shipped_config_is_valid_and_commented(name: str) -> None:
    config = load_config(name)
    assert config.output.path.startswith("out/")
    text = (packaged_configs() / f"{name}.yaml").read_text()
    assert f"fgsm generate {name}" in text
    assert text.count("#") >= 5


def test_a_drill_that_fails_fails_ci_at_once(tmp_path: Path) -> None:
    """CI stops the drills that take too long, and that is no failure: one that has failed must not wait for it."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    # The environment that it makes is this one, and there is nothing to install.
    (tmp_path / "shims").mkdir()
    (tmp_path / "scripts").mkdir()
    scripts = {"shims/python": f'exec {sys.executable} "$@"', "shims/chromium": "true", "scripts/check": "true"}
    for name, script in scripts.items():
        shim = tmp_path / name
        shim.write_text(f"#!/bin/sh\n{script}\n")
        shim.chmod(0o755)
    (tmp_path / "README.md").write_text("<!-- test command -->\n```sh\nmkdir .venv && ln -s ../shims .venv/bin\n```\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = drill\n")
    (tmp_path / "test_made_up.py").write_text(
        """
import pathlib, pytest
pytestmark = pytest.mark.drill
def test_a_passes(): pass
def test_b_fails(): assert False
def test_c_would_take_long(): pathlib.Path("went on").touch()
"""
    )
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/shims:{os.environ['PATH']}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    ended = subprocess.run([tmp_path / ".ci/run"], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "1 failed, 1 passed" in ended.stdout
    assert not (tmp_path / "went on").exists()


def test_the_drill_s_table_has_figures_of_tests_that_passed_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        '''
import pytest

@pytest.fixture
def broken(drill): raise OSError
@pytest.fixture
def absent(drill): pytest.skip()

def test_passes(drill):
    """One that passes."""
    drill.tried = 7
def test_fails(drill):
    """One that fails."""
    assert drill.lost
def test_skips(drill):
    """One that skips."""
    pytest.skip()
def test_is_not_reached(broken):
    """One that has nothing to stand on."""
def test_is_not_here(absent):
    """One that something lacks for."""
'''
    )
    ended = pytester.runpytest_inprocess(plugins=[tests.conftest, tests.test_drill])
    assert [line for line in ended.outlines if line.startswith("| One")] == [
        "| One that passes | 7 | 0 | 0 | 0 |",
        "| One that fails | failed |  |  |  |",
        "| One that skips | skipped |  |  |  |",
        "| One that has nothing to stand on | failed |  |  |  |",
        "| One that something lacks for | skipped |  |  |  |",
    ]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_scripts_are_clean() -> None:
    names = ["check", "gpu_check.sh", "gpu_wheels.sh", "slurm_ray.sbatch"]
    scripts = [*(ROOT / "scripts" / name for name in names), ROOT / ".ci/run"]
    # What it merely notes, its versions note differently.
    subprocess.run(["shellcheck", "--severity=warning", *scripts], check=True)
