"""Writes the report of runs to a file, and shows it in a notebook."""

import html
import logging
import os
from collections.abc import Mapping, Sequence

from etils import epath

from gptjax.errors import one_line
from gptjax.report.data import read_run
from gptjax.report.page import render
from gptjax.workdir import is_bucket, replace_file

log = logging.getLogger("gptjax")
REPORT_FILE = "report.html"  # in a work directory
FRAME_HEIGHT = 800  # pixels, in a notebook; the page scrolls in it


class Report:
    """A page in memory: a notebook shows it, and `save` writes it to a file."""

    def __init__(self, workdirs: Sequence[str]) -> None:
        """Reads the runs in these work directories."""
        self.html = render([read_run(workdir) for workdir in workdirs])

    def _repr_html_(self) -> str:
        """Returns a frame with the page, whose script cannot reach the notebook."""
        style = f"width:100%;height:{FRAME_HEIGHT}px;border:0"
        return f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" style="{style}"></iframe>'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file.

        Raises:
            OSError: it cannot be written.
        """
        replace_file(path, self.html.encode())


def report_end(directory: str, workdir: str, *, spent: Mapping[str, float]) -> str:
    """Writes the report of a run that has just ended, and returns the name of its file.

    A failure is a warning, and returns "".

    directory: of its logs on this machine.
    workdir: local, or in a bucket, which gets a copy.
    spent: seconds by kind since the first start.
    """
    try:
        run = read_run(workdir, logs=directory, spent=spent)
        page = render([run], page_directory=directory).encode()
        replace_file(os.path.join(directory, REPORT_FILE), page)
        if is_bucket(workdir):
            (epath.Path(workdir) / REPORT_FILE).write_bytes(page)
    except Exception as error:  # the run is finished, whatever fails here
        log.warning("%s cannot be written: %s", os.path.join(directory, REPORT_FILE), one_line(error))
        return ""
    return REPORT_FILE
