"""A dataset to attack, and a file that tells whether anything of it was run."""

import pickle
import shutil
from pathlib import Path

import pytest

from tests.support.forgery import Payload


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy" / "out"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is there once a payload has run; that it would be is shown first."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path
