"""The journal of a preparation: how far it has come, so that it continues after a kill."""

import dataclasses
import hashlib
import json
import os
import sys
from typing import Any

from gptjax.data.source import Place
from gptjax.strict_json import parse_json, read_at_most
from gptjax.workdir import replace_file

SHARD_NAMES = {"train": "train_{:06d}.bin", "validation": "val_{:06d}.bin"}
JOURNAL_FILE = "journal.json"
LARGEST_JOURNAL = 2**24  # bytes; one takes 500


@dataclasses.dataclass
class Counts:
    """The tokens, documents and bytes that one split has received so far."""

    tokens: int = 0
    bytes: int = 0
    documents: int = 0


def _no_counts() -> dict[str, Counts]:
    return {split: Counts() for split in SHARD_NAMES}


def _no_documents() -> dict[str, list[list[float]]]:
    return {split: [] for split in SHARD_NAMES}


@dataclasses.dataclass
class Journal:
    """How far a preparation has come: everything up to here is on disk."""

    settings: dict[str, Any]  # a journal with other settings belongs to another preparation
    documents: int = 0  # taken from the source
    place: Place = Place()  # after them
    skipped: int = 0  # bad rows that were left out; known at the end
    # The sha256 of each shard of a finished part, by its name: parts are copied between machines.
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    splits: dict[str, Counts] = dataclasses.field(default_factory=_no_counts)
    # By split, the share and the tokens of the documents nearest to the boundary between the splits, as many as the
    # other split may need; see assign.py.
    near: dict[str, list[list[float]]] = dataclasses.field(default_factory=_no_documents)


def hash_text(text: bytes) -> bytes:
    """Returns the sha256 of a document's text in UTF-8; it also decides the document's split."""
    return hashlib.sha256(text).digest()


def write_journal(partial: str, journal: Journal) -> None:
    """Replaces the journal in the directory `partial`, and syncs it to disk.

    Raises:
        OSError: it cannot be written.
    """
    content = json.dumps(dataclasses.asdict(journal)).encode()
    replace_file(os.path.join(partial, JOURNAL_FILE), content)


def read_journal(partial: str) -> Journal | None:
    """Returns the journal in the directory `partial`; None if it has none that this version can continue."""
    path = os.path.join(partial, JOURNAL_FILE)
    if not os.path.exists(path):
        return None
    try:
        values = parse_json(read_at_most(path, LARGEST_JOURNAL), dict)
        splits = values["splits"]
        values["splits"] = {split: Counts(**splits[split]) for split in SHARD_NAMES}
        values["place"] = Place(*values["place"])
        journal = Journal(**values)
    # Another version may have written it. Without a journal, the preparation truncates its shards to nothing.
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return journal if _is_sound(journal) else None


def _is_sound(journal: Journal) -> bool:
    """Returns whether the types and counts of a journal from a file are possible."""
    if not isinstance(journal.settings, dict) or not isinstance(journal.sha256, dict):
        return False
    if not isinstance(journal.near, dict) or set(journal.near) != set(SHARD_NAMES):
        return False
    if not all(_is_near(document) for documents in journal.near.values() for document in documents):
        return False
    counts = [journal.documents, journal.skipped, *journal.place]
    for split_counts in journal.splits.values():
        counts += dataclasses.astuple(split_counts)
    return all(map(_is_count, counts))


def _is_near(document: object) -> bool:
    if not isinstance(document, list) or len(document) != 2:
        return False
    share, tokens = document
    return type(share) is float and 0 <= share < 1 and _is_count(tokens)


def _is_count(value: object) -> bool:
    # Not isinstance, for which True is an integer.
    return type(value) is int and 0 <= value <= sys.maxsize
