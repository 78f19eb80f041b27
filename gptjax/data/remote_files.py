"""Files in buckets, as sources of text: listed with their sizes, and read in order or from any place, through fsspec.

fsspec comes with etils, which reaches the buckets of work directories through it. etils itself cannot list names with
sizes in one request, and knows no file system for tests.
"""

import contextlib
import glob
import io
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from gptjax.data.reach import can_connect
from gptjax.errors import ConfigError, UnavailableError, install, one_line

URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}  # by scheme: gptjax's extra with the library
# gcsfs looks for credentials for 50 s where there is no network.
GOOGLE = "https://storage.googleapis.com"
EMULATOR = "STORAGE_EMULATOR_HOST"  # a variable with another address, which gcsfs reads
VERSIONS = ("ETag", "etag", "LastModified", "mtime", "created")  # keys by which fsspec's libraries tell a version
SCHEMES = (*EXTRAS, "az", "abfs", "memory")  # the last one is of this process, for tests
BLOCK_BYTES = 2**23  # read ahead at a time
CAUSES = "check the name, the network and this machine's credentials for the bucket"


class RemoteFile(NamedTuple):
    """A file of a bucket."""

    url: str
    size: int  # bytes
    version: str  # changes when the file is written; "" if the bucket tells none


def is_remote(path: str) -> bool:
    """Returns whether a path is a URL, such as gs://BUCKET/FOLDER."""
    return URL.match(path) is not None


def require_local(path: str, *, field: str) -> None:
    """Checks that a directory to write is on this machine.

    Raises:
        ConfigError: it is a URL; `field` names its flag.
    """
    if is_remote(path):
        raise ConfigError("must be a directory of this machine", field=field, value=path)


def list_remote(url: str) -> list[RemoteFile]:
    """Returns the file, all files below the folder, or those that a glob pattern matches, sorted by URL.

    Files with hidden names are among them.

    Raises:
        ConfigError: no bucket has this scheme.
        UnavailableError: a library is missing, or the bucket does not answer.
    """
    system, path = _file_system(url)
    scheme = url.partition("://")[0]
    files = []
    with _reporting(url), contextlib.suppress(FileNotFoundError):  # no such bucket
        search = system.glob if glob.has_magic(path) else system.find  # which finds a file, too
        found = search(path, detail=True)
        files = [
            RemoteFile(f"{scheme}://{name.lstrip('/')}", int(about["size"] or 0), _version_of(about))
            for name, about in found.items()
            if about["type"] == "file" and not name.endswith("/")
        ]
    return sorted(files)


def _version_of(about: dict[str, Any]) -> str:
    return next((str(about[key]) for key in VERSIONS if about.get(key)), "")


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[Any]:
    """Yields a file of a bucket, opened for reading; it can seek, and is not buffered beyond what fsspec reads ahead.

    Raises:
        ConfigError: no bucket has this scheme.
        UnavailableError: a library is missing, or the bucket does not answer, also while it is read.
    """
    system, path = _file_system(url)
    with _reporting(url):
        opened = system.open(path, "rb", block_size=BLOCK_BYTES)
    with contextlib.closing(opened):
        yield _Reported(opened, url)


class _Reported(io.RawIOBase):
    """A file of a bucket whose errors name it, and say that another attempt may succeed."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _reporting(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL, and the path in it."""
    import fsspec  # slow to import

    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ConfigError(
            f"no bucket has the scheme {scheme}://",
            field="data.source",
            value=url,
            remedy="use gs:// or s3://, or write the path of a file here",
        )
    if scheme in ("gs", "gcs") and not os.environ.get(EMULATOR) and not can_connect([GOOGLE]):
        raise UnavailableError(f"cannot be reached: {GOOGLE} does not answer", field=url, remedy=CAUSES)
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        remedy = install(EXTRAS[scheme]) if scheme in EXTRAS else one_line(error)
        raise UnavailableError("the library for this bucket is missing", field=url, remedy=remedy) from error
    except Exception as error:  # each library has exceptions of its own
        raise _unreachable(url, error) from error
    return system, str(path)


@contextlib.contextmanager
def _reporting(url: str) -> Iterator[None]:
    """Turns the errors of a library into UnavailableError."""
    try:
        yield
    except UnavailableError:
        raise
    except FileNotFoundError as error:
        raise UnavailableError("no such file in the bucket", field=url, remedy="prepare from what is there") from error
    except Exception as error:
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> UnavailableError:
    reason = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    return UnavailableError(f"cannot be reached ({reason})", field=url, remedy=CAUSES)
