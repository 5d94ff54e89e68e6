"""What a terminal, a notebook and a log show."""

import builtins
import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest

from pipeline.core.console import BLUE, Bar, as_text, cell, link, make_table, show
from pipeline.output.summary import inspect
from tests.conftest import fgsm

NASTY = "\x1b]0;title\x07\x1b[2J [red]name[/red]\r\n"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def stderr_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in a test itself: pytest puts its own stderr in place between fixtures and tests."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def frames(terminal: Terminal) -> list[str]:
    """All that was drawn, without colours."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()))


def test_a_name_is_neither_a_command_nor_markup() -> None:
    for stream in (io.StringIO(), Terminal()):
        show(make_table({NASTY: [NASTY]}), stream)
        shown = stream.getvalue()
        assert not re.search(r"\x1b(?!\[[0-9;]*m)|\x07|\r", shown)
        assert shown.count("\\x1b[2J [red]name[/red]\\r\\n") == 2


def test_a_table_is_plain_in_a_pipe_and_coloured_on_a_terminal(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary, piped, terminal, plain = inspect(finished), io.StringIO(), Terminal(), Terminal()
    show(summary, piped)
    assert piped.getvalue() == fgsm("inspect", finished).stdout == f"{as_text(summary)}\n"
    assert not re.search(r"[^ -~\n]| $", piped.getvalue(), re.MULTILINE)
    show(summary, terminal)
    assert re.search(r"\x1b\[38[0-9;]*m", terminal.getvalue())
    assert "━" in terminal.getvalue(), "the bar of the accuracy"
    monkeypatch.setenv("NO_COLOR", "1")
    show(summary, plain)
    assert not re.search(r"\x1b\[(3|4)", plain.getvalue())


def test_a_narrow_terminal_loses_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    terminal = Terminal()
    show(inspect(finished), terminal)
    assert "eps-8" in terminal.getvalue()


def test_a_terminal_opens_the_report_on_a_click(tmp_path: Path) -> None:
    def shown(path: str, stream: io.StringIO) -> str:
        show(link("Report: ", path), stream)
        return stream.getvalue()

    report = tmp_path / "a b" / "report.html"
    assert f";{report.as_uri()}\x1b" in shown(str(report), Terminal())
    assert shown(str(report), io.StringIO()) == f"Report: {report}\n"
    assert "\x1b]8" not in shown("s3://bucket/report.html", Terminal())


def test_a_bar_fits_80_columns_with_its_notes_below(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    with Bar(1_281_167, 1_000_000) as bar:
        bar.notes = [f"eps-{index} 10%" for index in range(20)]
        bar.advance(200_000)
        logging.StreamHandler(sys.stderr).handle(logging.makeLogRecord({"msg": "a line of the log"}))
    drawn = frames(terminal)
    assert max(map(len, drawn)) <= 80
    line = next(line for line in drawn if "1,200,000 of 1,281,167 images" in line)
    assert re.fullmatch(r"━+[╸╺]?━* +1,200,000 of 1,281,167 images +[\d,.]+ images/s +\d+:\d\d:\d\d left ?", line)
    notes = next(line for line in drawn if line.startswith("eps-0 10%")).strip()
    assert set(notes.split()[1::2]) == {"10%"}
    assert len(notes.split()) % 2 == 0, "none is cut"
    assert "eps-19" not in terminal.getvalue(), "they are one line"
    assert "a line of the log" in drawn
    assert "\x1b[?25l" not in terminal.getvalue(), "a run that is killed would leave no cursor"


@pytest.mark.parametrize("columns", ["1", "40"])
def test_a_narrow_bar_is_words(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    with Bar(10) as bar:
        bar.notes = ["clean 99%"]
        bar.advance(10)
    assert "━" not in terminal.getvalue()
    if columns == "40":
        assert any("10 of 10 images" in line for line in frames(terminal))


@pytest.mark.parametrize("name", ["a pipe", "dumb"])
def test_without_a_terminal_that_draws_it_is_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    stream = io.StringIO() if name == "a pipe" else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", name)
    with caplog.at_level(logging.INFO, "pipeline"), Bar(4, unit="shards", log_seconds=0) as bar:
        bar.advance(1)
    assert not re.search(r"\x1b|━", stream.getvalue())
    assert re.fullmatch(r"1 of 4 shards \(25%\), [\d,.]+ shards/s, \d:\d\d:\d\d left", caplog.messages[0])


def test_what_goes_to_stdout_stays_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    with Bar(1):
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()


def test_a_notebook_has_tqdm_s_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    with caplog.at_level(logging.INFO, "pipeline"), Bar(10, 2, log_seconds=0) as bar:
        bar.notes = ["clean 99%"]
        bar.advance(8)
    assert "10/10" in capsys.readouterr().err
    assert not caplog.messages


def test_one_rate_is_told_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.core.console.time.monotonic", lambda: now[0])
    with Bar(1000) as bar:
        assert bar.facts() == ["0 of 1,000 images"]
        for now[0], count in ((10.0, 100), (10.5, 100), (12.0, 300)):
            bar.advance(count)
            # What starting took counts until there is more to go by.
            rate = {10.0: "10.0", 10.5: "19.0", 12.0: "200.0"}[now[0]]
            assert bar.facts()[1] == f"{rate} images/s"
        now[0] = 100.0
        assert bar.line() == "500 of 1,000 images (50%), 200.0 images/s, 0:00:02 left"


def test_results_are_json_for_programs(finished: Path) -> None:
    found = json.loads(fgsm("verify", finished, "--json").stdout)
    assert (found["problems"], found["damaged"], found["shards"]) == ([], [], 2)
    config = finished.parent / "config.yaml"
    planned = json.loads(fgsm("plan", config, "--json").stdout)
    assert (planned["source_images"], planned["variants"]) == (12, ["clean", "eps-8"])
    assert planned["bytes"] > 0
    shown = fgsm("plan", config).stdout
    assert f"(run {planned['run_id']})" in shown


def test_a_style_reaches_the_terminal() -> None:
    terminal = Terminal()
    show(cell("right", BLUE), terminal)
    assert terminal.getvalue().startswith("\x1b[38;5;")
