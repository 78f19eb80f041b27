"""The sources of documents: each yields (id, text) in a fixed order."""

import os
from typing import Any

from gptjax.data.file_sources import describe_files, find_files, open_files
from gptjax.data.hub_source import FORM, open_hub, parse_place, revision_now
from gptjax.data.readers import READERS, Reading
from gptjax.data.remote_files import is_remote
from gptjax.data.source import Source
from gptjax.data.text_files import PIPE
from gptjax.data.tfds_source import is_tfds_directory, open_stdlib, open_tfds
from gptjax.errors import ConfigError, UserError


def is_files(name: str) -> bool:
    """Returns whether the source is files of this machine, such as text:PATH."""
    kind, _, path = name.partition(":")
    return kind in READERS and not is_remote(path)


def needs_network(name: str) -> bool:
    """Returns whether the source may have to be downloaded."""
    kind, _, path = name.partition(":")
    if kind in READERS:
        return is_remote(path)
    return kind == "hf" or (kind == "tfds" and not is_tfds_directory(name))


def describe_now(name: str, *, may_connect: bool) -> dict[str, Any]:
    """Returns what meta.json would record of the source's files now; of a data set on the Hub, only its revision.

    It is {} where nothing can be compared: the source has no files, is gone, or cannot be reached.

    may_connect: whether the network may be used.
    """
    kind, _, path = name.partition(":")
    if needs_network(name) and not may_connect:
        return {}
    if kind == "hf":
        revision = revision_now(name)
        return {"revision": revision} if revision else {}
    if kind not in READERS:
        return {}
    try:
        return describe_files(find_files(path).named())
    except UserError:
        if needs_network(name):
            return {}
        raise


def canonical_name(name: str) -> str:
    """Returns the source's name with an absolute path, so that it is the same in any working directory.

    Raises:
        ConfigError: there is no such kind of source, or it is no name of a data set on the Hub.
    """
    kind, _, path = name.partition(":")
    if kind in READERS and path == PIPE:
        return name
    if kind in READERS and is_remote(path):
        scheme, _, place = path.partition("://")
        if not place.strip("/"):
            raise ConfigError(
                "names no bucket", field="data.source", value=name, remedy=f"write {kind}:{scheme}://BUCKET/FOLDER"
            )
        return f"{kind}:{scheme.lower()}://{place.rstrip('/')}"
    if kind == "hf":
        return str(parse_place(name))
    if kind in READERS and path:
        return f"{kind}:{os.path.abspath(os.path.expanduser(path))}"
    if is_tfds_directory(name):
        return f"{kind}:{os.path.abspath(os.path.expanduser(path))}"
    if name == "stdlib" or (kind == "tfds" and path):
        return name
    raise ConfigError(
        f"expected {kinds()}",
        field="data.source",
        value=name,
        remedy=_suggest(name),
    )


def _suggest(name: str) -> str:
    """Returns the remedy for a path without its kind; "" where nothing has this path."""
    if os.path.isdir(name):
        return f"write text:{name}"
    if not os.path.isfile(name):
        return ""
    endings = os.path.basename(name).split(".")[1:]  # also of a compressed file, as in rows.jsonl.gz
    kind = next((ending for ending in endings if ending in READERS), "")
    return f"write {kind}:{name}" if kind else f"write lines:{name}, or text:{name}"


def open_source(
    name: str,
    *,
    work_dir: str,
    reading: Reading | None = None,
) -> Source:
    """Returns the source.

    `stdlib` is prepared under `work_dir`, `tfds:NAME` in TFDS's directory, and `hf:OWNER/NAME` is downloaded to
    huggingface_hub's cache. Others stay in place.

    reading: how files and rows are read; None means with the defaults.

    Raises:
        ConfigError: there is no such source, path, encoding or text feature.
        DataError: the directory of `tfds:/DIR` does not hold a data set that can be read.
        UnavailableError: a data set cannot be downloaded, or a bucket cannot be reached.
        WorkdirError: there is too little space for a data set of the Hub.
    """
    reading = reading or Reading()
    kind, _, path = canonical_name(name).partition(":")
    if kind == "stdlib":
        return open_stdlib(work_dir)
    if kind == "tfds":
        return open_tfds(path, reading.text_feature)
    if kind == "hf":
        return open_hub(name, reading)
    return open_files(kind, path, reading)


def kinds() -> str:
    """Returns the forms of data.source, for messages."""
    forms = ["stdlib", "tfds:NAME[/CONFIG]", "tfds:/DIR", FORM]
    forms += [f"{kind}:PATH" for kind in READERS]
    return ", ".join(forms)
