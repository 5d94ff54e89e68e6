"""One attack on one model, as the engine takes attacks on models."""

import torch
from torch import Tensor

from pipeline.attacks.base import Attack, Goal
from pipeline.attacks.fgsm import FGSM
from pipeline.engine.compute import Attacked, Attacker, ModelAttack, attack_images
from pipeline.layouts.registry import LAYOUTS
from pipeline.models.base import Model

LEVELS = (1, 8)


def on_model(
    attack: Attack | None = None,
    model: str = "net",
    levels: tuple[int, ...] = LEVELS,
    goal: Goal | None = None,
    *,
    asks_model: bool = True,
) -> ModelAttack:
    """An attack on a model: FGSM that raises the loss of the label, unless said otherwise."""
    return ModelAttack(attack or FGSM(), "attack", model, asks_model, levels, goal or Goal())


def attacker_of(model: Model, levels: tuple[int, ...] = LEVELS, goal: Goal | None = None) -> Attacker:
    """FGSM on one model, of which all images are stored."""
    return Attacker({"net": model}, (on_model(levels=levels, goal=goal),), LAYOUTS["images"].stored)


def attack_one(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    levels: tuple[int, ...] = LEVELS,
    goal: Goal | None = None,
    valid: Tensor | None = None,
    draws: Tensor | None = None,
) -> Attacked:
    """FGSM on one model, with every row valid, labelled 0 and drawn 0, unless said otherwise."""
    zeros = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return attack_images(
        {"net": model},
        [on_model(levels=levels, goal=goal)],
        images,
        (zeros if labels is None else labels).unsqueeze(1),
        zeros == 0 if valid is None else valid,
        zeros if draws is None else draws,
    )
