"""GPT-2's tensors by their PyTorch names, and their place in gptjax's parameters."""

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from gptjax.config import GPTConfig
from gptjax.params import Param, rows, tensor_shape

Shape: TypeAlias = tuple[int, ...]
# Of modules that hold the whole model: torch.compile, DataParallel and Lightning, and TRL's with a value head.
WRAPPERS = ("_orig_mod.", "module.", "model.", "pretrained_model.")
MOST_WRAPPERS = 3  # one around the other
SHOWN_HEADS = 4  # in a note
PREFIX = "transformer."  # before every name but lm_head's in Hugging Face's GPT2LMHeadModel and in nanoGPT
# Not parameters: the causal mask, its fill value, and the positions.
BUFFERS = re.compile(r"(h\.\d+\.)?(attn\.(bias|masked_bias)|(attn\.)?position_ids)")
# Heads of other tasks beside the language model: TRL's value head, transformers' classes for classification.
OTHER_HEADS = re.compile(r"(v_head|score|multiple_choice_head|classifier|qa_outputs)\..+")


class Renamed(NamedTuple):
    """The names of a file's tensors by GPT-2's names, and what was left out."""

    names: dict[str, str]  # GPT-2's name without prefix -> the name in the file
    heads: list[str]  # names in the file of heads that are left out
    twice: tuple[str, str, str] | None  # (name, its first and its second name in the file), where two mean the same


def rename(found: Collection[str]) -> Renamed:
    """Returns GPT-2's names of the tensors `found`: without wrappers that all of them share, without buffers."""
    inner = {name: name for name in found}
    for _ in range(MOST_WRAPPERS):
        wrapper = _shared_wrapper(inner.values())
        if not wrapper:
            break
        inner = {name: short.removeprefix(wrapper) for name, short in inner.items()}
    renamed = Renamed({}, [], None)
    for name, full in inner.items():
        short = full.removeprefix(PREFIX)
        if BUFFERS.fullmatch(short):
            continue
        if OTHER_HEADS.fullmatch(short):
            renamed.heads.append(name)
            continue
        if short in renamed.names:
            return renamed._replace(twice=(short, renamed.names[short], name))
        renamed.names[short] = name
    return renamed


def _shared_wrapper(names: Collection[str]) -> str:
    """Returns the wrapper with which all names begin, apart from heads of other tasks, which may be outside it."""
    model = [name for name in names if not OTHER_HEADS.fullmatch(name)]
    for wrapper in WRAPPERS:
        if model and all(name.startswith(wrapper) for name in model):
            return wrapper
    return ""


def left_out(heads: Collection[str]) -> tuple[str, ...]:
    """Returns a note for the user about `heads`, if there are any."""
    if not heads:
        return ()
    return (f"left out, not part of the language model: {', '.join(sorted(heads)[:SHOWN_HEADS])}",)


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
