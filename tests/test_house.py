"""The wings of the house: what may import what."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "pipeline"
_BELOW_ATTACKS = ("core", "config", "sources", "models")
_BELOW_OUTPUT = (*_BELOW_ATTACKS, "attacks", "layouts")
_READERS = ("core", "config", "layouts", "output")
# What each wing may import, itself aside. Wings that stand side by side do not import each other.
WINGS = {
    "core": (),
    "config": ("core",),
    "sources": ("core", "config"),
    "models": ("core", "config"),
    "attacks": _BELOW_ATTACKS,
    "layouts": _BELOW_ATTACKS,
    "output": _BELOW_OUTPUT,
    "engine": (*_BELOW_OUTPUT, "output"),
    "executors": (*_BELOW_OUTPUT, "output", "engine"),
    "check": (*_BELOW_OUTPUT, "output", "engine", "executors"),
    "read": _READERS,
    "reporting": _READERS,
    "hub": (*_READERS, "check", "reporting"),
}
# Of a wing, and no kind: how classes meet is the same for every model.
NO_KINDS = {"models.label_space"}
ON_TOP = {"__init__", "__main__", "api", "cli", "flow", "init", "night"}


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, without `pipeline.`; none for `__version__`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            yield from (name.name for name in node.names if name.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipeline."):
            yield node.module.removeprefix("pipeline.")
        elif isinstance(node, ast.Import):
            yield from (n.name.removeprefix("pipeline.") for n in node.names if n.name.startswith("pipeline."))


def test_every_module_stands_in_a_wing() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(WINGS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == ON_TOP


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_from_those_below_it(wing: str) -> None:
    allowed = {wing, *WINGS[wing]}
    found = {
        f"{path.relative_to(PACKAGE)}: {module}"
        for path in (PACKAGE / wing).rglob("*.py")
        for module in imports(path)
        if module.split(".")[0] not in allowed
    }
    assert not found


def test_no_wing_stands_on_itself() -> None:
    assert all(
        list(WINGS).index(below) < list(WINGS).index(wing) for wing, allowed in WINGS.items() for below in allowed
    )


@pytest.mark.parametrize("base", sorted(PACKAGE.glob("*/base.py")), ids=lambda path: path.parent.name)
def test_the_protocol_of_a_wing_imports_no_kind(base: Path) -> None:
    wing = base.parent.name
    assert not [module for module in imports(base) if module.startswith(f"{wing}.") and module not in NO_KINDS]


def test_contributing_lists_the_wings() -> None:
    tree = re.findall(r"^    (?:  )?(\w+)/ +\S", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [name for name in tree if name in WINGS] == list(WINGS)


def test_no_test_file_imports_another() -> None:
    found = [
        (path.name, node.module)
        for path in (REPOSITORY / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and re.match(r"tests\..*\btest_", node.module or "")
    ]
    assert not found
