"""Where an output lies: a folder on a disk, or a prefix in an object store such as `s3://bucket/prefix`.

Files have names relative to the output's root, with `/` between their parts. A reader sees a whole file or none: on a
disk a file is written under another name, synced and renamed; in a store an object appears when its upload ends.
Every failure is a `PipelineError` of one sentence, but for a `FileNotFoundError`: that file does not exist.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.core.addresses import is_address
from pipeline.output.locks import PART, TURN_SECONDS

logger = logging.getLogger(__name__)


class Store(Protocol):
    """The files of one output, by name.

    `root` is the output's folder or address, for messages; `disk` a folder on the disk that must have room for what is
    written; `local` says whether that is the whole dataset, rather than the shards in flight; `session` names the
    process that holds the output, where others could take it over.
    """

    root: str
    disk: Path
    local: bool
    session: str = ""
    # Of a run that is held in parts, the one that this process has.
    _part: str = ""

    def handles(self) -> Sequence[int]:
        """The open files by which it is held, as numbers. A process that inherits them, and is given this object by
        `pickle`, holds the output too: it is free only when that has ended as well."""
        return ()

    def at(self, name: str) -> str:
        """The whole path or address of a file, for messages and other libraries."""

    def entries(self) -> list[str]:
        """The names of files and folders at the root; none where nothing was written yet.

        Raises:
            ConfigError: nothing could be written there.
        """

    def sizes(self) -> dict[str, int]:
        """The bytes of every file by its name, from one fresh listing; of names that begin with a dot, only receipts
        are sure to be listed.
        """

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: it does not exist.
        """

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Many small files that were listed, without those that are gone since."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read parts of.

        Raises:
            FileNotFoundError: it does not exist.
        """

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file as a whole: a reader, or a crash, sees the old one or the new one."""

    def commit(self, name: str, content: bytes) -> None:
        """Write a small file after everything that was written before it. It may exist with the same content."""
        self.write(name, content)

    def put(self, local: Path, name: str) -> None:
        """Move or upload a file from the scratch folder."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; those that do not exist are passed over."""

    def scratch(self, name: str) -> AbstractContextManager[Path]:
        """A new folder on a local disk for files that are not complete yet; removed at the end."""

    def fetched(self, names: Iterable[str]) -> AbstractContextManager[Path]:
        """A local folder in which some files lie under their names, until the end of the block.

        Raises:
            FileNotFoundError: one of them does not exist.
        """

    def staged(self, sizes: Mapping[str, int]) -> Iterator[Path]:
        """Local folders in which some files, given with their bytes, lie under their names: a bounded part in each."""

    def refuse_links(self, name: str = "") -> None:
        """Refuse links that lead out of the output, before anything is written, deleted or published through one.

        Looks at one file, by default at all. An object store has no links.

        Raises:
            ConfigError: there is one.
        """
        del name

    @contextlib.contextmanager
    def held(self, *, unlocked: bool = False, part: str = "") -> Iterator[None]:
        """Hold the output against a second run.

        Args:
            unlocked: do without a lock; the caller has seen to it that no second run writes there.
            part: I-of-N, to hold it beside the other parts of N, and against all else.

        Raises:
            ConfigError: a link in it leads elsewhere, or the store has no means to keep a second run out.
            PipelineError: another process holds it, or it cannot be written.
        """
        with self._opened(), contextlib.ExitStack() as stack:
            if unlocked:
                logger.warning("%s is not locked: see that no other run writes there before this one ends.", self.root)
            elif part:
                # Who makes sure that no part works has the lock of one that was killed for a moment.
                stack.enter_context(self._locked(f"{PART}{part}", patience=1.0))
            else:
                stack.enter_context(self._exclusive())
            if not part:
                self._clear_scratch()
                # Again at the end, for what a lost node has left: once all shards are written, nobody holds the folder.
                stack.callback(self._clear_scratch)
            try:
                self._part = part
                yield
            finally:
                self._part = ""

    def alone(self) -> AbstractContextManager[None]:
        """For who holds the output: no other part begins or sums up within. Who holds all of it is alone anyway.

        Raises:
            PipelineError: as `held`.
        """
        return self._exclusive(TURN_SECONDS) if self._part else contextlib.nullcontext()

    def _opened(self) -> AbstractContextManager[None]:
        """For as long as the output is held, whether or not there are locks."""
        return contextlib.nullcontext()

    def _locked(self, name: str, patience: float = 0.0) -> AbstractContextManager[object]:
        """A lock by its file's name, against all others; each new holder of it is waited for so many seconds anew."""

    def _exclusive(self, patience: float = 0.0) -> AbstractContextManager[None]:
        """The lock beside which no run works, nor any part that is not of this process's run."""

    def _clear_scratch(self) -> None:
        """Remove files that are not complete."""
        return

    def check_held(self) -> None:
        """See that the output is still held. All that write call this; call it before others are told to write.

        Raises:
            PipelineError: it was taken over, moved or replaced.
        """

    def tidy(self) -> None:
        """Remove what killed processes have left in the scratch folder, unless somebody holds the output."""
        return

    def watch(self) -> None:
        """For who writes without holding the output: from now on, replace nothing that another has written since."""
        return


def open_store(root: str | Path) -> Store:
    """The store of an output: a folder, or an address such as `s3://bucket/prefix`.

    Raises:
        ConfigError: the address cannot be one, or the package for its protocol is missing.
    """
    # Both kinds import this module.
    from pipeline.output.local import LocalStore
    from pipeline.output.objects import ObjectStore

    return ObjectStore(str(root)) if is_address(root) else LocalStore(Path(root))
