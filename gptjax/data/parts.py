"""A preparation in parts, on several machines, and their join: the same bytes as one process would write.

Part k of n has the k-th of n stretches of the source, in the order of its documents. It lies in DIR.parts/k-of-n.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptjax.data import shard_writer
from gptjax.data.assign import nearest
from gptjax.data.header import HEADER_BYTES, token_dtype
from gptjax.data.journal import SHARD_NAMES, Counts, Journal, read_journal, write_journal
from gptjax.data.partial import LOCK_FILE
from gptjax.data.preparation import better_assignment, first_assignment, open_work, write_documents
from gptjax.data.progress import Log
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import hash_file
from gptjax.errors import ConfigError, DataError
from gptjax.workdir import sync_path

CHUNK_TOKENS = 2**22
_NAME = re.compile(r"(\d+)-of-(\d+)")


def folder_of(out: str) -> str:
    """Returns the directory of all parts."""
    return f"{out}.parts"


def path_of(out: str, part: int, count: int) -> str:
    """Returns the directory of one part: part 1 is the first."""
    return os.path.join(folder_of(out), f"{part}-of-{count}")


def write_part(
    partial: str,
    out: str,
    settings: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    processes: int,
    log: Log,
) -> None:
    """Writes the part that `settings` name, from where it was interrupted, and renames `partial` to `out`.

    Raises:
        ConfigError: the source cannot be read in parts.
        UserError: as `prepare`.
    """
    work = open_work(partial, settings, tokenizer=tokenizer, processes=processes, log=log)
    source = work.source
    assignment = first_assignment(source, settings)
    if source.is_pipe or assignment.is_single:
        problem = "a pipe cannot be read in parts" if source.is_pipe else "is one document, which has no parts"
        raise ConfigError(problem, field="data.source", value=source.name, remedy="prepare it without --part")
    part, count = settings["part"]
    stop = source.place_of(part, count) if part < count else None
    work = dataclasses.replace(work, start=source.place_of(part - 1, count), stop=stop)
    settings = settings | {"files": work.files, "stamp": source.stamp} | dataclasses.asdict(assignment)
    journal = write_documents(partial, settings, work, is_first=True)
    folder = os.path.join(partial, "shards")
    journal.sha256 = {name: hash_file(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
    write_journal(partial, journal)  # also of a part without documents
    shutil.rmtree(os.path.join(partial, "source"), ignore_errors=True)
    os.remove(os.path.join(partial, LOCK_FILE))  # a process that waits for it finds the part complete
    sync_path(partial)
    os.rename(partial, out)
    sync_path(os.path.dirname(out))
    log(f"{out}: part {part} of {count} is done, documents: {journal.documents:,}")


def join_parts(
    partial: str,
    out: str,
    settings: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    log: Log,
) -> None:
    """Writes all parts to `out`, by way of the directory `partial`; an interrupted join starts over.

    settings: of the preparation; what the parts themselves record is taken from them.

    Raises:
        ConfigError: a part is missing or of another preparation, or there is too little text for parts.
        DataError: a part is damaged.
    """
    journals = _read_parts(out, settings)
    joined = Journal(_common(journals[0].settings))
    folder = os.path.join(partial, "shards")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for number, journal in enumerate(journals, 1):
        path = path_of(out, number, len(journals))
        for split in SHARD_NAMES:
            _append_part(folder, path, split, joined=joined, part=journal, tokenizer=tokenizer)
        joined.documents += journal.documents
        log(f"joined {path}, documents: {joined.documents:,}")
    if better_assignment(joined) is not None or not all(counts.tokens for counts in joined.splits.values()):
        raise ConfigError(
            "the source has too little text to be prepared in parts",
            field="data.source",
            value=joined.settings["source"],
            remedy="prepare it without --part",
        )
    shard_writer.finish(folder, out, journal=joined, tokenizer=tokenizer)
    skipped = sum(journal.skipped for journal in journals)
    if skipped:
        log(f"left out {skipped:,} bad rows")
    log(f"{out}: complete; {folder_of(out)} may be removed")


def _read_parts(out: str, settings: dict[str, Any]) -> list[Journal]:
    """Returns the journals of all parts, in order.

    Raises:
        ConfigError: one is missing or of another preparation.
    """
    folder = folder_of(out)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [match for match in map(_NAME.fullmatch, names) if match]
    counts = sorted({int(match[2]) for match in found})
    if not counts:
        raise ConfigError("has no part", field=folder, remedy="prepare each with --part=1/N, --part=2/N, ...")
    if len(counts) > 1:
        raise ConfigError(
            f"has parts of several divisions: {', '.join(f'N-of-{count}' for count in counts)}",
            field=folder,
            remedy="remove those of one of them",
        )
    [count] = counts
    missing = [str(part) for part in range(1, count + 1) if not os.path.isdir(path_of(out, part, count))]
    if missing:
        raise ConfigError(
            f"parts are missing of {count}: {', '.join(missing)}",
            field=folder,
            remedy=f"prepare with --part={missing[0]}/{count}, or copy it here",
        )
    paths = [path_of(out, part, count) for part in range(1, count + 1)]
    journals = [_read_part(path) for path in paths]
    for path, journal in zip(paths, journals, strict=True):
        _check_settings(path, journal, _common(journals[0].settings) | settings)
    return journals


def _read_part(path: str) -> Journal:
    journal = read_journal(path)
    if journal is None or "part" not in journal.settings:
        raise DataError("is damaged: it has no journal of a part", field=path)
    return journal


def check_part(path: str, settings: dict[str, Any]) -> None:
    """Checks that a complete part was prepared with these settings.

    Raises:
        ConfigError: it was not; the message names the difference.
        DataError: it is damaged.
    """
    _check_settings(path, _read_part(path), settings)


def _check_settings(path: str, journal: Journal, settings: dict[str, Any]) -> None:
    for name, wanted in settings.items():
        of_part = journal.settings.get(name)
        if of_part != wanted:
            problem = f"{name} is {of_part} there, and {wanted} here"
            if name == "files":
                problem = "its source had other files, by their names or sizes"
            raise ConfigError(
                f"is of another preparation: {problem}",
                field=path,
                remedy="remove it and prepare it again, with the same flags and files on all machines",
            )


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that all parts share. Files that were copied have other times, and so another stamp."""
    own = {"part", "stamp"} if settings["files"] else {"part"}
    return {name: value for name, value in settings.items() if name not in own}


def _append_part(
    folder: str,
    path: str,
    split: str,
    *,
    joined: Journal,
    part: Journal,
    tokenizer: Tokenizer,
) -> None:
    """Appends a split of a part to the shards in `folder`, and counts it in `joined`."""
    counts = joined.splits[split]
    size = joined.settings["shard_tokens"]
    for ids in _read_shards(os.path.join(path, "shards"), split, part, tokenizer):
        shard_writer.append(folder, split, ids, start=counts.tokens, size=size)
        counts.tokens += len(ids)
    added: Counts = part.splits[split]
    counts.bytes += added.bytes
    counts.documents += added.documents
    near = [(share, int(tokens)) for share, tokens in joined.near[split] + part.near[split]]
    kept = nearest(near, joined.settings["boundary"], joined.settings["window"])
    joined.near[split] = [list(document) for document in kept]


def _read_shards(folder: str, split: str, journal: Journal, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the ids of a split of a part: uint16 or uint32 [at most CHUNK_TOKENS].

    Raises:
        DataError: a shard is missing, or is not the one that the journal records.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    for index, length in enumerate(shard_writer.shard_lengths(journal, split)):
        path = os.path.join(folder, SHARD_NAMES[split].format(index))
        is_whole = os.path.exists(path) and os.path.getsize(path) == HEADER_BYTES + length * dtype.itemsize
        if not is_whole or hash_file(path) != journal.sha256.get(os.path.basename(path)):
            raise DataError("is missing or damaged", field=path, remedy="prepare this part again, or copy it again")
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            while content := file.read(CHUNK_TOKENS * dtype.itemsize):
                yield np.frombuffer(content, dtype)


def parse_part(text: str) -> tuple[int, int]:
    """Returns (2, 8) of "2/8".

    Raises:
        ConfigError: it is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= count:
        raise ConfigError("expected k/n with k from 1 to n, such as 2/8", field="--part", value=text)
    return part, count
