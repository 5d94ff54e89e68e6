"""A dataset with its report."""

from pathlib import Path

import pytest

from pipeline.reporting.page import report
from tests.conftest import (
    generate,
)
from tests.support.page import Page


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits of each split, attacked and reported."""
    folder = tmp_path_factory.mktemp("report") / "digits"
    generate(Path("digits"), "--limit", "120", "--output", str(folder), "--set", "runtime.workers=0")
    report(folder)
    return folder


@pytest.fixture(scope="session")
def page(digits: Path) -> Page:
    """Its page."""
    return Page(digits / "report.html")
