"""Datasets that lie: rows altered, and receipts and manifest made to agree."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output.card import write_summaries
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import read_manifest, run_id_of
from tests.conftest import fgsm_without_run as fgsm
from tests.conftest import (
    shard_path,
    without_run,
    write_sealed,
)

SHARD = "test-00001-of-00003"


FILE = f"eps-8/{SHARD}.parquet"


def cut_short_of(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def alter_a_byte_of(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)


def assert_found(named: str, out: Path, *arguments: str) -> None:
    """`fgsm verify` fails, and says so."""
    result = fgsm("verify", out, *arguments)
    assert result.exit_code == 1
    assert named in result.stderr


def forge(out: Path, edit: Callable[[dict[str, list[Any]]], None], file: str = FILE, **counts: int) -> None:
    """Rewrite rows of a file and make receipt and manifest agree, as a bug or a liar would.

    Keyword arguments are other counts of the largest epsilon.
    """
    path = shard_path(out, file)
    receipt_path = out / f".run/receipts/{path.stem}.json"
    table = pq.read_table(path)
    columns = table.to_pydict()
    edit(columns)
    rewrite(path, pa.table(columns, schema=table.schema))
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    receipt = json.loads(receipt_path.read_text())
    entry = next(entry for entry in receipt["files"] if without_run(entry["path"]) == file)
    entry.update(bytes=size, sha256=digest)
    receipt["counts"][-1].update(counts)
    for count in receipt["counts"]:
        count["confidence_sum"] = confidence_sum(columns, count["level"]) or count["confidence_sum"]
    write_sealed(receipt_path, receipt)
    agree(out)


def another_mistake(predictions: list[int], labels: list[int]) -> None:
    """Replace the first wrong prediction, of three classes, by the other wrong one: nothing else follows from it."""
    row = next(row for row, label in enumerate(labels) if predictions[row] != label)
    predictions[row] = 3 - labels[row] - predictions[row]


def confidence_sum(columns: dict[str, list[Any]], level: int) -> float:
    """The sum of a file's confidences at one epsilon, 0 where it has none of it; layout signs has them all."""
    if "attacks" not in columns:
        values = np.array(columns["confidence"], dtype=np.float32)  # as they are stored
        return float(np.nansum(values, dtype=np.float64)) if columns["epsilon"][-1] == level / 255 else 0.0
    if not level:
        return float(sum(columns["clean_confidence"]))
    entries = [entry for attacks in columns["attacks"] for entry in attacks or () if entry]
    return float(sum(entry["confidence"] for entry in entries if entry["epsilon"] == level / 255))


def rewrite(path: Path, table: pa.Table) -> None:
    """Write other rows into a Parquet file that says of itself what it did before."""
    footer = pq.read_metadata(path).metadata[b"fgsm"]
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"fgsm": footer.decode()})


def agree(out: Path) -> None:
    """Write manifest and card as they follow from the receipts."""
    folder = OutputFolder(out)
    manifest = read_manifest(folder)
    assert manifest is not None
    write_summaries(folder, manifest)


class Payload:
    """What a pickle runs when it is opened: it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


def with_own_id(content: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds, with the run id that follows from its identity, in the names of its files too."""
    renamed: dict[str, Any] = json.loads(json.dumps(content).replace(content["run_id"], run_id_of(content["identity"])))
    return renamed


def make_consistent(out: Path, content: dict[str, Any]) -> None:
    """Write an altered manifest, and receipts, with the run id, the names and the digests that they would have."""
    former, run_id = content["run_id"], run_id_of(content["identity"])
    write_sealed(out / "manifest.json", with_own_id(content))
    for path in (out / ".run/receipts").iterdir():
        write_sealed(path, json.loads(path.read_text().replace(former, run_id)))
    for path in list(out.rglob(f"*-{former}.*")):
        path.rename(path.with_name(path.name.replace(former, run_id)))
