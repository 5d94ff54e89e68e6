"""The manifest: what the dataset is and how it came about, and the plan that follows from it."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import from_json, to_json

from pipeline.config.load import parse_config
from pipeline.config.schema import MOST_PIXELS, AttackConfig, Config, ModelConfig
from pipeline.core.errors import ConfigError, PipelineError, first_line, shortened
from pipeline.core.left_out import LeftOut, sum_left_out
from pipeline.core.origin import UNKNOWN, Origin
from pipeline.core.own_code import names_file
from pipeline.core.plan import Plan, make_plan, stream_plan
from pipeline.core.redaction import printable
from pipeline.core.variants import Variant, by_attack
from pipeline.layouts.base import Layout, subsets_of
from pipeline.layouts.registry import LAYOUTS
from pipeline.output.folder import (
    RUN_ID,
    AlteredError,
    Edition,
    FileEntry,
    OutputFolder,
    Receipt,
    Record,
    SealedRecord,
    Split,
    VariantCounts,
    Whole,
    add_up,
    committed,
    json_digest,
    name_edition,
    receipts_digest,
    reported_receipts,
    reported_titles,
    shard_file,
    uncollected,
)
from pipeline.output.transfer import Transfer, transfer_matrix

if TYPE_CHECKING:
    from pipeline.models.label_space import LabelSpace

# Raised when the stored form changes: it is part of the identity of every run.
FORMAT_VERSION = 7
# The share of values with gradient 0 above which there is a warning.
MANY_ZERO = 0.5
# Skipped rows that the manifest lists: 1% of a billion would be a gigabyte. Receipts list all.
MOST_SKIPPED = 10_000

# The key of an attack in an identity that is there, and false, where its images do not lie along one direction.
ON_RAY = "on_ray"

# A class of a model or a dataset, by its index.
Index = Annotated[int, Field(ge=0, lt=2**31)]
Side = Annotated[int, Field(gt=0, lt=2**31)]


class Space(Record):
    """How a model's classes translate, as it is stored: a `LabelSpace` but for the dataset's own classes."""

    recorded_classes: tuple[str, ...] | None
    to_model: tuple[Index, ...]
    to_recorded: tuple[Index, ...]

    @classmethod
    def of(cls, space: "LabelSpace") -> "Space":
        return cls(
            recorded_classes=space.recorded_classes,
            to_model=tuple(space.to_model.tolist()),
            to_recorded=tuple(space.to_recorded.tolist()),
        )


class Subset(VariantCounts):
    """What the images of one variant in one split add up to; `bytes` is None where other variants share their files."""

    split: str
    bytes: Whole | None


def _check_path(path: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} names no file of a source")
    return path


def _check_cuts(cuts: tuple[int, ...] | None) -> tuple[int, ...] | None:
    # A file without rows is one shard without rows.
    if cuts is not None and cuts != (0,) and not (cuts and all(a < b for a, b in itertools.pairwise((0, *cuts)))):
        raise ValueError("the rows at which shards end must rise")
    return cuts


class StreamedFile(Record):
    """A file of a source that was streamed: the rows at which its shards end, None for one of unknown length."""

    path: Annotated[str, AfterValidator(_check_path)]
    cuts: Annotated[tuple[Whole, ...] | None, AfterValidator(_check_cuts)]


def _check_pixels(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    _, height, width = shape
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"{width}x{height} is more than the {MOST_PIXELS:,} pixels that an image of a dataset may have"
        )
    return shape


class SkippedRow(Record):
    """A source row that could not be decoded.

    `source_file` is that of a source that was streamed, `file` the name of the image where each has its own file.
    """

    split: Split
    source_file: str | None = None
    source_index: Whole
    reason: str
    file: str | None = None

    @model_serializer(mode="wrap")
    def _without_null(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


class Manifest(SealedRecord):
    """`manifest.json`: what the dataset is, and how it came about.

    `skipped_rows` counts all source rows that could not be decoded, `skipped` lists up to MOST_SKIPPED of them.
    `left_out` says what the source holds beside its rows, as it was found when the run began, `members_left_out` what
    members of its tars are part of no row. `transfer` says what each model makes of the images of each variant.

    `generation` counts how often an object store's prefix had been started over when the run began. While a run is
    under way, `session` names the process that holds the store, so that each has a manifest of its own, and
    `supersedes` lists the editions whose files it is about to remove.
    """

    format: int = FORMAT_VERSION
    run_id: Annotated[str, Field(pattern=RUN_ID)]
    generation: Whole = 0
    session: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""
    supersedes: tuple[Edition, ...] = ()
    complete: bool = False
    config: dict[str, Any]
    identity: dict[str, Any]
    versions: dict[str, str]
    origin: Origin = UNKNOWN
    left_out: tuple[LeftOut, ...] = ()
    features: dict[str, Any]
    dataset_classes: tuple[str, ...]
    spaces: Mapping[str, Space] = Field(min_length=1)
    split_rows: dict[Split, Annotated[int, Field(gt=0, lt=2**63)] | None] = Field(min_length=1)
    streamed: Mapping[Split, Annotated[tuple[StreamedFile, ...], Field(min_length=1)]] = Field(default_factory=dict)
    shape: Annotated[tuple[Literal[1, 3], Side, Side], AfterValidator(_check_pixels)]
    asked_batch_size: Whole
    receipts: str = ""
    rows: Whole = 0
    subsets: tuple[Subset, ...] = ()
    transfer: tuple[Transfer, ...] = ()
    files: tuple[FileEntry, ...] = ()
    skipped_rows: Whole = 0
    skipped: tuple[SkippedRow, ...] = ()
    members_left_out: tuple[LeftOut, ...] = ()

    @model_validator(mode="after")
    def _check_sound(self) -> "Manifest":
        """Subsets are as `summarise` makes them, or none: a dataset without receipts is shown by what they say."""
        if self.streamed and set(self.streamed) != set(self.split_rows):
            raise ValueError("streamed lists other splits than split_rows")
        if not self.streamed and None in self.split_rows.values():
            raise ValueError("split_rows does not say how many rows there are, and streamed lists no files")
        if not all(file.path.endswith(f"-{self.edition}.parquet") for file in self.files):
            raise ValueError("files lists some whose names do not end in its run id and generation")
        subsets = [(each.split, each.variant, [*each.models], each.bytes is None) for each in self.subsets]
        if subsets:
            models, shared = [*self.spaces], self.layout.per_image
            if subsets != [(*each, models, shared) for each in itertools.product(self.split_rows, self.variants)]:
                raise ValueError("subsets lists others than its splits, variants, models and layout make")
        return self

    @functools.cached_property
    def resolved(self) -> Config:
        """The config with every `auto` resolved."""
        return parse_config(self.config)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "Manifest":
        """The same with other values. A copy takes over what was cached, which another config makes false."""
        copied = super().model_copy(update=update, deep=deep)
        if update and "config" in update:
            copied.__dict__.pop("resolved", None)
        return copied

    @property
    def edition(self) -> str:
        """What ends the names of its files."""
        return name_edition(self.run_id, self.generation)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is stored of every image, clean first."""
        return self.resolved.variants

    @property
    def levels(self) -> tuple[int, ...]:
        """Clean, 0, and every epsilon of any attack in grey levels, rising."""
        return tuple(sorted({variant.level for variant in self.variants}))

    @property
    def titles(self) -> dict[str, str]:
        """What people call each model, by its id."""
        return {name: model.title or name for name, model in self.resolved.all_models.items()}

    @property
    def titles_digest(self) -> str:
        """A digest of the titles of the dataset and its models, 16 hex digits; "" where none has one."""
        titles = titles_of(self.resolved)
        return json_digest(titles)[:16] if any(titles) else ""

    def on_ray(self, attack: str | None) -> bool:
        """Whether an attack's images lie along one direction, so that those of any epsilon can be made from them."""
        return bool(self.identity.get(f"attacks.{attack}.{ON_RAY}", True))

    @property
    def layout(self) -> Layout:
        """How its rows are stored."""
        return LAYOUTS[self.resolved.output.kind]

    @property
    def stored(self) -> tuple[str, ...]:
        """The subsets that are stored, each a folder."""
        return subsets_of(self.layout, self.variants)

    @property
    def label_spaces(self) -> dict[str, "LabelSpace"]:
        """How the classes of each model translate, by its id."""
        import numpy as np

        from pipeline.models.label_space import LabelSpace  # not for those who only inspect: it brings PyTorch

        return {
            name: LabelSpace(
                self.dataset_classes, np.array(space.to_model), space.recorded_classes, np.array(space.to_recorded)
            )
            for name, space in self.spaces.items()
        }

    @property
    def plan(self) -> Plan:
        """The plan of the run, rebuilt from what the manifest records."""
        return plan_of(self.resolved, self.split_rows, self.streamed)

    def zero_shares(self) -> dict[Variant, float]:
        """Of each variant but clean the share of pixel values that the attack does not move."""
        values, moved = math.prod(self.shape), self.variants[1:]
        zeros = {variant: [each for each in self.subsets if each.variant == variant] for variant in moved}
        return {
            variant: sum(each.zero_signs for each in parts) / max(1, values * sum(each.rows for each in parts))
            for variant, parts in zeros.items()
        }

    def unmoved(self) -> list[str]:
        """Of each attack on each model, in words, the share of pixel values that it leaves as they are."""
        shares, said = self.zero_shares(), []
        for indices in by_attack(self.variants):
            own = sorted({shares[self.variants[index]] for index in indices})
            least, most = f"{own[0]:.2%}", f"{own[-1]:.2%}"
            said.append(f"{self.variants[indices[0]].maker} {least if least == most else f'{least} to {most}'}")
        return said

    @property
    def zero_gradient_warning(self) -> str | None:
        """A sentence for a dataset of which an attack changed less than half, None for others."""
        shares = self.zero_shares()
        worst = max(shares, key=shares.__getitem__)
        if shares[worst] <= MANY_ZERO:
            return None
        left = f"the attack {worst.maker} left {shares[worst]:.1%} of the pixel values as they are"
        if not self.on_ray(worst.attack):
            return f"{left}; see whether that is what it should do"
        return (
            f"{left}, as the model's gradient is 0 there; it may be of half precision, rounded or cut off, or so sure "
            "that its softmax is 0 or 1"
        )

    @property
    def planned(self) -> str:
        """How many source rows the whole run has, for people; streamed ones are counted as they come."""
        rows = self.rows + self.skipped_rows if self.complete else self.plan.total
        return "an unknown number of" if rows is None else f"{rows:,}"


def titles_of(config: Config) -> list[str | None]:
    """The titles of a dataset and of its models. They are no part of the run's identity."""
    return [config.output.title, *(model.title for model in config.all_models.values())]


def with_titles(manifest: Manifest, config: Config) -> Manifest:
    """The manifest of a run with the titles that its config has now."""
    own = manifest.resolved
    models = {
        name: model.model_copy(update={"title": config.all_models[name].title})
        for name, model in own.all_models.items()
    }
    output = own.output.model_copy(update={"title": config.output.title})
    titled = own.with_models(models).model_copy(update={"output": output})
    return manifest.model_copy(update={"config": titled.model_dump(mode="json")})


def has_report(folder: OutputFolder, manifest: Manifest) -> bool:
    """Whether there is a report of the shards in a manifest, under the titles in it."""
    return (reported_receipts(folder), reported_titles(folder)) == (manifest.receipts, manifest.titles_digest)


def without_folders(value: Any) -> Any:
    """A config, or a part of one, as it is shown to others: of the machine's own paths only their names are left.

    They name its users and its disks. Here they stay in manifest.json, by which `verify --recompute` finds the model.
    """
    if isinstance(value, str):
        local = value.startswith(("/", "~", "./", "../")) or re.match(r"([\w+]+::)*(file|local)://", value)
        return PurePath(value).name if local else value
    if isinstance(value, Mapping):
        return {key: without_folders(inside) for key, inside in value.items()}
    return [without_folders(inside) for inside in value] if isinstance(value, list | tuple) else value


def published(manifest: Manifest) -> Manifest:
    """The manifest as it is published: without the folders of the machine that made it."""
    config = without_folders(manifest.config)
    config["output"]["path"] = PurePath(config["output"]["path"]).name or "."
    # These are names, and the identity has them too: a class may well be called /m/01yrx.
    source = manifest.config["source"]
    config["source"] |= {key: source[key] for key in ("classes", "keep_columns") if key in source}
    return manifest.model_copy(update={"config": config}).sealed()


def _model_identity(model: ModelConfig) -> dict[str, Any]:
    called, kwargs = model.call
    name = str(called)
    return {
        "kind": model.kind,
        # A local folder of transformers is told by its content, as a factory's file is.
        "name": name.rpartition(":")[2] if names_file(name) else PurePath(name).name if name[:1] == "/" else name,
        "kwargs": without_folders(kwargs),
        "mean": model.mean,
        "std": model.std,
    }


def _attack_identity(attack: AttackConfig, models: Sequence[str]) -> dict[str, Any]:
    return {
        "epsilons": [f"{level}/255" for level in attack.levels],
        "label": attack.label,
        "target": attack.target,
        "models": attack.attacked(models),
        **without_folders(attack.identity),
    }


def identity_of(
    config: Config,
    *,
    split_rows: Mapping[str, int | None],
    streamed: Mapping[str, Sequence[StreamedFile]],
    shape: Sequence[int],
    dataset_classes: Sequence[str],
    label_maps: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """What decides the bytes of a run and also stands elsewhere in its manifest, as dotted keys. Neither paths nor
    workers are part of it.

    Args:
        config: with every `auto` resolved.
        split_rows, streamed, shape, dataset_classes: as a manifest has them.
        label_maps: the index of each dataset class in each model, by its id.
    """
    models = tuple(config.all_models)
    sections: dict[str, dict[str, Any]] = {
        "source": {
            **config.source.model_dump(include={"shuffle", "limit"}),
            "keep_columns": config.source.kept,
            "rows": split_rows,
            "classes": dataset_classes,
            # A source that is streamed has a shard for each stretch of its files.
            **({"files": json_digest(_plain(streamed))} if streamed else {}),
        },
        "preprocess": {**config.preprocess.model_dump(), "shape": shape},
        "output": config.output.model_dump(exclude={"path", "title"}),
        "runtime": config.runtime.model_dump(
            include={"device", "precision", "batch_size", "compile", "seed", "max_pixels"}
        ),
        **{f"models.{name}": _model_identity(model) for name, model in config.all_models.items()},
        **{f"attacks.{name}": _attack_identity(attack, models) for name, attack in config.all_attacks.items()},
    }
    flat = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    flat |= {f"models.{name}.label_map": label_map for name, label_map in label_maps.items()}
    # Their order is that of columns and subsets, and the first model looks at what is of none.
    flat |= {"models": models, "attacks": tuple(config.all_attacks)}
    identity: dict[str, Any] = _plain({"format": FORMAT_VERSION, **flat})
    return identity


def identity_with(manifest: Manifest, config: Config) -> dict[str, Any]:
    """As `identity_of`, of a config over the source and the models that a manifest records."""
    return identity_of(
        config,
        split_rows=manifest.split_rows,
        streamed=manifest.streamed,
        shape=manifest.shape,
        dataset_classes=manifest.dataset_classes,
        label_maps={name: space.to_model for name, space in manifest.spaces.items()},
    )


def _plain(value: Any) -> Any:
    """A value as JSON gives it back. Infinity is a text, as JSON has no number for it."""
    return from_json(to_json(value, fallback=str, inf_nan_mode="strings"))


def run_id_of(identity: Mapping[str, Any]) -> str:
    """The id of a run: a digest of what decides its bytes, 16 hex digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def contradictions(manifest: Manifest) -> list[str]:
    """The keys of a manifest that do not agree with its identity, or with each other."""
    config = manifest.resolved
    identity = identity_with(manifest, config)
    wrong = [key for key, value in identity.items() if manifest.identity.get(key) != value]
    source = config.source
    stated = {
        "source.split": source.split in (None, tuple(manifest.split_rows)),
        "source.streaming": source.streams == bool(manifest.streamed),
        "source.classes": source.class_names in (None, manifest.dataset_classes),
        "runtime.batch_size": config.runtime.batch_size <= manifest.asked_batch_size,
        "spaces": [*manifest.spaces] == [*config.all_models],
    }
    return wrong + [key for key, sound in stated.items() if not sound]


@uncollected()
def read_manifest(folder: OutputFolder) -> Manifest | None:
    """The manifest of a run, None where there is none.

    Raises:
        PipelineError: it cannot be read as one, or another version of this package wrote it.
    """
    path = folder.store.at(folder.manifest)
    try:
        content = from_json(folder.store.read(folder.manifest))  # json would take halves of characters
        stated = content.get("format") if isinstance(content, dict) else FORMAT_VERSION
        if isinstance(stated, int) and stated != FORMAT_VERSION and folder.is_ours():
            raise PipelineError(
                f"{path} was made by another version of fgsm-pipeline (its format is {stated}, this one's is "
                f"{FORMAT_VERSION}); use that version, or start over with --overwrite."
            )
        manifest = Manifest.of_json(content)
        if manifest.run_id != run_id_of(manifest.identity):
            raise AlteredError("its run id is not that of its identity")
        _ = manifest.resolved  # a config that cannot be used shows here, not at its first use
        return manifest
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise PipelineError(f"{path}: its config cannot be used: {error}") from None
    except AlteredError as error:
        raise altered_manifest(folder, str(error)) from None
    except (ValueError, OSError, RecursionError) as error:  # neither JSON nor a manifest
        advice = _way_out(folder) if folder.is_ours() else "It is not of fgsm-pipeline."
        raise PipelineError(f"{path} cannot be read ({_problem(error)}). {advice}") from None


def altered_manifest(folder: OutputFolder, why: str) -> PipelineError:
    """The error for a manifest that does not say what was written."""
    return PipelineError(f"{folder.store.at(folder.manifest)} was altered: {why}. {_way_out(folder)}")


def _way_out(folder: OutputFolder) -> str:
    """What helps where a manifest cannot be used. Shards with receipts need not be written again."""
    if folder.receipt_names():
        return "Restore it, or delete it and run generate again, which writes it again and keeps all shards."
    return "Restore it, or start over with --overwrite: no shard has a receipt, so none can be kept."


def _problem(error: BaseException) -> str:
    """What is wrong with a manifest: where, and what, without quoting more of it than keys."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    return ": ".join(shortened(printable(part)) for part in (".".join(map(str, first["loc"])), message) if part)


def ended(manifest: Manifest) -> Manifest:
    """The manifest of a run that is not under way."""
    return manifest.model_copy(update={"session": "", "supersedes": ()})


def require_manifest(folder: OutputFolder) -> Manifest:
    """The manifest of a run that must be there.

    Raises:
        ConfigError: there is none.
        PipelineError: as `read_manifest`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise _no_dataset(folder)
    return manifest


def check_dataset(folder: OutputFolder) -> None:
    """See that there is a dataset, before libraries are imported to read it.

    Raises:
        ConfigError: there is none.
    """
    # What else there is to say of a manifest says whoever reads it.
    with contextlib.suppress(OSError):
        try:
            with folder.store.open(folder.manifest):
                pass
        except (FileNotFoundError, NotADirectoryError):
            raise _no_dataset(folder) from None


def _no_dataset(folder: OutputFolder) -> ConfigError:
    return ConfigError(f"{folder.root} holds no dataset of fgsm-pipeline: there is no manifest.json.")


def current_manifest(folder: OutputFolder) -> Manifest:
    """The manifest of a dataset as it is now, for those who only look.

    Its totals follow from the receipts, as a run that was killed has not had the time to write it again. A dataset
    from the Hub comes without any: there the manifest is all there is to go by.

    Raises:
        ConfigError, PipelineError: as `require_manifest`.
    """
    manifest = require_manifest(folder)
    if ".run" not in folder.store.entries():
        return manifest
    return summarise(manifest, committed(folder, manifest.edition, manifest.plan.shards))


def warn_if_incomplete(folder: OutputFolder, manifest: Manifest) -> None:
    """Warn whoever reads a dataset of which shards are missing, and say how many are there."""
    sizes, shards, stored = folder.store.sizes(), manifest.plan.shards, manifest.stored
    found = sum(all(shard_file(subset, shard, manifest.edition) in sizes for subset in stored) for shard in shards)
    if found < len(shards):
        warnings.warn(
            f"{folder.root} is incomplete: {found} of {len(shards)} shards are there ({found / len(shards):.0%}). Run "
            "the generate command that made it again, or pass allow_incomplete=True.",
            stacklevel=3,
        )


def plan_of(
    config: Config, split_rows: Mapping[str, int | None], streamed: Mapping[str, Sequence[StreamedFile]]
) -> Plan:
    """The plan of a config over splits of so many rows, or over the files of a source that is streamed."""
    if streamed:
        files = {split: [(file.path, file.cuts) for file in files] for split, files in streamed.items()}
        return stream_plan(files, batch_size=config.runtime.batch_size)
    return make_plan(
        {split: rows for split, rows in split_rows.items() if rows is not None},
        shuffle=config.source.shuffle,
        seed=config.runtime.seed,
        limit=config.source.limit,
        images_per_shard=config.output.images_per_shard,
        batch_size=config.runtime.batch_size,
    )


@uncollected()
def summarise(manifest: Manifest, receipts: Mapping[str, Receipt]) -> Manifest:
    """The manifest with what follows from the receipts of the shards that are there, by name; of the old one only what
    was decided when the run began is kept.
    """
    ordered = [receipts[name] for name in sorted(receipts)]
    subsets = _subsets(manifest, ordered)
    rows = sum(receipt.rows for receipt in ordered)
    shards = manifest.plan.shards
    files = {shard.name: shard.file for shard in shards}
    skipped = (
        SkippedRow(
            split=receipt.split,
            source_file=files.get(receipt.shard),
            source_index=row.source_index,
            reason=row.reason,
            file=row.file,
        )
        for receipt in ordered
        for row in receipt.skipped
    )
    return manifest.model_copy(
        update={
            "complete": len(receipts) == len(shards),
            "versions": _versions(manifest, ordered),
            "receipts": receipts_digest(receipts),
            "rows": rows,
            "subsets": subsets,
            "transfer": transfer_matrix((subset.split, subset) for subset in subsets),
            "files": tuple(entry for receipt in ordered for entry in receipt.files),
            "skipped_rows": sum(len(receipt.skipped) for receipt in ordered),
            "skipped": tuple(itertools.islice(skipped, MOST_SKIPPED)),
            "members_left_out": sum_left_out(part for receipt in ordered for part in receipt.left_out),
        }
    )


def _versions(manifest: Manifest, receipts: Sequence[Receipt]) -> dict[str, str]:
    """The versions of the first session that wrote a shard which is still there: so each of them has a receipt."""
    if not receipts or any(receipt.versions == manifest.versions for receipt in receipts):
        return manifest.versions
    return receipts[0].versions


def _subsets(manifest: Manifest, receipts: Sequence[Receipt]) -> tuple[Subset, ...]:
    # Once over all receipts, not once for each variant.
    counts: defaultdict[tuple[str, str], list[VariantCounts]] = defaultdict(list)
    sizes: Counter[tuple[str, str]] = Counter()
    for receipt in receipts:
        for count in receipt.counts:
            counts[receipt.split, count.subset].append(count)
        for file in receipt.files:
            sizes[receipt.split, file.path.partition("/")[0]] += file.bytes
    subsets, layout = [], manifest.layout
    for split, variant in itertools.product(manifest.split_rows, manifest.variants):
        total = add_up(variant, counts[split, variant.subset], manifest.spaces)
        size = None if layout.per_image else sizes[split, layout.subset(variant)]
        # Not checked, as the sum is not.
        subsets.append(Subset.model_construct(split=split, bytes=size, **dict(total)))
    return tuple(subsets)
