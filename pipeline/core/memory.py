"""The memory of this process, seen now and then."""

import threading

import psutil

SAMPLE_SECONDS = 0.05


class PeakMemory:
    """The most bytes that this process had resident while the context was open, `peak`."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process, ended = psutil.Process(), False
        while not ended:
            ended = self._ended.wait(SAMPLE_SECONDS)
            self.peak = max(self.peak, process.memory_info().rss)
