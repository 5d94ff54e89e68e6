"""Init: a config that runs, from a look at the images and the model, and from what a person answers."""

import contextlib
import importlib.util
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.check import check_paths
from pipeline.config.kinds import LAYOUTS
from pipeline.config.load import load_config, override, parse_config, section_class
from pipeline.config.reference import meaning
from pipeline.config.schema import OutputConfig, SourceConfig, is_checkpoint
from pipeline.config.section import home
from pipeline.core.errors import ConfigError
from pipeline.core.images import is_image_name
from pipeline.core.loading import say_loading
from pipeline.core.plan import make_plan, stream_plan
from pipeline.core.redaction import printable
from pipeline.core.variants import plain_id

# Images that are opened for their sizes, and class names that are shown.
LOOKED_AT, SHOWN_CLASSES = 16, 8
# Endings of files that `datasets` reads as they are, and of those that are streamed.
TABLES, TARS = (".parquet", ".pq", ".arrow"), (".tar", ".tar.gz", ".tgz")
SECTIONS = ("source", "preprocess", "model", "attack", "output", "runtime")
# What a person can say of a source that cannot be opened without it.
ANSWERABLE = r"(source\.(?:split|image_column|label_column|name|classes)): "
# Keys that hold lists: 2/255, 4/255 is meant as [2/255, 4/255].
LISTS = ("source.split", "source.classes", "model.mean", "model.std", "attack.epsilons")

# Keys that stand in the file as comments, with what they might be.
OFTEN_SET: Mapping[str, Mapping[str, Any]] = {
    "source": {"limit": 1000},
    "model": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "attack": {"label": "prediction"},
    "output": {"title": "My images under FGSM"},
}

# Asks a question with a default, and returns the answer.
Ask = Callable[[str, str | None], str]
Raw = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What a look at a source has found: images of each split (None: not counted), classes, and sizes (width, height)
    and modes of some images."""

    splits: Mapping[str, int | None]
    classes: tuple[str, ...] | None
    sizes: frozenset[tuple[int, int]]
    modes: frozenset[str]

    def __str__(self) -> str:
        counts = (f"{name} {'?' if rows is None else f'{rows:,}'}" for name, rows in self.splits.items())
        said = [f"images in {', '.join(counts)}"]
        if self.classes:
            more = ", ..." if len(self.classes) > SHOWN_CLASSES else ""
            said.append(f"{len(self.classes)} classes: {', '.join(self.classes[:SHOWN_CLASSES])}{more}")
        if self.sizes:
            shapes = [f"{width}x{height}" for width, height in (min(self.sizes), max(self.sizes))]
            said.append(f"{' to '.join(dict.fromkeys(shapes))} {'/'.join(sorted(self.modes))}")
        return printable("; ".join(said))


@dataclass(frozen=True)
class Draft:
    """A config that is being written, and who answers what it leaves open; without `ask` defaults do, if there are."""

    raw: Raw
    ask: Ask | None

    def answer(self, flag: str, question: str, default: str | None = None) -> str:
        if self.ask:
            return self.ask(question, default)
        if default is None:
            raise ConfigError(f"{flag} is needed where nobody can be asked. {question}.")
        return default

    def set(self, key: str, text: str) -> None:
        """Set a key to a value as a person writes it: a list without brackets, a text as it is, null for none."""
        if key in LISTS:
            # A name such as 2024 or yes is a text, too.
            words = (word.strip() for word in text.split(","))
            quoted = ", ".join(json.dumps(word) if key.startswith("source.") else word for word in words)
            text = text if text.startswith("[") else f"[{quoted}]"
        elif text != "null" and not key.startswith("preprocess."):
            text = json.dumps(text)
        override(self.raw, f"{key}={text}")

    def fill(self, key: str, flag: str, question: str, default: str) -> None:
        """Set a key that is not set to the answer to a question; an empty answer leaves it out."""
        section, _, name = key.partition(".")
        if name not in self.raw.get(section, {}) and (answer := self.answer(flag, question, default).strip()):
            self.set(key, answer)


def write_config(
    path: Path | None,
    *,
    data: str | None = None,
    model: str | None = None,
    keys: Mapping[str, str | None] | None = None,
    overrides: Sequence[str] = (),
    ask: Ask | None = None,
) -> tuple[Path, str]:
    """Look at the images, and write a config for them and a model.

    Args:
        path: of the file; None for one called after the images.
        data: where the images are, as `--data`.
        model: which model, as `--model`.
        keys: what is set, by dotted key, as a person writes it; None is not set.
        overrides: as of `load_config`.
        ask: asks a person; None where nobody can answer.

    Returns:
        The file's path, and what was found, for people.

    Raises:
        ConfigError: the file is there, something is not said and has no default, or cannot be used.
    """
    draft = _begin(keys or {}, overrides, ask)
    raw = draft.raw
    where = data or draft.answer(
        "--data", "Where are the images? A folder, a Hub name, a dataset of torchvision, a URL, or digits"
    )
    path = path or Path(f"{plain_id(where)}.yaml")
    if path.exists():
        raise ConfigError(f"{path} is there already, and is not replaced; name another file, or delete it.")
    raw["source"] = {**_source_of(where), **raw.get("source", {})}
    found = _look(draft)
    which = model or draft.answer(
        "--model",
        "Which model? A name of torchvision, timm or the Hub, a folder, path/to/file.py:callable, or digits",
        "digits" if where == "digits" else None,
    )
    raw["model"] = {**_model_of(which, raw.get("model", {})), **raw.get("model", {})}
    _ask_model(draft, found)
    unmatched = _match_classes(raw["model"], found)
    draft.fill("attack.epsilons", "--epsilons", "Epsilons, each as k/255", "2/255, 4/255, 8/255")
    draft.fill("output.path", "--output", "Where does the dataset go", f"out/{plain_id(where)}")
    draft.fill(
        "output.layout", "--layout", f"Layout: {', '.join(LAYOUTS)}", OutputConfig.model_fields["layout"].default
    )
    if path.parent.resolve() != Path.cwd():
        for section in ("source", "model", "attack"):
            section_class(section, raw[section]).anchor(raw[section], Path.cwd())
    _write(path, _render(raw, found))
    return path, f"{found}{unmatched}"


def _begin(keys: Mapping[str, str | None], overrides: Sequence[str], ask: Ask | None) -> Draft:
    """A draft of what is said already."""
    draft = Draft({}, ask)
    for key, text in keys.items():
        if text is not None:
            draft.set(key, text)
    for assignment in overrides:
        override(draft.raw, assignment)
    for section, values in draft.raw.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise ConfigError(
                f"--set {section}: a key of {', '.join(SECTIONS)} can be set here; add others to the file."
            )
    return draft


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        check_paths(load_config(str(path)))
    except ConfigError:
        path.unlink()
        raise


# ------------------------------------------------------------------------------------------------------------- images


def _source_of(data: str) -> Raw:
    """The section of images that are at a place.

    Raises:
        ConfigError: there are none.
    """
    folder = home(data)
    if data == "digits":
        return {"kind": "digits", "split": ["train", "test"]}
    if folder.is_file():
        return {"kind": "huggingface", "path": f"file://{folder.resolve()}", "streaming": True}
    if "://" in data:
        return {"kind": "huggingface", "path": data, "streaming": True}
    if folder.is_dir():
        return _folder_source(folder, data)
    if data.startswith((".", "~", "/")):
        raise ConfigError(f"--data: there is no folder {folder}.")
    if "/" not in data:
        say_loading("torch")
        from torchvision import datasets

        if hasattr(datasets, data):
            return {
                "kind": "torchvision",
                "path": data,
                "split": ["test"],
                "kwargs": {"root": "data", "download": True},
            }
    return {"kind": "huggingface", "path": data}


def _folder_source(folder: Path, data: str) -> Raw:
    from pipeline.sources.imagefolder import split_folders

    files = [path.name.lower() for path in itertools.chain(folder.glob("*.*"), folder.glob("*/*.*"))]
    if any(name.endswith(TARS) for name in files):
        return {"kind": "huggingface", "path": data, "streaming": True}
    if any(name.endswith(TABLES) for name in files):
        return {"kind": "huggingface", "path": data}
    if not any(is_image_name(path.name) for path in itertools.chain(folder.glob("*/*"), folder.glob("*/*/*"))):
        raise ConfigError(f"--data: {folder} holds no folders of images, no Parquet and no tar files.")
    splits = split_folders(folder)
    return {"kind": "imagefolder", "path": data, **({"split": splits} if splits else {})}


def _look(draft: Draft) -> Found:
    """Open the source of a draft, and look at some images. What keeps it from opening is asked for, where it can be."""
    source = draft.raw["source"]
    if source["kind"] == "imagefolder":
        draft.fill("source.split", "--split", "The folder is one split. What is it called", "train")
    while True:
        try:
            return _open(draft)
        except ConfigError as error:
            if draft.ask is None or not (key := re.match(ANSWERABLE, str(error))):
                raise
            draft.set(key[1], draft.ask(str(error).rstrip("."), None))


def _open(draft: Draft) -> Found:
    from pipeline.sources.registry import open_source

    source, need_labels = draft.raw["source"], draft.raw.get("attack", {}).get("label") != "prediction"
    if source["kind"] != "huggingface" or "streaming" in source:
        return _sample(open_source(_parsed(source), need_labels=need_labels))
    # Of what is streamed, headers are read and some images; else `datasets` makes a copy of all.
    try:
        opened = open_source(_parsed({**source, "streaming": True}), need_labels=need_labels)
        if not all(name.lower().endswith(TABLES) for own in opened.files(LOOKED_AT).values() for name, _ in own):
            source["streaming"] = True  # what `datasets` makes of tars has other columns
        return _sample(opened)
    except ConfigError as error:
        if re.match(ANSWERABLE.replace("|classes", ""), str(error)):
            raise
        if not home(source["path"]).is_dir():
            hint = " To download all of it and look again, add --set source.streaming=false."
            raise ConfigError(f"{error}{hint if 'stream' in str(error) else ''}") from None
        return _sample(open_source(_parsed(source), need_labels=need_labels))


def _parsed(source: Raw) -> SourceConfig:
    rest = {"model": {"kind": "digits"}, "attack": {"epsilons": ["1/255"]}, "output": {"path": "out"}}
    return parse_config({"source": source, **rest}).source


def _sample(source: Any) -> Found:
    if files := source.files(LOOKED_AT):
        plan = stream_plan(files, batch_size=1)
    else:
        plan = make_plan(source.splits, shuffle=False, seed=0, limit=None, images_per_shard=4096, batch_size=1)
    sizes, modes = set(), set()
    for row in itertools.islice(source.sample(plan, plan.shards, LOOKED_AT), LOOKED_AT):
        # Whatever a library raises of a broken image: generate counts such rows, and names them.
        with contextlib.suppress(Exception), source.open(row.cell) as image:
            sizes.add(image.size)
            modes.add(image.mode)
    return Found(source.splits, source.classes, frozenset(sizes), frozenset(modes))


# -------------------------------------------------------------------------------------------------------------- model


def _model_of(name: str, said: Mapping[str, Any]) -> Raw:
    """The section of a model, with published weights unless others are said.

    Raises:
        ConfigError: there is no such model.
    """
    if name == "digits":
        return {"kind": "digits"}
    if ":" in name:
        return {"kind": "factory", "name": name}
    if home(name).is_dir():
        return {"kind": "transformers", "name": name, "weights": name}
    say_loading("torch")
    from torchvision import models

    if name in models.list_models(module=models):
        if "weights" in said:
            return {"kind": "torchvision", "name": name}
        return {"kind": "torchvision", "name": name, "weights": models.get_model_weights(name).DEFAULT.name}
    if importlib.util.find_spec("timm"):
        import timm

        plain, _, tag = name.removeprefix("timm/").partition(".")
        if timm.is_model(plain):
            tag = tag or next(iter(timm.list_pretrained(f"{plain}.*")), "").partition(".")[2]
            return {"kind": "timm", "name": plain, **({"weights": tag} if tag else {})}
    if "/" in name:
        return {"kind": "transformers", "name": name, "weights": name}
    raise ConfigError(f"--model: neither torchvision nor timm has a model {name}, and there is no such folder.")


def _ask_model(draft: Draft, found: Found) -> None:
    """What must be said of a model whose weights say nothing of their input."""
    model, preprocess = draft.raw["model"], draft.raw.setdefault("preprocess", {})
    kind, weights = model["kind"], model.get("weights")
    if kind == "factory" and "weights" not in model:
        draft.fill("model.weights", "--weights", "Its checkpoint, .safetensors, .pt or .pth (empty: none)", "")
    elif kind in ("torchvision", "timm") and weights and is_checkpoint(weights) and found.classes:
        model.setdefault("kwargs", {"num_classes": len(found.classes)})
    if kind != "digits" and weights and not is_checkpoint(weights):
        return
    if kind != "digits":
        for key, meant in (("mean", "subtracted from images in [0, 1]"), ("std", "which they are divided by then")):
            draft.fill(
                f"model.{key}",
                f"--set model.{key}",
                f"Its {key}, {meant}: one value, or one a channel (empty: none)",
                "",
            )
    if found.modes <= {"L", "1"} and found.modes and kind in ("factory", "digits"):
        preprocess.setdefault("mode", "L")
    if len(found.sizes) > 1 and not preprocess.keys() & {"resize", "crop"}:
        side = draft.answer("--set preprocess.crop", "Images differ in size. The side that the model takes", "224")
        draft.set("preprocess.resize", side)
        draft.set("preprocess.crop", side)


def _match_classes(model: Raw, found: Found) -> str:
    """Where a model of torchvision has other classes than the images, map those to them that have the same names.

    Returns:
        What is left to say by hand, for people; empty if nothing is.
    """
    weights = model.get("weights")
    if model["kind"] != "torchvision" or not weights or is_checkpoint(weights) or "label_map" in model:
        return ""
    from pipeline.models.torchvision import find_weights

    categories = find_weights(model["name"], weights).meta["categories"]
    if not found.classes or len(found.classes) == len(categories):
        return ""
    named = {name.lower(): name for name in categories}
    same = {name: named.get(name.lower().replace("_", " ")) for name in found.classes}
    if all(same.values()):
        model["label_map"] = same
        return ""
    return f"; the model has {len(categories)} classes of other names: set model.label_map to say which belong together"


# --------------------------------------------------------------------------------------------------------------- text


def _render(raw: Raw, found: Found) -> str:
    """The config's text: each key under what it means."""
    lines = ["# Written by fgsm init. `fgsm config` explains these keys and all others.", "#"]
    lines += textwrap.wrap(f"Found: {found}.", 110, initial_indent="# ", subsequent_indent="# ")
    for name in SECTIONS:
        values = raw.get(name)
        if values:
            lines += ["", *_comment(meaning(name)), f"{name}:"]
            for key, value in {**values, **OFTEN_SET.get(name, {}), **values}.items():
                lines += _comment(meaning(f"{name}.{key}", values.get("kind", "fgsm")), "  ")
                lines.append(f"  {'' if key in values else '# '}{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> Iterator[str]:
    """The first sentence of a text, as a comment."""
    first = re.split(r"(?<=\.) (?=[A-Z`])", text)[0]
    yield from textwrap.wrap(first, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _flow(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]
