"""Shows what runs did, as one HTML page: `gptjax report runs/a runs/b`.

The page has the curves of loss, validation, tasks, learning rate, gradient norm and speed, where the time went,
samples, the settings in which the runs differ, versions, restarts and rollbacks. It is one file, and loads nothing.
Each run writes its own at its end. The command only reads the work directories, so a run may train meanwhile.
"""

import argparse
import contextlib
import glob
import os
import time

from gptjax.cli import Parser, run_cli
from gptjax.errors import ConfigError
from gptjax.output_file import write_output
from gptjax.redaction import print_error, say
from gptjax.report.data import RunData, has_run, is_finished, read_run
from gptjax.report.write import REPORT_FILE
from gptjax.workdir import check_bucket, is_bucket, local_directory

WATCH_SECONDS = 5.0
BUSY_SHARE = 0.1  # of the time, at most, is spent on writing a watched page
MOST_RUNS = 8  # that an error lists


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line.

    Raises:
        ConfigError: a flag is wrong, or a directory has no run.
        UnavailableError: a bucket cannot be reached.
    """
    parser = Parser(__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="The work directories of one run or several.")
    parser.add_argument(
        "--out",
        default="",
        metavar="FILE",
        help=f"The HTML file to write. By default it is {REPORT_FILE}: of one run in its work directory, of several "
        "in the current directory.",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="Write the file again every few seconds until the runs are finished, and let the page load itself again.",
    )
    args = parser.parse_strictly(arguments)
    if is_bucket(args.out):
        raise ConfigError("must be a file on this machine", field="--out", value=args.out)
    for workdir in args.workdirs:
        check_bucket(workdir)
        if not has_run(workdir):
            raise _no_run(workdir)
    args.workdirs = list(dict.fromkeys(args.workdirs))
    return args


def _no_run(workdir: str) -> ConfigError:
    """Returns the error for a directory without a run; it names the runs there, or in runs/."""
    problem = "has no run" if os.path.isdir(workdir) else "no such directory"
    places = [workdir, os.path.dirname(os.path.normpath(workdir)) or ".", "runs"]
    found = [
        path
        for place in places
        for path in sorted(glob.glob(os.path.join(glob.escape(place), "*", "")))
        if has_run(path)
    ]
    runs = list(dict.fromkeys(os.path.normpath(path) for path in found))[:MOST_RUNS]
    return ConfigError(problem, field=workdir, remedy=f"runs: {', '.join(runs)}" if runs else "there are no runs here")


def main(arguments: list[str]) -> None:
    """Writes the page.

    Raises:
        UserError: a directory has no run, or the page cannot be written.
    """
    args = parse_flags(arguments)
    path = args.out or REPORT_FILE
    if not args.out and len(args.workdirs) == 1:
        directory = local_directory(args.workdirs[0])
        with contextlib.suppress(OSError):  # writing the file reports it
            os.makedirs(directory, exist_ok=True)  # of a run in a bucket that another machine trained
        path = os.path.join(directory, REPORT_FILE)
    if args.watch:
        watch(path, args.workdirs)
        return
    runs = write(path, args.workdirs)
    for run in runs:
        for note in run.notes:
            print_error(f"note: {run.workdir}: {note}")
    say(path)


def write(path: str, workdirs: list[str], *, reload_seconds: float = 0) -> list[RunData]:
    """Writes the page, and returns the runs that it shows.

    reload_seconds: after which the page loads itself again; 0 means never.

    Raises:
        WorkdirError: the file cannot be written.
    """
    from gptjax.report.page import render

    runs = [read_run(workdir) for workdir in workdirs]
    page = render(runs, page_directory=os.path.dirname(path) or ".", reload_seconds=reload_seconds)
    write_output(path, page)
    return runs


def watch(path: str, workdirs: list[str]) -> None:
    """Writes the page every few seconds, until all runs are finished or Ctrl-C; the last page does not reload itself.

    Raises:
        WorkdirError: the file cannot be written.
    """
    say(f"{path}: written again every {WATCH_SECONDS:g} s or so; Ctrl-C ends this, and not the run")
    try:
        while True:
            began = time.monotonic()
            runs = write(path, workdirs, reload_seconds=WATCH_SECONDS)
            if all(is_finished(run) for run in runs):
                break
            # A page of a million rows takes seconds to make.
            seconds = time.monotonic() - began
            time.sleep(max(WATCH_SECONDS, seconds / BUSY_SHARE))
    except KeyboardInterrupt:
        pass
    write(path, workdirs)
    say(path)


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
