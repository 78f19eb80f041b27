"""A work directory: the names of its files, how they are opened and replaced, and the lock of the directory.

If the work directory is a bucket, the logs and the lock are in a local directory, `local_directory`.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal, cast

from etils import epath

from gptjax.errors import BAD_CONFIG, ConfigError, UnavailableError, UserError, WorkdirError, one_line

log = logging.getLogger("gptjax")

CONFIG_FILE = "config.json"
PARAMETERS_FILE = "parameters.json"
TOKENIZER_FILE = "tokenizer.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
TASKS_FILE = os.path.join("results", "tasks.json")  # the newest answers to tasks
DESCRIPTION = (CONFIG_FILE, PARAMETERS_FILE, TOKENIZER_FILE)  # written at each start of a run
LOGS = (*DESCRIPTION, METRICS_FILE, SAMPLES_FILE)
TENSORBOARD = "tensorboard"  # directory
PROFILE = "profile"  # directory
TRACES = "plugins/profile"  # directory in it, where TensorBoard looks for traces
LOCK_FILE = ".lock"
LARGEST_FILE = 2**31  # bytes; larger files are refused
PROCESS_NAME = re.compile(r"process-\d+")  # directory of a process's logs and lock, except process 0's


def is_bucket(workdir: str) -> bool:
    """Returns whether a work directory is in a bucket, as gs://NAME/PATH."""
    return "://" in workdir


def local_directory(workdir: str, *, process: int = 0) -> str:
    """Returns the directory of a process's logs and lock: the work directory, or for a bucket a directory under runs/.

    Each process except process 0 has a subdirectory of its own.
    """
    local = workdir
    if is_bucket(workdir):
        local = os.path.join("runs", re.sub(r"[^\w.-]+", "-", workdir).strip("-"))
    return local if process == 0 else os.path.join(local, f"process-{process}")


def is_new(directory: str) -> bool:
    """Returns whether a work directory, local or in a bucket, has no files of a run except locks of its processes.

    Raises:
        WorkdirError: it cannot be listed.
    """
    try:
        path = epath.Path(directory)
        if not (path.exists() and path.is_dir()):
            return True
        names = [entry.name for entry in path.iterdir()]
    except Exception as error:  # of the file system, or of the library that reaches the bucket
        raise WorkdirError(f"cannot be listed: {one_line(error)}", field="--workdir", value=directory) from error
    return all(name == LOCK_FILE or PROCESS_NAME.fullmatch(name) for name in names)


def is_empty(directory: str) -> bool:
    """Returns whether a local path is a directory without entries.

    Raises:
        UnavailableError: it is a directory that cannot be listed now.
    """
    try:
        return os.path.isdir(directory) and not os.listdir(directory)
    except OSError as error:
        raise UnavailableError(f"cannot be listed now: {error.strerror}", field=directory) from error


def check_bucket(directory: str) -> None:
    """Checks that a bucket can be reached. It does nothing for a local directory.

    Raises:
        ConfigError: the scheme is not known.
        UnavailableError: a library is missing, or the bucket does not answer.
    """
    if not is_bucket(directory):
        return
    try:
        epath.Path(directory).exists()
    except KeyError as error:  # raised by etils for a scheme that it does not know
        scheme = directory.partition("://")[0]
        raise ConfigError(
            f"no bucket has the scheme {scheme}://",
            field=directory,
            remedy="use gs:// or s3://",
        ) from error
    except ImportError as error:
        raise UnavailableError(f"a library is missing: {one_line(error)}", field=directory) from error
    except Exception as error:  # each library of a bucket has exceptions of its own
        raise UnavailableError(f"cannot be reached: {one_line(error)}", field=directory) from error


def open_file(directory: str | os.PathLike[str], name: str, mode: Literal["ab", "a+b"]) -> BinaryIO:
    """Opens a file of a local work directory for appending, unbuffered, and creates it if it is missing.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    access = os.O_WRONLY if mode == "ab" else os.O_RDWR
    descriptor = open_regular(os.path.join(directory, name), os.O_CREAT | os.O_APPEND | access)
    return cast(BinaryIO, os.fdopen(descriptor, mode, buffering=0))


def read_file(directory: str | os.PathLike[str], name: str) -> bytes | None:
    """Returns the content of a file of a work directory, local or in a bucket; None if the file does not exist.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than LARGEST_FILE bytes.
    """
    if is_bucket(os.fspath(directory)):
        path = epath.Path(directory) / name
        return path.read_bytes() if path.exists() else None
    try:
        return read_regular(os.path.join(directory, name))
    except FileNotFoundError:
        return None


class NotAFileError(OSError):
    """A path leads to a directory, a link, a pipe or a device where a regular file is expected."""

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(errno.EINVAL, f"is {kind}, not a regular file", os.fspath(path))


def kind_of(mode: int) -> str:
    """Returns the kind of a file with `mode`, such as "a directory"; "" for a regular file."""
    kinds = {
        stat.S_IFREG: "",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """Opens a regular file and returns its descriptor; it never follows a link at `path` and never waits for a pipe.

    Raises:
        OSError: it cannot be opened.
        NotAFileError: it is not a regular file.
    """
    with contextlib.suppress(FileNotFoundError):  # checked before it is opened: opening a device may have an effect
        kind = kind_of(os.lstat(path).st_mode)
        if kind:
            raise NotAFileError(path, kind)
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    kind = kind_of(os.fstat(descriptor).st_mode)  # checked again: the file may have been replaced since
    if kind:
        os.close(descriptor)
        raise NotAFileError(path, kind)
    return descriptor


def read_regular(path: str | os.PathLike[str], *, limit: int = LARGEST_FILE) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit:,} bytes", os.fspath(path))
    return content


def check_files(directory: str) -> None:
    """Checks that each path that a run writes is missing, or a regular file or a directory as expected, and no link.

    Raises:
        WorkdirError: one is something else; the message names it.
    """
    for name in (*LOGS, LOCK_FILE):
        _check_kind(os.path.join(directory, name), "", expected="a regular file")
    check_directories(os.path.join(directory, TENSORBOARD))
    check_profile(directory)
    if PROCESS_NAME.fullmatch(os.path.basename(os.path.normpath(directory))):
        check_directories(directory)  # a run creates it inside the work directory


def check_profile(directory: str) -> str:
    """Returns the path of a run's profiler traces, after the check of `check_files`.

    Raises:
        WorkdirError: it, or a directory inside it to which a trace is moved, is something else, such as a link.
    """
    path = os.path.join(directory, PROFILE)
    traces = os.path.join(path, TRACES)
    check_directories(path, os.path.dirname(traces), traces)
    return path


def check_directories(*paths: str) -> None:
    """Checks that each of `paths` is missing or a directory, and no link.

    Raises:
        WorkdirError: one is something else; the message names it.
    """
    for path in paths:
        _check_kind(path, "a directory", expected="a directory")


def _check_kind(path: str, wanted: str, *, expected: str) -> None:
    """Raises WorkdirError if `path` exists and its kind is not `wanted`, as `kind_of` returns it."""
    try:
        kind = kind_of(os.lstat(path).st_mode)
    except OSError:  # it does not exist; any other problem is found when it is written
        return
    if kind != wanted:
        raise WorkdirError(
            f"is {kind or 'a file'}, not {expected}",
            field=path,
            remedy="remove it, or choose another --workdir",
        )


def missing_description(directory: str) -> list[str]:
    """Returns the names of the files of DESCRIPTION that a work directory lacks."""
    return [name for name in DESCRIPTION if not os.path.lexists(os.path.join(directory, name))]


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Creates or replaces a file atomically; on return it is on disk, so that it survives a power failure.

    Raises:
        OSError: it cannot be written; the old file is unchanged.
    """
    temporary = f"{os.fspath(path)}.{secrets.token_hex(8)}.tmp"  # a name that nobody can guess and put a link at
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_path(os.path.dirname(path) or ".")


def sync_tree(path: str) -> None:
    """Syncs a file, or a directory and everything below it."""
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            sync_path(os.path.join(directory, name))
        sync_path(directory)
    if not os.path.isdir(path):
        sync_path(path)


def sync_path(path: str) -> None:
    """Syncs a file, or a directory: then its new and renamed entries survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replaces a file by `value` as JSON."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def remove_directories(paths: Sequence[str]) -> None:
    """Removes directories in the given order, and skips those that are not empty."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def is_at(file: BinaryIO, path: str | os.PathLike[str]) -> bool:
    """Returns whether `path` still leads to the open `file`; False where it was removed, moved or replaced."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    except OSError:  # the disk is unreachable: the next write reports it
        return True
    try:
        return os.path.samestat(status, os.fstat(file.fileno()))
    except OSError:  # ESTALE: another host removed it
        return False


class NotWritableError(WorkdirError):
    """The work directory, or its lock, cannot be written."""


class WorkdirLock:
    """The lock of a work directory. This process holds it until it is closed, or the process ends."""

    def __init__(self, directory: str) -> None:
        """Takes the lock, and creates the directory if it is missing.

        Raises:
            WorkdirError: another process holds the lock, or it cannot be written.
        """
        self._directory = directory
        self._created = missing_parts(os.path.join(directory, LOCK_FILE))
        self._file = _take_lock(directory)

    def renew(self) -> bool:
        """Re-takes the lock if its file was removed, moved or replaced; returns whether it was.

        If the lock cannot be written at the moment, a warning is logged, and the next call tries it again.

        Raises:
            WorkdirError: another process holds the lock now.
        """
        if is_at(self._file, os.path.join(self._directory, LOCK_FILE)):
            return False
        try:
            new = _take_lock(self._directory)
        except NotWritableError as error:
            log.warning("%s; its lock was removed, too", error)
            return True
        self._file.close()
        self._file = new
        return True

    def remove_made(self) -> None:
        """Removes the lock's file and the directories that were created for it, if they are empty."""
        if self._created:
            with contextlib.suppress(OSError):
                os.unlink(self._created[0])
            remove_directories(self._created[1:])

    def close(self) -> None:
        """Releases the lock."""
        self._file.close()


def missing_parts(path: str) -> list[str]:
    """Returns `path` and the directories above it, as far as they do not exist, from `path` upwards."""
    found = []
    while path and not os.path.lexists(path):
        found.append(path)
        path = os.path.dirname(path)
    return found


@contextlib.contextmanager
def lock_workdir(directory: str) -> Iterator[WorkdirLock]:
    """Holds the lock of the work directory inside the context, and creates the directory if it is missing.

    The lock's file and new directories are removed if the run ends with exit code 2, which promises that nothing was
    written.

    Raises:
        WorkdirError: another process holds the lock, it cannot be written, or a path of the run is of the wrong kind.
    """
    check_files(directory)
    with contextlib.closing(WorkdirLock(directory)) as lock:
        try:
            yield lock
        except UserError as error:
            if error.exit_code == BAD_CONFIG:
                lock.remove_made()
            raise


def _take_lock(directory: str) -> BinaryIO:
    file = _try_lock(directory)
    # The process that held the lock may have removed its file after it was opened here, before it was locked.
    if not is_at(file, os.path.join(directory, LOCK_FILE)):
        file.close()
        file = _try_lock(directory)
    return file


def _try_lock(directory: str) -> BinaryIO:
    try:
        os.makedirs(directory, exist_ok=True)
        file = open_file(directory, LOCK_FILE, "a+b")
    except (OSError, ValueError) as error:
        raise _not_writable(directory, error) from error
    try:
        _lock(file, directory)
    except WorkdirError:
        file.close()
        raise
    return file


def _lock(file: BinaryIO, directory: str) -> None:
    try:
        lock_file(file, f"--workdir={directory}", wait=False)
    except BlockingIOError as error:
        file.seek(0)
        text = file.read(200).decode(errors="replace")
        holder = " ".join(text.split()) or "another process"
        raise WorkdirError(
            f"in use by {holder}",
            field="--workdir",
            value=directory,
            remedy="stop it or choose another",
        ) from error
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise _not_writable(directory, error) from error


def lock_file(file: int | BinaryIO, name: str, *, wait: bool) -> None:
    """Locks an open file, called `name` in the warning that is logged if its file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # ENOSYS, EOPNOTSUPP, ENOLCK: some network file systems have no locks
        advice = "make sure that only one process at a time uses it"
        log.warning("%s: its file system has no locks (%s): %s", name, error.strerror, advice)


def _not_writable(directory: str, error: Exception) -> NotWritableError:
    reason = getattr(error, "strerror", None) or error
    return NotWritableError(
        f"cannot be written: {reason}",
        field="--workdir",
        value=directory,
        remedy="choose another",
    )
