"""Tables that `datasets` keeps on the disk: a dataset of the Hub, a local folder, what `save_to_disk` has written."""

import functools
import json
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.batches import UNLABELLED
from pipeline.core.errors import ConfigError, explained
from pipeline.core.images import image_suffixes, is_image_name
from pipeline.core.left_out import Tally
from pipeline.sources.base import (
    DIGEST_SAMPLES,
    IndexedSource,
    Labels,
    checked,
    chosen_splits,
    class_names,
    digest_of,
    joined,
    spread,
)
from pipeline.sources.cells import file_digest, image_cells, open_cell
from pipeline.sources.columns import (
    Fields,
    cast_kept,
    classes_of,
    find_columns,
    is_text,
    label_indices,
    plain_type,
)
from pipeline.sources.files import (
    LITTER_REASON,
    as_text,
    existing_folder,
    is_litter,
    of_two_classes,
    opening,
    origin_of,
    own_files,
    sampled,
)
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.origins import revision_of
from pipeline.sources.tar import check_unstreamed

# Archives of images that `datasets` unpacks.
ARCHIVES = (".zip", ".tar", ".tgz", ".gz")
# Rows of carried-through columns that are read at once for the digest.
DIGEST_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class ArrowSource(IndexedSource[Any]):
    """Rows of `datasets.Dataset`s, of image and kept columns; images stay encoded bytes until they are opened.

    Images given as a path are opened only below `allowed`: a dataset must not be able to read other files
    of the machine into a dataset that is published.
    """

    allowed: tuple[Path, ...]

    def table(self, split: str, rows: Sequence[int]) -> pa.Table:
        found = self.rows[split][list(rows)]
        kept = cast_kept(found.select([*self.kept]), self.kept)
        return joined(image_cells(found.column(0)), self.labels[split][rows], kept)

    def open(self, cell: Any) -> Image.Image:
        return open_cell(cell, self.allowed)

    def name_of(self, cell: Any) -> str | None:
        if not cell or cell["bytes"] is not None or cell["path"] is None:
            return None
        path = Path(cell["path"])
        return next((str(path.relative_to(folder)) for folder in self.allowed if path.is_relative_to(folder)), None)


def open_arrow(config: HuggingFaceConfig, *, need_labels: bool) -> ArrowSource:
    """Have `datasets` prepare the dataset, and read its labels; see `open_source`."""
    tally = Tally()
    opened, allowed = _load_splits(config, need_labels, tally)
    first = next(iter(opened.values()))
    schemas = {name: dataset.features.arrow_schema for name, dataset in opened.items()}
    fields, features = find_columns(schemas, None, config, need_labels)
    labels, classes = _read_labels(opened, fields.label, config)
    source = ArrowSource(
        labels=labels,
        rows={name: _rows(dataset, fields) for name, dataset in opened.items()},
        allowed=allowed,
        classes=classes,
        digest="",
        kept={name: features[name] for name in fields.kept},
        origin=origin_of(str(config.path), first.info, revision_of(first.cache_files)),
        left_out=tally.left_out(),
        need_labels=need_labels,
    )
    content = [part for name in labels for part in _content(source, name)]
    return checked(replace(source, digest=digest_of([*content, json.dumps(sorted(config.keep_columns))])))


def _rows(dataset: Any, fields: Fields) -> Any:
    rows = dataset.select_columns(list(dict.fromkeys([fields.image, *fields.kept]))).with_format("arrow")
    refused = (TypeError, ValueError, pa.ArrowException)
    with explained(f"source.image_column: {fields.image} does not hold images", errors=refused, kind=ConfigError):
        image_cells(rows[:1].column(0))
    return rows


def _load_splits(config: HuggingFaceConfig, need_labels: bool, tally: Tally) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The wanted splits as `datasets.Dataset`s, and the folders their image paths may lead to."""
    import datasets
    from huggingface_hub import constants

    path = str(config.path)
    if "://" in path:
        raise ConfigError("source.path: a URL can be streamed only; set source.streaming: true.")
    folder = existing_folder(config)
    cache = Path(datasets.config.HF_DATASETS_CACHE).resolve()
    hub = Path(constants.HF_HUB_CACHE).resolve() / f"datasets--{path.replace('/', '--')}"
    allowed = (folder,) if folder else (cache / "downloads", cache / path.replace("/", "___"), hub)
    with opening(path, folder):
        if folder is None:
            where = functools.partial(datasets.load_dataset_builder, path, config.name, revision=config.revision)
            loaded = _load_own(where, config, need_labels).as_dataset()
        elif (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            if not any(folder.rglob("*.arrow")):
                raise ConfigError(f"source.path: {folder} has no rows.")
            _check_saved(folder)
            loaded = datasets.load_from_disk(str(folder))
        else:
            own_cache = str(cache / f"fgsm-folder-{_listing_digest(folder)}")
            where = functools.partial(_folder_builder, folder, config.name, cache_dir=own_cache)
            builder = _load_own(where, config, need_labels)
            loaded = builder.as_dataset()
            _count_unread(builder, loaded, folder, tally)
    if isinstance(loaded, datasets.Dataset):
        # A saved slice is called `train[:10%]`, or `train+test`.
        loaded = {re.split(r"[^\w.-]", str(loaded.split or "train"))[0]: loaded}
    return {name: loaded[name] for name in chosen_splits(config, list(loaded))}, allowed


def _load_own(load: Callable[..., Any], config: HuggingFaceConfig, need_labels: bool) -> Any:
    """A builder of `datasets` that has made the splits, out of files of its own only.

    Of Parquet it is told what to read where it would fail over other columns, or read other types out of the files of a
    split that nobody asked for. Told nothing, it finds what it has cached without a network too.
    """
    import datasets
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    builder = load()
    files = own_files(builder, config)
    if files and isinstance(builder, Parquet | Arrow):
        read_schema = pq.read_schema if isinstance(builder, Parquet) else _arrow_schema
        schemas: dict[str, pa.Schema] = {}
        options: dict[str, Any] = {}
        wanted = chosen_splits(config, list(files))
        for split in wanted:
            # Of the Hub's files these are the copies in its cache, which the builder reads too.
            names, urls = zip(*files[split], strict=True)
            paths = datasets.DownloadManager().download(list(urls))
            schemas |= dict(zip(names, map(read_schema, paths), strict=True))
            if isinstance(builder, Parquet) and not all(map(_begins_with_rows, paths)):
                options["batch_size"] = DIGEST_BATCH  # or it would take the rows of that row group, which are none
        # A builder may have the features of its cache, which may be of other files.
        with tempfile.TemporaryDirectory() as empty:
            stated = builder.info.features and load(cache_dir=empty).info.features
        _, features = find_columns(schemas, stated, config, need_labels)
        alike = all(_is_of_datasets(schema) and schema == next(iter(schemas.values())) for schema in schemas.values())
        if isinstance(builder, Parquet) and not (alike and (stated is not None or next(iter(files)) in wanted)):
            options |= {"columns": list(features), "features": datasets.Features(features)}
        if options:
            builder = load(**options)
    if isinstance(builder, WebDataset):
        names, urls = zip(*(file for own in files.values() for file in own), strict=True)
        check_unstreamed(zip(names, datasets.DownloadManager().download(list(urls)), strict=True))
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error  # noqa: B904  # of itself it says nothing
    if not builder.info.splits.total_num_examples:
        raise ConfigError(f"source.path: {config.path} is empty: it has no rows.")
    return builder


def _begins_with_rows(path: str) -> bool:
    metadata = pq.read_metadata(path)
    return not metadata.num_row_groups or metadata.row_group(0).num_rows > 0


def _folder_builder(folder: Path, name: str | None, **options: Any) -> Any:
    """The builder of `datasets` for a local folder; of a folder of images it reads what other kinds of source read."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    try:
        builder = datasets.load_dataset_builder(str(folder), name, **options)
        found = [Path(file).name for files in builder.config.data_files.values() for file in files]
        failure = None
    except (datasets.exceptions.DataFilesNotFoundError, ValueError) as error:
        builder, found, failure = None, [], error
    if builder is None or (not isinstance(builder, ImageFolder) and {*found} & {*ImageFolder.METADATA_FILENAMES}):
        # A split may be of images alone whose endings its own list lacks, such as AVIF's.
        images = datasets.load_dataset_builder("imagefolder", name, data_dir=str(folder), **options)
        if all(any(map(is_image_name, files)) for files in images.config.data_files.values()):
            builder, failure = images, None
    if failure is not None:
        raise failure
    if isinstance(builder, ImageFolder):
        _take_images(builder, folder)
    return builder


def _take_images(builder: Any, folder: Path) -> None:
    """Have `datasets` read what Pillow opens, and no litter. Which file is of which split stays its choice."""
    from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns

    builder.EXTENSIONS = sorted(image_suffixes())
    found = builder.config.data_files
    every = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    for split, files in found.items():
        # Where a card says which files there are, it is left at that.
        more = every.get(split, [])
        taken = [
            file
            for file in (more if set(files) <= set(more) else files)
            if (is_image_name(file) or Path(file).suffix in ARCHIVES or Path(file).name in builder.METADATA_FILENAMES)
            and not any(map(is_litter, Path(file).relative_to(folder).parts))
        ]
        for file in taken:
            if not file.isascii() and as_text(file) != file:
                raise ConfigError(
                    f"source.path: the name of {as_text(file)} is no UTF-8, and `datasets` holds no other; rename it, "
                    "or set source.kind: imagefolder."
                )
        found[split] = DataFilesList(_without_second(taken), files.origin_metadata)


def _without_second(files: Sequence[str]) -> list[str]:
    """Files of which a link to another one of them is left out."""
    own, kept = set(files), []
    for file in files:
        target = Path(file).resolve() if Path(file).is_symlink() else None
        if str(target) not in own:
            kept.append(file)
        elif target is not None and target.parent != Path(file).parent:
            raise of_two_classes(file, str(target))
    return kept


def _count_unread(builder: Any, loaded: Mapping[str, Any], folder: Path, tally: Tally) -> None:
    """Count the files of a local folder that `datasets` reads for no split, but for the card."""
    read = {file for files in (builder.config.data_files or {}).values() for file in files}
    if any(Path(file).name in getattr(builder, "METADATA_FILENAMES", ()) for file in read):
        # Then only images that it names are rows.
        read = {file for file in read if not is_image_name(file)} | _named_images(loaded)
    for path in sorted(folder.rglob("*"), key=lambda path: (len(path.parts), path)):
        name = path.relative_to(folder)
        if str(path) in read or str(name) == "README.md" or any(map(is_litter, name.parts[:-1])):
            continue
        if is_litter(path.name):
            reason = LITTER_REASON
        elif not stat.S_ISDIR(path.stat().st_mode):  # raises where a link leads to nothing
            reason = "files that `datasets` reads for no split"
        elif path.is_symlink():
            reason = "links to folders, which `datasets` does not follow"
        elif not any(path.iterdir()):
            reason = "empty folders"
        else:
            continue
        tally.add(reason, as_text(str(name)))


def _named_images(loaded: Mapping[str, Any]) -> set[str]:
    import datasets

    columns = (
        dataset.data.table.column(name)
        for dataset in loaded.values()
        for name, feature in dataset.features.items()
        if isinstance(feature, datasets.Image)
    )
    return {path for column in columns for path in pc.struct_field(column, "path").to_pylist()}


def _arrow_schema(path: str) -> pa.Schema:
    with pa.OSFile(path) as file:
        try:
            return pa.ipc.open_stream(file).schema
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_file(file).schema


def _check_saved(folder: Path) -> None:
    """Refuse a `save_to_disk` folder that lists other files than its own: `datasets` would open any path there."""
    listed = []
    for path in (folder / "dataset_dict.json", *folder.rglob("state.json")):
        if path.is_file():
            content = json.loads(path.read_bytes())
            listed += [*content.get("splits", ()), *(file["filename"] for file in content.get("_data_files", ()))]
    for name in listed:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"source.path: {folder} lists {name!r}, which is no file of its own.")


def _listing_digest(folder: Path) -> str:
    """A digest of a folder's files by name, size and time."""
    # `datasets` keys its cache of a local folder that has a card by neither time nor content, and would return the rows
    # it saw first.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = ((path.relative_to(folder), path.stat()) for path in files)
    listing = (f"{path}:{state.st_size}:{state.st_mtime_ns}" for path, state in states)
    return digest_of([str(folder.resolve()), *listing])


def _is_of_datasets(schema: pa.Schema) -> bool:
    """Whether `datasets` has a type for each column of a file."""
    import datasets

    try:
        datasets.Features.from_arrow_schema(schema)
    except Exception:  # as in column_features
        return False
    return len(set(schema.names)) == len(schema.names) and all(plain_type(kind) == kind for kind in schema.types)


def _read_labels(
    opened: dict[str, Any], column: str | None, config: HuggingFaceConfig
) -> tuple[dict[str, Labels], tuple[str, ...] | None]:
    """Labels of each split as class indices, and the class names if there are any."""
    if column is None:
        return {name: np.full(len(rows), UNLABELLED) for name, rows in opened.items()}, class_names(config, None)
    values = {name: rows.select_columns([column]).with_format("arrow")[:].column(0) for name, rows in opened.items()}
    first = next(iter(opened.values()))
    classes = class_names(config, classes_of(first.features[column]))
    if classes is None and any(is_text(texts.type) for texts in values.values()):
        classes = tuple(sorted({text for texts in values.values() for text in texts.unique().to_pylist()} - {None}))
    where = f"column {column}"
    return {name: label_indices(own, classes, where, ConfigError) for name, own in values.items()}, classes


def _content(source: ArrowSource, split: str) -> Iterable[bytes | str]:
    """All labels, the size of every image and the bytes of some: enough to notice a source that changed."""
    rows, count = source.rows[split], len(source.labels[split])
    yield split
    yield source.labels[split].tobytes()
    stored = pc.struct_field(image_cells(rows.data.table.column(0)), "bytes")
    yield pc.fill_null(pc.binary_length(stored), UNLABELLED).to_numpy().astype(np.int64).tobytes()
    for cell in source.table(split, spread(count, DIGEST_SAMPLES)).column(0).to_pylist():
        if cell and cell["bytes"] is not None:
            yield cell["bytes"]
        else:
            yield from sampled([partial(file_digest, cell, source.allowed)])
    # Carried-through columns are copied as they are, so all of them count.
    kept = rows.select_columns([*source.kept])
    for start in range(0, count if source.kept else 0, DIGEST_BATCH):
        table = cast_kept(kept[start : start + DIGEST_BATCH], source.kept).combine_chunks()
        yield from (batch.serialize().to_pybytes() for batch in table.to_batches())
