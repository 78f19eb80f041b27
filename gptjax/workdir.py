"""Where the parts of a work directory lie: all in it, or for a bucket the logs on this machine, with copies there."""

import json
import os
import pathlib
import re
from typing import Any

from etils import epath

LOGS = ("config.json", "parameters.json", "tokenizer.json", "metrics.jsonl", "samples.txt")


def is_bucket(workdir: str) -> bool:
    return "://" in workdir


def local_directory(workdir: str, *, process: int = 0) -> str:
    """Returns the directory of this process's logs and lock: the work directory, or for a bucket one under runs/.

    Every process but the first has a directory of its own inside that one.
    """
    local = os.path.join("runs", re.sub(r"[^\w.-]+", "-", workdir).strip("-")) if is_bucket(workdir) else workdir
    return local if process == 0 else os.path.join(local, f"process-{process}")


def fetch_logs(workdir: str, local: str) -> None:
    """Copies the logs of a bucket to this machine where they are not, as after a move to another one."""
    if is_bucket(workdir):
        _copy_missing(epath.Path(workdir), epath.Path(local))


def store_logs(local: str, workdir: str) -> None:
    """Copies the logs of this machine to a bucket."""
    if is_bucket(workdir):
        _copy(epath.Path(local), epath.Path(workdir))


def _copy_missing(source: epath.Path, target: epath.Path) -> None:
    pathlib.Path(target).mkdir(parents=True, exist_ok=True)
    for name in LOGS:
        if (source / name).exists() and not (target / name).exists():
            (target / name).write_bytes((source / name).read_bytes())


def _copy(source: epath.Path, target: epath.Path) -> None:
    for name in LOGS:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON at once or not at all."""
    temporary = f"{os.fspath(path)}.tmp"
    pathlib.Path(temporary).write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
