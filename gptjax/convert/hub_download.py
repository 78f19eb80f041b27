"""Downloads one file of a Hub repository: resumed after an interruption, and verified."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from gptjax.convert import transfer
from gptjax.convert.hub_listing import RERUN, SHA256, File
from gptjax.errors import DataError, UnavailableError
from gptjax.workdir import lock_file

log = logging.getLogger("gptjax")
FILE_PAUSES = (1.0,) * 5  # seconds before another attempt; an attempt that received some bytes does not count
MOST_RESTARTS = 5  # of a file whose server sends it from the start instead of the missing rest
RESUME = f"{RERUN} to resume"
DOWNLOAD_AGAIN = f"{RERUN} to download it"
TEMPORARY = (408, 429)  # statuses below 500 after which another attempt may succeed
RANGE_NOT_SATISFIABLE = 416
PARTIAL_CONTENT = 206


def _show_nothing(received: int) -> None:
    """Ignores the progress of a download."""


def fetch(
    file: File,
    repo: str,
    commit: str,
    *,
    token: str,
    show: Callable[[int], None] = _show_nothing,
) -> None:
    """Puts the file into its place. An earlier, interrupted download is resumed.

    show: is called with the number of the file's bytes that are here, as it grows.

    Raises:
        DataError: the server sends something other than it announced.
        UnavailableError: the server fails or is too slow.
        transfer.RefusedError: the server rejects the request.
    """
    os.makedirs(os.path.dirname(file.blob), exist_ok=True)
    with open(file.partial, "ab") as partial:
        lock_file(partial, file.partial, wait=True)  # another process that needs the file waits here
        if not os.path.exists(file.blob):
            partial.seek(0, os.SEEK_END)
            if partial.tell() > file.size:
                _empty(partial)
            if partial.tell() < file.size:
                _receive(partial, file, f"{repo}@{commit}", token=token, show=show)
            _verify(partial, file, f"{repo}@{commit}")
            os.replace(file.partial, file.blob)
        elif os.path.exists(file.partial):  # the blob exists already: from another process, name or commit
            os.unlink(file.partial)
    show(file.size)
    if file.path == file.blob:
        return
    snapshot = os.path.dirname(file.path)
    target = os.path.relpath(file.blob, snapshot)
    _link_atomically(file.path, target)


def _receive(
    partial: BinaryIO,
    file: File,
    commit: str,
    *,
    token: str,
    show: Callable[[int], None],
) -> None:
    """Appends the missing bytes to `partial`, over several connections; bytes from before a cut are kept.

    It may return before the file is complete, if the server has no more of it. `_verify` then reports the size.

    commit: as REPO@COMMIT.
    """
    pace = transfer.Pace()
    pauses = iter(FILE_PAUSES)
    restarts = iter(range(MOST_RESTARTS))
    farthest = partial.tell()
    while partial.tell() < file.size:
        failure = _try_once(
            partial,
            file,
            commit,
            token=token,
            pace=pace,
            restarts=restarts,
            show=show,
        )
        if _is_end(failure):
            return
        if partial.tell() > farthest:
            farthest = partial.tell()
            pauses = iter(FILE_PAUSES)
        elif failure is None:
            return
        if partial.tell() < file.size:
            pause = next(pauses, None)
            if pause is None:
                assert failure is not None
                raise failure
            log.info(
                "%s: %s: the connection was cut after %d of %d bytes: another attempt",
                commit,
                file.name,
                farthest,
                file.size,
            )
            pace.sleep(pause)


def _is_end(failure: Exception | None) -> bool:
    """Returns whether the server has no byte after those received."""
    return isinstance(failure, transfer.RefusedError) and failure.status == RANGE_NOT_SATISFIABLE


def _try_once(
    partial: BinaryIO,
    file: File,
    commit: str,
    *,
    token: str,
    pace: transfer.Pace,
    restarts: Iterator[int],
    show: Callable[[int], None],
) -> Exception | None:
    """Appends the bytes of one connection to `partial`; returns an error after which another attempt may succeed."""
    name = f"{commit}: {file.name}"
    try:
        _append(
            partial,
            file,
            commit,
            token=token,
            pace=pace,
            restarts=restarts,
            show=show,
        )
    except transfer.TooLongError as error:
        _empty(partial)
        raise DataError(str(error), field=name, remedy=DOWNLOAD_AGAIN) from error
    except UnavailableError as error:
        raise UnavailableError.about(name, error, remedy=RESUME) from error
    except transfer.RefusedError as error:
        if error.status in TEMPORARY or error.status >= 500 or _is_end(error):
            return error
        raise
    except Exception as error:
        # By module, because the errors of a connection are httpx's or httpx2's.
        if type(error).__module__.startswith("httpx"):
            return error
        raise
    return None


def _append(
    partial: BinaryIO,
    file: File,
    commit: str,
    *,
    token: str,
    pace: transfer.Pace,
    restarts: Iterator[int],
    show: Callable[[int], None],
) -> None:
    """Appends the bytes of one connection to `partial`.

    commit: as REPO@COMMIT.
    restarts: one is consumed if the server sends the file from the start, although the rest was requested.
    """
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    repo, _, revision = commit.partition("@")
    url = hf_hub_url(repo, file.name, repo_type=file.repo_type, revision=revision)
    start = partial.tell()
    headers = build_hf_headers(token=token or False)  # False: huggingface_hub shall not search for one
    if start:
        headers |= {"Range": f"bytes={start}-"}
    with transfer.opened(
        get_session(),
        url,
        headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        pace=pace,
    ) as answer:
        if start and answer.status != PARTIAL_CONTENT:
            if next(restarts, None) is None:
                raise UnavailableError("the server sends it from the start each time, and never all of it")
            _empty(partial)
        for piece in answer.pieces(file.size - partial.tell()):
            partial.write(piece)
            partial.flush()  # so that a kill keeps the bytes that have arrived
            show(partial.tell())


def _verify(partial: BinaryIO, file: File, commit: str) -> None:
    """Raises DataError, after emptying `partial`, unless it has the size and the hash that the server announced."""
    partial.flush()
    os.fsync(partial.fileno())
    size = os.path.getsize(file.partial)
    if size != file.size:
        _empty(partial)
        raise DataError(
            f"{file.name} has {size} bytes, not the {file.size} announced",
            field=commit,
            remedy=DOWNLOAD_AGAIN,
        )
    if SHA256.fullmatch(file.etag):
        kind = "SHA-256"
        found = _hash(file.partial)
    else:
        kind = "git's SHA-1"
        found = _hash_as_git(file.partial, size)
    if found != file.etag:
        _empty(partial)
        raise DataError(
            f"{file.name} is damaged: its {kind} differs",
            field=commit,
            remedy=DOWNLOAD_AGAIN,
        )


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_as_git(path: str, size: int) -> str:
    """Returns the hash that git gives the contents of a file of `size` bytes, as in `git hash-object`."""
    with open(path, "rb") as file:
        start = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: start).hexdigest()


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _link_atomically(path: str, target: str) -> None:
    """Makes `path` a link to `target`; another process may do the same at the same time."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, path)
