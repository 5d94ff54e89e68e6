"""Inputs: whether a complete run would be made of the same things again, told in a moment and without PyTorch.

What identifies a run is found by opening it: the weights as they are once loaded, the labels and some images of the
source. That takes seconds. A complete run leaves in `.run/inputs` one digest of all that its identity follows from: the
config, this package's files, the packages that are installed, the machine, and of every file that it reads the name,
size and times. While that digest is the same, so is the identity, and nothing needs to be opened. Where files do not
say everything (`Section.reads`), one was changed a moment ago, or there are too many, there is no digest, and the run
is opened.

The time of change, which the system sets and nobody else can, gives away a file that was written again under its old
size and modification time. What does not show: a change while the machine's clock, or that of a file server, is set
back; a file that was mapped into memory and is written to disk later; and a library whose files were edited in place
rather than installed.
"""

import contextlib
import hashlib
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import PipelineError
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest

PACKAGE = Path(__file__).parent.parent
# Looking takes no longer: a folder of a million images is opened in any case, and this is not to come on top of it.
MOST_SECONDS = 1.0
# Nanoseconds within which two changes of a file may have the same time: those of FAT are two seconds apart.
SETTLED = 2 * 10**9
# Beginnings of the names of environment variables by which libraries choose devices, kernels and caches.
VARIABLES = ("ATEN_", "CUBLAS_", "CUDA_", "DNNL_", "MKL_", "NVIDIA_", "ONEDNN_", "PYTORCH_", "TORCH", "XDG_CACHE_HOME")
# What an installer makes anew with each package.
INSTALLED = (".dist-info", ".egg-info", ".egg-link", ".pth")


def inputs_of(config: Config) -> str | None:
    """A sha256 of all that a run of a config would be made of now.

    None where files do not say it, cannot be read, are too many, or one was changed so shortly before that its next
    change could have the same time.
    """
    roots = [PACKAGE]
    for section in (config.source, *config.all_models.values(), *config.all_attacks.values()):
        if section.reads is None:
            return None
        roots += section.reads
    total, newest, now = hashlib.sha256(), 0, time.time_ns()
    end = time.monotonic() + MOST_SECONDS
    try:
        # With what was set beside what it comes to: sizes that are set are not replaced by those of the weights.
        said = config.model_dump_json(exclude_unset=True)
        for text in (config.model_dump_json(), said, *_environment()):
            total.update(f"{text}\0".encode(errors="surrogateescape"))
        for text, changed in itertools.chain.from_iterable(map(_files, roots)):
            total.update(f"{text}\0".encode(errors="surrogateescape"))
            newest = max(newest, changed)
            if time.monotonic() > end:
                return None
    except OSError:  # whoever opens the run says what it is
        return None
    return total.hexdigest() if newest < now - SETTLED else None


def remember(folder: OutputFolder, manifest: Manifest, inputs: str) -> None:
    """Note down what a complete run was made of. Without the note the next command takes longer, and that is all."""
    if manifest.complete:
        with contextlib.suppress(PipelineError):
            folder.store.write(folder.inputs, _note(manifest, inputs))


def is_unchanged(folder: OutputFolder, manifest: Manifest, inputs: str) -> bool:
    """Whether a run that was complete was made of the same things."""
    with contextlib.suppress(FileNotFoundError, PipelineError):
        return folder.store.read(folder.inputs) == _note(manifest, inputs)
    return False


def _note(manifest: Manifest, inputs: str) -> bytes:
    return f"{manifest.edition} {inputs}\n".encode()


def _environment() -> Iterator[str]:
    """The machine, the interpreter, variables of the environment, and what is installed."""
    yield from (platform.node(), platform.machine(), platform.version(), sys.version, sys.prefix)
    yield from (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES))
    for folder in filter(os.path.isdir, sys.path):
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if entry.name.endswith(INSTALLED)), key=lambda one: one.name)
        yield from (f"{entry.path}:{entry.stat().st_mtime_ns}" for entry in found)


def _files(root: Path) -> Iterator[tuple[str, int]]:
    """All that lies at or below a path, through links too: its name and state, and the time of its last change."""
    if root.is_symlink():
        yield _state(str(root), root.lstat())
    if not root.is_dir():
        yield _state(str(root), root.stat())
        return
    folders, seen = [str(root)], set()
    while folders:
        folder = folders.pop()
        yield f"{folder}/", 0
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in seen:  # two links to one folder, or a link in a circle
            continue
        seen.add((state.st_dev, state.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.is_symlink():
                    yield _state(entry.path, entry.stat(follow_symlinks=False))
                if not entry.is_dir():
                    yield _state(entry.path, entry.stat())
                elif root != PACKAGE or entry.name != "__pycache__":
                    folders.append(entry.path)


def _state(path: str, state: os.stat_result) -> tuple[str, int]:
    text = f"{path}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}:{state.st_ino}"
    return text, state.st_ctime_ns
