"""Open datasets for training: uint8 images and labels in an order of their own each epoch, clean or attacked by lot.

Nothing here can make a dataset: reading needs neither the attack nor a victim, nor the library `datasets`.
"""

import logging
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import SupportsIndex, get_args

import numpy as np

from pipeline.core.addresses import is_address
from pipeline.core.epsilon import reading_levels
from pipeline.core.errors import ConfigError, explained, listing
from pipeline.core.variants import CLEAN, Variant
from pipeline.layouts.base import LABEL
from pipeline.output.folder import OutputFolder, local_folder, split_of
from pipeline.output.manifest import Manifest, require_manifest, warn_if_incomplete
from pipeline.read.choice import Ids, draw_shares, variants_to_read
from pipeline.read.dataset import TrainingDataset
from pipeline.read.repository import manifest_folder
from pipeline.read.shards import COLUMNS, Only, Shards
from pipeline.read.stream import Draws, Stream

logger = logging.getLogger(__name__)


def training_dataset(
    path_or_repo: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    models: Ids | None = None,
    attacks: Ids | None = None,
    epsilons: Sequence[str | float] | None = None,
    clean: float | None = None,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    only: Only | None = None,
    columns: Sequence[str] = (LABEL,),
    pairs: bool = False,
    shuffle: bool = True,
    seed: SupportsIndex = 0,
    rank: int | None = None,
    world_size: int | None = None,
    allow_incomplete: bool = False,
) -> TrainingDataset:
    """Open datasets for training, of any layout: images (C, H, W) uint8 and labels int64, for a DataLoader.

        data = pipeline.training_dataset("out/cifar10", "train", clean=0.5)
        loader = DataLoader(data, batch_size=128, num_workers=4)
        for epoch in range(90):
            for images_u8, labels in loader:
                logits = model(images_u8.to(device).float() / 255)  # normalisation belongs to the model

    Every epoch has every source image once. An order and a draw belong to a seed and an epoch; they do not depend on
    workers, ranks or machine. The first iteration is of epoch 0, and each that begins after it of the next, also where
    the one before was left early. `data.set_epoch(epoch)` says which comes next.

    An image that is not shown clean is shown in a variant that is drawn for it: first a model among those that are
    attacked, then an attack among those on that model and those that ask no model (noise), then one of the attack's
    epsilons. At each of these draws all are as likely, or as `weights` says:

        # Images that fool their model, those of pgd drawn twice as often as those of any other attack on a model.
        pipeline.training_dataset("out/cifar10", "train", clean=0.2, weights={"pgd": 2}, only="fooled")
        # Adversarial images of one model only, and none of noise.
        pipeline.training_dataset("out/cifar10", "train", models="resnet20", attacks=["fgsm", "pgd"])

    With `pairs` an item is the clean and the attacked image of one row in one tensor, (2, C, H, W). So an augmentation
    of that tensor draws once for both:

        data = pipeline.training_dataset("out/cifar10", "train", pairs=True)
        augment = torchvision.transforms.v2.RandomCrop(32, padding=4)

        def collate(items):
            return torch.utils.data.default_collate([(augment(pair), *columns) for pair, *columns in items])

        for pairs_u8, labels in DataLoader(data, batch_size=128, collate_fn=collate):
            clean_u8, attacked_u8 = pairs_u8.unbind(1)

    Several datasets with the same classes are read as one. Without weights an epoch has every image of each of them
    once. With weights it has as many images as all of them together, in the shares that the weights say. Each dataset
    then goes through its images at its own pace, from one epoch to the next: each image comes once before any comes
    again. They are spread out evenly, so that every batch has these shares, to within an image or two of each:

        # Three images of the first for each image of the second.
        pipeline.training_dataset(["out/cifar10", "out/cifar10-pgd"], weights=[3, 1])

    Distributed: every rank constructs the same dataset. Ranks differ by one image at most, so DDP, which needs as many
    steps on each of them, takes the first `data.rows // (world_size * batch_size)` batches of its loader
    (`itertools.islice`); every rank has at least that many, unless `drop_last` takes them away.

    Every worker ends with a short batch of its own, so with several there may be more batches than `len(loader)` says;
    with `drop_last` each of them drops its own.

    Lightning and accelerate take the loader as it is. docs/recipes.md has a loop for each, and says what to give where
    there are several devices or processes.

    Shuffling takes row groups in any order and mixes the rows of a few. That is as good as a permutation where the
    dataset was made with `source.shuffle: true`, the default. One made with `source.shuffle: false` has the source's
    neighbours in a row group, and shuffling is weak: if the source is sorted by class, batches hold few classes.

    Resuming in the middle of an epoch is exact with the `state_dict` of torchdata's StatefulDataLoader, workers or not,
    and without workers with the dataset's own. Images that were given are neither read nor decoded again.

    Layouts images and wide read a row group of each variant to show one image of it; layout signs reads what it shows.
    So where reading, not decoding, is the bottleneck, name few variants or take signs. A reader (a worker, or the
    process itself without any) holds the encoded images of a window of each dataset, 64 MB and one row group more; with
    `pairs` up to twice as much.

    Args:
        path_or_repo: an output folder, or a Hub id, of which the files needed are downloaded first; or a list of them.
        split: one of each dataset's.
        models, attacks: the id of one, or a list of them: variants of these only. What is of no model is left out by
            `attacks` alone. None: all.
        epsilons: to draw from: `k/255` or a decimal as in the config (rounded down), of every attack that is chosen.
            Those that are not recorded are made exactly, where an attack's images lie along one direction; other
            attacks are left out at them, or refused, as `pipeline.load` does. None: all that are recorded.
        clean: share of images that are shown clean, 0..1; with `pairs` of those whose second image is the clean one,
            too. None: 0.5, with `pairs` 0.
        weights: how much more likely than others something is where it is drawn, by the id of a model or of an attack
            (of both, where they have the same) or by an epsilon, `k/255`: 2 for twice. What is missing weighs 1. What
            weighs 0 is never shown. For a list of datasets: the weights by name, which hold in each of them, or a list
            of the weights of the datasets themselves, above 0.
        only: "fooled": an image is drawn among its variants that fool the model which they attack (noise: the dataset's
            first), as column `fooled` says, or "correct": among those that it gets right. The shares of those that are
            left stay in proportion. An image that has none is shown clean; for how many that holds is logged when the
            dataset is opened. None: among all.
        columns: what comes with each image, in this order, some of "label", "epsilon" (float, in 0..1; 0 when clean),
            "attack", "model" (ids; "" where there is none), "fooled" (bool, as column `fooled` of that very image says,
            False when clean) and "source_index" (int, its row in the source's split). A batch of them is a tensor, one
            of ids a list. They change neither order nor draws.
        pairs: the clean image comes with each, (2, C, H, W), clean first. Order and draws do not change.
        shuffle: in an order of each epoch's own; else as stored.
        seed: of order and draws, 0 or more.
        rank, world_size: which part of how many; None: torch.distributed's where it is initialised, else all. Needed
            where accelerate runs in several processes.
        allow_incomplete: do not warn where shards of an output folder are missing.

    Raises:
        ConfigError: there is no such dataset, split, model or attack, an argument is out of range, an epsilon cannot be
            made, images have no label, or datasets differ in their classes or in the shape of their images.
        PipelineError: a file is missing or damaged.
    """
    place = _place(rank, world_size)
    asked = None if epsilons is None else reading_levels(epsilons)
    clean = (0.0 if pairs else 0.5) if clean is None else clean
    _check_arguments(seed, clean, asked, only, columns)
    paths = [path_or_repo] if isinstance(path_or_repo, str | Path) else list(path_or_repo)
    if not paths:
        raise ConfigError("path_or_repo: got none; name a dataset, or several.")
    by_name = weights if isinstance(weights, Mapping) else {}
    of_datasets = None if isinstance(weights, Mapping) else _listed(weights, len(paths))
    options = _Options(split, by_name, float(clean), only, tuple(columns), pairs, shuffle, operator.index(seed))
    streams, manifests = list[Stream](), list[Manifest]()
    for number, path in enumerate(paths):
        name, local = str(path), _local(path)
        root = local or manifest_folder(name)
        manifest = require_manifest(OutputFolder(root))
        # These two warn, and name the line that calls this function.
        variants = variants_to_read(manifest, asked, models=models, attacks=attacks)
        if local and not allow_incomplete:
            warn_if_incomplete(OutputFolder(root), manifest)
        manifests.append(manifest)
        _check_alike(paths, manifests)
        streams.append(_open(root, None if local else name, manifest, variants, options, number))
    parts = _parts([stream.rows for stream in streams], of_datasets)
    data = TrainingDataset(streams, parts, classes=manifests[0].dataset_classes, place=place)
    _ = data.place  # refused where it cannot be known
    return data


@dataclass(frozen=True)
class _Options:
    """What `training_dataset` is asked of every dataset; `weights` are those by name."""

    split: str
    weights: Mapping[str, float]
    clean: float
    only: Only | None
    columns: tuple[str, ...]
    pairs: bool
    shuffle: bool
    seed: int


def _local(path_or_repo: str | Path) -> Path | None:
    """The output folder, None for a Hub id."""
    if is_address(path_or_repo):
        raise ConfigError(
            f"{path_or_repo}: training_dataset reads its files again in every epoch, so they must be on a disk: copy "
            "them into a folder first, for instance with `aws s3 sync`, or let pipeline.load stream them."
        )
    return local_folder(path_or_repo)


def _open(
    root: Path, repo: str | None, manifest: Manifest, variants: Sequence[Variant], options: _Options, number: int
) -> Stream:
    """Open one dataset, the `number`-th of all. Files of a Hub id, `repo`, are downloaded into its folder first."""
    attacked = [variant for variant in variants if variant != CLEAN]
    shares = draw_shares(attacked, options.weights)
    if options.only is not None:
        _check_recorded("only", attacked, manifest)
    _check_split(manifest, options.split, repo or str(root))
    # What is never drawn is not looked for.
    drawn = [index for index, share in enumerate(shares) if share and options.clean < 1]
    only = options.only if drawn else None
    shown = [CLEAN, *(attacked[index] for index in drawn)]
    if "fooled" in options.columns:
        _check_recorded("columns", shown, manifest)
    shows_clean = options.clean > 0 or only is not None
    shards = Shards(root, manifest, shown, shows_clean=shows_clean, pairs=options.pairs)
    files = (entry for entry in manifest.files if split_of(entry.path) == options.split)
    entries = {entry.path: entry.bytes for entry in files if entry.path.split("/")[0] in shards.subsets}
    if repo is not None:
        _download(repo, root, list(entries))
    shards.open(entries)
    draws = Draws(np.array([0, *shares[drawn]]), options.clean, only, options.seed, number)
    stream = Stream(shards, draws, columns=options.columns, shuffle=options.shuffle, receipts=manifest.receipts)
    if only is not None:
        _tell_without(stream, only, options.split)
    return stream


def _listed(weights: Iterable[float] | None, count: int) -> list[float] | None:
    """The weights of so many datasets, which are checked before any of these is opened."""
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise ConfigError(f"weights: got {weights!r}; give a list of numbers, or a mapping of names to numbers.")
    listed = list(weights)
    for weight in listed:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < math.inf:
            raise ConfigError(f"weights: got {weight!r}; the weight of a dataset is a number above 0.")
    if len(listed) != count:
        raise ConfigError(f"weights: there are {len(listed)} for {count} datasets; give one for each.")
    return listed


def _parts(rows: Sequence[int], weights: Sequence[float] | None) -> Sequence[int]:
    """How many images of an epoch are of each dataset: all of its rows, or as the weights say, of as many in all."""
    if weights is None:
        return rows
    total = math.fsum(weights)
    ends = [round(sum(rows) * math.fsum(weights[:count]) / total) for count in range(len(weights) + 1)]
    parts = [stop - start for start, stop in pairwise(ends)]
    if 0 in parts:
        raise ConfigError(f"weights: {weights[parts.index(0)]} is too little for one image of {sum(rows)} in an epoch.")
    return parts


def _check_alike(paths: Sequence[str | Path], manifests: Sequence[Manifest]) -> None:
    """Refuse a dataset that cannot be read together with the first; the last of the manifests is its."""
    first, other = manifests[0], manifests[-1]
    for what, one, two in (
        ("classes", first.dataset_classes, other.dataset_classes),
        ("shape", first.shape, other.shape),
    ):
        if one != two:
            shown = [listing(list(map(str, values))) for values in (one, two)]
            raise ConfigError(
                f"path_or_repo: {what} of {paths[0]} are {shown[0]}, and those of {paths[len(manifests) - 1]} are "
                f"{shown[1]}; only datasets with the same classes, in the same order, and images of one shape can be "
                "read together."
            )


def _check_arguments(
    seed: SupportsIndex, clean: float, levels: Sequence[int] | None, only: str | None, columns: Sequence[str]
) -> None:
    """Refuse what cannot be, before anything is read; the levels are epsilons in grey levels."""
    if not isinstance(seed, SupportsIndex) or operator.index(seed) < 0:
        raise ConfigError(f"seed: got {seed}; it is a whole number, 0 or more.")
    if isinstance(clean, bool) or not 0 <= clean <= 1:
        raise ConfigError(f"clean: got {clean}; it is the share of clean images, from 0 to 1.")
    if levels is not None and 0 in levels:
        raise ConfigError("epsilons: 0 is the clean image, whose share is `clean`; leave it out.")
    if only is not None and only not in get_args(Only):
        raise ConfigError(f"only: got {only!r}; it is one of {', '.join(get_args(Only))}, or None.")
    unknown = [columns] if isinstance(columns, str) else [name for name in columns if name not in COLUMNS]
    if unknown or not columns:
        got = repr(unknown[0]) if unknown else "none"
        raise ConfigError(f"columns: got {got}; it is a list of some of {', '.join(COLUMNS)}.")


def _place(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Rank and world size, None where neither is given."""
    place = None if rank is None or world_size is None else (rank, world_size)
    if (rank, world_size) != (None, None) and (place is None or not 0 <= place[0] < place[1]):
        raise ConfigError(f"rank, world_size: got {rank} of {world_size}; ranks run from 0 to world_size - 1.")
    return place


def _download(name: str, root: Path, files: list[str]) -> None:
    """Fetch files of a Hub dataset, at the revision whose manifest lies in the folder."""
    from huggingface_hub import snapshot_download

    with explained(f"{name} cannot be read from the Hub"):
        snapshot_download(name, repo_type="dataset", revision=root.name, allow_patterns=files)


def _tell_without(stream: Stream, only: Only, split: str) -> None:
    """Say of how many images `only` leaves no variant."""
    none = stream.shards.without(only)
    logger.log(
        logging.WARNING if none else logging.INFO,
        "only=%r: %s of %s images in %r have no such variant%s.",
        *(only, f"{none:,}", f"{stream.rows:,}", split, " and are always shown clean" if none else ""),
    )


def _check_recorded(key: str, variants: Sequence[Variant], manifest: Manifest) -> None:
    """Refuse images of which nobody knows what they do, where an argument asks for that."""
    made = [variant for variant in variants if variant not in manifest.variants]
    if made:
        raise ConfigError(
            f"{key}: {made[0].level}/255 is not recorded of attack {made[0].attack}, so what its images do is unknown; "
            "leave it out of epsilons."
        )


def _check_split(manifest: Manifest, split: str, name: str) -> None:
    if split not in manifest.split_rows:
        raise ConfigError(f"split: {name} has no split {split!r}; it has {', '.join(manifest.split_rows)}.")
    clean = next((subset for subset in manifest.subsets if (subset.split, subset.level) == (split, 0)), None)
    if clean is None or not clean.rows:
        raise ConfigError(f"split: {name} has no images in {split!r} yet; run fgsm generate to its end.")
    if clean.labelled < clean.rows:
        raise ConfigError(
            f"{name}: {clean.rows - clean.labelled:,} of the {clean.rows:,} images in {split!r} have no label; "
            "a classifier is trained on labelled ones."
        )
