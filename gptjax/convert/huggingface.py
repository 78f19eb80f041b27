"""Hugging Face's GPT-2: a directory with config.json and model.safetensors, read exactly or rejected by name."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gptjax.config import Activation, GPTConfig
from gptjax.convert import torch_file
from gptjax.convert.card import model_card
from gptjax.convert.files import locate, read_json
from gptjax.convert.names import PREFIX, left_out, rename, shapes
from gptjax.convert.safetensors_file import open_safetensors, write_safetensors
from gptjax.convert.tokenizer_files import read_tokenizer, write_tokenizer
from gptjax.convert.weights import (
    DTYPES,
    NamedTensors,
    Tensor,
    Weights,
    check_name,
    check_sizes,
    make_weights,
    short_repr,
)
from gptjax.data.tokenizer import Tokenizer
from gptjax.documents import NO_EOT
from gptjax.errors import DataError
from gptjax.workdir import write_json

log = logging.getLogger("gptjax")
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
GPT2_EOT = 50256  # end-of-text's id in GPT-2's tokenizer

# Fields of GPT2Config that change the function, with the values for which gptjax computes the same function. The first
# value is the default of transformers for a config.json without the field.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # the same function; gptjax's softmax is in float32 either way
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
}
# transformers' names of the two forms of GELU, and gptjax's. The first is its default.
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
}
# The sizes, with their defaults in transformers.
SIZES = {
    "n_positions": 1024,
    "vocab_size": 50257,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
}
COMMON_NAMES = {  # which transformers accepts for the same fields: attribute_map of GPT2Config
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
DEFAULT_DROPOUT = 0.1  # of transformers


def read(
    directory: str,
    *,
    origin: str,
    dropout: float | None = None,
) -> Weights:
    """Returns the model in `directory`.

    dropout: of the result; None means the rate that all three fields of config.json share.

    Raises:
        DataError: a file is missing or damaged, or the model is not exactly a GPT-2.
        UnavailableError: the file is pickled, and torch is missing or too old to read it safely.
    """
    config = read_config(directory, dropout=dropout)
    tensors, notes = find_tensors(directory, tied=config.tie_embeddings)
    tokenizer, tokenizer_note = read_tokenizer(directory)
    return make_weights(
        origin,
        config,
        tensors,
        tokenizer=tokenizer,
        notes=(*notes, tokenizer_note),
    )


def read_config(directory: str, *, dropout: float | None = None) -> GPTConfig:
    """Returns the GPTConfig of the config.json in `directory`.

    Raises:
        DataError: there is none, or `parse_config` rejects it.
    """
    path = locate(directory, "config.json")
    if path is None:
        raise DataError("no config.json, so this is no model of transformers", field=directory)
    return parse_config(read_json(path), path, dropout=dropout)


def parse_config(
    values: Any,
    path: str,
    *,
    dropout: float | None = None,
) -> GPTConfig:
    """Returns the GPTConfig of a GPT2Config's JSON.

    Raises:
        DataError: a field has a value that gptjax does not compute exactly, or of the wrong type.
    """
    if not isinstance(values, dict):
        raise DataError("expected an object with fields", field=path)
    for name, allowed in REQUIRED.items():
        value = values.get(name, allowed[0])
        # The types too, since 1 == True in Python.
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join(map(json.dumps, allowed))
            raise _other_function(path, name, value, choices)
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        choices = " or ".join(map(json.dumps, ACTIVATIONS))
        raise _other_function(path, "activation_function", activation, choices)
    sizes = _parse_sizes(values, path)
    inner = values.get("n_inner")
    width = 4 * sizes["n_embd"]
    if inner not in (None, width):
        raise _other_function(path, "n_inner", inner, f"4 n_embd = {width}")
    tied = values.get("tie_word_embeddings", True)
    if type(tied) is not bool:
        raise DataError(f"tie_word_embeddings={short_repr(tied)}: expected true or false", field=path)
    block_size = sizes.pop("n_positions")
    rate = _common_dropout(values, path) if dropout is None else dropout
    return GPTConfig(
        block_size=block_size,
        dropout=rate,
        bias=True,
        tie_embeddings=tied,
        activation=ACTIVATIONS[activation],
        **sizes,
    )


def _other_function(
    path: str,
    name: str,
    value: Any,
    allowed: str,
) -> DataError:
    return DataError(
        f"{name}={short_repr(value)}: gptjax computes GPT-2 with {allowed} only",
        field=path,
    )


def _parse_sizes(values: Mapping[str, Any], path: str) -> dict[str, int]:
    """Returns the sizes by GPT-2's names; config.json may have either of the two names of a size, or both."""
    sizes = {}
    for name, default in SIZES.items():
        common = COMMON_NAMES.get(name, name)
        size = values.get(name, values.get(common, default))
        check_sizes(path, {name: size})
        other = values.get(common, size)
        if other != size:
            raise DataError(
                f"{name}={size}, but {common}={short_repr(other)}: both are names of one size",
                field=path,
            )
        sizes[name] = size
    return sizes


def _common_dropout(values: Mapping[str, Any], path: str) -> float:
    rates = {name: values.get(name, DEFAULT_DROPOUT) for name in DROPOUTS}
    for rate in rates.values():
        if type(rate) not in (int, float) or not 0 <= rate < 1:
            raise DataError(f"{short_repr(rates)}: expected numbers from 0 to below 1", field=path)
    if len(set(rates.values())) > 1:
        found = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        raise DataError(
            f"{found}: gptjax has one rate of dropout for all three",
            field=path,
            remedy="choose it with --dropout=RATE",
        )
    return float(rates[DROPOUTS[0]])


def find_tensors(directory: str, *, tied: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors in a directory's weight files by GPT-2's names, and notes on tensors that were left out.

    Raises:
        DataError: there is no weight file, one is damaged, or the files and their index differ.
        UnavailableError: the file is pickled, and torch is missing or too old to read it safely.
    """
    found: dict[str, Tensor] = {}
    files: dict[str, str] = {}  # the file of each tensor
    for path, indexed, opened in _weight_files(directory):
        for name in opened:
            if indexed is not None and name not in indexed:
                raise DataError(f"has {name}, which the index does not place there", field=path)
        missing = (indexed or set()) - set(opened)
        if missing:
            raise DataError(f"{min(missing)} is missing, which the index places there", field=path)
        found |= opened  # an index has one file per name
        files |= dict.fromkeys(opened, path)
    renamed = rename(found)
    if renamed.twice:
        name, first, second = renamed.twice
        raise DataError(f"{name} occurs twice, as {first} and as {second}", field=files[second])
    tensors = {name: found[stored] for name, stored in renamed.names.items()}
    notes = left_out(renamed.heads)
    if tied:
        tensors, tied_notes = _without_tied_head(directory, tensors)
        notes = (*notes, *tied_notes)
    return tensors, list(notes)


def _without_tied_head(
    directory: str,
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns `tensors` without an lm_head that repeats the token embedding."""
    head = tensors.get("lm_head.weight")
    table = tensors.get("wte.weight")
    if head is None or table is None:
        return tensors, []
    # A table of another type, which NumPy may lack, is not compared: make_weights refuses it by its name.
    if table.dtype in DTYPES.values() and not _same_tensor(head, table):
        raise DataError(
            f"{head.label} is not {table.label}, but config.json has tie_word_embeddings=true",
            field=directory,
            remedy="set it to false to keep both, or remove the one that is wrong",
        )
    rest = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return rest, ["lm_head.weight repeats wte.weight, as the tied model needs: kept once"]


def _same_tensor(head: Tensor, table: Tensor) -> bool:
    """Returns whether two tensors have the same shape, dtype and bits; the bits of two NaNs may be the same."""
    if head.shape != table.shape or head.dtype != table.dtype:
        return False
    head_array = np.ascontiguousarray(head.read())
    table_array = np.ascontiguousarray(table.read())
    if head_array.dtype != table_array.dtype:  # a pickled tensor's dtype may be unknown until it is read
        return False
    unsigned = f"uint{8 * head_array.dtype.itemsize}"
    return bool(np.array_equal(head_array.view(unsigned), table_array.view(unsigned)))


def has_weights(directory: str) -> bool:
    """Returns whether `read` finds weights in `directory`.

    Raises:
        DataError: a weight file is a link that leads out of the directory.
    """
    # In the order of `read`, which does not look at a pickled file next to safetensors.
    names = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLED, f"{PICKLED}.index.json")
    return any(locate(directory, name) for name in names)


def _weight_files(directory: str) -> Iterator[tuple[str, set[str] | None, Mapping[str, Tensor]]]:
    """Yields (path, names of tensors that an index places there or None, tensors) of each weight file."""
    readers: dict[str, Callable[[str], Mapping[str, Tensor]]] = {
        SAFETENSORS: open_safetensors,
        PICKLED: _open_pickled,
    }
    for name, reader in readers.items():
        unsharded = locate(directory, name)
        index = locate(directory, f"{name}.index.json")
        if unsharded:
            yield unsharded, None, reader(unsharded)
            return
        if index:
            for shard, names in _parse_index(index).items():
                path = locate(directory, shard)
                if path is None:
                    raise DataError(f"the file {shard} is missing in {directory}", field=index)
                yield path, names, reader(path)
            return
    raise DataError(f"no {SAFETENSORS} or {PICKLED}, unsharded or with an index", field=directory)


def _parse_index(path: str) -> dict[str, set[str]]:
    """Returns the names of tensors by the file that an index places them in."""
    values = read_json(path)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError("expected a weight_map from tensors to files", field=path)
    files: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise DataError("expected a weight_map from tensors to files", field=path)
        names = files.setdefault(shard, set())
        names.add(check_name(path, name))
    return files


def _open_pickled(path: str) -> dict[str, Tensor]:
    return torch_file.tensors(torch_file.load(path), path)


def write(
    directory: str,
    weights: Weights,
    tensors: NamedTensors,
    *,
    dtype: str,
) -> None:
    """Writes the model into the empty `directory`, with config, tokenizer and model card, as transformers does.

    tensors: (name, tensor) in the order of `read_tensors`.
    dtype: of the tensors in the file.

    Raises:
        DataError: the tokenizer is of characters, which transformers does not have.
        OSError: a file cannot be written.
    """
    config = weights.config
    tokenizer = weights.tokenizer
    if tokenizer is not None and tokenizer.eot_id == NO_EOT:
        raise DataError(
            "is of characters, and transformers has no such tokenizer",
            field=f"tokenizer {tokenizer.name}",
            remedy="export it to nanogpt:",
        )
    write_json(f"{directory}/config.json", make_config(weights, dtype))
    eot = _eot(weights)
    write_json(f"{directory}/generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
    if weights.tokenizer is not None:
        _write_tokenizer(weights.tokenizer, directory, config.block_size)
    stored_shapes = {}
    for name, shape in shapes(config).items():
        stored = name if name == "lm_head.weight" else PREFIX + name
        stored_shapes[stored] = shape
    write_safetensors(
        f"{directory}/{SAFETENSORS}",
        stored_shapes,
        tensors,
        dtype=dtype,
    )
    with open(f"{directory}/README.md", "w", encoding="utf-8") as file:
        file.write(model_card(weights, dtype))


def _write_tokenizer(tokenizer: Tokenizer, directory: str, block_size: int) -> None:
    try:
        write_tokenizer(tokenizer, directory, block_size=block_size)
    except DataError as error:  # the weights are useful without it
        log.warning("exported without its tokenizer: %s", error)


def make_config(weights: Weights, dtype: str) -> dict[str, Any]:
    """Returns the fields of config.json, which is a GPT2Config, for an export in `dtype`."""
    config = weights.config
    eot = _eot(weights)
    defaults = {name: allowed[0] for name, allowed in REQUIRED.items()}
    fixed = {name: value for name, value in defaults.items() if value not in (None, {})}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **fixed,
        "activation_function": config.activation,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_inner": None,
        **dict.fromkeys(DROPOUTS, config.dropout),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _eot(weights: Weights) -> int | None:
    """Returns end-of-text's id; without a tokenizer GPT-2's id, if the vocabulary has it."""
    if weights.tokenizer is not None:
        return weights.tokenizer.eot_id
    return GPT2_EOT if weights.config.vocab_size > GPT2_EOT else None
