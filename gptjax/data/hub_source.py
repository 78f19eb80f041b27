"""Documents of a data set on the Hugging Face Hub: which of its files hold them, downloaded at a pinned revision."""

import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from gptjax.convert import hub
from gptjax.convert.hub_listing import Kind
from gptjax.data.file_sources import Found, open_found
from gptjax.data.readers import Reading
from gptjax.data.source import Source
from gptjax.data.text_files import COMPRESSED
from gptjax.errors import ConfigError, one_line

HUB = "hf:"
FORM = "hf:OWNER/NAME[/FOLDER][@REVISION]"
NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([^@]*))?(?:@(.+))?", re.ASCII)
# The suffixes of data files and the reader of each, in the order of preference. `.json` is mostly one object per line.
SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".txt": "text",
}
ABOUT = {"dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json"}  # hold no documents
CONVERTED = "refs/convert/parquet"  # the branch into which the Hub writes most data sets as parquet
# Whole words in the path of a file, by which data sets name their splits.
TRAIN = {"train", "training"}
OTHER_SPLITS = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
SHOWN_FOLDERS = 6  # in a message


class Place(NamedTuple):
    """What hf:OWNER/NAME[/FOLDER][@REVISION] names."""

    repo: str
    folder: str  # or one file; "" means all
    revision: str  # "" means main

    def __str__(self) -> str:
        folder = f"/{self.folder}" if self.folder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.repo}{folder}{revision}"


def parse_place(name: str, *, field: str = "data.source") -> Place:
    """Returns what the name of a data set on the Hub names.

    Raises:
        ConfigError: it is not of that form.
    """
    found = NAME.fullmatch(name.removeprefix(HUB))
    repo, folder, revision = found.groups(default="") if found else ("", "", "")
    parts = folder.removesuffix("/").split("/")
    is_inside = not {"", ".", ".."}.intersection(parts) or parts == [""]
    if not found or not name.startswith(HUB) or not is_inside or not folder.isprintable():
        raise ConfigError("not the name of a data set on the Hub", field=field, value=name, remedy=f"write {FORM}")
    return Place(repo, "/".join(parts), revision)


def open_hub(name: str, reading: Reading) -> Source:
    """Returns the documents of a data set's files, which are downloaded now to huggingface_hub's cache.

    Raises:
        ConfigError: the name is of another form, or that of a file or directory here.
        DataError: the data set does not exist, may not be read, or has no files that can be read.
        UnavailableError: the Hub cannot be reached, or huggingface_hub is missing.
        WorkdirError: the cache has too little space.
    """
    place = parse_place(name)
    _refuse_local(name)
    notes: list[str] = []

    def choose_names(names: Collection[str]) -> list[str]:
        choice = choose(names, place.folder)
        notes[:] = [choice.left_out]
        return choice.names

    kind = Kind(
        choose=choose_names,
        missing="no data that can be read",
        needed=f"files that end in {', '.join(SUFFIXES)}",
        remedy=f"try {place._replace(folder='', revision=CONVERTED)}, where the Hub converts many to parquet",
        repo_type="dataset",
        folder=place.folder,
    )
    directory, commit, names = hub.download_snapshot(place.repo, place.revision, kind=kind)
    root = place.folder if names != [place.folder] else os.path.dirname(place.folder)
    found = Found([os.path.join(directory, name) for name in names], root=os.path.join(directory, root))
    source = open_found(str(place), SUFFIXES[suffix_of(names[0])], found=found, reading=reading)
    return dataclasses.replace(source, revision=commit, left_out="".join(notes))


def revision_now(name: str) -> str:
    """Returns the commit that the name of a data set means now; "" where the Hub cannot tell."""
    place = parse_place(name)
    return hub.resolve(place.repo, place.revision)


class Choice(NamedTuple):
    """The data files of a repository that are read, all with one suffix."""

    names: list[str]  # in order
    left_out: str  # for a message; "" if nothing was


def choose(names: Collection[str], folder: str) -> Choice:
    """Returns the data files to read: those of the first of SUFFIXES that any file has, without other splits' files.

    names: of the files in `folder`.
    """
    by_suffix: dict[str, list[str]] = {}
    for name in sorted(names):
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        suffix = suffix_of(name)
        if suffix and not is_hidden and os.path.basename(name) not in ABOUT:
            by_suffix.setdefault(suffix, []).append(name)
    chosen = next((suffix for suffix in SUFFIXES if suffix in by_suffix), "")
    files = by_suffix.pop(chosen, [])
    kept = _without_other_splits(files, folder)
    others = [suffix for suffix in SUFFIXES if suffix in by_suffix]
    parts = [f"{len(by_suffix[suffix]):,} {suffix} files" for suffix in others]
    if len(kept) < len(files):
        parts.append(f"{len(files) - len(kept):,} files of other splits")
    folders = sorted({os.path.dirname(name) for name in kept})
    text = f"reading {len(kept):,} {chosen} files" + _describe_folders(folders)
    if parts:
        text += f", leaving out {' and '.join(parts)}"
    is_clear = not parts and len(folders) < 2
    return Choice(kept, "" if is_clear else f"{text}; name a folder or a file to choose others: {FORM}")


def suffix_of(name: str) -> str:
    """Returns which of SUFFIXES a file has, in front of a suffix of compression; "" if none."""
    stem, ending = os.path.splitext(name)
    if ending in COMPRESSED and not stem.endswith(".parquet"):
        ending = os.path.splitext(stem)[1]
    return ending if ending in SUFFIXES else ""


def _without_other_splits(names: list[str], folder: str) -> list[str]:
    """Returns the files without those of test and validation, if any file says that it is for training."""
    start = len(folder) + 1 if folder else 0
    words = {name: set(re.findall("[a-z]+", name[start:].lower())) for name in names}
    if not any(TRAIN & found for found in words.values()):
        return names
    # The file's own name says more than its folder's: train/test.parquet is for tests, and train_eval.parquet, too.
    return [
        name
        for name in names
        if not OTHER_SPLITS & set(re.findall("[a-z]+", os.path.basename(name).lower()))
        and (TRAIN & words[name] or not OTHER_SPLITS & words[name])
    ]


def _describe_folders(folders: Sequence[str]) -> str:
    if len(folders) < 2:
        return ""
    shown = ", ".join(one_line(folder) if folder else "the top" for folder in folders[:SHOWN_FOLDERS])
    return f" of {len(folders):,} folders ({shown}{', ...' if len(folders) > SHOWN_FOLDERS else ''})"


def _refuse_local(name: str) -> None:
    """Checks that nothing on this machine has the name: a private name shall not reach a server."""
    path = name.removeprefix(HUB)
    if os.path.lexists(path):
        raise ConfigError(
            "is a file or directory here",
            field="data.source",
            value=name,
            remedy=f"write parquet:{path}, jsonl:{path} or text:{path}, or start the command elsewhere",
        )
