"""The dataset card: the YAML at the head of OUTPUT/README.md that makes the subsets.

Each config carries the run id and a digest of the receipts in its description. `datasets` 5.2 builds its
cache key of a local folder from that YAML and neither from path nor content: without them it would
silently return the rows of another folder of the same name, or those from before an overwrite.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.manifest import Manifest, summarise
from pipeline.outputs import SIGNS, OutputFolder, committed, write_atomically


def write_summaries(folder: OutputFolder, manifest: Manifest) -> Manifest:
    """Write the manifest and the card as they follow from the receipts that are there.

    A card that lists the right subsets is left alone, with whatever its owner has added to it.

    Returns:
        The manifest as written.

    Raises:
        PipelineError: the disk refused.
    """
    manifest = summarise(manifest, committed(folder, manifest.run_id, manifest.plan.shards))
    write_atomically(folder.manifest, manifest.model_dump_json(indent=1))
    if not card_agrees(folder, manifest):
        write_atomically(folder.card, render_card(manifest))
    return manifest


def card_agrees(folder: OutputFolder, manifest: Manifest) -> bool:
    """Whether the card on disk lists the subsets of a manifest."""
    return read_configs(folder.card) == make_configs(manifest)


def make_configs(manifest: Manifest) -> list[dict[str, Any]]:
    """The subsets of a dataset as the Hub's YAML lists them.

    Args:
        manifest: of the run, with the digest of the receipts there are.
    """
    splits, stored = list(manifest.split_rows), manifest.stored
    stamp = f"run {manifest.run_id}, receipts {manifest.receipts[:16]}"
    configs = [_config(subset, splits, [subset], f"{_about(subset)}; {stamp}") for subset in stored]
    if len(stored) > 1:
        configs.insert(0, _config("all", splits, stored, f"Clean and every epsilon; {stamp}"))
    return [{**configs[0], "default": True}, *configs[1:]]


def _about(subset: str) -> str:
    if subset.startswith("eps-"):
        return f"FGSM at epsilon {subset.removeprefix('eps-')}/255"
    return {"clean": "Clean images", SIGNS: "Clean images, and the sign that leads to every epsilon"}[subset]


def read_configs(card: Path) -> list[dict[str, Any]] | None:
    """The subsets that a card lists, None where there is no card or none that can be read."""
    try:
        head: Any = next(iter(yaml.safe_load_all(card.read_text(encoding="utf-8"))))
        configs: list[dict[str, Any]] = head["configs"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, StopIteration, TypeError, KeyError):
        return None
    return configs


def render_card(manifest: Manifest) -> str:
    """The card's text."""
    front = yaml.safe_dump({"configs": make_configs(manifest)}, sort_keys=False, width=1000)
    return f"---\n{front}---\n\n{_body(manifest)}"


def _config(name: str, splits: Sequence[str], folders: Sequence[str], description: str) -> dict[str, Any]:
    files = [{"split": split, "path": [f"{folder}/{split}-*.parquet" for folder in folders]} for split in splits]
    return {"config_name": name, "description": description, "data_files": files}


def _body(manifest: Manifest) -> str:
    return (
        "# FGSM adversarial images\n\n"
        "Clean images and their fast-gradient-sign versions, with the victim's predictions on exactly these pixels.\n\n"
        f"{_reading(manifest)}\n"
        "`manifest.json` holds the config and the counts. Made with fgsm-pipeline.\n"
    )


def _reading(manifest: Manifest) -> str:
    """What the rows are, and in layout signs how an image follows from one."""
    if SIGNS not in manifest.stored:
        rows = "\n".join(f"| `{subset}` | {_about(subset)} |" for subset in manifest.stored)
        return f"| subset | |\n|---|---|\n{rows}\n"
    *_, largest = manifest.levels
    recorded = ", ".join(f"{level}/255" for level in manifest.levels[1:])
    return f"""One row per source image: `image` is clean, `sign` holds 0, 127 and 254 for the signs -1, 0 and +1 by
which its values move, and `attacks` lists what the victim says at the epsilons {recorded}. The image at
any epsilon k/255 follows exactly, here for k = {largest}:

```python
x, s = (np.asarray(row[name]).astype(np.int16) for name in ("image", "sign"))
x_k = np.clip(x + {largest} * (s // 127 - 1), 0, 255).astype(np.uint8)
attacked = PIL.Image.fromarray(x_k)
```

`pipeline.load`, of fgsm-pipeline, gives a row per image and epsilon.
"""
