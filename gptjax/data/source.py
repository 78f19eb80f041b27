"""A source of documents, and the place in it from which reading continues."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Place(NamedTuple):
    """Where reading continues: open file number `file` at `offset`, and leave out as many documents."""

    file: int = 0
    offset: int = 0  # what it counts depends on the source: bytes, row groups or rows
    documents: int = 0
    skipped: int = 0  # bad rows that were left out before `offset`
    read_bytes: int = 0  # of this file, before `offset`
    invalid: int = 0  # of them, that are no UTF-8


class Whole(NamedTuple):
    """A document that is too long to be held in memory, and comes in sections."""

    text_hash: bytes
    characters: int


class Document(NamedTuple):
    """A document, or a section of a long one."""

    name: str
    text: str
    place: Place  # after it
    whole: Whole | None = None  # None unless it is a section
    is_end: bool = True  # False for all sections but the last


# Yields the documents from one place to another, or to the end.
Read = Callable[[Place, Place | None], Iterator[Document]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in a fixed order, the same at every call of `read`, with the totals that are known."""

    name: str
    read: Read
    place_of: Callable[[int, int], Place] = lambda part, count: Place()  # where part `part` of `count`, from 0, begins
    total_documents: int = 0  # 0 if unknown
    total_bytes: int = 0  # of text; 0 if unknown
    files: tuple[tuple[str, int], ...] = ()  # name and size of each file that it reads; () if it reads none of yours
    revision: str = ""  # the commit of the files' repository
    stamp: str = ""  # changes when a file is written; for a preparation that continues
    left_out: str = ""  # files that were found and are not read, for a message
    validation: frozenset[str] = frozenset()  # ids of the documents for validation; otherwise their hash decides
    is_pipe: bool = False  # standard input, which can be read once

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields the id and the whole text of each document."""
        sections: list[str] = []
        for document in self.read(Place(), None):
            sections.append(document.text)
            if document.is_end:
                yield document.name, "".join(sections)
                sections.clear()
