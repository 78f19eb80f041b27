"""The file that a command was asked to write."""

from gptjax.errors import WorkdirError
from gptjax.workdir import replace_file


def write_output(path: str, text: str) -> None:
    """Writes a file in UTF-8, atomically.

    Raises:
        WorkdirError: it cannot be written; the remedy names --out.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise WorkdirError(
            f"cannot be written: {error.strerror}",
            field=path,
            remedy="choose another with --out=FILE",
        ) from error
