"""Init: a config that runs, from a look at the images and the model, and from what a person answers."""

import copy
import importlib.util
import itertools
import json
import logging
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.check import check_paths
from pipeline.config.kinds import LAYOUTS
from pipeline.config.load import as_config, override, parse_config, section_class
from pipeline.config.reference import meaning
from pipeline.config.schema import OutputConfig, SourceConfig, is_checkpoint
from pipeline.config.section import home, is_there
from pipeline.core.addresses import is_address
from pipeline.core.errors import ConfigError, PipelineError, TemporaryError, first_line, is_offline, shortened
from pipeline.core.images import is_image_name
from pipeline.core.loading import say_loading
from pipeline.core.own_code import forget_files
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
# Keys that hold mappings: cat: 281, dog: 207 is meant as {cat: 281, dog: 207}.
MAPPINGS = ("model.kwargs", "model.label_map")
# An answer that leaves a key out, the side of an image that is assumed, and the name of a folder that is one split.
NONE, SIDE, SPLIT = "none", "224", "train"

# Options and keys as messages name them, which begin with the one that is wrong.
NAMED = re.compile(r"--\w+|\b(?:source|preprocess|model|attack|output)(?:\.\w+|(?=: ))")
MODEL, SIZE = ("--model", "model.weights", "model.kwargs"), ("preprocess.crop", "preprocess.resize")
# The questions whose answers become keys that messages name.
ASKED_BY = {
    "source": "--data",
    "source.path": "--data",
    "model.kind": "--model",
    "model.name": "--model",
    "preprocess.resize": "preprocess.crop",
}
# What is asked again, by what a message names: while the images are looked at, and after that.
DATA_AGAIN: Mapping[str, Sequence[str]] = {
    **{key: ["--data"] for key in ("--data", "source", "source.path")},
    # These questions come up while the images are looked at.
    **{key: ["--data", key] for key in ("source.split", "source.classes")},
}
AGAIN: Mapping[str, Sequence[str]] = {
    "--model": ["--model"],
    "model.kind": ["--model"],
    "model.name": MODEL,
    "model.weights": MODEL,
    "model.kwargs": MODEL,
    "model.label_map": [*MODEL, "model.label_map"],
    # It does not take the images, or does not do what a classifier does.
    "model": [*MODEL, *SIZE, "preprocess.mode"],
    "preprocess.resize": SIZE,
    "preprocess.crop": SIZE,
    **{key: [key] for key in ("preprocess.mode", "model.mean", "model.std")},
    **{key: [key] for key in ("attack.epsilons", "output.path", "output.layout")},
}

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a look at a source has found.

    splits: images of each split (None: not counted). sizes and modes: (width, height) and mode of some images. opened:
    the section that the source was opened with, which streams what a run would download.
    """

    splits: Mapping[str, int | None]
    classes: tuple[str, ...] | None
    sizes: frozenset[tuple[int, int]]
    modes: frozenset[str]
    opened: Raw

    @property
    def gray(self) -> bool:
        """Whether all images that were looked at are grayscale."""
        return bool(self.modes) and self.modes <= {"L", "1"}

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
    """What is said of a config, and who answers what that leaves open; without `ask` defaults do, if there are.

    said: sections with what options say and what a look at the images has shown. answers: texts, by the key or the
    option that stands for the question. former: those that may be wrong, which are the defaults the next time; "" for
    one that is.
    """

    said: Raw
    ask: Ask | None
    answers: dict[str, str]
    former: dict[str, str] = field(default_factory=dict)

    def answer(self, key: str, question: str, default: str | None = None) -> str:
        """The answer to a question. It is asked once, and again after `ask_again`.

        Raises:
            ConfigError: nobody can be asked, and there is no default.
        """
        if key not in self.answers:
            if self.ask:
                self.answers[key] = self.ask(question, self.former.get(key) or default).strip()
            elif default is None:
                raise ConfigError(f"{key} is needed where nobody can be asked. {question}.")
            else:
                self.answers[key] = default
        return self.answers[key]

    def fill(self, raw: Raw, key: str, question: str, default: str, *, only_again: bool = False) -> None:
        """Set a key that is not set to the answer to a question, unless that is none.

        Args:
            raw: the config.
            key: that is set.
            question: for people.
            default: the answer where nobody gives one.
            only_again: whether the question comes up only after `ask_again`.
        """
        section, _, name = key.partition(".")
        if name in raw.get(section, {}) or (only_again and key not in self.former):
            return
        text = self.answer(key, question, default)
        if text not in ("", NONE):
            _set_key(raw, key, text)

    def ask_again(self, error: PipelineError, questions: Mapping[str, Sequence[str]]) -> None:
        """Say what is wrong, and forget what was said of it, so that it is asked again.

        Args:
            error: what is wrong.
            questions: the keys whose questions are asked again, by the key that the error names.

        Raises:
            PipelineError: that error, where nobody can be asked or no question would help.
        """
        named = next((key for key in NAMED.findall(str(error)) if key in questions), None)
        if self.ask is None or named is None:
            raise error
        logger.warning("%s", error)
        for key in questions[named]:
            section, _, name = key.partition(".")
            said = self.said.get(section, {}).pop(name, None)
            former = self.answers.pop(key, "" if said is None else _flow(said))
            # What is known to be wrong is no default; the others are asked again because one of them may be. Where the
            # network failed the answer may be right.
            wrong = key == ASKED_BY.get(named, named) and not isinstance(error, TemporaryError)
            self.former[key] = "" if wrong else former
        if "preprocess.mode" in self.former and (advised := re.search(r"set preprocess\.mode: (\w+)", str(error))):
            self.former["preprocess.mode"] = advised[1]


def _set_key(raw: Raw, key: str, text: str) -> None:
    """Set a key to a value as a person writes it.

    A list or a mapping needs no brackets, a text no quotes; null is none. A bare whole number among epsilons is so many
    255ths.

    Raises:
        ConfigError: it is no value.
    """
    written = text
    if key == "attack.epsilons":
        words = (word.strip() for word in text.strip("[] ").split(","))
        text = f"[{', '.join(f'{word}/255' if word.isdecimal() else word for word in words)}]"
    elif key in LISTS:
        # A name such as 2024 or yes is a text, too.
        words = (word.strip() for word in text.split(","))
        quoted = ", ".join(json.dumps(word) if key.startswith("source.") else word for word in words)
        text = text if text.startswith("[") else f"[{quoted}]"
    elif key in MAPPINGS and text != "identity":
        text = text if text.startswith("{") else f"{{{re.sub(r' *[=:] *', ': ', text)}}}"
    elif text != "null" and not key.startswith("preprocess."):
        text = json.dumps(text)
    try:
        override(raw, f"{key}={text}")
    except ConfigError:  # it names an option, and what the text was made into
        raise ConfigError(f"{key}: {shortened(repr(written))} is not a YAML value.") from None


def write_config(
    path: Path | None,
    *,
    data: str | None = None,
    model: str | None = None,
    keys: Mapping[str, str | None] | None = None,
    overrides: Sequence[str] = (),
    ask: Ask | None = None,
) -> tuple[Path, list[str]]:
    """Look at the images and the model, and write a config for them that a run accepts.

    The run is opened as `plan` and `generate` open it. Where a person can be asked, a sentence says what cannot be
    used, and it is asked again.

    Args:
        path: of the file; None for one called after the images.
        data: where the images are, as `--data`.
        model: which model, as `--model`.
        keys: what is set, by dotted key, as a person writes it; None is not set.
        overrides: as of `load_config`.
        ask: asks a person; None where nobody can answer.

    Returns:
        The file's path, and lines for people: what was assumed, and that the model could not be tried where it could
        not be downloaded. What was found is logged before anything else is asked.

    Raises:
        ConfigError: the file is there, something is not said and has no default, or cannot be used.
        PipelineError: as `open_run`.
    """
    draft = _begin({"--data": data, "--model": model}, keys or {}, overrides, ask)
    path, where, found = _look_at_images(draft, path)
    logger.info("Found %s.", found)
    while True:
        assumed: list[str] = []
        try:
            raw = _fill(draft, where, found)
            assumed = _assumed(draft, raw)
            untried = _try_run(raw, found)
            break
        except ConfigError as error:
            for line in assumed if ask is None else ():
                logger.info("%s", line)
            draft.ask_again(error, AGAIN)
            forget_files()
    if path.parent.resolve() != Path.cwd():
        for section in ("source", "model", "attack"):
            section_class(section, raw[section]).anchor(raw[section], Path.cwd())
    lines = [*assumed, *untried]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_render(raw, [f"Found {found}.", *lines]))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
    return path, lines


def _begin(
    options: Mapping[str, str | None], keys: Mapping[str, str | None], overrides: Sequence[str], ask: Ask | None
) -> Draft:
    """A draft of what is said already."""
    draft = Draft({}, ask, {option: text for option, text in options.items() if text is not None})
    for key, text in keys.items():
        if text is not None:
            _set_key(draft.said, key, text)
    for assignment in overrides:
        override(draft.said, assignment)
    for section, values in draft.said.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise ConfigError(
                f"--set {section}: a key of {', '.join(SECTIONS)} can be set here; add others to the file."
            )
    return draft


def _fill(draft: Draft, where: str, found: Found) -> Raw:
    """The config, with answers to what is still open."""
    raw = copy.deepcopy(draft.said)
    _fill_model(draft, raw, where, found)
    raw["attack"] = {"kind": "fgsm", **raw.get("attack", {})}
    draft.fill(raw, "attack.epsilons", "Epsilons, in 255ths or as fractions such as 2/255", "2, 4, 8")
    draft.fill(raw, "output.path", "The folder that the dataset is written to", _free_output(where))
    rows = _first_sentence(meaning("output.layout")).replace("`", "").rstrip(".")
    default = OutputConfig.model_fields["layout"].default
    draft.fill(raw, "output.layout", f"Layout: {', '.join(LAYOUTS)}. {rows}", default)
    return raw


def _free_output(where: str) -> str:
    """A folder for the dataset that is not there yet: another run may have one that is."""
    first = f"out/{plain_id(where)}"
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not is_there(Path(name)))


def _assumed(draft: Draft, raw: Raw) -> list[str]:
    """Lines for people: what nobody said of the images and the model, and the config takes for granted."""
    model, said, answers = raw["model"], draft.said.get("model", {}), draft.answers
    found = []
    if answers.get("source.split") == SPLIT:
        found.append(f"the folder is one split, called {SPLIT} (source.split)")
    if answers.get("preprocess.crop") == SIDE:
        found.append(f"images differ in size, so a side of {SIDE} is used (preprocess.resize, preprocess.crop)")
    modes = draft.said.get("preprocess", {}).get("mode"), answers.get("preprocess.mode")
    if raw["preprocess"].get("mode") == "L" and not any(modes):
        found.append("the images are grayscale, and so is what the model is given, one channel (preprocess.mode)")
    weights = model.get("weights")
    chosen = None, said.get("weights"), answers.get("model.weights")
    if model["kind"] in ("torchvision", "timm") and weights not in chosen:
        found.append(f"the published weights {weights} (model.weights)")
    if model["kind"] == "factory" and not weights:
        found.append("no checkpoint: the weights are those that the code gives the model (model.weights)")
    if "num_classes" in model.get("kwargs", {}) and "kwargs" not in said and answers.get("model.kwargs", NONE) == NONE:
        found.append(f"the model has the {model['kwargs']['num_classes']} classes of the images (model.kwargs)")
    if left_out := [key for key in ("mean", "std") if answers.get(f"model.{key}") in ("", NONE)]:
        keys = ", ".join(f"model.{key}" for key in left_out)
        found.append(f"no normalisation: the model is given images in [0, 1] without {' and '.join(left_out)} ({keys})")
    return [printable(f"Assumed: {sentence}.") for sentence in found]


def _try_run(raw: Raw, found: Found) -> list[str]:
    """Open the run of a config as `plan` and `generate` do.

    Returns:
        A line that says that the model was not tried, where it must be downloaded and cannot be; else none.

    Raises:
        ConfigError: the config, or what it names, cannot be used.
        PipelineError: as `open_run`.
    """
    config = as_config(raw)
    check_paths(config)
    if not is_address(config.output.path):
        from pipeline.output.folder import OutputFolder
        from pipeline.output.manifest import read_manifest
        from pipeline.output.settings import check_settings

        folder = OutputFolder(config.output.path)
        folder.check_usable()
        if recorded := read_manifest(folder):
            check_settings(config, recorded, folder)
    say_loading("torch", "datasets")
    from pipeline.engine.run import open_run

    # Compiling takes a minute, and whether it works does not depend on the config.
    trial = {**raw, "source": found.opened, "runtime": {"compile": False, **raw.get("runtime", {})}}
    try:
        open_run(as_config(trial))
    except (ConfigError, TemporaryError) as error:
        unreachable = isinstance(error, TemporaryError) or is_offline(error)
        if not unreachable or not str(error).startswith("model"):
            raise
        return [f"The model could not be downloaded, so it was not tried: {str(error).rstrip('.')}."]
    return []


# ------------------------------------------------------------------------------------------------------------- images


def _look_at_images(draft: Draft, path: Path | None) -> tuple[Path, str, Found]:
    """Find out where the images are, and look at them. The draft then says how they are read.

    Returns:
        The file to write, where the images are, and what was found.
    """
    while True:
        where = draft.answer(
            "--data",
            "Where are the images? A folder, the name of a dataset on the Hugging Face Hub or in torchvision, a URL, "
            "or digits, which come with the package",
        )
        file = path or Path(f"{plain_id(where)}.yaml")
        if file.exists():
            raise ConfigError(f"{file} is there already, and is not replaced; name another file, or delete it.")
        if not file.parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}.")
        logger.info("Looking at the images in %s.", where)
        try:
            source = {**_source_of(where), **draft.said.get("source", {})}
            found = _look(draft, source)
        except PipelineError as error:
            draft.ask_again(error, DATA_AGAIN)
        else:
            draft.said["source"] = source
            return file, where, found


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


def _look(draft: Draft, source: Raw) -> Found:
    """Open a source, and look at some images. What keeps it from opening is asked for, where it can be, and set."""
    if source["kind"] == "imagefolder":
        question = "The folder has no folders of splits such as train and test. What are its images called"
        draft.fill({"source": source}, "source.split", question, SPLIT)
    while True:
        need_labels = draft.said.get("attack", {}).get("label") != "prediction"
        try:
            return _open(source, need_labels=need_labels)
        except PipelineError as error:  # what a tar holds is seen when it is read
            if draft.ask is None or not (key := re.match(ANSWERABLE, str(error))):
                raise
            _ask_source(draft, source, key[1], str(error)[key.end() :])


def _ask_source(draft: Draft, source: Raw, key: str, sentence: str) -> None:
    """Ask for a key of a source that cannot be opened without it. Where there are no labels, predictions stand in."""
    assert draft.ask is not None
    question = f"{sentence[0].upper()}{sentence[1:]}".rstrip(".")
    unlabelled = "attack.label" in sentence
    answer = draft.ask(f"{question} ({NONE}: set that)", NONE) if unlabelled else draft.ask(question, None)
    if unlabelled and answer.strip() == NONE:
        _set_key(draft.said, "attack.label", "prediction")
    else:
        _set_key({"source": source}, key, answer.strip())


def _open(source: Raw, *, need_labels: bool) -> Found:
    from pipeline.sources.registry import open_source

    if source["kind"] != "huggingface" or "streaming" in source:
        return _sample(open_source(_parsed(source), need_labels=need_labels), source)
    # Of what is streamed, headers are read and some images; else `datasets` makes a copy of all.
    streamed = {**source, "streaming": True}
    try:
        opened = open_source(_parsed(streamed), need_labels=need_labels)
        if not all(name.lower().endswith(TABLES) for own in opened.files(LOOKED_AT).values() for name, _ in own):
            source["streaming"] = True  # what `datasets` makes of tars has other columns
    except ConfigError as error:
        if re.match(ANSWERABLE.replace("|classes", ""), str(error)):
            raise
        if not home(source["path"]).is_dir():
            hint = " To download all of it and look again, add --set source.streaming=false."
            raise ConfigError(f"{error}{hint if 'stream' in str(error) else ''}") from None
        return _sample(open_source(_parsed(source), need_labels=need_labels), source)
    return _sample(opened, streamed)


def _parsed(source: Raw) -> SourceConfig:
    rest = {"model": {"kind": "digits"}, "attack": {"epsilons": ["1/255"]}, "output": {"path": "out"}}
    return parse_config({"source": source, **rest}).source


def _sample(source: Any, opened: Raw) -> Found:
    """Look at some images of an opened source.

    Raises:
        ConfigError: none of them can be opened.
        PipelineError: as `Source.sample`.
    """
    if files := source.files(LOOKED_AT):
        plan = stream_plan(files, batch_size=1)
    else:
        plan = make_plan(source.splits, shuffle=False, seed=0, limit=None, images_per_shard=4096, batch_size=1)
    sizes, modes, broken = set(), set(), ""
    for row in itertools.islice(source.sample(plan, plan.shards, LOOKED_AT), LOOKED_AT):
        try:
            with source.open(row.cell) as image:
                sizes.add(image.size)
                modes.add(image.mode)
        except Exception as error:  # whatever a library raises of a broken image
            broken = printable(f"{source.name_of(row.cell) or f'in {row.shard.split}'} ({first_line(error)})")
    # Where there are others generate counts the broken ones, and names them.
    if broken and not sizes:
        raise ConfigError(f"source: no image that was looked at can be opened; the last one is {broken}.")
    return Found(source.splits, source.classes, frozenset(sizes), frozenset(modes), opened)


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
    if name.endswith(".py") or is_checkpoint(name):
        raise ConfigError(
            f"--model: {name} is a file; name the function or class that makes the model, as path/to/file.py:NAME, and "
            "a file of weights as --weights."
        )
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


def _fill_model(draft: Draft, raw: Raw, where: str, found: Found) -> None:
    """Set which model it is, and what must be said of it."""
    which = draft.answer(
        "--model",
        "Which model? One of torchvision or timm by its name, such as resnet50, one of transformers by its name on the "
        "Hub or its folder, your own code as path/to/file.py:function, or digits",
        "digits" if where == "digits" else None,
    )
    made = _model_of(which, raw.get("model", {}))
    kind = made["kind"]
    none = {"factory": "those that the code gives it", "digits": "its own"}.get(kind, "the published ones")
    question = f"Its weights: a file that ends in .safetensors, .pt or .pth ({NONE}: {none})"
    draft.fill(raw, "model.weights", question, NONE, only_again=kind != "factory")
    if kind != "digits":
        question = f"Arguments for what makes the model, such as num_classes=10 ({NONE}: it needs none)"
        draft.fill(raw, "model.kwargs", question, NONE, only_again=True)
    question = (
        "Which class of the model is each class of the images, such as cat=281, dog=207? identity: the first is the "
        f"first, and so on ({NONE}: it is another model)"
    )
    draft.fill(raw, "model.label_map", question, NONE, only_again=True)
    model = raw["model"] = {**made, **raw.get("model", {})}
    published = _is_published(model)
    if kind in ("torchvision", "timm") and not published and found.classes:
        model.setdefault("kwargs", {"num_classes": len(found.classes)})
    if not published and kind != "digits":
        for key, meant in (("mean", "is subtracted from images in [0, 1]"), ("std", "they are divided by then")):
            question = (
                f"The {key} that {meant}, as in the training: one number or one for each channel ({NONE}: skip this)"
            )
            draft.fill(raw, f"model.{key}", question, NONE)
    _fill_preprocess(draft, raw, found, published)
    if kind == "torchvision" and published and found.classes:
        _match_classes(model, found)


def _is_published(model: Raw) -> bool:
    """Whether its weights are published ones, which bring mean, std and size."""
    weights = model.get("weights")
    return bool(weights and not is_checkpoint(weights))


def _fill_preprocess(draft: Draft, raw: Raw, found: Found, published: bool) -> None:
    """Set the mode and the size that the model takes; published weights say what theirs is."""
    preprocess = raw.setdefault("preprocess", {})
    question = "What the model takes: RGB for three channels, L for one, grayscale"
    draft.fill(raw, "preprocess.mode", question, "L" if found.gray else "RGB", only_again=True)
    if found.gray and raw["model"]["kind"] in ("factory", "digits"):
        preprocess.setdefault("mode", "L")
    if preprocess.keys() & {"resize", "crop"}:
        return
    differ = len(found.sizes) > 1 and not published
    question = f"{'The images differ in size. ' if differ else ''}The side in pixels of the images that the model takes"
    draft.fill(raw, "preprocess.crop", question, SIDE if differ else NONE, only_again=not differ)
    if "crop" in preprocess:
        raw["preprocess"] = {**preprocess, "resize": preprocess["crop"]}


def _match_classes(model: Raw, found: Found) -> None:
    """See how the classes of the images meet those of a model of torchvision, before its weights are downloaded.

    Where it has another number of classes, some of which have the names of the images', these belong together.

    Raises:
        ConfigError: nobody says which belong together.
    """
    from pipeline.models.label_space import join_labels
    from pipeline.models.torchvision import find_weights

    categories = find_weights(model["name"], model["weights"]).meta["categories"]
    assert found.classes is not None
    if "label_map" not in model and len(found.classes) != len(categories):
        named = {name.lower(): name for name in categories}
        same = {name: named.get(name.lower().replace("_", " ")) for name in found.classes}
        if all(same.values()):
            model["label_map"] = same
    join_labels(found.classes, {}, categories, len(categories), model.get("label_map"))


# --------------------------------------------------------------------------------------------------------------- text


def _render(raw: Raw, said: Sequence[str]) -> str:
    """The config's text: each key under what it means.

    Args:
        raw: the config.
        said: lines for people, which stand at the top.
    """
    lines = ["# Written by fgsm init. `fgsm config` explains these keys and all others.", "#"]
    for line in said:
        lines += textwrap.wrap(line, 110, initial_indent="# ", subsequent_indent="#   ")
    lines += [
        "#",
        "# A key with a # before it is not set: take the # away to set it.",
        "# Paths are relative to the folder of this file, and output.path to the folder where the command runs.",
    ]
    for name in SECTIONS:
        values = raw.get(name)
        if values:
            lines += ["", *_comment(meaning(name)), f"{name}:"]
            for key, value in {**values, **_often_set(name, values), **values}.items():
                lines += _comment(meaning(f"{name}.{key}", values.get("kind", "")), "  ")
                lines.append(f"  {'' if key in values else '# '}{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _often_set(section: str, values: Raw) -> Mapping[str, Any]:
    """What might be set in a section. Mean and std of models that bring their own are no matter of choice."""
    brings = section == "model" and (values["kind"] == "digits" or _is_published(values))
    return {} if brings else OFTEN_SET.get(section, {})


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


def _comment(text: str, indent: str = "") -> Iterator[str]:
    """The first sentence of a text, as a comment."""
    yield from textwrap.wrap(_first_sentence(text), 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _flow(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]
