"""Epsilons: from a number or a fraction of 255 to whole grey levels."""

import math
import re
from collections.abc import Sequence

from pipeline.core.errors import ConfigError

# 0.0313725490 is 8/255 to ten decimals, yet 255 * 0.0313725490 = 7.999999995: decimals get this much slack.
LEVEL_SLACK = 1e-6


def epsilon_value(epsilon: str | float, key: str = "epsilons") -> float:
    """An epsilon, or a step that is written like one, as a number: `k/255` or a decimal.

    Args:
        epsilon: as it was written.
        key: what a message calls it.

    Raises:
        ValueError: it is neither, or lies outside [1/255, 1].
    """
    fraction = re.fullmatch(r"\s*(\d+)\s*/\s*255\s*", str(epsilon))
    try:
        value = int(fraction[1]) / 255 if fraction else float(epsilon)
    except (ValueError, OverflowError):
        raise ValueError(f"{key}: {epsilon!r} is neither a number nor of the form k/255") from None
    if math.isnan(value):
        raise ValueError(f"{key}: {epsilon} is not a number")
    if value > 1:
        hint = f"; write {value:g}/255" if value <= 255 and "/" not in str(epsilon) else ""
        raise ValueError(f"{key}: {epsilon} is above 1, and pixels run from 0 to 1{hint}")
    if 255 * value < 1 - LEVEL_SLACK:
        raise ValueError(f"{key}: {epsilon} is below 1/255, the smallest step an 8-bit image can hold")
    return value


def epsilon_level(epsilon: str | float, rounding: str, key: str = "epsilons") -> int:
    """The epsilon on the 8-bit lattice, in grey levels 1..255.

    Rounding `down` keeps the image inside the ball asked for; `nearest` is there to compare with
    float papers.

    Raises:
        ValueError: as `epsilon_value`.
    """
    scaled = 255 * epsilon_value(epsilon, key)
    return math.floor(scaled + LEVEL_SLACK) if rounding == "down" else round(scaled)


def reading_levels(epsilons: Sequence[str | float]) -> list[int]:
    """Epsilons as a reader asks for them, in grey levels and in that order; 0 is clean.

    Raises:
        ConfigError: one cannot be stored, two are the same, or there is none.
    """
    if isinstance(epsilons, str) or not epsilons:
        raise ConfigError(f"epsilons: got {epsilons!r}; name them in a list, such as ['8/255'].")
    requested: dict[int, str | float] = {}
    for epsilon in epsilons:
        try:
            level = 0 if epsilon in (0, "0", "0/255") else epsilon_level(epsilon, "down")
        except ValueError as error:
            raise ConfigError(f"{error}.") from None
        if level in requested:
            raise ConfigError(f"epsilons: {requested[level]} and {epsilon} are both {level}/255; keep one of them.")
        requested[level] = epsilon
    return list(requested)


def stored_just_below(epsilon: str | float) -> bool:
    """Whether an epsilon lies so little under a grey level that the next level was probably meant.

    0.031 is often written for 8/255, yet 255 * 0.031 = 7.905 stores 7.
    """
    missing = -(255 * epsilon_value(epsilon)) % 1
    return LEVEL_SLACK < missing <= 0.1
