"""Parses JSON and text from files and servers that may be damaged, within limits, or refuses them with a reason.

Python's own parser accepts NaN, numbers too large for a float, repeated keys and lone surrogates, and raises
RecursionError for deep nesting. Other programs, and the code that uses the values, expect none of these.
"""

import errno
import functools
import json
import math
import os
import re
import stat
from typing import Any, Literal

MOST_LEVELS = 100  # of nested lists and objects; config.json, tokenizer.json and records have at most 8
MOST_DIGITS = 300  # of an integer, which a float can still hold; transformers writes 31 digits for "no limit"
BYTE_ORDER_MARK = "\ufeff"
# Only text that matches can contain a number beyond MOST_DIGITS or float64, or half of a surrogate pair. Text that does
# not match is parsed without the slow checks.
LONG_NUMBER = re.compile(rf"[0-9]{{{MOST_DIGITS}}}|[eE]\+?[0-9]{{3}}")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    type(None): "null",
}


class InvalidTextError(ValueError):
    """Content is invalid; the message is one line, a reason without the file's name."""


def decode_text(content: bytes) -> str:
    """Returns UTF-8 as text, without the byte-order mark with which some editors begin a file.

    Raises:
        InvalidTextError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise InvalidTextError(f"not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from error


def read_at_most(path: str, limit: int) -> bytes:
    """Returns the content of a regular file, or of one to which `path` is a link; it never waits for a pipe.

    Raises:
        InvalidTextError: it has more than `limit` bytes.
        OSError: it cannot be read, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", path)
        content = file.read(min(limit, status.st_size) + 1)
    if len(content) > limit:
        raise InvalidTextError(f"larger than {limit:,} bytes")
    return content


def parse_json(
    content: bytes | str, kind: type | None = None, *, nan: Literal["refuse", "null", "keep"] = "refuse"
) -> Any:
    """Returns the value of a JSON text; bytes must be UTF-8.

    Args:
        content: the text.
        kind: the type that the value must have, such as dict; None allows any.
        nan: how to handle a non-finite number: "refuse" raises; "null" returns None for it, as in logs, whose other
            fields are still of use; "keep" returns the float, for callers that check each field.

    Raises:
        InvalidTextError: it is not JSON, is nested deeper than MOST_LEVELS, has a key twice in one object, has a
            non-finite number or an integer of more than MOST_DIGITS, has half of a surrogate pair, or is not of that
            kind.
    """
    text = decode_text(content) if isinstance(content, bytes) else content.removeprefix(BYTE_ORDER_MARK)
    try:
        value = _decoder(careful=LONG_NUMBER.search(text) is not None, nan=nan).decode(text)
    except InvalidTextError:
        raise
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise InvalidTextError(f"not JSON: {error}") from error
    if text.count("[") + text.count("{") > MOST_LEVELS:
        _check_levels(value)
    if SURROGATE.search(text):
        _check_surrogates(value)
    if kind is not None and type(value) is not kind:
        raise InvalidTextError(f"expected {_name(kind)}, not {_name(type(value))}")
    return value


def _name(kind: type) -> str:
    return TYPES.get(kind, "a number")


def _too_deep() -> InvalidTextError:
    return InvalidTextError(f"not usable JSON: nested deeper than {MOST_LEVELS} levels")


def _check_levels(value: Any) -> None:
    """Raises InvalidTextError if lists and objects are nested deeper than MOST_LEVELS."""
    containers = _containers([value])
    depth = 0
    while containers:
        depth += 1
        if depth > MOST_LEVELS:
            raise _too_deep()
        children = []
        for container in containers:
            children += container.values() if isinstance(container, dict) else container
        containers = _containers(children)


def _containers(values: list[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError("not usable JSON: a string has half of a surrogate pair") from error


def _take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise InvalidTextError(f"not usable JSON: {_first_repeated(pairs)[:80]!a} appears twice in one object")
    return fields


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    """Returns the first name that repeats an earlier one; there must be one."""
    seen = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no name is repeated")


def _take_integer(text: str) -> int:
    digits = len(text.lstrip("-"))
    if digits > MOST_DIGITS:
        raise InvalidTextError(f"not usable JSON: an integer of {digits} digits, expected at most {MOST_DIGITS}")
    return int(text)


@functools.cache
def _decoder(*, careful: bool, nan: str) -> json.JSONDecoder:
    """Returns a decoder; a careful one checks every number, and is slower."""

    def take(text: str) -> float | None:
        value = float(text)
        if math.isfinite(value) or nan == "keep":
            return value
        if nan == "null":
            return None
        raise InvalidTextError(f"not usable JSON: {text[:80]} is not a finite number")

    return json.JSONDecoder(
        object_pairs_hook=_take_pairs,
        parse_constant=take,
        parse_int=_take_integer if careful else None,
        parse_float=take if careful else None,
    )
