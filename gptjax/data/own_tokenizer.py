"""A tokenizer of the data's own: `bpe:4096` is trained on the training documents before they are tokenized.

The data hold it, and runs read it from there. Training is deterministic, so an interrupted preparation trains it again.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.convert.tokenizer_source import OWN, open_tokenizer
from gptjax.data import sources
from gptjax.data.assign import LAST_PART, Assignment, halves, shares_of
from gptjax.data.journal import hash_text
from gptjax.data.progress import Log
from gptjax.data.readers import Reading
from gptjax.data.shard_writer import TOKENIZER_FILE
from gptjax.data.source import Place, Source
from gptjax.data.text_files import PIPE
from gptjax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from gptjax.errors import ConfigError
from gptjax.train_bpe import NUM_BYTES, PATTERNS, train_ranks
from gptjax.workdir import is_empty

OWN_PATTERN = "gpt2"  # better by 2 % than patterns that let words and punctuation merge (LOG.md, 2026-11-30)
LARGEST_VOCABULARY = 2**20
TRAINED_CHARACTERS = 2**30  # of a large source; the rest would hardly change the merges


def is_own(name: str) -> bool:
    """Returns whether data.tokenizer is bpe:N, a tokenizer that is trained on the data."""
    return name.startswith(OWN)


def own_size(name: str) -> int:
    """Returns N of the tokenizer bpe:N.

    Raises:
        ConfigError: N is not a possible number of ids.
    """
    size = name.removeprefix(OWN)
    least = NUM_BYTES + 2  # bytes, a merge and end-of-text
    if size.isascii() and size.isdigit() and least <= int(size) <= LARGEST_VOCABULARY:
        return int(size)
    raise ConfigError(
        f"expected {OWN}N with a number of ids from {least} to {LARGEST_VOCABULARY}",
        field="data.tokenizer",
        value=name,
    )


def open_data_tokenizer(
    name: str,
    out: str,
    *,
    source: str,
    share: float,
    reading: Reading,
    log: Log,
) -> Tokenizer:
    """Returns the tokenizer `name` of data in the directory `out`, which may not be prepared yet.

    name: as data.tokenizer. bpe:N is read from `out`, or trained on the training documents of `source`.
    share: of the documents that is for validation. reading: of the documents.
    log: receives a line if the tokenizer is trained.

    Raises:
        ConfigError: there is no such tokenizer or source, or `out` was prepared with another tokenizer.
        DataError: a file is damaged, or a document cannot be read.
        UnavailableError: the library that trains tokenizers is not installed, or a server cannot be reached.
    """
    if not is_own(name):
        return open_tokenizer(name)
    size = own_size(name)
    if os.path.isdir(out) and not is_empty(out):
        return _read(name, os.path.join(out, TOKENIZER_FILE))
    if source.partition(":")[2] == PIPE:
        raise ConfigError(
            "is trained on the documents first, and a pipe can be read once",
            field="data.tokenizer",
            value=name,
            remedy="give a file as the source, or another tokenizer",
        )
    log(f"training a tokenizer of {size:,} ids on {source}")
    with tempfile.TemporaryDirectory() as work_dir:  # where TFDS stores the standard library
        opened = sources.open_source(source, work_dir=work_dir, reading=reading)
        texts = (text for text, is_validation in divide(opened, share) if not is_validation)
        return train_tokenizer(_first(texts, TRAINED_CHARACTERS), vocab_size=size, name=name, pattern=OWN_PATTERN)


def _read(name: str, path: str) -> Tokenizer:
    """Returns the tokenizer that prepared data hold.

    Raises:
        ConfigError: there is none, or it is another one.
    """
    found = load_tokenizer(path) if os.path.isfile(path) else None
    if found is None or found.name != name:
        what = "no tokenizer of its own" if found is None else f"the tokenizer {found.name!r}"
        raise ConfigError(
            f"{os.path.dirname(path)} has {what}",
            field="data.tokenizer",
            value=name,
            remedy="set it to the tokenizer that the data were made with",
        )
    return found


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Yields texts until there are `characters` of them."""
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def train_tokenizer(
    texts: Iterator[str],
    *,
    vocab_size: int,
    name: str,
    pattern: str = "gpt2",
    specials: Sequence[str] = (),
) -> Tokenizer:
    """Returns a tokenizer that is trained on `texts`.

    vocab_size: the number of ids, those of end-of-text and of `specials` included; fewer if the text has fewer pairs.
    name: for messages.
    pattern: how text is cut before pairs are merged, gpt2 or cl100k.
    specials: names of tokens to reserve after end-of-text; text is never encoded to them.

    Raises:
        ConfigError: vocab_size is too small or too large, or a special token is repeated.
        DataError: the text cannot be cut.
        UnavailableError: no library for it is installed.
    """
    names = [END_OF_TEXT, *specials]
    least = NUM_BYTES + 1 + len(names)
    if not least <= vocab_size <= LARGEST_VOCABULARY:
        raise ConfigError(
            f"must be from {least} (bytes, a merge and special tokens) to {LARGEST_VOCABULARY}",
            field="--vocab_size",
            value=vocab_size,
        )
    if len(set(names)) < len(names) or "" in names:
        raise ConfigError("must be different names, and not end-of-text", field="--special", value=" ".join(specials))
    ranks = train_ranks(texts, num_tokens=vocab_size - len(names), pattern=PATTERNS[pattern])
    numbers = {special: len(ranks) + index for index, special in enumerate(names)}
    return make_tokenizer(name, PATTERNS[pattern], ranks, specials=numbers)


def divide(source: Source, val_fraction: float) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether it is for validation) of each document or section, by the rule of `gptjax prepare`.

    The last part of a single document is for validation. `gptjax prepare` may move more text to a split that is smaller
    than a window; this does not.
    """
    documents = (document for document in source.read(Place(), None) if document.text)
    first = list(itertools.islice(documents, 2))
    both = itertools.chain(first, documents)
    if source.total_documents == 1 or len(first) == 1:
        for part in halves(both, val_fraction=val_fraction):
            yield part.text, part.name.endswith(LAST_PART)
        return
    assignment = Assignment(val_fraction, names=source.validation)
    for document in both:
        text_hash = document.whole.text_hash if document.whole else hash_text(document.text.encode())
        shares = shares_of(np.frombuffer(text_hash, np.uint8)[None])
        [is_validation] = assignment.is_validation([document.name], shares)
        yield document.text, bool(is_validation)
