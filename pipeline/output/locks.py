"""The lock of a prefix in an object store, and why a run that has lost it can do no harm.

Clocks, pauses and slow networks cannot be trusted. A holder may be stopped at any moment, be taken for dead, and later
send what it was about to send. So the lock alone protects nothing. What does is that such a request finds nothing of
another run to change:

1. Shards and receipts have the run's id in their names, and are made only where there are none yet. What a run that
   starts over removes has the name of a former generation.
2. What all runs have under one name (the manifest, the card, the report, the lock) is written on a condition, which the
   store checks: that it is still the version that the writer knew while it held the lock (`If-Match`), or not there yet
   (`If-None-Match`). The first act of a new holder is to write the manifest with its own mark in it. From then on a
   request of the former holder fails.
3. The lock changes hands by such a write alone. Its holder rewrites it every few seconds. Where that has not succeeded
   for CONFIRM_SECONDS, by a clock that counts suspension too, the holder writes nothing before it has succeeded again.

Parts of a run (see executors/part.py) write side by side. Each has a lock of its own while it works, and the one above
only while it begins or sums up: so what all runs have under one name is written by one process at a time. Who has the
lock above for longer, as every other run, first sees that no part has its own.

Two processes of the same run may still write at once. In the same environment they write the same bytes; in another one
last digits may differ, and what one of them sends late replaces nothing that the other has written.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    from pipeline.output.objects import ObjectStore

LOCK = ".run/lock"
# How the locks of parts begin, which work side by side; their names end in I-of-N.
PART = ".run/part-"

# A holder rewrites its lock this often; one that has not changed for so long is nobody's any more.
BEAT_SECONDS, STALE_SECONDS = 10.0, 30.0
# A holder that has not rewritten its lock for so long does that before it writes anything else.
CONFIRM_SECONDS = 20.0
# A part waits for another that begins or sums up. Who keeps the lock longer than this is a run that is under way.
TURN_SECONDS = 60.0
# Linux has a clock that goes on while the machine is suspended; that of macOS always does.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

logger = logging.getLogger(__name__)


class ConflictError(Exception):
    """An object is no more the version that was to be replaced."""


class UnsupportedError(Exception):
    """The store, or its client, cannot write on conditions."""


class StoreLock:
    """The lock of a prefix, once it is taken; `token` names this holder.

    A holder that lives is waited for `patience` seconds, and each new one anew.

    Raises:
        ConfigError: the store does not honour conditions.
        PipelineError: another run holds it, or the store fails.
    """

    def __init__(self, objects: "ObjectStore", name: str = LOCK, patience: float = 0.0) -> None:
        self._objects, self._name, self.token = objects, name, secrets.token_hex(8)
        self._beat = 0
        self._lost: str | None = None
        self._mutex, self._over = threading.Lock(), threading.Event()
        try:
            self._version = self._take(patience)
            self._probe()
        except UnsupportedError as error:
            raise no_locks(objects.root, str(error)) from None
        self._confirmed = time.clock_gettime(CLOCK)
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lock")
        self._thread.start()

    def check(self) -> None:
        """See that it is still held.

        Raises:
            PipelineError: it was taken over, or the store cannot be asked.
        """
        self._raise_if_lost()
        if time.clock_gettime(CLOCK) - self._confirmed > CONFIRM_SECONDS:
            self.confirm()

    def confirm(self) -> None:
        """Rewrite it, which only its holder can.

        Raises:
            PipelineError: as `check`.
        """
        with self._mutex:
            if self._lost is None:
                self._beat += 1
                try:
                    self._version = self._objects.replace(self._name, self._content(beat=self._beat), self._version)
                    self._confirmed = time.clock_gettime(CLOCK)
                except ConflictError:
                    found = self._objects.look(self._name)
                    by = f"taken over by another run ({_holder(found)})" if found else "removed"
                    self._lost = (
                        f"{self._objects.root}: its lock was {by}; nothing more is written. See that one run at a time "
                        "writes there, then run the same command again."
                    )
        self._raise_if_lost()

    def release(self) -> None:
        """Let go of it. It stays as an object that says so: not every store removes on a condition."""
        self._over.set()
        # It must not write the lock again; a store that hangs must not hold the end up for long.
        self._thread.join(STALE_SECONDS)
        if self._lost is None:
            with contextlib.suppress(PipelineError, ConflictError):
                self._objects.replace(self._name, self._content(released=True), self._version)

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise PipelineError(self._lost)

    def _content(self, **more: Any) -> bytes:
        own = {"host": socket.gethostname(), "process": os.getpid(), "token": self.token}
        return json.dumps({**own, **more}).encode()

    def _take(self, patience: float) -> str:
        """Make the lock, or replace one that was released or has not changed for STALE_SECONDS; its version."""
        root, holder, since = self._objects.root, None, 0.0
        while True:
            found = self._objects.look(self._name)
            if not _parse(found).get("released"):
                logger.info("%s has a lock of %s; waiting to see whether that run is alive.", root, _holder(found))
                began = time.clock_gettime(CLOCK)
                while (now := self._objects.look(self._name)) == found:
                    if time.clock_gettime(CLOCK) - began > STALE_SECONDS:
                        break
                    time.sleep(min(1.0, STALE_SECONDS / 10))
                lock = _parse(now)
                if lock.get("released"):
                    continue
                if now != found:
                    if lock.get("token") != holder:
                        holder, since = lock.get("token"), time.clock_gettime(CLOCK)
                    if time.clock_gettime(CLOCK) - since >= patience:
                        raise in_use(root, _holder(now))
                    continue
                logger.warning("%s: the lock is taken over, as it has not changed for %g s.", root, STALE_SECONDS)
            with contextlib.suppress(ConflictError):
                return self._objects.replace(self._name, self._content(beat=0), found[1] if found else None)

    def _probe(self) -> None:
        """See that the store honours both conditions: neither of these writes may succeed."""
        for version, header in ((None, "If-None-Match"), ('"no such version"', "If-Match")):
            with contextlib.suppress(ConflictError):
                self._objects.replace(self._name, self._content(probe=header), version)
                raise UnsupportedError(f"the store ignores {header}")

    def _keep(self) -> None:
        """Say every few seconds that the holder lives, until it is over."""
        while self._lost is None and not self._over.wait(BEAT_SECONDS):
            # A store that fails for a while is no reason to give up: who writes a shard will hear of it.
            with contextlib.suppress(PipelineError):
                self.confirm()


def refuse_parts(objects: "ObjectStore", names: Iterable[str]) -> None:
    """See that parts work no more, by the names of their locks; those of parts that were killed are taken over.

    Raises:
        PipelineError: one lives.
    """
    # At once: it takes a while to see that a lock does not change.
    with ThreadPoolExecutor(32) as pool:
        for _ in pool.map(lambda name: StoreLock(objects, name).release(), names):
            pass


def part_locks(names: Iterable[str], part: str = "") -> list[str]:
    """Of some file names, the locks that forbid others to write: those of all parts or, for a part I-of-N, those of
    another N."""
    beside = f"-of-{part.partition('-of-')[2]}" if part else None
    return [name for name in names if name.startswith(PART) and not (beside and name.endswith(beside))]


def no_locks(root: str, why: str) -> ConfigError:
    """The sentence for an output of which no lock can be had."""
    return ConfigError(
        f"output.path: {root}: a second run cannot be kept out, as {why}; make sure that no other run writes there, "
        "and give --unlocked."
    )


def in_use(root: str, holder: str) -> PipelineError:
    """The sentence for an output that another process holds."""
    return PipelineError(f"{root} is in use by another run ({holder}); wait for it.")


def _parse(found: tuple[bytes, str] | None) -> dict[str, Any]:
    """What a lock says, as `ObjectStore.look` has found it. One that does not exist is free."""
    try:
        parsed = json.loads(found[0]) if found else {"released": True}
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _holder(found: tuple[bytes, str] | None) -> str:
    lock = _parse(found)
    return f"process {lock.get('process', '?')} on {lock.get('host', '?')}"
