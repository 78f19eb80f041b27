"""The old flax_model.msgpack of transformers, with its config.json: read only."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.convert import huggingface
from gptjax.convert.files import locate, plain
from gptjax.convert.names import ROWS
from gptjax.convert.tokenizer_files import read_tokenizer
from gptjax.convert.weights import Tensor, Weights, check_name, make_weights, show
from gptjax.errors import DataError

FILE = "flax_model.msgpack"


def read(directory: str, *, origin: str, dropout: float | None = None) -> Weights:
    """Returns the model of a directory with flax_model.msgpack and config.json.

    Raises:
        DataError: a file is missing or damaged, or the model is not exactly a GPT-2.
    """
    directory = os.path.dirname(directory) or "." if directory.endswith(FILE) else directory
    config = huggingface.read_config(directory, dropout=dropout)
    path = locate(directory, FILE)
    if path is None:
        raise DataError(f"{directory}: no {FILE}")
    leaves = _flatten(_load(path), path)
    tensors = {_torch_name(name): tensor for name, tensor in leaves.items()}
    tokenizer, line = read_tokenizer(directory)
    return make_weights(origin, config, tensors, tokenizer=tokenizer, notes=(line,))


def _load(path: str) -> Any:
    from flax import serialization

    with open(path, "rb") as file:
        data = file.read()
    try:
        return serialization.msgpack_restore(data)
    except Exception as error:  # msgpack fails in many ways on damaged bytes, and each one means the same
        raise DataError(f"{path}: not a file of flax: {plain(error)}") from error


def _flatten(tree: Any, path: str) -> dict[str, Tensor]:
    """Returns the arrays by path, 'h/0/attn/c_attn/kernel', matrices as [in, out]: FlaxConv1D keeps [out, in]."""
    flat: dict[str, Tensor] = {}
    pending = [("", tree)]
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, dict):
            pending += [(f"{prefix}/{key}", value) for key, value in reversed(node.items())]
        elif isinstance(node, np.ndarray):
            name = check_name(path, prefix.removeprefix("/").removeprefix("transformer/"))
            array = node.T if name.endswith("/kernel") else node
            flat[name] = Tensor(array.shape, array.dtype, _constant(array), name)
        else:
            raise DataError(f"{path}: {show(prefix)} is a {type(node).__name__}, expected an array")
    return flat


def _constant(array: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: array


def _torch_name(name: str) -> str:
    """Returns GPT-2's name of a path, 'h.0.attn.c_attn.weight'."""
    first, _, rest = name.partition("/")
    layer, _, inner = rest.partition("/")
    path = f"h/{inner}" if first == "h" else name
    return next((row.name.format(layer) for row in ROWS if row.path == path), name.replace("/", "."))
