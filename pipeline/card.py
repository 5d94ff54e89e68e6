"""The dataset card: the YAML at the head of OUTPUT/README.md that makes the subsets.

Each config carries the run id and a digest of the receipts in its description. `datasets` 5.2 builds its
cache key of a local folder from that YAML and neither from path nor content: without them it would
silently return the rows of another folder of the same name, or those from before an overwrite.
"""

from collections.abc import Sequence

import yaml

from pipeline.manifest import Manifest
from pipeline.outputs import subset_name


def render_card(manifest: Manifest) -> str:
    """The card's text.

    Args:
        manifest: of the run, with the digest of the receipts there are.
    """
    levels = (0, *manifest.resolved.attack.levels)
    splits = list(manifest.split_rows)
    stamp = f"run {manifest.run_id}, receipts {manifest.receipts[:16] or 'none yet'}"
    everything = _config("all", splits, [subset_name(level) for level in levels], f"Clean and every epsilon; {stamp}")
    subsets = [
        _config(
            subset_name(level),
            splits,
            [subset_name(level)],
            f"{f'FGSM at epsilon {level}/255' if level else 'Clean images'}; {stamp}",
        )
        for level in levels
    ]
    head = {"configs": [{**everything, "default": True}, *subsets]}
    front = yaml.safe_dump(head, sort_keys=False, width=1000)
    return f"---\n{front}---\n\n{_body(levels)}"


def _config(name: str, splits: Sequence[str], folders: Sequence[str], description: str) -> dict[str, object]:
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
