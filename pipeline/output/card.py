"""The dataset card, OUTPUT/README.md: YAML that makes the subsets, and what a reader of the dataset must know.

Each config carries the run id and a digest of the receipts in its description. `datasets` 5.2 builds its
cache key of a local folder from that YAML and neither from path nor content: without them it would
silently return the rows of another folder of the same name, or those from before an overwrite.

The text is `card.md.j2`. Names in it come from elsewhere (classes, models, files, columns), so whatever the template
puts in is escaped for Markdown unless it says otherwise.
"""

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from pipeline.config.schema import AttackConfig
from pipeline.core.addresses import is_address
from pipeline.core.errors import PipelineError
from pipeline.core.variants import by_attack
from pipeline.layouts.base import ATTACKS, COLUMNS
from pipeline.output.folder import OutputFolder, Receipt, committed
from pipeline.output.manifest import Manifest, summarise, without_folders
from pipeline.output.transfer import by_epsilon
from pipeline.sources.origins import front_matter

TEMPLATE = Path(__file__).with_name("card.md.j2")
# What the card's examples load until the dataset is published. (`datasets` cannot load ".", which has no name.)
HERE = "path/to/this/folder"
# The Hub's categories of so many rows: the first of up to 3 digits, each further one of one digit more.
SIZES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B"),
    *("100B<n<1T", "n>1T"),
)
TAGS = ("adversarial", "adversarial-examples", "robustness")
# Licences of datasets that the Hub knows by these names. Any other is `other` there, and stands in the text.
HUB_LICENSES = (
    *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "pddl"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "odbl", "odc-by"),
    *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "unlicense", "unknown", "other"),
)
MEANINGS = {
    **{column.name: column.meaning for column in COLUMNS},
    **{column.clean_name: column.clean_meaning for column in COLUMNS if column.clean_name and column.clean_meaning},
    ATTACKS: "for each attack, model and epsilon: what made the image, and the model's prediction",
}


def write_summaries(
    folder: OutputFolder, manifest: Manifest, receipts: Mapping[str, Receipt] | None = None
) -> Manifest:
    """Write the manifest and the card as they follow from the receipts that are there; returns the manifest as written.

    A card that lists the right subsets is left alone, with whatever its owner has added to it. A README.md that is no
    card of a run is the user's, and never replaced. `receipts` are read where they have not just been.

    Raises:
        PipelineError: the disk refused, or README.md is the user's.
    """
    _refuse_foreign_card(folder)
    if receipts is None:
        receipts = committed(folder, manifest.edition, manifest.plan.shards)
    manifest = summarise(manifest, receipts).sealed()
    folder.store.write(folder.manifest, manifest.model_dump_json(indent=1).encode())
    if not card_agrees(folder, manifest):
        location = HERE if folder.store.local else folder.root
        folder.store.write(folder.card, render_card(manifest, location).encode())
    return manifest


def _refuse_foreign_card(folder: OutputFolder) -> None:
    with contextlib.suppress(FileNotFoundError):
        content = folder.store.read(folder.card)
        if content.strip() and not re.search(r"run [0-9a-f]{16}, receipts ", str(front_matter(content))):
            raise PipelineError(
                f"{folder.store.at(folder.card)} is not a card that a run wrote, and is not replaced; move or delete "
                "it, then run the same command again."
            )


def card_agrees(folder: OutputFolder, manifest: Manifest) -> bool:
    """Whether the card that is there lists the subsets of a manifest."""
    return read_configs(folder) == make_configs(manifest)


# -------------------------------------------------------------------------------------------------- YAML


class _OneLine(yaml.SafeDumper):
    """One line a value: nothing that comes from elsewhere begins a line, where `---` would end the YAML."""


_OneLine.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"'),
)


def make_configs(manifest: Manifest) -> list[dict[str, Any]]:
    """The subsets of a dataset as the Hub's YAML lists them, with the digest of its receipts."""
    layout, stored, variants = manifest.layout, manifest.stored, manifest.variants
    stamp = f"run {manifest.run_id}, receipts {manifest.receipts[:16]}"
    configs = [_config(subset, manifest, [subset], f"{layout.summary(subset, variants)}; {stamp}") for subset in stored]
    for level in manifest.levels[1:]:
        subsets = list(dict.fromkeys(layout.subset(variant) for variant in variants if variant.level == level))
        if f"eps-{level}" not in stored and len(stored) > 1:
            configs.append(_config(f"eps-{level}", manifest, subsets, f"All images at epsilon {level}/255; {stamp}"))
    if len(stored) > 1:
        configs.insert(0, _config("all", manifest, stored, f"Clean and every epsilon; {stamp}"))
    return [{**configs[0], "default": True}, *configs[1:]]


def _config(name: str, manifest: Manifest, folders: Sequence[str], description: str) -> dict[str, Any]:
    files = [
        {"split": split, "path": [f"{folder}/{split}-*-{manifest.edition}.parquet" for folder in folders]}
        for split in manifest.split_rows
    ]
    return {"config_name": name, "description": description, "data_files": files}


def read_configs(folder: OutputFolder) -> list[dict[str, Any]] | None:
    """The subsets that the card lists, None where there is no card or none that can be read."""
    try:
        front = front_matter(folder.store.read(folder.card))
    except OSError:
        return None
    return front.get("configs") if front else None


def _front(manifest: Manifest) -> dict[str, Any]:
    """The card's YAML. No counts: `datasets` refuses to load where one is wrong."""
    origin, configs, attacks = manifest.origin, make_configs(manifest), manifest.resolved.all_attacks.values()
    stated = (origin.license or "").strip().lower()
    front = {
        "pretty_name": _title(manifest),
        "license": stated if stated in HUB_LICENSES else stated and "other",
        "source_datasets": [origin.repository] if origin.repository else None,
        "task_categories": ["image-classification"],
        # Rows of the default config, which holds all subsets.
        "size_categories": [size_category(manifest.rows * len(manifest.stored))],
        # Of the attacks, those that have a name in the literature.
        "tags": [*TAGS, *dict.fromkeys(attack.kind for attack in attacks if attack.paper)],
        # Of the default config; all have the same features, and of a thousand classes one list is long enough.
        "dataset_info": _dataset_info(configs[0]["config_name"], manifest),
        "configs": configs,
    }
    return {key: value for key, value in front.items() if value}


def _dataset_info(config: str, manifest: Manifest) -> dict[str, Any]:
    """The features of a config as the Hub's YAML has them."""
    # Not for those who only see whether the card agrees: it takes a second.
    import datasets
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    described = DatasetCardData()
    info = datasets.DatasetInfo(features=datasets.Features.from_dict(manifest.features), config_name=config)
    DatasetInfosDict({config: info}).to_dataset_card_data(described)
    found: dict[str, Any] = described.to_dict()["dataset_info"]  # type: ignore[no-untyped-call]
    return found


def _title(manifest: Manifest) -> str:
    if title := manifest.resolved.output.title:
        return title
    name = " ".join((manifest.origin.name or "").split())
    attacks = [attack.title for attack in manifest.resolved.all_attacks.values()]
    return f"{name or 'Images'} under {_enumerate(list(dict.fromkeys(attacks)))}"


def size_category(rows: int) -> str:
    """The Hub's category for a dataset of so many rows."""
    return SIZES[min(max(len(str(rows)) - 3, 0), len(SIZES) - 1)]


# -------------------------------------------------------------------------------------------------- text


def plain(text: str) -> Markup:
    """A text from elsewhere as Markdown that says just that: on one line, in a table too.

    What could be markup becomes a character reference, which Markdown never takes for any; control characters
    become their escapes.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    # An underscore inside a word is one to Markdown too.
    return Markup(re.sub(r"(?<=[^\W_])_(?=[^\W_])|[^\W_]|[ .,:;/+='%()-]|(.)", _reference, shown))


def _reference(found: re.Match[str]) -> str:
    mark, before, after = found[0], found.string[: found.start()], found.string[found.end() :]
    # At the start of a line these make a list, a rule or a heading of what is above.
    leads = (mark in "-+=" and not before.strip()) or (mark in ".)" and before.isdecimal() and after[:1] in ("", " "))
    return f"&#{ord(mark)};" if found[1] or leads else mark


def code(name: str) -> Markup:
    """A name from elsewhere, in code type."""
    if re.fullmatch(r"[\w./:@+=,#%()-]+( [\w./:@+=,#%()-]+)*", name):
        return Markup(f"`{name}`")
    return Markup(f"<code>{plain(name)}</code>")


def _finalize(value: Any) -> Any:
    """What every value of the template goes through."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else Markup("-")


def _enumerate(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _floats(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _model(model: Mapping[str, Any]) -> Markup:
    """A model in words, without the folders of the machine that ran it."""
    shown = without_folders(model)
    name, weights = shown.get("name"), shown["weights"]
    if weights == model["kind"]:
        trained = "its own weights"
    elif weights:
        trained = f"weights {code(weights)}"
    else:
        trained = "as its callable makes it" if model["kind"] == "factory" else "untrained"
    return Markup(f"{model['kind']} {code(name)}, {trained}" if name else f"{model['kind']}, {trained}")


@functools.cache
def _template() -> jinja2.Template:
    # No autoescape: that is for HTML. `finalize` does for Markdown what it does there.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "enumerate": _enumerate,
        "floats": _floats,
        "model": _model,
        "percent": lambda share: Markup("-") if share is None else f"{share:.1%}",
        "share": _share,
        "thousands": "{:,}".format,
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render_card(manifest: Manifest, location: str = HERE) -> str:
    """The card's text; `location` is what its examples load: a folder, an address in an object store, or a Hub id."""
    front = yaml.dump(_front(manifest), Dumper=_OneLine, sort_keys=False, allow_unicode=True, width=float("inf"))
    return f"---\n{front}---\n\n{_template().render(_values(manifest, location))}"


def moved_card(text: str, manifest: Manifest, location: str) -> str:
    """A card with its examples loading from another location; whatever its owner has added to it stays.

    Args:
        text: of the card.
        manifest: of the run that it describes.
        location: a Hub id.
    """
    after = render_card(manifest, location)
    return _with_lines(text, {render_card(manifest, former): after for former in _locations(text)})


def renew_titles(folder: OutputFolder, former: Manifest, manifest: Manifest) -> bool:
    """Put other titles into the card of a run; whatever its owner has added stays.

    Args:
        folder: of the dataset.
        former: the manifest that the card was written for. A card of anything else is left to `write_summaries`.
        manifest: the same with other titles.

    Returns:
        False where the card has neither the former title of the dataset nor the new one.
    """
    if not card_agrees(folder, former):
        return True
    text = folder.store.read(folder.card).decode()
    cards = {render_card(former, one): render_card(manifest, one) for one in (HERE, *_locations(text))}
    renewed = _with_lines(text, cards)
    folder.store.write(folder.card, renewed.encode())
    heading = next(line for line in render_card(manifest).split("\n") if line.startswith("# "))
    return heading in renewed.splitlines()


def _locations(text: str) -> list[str]:
    """What the examples of a card load; its owner may have added one that loads something else."""
    return list(dict.fromkeys(re.findall(r'(?:datasets\.load_dataset|pipeline\.load)\("([^"\n]+)"', text)))


def _with_lines(text: str, cards: Mapping[str, str]) -> str:
    """A card with each line of a rendered one as another has it, which says the same line by line.

    A line is replaced as often as it was rendered, from above: further ones are its owner's.
    """
    lines, left = dict[str, str](), Counter[str]()
    for before, after in cards.items():
        lines |= zip(before.split("\n"), after.split("\n"), strict=True)
        left |= Counter(before.split("\n"))
    written = []
    for whole in text.split("\n"):
        line = whole.removesuffix("\r")  # an editor of Windows may have added these
        left[line] -= 1
        written.append(lines[line] + whole[len(line) :] if left[line] >= 0 else whole)
    return "\n".join(written)


def _values(manifest: Manifest, location: str) -> dict[str, Any]:
    config, levels, subsets = manifest.resolved, manifest.levels, manifest.subsets
    features, listed = manifest.features, manifest.features.get(ATTACKS)
    attacks, models = config.all_attacks, config.all_models
    return {
        **dict(manifest),
        **dict(config),
        **{name: getattr(manifest, name) for name in ("planned", "variants", "stored", "edition", "layout", "titles")},
        "title": _title(manifest),
        "epsilons": [f"{level}/255" for level in levels[1:]],
        "requested": _requested(attacks.values()),
        "readable": _readable(manifest),
        "groups": ["attack", "model", "epsilon"] if len(by_attack(manifest.variants)) > 1 else ["epsilon"],
        "gathered": _gathered(manifest),
        "location": location,
        "here": location == HERE,
        "address": is_address(location),
        "files": location if location == HERE or is_address(location) else f"hf://datasets/{location}",
        # The last split is the one to measure with, as a rule.
        "split": list(manifest.split_rows)[-1],
        "labelled": all(row.labelled == row.rows for row in subsets),
        "models": {name: model.model_dump(mode="json") for name, model in models.items()},
        # A title as it is, an id in code type.
        "called": {name: plain(model.title) if model.title else code(name) for name, model in models.items()},
        "attacked": [name for name in models if any(variant.model == name for variant in manifest.variants)],
        "of_none": any(variant.model is None for variant in manifest.variants[1:]),
        "attacks": attacks,
        "names": [attack.title for attack in attacks.values()],
        "on_ray": [name for name in attacks if manifest.on_ray(name)],
        "off_ray": [name for name in attacks if not manifest.on_ray(name)],
        "of_own": any(attack.own_code for attack in attacks.values()),
        "of_label": any(a.asks_model and a.label == "dataset" and a.target is None for a in attacks.values()),
        "of_no_label": any(a.asks_model and (a.label, a.target) != ("dataset", None) for a in attacks.values()),
        "targeted": any(attack.target is not None for attack in attacks.values()),
        "matrix": by_epsilon(manifest.transfer) if len(models) > 1 else [],
        "unmoved": manifest.unmoved() if subsets else [],
        "papers": list(dict.fromkeys(attack.paper for attack in attacks.values() if attack.paper)),
        "classes": manifest.dataset_classes,
        "columns": list(_describe(manifest, features)),
        "fields": list(_describe(manifest, listed["feature"])) if listed else [],
    }


def _gathered(manifest: Manifest) -> str | None:
    """The last config of the card that holds all subsets at one epsilon; None where there is none."""
    names = [config["config_name"] for config in make_configs(manifest)]
    return next((name for name in reversed(names) if name.startswith("eps-") and name not in manifest.stored), None)


def _readable(manifest: Manifest) -> int | None:
    """A level at which `pipeline.load` gives images of every attack, if possible one that is not recorded."""
    bound = [set(attack.levels) for name, attack in manifest.resolved.all_attacks.items() if not manifest.on_ray(name)]
    recorded = manifest.levels
    free = [level for level in (3, 5, 7, *range(1, 256)) if level not in recorded] or [255]
    return max(set.intersection(*bound), default=None) if bound else free[0]


def _requested(attacks: Iterable[AttackConfig]) -> list[str]:
    """Each epsilon of any attack, and as what it was asked for, by rising level."""
    asked = {(level, str(epsilon)) for attack in attacks for level, epsilon in attack.requested.items()}
    said = []
    for level, epsilon in sorted(asked):
        exact = re.sub(r"\s", "", epsilon) == f"{level}/255"
        said.append(f"{level} ({level}/255 = {level / 255:.4f}{'' if exact else f', asked for as {epsilon}'})")
    return said


def _describe(manifest: Manifest, features: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Name, type and meaning of columns, as a manifest records them."""
    layout, config = manifest.layout, manifest.resolved
    pictures = {picture.column: layout.describe(picture) for picture in layout.pictures(manifest.variants)}
    meanings = {**MEANINGS, **pictures}
    targeted = [attack.target is not None for attack in config.all_attacks.values()]
    if any(targeted):
        otherwise = "" if all(targeted) else "; for an attack without one, whether it is wrong and was right when clean"
        meanings["fooled"] = f"whether the prediction is the target{otherwise}; null on clean images"
    if manifest.streamed:
        meanings["source_index"] = "row in that file"
    for model in config.all_models:
        for column in ("prediction", "correct", "clean_prediction", "clean_correct"):
            meanings[f"{column}_{model}"] = f"as {column}, of model {model}"
    for name, feature in features.items():
        meaning = meanings.get(name, "from the source, unchanged")
        yield {"name": name, "type": _type_name(feature), "meaning": meaning}


def _type_name(feature: Any) -> str:
    if not isinstance(feature, Mapping) or "_type" not in feature:
        return "struct"
    if feature["_type"] == "List":
        return f"list of {_type_name(feature['feature'])}"
    return str(feature["dtype"] if feature["_type"] == "Value" else feature["_type"])
