"""A run of several models and several attacks, over the small dataset of the tests."""

from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOM, WriteConfig

# Two that attack, of other architectures, and one that only looks, whose classes have another order.
ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {"epsilons": ["2/255", "8/255"], "models": ["net", "sums"]},
    "noise": {"kind": "noise", "epsilons": ["8/255"]},
    "pgd": {"kind": "pgd", "epsilons": ["8/255"], "models": ["net"], "steps": 3},
}
# All on rays, so that every layout holds them; the last looks for a class of its own, on one model alone.
ON_RAYS: dict[str, dict[str, Any]] = {
    **{name: ATTACKS[name] for name in ("fgsm", "noise")},
    "aimed": {"epsilons": ["8/255"], "models": ["net"], "target": "random"},
}
# One of each kind, for what must hold of all.
EVERY_KIND = {
    **ATTACKS,
    **{kind: {"kind": kind, "epsilons": ["8/255"], "models": ["net"], "steps": 3} for kind in ("bim", "mifgsm")},
}
TURNED = {"kwargs": {"order": [2, 0, 1]}, "label_map": {"cat": 1, "dog": 2, "eel": 0}}


def write_several(
    write_config: WriteConfig, folder: Path, attacks: dict[str, Any] | None = None, **sections: dict[str, Any]
) -> Path:
    """Write a config of three models: `net`, `sums` and `turned`; `sections` as for `write_config`."""
    path = write_config(**sections)
    config = yaml.safe_load(path.read_text())
    (folder / "sums.py").write_text(ROOM)
    sums = {"kind": "factory", "name": f"{folder / 'sums.py'}:make"}
    del config["attack"]
    config["models"] = {"net": config.pop("model"), "sums": sums, "turned": {**sums, **TURNED}}
    config["attacks"] = attacks or ATTACKS
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
