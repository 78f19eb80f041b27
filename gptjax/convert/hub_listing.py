"""The files of a Hub repository that a command needs, with size, hash and place in huggingface_hub's cache."""

import dataclasses
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from gptjax.convert import transfer
from gptjax.convert.files import LARGEST_JSON, is_relative_name
from gptjax.errors import DataError, UnavailableError, one_line
from gptjax.strict_json import InvalidTextError, parse_json

T = TypeVar("T")

CONFIG = "config.json"
TEXT = (
    "generation_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
)
WEIGHTS = (  # in the order of preference; each may be sharded
    "model.safetensors",
    "pytorch_model.bin",
    "flax_model.msgpack",
)
NEEDED = f"{CONFIG} and one of {', '.join(WEIGHTS)}, unsharded or with all its shards"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # in the order of preference

COMMIT = re.compile("[0-9a-f]{40}")
GIT_HASH = COMMIT  # a SHA-1, of a file that git stores
SHA256 = re.compile("[0-9a-f]{64}")  # of a large file, which git LFS stores
LARGEST_FILE = 2**50  # bytes that a server may announce
MOST_PAGES = 10_000  # of the list of a data set's files; a page has about 1,000
SHOWN_NAMES = 12  # of a repository, in a message
TIMEOUT_SECONDS = 10.0
PAUSES = (1.0, 2.0)  # seconds before another attempt
RERUN = "rerun the same command"


class Kind(NamedTuple):
    """A kind of files that a repository may have: a model, its tokenizer alone, or the files of a data set."""

    choose: Callable[[Collection[str]], list[str]]  # names of all files -> names of those that are needed, or []
    missing: str  # the problem where there are none
    needed: str  # the files, for a message
    remedy: str = ""  # where there are none
    repo_type: str = "model"  # or dataset
    folder: str = ""  # of a data set: the files below it, or the one file of that name


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a repository, and its place: in huggingface_hub's cache, or anywhere else if `blob` is `path`."""

    name: str
    size: int  # bytes
    etag: str  # the SHA-256 of a large file; git's hash of a small one, which is a SHA-1
    blob: str  # path of the contents
    path: str  # of a link to the blob, in the snapshot of one commit
    repo_type: str = "model"  # or dataset

    @property
    def partial(self) -> str:
        """The path of an incomplete download; a new process cannot resume huggingface_hub's own partial files."""
        return f"{self.blob}.gptjax"

    @property
    def remaining(self) -> int:
        """The number of bytes still to download."""
        if os.path.exists(self.path) or os.path.exists(self.blob):
            return 0
        received = os.path.getsize(self.partial) if os.path.exists(self.partial) else 0
        if received > self.size:  # damaged: downloaded again from the start
            return self.size
        return self.size - received


def list_files(
    repo: str,
    revision: str,
    *,
    token: str,
    store: str,
    kind: Kind,
) -> tuple[str, list[File]]:
    """Returns the commit of `revision`, and the files of it that are needed.

    store: the repository's directory in the cache.
    kind: what is needed.

    Raises:
        DataError: the repository does not have it, or the server does not announce its files.
        UnavailableError: the server does not answer as a Hub does.
    """
    if kind.repo_type == "dataset":
        commit = find_commit(repo, revision, token=token)
        entries = _request_tree(repo, commit, kind.folder, token=token)
    else:
        commit, entries = _request_files(repo, revision, token=token)
    names = kind.choose([name for name in entries if isinstance(name, str)])
    if not names:
        raise DataError(
            f"{kind.missing}: it needs {kind.needed}",
            field=f"{repo}@{revision}",
            remedy=kind.remedy,
        )
    files = []
    for name in names:
        announced = _parse_entry(entries[name])
        # Commit, hash and name become paths on this machine, so they are checked.
        is_safe = isinstance(commit, str) and COMMIT.fullmatch(commit) and is_relative_name(name)
        if announced is None or not is_safe:
            raise DataError(
                f"the server does not report size and hash of {one_line(name)}",
                field=f"{repo}@{revision}",
                remedy="check HF_ENDPOINT",
            )
        size, etag = announced
        file = File(
            name=name,
            size=size,
            etag=etag,
            blob=os.path.join(store, "blobs", etag),
            path=os.path.join(store, "snapshots", commit, name),
            repo_type=kind.repo_type,
        )
        files.append(file)
    return commit, files


def _request_files(
    repo: str,
    revision: str,
    *,
    token: str,
) -> tuple[Any, dict[Any, Any]]:
    """Returns the commit of `revision`, and the Hub's entry of each of its files by name; both are unchecked."""
    from huggingface_hub import constants

    quoted = urllib.parse.quote(revision, safe="")
    url = f"{constants.ENDPOINT}/api/models/{repo}/revision/{quoted}?blobs=true"
    answer, _ = with_retries(lambda: _request(url, token=token))
    try:
        info = parse_json(answer, dict)
        entries = {entry["rfilename"]: entry for entry in info["siblings"]}
        return info["sha"], entries
    except (InvalidTextError, KeyError, TypeError) as error:
        raise _no_hub() from error


def find_commit(repo: str, revision: str, *, token: str) -> str:
    """Returns the commit that a revision of a data set names, without a request if it is one.

    Raises:
        UnavailableError: the server does not answer as a Hub does.
    """
    from huggingface_hub import constants

    if COMMIT.fullmatch(revision):
        return revision
    quoted = urllib.parse.quote(revision, safe="")
    # Without `expand`, the answer lists all files. Some data sets have a hundred thousand.
    url = f"{constants.ENDPOINT}/api/datasets/{repo}/revision/{quoted}?expand=sha"
    answer, _ = with_retries(lambda: _request(url, token=token))
    try:
        commit = parse_json(answer, dict)["sha"]
    except (InvalidTextError, KeyError) as error:
        raise _no_hub() from error
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _no_hub()
    return commit


def _request_tree(
    repo: str,
    commit: str,
    folder: str,
    *,
    token: str,
) -> dict[str, Any]:
    """Returns the Hub's entry of each file below a folder of a data set, or of the file `folder`, by name; unchecked.

    Raises:
        DataError: there is no such folder or file.
    """
    parent, _, last = folder.rpartition("/")
    try:
        if "." in last:  # probably a file, which only the list of its folder has
            entries = _list_folder(repo, commit, parent, token=token, recursive=False)
            if entries.get(folder, {}).get("type") == "file":
                return {folder: entries[folder]}
        entries = _list_folder(repo, commit, folder, token=token, recursive=True)
    except transfer.RefusedError as error:
        if not folder or error.code != "EntryNotFound":
            raise
        top = _list_folder(repo, commit, "", token=token, recursive=False)
        names = [one_line(name) for name in sorted(top) if not name.startswith(".")]
        raise DataError(
            f"no file or folder {folder!r} in it",
            field=f"{repo}@{commit}",
            remedy=f"it has: {', '.join(names[:SHOWN_NAMES]) or 'nothing'}",
        ) from error
    return {name: entry for name, entry in entries.items() if entry.get("type") == "file"}


def _list_folder(
    repo: str,
    commit: str,
    folder: str,
    *,
    token: str,
    recursive: bool,
) -> dict[str, dict[str, Any]]:
    """Returns the Hub's entries of a folder of a data set by their paths, from as many requests as it takes."""
    from huggingface_hub import constants

    path = f"/{urllib.parse.quote(folder)}" if folder else ""
    url = f"{constants.ENDPOINT}/api/datasets/{repo}/tree/{commit}{path}"
    query: str | None = f"recursive={str(recursive).lower()}"
    entries: dict[str, dict[str, Any]] = {}
    for _ in range(MOST_PAGES):
        if query is None:
            return entries
        page = f"{url}?{query}"
        answer, link = with_retries(lambda page=page: _request(page, token=token))
        query = _next_query(link)
        try:
            for entry in parse_json(answer, list):
                entries[str(entry["path"])] = _as_sibling(entry)
        except (InvalidTextError, KeyError, TypeError, AttributeError) as error:
            raise _no_hub() from error
    raise _no_hub()


def _next_query(link: str) -> str | None:
    """Returns the query of the next page that the header Link names, None at the last page.

    Only the query is taken, so that a server cannot send the token elsewhere.
    """
    found = re.search(r'<([^<>]*)>\s*;\s*rel="?next"?', link)
    return urllib.parse.urlsplit(found[1]).query if found else None


def _as_sibling(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of a tree in the form of the list of all files, whose hashes have other names."""
    sibling = {"type": entry.get("type"), "size": entry.get("size"), "blobId": entry.get("oid")}
    large = entry.get("lfs")
    if large is not None:
        sibling["lfs"] = {"sha256": large.get("oid")}
    return sibling


def _no_hub() -> UnavailableError:
    from huggingface_hub import constants

    return UnavailableError(
        "it does not answer as a Hub does",
        field=constants.ENDPOINT,
        remedy="check HF_ENDPOINT",
    )


def _request(url: str, *, token: str) -> tuple[bytes, str]:
    """Returns a short answer of the Hub, and its header Link, "" without one.

    Raises:
        UnavailableError: it is longer than LARGEST_JSON, or arrives too slowly.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token or False)  # False: huggingface_hub shall not search for one
    server = "/".join(url.split("/")[:3])
    try:
        with transfer.opened(
            get_session(),
            url,
            headers,
            timeout=TIMEOUT_SECONDS,
            pace=transfer.Pace(),
        ) as answer:
            return b"".join(answer.pieces(LARGEST_JSON)), answer.header("link")
    except transfer.TooLongError as error:
        raise UnavailableError(
            f"it does not answer as a Hub does: {error}",
            field=server,
            remedy="check HF_ENDPOINT",
        ) from error
    except UnavailableError as error:
        raise UnavailableError.about(server, error, remedy=RERUN) from error


def choose_files(names: Collection[str]) -> list[str]:
    """Returns the files of a repository that a conversion needs, the weights last; none if some are missing."""
    if CONFIG not in names:
        return []
    for unsharded in WEIGHTS:
        weights = [unsharded] if unsharded in names else _find_shards(unsharded, names)
        if weights:
            text = [name for name in TEXT if name in names]
            return [CONFIG, *text, *weights]
    return []


def choose_tokenizer(names: Collection[str]) -> list[str]:
    """Returns the files of a repository that make its tokenizer; none if there is none."""
    for files in TOKENIZERS:
        if all(name in names for name in files):
            # config.json because transformers takes the tokenizer's class from it if the settings name none.
            settings = [name for name in (CONFIG, "tokenizer_config.json") if name in names]
            return [*settings, *files]
    return []


MODEL = Kind(choose_files, "not a model that can be converted", NEEDED)
TOKENIZER = Kind(choose_tokenizer, "no tokenizer that can be read", "tokenizer.json, or vocab.json and merges.txt")


def _find_shards(unsharded: str, names: Collection[str]) -> list[str]:
    """Returns the index and all shards of the file `unsharded`; none if some are missing."""
    stem, _, ending = unsharded.partition(".")
    pattern = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{ending}")
    matches = [match for match in map(pattern.fullmatch, sorted(names)) if match]
    index = f"{unsharded}.index.json"
    if not matches or index not in names:
        return []
    announced = int(matches[0][1])
    if len(matches) != announced:
        return []
    return [index, *(match[0] for match in matches)]


def _parse_entry(entry: Mapping[str, Any]) -> tuple[int, str] | None:
    """Returns size and hash of a file in the Hub's list; None if one of them is missing or impossible."""
    size = entry.get("size")
    if type(size) is not int or not 0 <= size <= LARGEST_FILE:
        return None
    pattern = GIT_HASH
    etag = entry.get("blobId")
    large = entry.get("lfs")
    if large is not None:
        pattern = SHA256
        etag = large.get("sha256") if isinstance(large, dict) else None
    if not isinstance(etag, str) or not pattern.fullmatch(etag):
        return None
    return size, etag


def with_retries(call: Callable[[], T]) -> T:
    """Returns call(), retried on errors that pass, for which huggingface_hub itself gives up at once."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not _is_temporary(error):
                raise
            time.sleep(pause)
    return call()


def _is_temporary(error: Exception) -> bool:
    """Returns whether a server failed, or reset the connection."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", getattr(error, "status", 0))
    # By name, because ReadError is httpx's or httpx2's.
    return status >= 500 or type(error).__name__ == "ReadError"
