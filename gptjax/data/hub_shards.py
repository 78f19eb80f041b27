"""Token shards in a repository of the Hub: which files they are, what each holds, and how far their fetch has come."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from gptjax.convert.hub_listing import SHA256, File
from gptjax.data.foreign import SPLITS, SUFFIXES, split_of
from gptjax.data.hub_source import FORM, Place
from gptjax.data.progress import Log
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import CHUNK_BYTES, check_ids, hash_file, open_shard, warn_of_small_ids
from gptjax.errors import ConfigError, one_line
from gptjax.strict_json import parse_json, read_at_most
from gptjax.workdir import replace_file

STATE_FILE = "state.json"  # of an unfinished fetch
LARGEST_STATE = 2**24  # bytes; a shard takes 200
SHARDS = "shards"  # a directory in DIR.partial
SHOWN_FOLDERS = 6  # in a message


@dataclasses.dataclass
class State:
    """How far a fetch has come: these shards are on disk, and were verified."""

    source: str
    commit: str = ""  # "" before the first list of files
    shards: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # fields of Counted by file name


@dataclasses.dataclass(frozen=True)
class Counted:
    """What meta.json needs to know of a shard."""

    tokens: int
    bytes: int  # of text
    documents: int  # end-of-text tokens
    sha256: str


def choose_shards(names: Collection[str], place: Place) -> list[str]:
    """Returns the shards of a repository, in order; none if a split has none.

    Raises:
        ConfigError: they are in several folders.
        DataError: a name says both train and validation.
    """
    shards = [name for name in sorted(names) if name.endswith(SUFFIXES) and split_of(name)]
    if {split_of(name) for name in shards} != set(SPLITS):
        return []
    folders = sorted({os.path.dirname(name) for name in shards})
    if len(folders) > 1:
        shown = ", ".join(one_line(folder) if folder else "the top" for folder in folders[:SHOWN_FOLDERS])
        raise ConfigError(
            f"has shards in {len(folders):,} folders: {shown}",
            field="source",
            value=str(place),
            remedy=f"name one: {FORM}",
        )
    return shards


def take_until(files: Sequence[File], tokens: float, *, width: int, offset: int) -> list[File]:
    """Returns the first files with at least `tokens` ids of `width` bytes, after `offset` bytes of header."""
    taken = []
    count = 0
    for file in files:
        if count >= tokens:
            break
        taken.append(file)
        count += max(0, file.size - offset) // width
    return taken


def examine(path: str, tokenizer: Tokenizer, lengths: np.ndarray, *, sha256: str) -> Counted:
    """Returns the counts of a shard, all of whose ids were checked.

    Args:
        path: the file.
        tokenizer: whose ids it has.
        lengths: bytes of the text of each id, int64 [vocab_size].
        sha256: of the file, in hex; anything else means that it is not known.

    Raises:
        DataError: its header does not fit its size, or an id is not the tokenizer's.
    """
    vocab_size = tokenizer.vocab_size
    shard = open_shard(path, vocab_size)
    warn_of_small_ids(shard, tokenizer)
    counts = np.zeros(vocab_size, np.int64)
    step = max(1, CHUNK_BYTES // shard.dtype.itemsize)
    for start in range(0, len(shard), step):
        ids = shard.read(start, start + step)
        check_ids(path, ids, vocab_size, start=start)
        counts += np.bincount(ids, minlength=vocab_size)
    return Counted(
        tokens=len(shard),
        bytes=int(counts @ lengths),
        documents=int(counts[tokenizer.eot_id]),
        sha256=sha256 if SHA256.fullmatch(sha256) else hash_file(path),
    )


def read_state(partial: str, out: str, *, source: str, log: Log) -> State:
    """Returns the state in the directory `partial`: an empty one if there is none, or none of this source."""
    path = os.path.join(partial, STATE_FILE)
    folder = os.path.join(partial, SHARDS)
    state = State(source)
    with contextlib.suppress(OSError, ValueError, TypeError):  # another version may have written it
        found = State(**parse_json(read_at_most(path, LARGEST_STATE), dict))
        if found.source == source:
            state.commit = found.commit
            for name, shard in found.shards.items():
                if any(os.path.exists(os.path.join(place, name)) for place in (folder, out)):
                    state.shards[name] = dataclasses.asdict(Counted(**shard))
        else:
            log(f"{partial} is of {one_line(found.source)}: starting over")
    if not state.commit and os.path.isdir(folder):
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
    return state


def write_state(partial: str, state: State) -> None:
    """Stores how far a fetch has come; on return it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(os.path.join(partial, STATE_FILE), json.dumps(dataclasses.asdict(state)).encode())
