"""Reads every number of a run's metrics as series over its steps, and thins them so that each spike stays visible."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gptjax.log_tags import STATS
from gptjax.logs import LONGEST_LINE, parse_rows

BLOCK_BYTES = 2**20
# Of metrics: a run has a few dozen, and five for each layer. A damaged file may have any number.
MOST_NAMES = 400
MOST_LAYER_NAMES = 1200
LARGEST_STEP = 2**53  # JavaScript's integers are exact up to here
LARGEST_VALUE = 1e300  # a larger one is damage, and differences of two would overflow


class Series(NamedTuple):
    """One metric over the steps."""

    steps: np.ndarray  # int64 [N], ascending, each once
    values: np.ndarray  # float64 [N], finite


def read_series(file: BinaryIO) -> dict[str, Series]:
    """Returns the metrics of a metrics.jsonl by name: at most MOST_LAYER_NAMES of layers and MOST_NAMES others.

    Lines that are no rows, and values that are no finite numbers, are left out. Of rows that repeat a step, as after a
    file could not be truncated, the last one counts.

    Raises:
        OSError: it cannot be read.
    """
    parts: dict[str, list[_Part]] = {}
    num_names = {True: 0, False: 0}  # of layers, and others
    num_rows = 0
    for rows in _row_blocks(file):
        for name, numbers, values in _columns(rows):
            is_of_layer = name.startswith(STATS)
            most = MOST_LAYER_NAMES if is_of_layer else MOST_NAMES
            if name == "step" or (name not in parts and num_names[is_of_layer] >= most):
                continue
            num_names[is_of_layer] += name not in parts
            steps = np.array([rows[number]["step"] for number in numbers], np.int64)
            is_finite = np.abs(values) < LARGEST_VALUE  # False for nan
            places = num_rows + np.array(numbers)
            parts.setdefault(name, []).append(_Part(places[is_finite], steps[is_finite], values[is_finite]))
        num_rows += len(rows)
    series = {name: _joined(of_name) for name, of_name in parts.items()}
    return {name: one for name, one in series.items() if one.steps.size}


class _Part(NamedTuple):
    places: np.ndarray  # int64 [N], of the rows in the file
    steps: np.ndarray  # int64 [N]
    values: np.ndarray  # float64 [N]


def _columns(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Yields (name, indices of rows that have it, their values), for each set of keys that rows have.

    So a row of a few metrics costs nothing for the hundreds that rows of statistics have.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault(tuple(row), []).append(number)
    for names, numbers in alike.items():
        for name in names:
            yield name, numbers, _numbers([rows[number][name] for number in numbers])


def _row_blocks(file: BinaryIO) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of a metrics file, some thousands at a time, from the first to the last."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        whole, end, last = (rest + block).rpartition(b"\n")
        if end:
            yield _rows_of(whole)
        # Without a bound, a hole left by a power failure would collect in memory.
        rest = last if len(last) <= LONGEST_LINE else b"\0"
    yield _rows_of(rest)


def _rows_of(lines: bytes) -> list[dict[str, Any]]:
    try:
        # One call for all lines takes a third of the time of a call for each.
        rows = json.loads(b"[" + b",".join(lines.split(b"\n")) + b"]")
    except (ValueError, RecursionError):  # a line is damaged, so each is parsed for itself
        return [row for row in parse_rows(lines) if row["step"] <= LARGEST_STEP]
    return [row for row in rows if type(row) is dict and _is_step(row.get("step"))]


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_STEP  # not isinstance: true is an int, too


def _numbers(values: list[Any]) -> np.ndarray:
    """Returns values of JSON as float64 [N], nan for each that is no number."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return np.array(values, np.float64)
    if kinds == {type(None)}:
        return np.full(len(values), np.nan)
    return np.array([_number(value) for value in values], np.float64)


def _number(value: object) -> float:
    if type(value) is float or (type(value) is int and abs(value) < LARGEST_VALUE):
        return float(value)
    return np.nan


def _joined(parts: list[_Part]) -> Series:
    places, steps, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((places, steps))  # of equal steps the last one of the file comes last
    steps = steps[order]
    is_last = np.append(steps[1:] != steps[:-1], True)[: steps.size]
    return Series(steps[is_last], values[order][is_last])


def thin(series: Series, columns: int) -> Series:
    """Returns the points that a drawing of `columns` pixel columns needs; each column has the same number of steps.

    Each column keeps its first, last, lowest and highest point, so that a line through them covers the same pixels.
    """
    steps, values = series
    if steps.size <= 4 * columns:
        return series
    width = (steps[-1] - steps[0] + 1) / columns
    column = ((steps - steps[0]) / width).astype(np.int64)
    starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
    stops = np.append(starts[1:], steps.size)
    # Sorted by column, then by value: the lowest of a column comes first in it, and the highest last.
    order = np.lexsort((values, column))
    kept = np.unique(np.concatenate([starts, stops - 1, order[starts], order[stops - 1]]))
    return Series(steps[kept], values[kept])


def smooth(series: Series, points: int) -> Series:
    """Returns at most `points` means over neighbouring values, evenly spread; each is over 2 % of the values.

    A mean is over as many values before its own as after it, and so over fewer near both ends.
    """
    steps, values = series
    reach = steps.size // 100
    sums = np.append(0.0, np.cumsum(values))
    at = _spread(steps.size, points)
    side = np.minimum(reach, np.minimum(at, steps.size - 1 - at))
    means = (sums[at + side + 1] - sums[at - side]) / (2 * side + 1)
    return Series(steps[at], means)


def _spread(size: int, points: int) -> np.ndarray:
    """Returns at most `points` of the indices of an array, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(points, size)).astype(np.int64))


def seconds_by_step(seconds: Series, points: int) -> Series:
    """Returns the seconds spent in steps up to each step, at most `points` of them.

    seconds: of one step, for all steps since the value before it. In place of a missing value, as after a compilation,
        the next one counts.
    """
    steps = np.append(0, seconds.steps)
    spent = np.append(0.0, np.cumsum(np.diff(steps) * np.maximum(seconds.values, 0.0)))
    at = _spread(steps.size, points)
    return Series(steps[at], spent[at])
