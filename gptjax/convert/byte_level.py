"""GPT-2's byte-level BPE as files store it: its alphabet of visible bytes, and merges derived from ranks."""

import itertools
from collections.abc import Sequence

MAX_DERIVING = 200_000_000  # sum of squared token lengths: about 20 s; GPT-2 has 3 million
SHOWN_BYTES = 40  # of a token in a message


def _make_alphabet() -> dict[int, str]:
    """Returns the visible letter of each byte (Radford et al. 2019, bytes_to_unicode in encoder.py).

    A byte that Latin-1 shows is its own letter. The others, in order, have the letters from U+0100 on.
    """
    visible = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    letters = {byte: chr(byte) for byte in visible}
    invisible = [byte for byte in range(256) if byte not in visible]
    for index, byte in enumerate(invisible):
        letters[byte] = chr(256 + index)
    return letters


_LETTERS = _make_alphabet()
ALPHABET = frozenset(_LETTERS.values())
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


class UnsupportedTokenizerError(Exception):
    """A Tokenizer, or the files of other programs, cannot express a tokenizer; the message is a short reason."""


def bytes_to_unicode(token: bytes) -> str:
    """Returns a token in GPT-2's alphabet, such as 'Ġthe' for b' the'."""
    return "".join(map(_LETTERS.__getitem__, token))


def unicode_to_bytes(text: str) -> bytes:
    """Returns the bytes of a token in GPT-2's alphabet.

    Raises:
        UnsupportedTokenizerError: a letter is not in the alphabet.
    """
    try:
        return bytes(map(_BYTES.__getitem__, text))
    except KeyError:
        reason = f"token {text[:SHOWN_BYTES]!a} is not in GPT-2's alphabet of bytes"
        raise UnsupportedTokenizerError(reason) from None


def derive_merges(tokens: Sequence[bytes]) -> list[str]:
    """Returns the merges of byte-pair encoding, 'LEFT RIGHT' in GPT-2's alphabet, for `tokens` in the order of ids.

    Raises:
        UnsupportedTokenizerError: a token is not a merge of two earlier tokens, or all of them are too long.
    """
    if sum(len(token) ** 2 for token in tokens) > MAX_DERIVING:
        raise UnsupportedTokenizerError("its tokens are too many and too long")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if b"" in ranks:
        raise UnsupportedTokenizerError("a token is empty")
    merges = []
    for token in tokens:
        if len(token) > 1:
            left, right = _split_merge(token, ranks)
            merges.append(f"{bytes_to_unicode(left)} {bytes_to_unicode(right)}")
    return merges


def _split_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Returns the two parts into which the tokens of lower rank merge the bytes of `token`.

    If every token has two such parts, merging by the rank of the result, as tiktoken does, and merging by the list of
    these pairs, as GPT-2 does, give the same ids.
    """
    own_rank = ranks[token]
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        results = [ranks.get(left + right, own_rank) for left, right in itertools.pairwise(parts)]
        best = min(results)
        if best >= own_rank:
            reason = f"token {own_rank} ({token[:SHOWN_BYTES]!r}) is not a merge of two tokens before it"
            raise UnsupportedTokenizerError(reason)
        at = results.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    left, right = parts
    return left, right
