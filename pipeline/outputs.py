"""The output folder: what is where in it, and the receipts that make its shards true.

OUTPUT/manifest.json                            what the dataset is
OUTPUT/README.md                                the card, which makes the subsets
OUTPUT/clean/test-00000-of-00004.parquet
OUTPUT/eps-8/test-00000-of-00004.parquet
OUTPUT/signs/test-00000-of-00004.parquet        in layout signs, instead of the two above
OUTPUT/report.html, OUTPUT/assets/*.png         what it looks like
OUTPUT/.run/receipts/test-00000-of-00004.json   a shard without a receipt does not exist
OUTPUT/.run/sessions.jsonl                      how fast each session that wrote something was
"""

import contextlib
import gc
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import is_address
from pipeline.errors import ConfigError
from pipeline.origins import LeftOut
from pipeline.plan import Shard
from pipeline.stores import open_store

# What names of splits and files are made of: receipts and manifests are data, which others may have written, and a name
# out of them is never a way out of the folder.
STEM = r"^\w[\w.-]*$"
SHARD_FILE = r"^(clean|signs|eps-[0-9]{1,3})/\w[\w.-]*\.parquet$"
# Numbers there are such that one can compute with them.
Whole = Annotated[int, Field(ge=0, lt=2**63)]

Flags = NDArray[np.bool_]

# The one subset of layout signs.
SIGNS = "signs"


def subset_name(level: int) -> str:
    """The subset that holds one epsilon in grey levels, 0 for clean, in layout images."""
    return f"eps-{level}" if level else "clean"


def stored_subsets(layout: str, levels: Iterable[int]) -> tuple[str, ...]:
    """The subsets that a layout stores: each is a folder, and a config of the Hub's.

    Args:
        layout: `images`, a subset for each epsilon, or `signs`, one for all of them.
        levels: 0 and every epsilon in grey levels.
    """
    return (SIGNS,) if layout == SIGNS else tuple(map(subset_name, levels))


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


def shard_file(subset: str, shard: Shard) -> str:
    """A shard's file relative to the output folder."""
    return f"{subset}/{shard.name}.parquet"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Record):
    """One Parquet file of a receipt."""

    path: str = Field(pattern=SHARD_FILE)
    rows: Whole
    bytes: Whole
    sha256: str


class EvaluatorCounts(Record):
    """What an evaluator says of images at one epsilon: how far the victim's mistakes are its own.

    Of labelled images, `correct` are predicted right, and `fooled` right when clean and wrong now. Of those that
    fool the victim, `exposed` are ones that the evaluator gets right when clean, and `transferred` ones that fool
    it too: transferred / exposed is the rate at which the attack transfers.
    """

    correct: Whole = 0
    fooled: Whole = 0
    exposed: Whole = 0
    transferred: Whole = 0

    def __add__(self, other: "EvaluatorCounts") -> "EvaluatorCounts":
        # Not checked: of numbers that others wrote the sum may be more than any of them may.
        return EvaluatorCounts.model_construct(
            **{key: getattr(self, key) + getattr(other, key) for key in type(self).model_fields}
        )


def count_evaluator(clean: Flags, now: Flags, fooled: Flags) -> EvaluatorCounts:
    """Count what an evaluator says of M labelled images at one epsilon.

    Args:
        clean: (M,) bool, whether it is right about the clean image.
        now: (M,) bool, whether it is right about this one.
        fooled: (M,) bool, whether this one fools the victim.
    """
    lost = clean & ~now
    return EvaluatorCounts(
        correct=int(now.sum()),
        fooled=int(lost.sum()),
        exposed=int((fooled & clean).sum()),
        transferred=int((fooled & lost).sum()),
    )


class LevelCounts(Record):
    """What a shard's images at one epsilon add up to; `level` 0 is clean.

    `labelled` of them have a label, and `correct` of those are predicted right; `fooled` counts true values;
    `confidence_sum` over `rows` is the mean confidence; `evaluators` by their ids.
    """

    level: Whole
    rows: Whole
    labelled: Whole
    correct: Whole
    fooled: Whole
    confidence_sum: float
    evaluators: dict[str, EvaluatorCounts] = {}


class SkippedRow(Record):
    """A source row that could not be decoded; `position` is its place in the shard."""

    position: Whole
    source_index: Whole
    reason: str


class Receipt(Record):
    """What a committed shard holds. Nothing in it depends on when or how fast it was written."""

    run_id: str
    shard: str = Field(pattern=STEM)
    split: str = Field(pattern=STEM)
    planned: Whole
    rows: Whole
    skipped: tuple[SkippedRow, ...]
    zero_sign_share: float
    counts: tuple[LevelCounts, ...]
    files: tuple[FileEntry, ...]
    versions: dict[str, str]
    left_out: tuple[LeftOut, ...] = ()


class OutputFolder:
    """The output folder, on a disk or in an object store: the names of things in it, over the store that holds them."""

    manifest, card, report = "manifest.json", "README.md", "report.html"
    assets, receipts = "assets", ".run/receipts"
    sessions = ".run/sessions.jsonl"

    def __init__(self, root: str | Path) -> None:
        self.store = open_store(root)
        # For messages.
        self.root = self.store.root

    def receipt(self, shard: str) -> str:
        return f"{self.receipts}/{shard}.json"

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
        entries = self.store.entries()
        others = [name for name in entries if not name.startswith(".")]
        if others and not {self.manifest, ".run"} & set(entries):
            raise ConfigError(
                f"output.path: {self.root} is not empty and holds no run (there is {others[0]}); choose another folder."
            )

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder against a second run.

        Raises:
            ConfigError: a link in it leads elsewhere.
            PipelineError: another process holds it, or it cannot be written.
        """
        return self.store.held()

    def clear(self) -> None:
        """Remove the run that is here: its receipts first and its manifest last, so that what is left of an
        interrupted removal is still known as a run.

        Raises:
            PipelineError: the disk refused.
        """
        names = sorted(self.store.sizes())
        self.store.delete(name for name in names if name.startswith(f"{self.receipts}/"))
        ours = re.compile(rf"({subset_name(0)}|{SIGNS}|eps-[0-9][^/]*|{self.assets})/[^/]+$")
        self.store.delete(name for name in names if ours.match(name))
        self.store.delete([self.sessions, self.report, self.card])
        self.store.delete([self.manifest])

    def forget(self, shards: Iterable[Shard]) -> None:
        """Remove what receipts there are of shards that will be written anew: until then they do not exist."""
        self.store.delete([self.receipt(shard.name) for shard in shards])

    def add_session(self, line: str) -> None:
        """Keep what there is to say of a session that wrote something."""
        try:
            before = self.store.read(self.sessions)
        except FileNotFoundError:
            before = b""
        self.store.write(self.sessions, before + line.encode() + b"\n")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which would walk over all that has been read so far again and again: with 10,000
    receipts that is two thirds of the time, and there is no garbage among them.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@uncollected()
def read_receipts(folder: OutputFolder, sizes: Iterable[str] | None = None) -> tuple[dict[str, Receipt], list[str]]:
    """All receipts by the name of their file, sorted, and the names of files that are no receipts.

    Args:
        folder: of the dataset.
        sizes: its listing, where that is at hand.
    """
    there = folder.store.sizes() if sizes is None else sizes
    names = sorted(name for name in there if name.startswith(f"{folder.receipts}/") and name.endswith(".json"))
    receipts, broken = {}, []
    for name, content in folder.store.read_all(names).items():
        path = Path(name)
        try:
            receipts[path.stem] = Receipt.model_validate_json(content)
        except ValidationError:
            broken.append(path.name)
    return receipts, broken


@uncollected()
def committed(folder: OutputFolder, run_id: str, shards: Iterable[Shard]) -> dict[str, Receipt]:
    """The receipts of some shards whose files are there with the sizes they state, by names and sizes alone."""
    sizes = folder.store.sizes()
    found, _ = read_receipts(folder, sizes)
    receipts = {shard.name: found[shard.name] for shard in shards if shard.name in found}
    return {
        name: receipt
        for name, receipt in receipts.items()
        if receipt.run_id == run_id and all(sizes.get(entry.path) == entry.bytes for entry in receipt.files)
    }


def receipts_digest(receipts: Mapping[str, Receipt]) -> str:
    """One digest of all receipts; it changes whenever any stored byte does."""
    total = hashlib.sha256()
    for name in sorted(receipts):
        total.update(receipts[name].model_dump_json().encode())
    return total.hexdigest()


def reported_receipts(folder: OutputFolder) -> str | None:
    """The digest of the receipts that the report is of, None where there is no report that says."""
    try:
        with folder.store.open(folder.report) as file:
            found = re.search(rb'<meta name="fgsm-receipts" content="(\w*)">', file.read(4096))
    except OSError:
        return None
    return found[1].decode() if found else None
