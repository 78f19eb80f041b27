"""The end-of-text token, which separates documents in a token stream."""

from typing import NamedTuple

NO_EOT = -1  # the id of end-of-text of a tokenizer that has none: no token has it


class EndOfText(NamedTuple):
    """The end-of-text token, and its position in a document."""

    id: int
    position: str  # "first": it begins each document; "last": it ends each document
