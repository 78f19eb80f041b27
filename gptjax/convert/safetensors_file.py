"""A safetensors file, read one tensor at a time and checked strictly, and written one tensor at a time."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from gptjax.convert.files import LARGEST_JSON, require_regular
from gptjax.convert.names import Shape
from gptjax.convert.weights import DTYPES, UNKNOWN_DTYPE, NamedTensors, ReadTensor, Tensor, check_name
from gptjax.errors import DataError, one_line
from gptjax.strict_json import InvalidTextError, parse_json

LENGTH_BYTES = 8  # of the little-endian integer before the header: the header's length
ALIGNMENT = 8  # bytes; of the start of the data
STORED_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Types that no parameter may have, but a buffer that is left out: the causal mask is often BOOL or U8.
OTHER_TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


def open_safetensors(path: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file by name, each read on demand.

    Raises:
        DataError: the file is damaged.
    """
    require_regular(path)
    with _opened(path) as file:
        slices = {}
        for name in file.keys():  # noqa: SIM118  # the file is no dict
            slices[check_name(path, name)] = file.get_slice(name)
        _reject_duplicates(path)
        tensors = {}
        for name, stored in slices.items():
            tensors[name] = Tensor(
                shape=tuple(stored.get_shape()),
                dtype=_dtype(stored.get_dtype()),
                read=_reader(path, name),
                label=name,
            )
        return tensors


def _reject_duplicates(path: str) -> None:
    """Raises DataError if a name occurs twice in the header: the library would silently take the last one."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = file.read(size)
    try:
        parse_json(header, dict)
    except InvalidTextError as error:
        raise _unusable(path, f"its header: {one_line(error)}") from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with open(path, "rb") as start:
            size = int.from_bytes(start.read(LENGTH_BYTES), "little")
        # The library reports a header that is longer than the file.
        if LARGEST_JSON < size <= os.path.getsize(path):
            raise _unusable(path, f"its header takes {size} bytes")
        # backend="pread": with a memory map, pages that have been read would count as this process's memory.
        with safetensors.safe_open(path, framework="np", backend="pread") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise _unusable(path, one_line(error)) from error


def _unusable(path: str, reason: str) -> DataError:
    return DataError(f"not a usable safetensors file: {reason}", field=path)


def _reader(path: str, name: str) -> ReadTensor:
    def read() -> np.ndarray:
        with _opened(path) as file:
            return file.get_tensor(name)

    return read


def _dtype(stored: str) -> np.dtype:
    """Returns the dtype of a type's name; `make_weights` refuses a parameter of a type that it cannot convert."""
    if stored in STORED_TYPES:
        return DTYPES[STORED_TYPES[stored]]
    return np.dtype(OTHER_TYPES.get(stored, UNKNOWN_DTYPE))


def write_safetensors(
    path: str,
    shapes: Mapping[str, Shape],
    tensors: NamedTensors,
    *,
    dtype: str,
) -> None:
    """Writes the tensors one at a time; the library's own writer needs all of them in memory.

    Source of the format: the README of safetensors, "Format".

    shapes: of the tensors, by their names in the file and in the order of `tensors`.
    tensors: (any name, tensor).
    dtype: of the tensors in the file: float32, bfloat16 or float16.

    Raises:
        OSError: the file cannot be written.
    """
    stored_types = {name: stored for stored, name in STORED_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start = end
        end += math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {
            "dtype": stored_types[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for _, tensor in tensors:
            np.ascontiguousarray(tensor, DTYPES[dtype]).tofile(file)
