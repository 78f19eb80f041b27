"""Writes the shards of a preparation: appends the ids of documents, and finishes with headers and meta.json.

The journal counts the tokens that are on disk. Shards may be longer after a kill, and are cut to its counts.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from gptjax.data.assign import Assignment, Near, nearest, shares_of
from gptjax.data.encoding import Encoded
from gptjax.data.header import HEADER_BYTES, make_header, token_dtype
from gptjax.data.journal import SHARD_NAMES, Journal
from gptjax.data.meta import Meta, ShardMeta, SplitMeta, write_meta
from gptjax.data.source import Document
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import hash_file
from gptjax.errors import DataError
from gptjax.workdir import open_regular, sync_path

TOKENIZER_FILE = "tokenizer.json"
OTHER = {"train": "validation", "validation": "train"}
ASSIGNMENT = ("boundary", "is_single", "names")  # the settings that assign documents to splits
# In meta.json, of the settings.
RECORDED = ("val_fraction", "boundary", "is_single", "text_feature", "encoding", "skip_bad", "shard_tokens")


def write_batch(
    folder: str,
    batch: list[tuple[list[Document], Encoded]],
    *,
    journal: Journal,
) -> None:
    """Appends documents to their splits' shards in `folder`, and counts them in `journal`; on return they are on disk.

    Raises:
        OSError: a shard cannot be written.
    """
    assignment = Assignment(**{field: journal.settings[field] for field in ASSIGNMENT})
    appended: dict[str, list[np.ndarray]] = {split: [] for split in SHARD_NAMES}
    for documents, encoded in batch:
        names = [document.name for document in documents]
        is_end = np.array([document.is_end for document in documents])
        shares = shares_of(encoded.hashes)
        is_validation = assignment.is_validation(names, shares)
        of_token = np.repeat(is_validation, encoded.tokens)
        for split, chosen, ids in (
            ("train", ~is_validation, encoded.ids[~of_token]),
            ("validation", is_validation, encoded.ids[of_token]),
        ):
            appended[split].append(ids)
            if _needs_more(journal, OTHER[split]):
                near = zip(shares[chosen].tolist(), encoded.tokens[chosen].tolist(), strict=True)
                journal.near[split] += map(list, near)
            counts = journal.splits[split]
            counts.bytes += int(encoded.text_bytes[chosen].sum())
            counts.documents += int(is_end[chosen].sum())
        journal.documents += int(is_end.sum())
        journal.place = documents[-1].place
    for split, arrays in appended.items():
        ids = np.concatenate(arrays)
        counts = journal.splits[split]
        append(
            folder,
            split,
            ids,
            start=counts.tokens,
            size=journal.settings["shard_tokens"],
        )
        counts.tokens += len(ids)
    _keep_nearest(journal)


def _needs_more(journal: Journal, split: str) -> bool:
    """Returns whether a split may need documents of the other one."""
    return journal.splits[split].tokens < journal.settings["window"]


def _keep_nearest(journal: Journal) -> None:
    """Leaves in journal.near what the splits may still need of each other."""
    for split, other in OTHER.items():
        documents: list[Near] = []
        if _needs_more(journal, other):
            documents = [(share, int(tokens)) for share, tokens in journal.near[split]]
        near = nearest(documents, journal.settings["boundary"], journal.settings["window"])
        journal.near[split] = [list(document) for document in near]


def append(
    folder: str,
    split: str,
    ids: np.ndarray,
    *,
    start: int,
    size: int,
) -> None:
    """Writes `ids` after the first `start` tokens of the split, whose shards have `size` tokens each.

    Args:
        folder: the directory of the shards.
        split: train or validation.
        ids: uint16 or uint32 [any number].
        start: tokens that are already written.
        size: tokens per shard.
    """
    while len(ids):
        index, used = divmod(start, size)
        taken, ids = np.split(ids, [size - used])
        path = _shard_path(folder, split, index)
        with _synced(path, os.O_CREAT | os.O_APPEND) as file:
            if used == 0:
                file.write(bytes(HEADER_BYTES))  # a placeholder: the number of tokens is not known yet
            file.write(taken.tobytes())
        start += len(taken)


@contextlib.contextmanager
def _synced(path: str, flags: int) -> Iterator[BinaryIO]:
    """Yields a regular file, opened for writing with these flags of `os.open`; it is on disk afterwards."""
    descriptor = open_regular(path, os.O_WRONLY | flags)
    mode = "ab" if flags & os.O_APPEND else "wb"  # of an open descriptor, "wb" truncates nothing
    with os.fdopen(descriptor, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _shard_path(folder: str, split: str, index: int) -> str:
    return os.path.join(folder, SHARD_NAMES[split].format(index))


def shard_lengths(journal: Journal, split: str) -> list[int]:
    """Returns the number of tokens in each shard."""
    size = journal.settings["shard_tokens"]
    full, rest = divmod(journal.splits[split].tokens, size)
    lengths = [size] * full
    if rest:
        lengths.append(rest)
    return lengths


def truncate_shards(folder: str, journal: Journal, tokenizer: Tokenizer) -> None:
    """Removes everything from `folder` that was written after the journal.

    Raises:
        DataError: a shard has less than the journal counts.
        OSError: a shard cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    width = token_dtype(tokenizer.vocab_size).itemsize
    sizes = {}  # by path
    for split in SHARD_NAMES:
        for index, length in enumerate(shard_lengths(journal, split)):
            path = _shard_path(folder, split, index)
            sizes[path] = HEADER_BYTES + length * width
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if path not in sizes:
            os.remove(path)
    for path, size in sizes.items():
        if not os.path.exists(path) or os.path.getsize(path) < size:
            raise DataError(
                "shorter than the journal records",
                field=path,
                remedy=f"remove {os.path.dirname(folder)}",
            )
        with _synced(path, 0) as file:
            file.truncate(size)


def finish(
    folder: str,
    out: str,
    *,
    journal: Journal,
    tokenizer: Tokenizer,
) -> None:
    """Writes headers, hashes, the tokenizer and meta.json, and renames `folder` to `out`.

    Raises:
        OSError: a file cannot be written.
    """
    splits = {split: _finish_split(folder, split, journal, tokenizer) for split in SHARD_NAMES}
    meta = Meta(
        source=journal.settings["source"],
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        eot_position="last",
        splits=splits,
        options={name: journal.settings[name] for name in RECORDED},
        files=journal.settings["files"],
    )
    tokenizer.save(os.path.join(folder, TOKENIZER_FILE))
    write_meta(folder, meta)
    # Everything is on disk before the rename, and the rename is on disk before the caller removes the journal.
    sync_path(folder)
    os.rename(folder, out)
    sync_path(os.path.dirname(out))


def _finish_split(
    folder: str,
    split: str,
    journal: Journal,
    tokenizer: Tokenizer,
) -> SplitMeta:
    dtype = token_dtype(tokenizer.vocab_size)
    shards = []
    for index, count in enumerate(shard_lengths(journal, split)):
        path = _shard_path(folder, split, index)
        with _synced(path, 0) as file:
            file.write(make_header(count, dtype))
        shard = ShardMeta(
            file=os.path.basename(path),
            tokens=count,
            sha256=hash_file(path),
        )
        shards.append(shard)
    counts = journal.splits[split]
    return SplitMeta(
        tokens=counts.tokens,
        bytes=counts.bytes,
        documents=counts.documents,
        shards=tuple(shards),
    )
