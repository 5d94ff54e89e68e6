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
from pipeline.outputs import OutputFolder, committed, subset_name, write_atomically


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
    levels = manifest.levels
    splits = list(manifest.split_rows)
    stamp = f"run {manifest.run_id}, receipts {manifest.receipts[:16]}"
    every = [subset_name(level) for level in levels]
    configs = [{**_config("all", splits, every, f"Clean and every epsilon; {stamp}"), "default": True}]
    for level in levels:
        what = f"FGSM at epsilon {level}/255" if level else "Clean images"
        configs.append(_config(subset_name(level), splits, [subset_name(level)], f"{what}; {stamp}"))
    return configs


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
    return f"---\n{front}---\n\n{_body(manifest.levels)}"


def _config(name: str, splits: Sequence[str], folders: Sequence[str], description: str) -> dict[str, Any]:
    files = [{"split": split, "path": [f"{folder}/{split}-*.parquet" for folder in folders]} for split in splits]
    return {"config_name": name, "description": description, "data_files": files}


def _body(levels: Sequence[int]) -> str:
    rows = "\n".join(f"| `{subset_name(level)}` | {f'{level}/255' if level else '0 (clean)'} |" for level in levels)
    return (
        "# FGSM adversarial images\n\n"
        "Clean images and their fast-gradient-sign versions, with the victim's predictions on exactly these pixels.\n\n"
        f"| subset | epsilon |\n|---|---|\n{rows}\n\n"
        "`manifest.json` holds the config and the counts. Made with fgsm-pipeline.\n"
    )
