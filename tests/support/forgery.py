"""Datasets that lie: rows altered, and receipts and manifest made to agree."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.scores import count
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
    """`fgsm verify` fails, and what it says matches."""
    result = fgsm("verify", out, *arguments)
    assert result.exit_code == 1
    assert re.search(named, result.stderr)


def forge(out: Path, edit: Callable[[dict[str, list[Any]]], None], file: str = FILE, **changed: int) -> None:
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
    receipt["counts"][-1].update(changed)
    for counts in receipt["counts"]:
        if "attacks" in columns or counts["subset"] == file.partition("/")[0]:
            counts["confidence_sum"] = confidence_sum(columns, counts) or counts["confidence_sum"]
    write_sealed(receipt_path, receipt)
    agree(out)


def forge_run(out: Path, edits: Mapping[str, Callable[[dict[str, list[Any]]], None]]) -> None:
    """Rewrite rows of several subsets of layout images, by their names, and make all else follow from the rows.

    The rows' own columns follow from what their own models are said to predict, and so do the counts of the receipt.
    """
    manifest = read_manifest(OutputFolder(out))
    assert manifest is not None
    models, several = [*manifest.spaces], len(manifest.spaces) > 1
    receipt_path = shard_path(out, f".run/receipts/{SHARD}.json")
    receipt, tables = json.loads(receipt_path.read_text()), []
    for index, variant in enumerate(manifest.variants):
        path = shard_path(out, f"{variant.subset}/{SHARD}.parquet")
        table = pq.read_table(path)
        if variant.subset in edits:
            columns = table.to_pydict()
            edits[variant.subset](columns)
            own = variant.model or models[0]
            if several:
                columns |= {name: columns[f"{name}_{own}"] for name in ("prediction", "correct")}
            table = pa.table(columns, schema=table.schema)
            rewrite(path, table)
            size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
            receipt["files"][index].update(bytes=size, sha256=digest)
        tables.append(table)
        zeros = receipt["counts"][index]["zero_signs"]
        receipt["counts"][index] = count(variant, table, tables[0], models, zeros).model_dump()
    write_sealed(receipt_path, receipt)
    agree(out)


def another_mistake(predictions: list[int], labels: list[int]) -> None:
    """Replace the first wrong prediction, of three classes, by the other wrong one: nothing else follows from it."""
    row = next(row for row, label in enumerate(labels) if predictions[row] != label)
    predictions[row] = 3 - labels[row] - predictions[row]


def confidence_sum(columns: dict[str, list[Any]], counts: dict[str, Any]) -> float:
    """The sum of a file's confidences in one variant, 0 where it has none of it; layout signs has them all."""
    if "attacks" not in columns:
        values = np.array(columns["confidence"], dtype=np.float32)  # as they are stored
        return float(np.nansum(values, dtype=np.float64)) if columns["epsilon"][-1] == counts["level"] / 255 else 0.0
    if not counts["level"]:
        return float(sum(columns["clean_confidence"]))
    entries = [entry for attacks in columns["attacks"] for entry in attacks or () if entry]
    own = (counts["level"] / 255, counts["attack"], counts["model"])
    return float(sum(e["confidence"] for e in entries if (e["epsilon"], e["attack"], e["model"]) == own))


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
