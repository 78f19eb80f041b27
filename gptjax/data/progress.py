"""The progress of a preparation: a bar on a terminal, otherwise a log line every few seconds."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

from gptjax.data.journal import Journal
from gptjax.data.source import Source

REPORT_SECONDS = 10.0

Log = Callable[[str], None]
Report = Callable[[Journal], None]


@contextlib.contextmanager
def reporter(source: Source, log: Log, *, parts: int = 1) -> Iterator[Report]:
    """Yields a function that shows the progress: a bar on a terminal, otherwise a line every REPORT_SECONDS.

    parts: the number of parts of about equal size; this preparation is one of them.
    """
    source = dataclasses.replace(
        source, total_bytes=source.total_bytes // parts, total_documents=source.total_documents // parts
    )
    if sys.stderr.isatty():
        with _terminal_reporter(source) as bar:
            yield bar
        return
    start = last = time.monotonic()
    first: float | None = None  # the share at the first report: a preparation that continues does not start at 0

    def report(journal: Journal) -> None:
        nonlocal last, first
        now = time.monotonic()
        share = _share(source, journal)
        if first is None:
            first = share
        if now - last < REPORT_SECONDS:
            return
        last = now
        eta = ""
        if share > first:
            elapsed = now - start
            seconds = elapsed * (1 - share) / (share - first)
            eta = f", ETA {seconds:.0f} s"
        log(_describe(journal) + eta)

    yield report


@contextlib.contextmanager
def _terminal_reporter(source: Source) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # here: only where it is shown

    columns = (
        TextColumn("{task.fields[done]}"),
        BarColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as progress:
        total = 1.0 if source.total_bytes or source.total_documents else None  # None: a bar without an end
        task = progress.add_task("", total=total, done="")

        def report(journal: Journal) -> None:
            progress.update(
                task,
                completed=_share(source, journal),
                done=_describe(journal),
            )

        yield report


def _describe(journal: Journal) -> str:
    tokens = sum(counts.tokens for counts in journal.splits.values())
    return f"{journal.documents:,} documents, {tokens:,} tokens"


def _share(source: Source, journal: Journal) -> float:
    """Returns the part of the source that is done, 0 if its size is not known."""
    if source.total_bytes:
        done_bytes = sum(counts.bytes for counts in journal.splits.values())
        return min(1.0, done_bytes / source.total_bytes)
    if source.total_documents:
        return min(1.0, journal.documents / source.total_documents)
    return 0.0
