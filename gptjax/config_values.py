"""Reads the values of config fields, from Python objects or from text, and finds valid values near a wrong one."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import NamedTuple

from gptjax.errors import ConfigError, is_utf8

Value = bool | int | float | str  # of a config field
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}  # in any case


class Bounds(NamedTuple):
    """The range of a numeric config field."""

    at_least: float
    below: float = math.inf
    at_most: float = math.inf


def wrong_value(path: str, value: object, *, expected: str) -> ConfigError:
    """Returns the error for a value of field `path` that has the wrong type or is not among the choices."""
    if value is None:
        value = "None"  # UserError takes None for "no value", but here a field was set to None
    return ConfigError(f"expected {expected}", field=path, value=value)


def convert(path: str, value: object, kind: type) -> Value:
    """Returns `value` as a `kind` (bool, int, float or str); text is read as on a command line.

    Raises:
        ConfigError: the value cannot be read as that kind.
    """
    parsed: Value | None = None
    if kind is bool:
        parsed = _parse_bool(value)
    elif kind in (int, float):
        parsed = _parse_number(value, kind)
    elif isinstance(value, str):
        # A command line's invalid bytes come as surrogates, which cannot be written to config.json.
        if not is_utf8(value):
            raise ConfigError("not valid UTF-8 text", field=path, value=value)
        parsed = value
    if parsed is None:
        raise wrong_value(path, value, expected=EXPECTED[kind])
    return parsed


def _parse_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return BOOLEANS.get(value.lower())
    return None  # also for 0 and 1 as numbers: those are more likely a mistake


def _parse_number(value: object, kind: type) -> int | float | None:
    """Returns a finite number of type `kind`; an int may be written as 1e3."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):  # bool is a subclass of int
        return None
    try:
        number: float = float(value)
        if not math.isfinite(number):
            return None
        if isinstance(value, numbers.Integral) or (isinstance(value, str) and value.lstrip("+-").isdigit()):
            number = int(value)  # exact, while a float rounds beyond 2**53
    except (ValueError, OverflowError):  # float(10**400) overflows; int() refuses more than 4,300 digits
        return None
    if kind is float:
        return float(number)
    return int(number) if number == int(number) else None


def nearest_divisors(number: int, wanted: int, count: int = 2) -> list[int]:
    """Returns the `count` divisors of `number` nearest to `wanted`, in rising order.

    >>> nearest_divisors(768, 13)
    [12, 16]
    """
    # Divisors come in pairs, so it suffices to try up to the square root.
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    divisors = {*small, *(number // divisor for divisor in small)}
    by_distance = sorted(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
    return sorted(by_distance[:count])


def nearest_fields(path: str, fields: Iterable[str]) -> list[str]:
    """Returns at most three of the dotted names `fields`, or of their sections, nearest to `path`.

    path: a dotted name, or the last part of one.

    >>> nearest_fields("model.n_layers", ["model.n_layer", "train.num_steps"])
    ['model.n_layer']
    >>> nearest_fields("num_step", ["model.n_layer", "train.num_steps"])
    ['train.num_steps']
    """
    names = list(fields)
    by_last_part: dict[str, list[str]] = {}
    for name in names:
        by_last_part.setdefault(name.rpartition(".")[2], []).append(name)
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.6) if "." in path else []
    if near:
        return near
    # A field under another section, or without one, is too far away for difflib.
    last = path.rpartition(".")[2]
    if last in by_last_part:
        return by_last_part[last]
    for name in names:
        section = name.rpartition(".")[0]
        if section:
            by_last_part.setdefault(section, [section])
    words = difflib.get_close_matches(last, by_last_part, n=3, cutoff=0.75)
    return [name for word in words for name in by_last_part[word]][:3]
