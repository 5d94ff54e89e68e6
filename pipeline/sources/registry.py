"""Open: from the section of a config to a source. Its kind, or the format of its files, is imported when needed."""

from collections.abc import Mapping
from dataclasses import replace
from pkgutil import resolve_name

from pipeline.config.kinds import SOURCES
from pipeline.config.schema import MOST_PIXELS
from pipeline.config.sources import HuggingFaceConfig, SourceConfig
from pipeline.core.errors import ConfigError
from pipeline.sources.base import Source, file_names
from pipeline.sources.files import find_files

# What opens files that are streamed, by the endings of their names: called with the config, the files, `need_labels`
# and `max_pixels`.
FORMATS: Mapping[tuple[str, ...], str] = {
    (".parquet", ".pq"): "pipeline.sources.parquet:open_parquet",
    (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"): "pipeline.sources.tar:open_tars",
}


def open_source(config: SourceConfig, *, need_labels: bool, max_pixels: int = MOST_PIXELS) -> Source:
    """Open the dataset that the config names.

    Args:
        config: the `source` section.
        need_labels: whether a row without a label is an error.
        max_pixels: of an image; what claims more bytes than so many pixels can take is not read out of a tar.

    Raises:
        ConfigError: it is not there, is empty, or lacks the splits or columns that are asked for.
        PipelineError: it cannot be read.
    """
    if isinstance(config, HuggingFaceConfig) and config.streaming:
        listing = find_files(config)
        listing = replace(listing, files=file_names(listing.files))
        names = [name for own in listing.files.values() for name, _ in own]
        opener = resolve_name(_format_of(names))
        source: Source = opener(config, listing, need_labels=need_labels, max_pixels=max_pixels)
    else:
        source = resolve_name(SOURCES[config.kind].make)(config, need_labels=need_labels)
    return source


def _format_of(names: list[str]) -> str:
    for suffixes, opener in FORMATS.items():
        if names[0].lower().endswith(suffixes):
            other = next((name for name in names if not name.lower().endswith(suffixes)), None)
            if other is None:
                return opener
            raise ConfigError(f"source.path: {names[0]} and {other} are of two kinds; a streamed source is of one.")
    raise ConfigError(
        f"source.path: {names[0]} is neither Parquet nor a WebDataset .tar, the kinds that can be streamed; "
        "leave out source.streaming."
    )
