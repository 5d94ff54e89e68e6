"""The `attack` section of the config, by kind."""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.schema import AttackConfig
from pipeline.config.section import Count, anchored
from pipeline.core.epsilon import epsilon_level
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


class NoiseConfig(AttackConfig):
    """Noise, which asks no model: it has no label to lead away from, needs none in the source, and has no target."""

    kind: Literal["noise"] = "noise"
    asks_model: ClassVar[bool] = False
    # They are what runs without labels have. Left out where a config is written down, as it may not say them.
    label: Literal["prediction"] = Field("prediction", exclude=True)
    target: None = Field(None, exclude=True)
    models: None = Field(None, exclude=True)

    @property
    def title(self) -> str:
        return "noise"

    @property
    def how(self) -> str:
        return "moves each value by the whole epsilon, up or down at random: the control for the others"

    @field_validator("label", "target", "models", mode="before")
    @classmethod
    def _asks_no_model(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError(f"{value!r} has no meaning with kind noise, which asks no model; leave the key out")
        return value


class IterativeConfig(AttackConfig):
    """Attacks of several steps.

    steps: how many; step: how long each is, written like an epsilon and rounded like one. Left out, they follow from
    the epsilon, by a rule for each kind.
    """

    steps: Annotated[Count, Field(le=1000)] | None = None
    step: str | Annotated[float, Field(strict=True)] | None = None

    @abstractmethod
    def _default_steps(self, level: int) -> int:
        """How many steps are taken at an epsilon in grey levels."""

    @abstractmethod
    def _default_step(self, level: int, steps: int) -> int:
        """How long, in grey levels, each of some steps is."""

    @model_validator(mode="after")
    def _check_step(self) -> "IterativeConfig":
        if self.step is not None and epsilon_level(self.step, self.rounding, "step") > self.levels[0]:
            raise ValueError(f"step: {self.step} is larger than the epsilon {self.levels[0]}/255, so it would leave it")
        return self

    @property
    def schedule(self) -> dict[int, tuple[int, int]]:
        """For each stored epsilon in grey levels, how many steps are taken and how long each is, in grey levels."""
        steps = {level: self.steps or self._default_steps(level) for level in self.levels}
        if self.step is not None:
            return {level: (count, epsilon_level(self.step, self.rounding)) for level, count in steps.items()}
        return {level: (count, self._default_step(level, count)) for level, count in steps.items()}

    @property
    def how(self) -> str:
        steps = sorted({count for count, _ in self.schedule.values()})
        sizes = sorted({size for _, size in self.schedule.values()})
        counts, lengths = (f"{some[0]} to {some[-1]}" if some[1:] else str(some[0]) for some in (steps, sizes))
        return f"in {counts} steps of {lengths} grey levels along the sign of a gradient"

    @property
    def arguments(self) -> dict[str, Any]:
        return {"schedule": self.schedule}

    @property
    def identity(self) -> dict[str, Any]:
        counts, sizes = zip(*self.schedule.values(), strict=True)
        return {"kind": self.kind, "steps": counts, "step": [f"{size}/255" for size in sizes]}


class BIMConfig(IterativeConfig):
    """BIM, with the numbers of Kurakin et al. (2017), section 2.2, who count in grey levels too."""

    kind: Literal["bim"] = "bim"
    paper = """@inproceedings{kurakin2017physical,
  title={Adversarial Examples in the Physical World},
  author={Kurakin, Alexey and Goodfellow, Ian J. and Bengio, Samy},
  booktitle={International Conference on Learning Representations, Workshop Track},
  year={2017},
  url={https://arxiv.org/abs/1607.02533}
}"""

    def _default_steps(self, level: int) -> int:
        return min(level + 4, math.ceil(1.25 * level))

    def _default_step(self, level: int, steps: int) -> int:
        del level, steps
        return 1


class PGDConfig(IterativeConfig):
    """PGD, with steps of 2.5 k / T, as Madry et al. (2018), section 5: the far side of the ball is within reach."""

    kind: Literal["pgd"] = "pgd"
    paper = """@inproceedings{madry2018towards,
  title={Towards Deep Learning Models Resistant to Adversarial Attacks},
  author={Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle={International Conference on Learning Representations},
  year={2018},
  url={https://arxiv.org/abs/1706.06083}
}"""

    def _default_steps(self, level: int) -> int:
        del level
        return 10

    def _default_step(self, level: int, steps: int) -> int:
        return max(1, round(2.5 * level / steps))


class MIFGSMConfig(IterativeConfig):
    """MI-FGSM, with the numbers of Dong et al. (2018), sections 3.1 and 4.1; `decay` is their mu."""

    kind: Literal["mifgsm"] = "mifgsm"
    paper = """@inproceedings{dong2018boosting,
  title={Boosting Adversarial Attacks with Momentum},
  author={Dong, Yinpeng and Liao, Fangzhou and Pang, Tianyu and Su, Hang and Zhu, Jun and Hu, Xiaolin and Li, Jianguo},
  booktitle={Conference on Computer Vision and Pattern Recognition},
  year={2018},
  url={https://arxiv.org/abs/1710.06081}
}"""
    # What float32 cannot hold would make of 0 something that is no number.
    decay: Annotated[float, Field(ge=0, le=1e38, strict=True)] = 1.0

    def _default_steps(self, level: int) -> int:
        del level
        return 10

    def _default_step(self, level: int, steps: int) -> int:
        return max(1, round(level / steps))

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "decay": self.decay}

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "decay": self.decay}

    @property
    def title(self) -> str:
        return "MI-FGSM"


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
    def arguments(self) -> dict[str, Any]:
        return self.kwargs

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.title, "kwargs": self.kwargs}

    @property
    def title(self) -> str:
        return self.kind.rpartition(":")[2]
