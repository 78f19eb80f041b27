"""Model repositories of the Hugging Face Hub: fetches what a conversion reads, and publishes what it wrote."""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO, TypeVar

from gptjax.convert.files import plain
from gptjax.errors import ConfigError, DataError, UnavailableError, UserError, WorkdirError

log = logging.getLogger("gptjax")
T = TypeVar("T")

CONFIG = "config.json"
TEXT = ("generation_config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")  # the first that is there, whole or sharded
NEEDED = f"{CONFIG} and one of {', '.join(WEIGHTS)}, whole or with all its shards"

COMMIT = re.compile("[0-9a-f]{40}")
ETAG = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # of git's small files, and of large ones: the SHA-256
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@.+)?", re.ASCII)  # OWNER/NAME[@REVISION]; the oldest have no owner
PAUSES = (1.0, 2.0)  # seconds before another attempt
TIMEOUT_SECONDS = 10.0
AGAIN = "run the same command again"
GO_ON = f"{AGAIN}: it goes on where it was"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a repository, and where it is or will be in huggingface_hub's cache."""

    name: str
    size: int
    etag: str
    blob: str  # the contents
    path: str  # a link to them, in the snapshot of one commit

    @property
    def partial(self) -> str:
        """What has come so far; huggingface_hub's own partial files are of no use to a new process."""
        return f"{self.blob}.gptjax"

    @property
    def left(self) -> int:
        """How many bytes are still to come."""
        if os.path.exists(self.path) or os.path.exists(self.blob):
            return 0
        return max(0, self.size - (os.path.getsize(self.partial) if os.path.exists(self.partial) else 0))


def download(repo: str, revision: str = "") -> tuple[str, str]:
    """Returns the local snapshot of what a conversion needs, and the commit to which `revision` was pinned.

    The snapshot is in huggingface_hub's own cache ($HF_HOME), where other programs find it, too. With HF_HUB_OFFLINE
    set nothing is connected to. A private repository needs a token in HF_TOKEN; one on disk is not used.

    Raises:
        ConfigError: `repo` or `revision` cannot be a name.
        DataError: it is not there, may not be read, has no weights, or is not what the server announced.
        UnavailableError: huggingface_hub is missing, or the server does not answer.
        WorkdirError: the cache cannot be written.
    """
    revision = revision or "main"
    with _explained(f"{repo}@{revision}", GO_ON):
        store = _find_store(repo, revision)
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return _find_snapshot(store, f"{repo}@{revision}", revision)
        token = _read_token()
        commit, files = _list_files(repo, revision, token=token, store=store)
        log.info("%s@%s: %d bytes to come", repo, commit, sum(file.left for file in files))
        for file in files:  # the weights last: where they are, the snapshot is complete
            if not os.path.exists(file.path):
                _fetch(file, repo, commit, token=token)
        if revision != commit:
            _write_at_once(os.path.join(store, "refs", revision), lambda path: _write_text(path, commit))
        return os.path.dirname(files[0].path), commit


def upload(directory: str, repo: str) -> str:
    """Returns the address of the one commit that puts the files of `directory` into the model repository `repo`.

    The repository is made if there is none. Hidden files stay here.

    Raises:
        ConfigError: HF_TOKEN is not set, there is no such directory or no file in it, or `repo` cannot be a name.
        DataError: the server refuses the token or the files.
        UnavailableError: huggingface_hub is missing, or the server does not answer.
    """
    with _explained(repo, AGAIN):
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError

        token = _read_token()
        if not token:
            raise ConfigError(f"{repo}: set HF_TOKEN to a token that may write to it")
        paths = sorted(_walk(directory))
        if not paths:
            raise ConfigError(f"{directory}: no such directory, or no file in it")
        api = HfApi(token=token)
        name = _patiently(lambda: api.create_repo(repo, exist_ok=True)).repo_id  # with the owner, if `repo` has none
        # Not upload_folder, which may make several commits.
        additions = [CommitOperationAdd(path, os.path.join(directory, path)) for path in paths]
        try:
            return api.create_commit(name, additions, commit_message="Upload a model exported by gptjax").commit_url
        except HfHubHTTPError:  # some of them are ValueErrors, too
            raise
        except ValueError as error:  # such as: the server does not like the head of README.md
            raise DataError(f"{repo}: {_plain(error)}") from error


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turns all that huggingface_hub and its connections raise into the project's errors."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnavailableError("huggingface_hub is not installed: pip install 'gptjax[hub]'") from error
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"{what}: not the name of a repository, which is OWNER/NAME") from error
    except OfflineModeIsEnabled as error:
        raise UnavailableError(f"{what}: HF_HUB_OFFLINE is set: unset it and {AGAIN}") from error
    except HfHubHTTPError as error:
        raise _explain_status(what, remedy, error) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            where = error.filename or huggingface_hub.constants.HF_HUB_CACHE
            remedy = "HF_HOME can name another directory for downloads"
            raise WorkdirError(f"{where}: {error.strerror}; {remedy}") from error
        # httpx in huggingface_hub 1, httpx2 in 2; OSError without a number is its own, RuntimeError is hf_xet's.
        if not type(error).__module__.startswith("httpx") and not isinstance(error, OSError | RuntimeError):
            raise
        server = huggingface_hub.constants.ENDPOINT
        raise UnavailableError(f"{what}: no good answer from {server} ({type(error).__name__}); {remedy}") from error


def _explain_status(what: str, remedy: str, error: Any) -> UserError:
    status, code = error.response.status_code, error.response.headers.get("X-Error-Code")
    if status in (401, 403):
        return DataError(
            f"{what}: access refused ({status}): it does not exist, is private, or asks for consent to its terms; "
            "set HF_TOKEN to a token that may use it"
        )
    if status == 404:
        missing = {"RevisionNotFound": "no such revision", "EntryNotFound": "a file is not there"}
        return DataError(f"{what}: {missing.get(code, 'no such repository')} (404)")
    if status in (408, 429) or status >= 500:
        return UnavailableError(f"{what}: the server has a problem ({status}); {remedy}")
    return DataError(f"{what}: the server refuses the request ({status}): {_plain(error.server_message)}")


def _plain(text: object) -> str:
    """Returns another's text as one line, without the token, should it say that."""
    token = os.environ.get("HF_TOKEN", "").strip()
    line = plain(text)
    return line.replace(token, "(HF_TOKEN)") if token else line


def _find_store(repo: str, revision: str) -> str:
    """Returns the repository's directory in huggingface_hub's cache; its layout is documented there."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    if revision.startswith("/") or ".." in revision:  # no name in git, and not below refs
        raise ConfigError(f"{repo}@{revision}: not the name of a revision")
    return os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))


def _read_token() -> str:
    """Returns the token of the environment, or "". Any other would go into an error of the connection, in full."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("HF_TOKEN: not a token: it has blanks or other unusual letters in it")
    return token


def _choose_files(names: Collection[str]) -> list[str]:
    """Returns which of a repository's files a conversion needs, the weights last; none if it lacks some of them."""
    for whole in WEIGHTS:
        if found := [whole] if whole in names else _find_shards(whole, names):
            return [CONFIG, *(name for name in TEXT if name in names), *found] if CONFIG in names else []
    return []


def _find_shards(whole: str, names: Collection[str]) -> list[str]:
    stem, _, ending = whole.partition(".")
    index = f"{whole}.index.json"
    shards = sorted(n for n in names if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.{ending}", n))
    complete = shards and len(shards) == int(shards[0].removesuffix(f".{ending}")[-5:])
    return [index, *shards] if complete and index in names else []


def _find_snapshot(store: str, what: str, revision: str) -> tuple[str, str]:
    """Returns directory and commit of what is in the cache."""
    commit = revision
    with contextlib.suppress(OSError), open(os.path.join(store, "refs", revision)) as file:
        commit = file.read().strip()
    directory = os.path.join(store, "snapshots", commit)
    if not COMMIT.fullmatch(commit) or not _choose_files(set(_walk(directory))):
        raise UnavailableError(f"{what}: not in {store}, and HF_HUB_OFFLINE is set: unset it and {AGAIN}")
    return directory, commit


def _walk(directory: str) -> Iterator[str]:
    """Yields the files below the directory, but not hidden ones, as a/b."""
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(folder, name) for name in files if not name.startswith(".")]
        yield from (os.path.relpath(path, directory).replace(os.sep, "/") for path in paths if os.path.exists(path))


def _list_files(repo: str, revision: str, *, token: str, store: str) -> tuple[str, list[File]]:
    """Returns the commit that `revision` is now, and those of its files that a conversion needs: one request."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token or False)
    try:
        info = _patiently(lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS))
    except HfHubHTTPError:  # some of them are ValueErrors, too
        raise
    except (KeyError, TypeError, ValueError) as error:  # in what huggingface_hub makes of the answer
        raise UnavailableError(f"{api.endpoint}: it does not answer as a Hub does; check HF_ENDPOINT") from error
    entries = {entry.rfilename: entry for entry in info.siblings or []}
    names, files = _choose_files(entries), []
    if not names:
        raise DataError(f"{repo}@{revision}: not a model that can be converted: it needs {NEEDED}")
    for name in names:
        entry = entries[name]
        etag = entry.lfs.sha256 if entry.lfs else entry.blob_id
        # They become names of files here.
        if entry.size is None or not ETAG.fullmatch(etag or "") or not COMMIT.fullmatch(info.sha or ""):
            raise DataError(f"{repo}@{revision}: the server does not tell size and hash of {name}; check HF_ENDPOINT")
        blob, path = os.path.join(store, "blobs", str(etag)), os.path.join(store, "snapshots", str(info.sha), name)
        files.append(File(name, entry.size, str(etag), blob, path))
    return str(info.sha), files


def _fetch(file: File, repo: str, commit: str, *, token: str) -> None:
    """Puts the file into the snapshot; what had come of it before is not asked for again."""
    os.makedirs(os.path.dirname(file.blob), exist_ok=True)
    with open(file.partial, "ab") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)  # another process that wants it waits here
        if not os.path.exists(file.blob):
            partial.seek(0, os.SEEK_END)
            if partial.tell() > file.size:
                _empty(partial)
            if partial.tell() < file.size:
                _receive(partial, file, repo, commit, token=token)
            _check(partial, file, f"{repo}@{commit}")
            os.replace(file.partial, file.blob)
        elif os.path.exists(file.partial):
            os.unlink(file.partial)
    target = os.path.relpath(file.blob, os.path.dirname(file.path))
    _write_at_once(file.path, lambda path: os.symlink(target, path))


def _receive(partial: BinaryIO, file: File, repo: str, commit: str, *, token: str) -> None:
    """Appends to `partial` what is missing. Whole pieces of 10 MiB are kept of a connection that is cut."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo, file.name, revision=commit)
    # A range of a compressed answer would be one of other bytes.
    headers = build_hf_headers(token=token or False) | {"Accept-Encoding": "identity"}
    try:
        _patiently(
            lambda: http_get(url, partial, resume_size=partial.tell(), headers=headers, displayed_filename=file.name)
        )
    except HfHubHTTPError as error:
        if error.response.status_code != 416:  # 416: the file ends before; _check says so
            raise


def _check(partial: BinaryIO, file: File, what: str) -> None:
    """Raises DataError, and forgets what has come, unless it is what the server announced."""
    partial.flush()
    os.fsync(partial.fileno())
    size = os.path.getsize(file.partial)
    if size != file.size:
        _empty(partial)
        raise DataError(f"{what}: {file.name} has {size} bytes, not the {file.size} announced; {AGAIN} to get it anew")
    if len(file.etag) == 64 and _hash(file.partial) != file.etag:
        _empty(partial)
        raise DataError(f"{what}: {file.name} is damaged: its SHA-256 differs; {AGAIN} to get it anew")


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _patiently(call: Callable[[], T]) -> T:
    """Returns call(), tried again where the cause passes and huggingface_hub itself gives up at once."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            # ReadError: the connection was reset. It is httpx's or httpx2's.
            if status < 500 and type(error).__name__ != "ReadError":
                raise
            time.sleep(pause)
    return call()


def _write_at_once(path: str, write: Callable[[str], None]) -> None:
    """Makes `path` by write(another path), whole or not at all, whoever else does so."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    write(temporary)
    os.replace(temporary, path)


def _write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
