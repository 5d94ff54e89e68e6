"""Load: from the section of a config to an attack, of the package or of the user's own."""

import hashlib
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from pipeline.attacks.base import Attack
from pipeline.attacks.own import OwnAttackConfig
from pipeline.config.kinds import ATTACKS
from pipeline.config.schema import AttackConfig
from pipeline.core.errors import ConfigError, first_line
from pipeline.core.own_code import import_own, own_files


@dataclass(frozen=True)
class LoadedAttack:
    """An attack, and the sha256 of the user's own code that it is made of; None for one of this package."""

    attack: Attack
    digest: str | None = None


def load_attack(config: AttackConfig) -> LoadedAttack:
    """Load the attack that a section of a config names. One of the user's own is code that runs.

    Raises:
        ConfigError: there is no such code, it cannot be made with its arguments, or is no `Attack`.
    """
    if not isinstance(config, OwnAttackConfig):
        return LoadedAttack(resolve_name(ATTACKS[config.kind].make)(**config.arguments))
    make = import_own(config.kind, "attack.kind")
    if not isinstance(make, type):
        raise ConfigError(
            f"attack.kind: {config.kind} is no class, but {type(make).__name__}; name the attack's class."
        )
    try:
        made = make(**config.arguments)
    except Exception as error:  # the user's own code
        raise ConfigError(
            f"attack.kwargs: {config.kind} cannot be made with them: {type(error).__name__}: {first_line(error)}"
        ) from error
    _check(made, config.kind)
    total = hashlib.sha256()
    for file in own_files(config.kind, make):
        total.update(file.read_bytes())
    return LoadedAttack(made, total.hexdigest())


def _check(made: Any, kind: str) -> None:
    for name in ("on_ray", "needs_draws"):
        if not isinstance(getattr(made, name, None), bool):
            raise ConfigError(f"attack.kind: {kind} does not say {name}; set it to True or False in the class.")
    if not callable(getattr(made, "perturb", None)):
        raise ConfigError(f"attack.kind: {kind} has no method perturb(model, images, classes, levels, draws).")
