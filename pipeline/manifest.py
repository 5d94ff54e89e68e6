"""The manifest: what the dataset is and how it came about, and the plan that follows from it."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.config import Config, parse_config
from pipeline.errors import PipelineError, first_line
from pipeline.outputs import FileEntry, OutputFolder, Record
from pipeline.plan import Plan, make_plan

# Raised when the stored form changes: it is part of the identity of every run.
FORMAT_VERSION = 1


class Subset(Record):
    """What the rows of one epsilon in one split add up to; `level` 0 is clean."""

    split: str
    level: int
    rows: int
    bytes: int
    labelled: int
    correct: int
    fooled: int
    confidence_sum: float


class Manifest(Record):
    """`manifest.json`: what the dataset is, and how it came about."""

    format: int = FORMAT_VERSION
    run_id: str
    complete: bool = False
    config: dict[str, Any]
    identity: dict[str, Any]
    versions: dict[str, str]
    features: dict[str, Any]
    dataset_classes: tuple[str, ...]
    recorded_classes: tuple[str, ...] | None
    to_model: tuple[int, ...]
    to_recorded: tuple[int, ...]
    split_rows: dict[str, int]
    shape: tuple[int, int, int]
    receipts: str = ""
    rows: int = 0
    subsets: tuple[Subset, ...] = ()
    zero_sign_share: float = 0.0
    files: tuple[FileEntry, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()

    @property
    def resolved(self) -> Config:
        """The config with every `auto` resolved."""
        return parse_config(self.config)

    @property
    def plan(self) -> Plan:
        """The plan of the run, rebuilt from what the manifest records."""
        return plan_of(self.resolved, self.split_rows)


def read_manifest(folder: OutputFolder) -> Manifest | None:
    """The manifest of a run, None where there is none.

    Raises:
        PipelineError: it cannot be read as one.
    """
    try:
        return Manifest.model_validate_json(folder.manifest.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        raise PipelineError(
            f"{folder.manifest} cannot be read ({first_line(error)}); restore it, or start over with --overwrite."
        ) from None


def plan_of(config: Config, split_rows: Mapping[str, int]) -> Plan:
    """The plan of a config over splits of so many rows."""
    return make_plan(
        split_rows,
        shuffle=config.source.shuffle,
        seed=config.runtime.seed,
        limit=config.source.limit,
        images_per_shard=config.output.images_per_shard,
        batch_size=config.runtime.batch_size,
    )
