"""The report: report.html and assets/*.png, for people who want to see what an attack did.

Counts and accuracies come from the manifest and are exact. What only rows can say (confidence of mistakes, flips,
examples) comes from a bounded sample of them, and the page says of how many. The page is one file that asks
nothing of the network. The same dataset gives the same bytes, but for the speed of the sessions that wrote it.
"""

import base64
import contextlib
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np
import yaml
from pydantic import BaseModel, ValidationError

from pipeline.core.errors import PipelineError
from pipeline.output.folder import OutputFolder, report_files, reported_assets
from pipeline.output.manifest import Manifest, current_manifest, without_folders
from pipeline.output.summary import human_bytes
from pipeline.report.findings import (
    Focus,
    accuracies,
    by_split,
    confusion,
    evaluator_names,
    flips,
    focus_on,
    focus_split,
    headline,
    model_name,
    percent,
    ratio,
    source_name,
    sureness,
    tiles,
    transfer_rate,
)
from pipeline.report.gallery import draw_sheet, make_groups, web_image
from pipeline.report.plots import Curve, Plot, Ridge, curves_plot, level_name, matrix_plot, ridges_plot
from pipeline.report.sample import SAMPLE_SHARDS, is_labelled, read_sample

# Rows of each split that are looked at: a share of them is known to within one percent, and they are read in a second.
SAMPLE_ROWS = 10_000
# Classes of the heat map, rows of the tables, and lines of a plot that can be told apart.
MOST_CLASSES, MOST_SKIPPED, MOST_SESSIONS, MOST_CURVES = 10, 20, 10, 8


class Session(BaseModel):
    """A line of `.run/sessions.jsonl`: how fast one session of generate was, `busy` as shares of what it could use."""

    images: int
    images_per_second: float
    device: str
    busy: dict[str, float]


def report(path: str | Path) -> str:
    """Make the report of what is in an output folder, whether or not it is complete.

    Returns:
        The path or address of report.html.

    Raises:
        ConfigError: there is no dataset of ours.
        PipelineError: one of its files cannot be read, or the disk refuses.
    """
    folder = OutputFolder(path)
    return write_report(folder, current_manifest(folder))


def write_report(folder: OutputFolder, manifest: Manifest) -> str:
    """Write report.html and assets/*.png; the former last, so that it stands for all of them.

    Args:
        folder: of the dataset.
        manifest: of the files that are there, as `current_manifest` gives it.

    Returns:
        The path or address of report.html.

    Raises:
        PipelineError: a file cannot be read, the disk refuses, or a file of others lies where one goes.
    """
    folder.store.refuse_links(folder.assets)
    folder.store.watch()
    view, pictures = _make(folder, manifest)
    written = {f"{folder.assets}/{name}": data for name, data in pictures.items()}
    own = set(report_files(folder))
    _refuse_foreign(folder, own, written)
    listed = {(name, hashlib.sha256(data).hexdigest()) for name, data in written.items()}
    if not listed <= reported_assets(folder):
        # Listed before they are written: a picture that a killed report leaves behind is still known as ours.
        _write_page(folder, view, "", listed | reported_assets(folder))
    former = own - {folder.report} - written.keys()
    if folder.store.local:
        folder.store.delete(former)
    else:  # a late delete could take a picture of another run; listed they are still known as ours
        listed |= {(name, digest) for name, digest in reported_assets(folder) if name in former}
    for name, data in written.items():
        folder.store.write(name, data)
    _write_page(folder, view, manifest.receipts, listed)
    return folder.store.at(folder.report)


def _refuse_foreign(folder: OutputFolder, own: set[str], written: Mapping[str, bytes]) -> None:
    """Refuse to replace a file that a report did not write; one with the same content stays as it is."""
    there = folder.store.sizes()
    for name in (folder.report, *written):
        if name in there and name not in own and folder.store.read(name) != written.get(name):
            raise PipelineError(
                f"{folder.store.at(name)} is not a file that a report wrote, or was changed since; move or delete it, "
                "then run fgsm report again."
            )


def _write_page(folder: OutputFolder, view: Mapping[str, Any], receipts: str, listed: set[tuple[str, str]]) -> None:
    """Write report.html as of some receipts, none while it is not finished, with the pictures that belong to it."""
    assets = " ".join(f"{PurePath(name).name}={digest}" for name, digest in sorted(listed))
    folder.store.write(folder.report, _template().render(view, receipts=receipts, assets=assets).encode())


def _make(folder: OutputFolder, manifest: Manifest) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the page shows, and the pictures by the names of their files."""
    counts = by_split(manifest)
    samples = [sample for split in counts if len(sample := read_sample(folder, manifest, split, SAMPLE_ROWS))]
    view: dict[str, Any] = {
        "manifest": manifest,
        "planned": manifest.planned,
        "stored": manifest.stored,
        "victim": model_name(manifest.config["model"]),
        "source": source_name(manifest.config["source"]),
        "evaluators": evaluator_names(manifest),
        "labelled": is_labelled(manifest),
        "counts": counts,
        "samples": samples,
        "most_shards": SAMPLE_SHARDS,
        "shuffled": manifest.resolved.source.shuffle,
        "skipped": manifest.skipped[:MOST_SKIPPED],
        "bytes": sum(file.bytes for file in manifest.files),
        "config": yaml.safe_dump(without_folders(manifest.config), sort_keys=False, allow_unicode=True),
        "sessions": _sessions(folder),
        "focus": None,
        "groups": [],
        "plots": {},
    }
    if not samples:
        return view, {}
    chosen = focus_split([sample.split for sample in samples])
    focus = focus_on(manifest, next(sample for sample in samples if sample.split == chosen))
    groups = make_groups(folder, manifest, focus.sample, focus.shown, focus.name)
    plots = _plots(focus, manifest)
    view |= {"focus": focus, "groups": groups, "plots": plots}
    pictures = {f"{name}.png": plot.light for name, plot in plots.items()}
    pictures["examples.png"] = draw_sheet(groups)
    return view, pictures


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # Names of classes come from datasets: nothing of them may become markup.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "accuracies": accuracies,
        "thousands": lambda number: f"{number:,}",
        "data": lambda image, kind: f"data:image/{kind};base64,{base64.b64encode(image).decode()}",
        "flips": flips,
        "headline": headline,
        "level": level_name,
        "percent": percent,
        "ratio": ratio,
        "size": human_bytes,
        "sureness": sureness,
        "tiles": tiles,
        "transfer_rate": transfer_rate,
        "web_image": web_image,
    }
    return environment.get_template("report.html.jinja")


def _plots(focus: Focus, manifest: Manifest) -> dict[str, Plot]:
    """The plots by the names of their files."""
    sample, words = focus.sample, focus.words
    curves = _curves(focus, manifest)
    lines = [f"{curve.name}, {percent(curve.values[0])} clean, {percent(curve.values[-1])} last" for curve in curves]
    plots = {
        "accuracy": curves_plot(
            sample.levels, curves, words.share, f"{words.share.capitalize()} against epsilon. {'; '.join(lines)}."
        ),
        "confidence": _ridges_plot(focus),
    }
    if sample.success[focus.index].any():
        plots["confusion"] = _confusion_plot(focus)
    if any(counts.exposed for subset in focus.subsets.values() for counts in subset.evaluators.values()):
        plots["transfer"] = _transfer_plot(focus)
    return plots


def _curves(focus: Focus, manifest: Manifest) -> list[Curve]:
    """A line for each model and split, from the manifest, and how sure the victim is on the split in focus."""
    sample, counts = focus.sample, by_split(manifest)
    models = [focus.victim, *focus.evaluators]
    curves = []
    if sample.labelled:
        splits = list(counts) if len(counts) * len(models) <= MOST_CURVES else [sample.split]
        for dashes, split in enumerate(splits):
            shares = zip(*map(accuracies, counts[split]), strict=True)
            for colour, (model, values) in enumerate(zip(models, shares, strict=True)):
                curves.append(Curve(f"{model}, {split}" if len(counts) > 1 else model, values, colour, dashes))
    else:
        curves.append(Curve(f"{focus.victim}, answers as when clean", tuple(sample.right.mean(1).tolist()), 0))
    own = counts[sample.split]
    if sample.aim == "target":
        reached = (ratio(subset.fooled, subset.rows) if subset.level else None for subset in own)
        curves.append(Curve("called the target", tuple(reached), "wrong", 1))
    sure = tuple(ratio(subset.confidence_sum, subset.rows) for subset in own)
    name = "mean confidence of the victim"
    return [*curves, Curve(f"{name}, {sample.split}" if len(counts) > 1 else name, sure, "soft", 2)]


def _ridges_plot(focus: Focus) -> Plot:
    sample, words = focus.sample.at(focus.shown), focus.words
    ridges = [
        Ridge(level_name(level), sample.confidence[i][sample.right[i]], sample.confidence[i][~sample.right[i]])
        for i, level in enumerate(sample.levels)
    ]
    clean, here = (sureness(focus.sample, index) for index in (0, focus.index))
    alt = (
        f"How confidence is spread at each epsilon. Its mean where answers are {words.wrong}: "
        f"{percent(clean.wrong, 0)} clean, {percent(here.wrong, 0)} at {level_name(focus.level)}; "
        f"where they are {words.right}: {percent(clean.right, 0)} and {percent(here.right, 0)}."
    )
    return ridges_plot(ridges, (words.right, words.wrong), alt)


def _confusion_plot(focus: Focus) -> Plot:
    classes, shares = confusion(focus, MOST_CLASSES)
    names = [focus.name(index) for index in classes]
    columns = [*names, "all others"]
    if not np.nansum(shares[:, -1]):
        columns, shares = names, shares[:, :-1]
    first, level = flips(focus)[0], level_name(focus.level)
    alt = (
        f"Heat map of what {len(classes)} classes are taken for at {level}. The most frequent flip: {first.before} "
        f"becomes {first.after}, {percent(first.share, 0)} of the images called {first.before} when clean."
    )
    kept = np.eye(*shares.shape) > 0
    return matrix_plot(shares, (names, columns), ("when clean", f"at {level}, % of the row"), alt, kept)


def _transfer_plot(focus: Focus) -> Plot:
    levels = focus.sample.levels[1:]
    rates = np.array(
        [[transfer_rate(counts) for counts in focus.subsets[level].evaluators.values()] for level in levels],
        dtype=np.float64,
    )
    row, column = np.unravel_index(np.nan_to_num(rates).argmax(), rates.shape)
    alt = (
        f"Transfer matrix: of the images that fool {focus.victim}, the share that fools another model too. The highest "
        f"is {percent(float(rates[row, column]))}, of {focus.evaluators[column]} at {level_name(levels[row])}."
    )
    names = ([level_name(level) for level in levels], focus.evaluators)
    return matrix_plot(rates, names, ("epsilon", "transferred, %"), alt)


def _sessions(folder: OutputFolder) -> list[Session]:
    """The last sessions that wrote something. A line that cannot be read is not worth a failure."""
    sessions = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in folder.store.read(folder.sessions).decode().splitlines():
            with contextlib.suppress(ValidationError):
                sessions.append(Session.model_validate_json(line))
    return sessions[-MOST_SESSIONS:]
