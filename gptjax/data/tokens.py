"""Shards of token ids on disk: llm.c's format, nanoGPT's too for reading, and the meta.json that vouches for them.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then the ids, as uint16, or as uint32
where the vocabulary is larger. nanoGPT's files are bare uint16 without a header.
"""

import dataclasses
import glob
import hashlib
import json
import logging
import mmap
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.errors import ConfigError, DataError, plain

if TYPE_CHECKING:
    from gptjax.data.tokenizer import Tokenizer

HEADER_BYTES = 1024
VERSIONS = {20240520: 1, 20240801: 7}  # by magic
DTYPES = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
LARGEST_COUNT = 2**31 - 1  # what the header can say

META_FILE = "meta.json"
META_FORMAT = 1
SPLITS = {"train": "*train*.bin", "validation": "*val*.bin"}  # with the names that other projects give to the files

SMALL_BYTES = 64 * 2**20  # a split below this size is checked whole at every start
EDGE_TOKENS = 2**16  # else so many at both ends of each shard, and what is read when it is read
CHUNK_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class ShardMeta:
    file: str
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SplitMeta:
    tokens: int
    bytes: int  # of text, end-of-text not counted
    documents: int
    shards: tuple[ShardMeta, ...]


@dataclasses.dataclass(frozen=True)
class Meta:
    """What meta.json says of a prepared directory."""

    source: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int
    eot_position: str  # in a document: first | last
    splits: dict[str, SplitMeta]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The tokens of one split, memory-mapped, checked, and identified by `fingerprint`."""

    shards: tuple[np.ndarray, ...]  # each uint16 or uint32 [tokens of the shard]
    paths: tuple[str, ...]
    tokens: int
    bytes: int  # of text; 0 if unknown
    eot_position: str  # first | last
    vocab_size: int
    fingerprint: str  # sha256 of what tells this data from any other


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the type in which a shard keeps ids below `vocab_size`."""
    return DTYPES[20240520] if vocab_size <= 65_535 else DTYPES[20240801]


def make_header(count: int, dtype: np.dtype) -> bytes:
    """Returns the 1,024 bytes before the `count` ids of a shard."""
    magic = next(magic for magic in DTYPES if DTYPES[magic] == dtype)
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = magic, VERSIONS[magic], count
    return header.tobytes()


def open_shard(path: str, vocab_size: int) -> np.memmap:
    """Returns the ids of a shard, memory-mapped: uint16 or uint32 [tokens]. Ids at both ends are checked, not all.

    Raises:
        DataError: the file is missing, empty or damaged, or an id is not below `vocab_size`.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            dtype, offset, count = _parse_header(path, file.read(HEADER_BYTES), size)
        tokens = np.memmap(path, dtype, "r", offset, (count,))
    except OSError as error:
        raise DataError(f"{path}: the shard cannot be read ({error.strerror})") from error
    check_ids(path, tokens[:EDGE_TOKENS], vocab_size)
    start = max(0, count - EDGE_TOKENS)
    check_ids(path, tokens[start:], vocab_size, start=start)
    return tokens


def _parse_header(path: str, head: bytes, size: int) -> tuple[np.dtype, int, int]:
    """Returns the ids' type, the byte at which they start, and how many there are."""
    if size == 0:
        raise DataError(f"{path}: the shard is empty")
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic not in DTYPES:
        return _parse_headerless(path, head, size)
    if size < HEADER_BYTES:
        raise DataError(f"{path}: the shard ends within its header, at byte {size} of {HEADER_BYTES}")
    if version != VERSIONS[magic]:
        raise DataError(f"{path}: header version {version}, expected {VERSIONS[magic]} with magic {magic}")
    if count < 1:
        raise DataError(f"{path}: the header counts {count} tokens, expected at least 1")
    expected = HEADER_BYTES + count * DTYPES[magic].itemsize
    if size != expected:
        raise DataError(f"{path}: {size} bytes, but the header counts {count} tokens, which take {expected} bytes")
    return DTYPES[magic], HEADER_BYTES, count


def _parse_headerless(path: str, head: bytes, size: int) -> tuple[np.dtype, int, int]:
    # 506 times id 0 after the first six is no text: it is a header whose magic is not the one we know.
    if len(head) == HEADER_BYTES and not any(head[12:]):
        magic = int(np.frombuffer(head[:4], "<i4")[0])
        raise DataError(f"{path}: the header has magic {magic}, expected one of {', '.join(map(str, DTYPES))}")
    if size % 2:
        raise DataError(f"{path}: odd size of {size} bytes, which neither llm.c's format nor bare uint16 ids can have")
    return np.dtype("<u2"), 0, size // 2


def check_ids(path: str, tokens: np.ndarray, vocab_size: int, *, start: int = 0) -> None:
    """Reads all of `tokens`, of which the first is number `start` of the shard, in bounded memory.

    Raises:
        DataError: an id is not below `vocab_size`; names the shard, the token's number and the id.
    """
    if vocab_size > np.iinfo(tokens.dtype).max:
        return
    step = CHUNK_BYTES // tokens.itemsize
    for first in range(0, len(tokens), step):
        chunk = tokens[first : first + step]
        if chunk.max() >= vocab_size:
            at = int(np.argmax(chunk >= vocab_size))
            where = f"token {start + first + at} is id {int(chunk[at])}"
            raise DataError(f"{path}: {where}, but the tokenizer has {vocab_size} ids; is it the right one?")


def release(tokens: np.ndarray) -> None:
    """Takes a mapped shard's pages out of this process's resident memory; they stay in the system's cache."""
    owner = tokens
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def hash_file(path: str) -> str:
    """Returns the sha256 of a file, in hex."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: the shard cannot be read ({error.strerror})") from error


def open_split(directory: str, split: str, *, tokenizer: "Tokenizer", eot_position: str = "auto") -> Split:
    """Returns the split `train` or `validation` of a directory written by prepare, by llm.c or by nanoGPT.

    With meta.json, sizes and counts are always checked, hashes where the split is small (`verify` checks them all).
    Without, the header, the size and the ids are checked, and one line of the log says so.

    Raises:
        DataError: anything is missing or damaged.
        ConfigError: the directory was prepared with another tokenizer.
    """
    meta = read_meta(directory)
    if meta is None:
        return _open_foreign(directory, split, tokenizer=tokenizer, eot_position=eot_position)
    if meta.tokenizer_sha256 != tokenizer.sha256:
        raise ConfigError(
            f"{directory} was prepared with tokenizer {plain(meta.tokenizer)!r}, which is not this run's "
            f"data.tokenizer={tokenizer.name!r}: set data.tokenizer to the former, or data.path to other data"
        )
    part = _get_split(meta, directory, split)
    paths = tuple(os.path.join(directory, shard.file) for shard in part.shards)
    shards = tuple(_open_known(path, shard, meta.vocab_size) for path, shard in zip(paths, part.shards, strict=True))
    if sum(shard.nbytes for shard in shards) < SMALL_BYTES:
        _raise_all([p for p in map(_check_hash, paths, part.shards) if p])
    known = [(shard.file, shard.tokens, shard.sha256) for shard in part.shards]
    return Split(
        shards=shards,
        paths=paths,
        tokens=part.tokens,
        bytes=part.bytes,
        eot_position=meta.eot_position if eot_position == "auto" else eot_position,
        vocab_size=meta.vocab_size,
        fingerprint=_fingerprint(known),
    )


def _get_split(meta: Meta, directory: str, split: str) -> SplitMeta:
    if split not in meta.splits:
        there = plain(", ".join(meta.splits) or "none")
        raise DataError(f"{directory}: {META_FILE} has no split {split!r}, only {there}")
    return meta.splits[split]


def _open_known(path: str, shard: ShardMeta, vocab_size: int) -> np.ndarray:
    tokens = open_shard(path, vocab_size)
    if len(tokens) != shard.tokens:
        raise DataError(f"{path}: {len(tokens)} tokens, but {META_FILE} counts {shard.tokens}")
    return np.asarray(tokens)


def _check_hash(path: str, shard: ShardMeta) -> str:
    """Returns what is wrong with the shard, '' if nothing."""
    found = hash_file(path)
    if found == shard.sha256:
        return ""
    return f"{path}: the shard is damaged (sha256 {found[:12]}..., but {META_FILE} has {shard.sha256[:12]}...)"


def _open_foreign(directory: str, split: str, *, tokenizer: "Tokenizer", eot_position: str) -> Split:
    paths = _find_foreign(directory, split)
    shards = tuple(np.asarray(open_shard(path, tokenizer.vocab_size)) for path in paths)
    if sum(shard.nbytes for shard in shards) < SMALL_BYTES:
        for path, shard in zip(paths, shards, strict=True):
            check_ids(path, shard, tokenizer.vocab_size)
    if eot_position == "auto":
        # A text that ends with end-of-text does not begin with it, unless its first document is empty.
        eot_position = "first" if shards[0][0] == tokenizer.eot_id else "last"
    tokens = sum(map(len, shards))
    logging.getLogger("gptjax").info(
        f"{directory}: {tokens:,} {split} tokens without {META_FILE}: taken for {tokenizer.name} ids, end-of-text"
        f" {eot_position} in a document"
    )
    return Split(
        shards=shards,
        paths=paths,
        tokens=tokens,
        bytes=0,
        eot_position=eot_position,
        vocab_size=tokenizer.vocab_size,
        fingerprint=_fingerprint(
            [(os.path.basename(path), os.path.getsize(path), *_hash_ends(path)) for path in paths]
        ),
    )


def _find_foreign(directory: str, split: str) -> tuple[str, ...]:
    paths = tuple(sorted(glob.glob(os.path.join(glob.escape(directory), SPLITS[split]))))
    if not paths:
        raise DataError(f"{directory}: no {META_FILE} and no {SPLITS[split]}, so there is no {split} split")
    return paths


def _hash_ends(path: str) -> tuple[str, str]:
    """Returns the sha256 of the first and of the last MiB of a file."""
    with open(path, "rb") as file:
        head = file.read(2**20)
        file.seek(max(0, os.path.getsize(path) - 2**20))
        return hashlib.sha256(head).hexdigest(), hashlib.sha256(file.read()).hexdigest()


def _fingerprint(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def verify(directory: str, tokenizer: "Tokenizer | None" = None) -> None:
    """Reads every byte of a directory's shards and compares hashes and ids with meta.json.

    Args:
        tokenizer: needed only where there is no meta.json: ids are all that can be checked then.

    Raises:
        DataError: one line for each damaged shard.
        ConfigError: neither meta.json nor a tokenizer is there.
    """
    meta = read_meta(directory)
    files: list[tuple[str, ShardMeta | None]]
    if meta is not None:
        files = [(os.path.join(directory, x.file), x) for split in meta.splits.values() for x in split.shards]
        vocab_size = meta.vocab_size
    elif tokenizer is not None:
        files = [(path, None) for split in SPLITS for path in _find_foreign(directory, split)]
        vocab_size = tokenizer.vocab_size
    else:
        raise ConfigError(f"{directory}: no {META_FILE}, so a tokenizer is needed to check the ids")
    _raise_all([problem for path, shard in files if (problem := _find_damage(path, shard, vocab_size))])


def _find_damage(path: str, shard: ShardMeta | None, vocab_size: int) -> str:
    try:
        tokens = _open_known(path, shard, vocab_size) if shard else open_shard(path, vocab_size)
        check_ids(path, tokens, vocab_size)
        return _check_hash(path, shard) if shard else ""
    except DataError as error:
        return str(error)


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise DataError("\n".join(problems))


def write_meta(directory: str, meta: Meta) -> None:
    """Writes meta.json, and returns when it is on disk."""
    text = json.dumps({"format": META_FORMAT, **dataclasses.asdict(meta)}, indent=2) + "\n"
    with open(os.path.join(directory, META_FILE), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_meta(directory: str) -> Meta | None:
    """Returns what meta.json says, None where there is none.

    Raises:
        DataError: the directory is missing, or its meta.json is damaged.
    """
    path = os.path.join(directory, META_FILE)
    if not os.path.isdir(directory):
        raise DataError(f"{directory}: no such directory")
    if not os.path.lexists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return _parse_meta(json.load(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {plain(error)})") from error


def _parse_meta(values: dict[str, Any]) -> Meta:
    if values["format"] != META_FORMAT:
        raise ValueError(f"format {values['format']!r}, expected {META_FORMAT}")
    splits = {}
    for name, split in values["splits"].items():
        shards = tuple(_typed(ShardMeta, shard) for shard in split["shards"])
        splits[name] = _typed(SplitMeta, split, shards=shards)
        names = [shard.file for shard in shards]
        if not names or any(os.path.basename(n) != n or not n.isprintable() or len(n) > 255 for n in names):
            raise ValueError(f"split {name!r} needs shards that are plain file names")
    meta = _typed(Meta, values, splits=splits)
    if meta.eot_position not in ("first", "last") or not 0 < meta.vocab_size <= LARGEST_COUNT:
        raise ValueError(f"eot_position={meta.eot_position!r}, vocab_size={meta.vocab_size}")
    return meta


def _typed(cls: Any, values: dict[str, Any], **parsed: Any) -> Any:
    """Returns a `cls` of `values`, whose plain fields must have the declared types."""
    for field in dataclasses.fields(cls):
        if field.name not in parsed:
            value = values[field.name]
            if type(value) is not field.type:
                raise TypeError(f"{field.name}={value!r}")
            parsed[field.name] = value
    return cls(**parsed)
