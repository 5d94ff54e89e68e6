"""Each kind of attack of the package, in a whole run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.attacks.load import load_attack
from pipeline.check.verify import verify
from pipeline.config.kinds import ATTACKS
from tests.conftest import fgsm, generate, generate_once, manifest, pixels, rows, some_slow
from tests.support.configs import section


def write(folder: Path, kind: str, **output: Any) -> Path:
    """A config of 32 of the packaged digits."""
    config = {
        "source": {"kind": "digits", "split": "test", "limit": 32},
        "preprocess": {"mode": "L"},
        "model": {"kind": "digits"},
        "attack": {"kind": kind, "epsilons": ["2/255", "32/255"]},
        "output": {"path": str(folder / "out"), "images_per_shard": 20, **output},
        "runtime": {"device": "cpu", "workers": 0, "batch_size": 8},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("kind", some_slow(ATTACKS, "pgd"))
def test_a_run_is_derived_again_to_the_pixel(kind: str, tmp_path: Path) -> None:
    generate_once(write(tmp_path, kind))
    findings = verify(tmp_path / "out", recompute=True)
    assert (findings.problems, findings.mismatches, findings.recomputed) == ([], 0, 96)
    clean = pixels(rows(tmp_path / "out", "clean"))
    for level in (2, 32):
        attacked = rows(tmp_path / "out", f"eps-{level}")
        assert {*attacked["attack"]} == {kind}
        assert 0 < abs(pixels(attacked) - clean).max() <= level
    # Another run of the same config finds its own rows, and writes nothing.
    before = manifest(tmp_path / "out")
    generate(tmp_path / "config.yaml")
    assert manifest(tmp_path / "out")["run_id"] == before["run_id"]


@pytest.mark.parametrize("kind", ATTACKS)
def test_one_sign_holds_those_that_lie_on_a_ray(kind: str, tmp_path: Path) -> None:
    result = fgsm("generate", write(tmp_path, kind, layout="signs"))
    on_ray = load_attack(section("attack", kind=kind, epsilons=["2/255"])).attack.on_ray
    assert result.exit_code == (0 if on_ray else 2), result.output
    if on_ray:
        assert verify(tmp_path / "out", recompute=True).problems == []
    else:
        assert "output.layout: signs" in result.stderr
