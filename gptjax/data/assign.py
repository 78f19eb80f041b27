"""The split of each document: by the hash of its text, so that equal texts are in one split, and never an empty one."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from gptjax.data.source import Document
from gptjax.data.tokenizer import Tokenizer

WINDOW_TOKENS = 1025  # a sequence of GPT-2's context, and the token after it
FIRST_PART = ":start"  # after the name of a single document
LAST_PART = ":end"
Near = tuple[float, int]  # a document's share and its tokens


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which documents are for validation.

    Attributes:
        boundary: those whose share is below it.
        is_single: the only document is divided by position; its last part is for validation.
        names: those with these ids, whatever their hash, if there are any.
    """

    boundary: float
    is_single: bool = False
    names: Collection[str] = ()

    def is_validation(self, names: Sequence[str], shares: np.ndarray) -> np.ndarray:
        """Returns whether each document is for validation: bool [documents].

        names: the id of each. shares: as `shares_of`, float64 [documents].
        """
        if self.names:
            return np.array([name in self.names for name in names], bool)
        if self.is_single:
            return np.array([name.endswith(LAST_PART) for name in names], bool)
        return shares < self.boundary


def shares_of(hashes: np.ndarray) -> np.ndarray:
    """Returns a number in [0, 1) for each text, uniformly distributed over texts: float64 [documents].

    hashes: sha256 of each text, uint8 [documents, 32].
    """
    powers = 256 ** np.arange(5, -1, -1)
    return hashes[:, :6].astype(np.int64) @ powers / 2**48


def nearest(documents: Sequence[Near], boundary: float, window: int) -> list[Near]:
    """Returns the documents nearest to the boundary that have `window` tokens together; fewer if there are no more."""
    totals: dict[float, int] = {}
    for share, count in documents:  # those of equal share have equal texts, and stay together
        totals[share] = totals.get(share, 0) + count
    kept = []
    tokens = 0
    for share, count in sorted(totals.items(), key=lambda near: abs(near[0] - boundary)):
        if tokens >= window:
            break
        kept.append((share, count))
        tokens += count
    return kept


def better_boundary(
    tokens: dict[str, int], near: dict[str, list[Near]], *, boundary: float, window: int
) -> float | None:
    """Returns the boundary that gives both splits a window, or as much as there is; None if `boundary` does.

    tokens: of each split. near: the documents of each split that are nearest to the boundary.
    """
    for small, large in (("validation", "train"), ("train", "validation")):
        if tokens[small] >= window:
            continue
        moved = _moved(
            near[large], tokens[large], need=window - tokens[small], window=window, is_empty=not tokens[small]
        )
        if moved is not None:
            # Shares below the boundary are for validation.
            return math.nextafter(moved, 1.0) if small == "validation" else moved
    return None


def _moved(near: list[Near], left: int, *, need: int, window: int, is_empty: bool) -> float | None:
    """Returns the share of the last document to move, None if none may be moved.

    left: tokens of the split that gives. need: tokens that the other one lacks. is_empty: it has none at all.
    """
    groups: dict[float, int] = {}
    for share, count in near:
        groups[share] = groups.get(share, 0) + count
    moved = None
    for share, count in groups.items():
        has_enough_left = left - count >= window
        # An empty split gets one document even if that leaves less than a window, but never the last one.
        if not has_enough_left and not (is_empty and moved is None and left > count):
            break
        moved = share
        left -= count
        need -= count
        if need <= 0:
            break
    return moved


def halves(
    sections: Iterable[Document], *, val_fraction: float, tokenizer: Tokenizer | None = None, window: int = 0
) -> Iterator[Document]:
    """Yields the first and the last part of the only document, as two documents.

    The last part has `val_fraction` of the characters, or more: `window` tokens, if half of the text has as many.

    sections: the document, which is whole or in sections.
    tokenizer: counts the tokens of the window; None if there is none yet, and no window.
    """
    done = 0  # characters
    for section in sections:
        name, text = section.name, section.text
        if section.whole:  # long, so that val_fraction of it is no less than a window
            characters = section.whole.characters
            first = characters - max(1, round(val_fraction * characters))
        else:
            characters = len(text)
            first = characters - _size_of_end(text, val_fraction, tokenizer, window)
        cut = min(max(first - done, 0), len(text))
        done += len(text)
        # The parts' own hashes do not matter; their names say what they are.
        if cut:
            yield Document(f"{name}{FIRST_PART}", text[:cut], section.place, section.whole, done >= first)
        if cut < len(text):
            yield Document(f"{name}{LAST_PART}", text[cut:], section.place, section.whole, section.is_end)


def _size_of_end(text: str, val_fraction: float, tokenizer: Tokenizer | None, window: int) -> int:
    """Returns the number of characters of the last part."""
    size = max(1, round(val_fraction * len(text)))
    half = len(text) // 2
    while tokenizer and size < half and len(tokenizer.encode(text[-size:])) < window:
        size = min(2 * size, half)
    return size
