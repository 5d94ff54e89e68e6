"""The console: tables, colours, links and progress, with rich on a terminal and as plain text elsewhere.

Text comes from datasets too, so all of it goes through `cell`: rich reads no markup in it, and a terminal no commands.
rich is imported where it is used, as a command that prints a sentence does without it.
"""

import io
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from pipeline.core.addresses import is_address
from pipeline.core.redaction import presentable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

# As in the report blue is right and orange is wrong. Both can be read on black and on white.
BLUE, ORANGE = "#2f8fc4", "#c24e00"
# Where nobody's window is too narrow, a row is one line.
UNLIMITED = 10_000
LOG_SECONDS = 30.0
# A bar is drawn so often at most, and on terminals of so many columns at least.
DRAW_SECONDS, LEAST_BAR = 0.1, 60
# Tables are laid out for so many columns at least; the lines of a narrower terminal break.
LEAST_TABLE = 80
# From so long on a rate can be told without the first count.
STEADY_SECONDS = 1.0

logger = logging.getLogger(__name__)


def cell(value: object, style: str = "") -> "Text":
    """A value as text that is only shown: without credentials, control characters or markup."""
    from rich.text import Text

    return Text(presentable(str(value)), style)


def make_table(
    columns: Mapping[str, Sequence[object]], left: int = 1, styles: Mapping[str, str] | None = None, head: bool = True
) -> "Table":
    """A table.

    Args:
        columns: its cells by the heads of the columns; what rich can draw is taken as it is.
        left: how many columns are set to the left and may be folded; the others are numbers.
        styles: of columns, by their heads.
        head: whether heads are shown.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=head, header_style="bold")
    for index, name in enumerate(columns):
        words = index < left
        table.add_column(
            cell(name),
            justify="left" if words else "right",
            no_wrap=not words,
            overflow="fold",
            style=(styles or {}).get(name, ""),
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(value if hasattr(value, "__rich_console__") else cell(value) for value in row))
    return table


def link(text: str, path: str) -> "Text":
    """A text of ours that ends in a path, which a terminal opens on a click if it is one of this machine."""
    url = Path(path).absolute().as_uri() if not is_address(path) else ""
    from rich.text import Text

    return Text(text).append_text(cell(path, f"link {url}" if url else ""))


def open_console(stream: TextIO) -> "Console":
    """rich's console on a terminal. It obeys NO_COLOR and TERM."""
    from rich.console import Console

    class Plain(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leave the cursor alone: a run that is killed would leave the terminal without one."""
            return show

    return Plain(file=stream, highlight=False, markup=False, emoji=False)


def as_text(shown: "RenderableType", width: int = UNLIMITED) -> str:
    """What rich would draw, as lines of text without colours."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(),
        width=width,
        height=UNLIMITED,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        highlight=False,
    )
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(shown: "RenderableType", stream: TextIO) -> None:
    """Print what rich can draw: for a terminal as wide as it is, elsewhere as plain text."""
    if stream.isatty():
        console = open_console(stream)
        console.print(shown, width=max(console.width, LEAST_TABLE), crop=False)
    else:
        stream.write(presentable(as_text(shown), "\n") + "\n")


class Bar:
    """Counts on stderr: a bar on a terminal or in a notebook, a log line every `log_seconds` elsewhere.

    Without a total it says neither share nor time left. `notes` are said beside the counts, on a line of their own
    where there is a bar. `done` counts all, `fresh` what was done here.
    """

    def __init__(
        self, total: int | None, done: int = 0, unit: str = "images", log_seconds: float = LOG_SECONDS
    ) -> None:
        self.total, self.done, self.unit, self.log_seconds = total, done, unit, log_seconds
        self.fresh, self.notes = 0, list[str]()
        self._started = self._updated = self._said = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._live: Any = None
        self._notebook: Any = None

    def __enter__(self) -> Self:
        from rich.live import Live

        console = open_console(sys.stderr)
        if console.is_jupyter:
            from tqdm.auto import tqdm

            self._notebook = tqdm(total=self.total, initial=self.done, unit=f" {self.unit}")
        elif sys.stderr.isatty() and not console.is_dumb_terminal:
            # Lines of the log appear above the bar. Nothing that is printed to stdout is touched.
            self._live = Live(get_renderable=self._drawn, console=console, auto_refresh=False, redirect_stdout=False)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (self._live, self._notebook):
            if bar is not None:
                (bar.close if bar is self._notebook else bar.stop)()

    def advance(self, count: int) -> None:
        """Count some more."""
        self.done, self.fresh, self._updated = self.done + count, self.fresh + count, time.monotonic()
        self._first = self._first or (self._updated, self.fresh)
        if self._notebook is not None:
            self._notebook.set_postfix_str(" ".join(self.notes), refresh=False)
            self._notebook.update(count)
            return
        if self._updated - self._said < (self.log_seconds if self._live is None else DRAW_SECONDS):
            return
        self._said = self._updated
        if self._live is None:
            logger.info("%s", self.line())
        else:
            self._live.refresh()

    @property
    def rate(self) -> float:
        """How many a second, without the first count, which waits for everything to start."""
        if self._first is None or self._updated - self._first[0] < STEADY_SECONDS:
            return self.fresh / max(time.monotonic() - self._started, 1e-9)
        began, count = self._first
        return (self.fresh - count) / (self._updated - began)

    def facts(self) -> list[str]:
        """How many, how fast, and how long it still takes."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        rate = self.rate
        if not rate:
            return [f"{count} {self.unit}"]
        left = [] if self.total is None else [f"{duration((self.total - self.done) / rate)} left"]
        if self.done == self.total:
            left = [f"in {duration(self._updated - self._started)}"]
        return [f"{count} {self.unit}", f"{rate:,.1f} {self.unit}/s", *left]

    def line(self) -> str:
        """One line for a log: the counts, the share, and the notes."""
        count, *rest = self.facts()
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        return ", ".join([f"{count}{share}", *rest, *([" ".join(self.notes)] if self.notes else [])])

    def _drawn(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        width, notes, facts = self._live.console.width, list(self.notes), self.facts()
        # As many as fit on a line: one that is cut would be another number.
        while len(note := " ".join(notes)) > width:
            notes.pop()
        if width < LEAST_BAR:
            return Group(cell("  ".join(facts)), cell(note))
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        bar = ProgressBar(self.total, self.done, complete_style=BLUE, finished_style=BLUE, pulse_style=BLUE)
        grid.add_row(bar, *map(cell, facts))
        return Group(grid, cell(note)) if note else grid


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:01:30."""
    return str(timedelta(seconds=round(seconds)))
