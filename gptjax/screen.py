"""What a command shows while it works: a live bar on a terminal, elsewhere a line every few seconds of long work."""

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from gptjax.goodput import duration

log = logging.getLogger("gptjax")
REPORT_SECONDS = 10.0
REFRESHES_PER_SECOND = 4
BAR_WIDTH = 20  # columns; the bar and its longest text fill 80


class Screen:
    """Shows how far a command has come; close it.

    On a terminal it is a bar below the log lines, which a thread redraws and which disappears at the end. Elsewhere,
    work that takes longer than REPORT_SECONDS writes a line now and then.
    """

    def __init__(
        self, write: Callable[[str], None], *, stderr: bool = False, step: int = 0, num_steps: int = 0
    ) -> None:
        """Shows the bar.

        write: writes a line where there is no terminal.
        stderr: whether the bar belongs on standard error, because standard output is the command's result.
        step, num_steps: how far a training is; 0 steps for other commands.
        """
        self._write = write
        self._step = step
        self._num_steps = num_steps
        self._step_seconds = math.nan
        self._stepped_at = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time, from which the first ETA is computed
        self._work = ""
        self._last_line = time.monotonic()
        self._handlers = _stdout_handlers()
        self._live = _start_live(self, stderr=stderr) if self._handlers else None
        _follow_stdout(self._handlers)  # rich has replaced it

    @property
    def is_live(self) -> bool:
        """Whether there is a bar."""
        return self._live is not None

    def advance(self, step: int, step_seconds: float = math.nan) -> None:
        """Shows that `step` is done.

        step_seconds: what a step takes. While that is not known, the calls since the first one give it.
        """
        now = time.monotonic()
        self._step = step
        self._stepped_at = now
        if math.isfinite(step_seconds):
            self._step_seconds = step_seconds
            self._first = None
        elif self._first is None and math.isnan(self._step_seconds):
            self._first = step, now
        elif self._first is not None and step > self._first[0]:
            first_step, first_time = self._first
            self._step_seconds = (now - first_time) / (step - first_step)

    def show_work(self, what: str, done: int = 0, total: int = 0) -> None:
        """Shows what the command does besides its steps, such as "evaluating", and how far that is; "" ends it."""
        self._work = f"{what} {done:,}/{total:,}" if total else what
        now = time.monotonic()
        if not done:
            self._last_line = now
        elif not self.is_live and now - self._last_line >= REPORT_SECONDS:
            self._last_line = now
            self._write(self._work)

    def line(self) -> str:
        """Returns the text of the bar."""
        parts = []
        if self._num_steps:
            percent = 100 * self._step // self._num_steps  # rounded down: 100% means done
            parts.append(f"{self._step:,}/{self._num_steps:,}  {percent}%")
            seconds_left = self._step_seconds * (self._num_steps - self._step)
            if math.isfinite(seconds_left):
                # Counts down between two steps, too, unless the time is spent on something else.
                passed = 0.0 if self._work else min(time.monotonic() - self._stepped_at, self._step_seconds)
                eta = math.ceil(max(seconds_left - passed, 0.0))
                parts.append(f"eta {eta}s" if eta < 60 else f"eta {duration(eta)}")
        if self._work:
            parts.append(self._work)
        return "  ".join(parts)

    def __rich__(self) -> Any:
        """Returns the bar for one redraw; rich calls it."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        text = Text(self.line(), no_wrap=True, overflow="crop")  # an ellipsis is no ASCII
        if self._num_steps:
            grid.add_row(ProgressBar(self._num_steps, self._step, width=BAR_WIDTH), text)
        else:
            grid.add_row(text)
        return grid

    def close(self) -> None:
        """Removes the bar."""
        if self._live is not None:
            self._live.stop()
            _follow_stdout(self._handlers)  # rich has restored it
            self._live = None


def _start_live(screen: Screen, *, stderr: bool) -> Any:
    """Returns rich's display of `screen`; None without a terminal that can redraw a line."""
    stream = sys.stderr if stderr else sys.stdout
    if not stream.isatty():
        return None
    from rich.console import Console  # slow to import
    from rich.live import Live

    console = Console(stderr=stderr)
    if console.is_dumb_terminal or not console.is_terminal:  # by TERM and TTY_COMPATIBLE
        return None
    live = Live(
        screen,
        console=console,
        refresh_per_second=REFRESHES_PER_SECOND,
        redirect_stdout=not stderr,
        redirect_stderr=sys.stderr.isatty(),  # a file gets what is meant for it
        transient=True,
    )
    live.start()
    console.show_cursor(True)  # rich hides it, and nothing would bring it back after kill -9
    return live


def _stdout_handlers() -> list[logging.StreamHandler[Any]]:
    """Returns the handlers that print gptjax's log lines; none where nobody asked for them.

    Others, such as a caller's log file, are not gptjax's to redirect.
    """
    if not log.isEnabledFor(logging.INFO):
        return []
    handlers = [handler for handler in log.handlers if isinstance(handler, logging.StreamHandler)]
    return [handler for handler in handlers if handler.stream is sys.stdout]


def _follow_stdout(handlers: list[logging.StreamHandler[Any]]) -> None:
    """Redirects log handlers to the current stdout."""
    for handler in handlers:
        handler.setStream(sys.stdout)
