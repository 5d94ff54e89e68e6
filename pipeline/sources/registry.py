"""Open: from the section of a config to a source. Its kind is imported when needed."""

from dataclasses import replace
from pkgutil import resolve_name

from pipeline.config.kinds import SOURCES
from pipeline.config.schema import MOST_PIXELS, SourceConfig
from pipeline.sources.base import Source


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
    source: Source = resolve_name(SOURCES[config.kind].make)(config, need_labels=need_labels)
    return replace(source, max_pixels=max_pixels)
