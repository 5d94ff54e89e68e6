"""The output folder: what is where in it, and the receipts that make its shards true.

OUTPUT/manifest.json                                what the dataset is
OUTPUT/README.md                                    the card, which makes the subsets
OUTPUT/clean/test-00000-of-00004-RUN.parquet        in layout images; others have other subsets
OUTPUT/eps-8/test-00000-of-00004-RUN.parquet
OUTPUT/report.html, OUTPUT/assets/*.png             what it looks like
OUTPUT/defence.json                                 what training on it bought, where somebody measured it: the user's
OUTPUT/.run/receipts/test-00000-of-00004-RUN.json   a shard without a receipt does not exist
OUTPUT/.run/sessions.jsonl                          how fast each session that wrote something was
OUTPUT/.run/warnings                                what was warned of when the run began, to be said again
OUTPUT/.run/inputs                                  a digest of what the complete dataset was made of: see inputs.py

RUN is the edition: the run's id. No two runs write files of the same name, so whatever one of them writes late, after
a pause or through a slow network, cannot touch a file of another.
"""

import contextlib
import gc
import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json

from pipeline.core.addresses import is_address
from pipeline.core.errors import ConfigError, PipelineError, listing
from pipeline.core.left_out import LeftOut, Skipped
from pipeline.core.plan import Shard
from pipeline.core.variants import ID, SUBSET, Variant
from pipeline.layouts.registry import LAYOUTS
from pipeline.output.store import open_store

# What names of splits and files are made of: receipts and manifests are data, which others may have written, and a name
# out of them is never a way out of the folder.
STEM = r"^\w[\w.-]*$"
SUBSETS = f"(?:{'|'.join(layout.subsets for layout in LAYOUTS.values())})"
SHARD_FILE = rf"^{SUBSETS}/\w[\w.-]*\.parquet$"
RUN_ID, EDITION = r"^[0-9a-f]{16}$", r"^[0-9a-f]{16}(-\d+)?$"
Edition = Annotated[str, Field(pattern=EDITION)]
Id = Annotated[str, Field(pattern=f"^{ID}$")]
# A name of which the names of shards begin.
Split = Annotated[str, Field(pattern=STEM)]
# An epsilon in grey levels, 0 for clean.
Level = Annotated[int, Field(ge=0, le=255)]
# Numbers there are such that one can compute with them.
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Total = Annotated[float, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]

Flags = NDArray[np.bool_]

logger = logging.getLogger(__name__)


def local_folder(path_or_repo: str | Path) -> Path | None:
    """The folder that a reader means, as a whole path; None where it is the id of a Hub dataset.

    Raises:
        ConfigError: it is neither a folder nor looks like an id.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path_or_repo)):
        raise ConfigError(f"There is no folder {folder}.")
    return None


def name_edition(run_id: str, generation: int) -> str:
    """What ends the names of a run's files: its id, and in a store that was started over `Manifest.generation`."""
    return f"{run_id}-{generation}" if generation else run_id


def shard_file(subset: str, shard: Shard, edition: str) -> str:
    """A shard's file relative to the output folder."""
    return f"{subset}/{shard.name}-{edition}.parquet"


def split_of(file: str) -> str:
    """The split of a shard, by the name of one of its files."""
    found = re.match(r"(.+)-\d{5,}-of-\d{5,}-", PurePosixPath(file).name)
    return found[1] if found else ""


class Claim(BaseModel):
    """What of a manifest says that files are ours, whichever version of this package wrote it.

    `supersedes` are editions whose files its run was about to remove.
    """

    format: int
    run_id: str = Field(pattern=RUN_ID)
    generation: Whole = 0
    supersedes: tuple[Edition, ...] = ()


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# Made once: there are 10,000 receipts to hash. What was parsed holds no cycles.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), check_circular=False)


class AlteredError(ValueError):
    """A file is not as it was written."""


def json_digest(value: Any) -> str:
    """The sha256 of what JSON can hold, written with sorted keys and without spaces."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def _own_digest(content: Mapping[str, Any]) -> str:
    return json_digest({key: value for key, value in content.items() if key != "digest"})


class RunWarning(Record):
    """A warning of when a run began, without a full stop. `unstated` is the model whose mean or std nobody had stated,
    where the warning is of that."""

    text: str
    unstated: str | None = None


class Warned(Record):
    """What was warned of when the run of an edition began."""

    edition: Edition
    warnings: tuple[RunWarning, ...]


class SealedRecord(Record):
    """A record that is a file of its own.

    `digest` is the `json_digest` of everything else in the file. A file that was altered afterwards is known by it.
    """

    digest: str = ""

    def sealed(self) -> Self:
        """The record with the digest of what it holds now."""
        # Through JSON: a reader hashes what it finds in the file.
        return self.model_copy(update={"digest": _own_digest(from_json(self.model_dump_json()))})

    @classmethod
    def of_json(cls, content: Any) -> Self:
        """A record out of parsed JSON.

        Raises:
            ValidationError: it is no such record.
            AlteredError: the digest is not that of the rest.
        """
        record = cls.model_validate(content)
        if record.digest != _own_digest(content):
            raise AlteredError("its digest is not that of its content")
        return record


class FileEntry(Record):
    """One Parquet file of a receipt."""

    path: str = Field(pattern=SHARD_FILE)
    rows: Whole
    bytes: Whole
    sha256: str


class ModelCounts(Record):
    """What a model says of the images of a variant, whichever model they were made of.

    Of labelled images, `correct` are predicted right, and `lost` were right when clean and are wrong now. Of those that
    fool the model they were made of, `exposed` are ones that this model gets right when clean, and `transferred` ones
    that fool it too: transferred / exposed is the rate at which the attack transfers.
    """

    correct: Whole = 0
    lost: Whole = 0
    exposed: Whole = 0
    transferred: Whole = 0


def count_model(clean: Flags, now: Flags, fooled: Flags) -> ModelCounts:
    """Count what a model says of M labelled images of a variant.

    Args:
        clean, now: (M,) bool, whether it is right about the clean image, and about this one.
        fooled: (M,) bool, whether this one fools the model that it was made of.
    """
    lost = clean & ~now
    return ModelCounts(
        correct=int(now.sum()),
        lost=int(lost.sum()),
        exposed=int((fooled & clean).sum()),
        transferred=int((fooled & lost).sum()),
    )


class VariantCounts(Record):
    """What a shard's images of one variant add up to; the first four say which, as in `Variant`.

    `labelled` of them have a label, and `correct` of those are predicted right; `fooled` counts true values;
    `confidence_sum` over `rows` is the mean confidence. `zero_signs` counts pixel values that the attack does not move.
    `models` is what every model says of these images, by their ids.
    """

    attack: Id | None
    model: Id | None
    level: Level
    subset: str = Field(pattern=f"^{SUBSET}$")
    rows: Whole
    labelled: Whole
    correct: Whole
    fooled: Whole
    confidence_sum: Total
    zero_signs: Whole = 0
    models: dict[Id, ModelCounts] = {}

    @property
    def variant(self) -> Variant:
        """Of which these are the counts."""
        return Variant(self.level, self.attack, self.model, self.subset)

    @model_validator(mode="after")
    def _check_sound(self) -> Self:
        sound = self.correct <= self.labelled <= self.rows >= self.fooled
        sound &= self.confidence_sum <= self.rows + 1  # it is rounded
        for counts in self.models.values():
            sound &= counts.correct <= self.labelled and counts.transferred <= counts.exposed
        if not sound:
            raise ValueError("more answers are counted than images")
        return self


def add_up(variant: Variant, counts: Sequence[VariantCounts], models: Iterable[str]) -> VariantCounts:
    """The sum of counts of one variant, and of what the models that are named say of it."""

    def total(parts: Sequence[Record], *keys: str) -> dict[str, Any]:
        return {key: sum(getattr(part, key) for part in parts) for key in keys}

    # Not checked: of numbers that others wrote the sum may be more than any of them may.
    return VariantCounts.model_construct(
        **vars(variant),
        **total(counts, "rows", "labelled", "correct", "fooled", "zero_signs"),
        # Not `sum`, whose last digit depends on the version of Python.
        confidence_sum=math.fsum(count.confidence_sum for count in counts),
        models={
            name: ModelCounts.model_construct(
                **total([part.models[name] for part in counts if name in part.models], *ModelCounts.model_fields)
            )
            for name in models
        },
    )


class Receipt(SealedRecord):
    """What a committed shard holds. Nothing in it depends on when or how fast it was written."""

    run_id: str
    shard: str = Field(pattern=STEM)
    split: str = Field(pattern=STEM)
    planned: Whole
    rows: Whole
    skipped: tuple[Skipped, ...]
    counts: tuple[VariantCounts, ...]
    files: tuple[FileEntry, ...]
    versions: dict[str, str]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def progress(self) -> tuple[int, int, dict[str, int]]:
        """Source images, how many of them are labelled, and right ones by the name of their subset."""
        return self.planned, self.counts[0].labelled, {counts.subset: counts.correct for counts in self.counts}


# A file that a run writes, with the edition in which its name ends. A copy of it in any other folder is the user's.
_NAMED = re.compile(
    rf"(?:{SUBSETS}|\.run/receipts)/[^/]+-\d{{5,}}-of-\d{{5,}}-({RUN_ID[1:-1]}(?:-\d+)?)\.(?:parquet|json)"
)


def _edition(name: str) -> str:
    """The edition in which the name of a shard's file or receipt ends, "" for any other file."""
    named = _NAMED.fullmatch(name)
    return named[1] if named else ""


class OutputFolder:
    """The output folder, on a disk or in an object store: the names of things in it, over the store that holds them."""

    manifest, card, report = "manifest.json", "README.md", "report.html"
    assets, receipts = "assets", ".run/receipts"
    sessions, inputs, warnings = ".run/sessions.jsonl", ".run/inputs", ".run/warnings"

    def __init__(self, root: str | Path) -> None:
        self.store = open_store(root)
        # For messages.
        self.root = self.store.root

    def receipt(self, shard: Shard, edition: str) -> str:
        """The name of a shard's receipt."""
        return f"{self.receipts}/{shard.name}-{edition}.json"

    def check_usable(self) -> None:
        """Refuse a folder that holds something else, before anything is written.

        Raises:
            ConfigError: it is a file, or a folder with other content than a run's, or readers would not find it.
        """
        if not is_address(self.root) and re.search(r"[*?\[]|::", str(Path(self.root).resolve())):
            raise ConfigError(
                f"output.path: a name in the path of {self.root} holds one of * ? [ or ::, which `datasets` and others "
                "take for a pattern, so that they could not read the dataset; choose another folder."
            )
        others = [name for name in self.store.entries() if not name.startswith(".")]
        if others and not self.is_ours():
            raise ConfigError(
                f"output.path: {self.root} is not empty and holds no dataset of fgsm-pipeline (there is {others[0]}); "
                "choose another folder."
            )

    def is_ours(self) -> bool:
        """Whether there is a manifest or a receipt that this package wrote, in any version."""
        return self._claim() is not None or bool(self.receipt_names())

    def receipt_names(self) -> list[str]:
        """The names of the receipts of all runs."""
        return [name for name in self.store.sizes() if name.startswith(self.receipts) and _edition(name)]

    def editions(self) -> set[str]:
        """The editions of all of which there is something here."""
        found = {_edition(name) for name in self.receipt_names()}
        if claim := self._claim():
            found |= {name_edition(claim.run_id, claim.generation), *claim.supersedes}
        return found

    def _claim(self) -> Claim | None:
        with contextlib.suppress(OSError, ValueError):
            return Claim.model_validate_json(self.store.read(self.manifest))
        return None

    def generation(self, *, over: bool) -> int:
        """The generation of a run that begins here, above all that the names of files show where it starts over.

        On a disk that is 0: there the operating system keeps a second run out. In an object store a request of the
        former run may arrive late, and must not delete a file of this one, which may have the same id. A run that
        starts nothing over may be one whose manifest was removed, and goes on in the generation that is there.
        """
        if over and self.store.local:
            return 0
        found = [int(edition[17:] or 0) for edition in self.editions()]
        return 1 + max(found, default=-1) if over else max(found, default=0)

    def owned(self, editions: Collection[str]) -> list[str]:
        """The files whose names say that they are of some editions, receipts last."""
        found = [name for name in self.store.sizes() if _edition(name) in editions]
        return sorted(found, key=lambda name: (name.startswith(self.receipts), name))

    def start_over(self, editions: Collection[str]) -> None:
        """Remove the files of runs that were here, and say what else there is.

        What all runs have under one name is replaced, not removed: a request to remove it that arrives late would take
        another run's.
        """
        self.store.delete(self.owned(editions))
        with contextlib.suppress(FileNotFoundError):
            if self.store.read(self.sessions):
                self.store.write(self.sessions, b"")
        left = self.store.sizes()
        ours = {self.manifest, self.card}
        if report_files(self):
            self.store.write(self.report, _report_of_none(self))
            ours.add(self.report)
        hidden = (".run", self.assets)
        others = [name for name in left if name not in ours and name.split("/")[0] not in hidden]
        if others:
            logger.info("Not changed, as they are not part of this dataset: %s.", listing(sorted(others)))

    def forget(self, shards: Iterable[Shard], edition: str, listed: Collection[str]) -> None:
        """Remove what receipts there are of shards that will be written anew: until then they do not exist."""
        self.store.delete(name for shard in shards if (name := self.receipt(shard, edition)) in listed)

    def add_session(self, line: str) -> None:
        """Keep what there is to say of a session that wrote something."""
        try:
            before = self.store.read(self.sessions)
        except FileNotFoundError:
            before = b""
        self.store.write(self.sessions, before + line.encode() + b"\n")

    def keep_warnings(self, edition: str, warnings: Sequence[RunWarning] | None) -> None:
        """Keep what was warned of when a run began, in place of what was kept before; None, of one that goes on,
        changes nothing."""
        if warnings or (warnings is not None and self.kept_warnings(edition)):
            kept = Warned(edition=edition, warnings=tuple(warnings))
            self.store.write(self.warnings, kept.model_dump_json(indent=1).encode())

    def kept_warnings(self, edition: str) -> tuple[RunWarning, ...]:
        """What was warned of when a run began; nothing where that cannot be read."""
        with contextlib.suppress(FileNotFoundError, ValueError, PipelineError):
            kept = Warned.model_validate_json(self.store.read(self.warnings))
            return kept.warnings if kept.edition == edition else ()
        return ()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: walking over 10,000 receipts again and again, it would triple the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@uncollected()
def read_receipts(folder: OutputFolder, sizes: Iterable[str] | None = None) -> tuple[dict[str, Receipt], list[str]]:
    """All receipts by the stem of their file, sorted, and the names of files that are no receipts or were altered.

    `sizes` is the folder's listing, where that is at hand.
    """
    listed = folder.store.sizes() if sizes is None else sizes
    names = sorted(name for name in listed if name.startswith(f"{folder.receipts}/") and name.endswith(".json"))
    receipts, broken = {}, []
    for name, content in folder.store.read_all(names).items():
        path = Path(name)
        try:
            receipts[path.stem] = Receipt.of_json(from_json(content))
        except ValueError:  # no JSON, no receipt, or an altered one
            broken.append(path.name)
    return receipts, broken


@uncollected()
def committed(
    folder: OutputFolder, edition: str, shards: Iterable[Shard], sizes: Mapping[str, int] | None = None
) -> dict[str, Receipt]:
    """The receipts of some shards, by their names, whose files are there with the sizes they state.

    `sizes` is the folder's listing, where that is at hand.
    """
    sizes = folder.store.sizes() if sizes is None else sizes
    found, _ = read_receipts(folder, sizes)
    receipts = {shard.name: found.get(f"{shard.name}-{edition}") for shard in shards}
    return {
        name: receipt
        for name, receipt in receipts.items()
        if receipt
        and (receipt.run_id, receipt.shard) == (edition[:16], name)
        and all(sizes.get(entry.path) == entry.bytes for entry in receipt.files)
    }


def receipts_digest(receipts: Mapping[str, Receipt]) -> str:
    """One digest of all receipts; it changes whenever any stored byte does."""
    total = hashlib.sha256()
    for name in sorted(receipts):
        total.update(receipts[name].digest.encode())
    return total.hexdigest()


def _report_says(folder: OutputFolder, key: str) -> str | None:
    """What the head of the report says of itself, None where there is no report that says it."""
    with contextlib.suppress(OSError), folder.store.open(folder.report) as file:
        found = re.search(rf'<meta name="{key}" content="([\w.= -]*)">'.encode(), file.read(4096))
        return found[1].decode() if found else None
    return None


def reported_receipts(folder: OutputFolder) -> str | None:
    """The digest of the receipts that the report is of, None where there is no report that says."""
    return _report_says(folder, "fgsm-receipts")


def reported_titles(folder: OutputFolder) -> str:
    """The digest of the titles that the report shows, "" where none were given."""
    return _report_says(folder, "fgsm-titles") or ""


def reported_assets(folder: OutputFolder) -> set[tuple[str, str]]:
    """What the report lists as written by it: the name of a picture in the folder, and its sha256.

    While pictures are replaced it lists the old and the new content of a name.
    """
    pairs = (entry.partition("=") for entry in (_report_says(folder, "fgsm-assets") or "").split())
    return {(f"{folder.assets}/{name}", digest) for name, _, digest in pairs}


def report_files(folder: OutputFolder) -> list[str]:
    """The pictures that are still as the report wrote them, and last the report, if it is one of ours.

    Every other file in `assets/` is the user's: it is never published, replaced or deleted.
    """
    if reported_receipts(folder) is None:
        return []
    own = []
    for name, digest in sorted(reported_assets(folder)):
        with contextlib.suppress(FileNotFoundError):
            if hashlib.sha256(folder.store.read(name)).hexdigest() == digest:
                own.append(name)
    return [*own, folder.report]


def _report_of_none(folder: OutputFolder) -> bytes:
    """What stands for the report while the dataset is written anew; the pictures are still listed as the report's."""
    assets = " ".join(f"{PurePosixPath(name).name}={digest}" for name, digest in sorted(reported_assets(folder)))
    head = f'<meta name="fgsm-receipts" content=""><meta name="fgsm-assets" content="{assets}">'
    return f"<!doctype html>{head}<p>This dataset is being written anew; fgsm report makes its report.\n".encode()
