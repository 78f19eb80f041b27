"""Whether prepared data are those of their source as it is now."""

from typing import Any

from gptjax.data import sources
from gptjax.data.meta import Meta


def changed_since(meta: Meta, options: dict[str, Any], *, may_connect: bool = False) -> str:
    """Returns what differs from when a directory was prepared: options, or files of the source; "" if nothing does.

    Files that are gone are not compared: data may be used on a machine that lacks their source.

    options: by name; those that meta.json does not have are not compared.
    may_connect: whether to compare with files of the Hub or of a bucket, too.
    """
    for name, old in meta.options.items():
        if name in options and options[name] != old:
            return f"with {name}={old}, and {name} is {options[name]} now"
    now = sources.describe_now(meta.source, may_connect=may_connect) if meta.files else {}
    if not now or now == {name: meta.files.get(name) for name in now}:
        return ""
    if "revision" in now:
        return f"from revision {meta.files.get('revision')}, and it is {now['revision']} now"
    if now["number"] == meta.files.get("number") and now["bytes"] == meta.files.get("bytes"):
        return "from files of other names or sizes"
    then = f"{meta.files.get('number', 0):,} files of {meta.files.get('bytes', 0):,} bytes"
    return f"from {then}, and there are {now['number']:,} files of {now['bytes']:,} bytes now"


def files_now(source: str) -> dict[str, Any]:
    """Returns the setting `files` of the source as it is now; {} for no files, or if they are not on this machine."""
    files = sources.describe_now(source, may_connect=False)
    return {"files": files} if files and sources.is_files(source) else {}
