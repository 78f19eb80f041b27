"""Documents to token ids: what a preparation computes for each document, in this process or another one."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.data.header import token_dtype
from gptjax.data.journal import hash_text
from gptjax.data.patterns import KNOWN, cut_long_blanks, guarded
from gptjax.data.source import Document
from gptjax.data.tokenizer import Tokenizer
from gptjax.documents import NO_EOT
from gptjax.errors import DataError, one_line


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The ids of some documents, one after the other."""

    ids: np.ndarray  # uint16 or uint32 [tokens], with end-of-text after each document
    tokens: np.ndarray  # of each document: int64 [documents]
    text_bytes: np.ndarray  # of each document: int64 [documents]
    hashes: np.ndarray  # sha256 of each document's text: uint8 [documents, 32]


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Encoded:
    """Returns the ids of documents, or of sections of them.

    Raises:
        DataError: the tokenizer's pattern cannot cut a document; the error names it.
        UnavailableError: no process can be started to try such a pattern.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([] if tokenizer.eot_id == NO_EOT else [tokenizer.eot_id], dtype)
    arrays: list[np.ndarray] = []
    tokens = []
    text_bytes = []
    hashes = []
    for document in documents:
        try:
            parts = _encode(document.text, tokenizer)
        except DataError as error:
            raise DataError.about(one_line(document.name), error) from error
        if document.is_end:
            parts.append(end)
        arrays += parts
        tokens.append(sum(map(len, parts)))
        content = document.text.encode()
        text_bytes.append(len(content))
        hashes.append(document.whole.text_hash if document.whole else hash_text(content))
    return Encoded(
        ids=np.concatenate(arrays).astype(dtype) if arrays else np.array([], dtype),
        tokens=np.array(tokens, np.int64),
        text_bytes=np.array(text_bytes, np.int64),
        hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1),
    )


def _encode(text: str, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns the ids of a text in parts: integers [tokens of the part]."""
    if tokenizer.pattern not in KNOWN or tokenizer.prefix_space:
        return [np.array(tokenizer.encode(text), np.uint32)]
    parts = list(cut_long_blanks(tokenizer.pattern, text))
    if any(is_piece for _, is_piece in parts):
        return [np.array(tokenizer.encode(text), np.uint32)]
    # The same ids as `encode`, but tiktoken makes no Python integers of them, which takes a tenth of the time.
    return [guarded(tokenizer.encoding.encode_to_numpy, text, disallowed_special=())]
