"""The output folder: what is where in it, who holds it, and the receipts that make its shards true.

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
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError, PipelineError, write_failure
from pipeline.plan import Shard

# What names of splits and files are made of: receipts and manifests are data, which others may have written, and a name
# out of them is never a way out of the folder.
STEM = r"^\w[\w.-]*$"
SHARD_FILE = r"^(clean|signs|eps-[0-9]{1,3})/\w[\w.-]*\.parquet$"

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


def refuse_links(root: Path) -> None:
    """Refuse a folder in which a link leads elsewhere, before anything is written, deleted or published through it.

    A dataset that comes from elsewhere may hold any link: `.run` to a home folder, or assets/x.png to a private key.

    Raises:
        ConfigError: there is one.
    """
    own = root.resolve()
    waiting = [root]
    while waiting:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    if not Path(entry.path).resolve().is_relative_to(own):
                        raise ConfigError(
                            f"{entry.path} is a link that leads out of the dataset's folder, through which nothing is "
                            "written, deleted or published; put what it leads to in its place, or remove it."
                        )
                elif entry.is_dir():
                    waiting.append(Path(entry.path))


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Record):
    """One Parquet file of a receipt."""

    path: str = Field(pattern=SHARD_FILE)
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class EvaluatorCounts(Record):
    """What an evaluator says of images at one epsilon: how far the victim's mistakes are its own.

    Of labelled images, `correct` are predicted right, and `fooled` right when clean and wrong now. Of those that
    fool the victim, `exposed` are ones that the evaluator gets right when clean, and `transferred` ones that fool
    it too: transferred / exposed is the rate at which the attack transfers.
    """

    correct: int = 0
    fooled: int = 0
    exposed: int = 0
    transferred: int = 0

    def __add__(self, other: "EvaluatorCounts") -> "EvaluatorCounts":
        return EvaluatorCounts(**{key: getattr(self, key) + getattr(other, key) for key in type(self).model_fields})


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

    level: int
    rows: int
    labelled: int
    correct: int
    fooled: int
    confidence_sum: float
    evaluators: dict[str, EvaluatorCounts] = {}


class SkippedRow(Record):
    """A source row that could not be decoded; `position` is its place in the shard."""

    position: int
    source_index: int
    reason: str


class Receipt(Record):
    """What a committed shard holds. Nothing in it depends on when or how fast it was written."""

    run_id: str
    shard: str = Field(pattern=STEM)
    split: str = Field(pattern=STEM)
    planned: int
    rows: int
    skipped: tuple[SkippedRow, ...]
    zero_sign_share: float
    counts: tuple[LevelCounts, ...]
    files: tuple[FileEntry, ...]
    versions: dict[str, str]


class OutputFolder:
    """The output folder: where things are in it, and who holds it."""

    def __init__(self, root: Path) -> None:
        root = root.expanduser()
        self.root = root
        self.manifest = root / "manifest.json"
        self.card = root / "README.md"
        self.report = root / "report.html"
        self.assets = root / "assets"
        self.run = root / ".run"
        self.receipts = self.run / "receipts"
        self.scratch = self.run / "tmp"
        self.sessions = self.run / "sessions.jsonl"

    def path(self, file: str) -> Path:
        return self.root / file

    def receipt(self, shard: str) -> Path:
        return self.receipts / f"{shard}.json"

    def check_usable(self) -> None:
        """Refuse a folder that holds something else, before anything is written.

        Raises:
            ConfigError: it is a file, or a folder with other content than a run's.
        """
        for folder in (self.root, *self.root.parents):
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"output.path: {folder} is a file, not a folder.")
        if self.root.is_dir() and not self.manifest.is_file() and not self.receipts.is_dir():
            others = [entry.name for entry in self.root.iterdir() if not entry.name.startswith(".")]
            if others:
                raise ConfigError(
                    f"output.path: {self.root} is not empty and holds no run (there is {others[0]}); "
                    "choose another folder."
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against a second run; the operating system lets go when the process ends.

        Raises:
            ConfigError: a link in it leads elsewhere.
            PipelineError: another process holds it, or it cannot be written.
        """
        refuse_links(self.root)
        try:
            self.receipts.mkdir(parents=True, exist_ok=True)
            lock = (self.run / "lock").open("a+")
        except OSError as error:
            raise write_failure(self.root, error) from None
        with lock:
            try:
                # lockf, not flock: a worker inherits an flock, and would hold the folder for the seconds that it
                # outlives a killed run.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise write_failure(self.root, error) from None  # a file system without locks
                lock.seek(0)
                holder = lock.read().strip()
                raise PipelineError(f"{self.root} is in use by another run (process {holder}); wait for it.") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            shutil.rmtree(self.scratch, ignore_errors=True)
            yield

    def clear(self) -> None:
        """Remove the run that is here: its receipts first and its manifest last, so that what is left of an
        interrupted removal is still known as a run.

        Raises:
            PipelineError: the disk refused.
        """
        with writing(self.root):
            shutil.rmtree(self.receipts)
            self.receipts.mkdir()
            for subset in (self.root / subset_name(0), self.root / SIGNS, *self.root.glob("eps-[0-9]*")):
                shutil.rmtree(subset, ignore_errors=True)
            self.sessions.unlink(missing_ok=True)
            shutil.rmtree(self.assets, ignore_errors=True)
            self.report.unlink(missing_ok=True)
            self.card.unlink(missing_ok=True)
            self.manifest.unlink(missing_ok=True)


def read_receipts(folder: OutputFolder) -> tuple[dict[str, Receipt], list[str]]:
    """All receipts by the name of their file, sorted, and the names of files that are no receipts."""
    receipts, broken = {}, []
    for path in sorted(folder.receipts.glob("*.json")):
        try:
            receipts[path.stem] = Receipt.model_validate_json(path.read_bytes())
        except ValidationError:
            broken.append(path.name)
    return receipts, broken


def committed(folder: OutputFolder, run_id: str, shards: Iterable[Shard]) -> dict[str, Receipt]:
    """The receipts of some shards whose files are there with the sizes they state, by names and sizes alone."""
    found, _ = read_receipts(folder)
    receipts = {shard.name: found[shard.name] for shard in shards if shard.name in found}
    sizes: dict[str, int] = {}
    for subset in {Path(entry.path).parent for receipt in receipts.values() for entry in receipt.files}:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder.root / subset) as entries:
            sizes.update({f"{subset}/{entry.name}": entry.stat().st_size for entry in entries})
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
        with folder.report.open(encoding="utf-8") as file:
            found = re.search(r'<meta name="fgsm-receipts" content="(\w*)">', file.read(4096))
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


def sync_folder(folder: Path) -> None:
    """Force a rename to disk: the entry belongs to the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file as a whole, so that a reader or a crash sees the old one or the new one.

    Raises:
        PipelineError: the disk refused.
    """
    with writing(path):
        scratch = path.with_name(f".{path.name}.tmp")
        try:
            # A new file: one that is there is left from a crash, or a link to what must not be written.
            scratch.unlink(missing_ok=True)
            with scratch.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
        finally:
            scratch.unlink(missing_ok=True)
        sync_folder(path.parent)
