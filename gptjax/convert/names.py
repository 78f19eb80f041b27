"""GPT-2's tensors by their PyTorch names, and their place in gptjax's parameters."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from gptjax.config import GPTConfig
from gptjax.params import Param, rows, tensor_shape

Shape: TypeAlias = tuple[int, ...]


def layers(row: Param, config: GPTConfig) -> Iterator[tuple[int | None, str]]:
    """Yields (layer, GPT-2's name) of each tensor of `row`; the layer is None for a parameter outside the layers."""
    if not row.layered:
        yield None, row.tensor_name(None)
        return
    for layer in range(config.n_layer):
        yield layer, row.tensor_name(layer)


def shapes(config: GPTConfig) -> dict[str, Shape]:
    """Returns the shape in Hugging Face's layout of every tensor of a model of `config`, by GPT-2's names."""
    by_name = {}
    for row in rows(config):
        shape = tensor_shape(row, config)
        for _, name in layers(row, config):
            by_name[name] = shape
    return by_name


def into_leaf(
    row: Param,
    leaf: np.ndarray,
    tensor: np.ndarray,
    *,
    layer: int | None,
) -> None:
    """Copies one tensor in Hugging Face's layout to its place in gptjax's parameter.

    The vocabulary's padding is not written: [V, D] goes into the first V rows of [padded V, D].

    leaf: the parameter of `params.leaf_shape`, stacked over layers; changed in place, in its own dtype.
    tensor: of `params.tensor_shape`, in any float dtype.
    """
    target = leaf if layer is None else leaf[layer]
    if row.path == "lm_head/kernel":
        target[:, : len(tensor)] = tensor.T  # [V, D] -> [D, padded V]
    elif row.path == "wte/embedding":
        target[: len(tensor)] = tensor
    else:
        target[...] = tensor.reshape(target.shape)  # splits c_attn's [D, 3 D] into [D, 3, D]


def from_leaf(
    row: Param,
    leaf: np.ndarray,
    config: GPTConfig,
    *,
    layer: int | None,
) -> np.ndarray:
    """Returns one tensor in Hugging Face's layout from gptjax's parameter, as a view: the inverse of `into_leaf`.

    leaf: the parameter of `params.leaf_shape`, stacked over layers. The result is of `params.tensor_shape`, in the
        same dtype.
    """
    source = leaf if layer is None else leaf[layer]
    if row.path == "lm_head/kernel":
        return source[:, : config.vocab_size].T
    if row.path == "wte/embedding":
        return source[: config.vocab_size]
    return source.reshape(tensor_shape(row, config))
