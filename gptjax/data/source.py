"""A source of documents."""

import dataclasses
from collections.abc import Callable, Iterator

Document = tuple[str, str]  # id and text


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in a fixed order, the same at every call of `documents`, with the totals that are known."""

    name: str
    documents: Callable[[], Iterator[Document]]
    total_documents: int = 0  # 0 if unknown
    total_bytes: int = 0  # of text; 0 if unknown
    files: tuple[tuple[str, int], ...] = ()  # name and size of each file that it reads; () if it reads none of yours
    left_out: str = ""  # files that were found and are not read, for a message
    validation: frozenset[str] = frozenset()  # ids of the documents for validation; otherwise their hash decides
    is_pipe: bool = False  # standard input, which can be read once
