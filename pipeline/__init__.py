"""Adversarial image datasets, from Python. docs/python.md has an example of each function.

`generate` makes a dataset, and `plan` says what that would take. `verify`, `inspect` and `report` look at one, `load`
reads it back, and `training_dataset` trains on it. The command `fgsm` does the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.api import generate, plan
    from pipeline.check.verify import verify
    from pipeline.output.summary import inspect
    from pipeline.read.load import load
    from pipeline.read.training import training_dataset
    from pipeline.reporting.page import report

__all__ = ["__version__", "generate", "inspect", "load", "plan", "report", "training_dataset", "verify"]

__version__ = "0.1.0"

# Imported where they are asked for, as most of them need PyTorch, which takes seconds. No module or package beside this
# file may have one of these names: importing it would put the module in the function's place.
_MODULES = {
    "generate": "pipeline.api",
    "inspect": "pipeline.output.summary",
    "load": "pipeline.read.load",
    "plan": "pipeline.api",
    "report": "pipeline.reporting.page",
    "training_dataset": "pipeline.read.training",
    "verify": "pipeline.check.verify",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
