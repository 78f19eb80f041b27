"""What is shown while a command works."""

import io
import logging

import pytest
from rich.console import Console

from gptjax import screen
from gptjax.screen import Screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Returns a list whose one number is the time."""
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    """Yields a function that makes standard output a terminal of 80 columns, with the log lines, and returns it.

    A function, because pytest sets sys.stdout once more between a fixture and its test.
    """
    level = screen.log.level

    def start():
        stream = Terminal()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr(screen.log, "handlers", [logging.StreamHandler(stream)])
        screen.log.setLevel(logging.INFO)
        return stream

    yield start
    screen.log.setLevel(level)


def test_long_work_writes_lines_every_ten_seconds_without_a_terminal(clock):
    lines = []
    shown = Screen(lines.append, num_steps=100)
    for done in range(20):
        clock[0] += 4
        shown.show_work("evaluating", done, 20)
    assert lines == [f"evaluating {done}/20" for done in (3, 6, 9, 12, 15, 18)]
    shown.show_work("")
    clock[0] += 60
    shown.show_work("evaluating", 0, 20)
    clock[0] += 9
    shown.show_work("evaluating", 19, 20)
    assert len(lines) == 6, "the second evaluation was short"
    assert not shown.is_live


def test_bar_counts_down_between_steps_but_not_during_other_work(clock):
    shown = Screen(print, step=100, num_steps=1000)
    assert shown.line() == "100/1,000  10%"
    shown.advance(400, 0.5)
    assert shown.line() == "400/1,000  40%  eta 5m00s"
    clock[0] += 0.4
    assert shown.line().endswith("eta 4m59s") or shown.line().endswith("eta 5m00s")
    shown.show_work("evaluating", 7, 20)
    clock[0] += 1000
    assert shown.line() == "400/1,000  40%  eta 5m00s  evaluating 7/20"
    shown.show_work("")
    shown.advance(1000)
    assert shown.line() == "1,000/1,000  100%  eta 0s"


def test_bar_says_100_percent_only_at_the_end():
    assert Screen(print, step=599_999, num_steps=600_000).line() == "599,999/600,000  99%"
    assert Screen(print, step=600_000, num_steps=600_000).line() == "600,000/600,000  100%"


def test_eta_stands_still_during_other_work(clock):
    shown = Screen(print, num_steps=10)
    shown.advance(9, 30.0)
    clock[0] += 10
    assert shown.line() == "9/10  90%  eta 20s"
    shown.show_work("saving")
    assert shown.line() == "9/10  90%  eta 30s  saving"


def test_first_eta_comes_from_the_first_steps(clock):
    shown = Screen(print, num_steps=1000)
    shown.advance(100)
    assert "eta" not in shown.line()
    clock[0] += 6
    shown.advance(102)
    assert shown.line() == "102/1,000  10%  eta 44m54s"
    shown.advance(200, 1.0)
    clock[0] += 9
    shown.advance(201)
    assert shown.line() == "201/1,000  20%  eta 13m19s", "a measured step counts from then on"


@pytest.mark.parametrize("width", [80, 40])
def test_bar_is_one_line_of_the_terminal(width):
    def draw(width):
        out = io.StringIO()
        Console(file=out, width=width, force_terminal=True, color_system=None).print(shown)
        return out.getvalue().rstrip("\n")

    shown = Screen(print, step=123_456, num_steps=600_000)
    shown.advance(123_456, 12.3)
    shown.show_work("compiling the train step")
    (line,) = draw(width).splitlines()
    assert len(line) <= width
    assert "123,456/600,000" in line or width < 80
    assert "…" not in line, "in ASCII it would have six letters, and the line would wrap"
    shown.show_work("evaluating", 1234, 1953)
    assert draw(80).rstrip().endswith("evaluating 1,234/1,953"), "nothing is cut off"


def test_bar_disappears_and_lines_stay_on_a_terminal(terminal):
    stream = terminal()
    shown = Screen(print, num_steps=40)
    assert shown.is_live
    shown.show_work("evaluating", 7, 20)
    screen.log.info("step 10")
    shown._live.refresh()
    assert "evaluating 7/20" in stream.getvalue()
    shown.close()
    rest = stream.getvalue().rpartition("evaluating 7/20")[2]
    assert "\x1b[2K" in rest, "the line of the bar is erased"
    assert "step 10\n" in stream.getvalue()
    assert screen.log.handlers[0].stream is stream
    assert not shown.is_live


def test_bar_is_left_out_where_nobody_asked_for_lines(terminal, monkeypatch):
    """As in a Python session on a terminal."""
    stream = terminal()
    screen.log.setLevel(logging.WARNING)
    assert not Screen(print, num_steps=40).is_live
    screen.log.setLevel(logging.INFO)
    monkeypatch.setattr(screen.log, "handlers", [])
    assert not Screen(print, num_steps=40).is_live
    assert stream.getvalue() == ""


def test_cursor_stays_visible_in_case_the_run_is_killed(terminal):
    stream = terminal()
    shown = Screen(print, num_steps=40)
    shown._live.refresh()
    hidden, visible = (stream.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    shown.close()
    assert visible > hidden


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), ("TERM", "unknown"), ("TTY_COMPATIBLE", "0")])
def test_terminal_that_cannot_redraw_gets_lines_instead_of_a_bar(terminal, monkeypatch, clock, variable, value):
    stream = terminal()
    monkeypatch.setenv(variable, value)
    lines = []
    shown = Screen(lines.append, num_steps=40)
    assert not shown.is_live, "step lines then have progress and ETA"
    clock[0] += 11
    shown.show_work("evaluating", 3, 20)
    shown.close()
    assert (lines, stream.getvalue()) == (["evaluating 3/20"], "")


def test_callers_handlers_keep_their_streams_and_start_no_bar(terminal, monkeypatch, tmp_path):
    """As in a Python session with a log file of its own."""
    stream = terminal()
    printed = logging.StreamHandler(stream)
    to_file = logging.FileHandler(tmp_path / "mine.log")
    monkeypatch.setattr(screen.log, "handlers", [to_file, printed])
    shown = Screen(print, num_steps=40)
    assert shown.is_live
    screen.log.info("step 10")
    shown.close()
    assert printed.stream is stream
    monkeypatch.setattr(screen.log, "handlers", [to_file])
    assert not Screen(print, num_steps=40).is_live
    to_file.close()
    assert (tmp_path / "mine.log").read_text() == "step 10\n"


def test_log_lines_follow_a_replaced_stdout(monkeypatch):
    """Above the bar, not into it."""
    before, now = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(before)
    monkeypatch.setattr("sys.stdout", now)
    handler.handle(logging.makeLogRecord({"msg": "first"}))
    screen._follow_stdout([handler])
    handler.handle(logging.makeLogRecord({"msg": "second"}))
    assert (before.getvalue(), now.getvalue()) == ("first\n", "second\n")
