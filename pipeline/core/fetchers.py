"""Threads that wait for disks and servers, ahead of whoever needs what they fetch."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Fetchers:
    """Threads that wait for servers. At the end nobody waits for them, unlike those of a ThreadPoolExecutor: one that
    hangs would hold up the whole process."""

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._count = count
        for _ in range(count):
            threading.Thread(target=self._serve, daemon=True, name="fetch").start()

    def submit(self, call: Callable[[], Item]) -> "Future[Item]":
        future: Future[Item] = Future()
        self._calls.put((future, call))
        return future

    def _serve(self) -> None:
        while (work := self._calls.get()) is not None:
            future, call = work
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def close(self, last: Callable[[], Any] | None = None) -> None:
        """Let the threads end; what has not begun is dropped, and `last` is called by one of them before."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        if last is not None:
            self.submit(last)
        for _ in range(self._count):
            self._calls.put(None)


def in_order(
    items: Iterable[Item],
    submit: Callable[[Item], "Future[Result]"],
    most: float,
    size: Callable[[Item], float] = lambda _: 1,
) -> Iterator[tuple[Item, "Future[Result]"]]:
    """Each item with its future, in order: other threads work on items, a bounded number of them ahead of use.

    Args:
        items: what to work on.
        submit: begins with an item.
        most: what the sizes of the items ahead may sum up to. One is ahead in any case.
        size: the size of an item; by default items are counted.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    held = 0.0
    for item in items:
        while waiting and held + size(item) > most:
            yield waiting[0]
            held -= size(waiting.popleft()[0])
        waiting.append((item, submit(item)))
        held += size(item)
    while waiting:
        yield waiting.popleft()


def ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same items: a thread makes the next one while the one before is in use."""
    fetcher, following = Fetchers(1), partial(next, items, None)
    try:
        coming = fetcher.submit(following)
        while (item := coming.result()) is not None:
            coming = fetcher.submit(following)
            yield item
    finally:
        # By that thread, which may be within them.
        fetcher.close(last=items.close)
