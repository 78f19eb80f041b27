"""llm.c's model .bin: a header of 256 int32, then every tensor of all layers in turn, matrices as [out, in]."""

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from gptjax.config import GPTConfig
from gptjax.convert.names import layers, rows, shape
from gptjax.convert.weights import DTYPES, Tensor, Weights, make_weights
from gptjax.errors import DataError
from gptjax.model import padded_vocab_size

MAGIC = 20240326
HEADER = np.dtype("<i4"), 256
VERSIONS = {3: "float32", 5: "bfloat16"}
FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "padded_vocab_size")  # from the third on


def read(path: str, *, origin: str, dropout: float | None = None) -> Weights:
    """Returns the model of a .bin file, each tensor read when it is asked for.

    Raises:
        DataError: the file is damaged, or of another kind.
    """
    config, padded_rows, dtype = read_header(path)
    config = dataclasses.replace(config, dropout=dropout or 0.0)
    tensors, offset = {}, HEADER[0].itemsize * HEADER[1]
    for row in rows(config):
        for _, name in layers(row, config):
            stored = shape(row, config)[::-1] if row.linear else shape(row, config)
            tensors[name] = Tensor(shape(row, config), dtype, _reader(path, offset, stored, dtype, row.linear), name)
            sizes = (padded_rows, config.n_embd) if name == "wte.weight" else stored
            offset += int(np.prod(sizes)) * dtype.itemsize
    return make_weights(origin, config, tensors)


def read_header(path: str) -> tuple[GPTConfig, int, np.dtype]:
    """Returns (config, rows of the padded embedding, dtype), after comparing the file's size with them."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER[0].itemsize * HEADER[1]), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    header = np.frombuffer(head[: len(head) // 4 * 4], HEADER[0])
    if not header.size or header[0] != MAGIC:
        found = header[0] if header.size else "nothing"
        raise DataError(f"{path}: not a model of llm.c: starts with {found}, expected the magic {MAGIC}")
    if header.size < HEADER[1]:
        raise DataError(f"{path}: the file ends within its header, at byte {size}")
    if int(header[1]) not in VERSIONS:
        raise DataError(f"{path}: version {header[1]}; expected 3 (float32) or 5 (bfloat16)")
    values = dict(zip(FIELDS, map(int, header[2:8]), strict=True))
    padded = values.pop("padded_vocab_size")
    if min(values.values()) < 1 or padded < values["vocab_size"]:
        raise DataError(f"{path}: impossible sizes in the header: {values}, padded_vocab_size={padded}")
    dtype = DTYPES[VERSIONS[int(header[1])]]
    config = GPTConfig(**values)
    expected = len(head) + dtype.itemsize * _count(config, padded)
    if size != expected:
        raise DataError(f"{path}: {size} bytes, but the sizes in its header take {expected}")
    return config, padded, dtype


def _count(config: GPTConfig, padded_rows: int) -> int:
    """Returns how many values such a file has, without a loop over layers that may not be there."""
    D, L = config.n_embd, config.n_layer
    return (padded_rows + config.block_size) * D + L * (12 * D * D + 13 * D) + 2 * D


def _reader(path: str, offset: int, stored: tuple[int, ...], dtype: np.dtype, linear: bool) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        tensor = np.fromfile(path, dtype, int(np.prod(stored)), offset=offset).reshape(stored)
        return tensor.T if linear else tensor

    return read


def write(path: str, weights: Weights, tensors: Iterator[tuple[str, np.ndarray]], *, dtype: str) -> None:
    """Writes the model, a tensor at a time."""
    config, kind = weights.config, DTYPES[dtype]
    version = next(v for v, name in VERSIONS.items() if name == dtype)
    header, padded = np.zeros(HEADER[1], HEADER[0]), padded_vocab_size(config)
    sizes = [config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, padded]
    header[:8] = [MAGIC, version, *sizes]
    linear = {name for row in rows(config) if row.linear for _, name in layers(row, config)}
    with open(path, "wb") as file:
        header.tofile(file)
        for name, tensor in tensors:
            np.ascontiguousarray(tensor.T if name in linear else tensor, kind).tofile(file)
            if name == "wte.weight":
                np.zeros((padded - config.vocab_size, config.n_embd), kind).tofile(file)
