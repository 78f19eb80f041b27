"""What a Python caller passes, checked before it is used: configs, paths, texts and ids of tokens."""

import numbers
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from gptjax.config import Config
from gptjax.errors import ConfigError


def check_config(config: object) -> Config:
    """Returns `config` if it is a Config.

    Raises:
        ConfigError: it is not, such as the name of one.
    """
    if isinstance(config, Config):
        return config
    name = config if isinstance(config, str) else "quickstart"
    raise _wrong("config", config, expected="a Config", remedy=f'gptjax.load_config("{name}") makes one')


def check_path(field: str, path: object, *, expected: str) -> str:
    """Returns a path as text; it may be a pathlib.Path.

    Raises:
        ConfigError: it is neither, or empty.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if isinstance(text, str) and text:
        return text
    raise _wrong(field, path, expected=expected)


def check_text(field: str, text: object) -> str:
    """Returns `text` if it is a str.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(text, str):
        return text
    raise _wrong(field, text, expected="a text")


def check_texts(field: str, texts: object) -> list[str]:
    """Returns one text, or several, as a list.

    Raises:
        ConfigError: one of them is no str.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise _wrong(field, texts, expected="a text or a list of texts")
    return [check_text(field, text) for text in texts]


def check_count(field: str, value: object) -> int:
    """Returns `value` if it is a whole number.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise _wrong(field, value, expected="a whole number")


def check_ids(ids: Any, *, block_size: int, vocab_size: int) -> np.ndarray:
    """Returns ids of tokens as int32 [..., T].

    Raises:
        ConfigError: they are no whole numbers, the rows differ in length, or an id or a length is out of range.
    """
    try:
        found = np.asarray(ids)
    except ValueError:  # rows of several lengths
        found = np.asarray(None)
    if not found.ndim or (found.size and found.dtype.kind not in "iu"):
        raise _wrong("ids", ids, expected="whole numbers, in one row or in rows of one length")
    length = found.shape[-1]
    if not 1 <= length <= block_size:
        raise ConfigError(f"expected 1 to {block_size} ids", field="ids", value=length)
    if not found.size:
        raise ConfigError("expected at least one row", field="ids", value=found.shape)
    outside = found[(found < 0) | (found >= vocab_size)]
    if outside.size:
        raise ConfigError(f"expected ids from 0 to {vocab_size - 1}", field="ids", value=int(outside[0]))
    return found.astype(np.int32)


def _wrong(field: str, value: object, *, expected: str, remedy: str = "") -> ConfigError:
    # UserError takes None for "no value".
    shown = "None" if value is None else value
    return ConfigError(f"expected {expected}", field=field, value=shown, remedy=remedy)
