"""Check: what of a config can be told on this machine before anything is opened, and before PyTorch is imported.

Messages of a section begin with `source`, `model` or `attack`; where a config has several models or attacks, `naming`
puts the key of the one that is meant in its place.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.addresses import is_address
from pipeline.core.errors import ConfigError, TemporaryError


def check_paths(config: Config) -> None:
    """See that the files and folders that a config names on this machine are there, and that the output lies apart.

    Raises:
        ConfigError: one is not there, or the output would become part of the source, which the next run would read.
    """
    config.source.check_paths()
    for name, model in config.all_models.items():
        with naming(config, "model", name):
            model.check_paths()
    for name, attack in config.all_attacks.items():
        with naming(config, "attack", name):
            attack.check_paths()
    if config.source.folder is None or is_address(config.output.path):
        return
    source, output = config.source.folder.resolve(), Path(config.output.path).expanduser().resolve()
    if source.is_dir() and output.is_relative_to(source):
        raise ConfigError(f"output.path: {output} lies in the source's own folder {source}; choose another place.")


@contextlib.contextmanager
def naming(config: Config, section: str, name: str) -> Iterator[None]:
    """Errors that are raised within name the key that the config has for the model or attack of that id, such as
    `models.vit`, in place of `section`, which is `model` or `attack`."""
    try:
        yield
    except (ConfigError, TemporaryError) as error:
        raise type(error)(named(str(error), config, section, name)) from error


def named(sentence: str, config: Config, section: str, name: str) -> str:
    """As `with_key`, and beginning with the key."""
    key = config.key(section, name)
    if key == section:
        return sentence
    said = with_key(sentence, config, section, name)
    return said if said.startswith(key) else f"{key}: {said}"


def with_key(sentence: str, config: Config, section: str, name: str) -> str:
    """A sentence that speaks of `model` or `attack`, with the key that the config has."""
    return re.sub(rf"\b{section}(?=\.\w|: )", config.key(section, name), sentence)
