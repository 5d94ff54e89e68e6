"""The files of a dataset: in a local folder, on the Hub, behind any address of fsspec; and those that are left out."""

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pipeline.core.errors import ConfigError, PipelineError, explained, first_line, shortened
from pipeline.core.fetchers import Fetchers
from pipeline.core.images import is_of_the_machine
from pipeline.core.origin import Origin
from pipeline.sources.base import chosen_splits, tell_unsplit
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.origins import card_license

# Seconds after which a server that says nothing has failed: it may have accepted, and hang.
SILENT_SECONDS = 300.0
# What fsspec takes for signs of a glob. (In an address of HTTP ? would begin a query, which the config refuses.)
GLOB_SIGNS = "*?["
# Folders that systems and tools leave among the files of others, in lower case. What begins with a dot is hidden.
LITTER = (
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "@recycle",
    "@recently-snapshot",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
)


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems and tools leave among the files of others."""
    return name.startswith(".") or name.lower() in LITTER


LITTER_REASON = "hidden files or folders, or ones that a system keeps"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Listing:
    """The (name, URL) of the files of each wanted split, the features that the dataset's card states, its origin, and
    the folders that image paths may lead to."""

    files: Mapping[str, list[tuple[str, str]]]
    features: Mapping[str, Any] | None
    origin: Origin
    allowed: tuple[Path, ...] = ()


def as_text(name: str) -> str:
    """A file's name for people and files of text: bytes of it that are no UTF-8 become escapes such as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def unread(error: Exception) -> PipelineError:
    """The sentence for an image that the machine failed to read, or that is gone, before a run."""
    return PipelineError(
        f"source: an image or a folder cannot be read: {shortened(first_line(error))}; fix that first."
    )


def sampled(reads: Iterable[Callable[[], bytes]]) -> Iterable[bytes]:
    """What some images hold, for a digest; what cannot be read is told apart by the kind of its error."""
    for read in reads:
        try:
            yield read()
        except ConfigError:
            raise
        except Exception as error:  # as in read_image
            if is_of_the_machine(error):
                raise unread(error) from None
            yield type(error).__name__.encode()


def of_two_classes(link: str, first: str) -> ConfigError:
    return ConfigError(
        f"source.path: {link} leads to {first}, whose images would then be of two classes; remove the link."
    )


def own_files(builder: Any, config: HuggingFaceConfig) -> dict[str, list[tuple[str, str]]]:
    """The (name, URL) of the files of each split that a builder of `datasets` has found; nothing of them was read.

    A dataset's card may name any file of this machine, or of another dataset: only its own are read into one that is
    published, and others are a ConfigError. A link in a local folder is followed, as the cache of the Hub is made of
    them.
    """
    folder = Path(str(config.path)).expanduser()
    hub = rf"hf://datasets/{re.escape(str(builder.repo_id))}@[^/]+/"
    start = re.compile(re.escape(f"{folder.resolve()}/") if folder.is_dir() else hub)
    files: dict[str, list[tuple[str, str]]] = {}
    for split, urls in (builder.config.data_files or {}).items():
        for url in map(str, urls):
            name = start.sub("", url, count=1)
            if not start.match(url) or ".." in name.split("/"):
                raise ConfigError(
                    f"source.path: the card of {config.path} names files elsewhere ({url.rpartition('/')[2]}), and "
                    "only a dataset's own are read."
                )
            files.setdefault(str(split), []).append((name, url))
    return files


def find_files(config: HuggingFaceConfig) -> Listing:
    """The files of a source that is streamed; nothing of them is read.

    Raises:
        ConfigError: there are none, or their server does not answer.
    """
    path = str(config.path)
    if "://" in path:
        names = config.split or ("train",)
        if len(names) > 1:
            raise ConfigError("source.split: the files of a URL are one split; name one, which they are to be called.")
        files = _listed(path)
        if config.split is None:
            tell_unsplit(path)
        return Listing({names[0]: files}, None, Origin(name=_url_folder(path).rstrip("/").rpartition("/")[2] or None))
    return _found_by_datasets(config, path)


def _listed(url: str) -> list[tuple[str, str]]:
    """The files that a URL or a glob names, sorted, each with its name relative to what the glob has no choice in."""
    if re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}", url):
        raise ConfigError(f"source.path: braces are not expanded, as in {url}; write * in their place.")
    with explained(f"source.path: {url} cannot be listed", kind=ConfigError):
        system, path = system_of(url)
        found = sorted(answered(lambda: system.glob(path))) if set(GLOB_SIGNS) & set(path) else [path]
    if not found:
        raise ConfigError(f"source.path: {url} names no file.")
    folder = _url_folder(path)
    return [(name.removeprefix(folder), system.unstrip_protocol(name)) for name in found]


def system_of(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it. HTTP's client minds silence, not how long a file takes."""
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp  # fsspec's client

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    found: tuple[Any, str] = fsspec.url_to_fs(url, **options)
    return found


def answered(call: Callable[[], Item]) -> Item:
    """What a server answers to one question; a TimeoutError where it does not."""
    with contextlib.closing(Fetchers(1)) as pool:
        return pool.submit(call).result(SILENT_SECONDS)


def _url_folder(path: str) -> str:
    """The part of a path or URL before its file name, or before the first part with a glob in it."""
    fixed = re.split(f"[{re.escape(GLOB_SIGNS)}]", path)[0]
    return fixed[: fixed.rfind("/") + 1]


def existing_folder(config: HuggingFaceConfig) -> Path | None:
    """The local folder of a source, resolved; None where its path is the id of a dataset of the Hub."""
    config.check_paths()
    if not config.folder.is_dir():
        return None
    # It makes the folder's own name a part of the pattern of its files, and :: is a chain of addresses to it.
    folder = config.folder.resolve()
    if sign := re.search(r"[*?\[]|::", str(folder)):
        raise ConfigError(f"source.path: `datasets` takes {sign[0]} in a path for a pattern; rename {folder}.")
    return folder


def opening(path: str, folder: Path | None) -> contextlib.AbstractContextManager[None]:
    """Explains why `datasets` cannot open a dataset; what three libraries raise all means the same here."""
    looked = "" if folder else " (no such local folder, so it was looked up on the Hub)"
    return explained(f"source.path: {path} cannot be opened{looked}", kind=ConfigError)


def _found_by_datasets(config: HuggingFaceConfig, path: str) -> Listing:
    """The files of a dataset of the Hub or a local folder, as `datasets` finds them."""
    import datasets

    folder = existing_folder(config)
    where, load = str(folder or path), datasets.load_dataset_builder
    # With an empty cache, the features are those that the card states and not of files that were there before.
    with opening(path, folder), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        builder = answered(functools.partial(load, where, config.name, revision=config.revision, cache_dir=empty))
    own = own_files(builder, config)
    if not own:
        raise ConfigError(f"source.path: {path} is not made of files that can be streamed; leave out source.streaming.")
    found = {split: own[split] for split in chosen_splits(config, list(own))}
    url = next(iter(found.values()))[0][1]
    commit = None if folder else next((match[1] for match in re.finditer(r"@([0-9a-f]{40})/", url)), None)
    return Listing(found, builder.info.features, origin_of(path, builder.info, commit), (folder,) if folder else ())


def origin_of(path: str, info: Any, revision: str | None) -> Origin:
    """What a dataset of the Hub, or a local copy of one, says of itself; nothing is asked of the network for it.

    `path` is its id or folder, `info` what `datasets` knows of it, `revision` the commit of the Hub that is read.
    """
    from huggingface_hub import try_to_load_from_cache

    folder, stated = Path(path).expanduser(), str(info.license or "").strip() or None
    if folder.is_dir():
        return Origin(name=folder.resolve().name, license=stated or card_license(folder / "README.md"))
    # `datasets` has just read the card of that commit.
    card = try_to_load_from_cache(path, "README.md", repo_type="dataset", revision=revision)
    license_ = stated or (card_license(Path(card)) if isinstance(card, str) else None)
    return Origin(name=path.rpartition("/")[2], repository=path, revision=revision, license=license_)
