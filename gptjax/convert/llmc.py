"""llm.c's model .bin: a header of 256 int32, then the tensors, each kind for all layers in turn, matrices [out, in]."""

import dataclasses
import math
import os

import numpy as np

from gptjax.config import GPTConfig
from gptjax.convert.files import require_regular
from gptjax.convert.names import Shape, layers
from gptjax.convert.weights import DTYPES, NamedTensors, ReadTensor, Tensor, Weights, make_weights
from gptjax.errors import DataError
from gptjax.params import padded_vocab_size, rows, tensor_shape

MAGIC = 20240326
HEADER_DTYPE = np.dtype("<i4")
HEADER_LENGTH = 256  # int32 values
HEADER_BYTES = HEADER_LENGTH * HEADER_DTYPE.itemsize
VERSIONS = {3: "float32", 5: "bfloat16"}
FIELDS = (  # of the header, after magic and version
    "block_size",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
    "padded_vocab_size",
)


def read(
    path: str,
    *,
    origin: str,
    dropout: float | None = None,
) -> Weights:
    """Returns the model of a .bin file, whose tensors are read on demand.

    dropout: of the result; None means 0, since the file has none.

    Raises:
        DataError: the file is damaged, or of another kind.
    """
    config, padded_rows, dtype = read_header(path)
    config = dataclasses.replace(config, dropout=dropout or 0.0)
    tensors = {}
    offset = HEADER_BYTES
    for row in rows(config):
        for _, name in layers(row, config):
            shape = tensor_shape(row, config)
            stored = shape[::-1] if row.linear else shape
            tensors[name] = Tensor(
                shape=shape,
                dtype=dtype,
                read=_reader(path, offset, stored, dtype, row.linear),
                label=name,
            )
            # The vocabulary's padding is skipped, not read.
            sizes = (padded_rows, config.n_embd) if name == "wte.weight" else stored
            offset += math.prod(sizes) * dtype.itemsize
    return make_weights(origin, config, tensors)


def read_header(path: str) -> tuple[GPTConfig, int, np.dtype]:
    """Returns (config, rows of the padded embedding, dtype of the tensors).

    Raises:
        DataError: the file is not a model of llm.c, or its size is not the one that its header implies.
    """
    require_regular(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", field=path) from error
    header = _parse_header(head, size, path)
    version = int(header[1])
    if version not in VERSIONS:
        raise DataError(f"version {version}; expected 3 (float32) or 5 (bfloat16)", field=path)

    sizes = dict(zip(FIELDS, map(int, header[2:8]), strict=True))
    padded_rows = sizes.pop("padded_vocab_size")
    if min(sizes.values()) < 1 or padded_rows < sizes["vocab_size"]:
        raise DataError(
            f"impossible sizes in the header: {sizes}, padded_vocab_size={padded_rows}",
            field=path,
        )
    dtype = DTYPES[VERSIONS[version]]
    config = GPTConfig(**sizes)
    expected = HEADER_BYTES + dtype.itemsize * _count(config, padded_rows)
    if size != expected:
        raise DataError(f"{size} bytes, but the sizes in its header take {expected}", field=path)
    return config, padded_rows, dtype


def _parse_header(head: bytes, size: int, path: str) -> np.ndarray:
    """Returns the int32 values [HEADER_LENGTH] of `head`, the first bytes of a file of `size` bytes."""
    complete = len(head) - len(head) % HEADER_DTYPE.itemsize
    header = np.frombuffer(head[:complete], HEADER_DTYPE)
    magic = header[0] if header.size else "nothing"
    if magic != MAGIC:
        raise DataError(f"not a model of llm.c: starts with {magic}, expected the magic {MAGIC}", field=path)
    if header.size < HEADER_LENGTH:
        raise DataError(f"the file ends within its header, at byte {size}", field=path)
    return header


def _count(config: GPTConfig, padded_rows: int) -> int:
    """Returns the number of values in such a file.

    A formula, because a damaged header could make a loop over the layers endless.
    """
    D = config.n_embd
    embeddings = (padded_rows + config.block_size) * D
    layer = 12 * D * D + 13 * D
    final_norm = 2 * D
    return embeddings + config.n_layer * layer + final_norm


def _reader(
    path: str,
    offset: int,
    stored: Shape,
    dtype: np.dtype,
    linear: bool,
) -> ReadTensor:
    def read() -> np.ndarray:
        values = np.fromfile(path, dtype, count=math.prod(stored), offset=offset)
        tensor = values.reshape(stored)
        return tensor.T if linear else tensor

    return read


def write(
    path: str,
    weights: Weights,
    tensors: NamedTensors,
    *,
    dtype: str,
) -> None:
    """Writes the model, one tensor at a time.

    tensors: (name, tensor) in the order of `read_tensors`, which is llm.c's order.
    dtype: of the tensors in the file, float32 or bfloat16.

    Raises:
        OSError: the file cannot be written.
    """
    config = weights.config
    stored_dtype = DTYPES[dtype]
    versions = {name: version for version, name in VERSIONS.items()}
    padded_rows = padded_vocab_size(config)
    header = np.zeros(HEADER_LENGTH, HEADER_DTYPE)
    header[0] = MAGIC
    header[1] = versions[dtype]
    header[2:8] = [
        config.block_size,
        config.vocab_size,
        config.n_layer,
        config.n_head,
        config.n_embd,
        padded_rows,
    ]
    linear = set()
    for row in rows(config):
        if row.linear:
            linear |= {name for _, name in layers(row, config)}
    with open(path, "wb") as file:
        header.tofile(file)
        for name, tensor in tensors:
            layout = tensor.T if name in linear else tensor
            np.ascontiguousarray(layout, stored_dtype).tofile(file)
            if name == "wte.weight":
                padding = np.zeros((padded_rows - config.vocab_size, config.n_embd), stored_dtype)
                padding.tofile(file)
