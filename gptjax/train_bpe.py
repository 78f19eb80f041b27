"""Trains a byte-pair encoding on text: the merges of the most frequent pairs (Sennrich et al. 2016)."""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any, cast

from gptjax.convert.byte_level import unicode_to_bytes
from gptjax.data.patterns import CL100K, GPT2_PATTERN, Panic, cut_long_blanks, guarded
from gptjax.errors import DataError, UnavailableError, one_line

PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K}
NUM_BYTES = 256


def train_ranks(texts: Iterator[str], *, num_tokens: int, pattern: str) -> dict[bytes, int]:
    """Returns the id of each token by its bytes: 256 bytes, then merges; fewer than `num_tokens` if pairs run out.

    num_tokens: at least 257.

    Raises:
        DataError: the library cannot cut the text.
        UnavailableError: neither rustbpe nor tokenizers is installed.
    """
    parts = (part for text in texts for part in _safe_parts(pattern, text))
    try:
        import rustbpe  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _train_with_tokenizers(parts, num_tokens=num_tokens, pattern=pattern)
    trained: Any = cast(Any, rustbpe).Tokenizer()
    try:
        guarded(trained.train_from_iterator, parts, num_tokens, pattern=pattern)
    except Panic as error:
        raise DataError(f"rustbpe cannot cut the text ({one_line(error)})", field="--source") from error
    ranks = {bytes(token): number for token, number in trained.get_mergeable_ranks()}
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def library() -> str:
    """Returns the name of the library that trains: rustbpe, or tokenizers, or "" if none is installed."""
    for name in ("rustbpe", "tokenizers"):
        if importlib.util.find_spec(name) is not None:
            return name
    return ""


def _safe_parts(pattern: str, text: str) -> Iterator[str]:
    """Returns a text in parts in which no library's regular expressions run out of memory."""
    return (part for part, _ in cut_long_blanks(pattern, text) if part)


def _train_with_tokenizers(parts: Iterator[str], *, num_tokens: int, pattern: str) -> dict[bytes, int]:
    """Trains with Hugging Face's library, which breaks ties between equally frequent pairs differently."""
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnavailableError(
            "no library that trains tokenizers is installed", remedy="pip install rustbpe"
        ) from error
    from tokenizers import models, pre_tokenizers, trainers  # pyright: ignore[reportMissingImports]

    model: Any = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=num_tokens, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(parts, trainer)
    ranks = {bytes([byte]): byte for byte in range(NUM_BYTES)}
    for merge in json.loads(model.to_str())["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(unicode_to_bytes(left + right), len(ranks))
    return ranks
