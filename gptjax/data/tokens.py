"""Splits of a data directory: their shards, opened and checked, and the fingerprint that identifies the data."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.data.foreign import SPLITS, check_characters, find_shards
from gptjax.data.header import HEADER_BYTES, parse_header
from gptjax.data.meta import META_FILE, Meta, ShardMeta, SplitMeta, read_meta
from gptjax.data.shards import (
    Edges,
    Shard,
    ShardReader,
    hash_edges,
    hash_whole,
    identify,
    opened,
    pread,
    total_bytes,
)
from gptjax.documents import EndOfText
from gptjax.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from gptjax.data.tokenizer import Tokenizer

LEAST_SAMPLE = 10_000  # ids, from which a vocabulary can be guessed
LEAST_SHARE = 1 / 8  # of the vocabulary, which text of that many ids exceeds

SMALL_BYTES = 64 * 2**20  # a split below this size is checked in full at every start
# The ids of a larger split are checked at both ends of each shard at every start, and all others when they are read.
EDGE_TOKENS = 2**16  # at each end of a shard, at most
EDGE_TOKENS_OF_ALL = 2**22  # at each end of all shards together
LEAST_EDGE_TOKENS = 2**10  # at each end of a shard, at least
EDGE_BYTES = 2**20  # hashed at each end of a shard that has no sha256 in meta.json
MANY_SHARDS = 64
# Hashed in place of EDGE_BYTES where a shard has a sha256 in meta.json, or where a split has more than MANY_SHARDS:
# 10,000 shards must open in a second.
EDGE_BYTES_OF_MANY = 2**12
CHUNK_BYTES = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The tokens of one split: shards that were checked, and the `fingerprint` that identifies the data."""

    shards: tuple[Shard, ...]
    tokens: int
    bytes: int  # of text; 0 if unknown
    eot: EndOfText
    vocab_size: int
    fingerprint: str  # a sha256 that differs for other data

    @functools.cached_property
    def reader(self) -> ShardReader:
        """Reads windows of the shards; it keeps some of their descriptors open."""
        return ShardReader(self.shards)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the shards, in order."""
        return tuple(shard.path for shard in self.shards)


def open_shard(
    path: str,
    vocab_size: int,
    *,
    edge_bytes: int = EDGE_BYTES_OF_MANY,
    edge_tokens: int = EDGE_TOKENS,
) -> Shard:
    """Returns a shard whose header, size, and ids at both ends were checked.

    Args:
        path: the file.
        vocab_size: every id must be below it.
        edge_bytes: bytes to hash at each end, by which a copy in its place is recognised.
        edge_tokens: ids to check at each end.

    Raises:
        DataError: the file is missing, empty or damaged, or an id is not below `vocab_size`.
    """
    with opened(path) as descriptor:
        identity = identify(path, descriptor)
        head = pread(path, descriptor, HEADER_BYTES, offset=0)
        layout = parse_header(path, head, identity.size)
        edges = hash_edges(
            path,
            descriptor,
            identity.size,
            size=edge_bytes,
        )
        shard = Shard(
            path=path,
            dtype=layout.dtype,
            offset=layout.offset,
            count=layout.count,
            identity=identity,
            edges=edges,
        )
        checked = min(edge_tokens, shard.count)
        first_ids = shard.read_open(descriptor, 0, checked)
        check_ids(path, first_ids, vocab_size)
        tail_start = shard.count - checked
        last_ids = shard.read_open(descriptor, tail_start, shard.count)
        check_ids(path, last_ids, vocab_size, start=tail_start)
        return shard


def check_ids(
    path: str,
    ids: np.ndarray,
    vocab_size: int,
    *,
    start: int = 0,
) -> None:
    """Checks that all ids are in the vocabulary.

    Args:
        path: the shard, for the message.
        ids: uint16 or uint32 [at least 1].
        vocab_size: every id must be below it.
        start: the position of ids[0] in the shard, for the message.

    Raises:
        DataError: an id is not below `vocab_size`; the message has the shard, the token's number and the id.
    """
    if vocab_size > np.iinfo(ids.dtype).max:
        return
    if ids.max() >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))  # the first one
        bad_id = int(ids[at])
        raise DataError(
            f"token {start + at} is id {bad_id}, but the tokenizer has {vocab_size} ids",
            field=path,
            remedy="use the tokenizer that the data was made with, or restore the shard",
        )


def check_all_ids(shard: Shard, vocab_size: int) -> None:
    """Reads and checks all ids of a shard, in bounded memory.

    Raises:
        DataError: as check_ids, or the shard cannot be read.
    """
    step = max(1, CHUNK_BYTES // shard.dtype.itemsize)
    for start in range(0, shard.count, step):
        ids = shard.read(start, start + step)
        check_ids(shard.path, ids, vocab_size, start=start)


def hash_file(path: str) -> str:
    """Returns the sha256 of a file, in hex.

    Raises:
        DataError: it cannot be read.
    """
    with opened(path) as descriptor:
        return hash_whole(path, descriptor)


def open_split(
    directory: str,
    split: str,
    *,
    tokenizer: "Tokenizer",
    eot_position: str = "auto",
) -> Split:
    """Returns the split `train` or `validation` of a directory written by prepare, by llm.c or by nanoGPT.

    With meta.json, sizes and counts are always checked, and hashes where the split is small (`verify` checks them all).
    Without it, the header, the size and the ids are checked, and a line in the log reports that it is missing.

    Raises:
        DataError: anything is missing or damaged.
        ConfigError: the directory was prepared with another tokenizer.
    """
    meta = read_meta(directory)
    if meta is None:
        return _open_without_meta(
            directory,
            split,
            tokenizer=tokenizer,
            eot_position=eot_position,
        )
    if not tokenizer.has_hash(meta.tokenizer_sha256, meta.tokenizer):
        raise ConfigError(
            f"{directory} was prepared with another tokenizer, {one_line(meta.tokenizer)!r}",
            field="data.tokenizer",
            value=tokenizer.name,
            remedy="set data.tokenizer to that one, or data.path to other data",
        )
    split_meta = _get_split(meta, directory, split)
    shards = _open_known_shards(directory, split_meta.shards, meta.vocab_size)
    identity = [(known.file, known.tokens, known.sha256) for known in split_meta.shards]
    if eot_position == "auto":
        eot_position = meta.eot_position
    return Split(
        shards=shards,
        tokens=split_meta.tokens,
        bytes=split_meta.bytes,
        eot=EndOfText(tokenizer.eot_id, eot_position),
        vocab_size=meta.vocab_size,
        fingerprint=_fingerprint(identity),
    )


def _get_split(meta: Meta, directory: str, split: str) -> SplitMeta:
    if split not in meta.splits:
        available = one_line(", ".join(meta.splits) or "none")
        raise DataError(
            f"{META_FILE} has no split {split!r}, only {available}",
            field=directory,
        )
    return meta.splits[split]


def _open_known_shards(
    directory: str,
    known_shards: tuple[ShardMeta, ...],
    vocab_size: int,
) -> tuple[Shard, ...]:
    """Returns the shards of one split in meta.json, with their hashes checked where the split is small."""
    edge_tokens = _edge_tokens(len(known_shards))
    shards = []
    for known in known_shards:
        path = os.path.join(directory, known.file)
        shards.append(_open_known(path, known, vocab_size, edge_tokens))
    if sum(shard.nbytes for shard in shards) < SMALL_BYTES:
        _raise_all([_check_hash(shard.path, shard.sha256) for shard in shards])
    return tuple(shards)


def _edge_tokens(num_shards: int) -> int:
    """Returns the number of ids to check at each end of each of `num_shards` shards."""
    share = EDGE_TOKENS_OF_ALL // num_shards
    return min(EDGE_TOKENS, max(LEAST_EDGE_TOKENS, share))


def _open_known(
    path: str,
    known: ShardMeta,
    vocab_size: int,
    edge_tokens: int = EDGE_TOKENS,
) -> Shard:
    shard = open_shard(path, vocab_size, edge_tokens=edge_tokens)
    if shard.count != known.tokens:
        raise DataError(
            f"{shard.count} tokens, but {META_FILE} counts {known.tokens}",
            field=path,
        )
    return dataclasses.replace(shard, sha256=known.sha256)


def _check_hash(path: str, expected: str) -> DataError | None:
    """Returns an error if the file's sha256 is not the expected one.

    Raises:
        DataError: the file cannot be read.
    """
    found = hash_file(path)
    if found == expected:
        return None
    hashes = f"sha256 {found[:12]}..., but {META_FILE} has {expected[:12]}..."
    return DataError(f"the shard is damaged ({hashes})", field=path)


def _open_without_meta(
    directory: str,
    split: str,
    *,
    tokenizer: "Tokenizer",
    eot_position: str,
) -> Split:
    check_characters(directory, tokenizer)
    paths = find_shards(directory, split)
    is_small = total_bytes(paths) < SMALL_BYTES
    edge_bytes = EDGE_BYTES if len(paths) <= MANY_SHARDS else EDGE_BYTES_OF_MANY
    edge_tokens = _edge_tokens(len(paths))
    shards = []
    for path in paths:
        shard = open_shard(
            path,
            tokenizer.vocab_size,
            edge_bytes=edge_bytes,
            edge_tokens=edge_tokens,
        )
        if is_small and shard.count > 2 * edge_tokens:  # otherwise both ends are all of it
            check_all_ids(shard, tokenizer.vocab_size)
        shards.append(shard)
    if eot_position == "auto":
        # A text that ends with end-of-text does not begin with it, unless its first document is empty.
        first_id = shards[0].read(0, 1)[0]
        eot_position = "first" if first_id == tokenizer.eot_id else "last"
    warn_of_small_ids(shards[0], tokenizer)
    edges = [(shard, shard.edges) for shard in shards]
    tokens = sum(map(len, shards))
    logging.getLogger("gptjax").info(
        f"{directory}: {tokens:,} {split} tokens without {META_FILE}: assuming {tokenizer.name} ids, end-of-text"
        f" {eot_position} in a document"
    )
    return Split(
        shards=tuple(shards),
        tokens=tokens,
        bytes=0,
        eot=EndOfText(tokenizer.eot_id, eot_position),
        vocab_size=tokenizer.vocab_size,
        fingerprint=_foreign_fingerprint(edges),
    )


def warn_of_small_ids(shard: Shard, tokenizer: "Tokenizer") -> None:
    """Warns if the first ids are far below the vocabulary: they are probably another tokenizer's."""
    ids = shard.read(0, EDGE_TOKENS)
    largest = int(ids.max())
    if len(ids) >= LEAST_SAMPLE and largest < LEAST_SHARE * tokenizer.vocab_size:
        logging.getLogger("gptjax").warning(
            "%s: its first %s ids go up to %s only, and %s has %s: is data.tokenizer the one that made them?",
            shard.path,
            f"{len(ids):,}",
            f"{largest:,}",
            tokenizer.name,
            f"{tokenizer.vocab_size:,}",
        )


def _foreign_fingerprint(shards: list[tuple[Shard, Edges]]) -> str:
    """Returns the fingerprint of shards without a sha256: from their names, sizes, and the hashes of their ends."""
    parts = []
    for shard, edges in shards:
        name = os.path.basename(shard.path)
        size = shard.identity.size
        parts.append((name, size, edges.head, edges.tail))
    return _fingerprint(parts)


def has_former_fingerprint(split: Split, fingerprint: str) -> bool:
    """Returns whether `fingerprint` is the one that this data had until 2026-11-28.

    Until then EDGE_BYTES were hashed at each end of every shard without meta.json, even in a split of more than
    MANY_SHARDS. Reading them takes a while.

    Raises:
        DataError: a shard cannot be read.
    """
    if len(split.shards) <= MANY_SHARDS:
        return False
    if any(shard.sha256 for shard in split.shards):
        return False
    shards = []
    for shard in split.shards:
        with opened(shard.path) as descriptor:
            edges = hash_edges(
                shard.path,
                descriptor,
                shard.identity.size,
                size=EDGE_BYTES,
            )
        shards.append((shard, edges))
    return fingerprint == _foreign_fingerprint(shards)


def _fingerprint(parts: list[tuple[Any, ...]]) -> str:
    content = json.dumps(parts).encode()
    return hashlib.sha256(content).hexdigest()


def verify(directory: str, tokenizer: "Tokenizer | None" = None) -> None:
    """Reads every byte of a directory's shards and compares hashes and ids with meta.json.

    Args:
        directory: written by prepare, by llm.c or by nanoGPT.
        tokenizer: needed only without meta.json, when only the ids can be checked.

    Raises:
        DataError: one line for each damaged shard.
        ConfigError: the directory has no meta.json, and `tokenizer` is None.
    """
    meta = read_meta(directory)
    files: list[tuple[str, ShardMeta | None]] = []
    if meta is not None:
        vocab_size = meta.vocab_size
        for split_meta in meta.splits.values():
            for known in split_meta.shards:
                path = os.path.join(directory, known.file)
                files.append((path, known))
    elif tokenizer is not None:
        vocab_size = tokenizer.vocab_size
        for split in SPLITS:
            for path in find_shards(directory, split):
                files.append((path, None))
    else:
        raise ConfigError(
            f"no {META_FILE}, so a tokenizer is needed to check the ids",
            field=directory,
        )
    _raise_all([_find_damage(path, known, vocab_size) for path, known in files])


def _find_damage(path: str, known: ShardMeta | None, vocab_size: int) -> DataError | None:
    try:
        if known is None:
            shard = open_shard(path, vocab_size)
            check_all_ids(shard, vocab_size)
            return None
        shard = _open_known(path, known, vocab_size)
        check_all_ids(shard, vocab_size)
        return _check_hash(path, known.sha256)
    except DataError as error:
        return error


def _raise_all(found: list[DataError | None]) -> None:
    errors = [error for error in found if error is not None]
    if errors:
        raise DataError.of(errors)
