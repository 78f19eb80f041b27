"""Checkpoint metadata under its own checksum; and whether a failed read means a corrupt checkpoint.

A checkpoint is corrupt if a part is missing, cannot be parsed, or has a wrong checksum, its own or the file system's.
Every other failure (permissions, an unreachable disk or bucket, too many open files, no memory) means that it cannot be
read at the moment. A corrupt checkpoint is renamed, and the run resumes from an older one. A checkpoint that cannot be
read is left alone, and the run ends.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
from typing import Any

from etils import epath

from gptjax.errors import CheckpointError, UnreadableError, one_line
from gptjax.workdir import is_bucket

FORMAT = 2  # format 1 stored all arrays of a tree in one database
RECORD_FILE = "_CHECKPOINT_METADATA"  # Orbax's file of custom metadata
LARGEST_RECORD = 32 * 2**20  # bytes; a record of GPT-2 XL takes ten thousand
NO_MATCH = (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError)  # raised on unexpected content
FAILURES = (*NO_MATCH, OSError, MemoryError)  # raised by a read that fails
# A part is missing, something else is in its place, or the file system found it corrupt.
DAMAGE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EBADMSG,
    errno.EUCLEAN,
}
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # the same, where an error has no number
# tensorstore's status codes of an unreachable store. NOT_FOUND and DATA_LOSS are not among them: they mean damage.
OUT_OF_REACH = re.compile(
    r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|CANCELLED|ABORTED)\b"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """The metadata of a checkpoint."""

    step: int
    config: dict[str, Any]
    history: dict[str, Any]  # the run so far: skipped steps, seconds spent
    data: dict[str, Any]  # fingerprint of the data, and the settings that determine the order of its batches
    fingerprints: dict[str, list[int]]  # path of an array -> its two sums, as fingerprint.py computes them
    versions: dict[str, str]
    format: int = FORMAT


class CorruptCheckpointError(Exception):
    """One checkpoint is corrupt; the message is a short reason. It is handled, so it is no UserError."""


def read_record(directory: epath.Path, step: int) -> Record:
    """Returns the record of the checkpoint of `step` in `directory`.

    Raises:
        CorruptCheckpointError: a part is missing, cannot be parsed, or has a wrong checksum.
        UnreadableError: it cannot be read at the moment.
        CheckpointError: a newer gptjax made it.
    """
    try:
        _reject_links(directory)
        record = _parse(_read(directory / RECORD_FILE), directory)
    except CheckpointError:
        raise
    except FAILURES as error:
        raise judge(directory, "record unreadable", error) from error
    if record.step != step:
        raise CorruptCheckpointError(f"its record is of step {record.step}")
    return record


def _read(file: epath.Path) -> str:
    if is_bucket(str(file)):
        return _read_from_bucket(file)
    size = os.stat(file).st_size  # not etils' stat(): it fails where the owner has no name, as in some containers
    if size > LARGEST_RECORD:
        raise ValueError(f"{size} bytes")
    return file.read_text()


def _read_from_bucket(file: epath.Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_RECORD + 1)
    except FAILURES:
        raise
    except Exception as error:  # each library of a bucket has exceptions of its own
        raise ConnectionError(one_line(error)) from error
    if len(content) > LARGEST_RECORD:
        raise ValueError(f"more than {LARGEST_RECORD} bytes")
    return content.decode()


def _parse(text: str, directory: epath.Path) -> Record:
    values = unseal(json.loads(text)["custom_metadata"])
    if values["format"] > FORMAT:
        raise CheckpointError(
            f"made by a newer gptjax {values['versions']}",
            field=str(directory),
            remedy="upgrade this one",
        )
    record = Record(**values)
    for value in (record.history, record.data, record.fingerprints):
        if not isinstance(value, dict):
            raise TypeError("a field is of the wrong type")
    return record


def judge(directory: epath.Path, what: str, error: Exception) -> CorruptCheckpointError | UnreadableError:
    """Returns the error to raise after a read of the checkpoint in `directory` has failed.

    what: the problem if the checkpoint is corrupt, as in "record unreadable".
    """
    reason = _why_unreadable(directory, error)
    if reason:
        return UnreadableError(
            f"cannot be read now: {reason}; nothing was changed",
            field=str(directory),
            remedy="if that lasts, rename it: the run then resumes from the checkpoint before it",
        )
    return CorruptCheckpointError(f"{what} ({one_line(error)})")


def _why_unreadable(directory: epath.Path, error: Exception) -> str:
    """Returns why a checkpoint cannot be read at the moment, '' where it is corrupt."""
    cause: BaseException | None = error
    while cause is not None:
        reason = _temporary_reason(cause)
        if reason:
            return reason
        cause = cause.__cause__ or cause.__context__
    return "" if is_bucket(str(directory)) else _why_files_unreadable(directory)


def _temporary_reason(error: BaseException) -> str:
    """Returns why one error, without its causes, does not mean damage; '' if it may."""
    if isinstance(error, MemoryError):
        return "out of memory"
    text = str(error)
    tensorstore_code = re.search(r"os_error_code='(\d+)'", text)
    number = int(tensorstore_code[1]) if tensorstore_code else getattr(error, "errno", None)
    if number is not None:
        return "" if number in DAMAGE else os.strerror(number)
    is_unreachable = isinstance(error, OSError) and not isinstance(error, MISSING)  # as a bucket's errors
    return one_line(error) if is_unreachable or OUT_OF_REACH.search(text) else ""


def _why_files_unreadable(directory: epath.Path) -> str:
    """Returns why a file of a checkpoint cannot be read, '' where all can.

    Orbax raises the same error for a missing array and for one that it may not read, so this tries each file.
    """
    failed: list[OSError] = []
    for folder, _, names in os.walk(directory, onerror=failed.append):
        for name in names:
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    file.read(1)
            except OSError as error:
                failed.append(error)
    reasons = [os.strerror(error.errno) for error in failed if error.errno and error.errno not in DAMAGE]
    return reasons[0] if reasons else ""


def _reject_links(directory: Any) -> None:
    """Raises CorruptCheckpointError if the checkpoint contains a link or a pipe.

    Orbax creates none. It would follow a link out of the checkpoint, and wait for a pipe.
    """
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(folder, name)).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                continue
            kind = "a link" if stat.S_ISLNK(mode) else "not a file"
            raise CorruptCheckpointError(f"{name!a} is {kind}")


def seal(record: Record) -> dict[str, str]:
    """Returns the record as a checkpoint's custom metadata: its JSON text, and the sha256 of the text."""
    text = json.dumps(dataclasses.asdict(record), sort_keys=True)
    return {"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(sealed: dict[str, str]) -> dict[str, Any]:
    """Returns the fields of a record that `seal` has written.

    Raises:
        ValueError: the checksum is wrong, or the text is not JSON.
        KeyError: the record or its checksum is missing.
    """
    text = sealed["record"]
    if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("wrong checksum")
    return json.loads(text)
