"""The report: report.html and assets/*.png, for people who want to see what an attack did.

Counts and accuracies come from the manifest and are exact. What only rows can say (confidence of mistakes, examples)
comes from a bounded sample of them, and the page says of how many. The page is one file that asks
nothing of the network. The same dataset gives the same bytes, but for the speed of the sessions that wrote it.

It begins with what is claimed of adversarial images, each with a figure: the picture, the confidence of mistakes, the
transfer to other models, and the defence, as far as the dataset can say something of it. What follows is to look up.
"""

import base64
import contextlib
import hashlib
import logging
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup, escape
from pydantic import BaseModel, ValidationError

from pipeline.core.errors import PipelineError
from pipeline.core.variants import maker
from pipeline.output.folder import OutputFolder, report_files, reported_assets
from pipeline.output.manifest import Manifest, current_manifest, without_folders
from pipeline.output.summary import human_bytes
from pipeline.output.transfer import few_right
from pipeline.reporting.defence import RULE, Defence, columns, read_defence, statements, tabulate
from pipeline.reporting.findings import (
    Focus,
    accuracy,
    by_split,
    focus_on,
    headline,
    images_of,
    matrices,
    mistaken,
    noise_levels,
    percent,
    ratio,
    source_name,
    sureness,
    who_travels,
)
from pipeline.reporting.gallery import draw_sheet, hero, make_groups, web_image
from pipeline.reporting.plots import (
    RIGHT,
    SOFT,
    WRONG,
    Curve,
    draw_curves,
    draw_defence,
    draw_matrix,
    model_curve,
    variant_name,
)
from pipeline.reporting.sample import SAMPLE_SHARDS, is_labelled, read_sample

# Rows of each split that are looked at: a share of them is known to within one percent, and they are read in a second.
SAMPLE_ROWS = 10_000
# Rows of the tables.
MOST_SKIPPED, MOST_SESSIONS = 20, 10

logger = logging.getLogger(__name__)


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
    """Write assets/*.png and then report.html, which stands for all of them; returns where that is.

    The manifest is of the files that are there, as `current_manifest` gives it.

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
    before = reported_assets(folder)
    if not listed <= before:
        # Listed before they are written: a picture that a killed report leaves behind is still known as ours.
        _write_page(folder, view, "", listed | before)
    former = own - {folder.report} - written.keys()
    if folder.store.local:
        folder.store.delete(former)
    else:  # a late delete could take a picture of another run; listed they are still known as ours
        listed |= {(name, digest) for name, digest in before if name in former}
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
    counts, matrix, defence = by_split(manifest), matrices(manifest), _defence(folder, manifest)
    samples = (read_sample(folder, manifest, split, SAMPLE_ROWS) for split in counts)
    sample = next((sample for sample in samples if sample), None)
    view: dict[str, Any] = {
        "manifest": manifest,
        "attack": ", ".join(dict.fromkeys(attack.title for attack in manifest.resolved.all_attacks.values())),
        "title": manifest.resolved.output.title,
        "titles": manifest.titles,
        "maker": lambda variant: maker(variant.attack, manifest.titles.get(variant.model)),
        "source": source_name(manifest.config["source"]),
        "labelled": is_labelled(manifest),
        "counts": counts,
        "images_of": partial(images_of, manifest),
        "pairs": [group[0] for group in next(iter(counts.values()), [])[1:]],
        "matrix": matrix,
        "most_shards": SAMPLE_SHARDS,
        "skipped": manifest.skipped[:MOST_SKIPPED],
        "config": yaml.safe_dump(without_folders(manifest.config), sort_keys=False, allow_unicode=True),
        "sessions": _sessions(folder),
        "focus": None,
        "groups": [],
        "plots": {},
        "defence": defence,
    }
    if sample is None:
        return view, {}
    focus = focus_on(manifest, sample)
    groups = make_groups(folder, manifest, focus.sample, focus.shown, focus.name)
    plots = {"accuracy": _draw(focus, *_accuracy(focus)), "confidence": _draw(focus, *_confidence(focus))}
    if defence and defence.seeds:
        plots["defence"] = _draw_defence(defence)
    view |= {"focus": focus, "groups": groups, "plots": plots}
    pictures = {f"{name}.png": data for name, (data, _) in plots.items()}
    pictures["examples.png"] = draw_sheet(groups)
    if matrix:
        pictures["transfer.png"] = draw_matrix(matrix[sample.split], focus.images)
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
    named = (
        *(columns, few_right, headline, hero, human_bytes, mistaken, percent),
        *(ratio, statements, tabulate, variant_name, web_image, who_travels),
    )
    environment.filters |= {function.__name__: function for function in named}
    environment.globals["RULE"] = RULE
    environment.filters |= {
        "thousands": lambda number: f"{number:,}",
        # A long name breaks where people would break it.
        "breakable": lambda name: Markup(escape(name).replace("_", Markup("_<wbr>"))),
        "data": lambda image, kind: f"data:image/{kind};base64,{base64.b64encode(image).decode()}",
    }
    return environment.get_template("report.html.jinja")


def _accuracy(focus: Focus) -> tuple[list[Curve], str]:
    """A line for each model and for noise, from the manifest; without labels the answers that stay, from the sample."""
    sample = focus.sample
    subsets = [focus.subsets[variant] for variant in sample.variants]
    if sample.labelled:
        shares = [tuple(accuracy(subset, model) for subset in subsets) for model in focus.models]
        curves = [model_curve(focus.titles[name], shares[index], index) for index, name in enumerate(focus.models)]
        noise = noise_levels(focus)
        floor = [noise.get(subset.level) for subset in subsets[1:]]
        if any(floor):
            values = (accuracy(subset, focus.model) if subset else None for subset in floor)
            curves.append(
                Curve(f"{focus.titles[focus.model]} on noise", (shares[0][0], *values), SOFT, "d", dashed=True)
            )
    else:
        curves = [model_curve(focus.titles[focus.model], tuple(sample.right.mean(1).tolist()), 0)]
    if sample.target is not None:
        reached = (ratio(subset.fooled, subset.rows) if subset.level else None for subset in subsets)
        curves.append(Curve("called the target", tuple(reached), WRONG, "X", dashed=True))
    return curves, sample.words[2]


def _confidence(focus: Focus) -> tuple[list[Curve], str]:
    """How sure the model is: of all answers, from the manifest, of right and of wrong ones, from the sample."""
    right, wrong = sureness(focus.sample)
    clean, *attacked = (focus.subsets[variant] for variant in focus.sample.variants)
    # Of clean images the first model's is counted.
    known = not np.isnan(focus.sample.confidence[0]).any()
    means = (ratio(subset.confidence_sum, subset.rows) for subset in attacked)
    every = (ratio(clean.confidence_sum, clean.rows) if known else None, *means)
    names = focus.sample.words
    curves = [Curve(names[0], right, RIGHT, "o"), Curve(names[1], wrong, WRONG, "X")]
    return [*curves, Curve("all", every, SOFT, "s", dashed=True)], "mean confidence"


def _draw(focus: Focus, curves: list[Curve], says: str) -> tuple[bytes, str]:
    """A plot as a PNG, and what it shows in words."""
    ends = [f"{curve.name}, {percent(curve.values[0])} clean, {percent(curve.values[-1])} last" for curve in curves]
    alt = f"{says.capitalize()} against epsilon, {focus.images}. {'; '.join(ends)}."
    return draw_curves(focus.sample.variants, curves, says), alt


def _defence(folder: OutputFolder, manifest: Manifest) -> Defence | None:
    """What training on the dataset bought. A file that cannot be read is not worth a failure."""
    try:
        return read_defence(folder, manifest.run_id)
    except PipelineError as error:
        logger.warning("The report is made without it: %s", error)
    return None


def _draw_defence(defence: Defence) -> tuple[bytes, str]:
    """The black-box errors of all arms as a PNG, and what it shows in words."""
    shares = {level: [defence.black_box(arm.id, level) for arm in defence.arms] for level in defence.levels}
    ends = [f"{arm.title}, {share or '-'}" for arm, share in zip(defence.arms, shares[defence.middle], strict=True)]
    alt = f"Error under FGSM of models never seen, after each training; at {defence.middle}/255: {'; '.join(ends)}."
    control = [arm.kind == "noise" for arm in defence.arms]
    return draw_defence([arm.title for arm in defence.arms], control, shares, "black-box error"), alt


def _sessions(folder: OutputFolder) -> list[Session]:
    """The last sessions that wrote something. A line that cannot be read is not worth a failure."""
    sessions = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in folder.store.read(folder.sessions).decode().splitlines():
            with contextlib.suppress(ValidationError):
                sessions.append(Session.model_validate_json(line))
    return sessions[-MOST_SESSIONS:]
