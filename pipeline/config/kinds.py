"""Kinds: a line for each kind of source, model, attack and layout.

Names are dotted, and imported when a config names them: a config of one kind loads that kind alone, and checking it
needs no library of a kind.
"""

from typing import NamedTuple


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
    "fgsm": Kind("pipeline.attacks.fgsm:FGSMConfig", "pipeline.attacks.fgsm:FGSM"),
    "noise": Kind("pipeline.attacks.noise:NoiseConfig", "pipeline.attacks.noise:Noise"),
    "bim": Kind("pipeline.attacks.iterative:BIMConfig", "pipeline.attacks.iterative:BIM"),
    "pgd": Kind("pipeline.attacks.iterative:PGDConfig", "pipeline.attacks.iterative:PGD"),
    "mifgsm": Kind("pipeline.attacks.iterative:MIFGSMConfig", "pipeline.attacks.iterative:MIFGSM"),
}
# An attack of the user's own has no line: the config names the file.
OWN_ATTACK, OWN_ATTACK_SECTION = "path/to/file.py:Attack", "pipeline.attacks.own:OwnAttackConfig"
KINDS = {"source": SOURCES, "model": MODELS, "attack": ATTACKS}
LAYOUTS = {
    "images": "pipeline.layouts.images:Images",
    "signs": "pipeline.layouts.signs:Signs",
    "wide": "pipeline.layouts.wide:Wide",
}
# What `output.sign_format: bits` makes of the layouts that store sign maps.
BITS = {"signs-bits": "pipeline.layouts.signs:SignBits"}
