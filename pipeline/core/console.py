"""The console: tables, colours, links and progress, with rich on a terminal and as plain text elsewhere.

Text comes from datasets too, so all of it goes through `cell`: rich reads no markup in it, and a terminal no commands.
For a notebook `html_cell` does the same.
rich is imported where it is used, as a command that prints a sentence does without it.
"""

import contextlib
import functools
import html
import io
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

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


def html_table(columns: Mapping[str, Sequence[object]], head: bool = True) -> str:
    """A table as HTML, which a notebook shows.

    Args:
        columns, head: as in `make_table`; cells are values.
    """
    names = "".join(f"<th>{html_cell(name)}</th>" for name in columns)
    rows = ("".join(f"<td>{html_cell(value)}</td>" for value in row) for row in zip(*columns.values(), strict=True))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{names}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def html_cell(value: object) -> str:
    """A value as HTML that is only shown: without credentials, control characters or markup."""
    return html.escape(presentable(str(value)))


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
        console.width = max(console.width, LEAST_TABLE)
        console.print(shown)
    else:
        print(presentable(as_text(shown), "\n"), file=stream, flush=True)


class Bar:
    """Counts on stderr: a bar on a terminal or in a notebook, a log line every `log_seconds` elsewhere.

    Without a total it says neither share nor time left. `notes` are said beside the counts, on a line of their own
    where there is a bar. `done` counts all, `fresh` what was done here.
    """

    def __init__(
        self, total: int | None, done: int = 0, unit: str = "images", log_seconds: float = LOG_SECONDS
    ) -> None:
        self.total, self.done, self.unit = total, done, unit
        self.fresh, self.notes = 0, list[str]()
        self._started = self._updated = self._told = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._every = log_seconds
        self._tell: Callable[[], object] = lambda: logger.info("%s", self.line())
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        console = open_console(sys.stderr)
        if console.is_jupyter:
            from tqdm.auto import tqdm

            bar = self._stack.enter_context(tqdm(total=self.total, initial=self.done, unit=f" {self.unit}"))

            def tell() -> None:
                bar.set_postfix_str(" ".join(self.notes), refresh=False)
                bar.update(self.done - bar.n)

        elif sys.stderr.isatty() and not console.is_dumb_terminal:
            from rich.live import Live

            # Lines of the log appear above the bar. Nothing that is printed to stdout is touched.
            drawn = functools.partial(self._drawn, console)
            live = Live(get_renderable=drawn, console=console, auto_refresh=False, redirect_stdout=False)
            tell = self._stack.enter_context(live).refresh
        else:
            return self
        self._every, self._tell = DRAW_SECONDS, tell
        self._stack.callback(tell)
        tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def advance(self, count: int) -> None:
        """Count some more."""
        self.done, self.fresh, self._updated = self.done + count, self.fresh + count, time.monotonic()
        self._first = self._first or (self._updated, self.fresh)
        if self._updated - self._told >= self._every:
            self._told = self._updated
            self._tell()

    @property
    def rate(self) -> float:
        """How many a second, without the first count, which waits for everything to start."""
        began, count = self._first or (self._updated, 0)
        if self._updated - began < STEADY_SECONDS:
            began, count = self._started, 0
        return (self.fresh - count) / max(self._updated - began, 1e-9)

    @property
    def left(self) -> float | None:
        """How many seconds it still takes; None without a total or a rate."""
        rate = self.rate
        return None if self.total is None or not rate else (self.total - self.done) / rate

    def facts(self) -> list[str]:
        """How many, how fast, and how long it still takes."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        rate, seconds = self.rate, self.left
        if not rate:
            return [f"{count} {self.unit}"]
        left = [] if seconds is None else [f"{duration(seconds)} left"]
        if self.done == self.total:
            left = [f"in {duration(self._updated - self._started)}"]
        return [f"{count} {self.unit}", f"{rate:,.1f} {self.unit}/s", *left]

    def line(self) -> str:
        """One line for a log: the counts, the share, and the notes."""
        count, *rest = self.facts()
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        return ", ".join([f"{count}{share}", *rest, *([" ".join(self.notes)] if self.notes else [])])

    def _drawn(self, console: "Console") -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        width, notes, facts = console.width, list(self.notes), self.facts()
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
