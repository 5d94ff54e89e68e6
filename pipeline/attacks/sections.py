"""The `attack` section of the config, by kind."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.config.schema import AttackConfig
from pipeline.config.section import anchored
from pipeline.core.own_code import names_file


class FGSMConfig(AttackConfig):
    """FGSM, which has no settings of its own."""

    kind: Literal["fgsm"] = "fgsm"
    paper = """@inproceedings{goodfellow2015explaining,
  title={Explaining and Harnessing Adversarial Examples},
  author={Goodfellow, Ian J. and Shlens, Jonathon and Szegedy, Christian},
  booktitle={International Conference on Learning Representations},
  year={2015},
  url={https://arxiv.org/abs/1412.6572}
}"""

    @property
    def how(self) -> str:
        return "by one step along the sign of its gradient"

    @property
    def identity(self) -> dict[str, Any]:
        return {}  # it was the only attack once, and stands in the identity of no run


class OwnAttackConfig(AttackConfig):
    """A class of the user's own, `path/to/file.py:Attack`; `kwargs` are its arguments."""

    kwargs: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        if names_file(values["kind"]):
            values["kind"] = anchored(values["kind"], folder)

    @property
    def own_code(self) -> str | None:
        return self.kind

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.title, "kwargs": self.kwargs}

    @property
    def title(self) -> str:
        return self.kind.rpartition(":")[2]
