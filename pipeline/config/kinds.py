"""Kinds: a line for each kind of source, model and attack.

Names are dotted, and imported when a config names them: a config of one kind loads that kind alone, and checking it
needs no library of a kind.
"""

from collections.abc import Mapping
from functools import cache
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple

from pydantic import create_model

from pipeline.config.schema import AttackConfig, ModelConfig, SourceConfig
from pipeline.config.section import Section


class Kind(NamedTuple):
    """section: its part of the config, in a module that loads quickly. make: what opens or makes it."""

    section: str
    make: str


SOURCES = {
    "huggingface": Kind(
        "pipeline.sources.huggingface:HuggingFaceConfig", "pipeline.sources.huggingface:open_huggingface"
    ),
    "imagefolder": Kind(
        "pipeline.sources.imagefolder:ImageFolderConfig", "pipeline.sources.imagefolder:open_imagefolder"
    ),
    "torchvision": Kind(
        "pipeline.sources.torchvision:TorchvisionConfig", "pipeline.sources.torchvision:open_torchvision"
    ),
    "digits": Kind("pipeline.sources.digits:DigitsConfig", "pipeline.sources.digits:open_digits"),
}
MODELS = {
    "torchvision": Kind("pipeline.models.torchvision:TorchvisionConfig", "pipeline.models.torchvision:load"),
    "timm": Kind("pipeline.models.timm:TimmConfig", "pipeline.models.timm:load"),
    "transformers": Kind("pipeline.models.transformers:TransformersConfig", "pipeline.models.transformers:load"),
    "factory": Kind("pipeline.models.factory:FactoryConfig", "pipeline.models.factory:load"),
    "digits": Kind("pipeline.models.digits:DigitsConfig", "pipeline.models.digits:load"),
}
ATTACKS = {
    "fgsm": Kind("pipeline.attacks.sections:FGSMConfig", "pipeline.attacks.fgsm:FGSM"),
    "noise": Kind("pipeline.attacks.sections:NoiseConfig", "pipeline.attacks.noise:Noise"),
    "bim": Kind("pipeline.attacks.sections:BIMConfig", "pipeline.attacks.iterative:BIM"),
    "pgd": Kind("pipeline.attacks.sections:PGDConfig", "pipeline.attacks.iterative:PGD"),
    "mifgsm": Kind("pipeline.attacks.sections:MIFGSMConfig", "pipeline.attacks.iterative:MIFGSM"),
}
# An attack of the user's own has no line: the config names the file.
OWN_ATTACK, OWN_ATTACK_SECTION = "path/to/file.py:Attack", "pipeline.attacks.sections:OwnAttackConfig"
KINDS = {"source": SOURCES, "model": MODELS, "attack": ATTACKS}
# What all kinds of a section have.
BASES: dict[str, type[Section]] = {"source": SourceConfig, "model": ModelConfig, "attack": AttackConfig}


def section_class(key: str, values: Any) -> type[Section]:
    """The section that a kind has.

    Args:
        key: `source`, `model` or `attack`.
        values: the section, not yet checked. Where they name no kind, the section that is returned refuses them.
    """
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if key == "attack" and kind is None:
        kind = "fgsm"
    if not isinstance(kind, str):
        return _no_kind(key)
    if key == "attack" and ":" in kind:
        return resolve_name(OWN_ATTACK_SECTION)  # type: ignore[no-any-return]
    return resolve_name(KINDS[key][kind].section) if kind in KINDS[key] else _no_kind(key)


@cache
def _no_kind(key: str) -> type[Section]:
    kinds = (*KINDS[key], *([OWN_ATTACK] if key == "attack" else []))
    known: Any = (Literal[kinds], ...)
    return create_model("NoKind", __base__=BASES[key], kind=known)


def without_empty(key: str, values: Any) -> Any:
    """A section without keys of other kinds that hold nothing: `--set model.name=` takes away what a file says."""
    known = section_class(key, values).model_fields
    if not isinstance(values, Mapping) or known.keys() >= values.keys():
        return values
    others = {field for kind in KINDS[key].values() for field in resolve_name(kind.section).model_fields}
    others |= set(resolve_name(OWN_ATTACK_SECTION).model_fields) if key == "attack" else set()
    return {
        name: value
        for name, value in values.items()
        if name in known or name not in others or not (value is None or value is False or value in ([], (), {}))
    }
