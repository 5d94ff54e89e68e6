"""The manifest: what the dataset is and how it came about, and the plan that follows from it."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import from_json

from pipeline.config import MOST_PIXELS, Config, parse_config
from pipeline.errors import ConfigError, PipelineError, first_line
from pipeline.guard import printable
from pipeline.origins import UNKNOWN, LeftOut, Origin, sum_left_out
from pipeline.outputs import (
    STEM,
    EvaluatorCounts,
    FileEntry,
    LevelCounts,
    OutputFolder,
    Receipt,
    Record,
    Whole,
    committed,
    receipts_digest,
    stored_subsets,
    subset_name,
    uncollected,
)
from pipeline.plan import Plan, make_plan, stream_plan

# Raised when the stored form changes: it is part of the identity of every run.
FORMAT_VERSION = 4
# Skipped rows that the manifest lists: 1% of a billion would be a gigabyte. Receipts list all.
MOST_SKIPPED = 10_000

# Characters of a part of a manifest that a message names.
MOST_NAMED = 200

# A class of a model or a dataset, by its index.
Index = Annotated[int, Field(ge=0, lt=2**31)]
Side = Annotated[int, Field(gt=0, lt=2**31)]


class Space(Record):
    """How an evaluator's classes translate: see labels.LabelSpace."""

    recorded_classes: tuple[str, ...] | None
    to_model: tuple[Index, ...]
    to_recorded: tuple[Index, ...]


class Subset(LevelCounts):
    """What the images of one split at one epsilon add up to; `bytes` is None where other epsilons share their files."""

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


# A name of which the names of shards begin.
Split = Annotated[str, Field(pattern=STEM)]


def _check_pixels(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    _, height, width = shape
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"{width}x{height} is more than the {MOST_PIXELS:,} pixels that an image of a dataset may have"
        )
    return shape


class Skipped(Record):
    """A source row that could not be decoded; `source_file` is that of a source that was streamed."""

    split: Split
    source_file: str | None = None
    source_index: Whole
    reason: str

    @model_serializer(mode="wrap")
    def _without_null(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


class Manifest(Record):
    """`manifest.json`: what the dataset is, and how it came about.

    `skipped_rows` counts all source rows that could not be decoded, `skipped` lists up to MOST_SKIPPED of them.
    `members_left_out` counts members of tars that are part of no row.
    """

    format: int = FORMAT_VERSION
    run_id: str
    complete: bool = False
    config: dict[str, Any]
    identity: dict[str, Any]
    versions: dict[str, str]
    origin: Origin = UNKNOWN
    features: dict[str, Any]
    dataset_classes: tuple[str, ...]
    recorded_classes: tuple[str, ...] | None
    to_model: tuple[Index, ...]
    to_recorded: tuple[Index, ...]
    evaluators: Mapping[str, Space] = Field(default_factory=dict)
    split_rows: dict[Split, Annotated[int, Field(gt=0, lt=2**63)] | None] = Field(min_length=1)
    streamed: Mapping[Split, Annotated[tuple[StreamedFile, ...], Field(min_length=1)]] = Field(default_factory=dict)
    shape: Annotated[tuple[Literal[1, 3], Side, Side], AfterValidator(_check_pixels)]
    asked_batch_size: Whole
    receipts: str = ""
    rows: Whole = 0
    subsets: tuple[Subset, ...] = ()
    zero_sign_share: float = 0.0
    files: tuple[FileEntry, ...] = ()
    skipped_rows: Whole = 0
    skipped: tuple[Skipped, ...] = ()
    members_left_out: tuple[LeftOut, ...] = ()

    @model_validator(mode="after")
    def _check_streamed(self) -> "Manifest":
        if self.streamed and set(self.streamed) != set(self.split_rows):
            raise ValueError("streamed lists other splits than split_rows")
        if not self.streamed and None in self.split_rows.values():
            raise ValueError("split_rows does not say how many rows there are, and streamed lists no files")
        return self

    @model_validator(mode="after")
    def _check_subsets(self) -> "Manifest":
        """As `summarise` makes them, or none: a dataset without receipts is shown by what they say."""
        if not self.subsets:
            return self
        if [(there.split, there.level) for there in self.subsets] != [*itertools.product(self.split_rows, self.levels)]:
            raise ValueError("subsets lists others than its splits and epsilons make")
        stored = self.stored
        for there in self.subsets:
            if [*there.evaluators] != [*self.evaluators]:
                raise ValueError("subsets counts other evaluators than there are")
            if (there.bytes is None) == (subset_name(there.level) in stored):
                raise ValueError("subsets has bytes that are not those of its layout")
            sound = there.correct <= there.labelled <= there.rows >= there.fooled and (
                0 <= there.confidence_sum <= there.rows + 1  # it is rounded
            )
            if not sound or any(
                counts.correct > there.labelled or counts.transferred > counts.exposed
                for counts in there.evaluators.values()
            ):
                raise ValueError("subsets counts more answers than images")
        return self

    @property
    def resolved(self) -> Config:
        """The config with every `auto` resolved."""
        return parse_config(self.config)

    @property
    def levels(self) -> tuple[int, ...]:
        """Clean, 0, and every epsilon in grey levels."""
        return (0, *self.resolved.attack.levels)

    @property
    def stored(self) -> tuple[str, ...]:
        """The subsets that are stored, each a folder."""
        return stored_subsets(self.resolved.output.layout, self.levels)

    @property
    def plan(self) -> Plan:
        """The plan of the run, rebuilt from what the manifest records."""
        return plan_of(self.resolved, self.split_rows, self.streamed)

    @property
    def planned(self) -> str:
        """How many source rows the whole run has, for people; streamed ones are counted as they come."""
        rows = self.rows + self.skipped_rows if self.complete else self.plan.total
        return "an unknown number of" if rows is None else f"{rows:,}"


def without_folders(value: Any) -> Any:
    """A config, or a part of one, as it is shown to others: of the machine's own paths only their names are left.

    They name its users and its disks, and lead nowhere elsewhere. Here they stay in manifest.json, by which
    `verify --recompute` finds the model again.
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
    return manifest.model_copy(update={"config": config, "identity": without_folders(manifest.identity)})


@uncollected()
def read_manifest(folder: OutputFolder) -> Manifest | None:
    """The manifest of a run, None where there is none.

    Raises:
        PipelineError: it cannot be read as one, or another version of this package wrote it.
    """
    place = folder.store.at(folder.manifest)
    try:
        content = from_json(folder.store.read(folder.manifest))  # json would take halves of characters
        there = content.get("format") if isinstance(content, dict) else FORMAT_VERSION
        if there != FORMAT_VERSION:
            raise PipelineError(
                f"{place} was made by another version of fgsm-pipeline (its format is {there}, this one's is "
                f"{FORMAT_VERSION}); use that version, or start over with --overwrite."
            )
        return Manifest.model_validate(content)
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:  # neither JSON nor a manifest
        raise PipelineError(
            f"{place} cannot be read ({_problem(error)}); restore it, or start over with --overwrite."
        ) from None


def _problem(error: BaseException) -> str:
    """What is wrong with a manifest: where, and what, without quoting more of it than keys."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(printable(str(part))[:MOST_NAMED] for part in first["loc"])
    message = printable(first["msg"].removeprefix("Value error, "))[:MOST_NAMED]
    return f"{where}: {message}" if where else message


def require_manifest(folder: OutputFolder) -> Manifest:
    """The manifest of a run that must be there.

    Raises:
        ConfigError: there is none.
        PipelineError: as `read_manifest`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError(f"{folder.root} holds no dataset of ours: there is no manifest.json.")
    return manifest


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
    return summarise(manifest, committed(folder, manifest.run_id, manifest.plan.shards))


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
    """The manifest with everything that follows from the receipts: totals, files, skipped rows, their digest.

    Args:
        manifest: of the run; only what was decided at its start is kept.
        receipts: of the shards that are there, by name.
    """
    ordered = [receipts[name] for name in sorted(receipts)]
    rows = sum(receipt.rows for receipt in ordered)
    shards = manifest.plan.shards
    files = {shard.name: shard.file for shard in shards}
    skipped = (
        Skipped(
            split=receipt.split,
            source_file=files.get(receipt.shard),
            source_index=row.source_index,
            reason=row.reason,
        )
        for receipt in ordered
        for row in receipt.skipped
    )
    return manifest.model_copy(
        update={
            "complete": len(receipts) == len(shards),
            "receipts": receipts_digest(receipts),
            "rows": rows,
            "subsets": _subsets(manifest, ordered),
            "zero_sign_share": sum(receipt.zero_sign_share * receipt.rows for receipt in ordered) / max(rows, 1),
            "files": tuple(entry for receipt in ordered for entry in receipt.files),
            "skipped_rows": sum(len(receipt.skipped) for receipt in ordered),
            "skipped": tuple(itertools.islice(skipped, MOST_SKIPPED)),
            "members_left_out": sum_left_out(part for receipt in ordered for part in receipt.left_out),
        }
    )


def _subsets(manifest: Manifest, receipts: Sequence[Receipt]) -> tuple[Subset, ...]:
    keys = ("rows", "labelled", "correct", "fooled", "confidence_sum")
    # Once over all receipts, not once for each epsilon.
    counts: defaultdict[tuple[str, int], list[LevelCounts]] = defaultdict(list)
    sizes: Counter[tuple[str, str]] = Counter()
    for receipt in receipts:
        for count in receipt.counts:
            counts[receipt.split, count.level].append(count)
        for file in receipt.files:
            sizes[receipt.split, file.path.partition("/")[0]] += file.bytes
    subsets = []
    stored = manifest.stored
    for split, level in itertools.product(manifest.split_rows, manifest.levels):
        own = counts[split, level]
        evaluators = {
            name: sum((count.evaluators.get(name, EvaluatorCounts()) for count in own), EvaluatorCounts())
            for name in manifest.evaluators
        }
        size = sizes[split, subset_name(level)] if subset_name(level) in stored else None
        totals = {key: sum(getattr(count, key) for count in own) for key in keys}
        # Not checked, as sums of evaluators' counts are not.
        subsets.append(Subset.model_construct(split=split, level=level, bytes=size, evaluators=evaluators, **totals))
    return tuple(subsets)
