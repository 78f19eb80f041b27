"""The meta.json of a prepared directory: its source, its tokenizer, and the size and sha256 of each shard."""

import collections
import dataclasses
import json
import os
from typing import Any

from gptjax.data.header import LARGEST_COUNT
from gptjax.errors import DataError, one_line
from gptjax.strict_json import parse_json, read_at_most
from gptjax.workdir import replace_file

META_FILE = "meta.json"
META_FORMAT = 1
LARGEST_META = 2**28  # bytes; 10,000 shards take 2 million
LONGEST_NAME = 255  # characters of a file name; Linux allows as many bytes


@dataclasses.dataclass(frozen=True)
class ShardMeta:
    """The entry of one shard in meta.json."""

    file: str
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SplitMeta:
    """The entry of one split in meta.json."""

    tokens: int
    bytes: int  # of text, end-of-text not counted
    documents: int
    shards: tuple[ShardMeta, ...]


@dataclasses.dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    source: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int
    eot_position: str  # in a document: first | last
    splits: dict[str, SplitMeta]
    # How it was prepared; {} in directories of other programs and of earlier versions.
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # number, bytes and names_sha256 of the source's files


def write_meta(directory: str, meta: Meta) -> None:
    """Creates or replaces meta.json atomically; on return it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    values = {"format": META_FORMAT, **dataclasses.asdict(meta)}
    text = json.dumps(values, indent=2) + "\n"
    replace_file(os.path.join(directory, META_FILE), text.encode())


def read_meta(directory: str) -> Meta | None:
    """Returns the content of a directory's meta.json, None if it has no such file.

    Raises:
        DataError: the directory is missing, or its meta.json is damaged.
    """
    path = os.path.join(directory, META_FILE)
    if not os.path.isdir(directory):
        raise DataError("no such directory", field=directory)
    if not os.path.lexists(path):
        return None
    try:
        values = parse_json(read_at_most(path, LARGEST_META), dict)
        return _parse_meta(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"damaged ({reason})", field=path) from error


def _parse_meta(values: dict[str, Any]) -> Meta:
    if values["format"] != META_FORMAT:
        raise ValueError(f"format {values['format']!r}, expected {META_FORMAT}")
    splits = {}
    for name, split in values["splits"].items():
        shards = tuple(_typed(ShardMeta, shard) for shard in split["shards"])
        splits[name] = _typed(SplitMeta, split, shards=shards)
        if not shards or not all(_is_file_name(shard.file) for shard in shards):
            raise ValueError(f"split {name!r} needs shards that are plain file names")
        _check_shards(name, splits)
    optional = {name: _dict(values, name) for name in ("options", "files")}
    meta = _typed(Meta, values, splits=splits, **optional)
    has_position = meta.eot_position in ("first", "last")
    has_vocabulary = 0 < meta.vocab_size <= LARGEST_COUNT
    if not has_position or not has_vocabulary:
        raise ValueError(f"eot_position={meta.eot_position!r}, vocab_size={meta.vocab_size}")
    return meta


def _dict(values: dict[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name, {})
    if not isinstance(value, dict):
        raise TypeError(f"{name}={value!r}")
    return value


def _check_shards(name: str, splits: dict[str, SplitMeta]) -> None:
    """Checks that the last split, `name`, has the tokens of its shards, and none that is listed before."""
    split = splits[name]
    counted = sum(shard.tokens for shard in split.shards)
    if split.tokens != counted:
        raise ValueError(f"split {name!r} has tokens={split.tokens}, but its shards have {counted}")
    listed = collections.Counter(shard.file for known in splits.values() for shard in known.shards)
    [(file, times)] = listed.most_common(1)
    if times > 1:
        raise ValueError(f"split {name!r} lists {file!r}, which is listed before")


def _is_file_name(name: str) -> bool:
    # A path, or a control character in a message, would let a meta.json from elsewhere do harm.
    return os.path.basename(name) == name and name.isprintable() and len(name) <= LONGEST_NAME


def _typed(cls: Any, values: dict[str, Any], **parsed: Any) -> Any:
    """Returns a `cls` of `values`, whose plain fields must have the declared types."""
    for field in dataclasses.fields(cls):
        if field.name in parsed:
            continue
        value = values[field.name]
        if type(value) is not field.type:
            raise TypeError(f"{field.name}={value!r}")
        parsed[field.name] = value
    return cls(**parsed)
