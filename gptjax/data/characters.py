"""A tokenizer whose ids are characters, as nanoGPT's first example has it, and nanoGPT's meta.pkl."""

import dataclasses
import functools
import hashlib
import json
import pickletools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.documents import NO_EOT
from gptjax.errors import DataError, one_line
from gptjax.strict_json import read_at_most
from gptjax.workdir import replace_file

FORMAT = "gptjax-characters-1"
META_PICKLE = "meta.pkl"
LARGEST_PICKLE = 2**24  # bytes; every character of Unicode takes 20 million, and a text has a few thousand
LARGEST_CHARACTER = 0x10FFFF


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One id per character. It has the interface of `data.tokenizer.Tokenizer`, and no end-of-text."""

    name: str
    characters: str  # in the order of their ids
    pattern: str = ""
    eot: str = ""
    prefix_space: bool = False

    @property
    def specials(self) -> Mapping[str, int]:
        """No special tokens."""
        return {}

    @property
    def vocab_size(self) -> int:
        """The number of characters."""
        return len(self.characters)

    @property
    def eot_id(self) -> int:
        """NO_EOT: documents are joined."""
        return NO_EOT

    @property
    def start_id(self) -> int:
        """The id from which an empty prompt starts: a line end, or the first character."""
        return max(self.characters.find("\n"), 0)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {character: number for number, character in enumerate(self.characters)}

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the saved form."""
        return hashlib.sha256(self._canonical()).hexdigest()

    def has_hash(self, sha256: str, name: str) -> bool:
        """Returns whether `sha256` is the hash of these characters under `name`."""
        return sha256 in (self.sha256, dataclasses.replace(self, name=name).sha256)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`.

        Raises:
            DataError: a character has no id.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise DataError(
                f"has no id for the character {one_line(ascii(character))} (U+{ord(character):04X})",
                field=f"tokenizer {one_line(self.name)}",
                remedy="leave it out, or make the tokenizer from all of the text",
            ) from error

    def encode_batch(self, texts: Sequence[str], *, names: Sequence[str] = ()) -> list[list[int]]:
        """Returns the ids of each text; names: of the texts, for an error.

        Raises:
            DataError: a character has no id.
        """
        found = []
        for index, text in enumerate(texts):
            try:
                found.append(self.encode(text))
            except DataError as error:
                raise DataError.about(one_line(names[index]) if names else "", error) from error
        return found

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        numbers = np.asarray(ids, np.int64).tolist()
        if any(not 0 <= number < self.vocab_size for number in numbers):
            raise KeyError("an id is not in the vocabulary")
        return "".join(map(self.characters.__getitem__, numbers))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the text of ids in UTF-8.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return self.decode(ids).encode()

    def token_bytes(self) -> np.ndarray:
        """Returns the number of bytes of each character in UTF-8: int32 [vocab_size]."""
        return np.array([len(character.encode()) for character in self.characters], np.int32)

    def tokens(self) -> list[bytes]:
        """Returns each character in UTF-8, in the order of ids."""
        return [character.encode() for character in self.characters]

    def ranks(self) -> dict[bytes, int]:
        """Returns the id of each character in UTF-8."""
        return {token: number for number, token in enumerate(self.tokens())}

    def save(self, path: str) -> None:
        """Writes the JSON file that `load_tokenizer(path)` reads, atomically.

        Raises:
            OSError: it cannot be written.
        """
        replace_file(path, self._canonical())

    def _canonical(self) -> bytes:
        saved = {"format": FORMAT, "name": self.name, "characters": self.characters}
        return (json.dumps(saved, ensure_ascii=True, indent=0) + "\n").encode()


def make_characters(name: str, texts: Iterable[str]) -> CharTokenizer:
    """Returns the tokenizer of all characters of `texts`, in the order of Unicode, as nanoGPT's prepare.py sorts them.

    Raises:
        DataError: there are none.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise DataError("the text has no characters", field="--source")
    return CharTokenizer(name, "".join(sorted(found)))


def parse_characters(saved: Mapping[str, Any]) -> CharTokenizer:
    """Returns the tokenizer of a saved form.

    Raises:
        ValueError: it is damaged.
    """
    name, characters = saved["name"], saved["characters"]
    if not isinstance(name, str) or not isinstance(characters, str):
        raise ValueError("its name or its characters are no string")
    characters.encode()  # a surrogate without its other half is no character
    if not characters or len(set(characters)) < len(characters):
        raise ValueError("it has no characters, or one twice")
    return CharTokenizer(name, characters)


def load_meta_pickle(path: str) -> CharTokenizer:
    """Returns the tokenizer of nanoGPT's meta.pkl. The file is parsed without executing anything.

    Raises:
        DataError: it is damaged, or holds anything but dicts, strings and whole numbers.
        OSError: it cannot be read.
    """
    try:
        meta = _parse_pickle(read_at_most(path, LARGEST_PICKLE))
        numbers = meta["stoi"]
        if sorted(numbers.values()) != list(range(len(numbers))) or meta["vocab_size"] != len(numbers):
            raise ValueError("its ids are not 0, 1, 2 ...")
        if any(len(character) != 1 for character in numbers):
            raise ValueError("a token has more than one character")
        characters = "".join(sorted(numbers, key=numbers.__getitem__))
        if meta["itos"] != dict(enumerate(characters)):
            raise ValueError("stoi and itos disagree")
        return parse_characters({"name": META_PICKLE, "characters": characters})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"is not a meta.pkl of characters ({reason})", field=path) from error


_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_IGNORED = {"PROTO", "FRAME"}


def _parse_pickle(content: bytes) -> Any:
    """Returns the value of a pickle of dicts, strings and whole numbers.

    Raises:
        ValueError: it holds anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, value, _ in pickletools.genops(content):
        name = opcode.name
        argument: Any = value
        if name in _PUSHED:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS"):
            start = marks.pop() if name == "SETITEMS" else len(stack) - 2
            items = stack[start:]
            del stack[start:]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STOP":
            return stack.pop()
        elif name not in _IGNORED:
            raise ValueError(f"opcode {name}")
    raise ValueError("has no end")
