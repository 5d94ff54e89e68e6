"""FGSM datasets. `load` reads one back; the command `fgsm` makes one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.dataset import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load`, where it is asked for: it imports torch and `datasets`, which take seconds."""
    if name == "load":
        from pipeline.dataset import load

        return load
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
