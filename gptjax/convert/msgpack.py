"""The old flax_model.msgpack of transformers, with its config.json: read only."""

import os
from typing import Any

import numpy as np

from gptjax.convert import huggingface
from gptjax.convert.files import locate, require_regular
from gptjax.convert.tokenizer_files import read_tokenizer
from gptjax.convert.weights import ReadTensor, Tensor, Weights, check_name, make_weights, short_repr
from gptjax.errors import DataError, one_line
from gptjax.params import PARAMS

FILE = "flax_model.msgpack"


def read(
    directory: str,
    *,
    origin: str,
    dropout: float | None = None,
) -> Weights:
    """Returns the model of a directory with flax_model.msgpack and config.json.

    directory: it, or the path of its flax_model.msgpack.
    dropout: of the result; None means the rate in config.json.

    Raises:
        DataError: a file is missing or damaged, or the model is not exactly a GPT-2.
    """
    if directory.endswith(FILE):
        directory = os.path.dirname(directory) or "."
    config = huggingface.read_config(directory, dropout=dropout)
    path = locate(directory, FILE)
    if path is None:
        raise DataError(f"no {FILE}", field=directory)
    tensors = {}
    for name, tensor in _flatten(_load(path), path).items():
        tensors[_torch_name(name)] = tensor
    tokenizer, note = read_tokenizer(directory)
    return make_weights(
        origin,
        config,
        tensors,
        tokenizer=tokenizer,
        notes=(note,),
    )


def _load(path: str) -> Any:
    from flax import serialization

    require_regular(path)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", field=path) from error
    try:
        return serialization.msgpack_restore(data)
    except Exception as error:  # msgpack fails in many ways on damaged bytes, which all mean the same
        raise DataError(f"not a file of flax: {one_line(error)}", field=path) from error


def _flatten(tree: Any, path: str) -> dict[str, Tensor]:
    """Returns the arrays by path, 'h/0/attn/c_attn/kernel'. Kernels become [in, out]: FlaxConv1D stores [out, in]."""
    flat: dict[str, Tensor] = {}
    pending = [("", tree)]  # a stack of (path, subtree)
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, dict):
            for key, value in reversed(node.items()):
                pending.append((f"{prefix}/{key}", value))
            continue
        if not isinstance(node, np.ndarray):
            kind = type(node).__name__
            raise DataError(f"{short_repr(prefix)} is a {kind}, expected an array", field=path)
        short = prefix.removeprefix("/").removeprefix("transformer/")
        name = check_name(path, short)
        array = node.T if name.endswith("/kernel") else node
        flat[name] = Tensor(array.shape, array.dtype, read=_constant(array), label=name)
    return flat


def _constant(array: np.ndarray) -> ReadTensor:
    return lambda: array


def _torch_name(name: str) -> str:
    """Returns GPT-2's name of a path, such as 'h.0.attn.c_attn.weight'; dots for slashes if GPT-2 has none."""
    first, _, rest = name.partition("/")
    layer, _, inner = rest.partition("/")
    path = f"h/{inner}" if first == "h" else name
    for row in PARAMS:
        if row.path == path:
            return row.tensor_name(layer)
    return name.replace("/", ".")
