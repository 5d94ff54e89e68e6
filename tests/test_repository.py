"""The repository keeps what its README says of it."""

import ast
import re
from pathlib import Path

import pytest

from pipeline.config import load_config, packaged_configs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = re.findall(r"^    pipeline/(\w+)\.py +\S", README, re.MULTILINE)


def test_the_readme_lists_every_module() -> None:
    there = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__", "__main__"}
    assert set(MODULES) == there


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    tree = ast.parse((ROOT / f"pipeline/{module}.py").read_text())
    imported = {
        node.module.removeprefix("pipeline.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipeline.")
    }
    assert imported <= set(MODULES[: MODULES.index(module)])


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "imagenet-resnet50", "imagefolder"])
def test_a_shipped_config_is_valid_and_commented(name: str) -> None:
    config = load_config(name)
    assert config.output.path.startswith("out/")
    text = (packaged_configs() / f"{name}.yaml").read_text()
    assert f"fgsm generate {name}" in text
    assert text.count("#") >= 5


def test_the_readme_s_config_is_valid(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "config.yaml"
    path.write_text("".join(examples))
    config = load_config(str(path))
    assert [evaluator.id for evaluator in config.evaluators] == ["vit", "robust"]
    assert config.attack.levels == (1, 2, 4, 8)
    assert config.model.name == f"{tmp_path}/resnet20.py:make"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_no_figure_is_still_to_come(name: str) -> None:
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|[A-Z]+(?:TABLE|TIME))\b", (ROOT / name).read_text())
