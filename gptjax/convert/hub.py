"""Repositories of the Hugging Face Hub: downloads the files that a command reads, and uploads a conversion's result."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptjax.convert import transfer
from gptjax.convert.files import LARGEST_JSON, is_relative_name
from gptjax.convert.hub_download import RESUME, fetch
from gptjax.convert.hub_listing import COMMIT, MODEL, RERUN, File, Kind, find_commit, list_files, with_retries
from gptjax.convert.hub_progress import progress
from gptjax.errors import ConfigError, DataError, UnavailableError, UserError, WorkdirError, install, one_line
from gptjax.strict_json import parse_json, read_at_most
from gptjax.workdir import replace_file

log = logging.getLogger("gptjax")

NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@.+)?", re.ASCII)  # OWNER/NAME[@REVISION]; the oldest have no owner
LONGEST_REF = 100  # bytes of a file in refs/, which holds a commit
RECORDS = ".gptjax"  # a directory in a repository's directory of the cache
COMMIT_MESSAGE = "Upload a model exported by gptjax"
OTHER_CACHE = "HF_HOME can name another directory for downloads"
MISSING = {  # the Hub's error codes with status 404
    "RevisionNotFound": "no such revision",
    "EntryNotFound": "a file is not there",
}


class Snapshot(NamedTuple):
    """Files of a repository at one commit, in huggingface_hub's cache."""

    directory: str
    commit: str
    names: list[str]  # of the files, relative to the directory, in the order in which `Kind.choose` returns them


def download(repo: str, revision: str = "", *, kind: Kind = MODEL) -> tuple[str, str]:
    """Returns (the local snapshot with the files of `kind`, the commit that `revision` names now).

    Raises:
        UserError: as `download_snapshot`.
    """
    snapshot = download_snapshot(repo, revision, kind=kind)
    return snapshot.directory, snapshot.commit


def download_snapshot(repo: str, revision: str = "", *, kind: Kind) -> Snapshot:
    """Returns the snapshot with the files of `kind` of the commit that `revision` names now.

    The snapshot is in huggingface_hub's own cache ($HF_HOME), where other programs find it, too. With HF_HUB_OFFLINE
    set, no connection is made. A private repository needs a token in HF_TOKEN; a token on disk is not used.

    Raises:
        ConfigError: `repo` or `revision` cannot be a name.
        DataError: the repository does not exist, may not be read, or lacks the files; or a file is not as announced.
        UnavailableError: huggingface_hub is missing, or the server does not answer, or too slowly.
        WorkdirError: the cache cannot be written, or lacks space for the files.
    """
    revision = revision or "main"
    name = f"{repo}@{revision}"
    with _user_errors(name, RESUME):
        store = _find_store(repo, revision, kind.repo_type)
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return _find_snapshot(store, name, revision, kind=kind)
        token = _read_token()
        commit, files = list_files(repo, revision, token=token, store=store, kind=kind)
        by_blob = {file.blob: file.remaining for file in files}  # two names may have the same contents
        remaining = sum(by_blob.values())
        log.info("%s@%s: %d bytes to download", repo, commit, remaining)
        _check_disk_space(store, remaining)
        _record_names(store, commit, files, kind=kind)
        # The weights of a model come last: a snapshot with weights is complete.
        missing = [file for file in files if not os.path.exists(file.path)]
        for _ in _fetch_each(missing, repo, commit, token=token):
            pass
        if revision != commit:
            _write_ref(store, revision, commit)
        names = [file.name for file in files]
        return Snapshot(os.path.join(store, "snapshots", commit), commit, names)


def _fetch_each(
    files: Sequence[File],
    repo: str,
    commit: str,
    *,
    token: str,
) -> Iterator[File]:
    """Puts files into their places one after the other, yields each, and shows the progress.

    Raises:
        DataError: the server sends something other than it announced.
        UnavailableError: the server fails or is too slow.
        transfer.RefusedError: the server rejects a request.
    """
    with progress(repo, sum(file.size for file in files)) as shown:
        for file in files:
            fetch(file, repo, commit, token=token, show=shown.show)
            shown.finish_file(file.size)
            yield file


def list_repository(
    repo: str,
    revision: str = "",
    *,
    kind: Kind,
    folder: str,
) -> tuple[str, list[File]]:
    """Returns the commit of `revision` and the files of `kind`, which belong into the local `folder`.

    Raises:
        UserError: as `download_snapshot`.
    """
    revision = revision or "main"
    with _user_errors(f"{repo}@{revision}", RERUN):
        _find_store(repo, revision, kind.repo_type)  # checks the names
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise _offline(f"{repo}@{revision}", "")
        commit, files = list_files(repo, revision, token=_read_token(), store="", kind=kind)
        placed = []
        for file in files:
            path = os.path.join(folder, os.path.basename(file.name))
            placed.append(dataclasses.replace(file, blob=path, path=path))
        return commit, placed


def download_each(files: Sequence[File], repo: str, commit: str) -> Iterator[File]:
    """Yields each of the files that `list_repository` has returned, when it is in its place.

    Raises:
        UserError: as `download_snapshot`.
    """
    with _user_errors(f"{repo}@{commit}", RESUME, other_place=""):
        yield from _fetch_each(files, repo, commit, token=_read_token())


def resolve(repo: str, revision: str = "") -> str:
    """Returns the commit that a revision of a data set names now; "" where the Hub cannot tell.

    It is for comparisons only, so no reason is given: a repository may have gone since its data were prepared.
    """
    revision = revision or "main"
    try:
        with _user_errors(f"{repo}@{revision}", RERUN):
            from huggingface_hub import constants

            return "" if constants.HF_HUB_OFFLINE else find_commit(repo, revision, token=_read_token())
    except UserError:
        return ""


def upload(directory: str, repo: str) -> str:
    """Uploads the files of `directory` to the model repository `repo` in one commit, and returns its URL.

    The repository is created if it does not exist. Hidden files are not uploaded.

    Raises:
        ConfigError: HF_TOKEN is not set, `directory` does not exist or is empty, or `repo` cannot be a name.
        DataError: the server rejects the token or the files.
        UnavailableError: huggingface_hub is missing, or the server does not answer.
    """
    with _user_errors(repo, RERUN):
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError

        token = _read_token()
        if not token:
            raise ConfigError("set HF_TOKEN to a token that may write to it", field=repo)
        paths = sorted(_walk(directory))
        if not paths:
            raise ConfigError("no such directory, or no file in it", field=directory)
        api = HfApi(token=token)
        created = with_retries(lambda: api.create_repo(repo, exist_ok=True))
        # Not upload_folder, which may make several commits.
        additions = [CommitOperationAdd(path, os.path.join(directory, path)) for path in paths]
        try:
            commit = api.create_commit(
                created.repo_id,  # with the owner, even if `repo` has none
                additions,
                commit_message=COMMIT_MESSAGE,
            )
        except HfHubHTTPError:  # some of them are ValueErrors, too
            raise
        except ValueError as error:  # for example, the server rejects the front matter of README.md
            raise DataError(_without_token(error), field=repo) from error
        return commit.commit_url


@contextlib.contextmanager
def _user_errors(name: str, remedy: str, *, other_place: str = OTHER_CACHE) -> Iterator[None]:
    """Turns the errors of huggingface_hub and its connections into user errors.

    name: of the repository, with the revision if one is known.
    remedy: for errors that pass.
    other_place: the remedy where a file cannot be written.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UnavailableError(
            "huggingface_hub is not installed",
            remedy=install("hub"),
        ) from error
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise ConfigError("not the name of a repository, which is OWNER/NAME", field=name) from error
    except OfflineModeIsEnabled as error:
        raise _offline(name, "") from error
    except HfHubHTTPError as error:
        code = error.response.headers.get("X-Error-Code", "")
        raise _status_error(
            name,
            remedy,
            status=error.response.status_code,
            code=code,
            message=error.server_message,
        ) from error
    except transfer.RefusedError as error:
        raise _status_error(name, remedy, status=error.status, code=error.code) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise WorkdirError(
                str(error.strerror),
                field=str(error.filename or huggingface_hub.constants.HF_HUB_CACHE),
                remedy=other_place,
            ) from error
        if not _is_connection_error(error):
            raise
        server = huggingface_hub.constants.ENDPOINT
        kind = type(error).__name__
        raise UnavailableError(
            f"no good answer from {server} ({kind})",
            field=name,
            remedy=remedy,
        ) from error


def _is_connection_error(error: Exception) -> bool:
    # httpx in huggingface_hub 1, httpx2 in 2; it raises OSError without a number, and hf_xet RuntimeError.
    return type(error).__module__.startswith("httpx") or isinstance(error, OSError | RuntimeError)


def _offline(name: str, problem: str) -> UnavailableError:
    return UnavailableError(
        f"{problem}HF_HUB_OFFLINE is set",
        field=name,
        remedy=f"unset it and {RERUN}",
    )


def _status_error(
    name: str,
    remedy: str,
    *,
    status: int,
    code: str,
    message: object = "",
) -> UserError:
    """Returns the error for an HTTP status and the Hub's error code and message."""
    if code == "GatedRepo":
        return DataError(
            f"access refused ({status}): its owner asks for consent to its terms",
            field=name,
            remedy="accept them on its page, and set HF_TOKEN to a token of your account",
        )
    if status in (401, 403):
        return DataError(
            f"access refused ({status}): it does not exist, is private, or asks for consent to its terms",
            field=name,
            remedy="set HF_TOKEN to a token that may use it",
        )
    if status == 404:
        missing = MISSING.get(code, "no such repository")
        return DataError(f"{missing} (404)", field=name)
    if status in (408, 429) or status >= 500:
        return UnavailableError(
            f"the server has a problem ({status})",
            field=name,
            remedy=remedy,
        )
    problem = f"the server refuses the request ({status})"
    if message:
        problem += f": {_without_token(message)}"
    return DataError(problem, field=name)


def _without_token(text: object) -> str:
    """Returns another program's text as one line, without the token, which it may quote."""
    token = os.environ.get("HF_TOKEN", "").strip()
    line = one_line(text)
    return line.replace(token, "(HF_TOKEN)") if token else line


def _find_store(repo: str, revision: str, repo_type: str) -> str:
    """Returns the repository's directory in huggingface_hub's cache; its layout is documented there."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    if revision.startswith("/") or ".." in revision:  # not a name in git, and a path outside refs
        raise ConfigError("not the name of a revision", field=f"{repo}@{revision}")
    folder = repo_folder_name(repo_id=repo, repo_type=repo_type)
    return os.path.join(constants.HF_HUB_CACHE, folder)


def _read_token() -> str:
    """Returns the token of the environment, or "".

    Any other text is rejected here, because an error of the connection would quote it in full.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("not a token: it has blanks or other unusual letters in it", field="HF_TOKEN")
    return token


def _find_snapshot(store: str, name: str, revision: str, *, kind: Kind) -> Snapshot:
    """Returns a snapshot in the cache, without a connection."""
    commit = revision
    with contextlib.suppress(OSError, ValueError):
        ref = read_at_most(os.path.join(store, "refs", revision), LONGEST_REF)
        commit = ref.decode().strip()
    directory = os.path.join(store, "snapshots", commit)
    if not COMMIT.fullmatch(commit):
        raise _offline(name, f"not in {store}, and ")
    there = set(_walk(directory))
    recorded = _recorded_names(store, commit, kind=kind)
    if recorded and not there.issuperset(recorded):
        missing = len(set(recorded) - there)
        raise _offline(name, f"{missing:,} of its {len(recorded):,} files are not in {store}, and ")
    inside = [file for file in there if not kind.folder or f"{file}/".startswith(f"{kind.folder}/")]
    names = recorded or kind.choose(inside)
    if not names:
        raise _offline(name, f"not in {store}, and ")
    if kind.repo_type == "dataset" and not recorded:
        log.info("%s: %d files as they are in %s; the Hub may have more", name, len(names), store)
    return Snapshot(directory, commit, names)


def _record_path(store: str, commit: str, kind: Kind) -> str:
    digest = hashlib.sha256(kind.folder.encode()).hexdigest()[:16]
    return os.path.join(store, RECORDS, f"{commit}-{digest}.json")


def _record_names(store: str, commit: str, files: Sequence[File], *, kind: Kind) -> None:
    """Stores the names of a data set's files, since an interrupted download looks like a smaller data set."""
    if kind.repo_type == "dataset":
        path = _record_path(store, commit, kind)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(path, json.dumps([file.name for file in files]).encode())


def _recorded_names(store: str, commit: str, *, kind: Kind) -> list[str]:
    """Returns the names that `_record_names` has stored; [] if there are none."""
    try:
        names = parse_json(read_at_most(_record_path(store, commit, kind), LARGEST_JSON), list)
        return [name for name in names if is_relative_name(name)]
    except (OSError, ValueError, TypeError):
        return []


def _write_ref(store: str, revision: str, commit: str) -> None:
    """Stores the commit of `revision`, as huggingface_hub does, for use without a connection."""
    path = os.path.join(store, "refs", revision)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    replace_file(path, commit.encode())


def _walk(directory: str) -> Iterator[str]:
    """Yields the files below the directory, except hidden ones, as a/b."""
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # os.walk enters only those left
        for name in files:
            path = os.path.join(folder, name)
            if name.startswith(".") or not os.path.exists(path):  # a dangling link
                continue
            yield os.path.relpath(path, directory).replace(os.sep, "/")


def _check_disk_space(store: str, needed: int) -> None:
    """Raises WorkdirError unless the file system of the cache has `needed` free bytes."""
    existing = store
    while not os.path.exists(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise WorkdirError(
            f"no disk space: {needed:,} bytes are still to download, and {free:,} are free",
            field=store,
            remedy=f"free some space and {RERUN}, or let HF_HOME name another directory for downloads",
        )
