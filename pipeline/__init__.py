"""FGSM datasets. `load` reads one back, `training_dataset` trains on one; the command `fgsm` makes one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.read.load import load
    from pipeline.read.training import training_dataset

__all__ = ["__version__", "load", "training_dataset"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The readers, where they are asked for: they import torch, which takes seconds."""
    if name == "load":
        from pipeline.read.load import load

        return load
    if name == "training_dataset":
        from pipeline.read.training import training_dataset

        return training_dataset
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
