"""The one map between GPT-2's tensor names, as PyTorch code spells them, and gptjax's parameter tree."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptjax.config import GPTConfig
from gptjax.model import padded_vocab_size


class Row(NamedTuple):
    """One kind of tensor, the same in every layer."""

    path: str  # in gptjax's tree
    name: str  # GPT-2's own; {} is the layer
    dims: str  # letters of its shape in Hugging Face's layout: Q is 3 D, the others as in gptjax/model.py

    @property
    def layered(self) -> bool:
        return self.path.startswith("h/")

    @property
    def linear(self) -> bool:
        """Whether it is a matrix of a layer: [in, out] in Hugging Face's Conv1D, [out, in] in nn.Linear and llm.c."""
        return self.layered and len(self.dims) == 2


# In the order of llm.c's file; lm_head only where untied.
ROWS = (
    Row("wte/embedding", "wte.weight", "VD"),
    Row("wpe/embedding", "wpe.weight", "TD"),
    Row("h/ln_1/scale", "h.{}.ln_1.weight", "D"),
    Row("h/ln_1/bias", "h.{}.ln_1.bias", "D"),
    Row("h/attn/c_attn/kernel", "h.{}.attn.c_attn.weight", "DQ"),
    Row("h/attn/c_attn/bias", "h.{}.attn.c_attn.bias", "Q"),
    Row("h/attn/c_proj/kernel", "h.{}.attn.c_proj.weight", "DD"),
    Row("h/attn/c_proj/bias", "h.{}.attn.c_proj.bias", "D"),
    Row("h/ln_2/scale", "h.{}.ln_2.weight", "D"),
    Row("h/ln_2/bias", "h.{}.ln_2.bias", "D"),
    Row("h/mlp/c_fc/kernel", "h.{}.mlp.c_fc.weight", "DF"),
    Row("h/mlp/c_fc/bias", "h.{}.mlp.c_fc.bias", "F"),
    Row("h/mlp/c_proj/kernel", "h.{}.mlp.c_proj.weight", "FD"),
    Row("h/mlp/c_proj/bias", "h.{}.mlp.c_proj.bias", "D"),
    Row("ln_f/scale", "ln_f.weight", "D"),
    Row("ln_f/bias", "ln_f.bias", "D"),
    Row("lm_head/kernel", "lm_head.weight", "VD"),
)


def rows(config: GPTConfig) -> list[Row]:
    """Returns the rows that a model of `config` has."""
    return [
        row
        for row in ROWS
        if (config.bias or not row.path.endswith("/bias")) and not (config.tie_embeddings and row.name.startswith("lm"))
    ]


def layers(row: Row, config: GPTConfig) -> Iterator[tuple[int | None, str]]:
    """Yields (layer, GPT-2's name) of each tensor of `row`; the layer is None where there is but one."""
    if not row.layered:
        yield None, row.name
        return
    for layer in range(config.n_layer):
        yield layer, row.name.format(layer)


def shape(row: Row, config: GPTConfig) -> tuple[int, ...]:
    """Returns the shape of one tensor of `row` in Hugging Face's layout."""
    D = config.n_embd
    sizes = {"V": config.vocab_size, "T": config.block_size, "D": D, "Q": 3 * D, "F": 4 * D}
    return tuple(sizes[letter] for letter in row.dims)


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a model of `config`, by GPT-2's names."""
    return {name: shape(row, config) for row in rows(config) for _, name in layers(row, config)}


def leaf_shape(row: Row, config: GPTConfig) -> tuple[int, ...]:
    """Returns the shape of gptjax's parameter at `row.path`: layers stacked, vocabulary padded, q, k and v apart."""
    D, V_pad = config.n_embd, padded_vocab_size(config)
    special = {"wte/embedding": (V_pad, D), "lm_head/kernel": (D, V_pad)}
    one = special.get(row.path) or shape(row, config)
    if "Q" in row.dims:
        one = (*one[:-1], 3, D)
    return (config.n_layer, *one) if row.layered else one


def into_leaf(row: Row, leaf: np.ndarray, layer: int | None, tensor: np.ndarray) -> None:
    """Copies one tensor of Hugging Face's layout to where it belongs in gptjax's parameter."""
    place = leaf if layer is None else leaf[layer]
    if row.path == "lm_head/kernel":
        place[:, : len(tensor)] = tensor.T
    elif row.path == "wte/embedding":
        place[: len(tensor)] = tensor
    else:
        place[...] = tensor.reshape(place.shape)


def from_leaf(row: Row, leaf: np.ndarray, layer: int | None, config: GPTConfig) -> np.ndarray:
    """Returns one tensor in Hugging Face's layout out of gptjax's parameter, as a view: the inverse of `into_leaf`."""
    place = leaf if layer is None else leaf[layer]
    if row.path == "lm_head/kernel":
        return place[:, : config.vocab_size].T
    if row.path == "wte/embedding":
        return place[: config.vocab_size]
    return place.reshape(shape(row, config))
