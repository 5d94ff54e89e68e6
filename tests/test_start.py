"""How commands start: what has nothing to compute imports no library that takes seconds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import fgsm, generate

SLOW = {"torch", "torchvision", "datasets", "ray", "matplotlib", "sklearn", "transformers", "timm", "pandas"}
# Runs commands one after the other in one process; says after each its exit code and which of some modules are there.
RUN = """
import json, sys
from pipeline.cli import app
commands, slow = json.loads(sys.argv[1])
for command in commands:
    try:
        app(command, prog_name="fgsm")
    except SystemExit as end:
        print("RAN", end.code, *sorted(sys.modules.keys() & set(slow)))
"""


def test_what_computes_nothing_imports_no_library_that_takes_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process that has imported nothing: Ray, which other tests import, adds packages of its own.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder).parent.name != "ray"])
    out = tmp_path / "out"
    digits = ["generate", "digits", "--limit", "4", "--set", "runtime.workers=0", "--output", str(out)]
    generate(Path("digits"), *digits[2:])
    receipts = json.loads((out / "manifest.json").read_text())["receipts"]
    # A report as far as anybody asks before it is made anew.
    (out / "report.html").write_text(f'<meta name="fgsm-receipts" content="{receipts}">')
    nowhere = ["--set", "source.path=/no/such/folder"]
    expected = {
        ("--help",): 0,
        ("--version",): 0,
        ("generate", "digits", "--set", "attack.epsilom=1/255"): 2,
        ("generate", "imagefolder", *nowhere): 2,
        ("plan", "imagefolder", *nowhere): 2,
        ("plan", "digits", "--set", "model.weights=/no/such.pt"): 2,
        ("generate", "digits", "--part", "3/2", "--output", str(tmp_path / "new")): 2,
        ("generate", "digits", "--executor", "cloud", "--output", str(tmp_path / "new")): 2,
        (*digits, "--set", "attack.epsilons=[1/255]"): 2,
        tuple(digits): 0,
        ("verify", str(tmp_path)): 2,
        ("report", str(tmp_path)): 2,
        ("publish", str(tmp_path), "me/it"): 2,
        ("inspect", str(out)): 0,
    }
    process = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([[*expected], [*SLOW]])], capture_output=True, text=True, check=True
    )
    found = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("RAN")]
    assert dict(zip(expected, found, strict=True)) == {command: [str(code)] for command, code in expected.items()}
    assert "All 2 shards are already there." in process.stderr


def test_the_version_is_said() -> None:
    assert re.fullmatch(r"fgsm-pipeline \d+\.\d+\.\d+\n", fgsm("--version").stdout)
