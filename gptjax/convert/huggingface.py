"""Hugging Face's GPT-2: a directory with config.json and model.safetensors, read exactly or refused by name."""

import collections
import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from gptjax.config import GPTConfig
from gptjax.convert import torch_file
from gptjax.convert.card import model_card
from gptjax.convert.files import LARGEST_JSON, locate, plain, read_json
from gptjax.convert.names import shapes
from gptjax.convert.tokenizer_files import read_tokenizer, write_tokenizer
from gptjax.convert.weights import DTYPES, Tensor, Weights, check_name, check_sizes, make_weights, show
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError
from gptjax.workdir import write_json

log = logging.getLogger("gptjax")
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
PREFIX = "transformer."
IGNORED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers: the causal mask and its fill value
STORED_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Fields of GPT2Config that change the function, with the values that are GPT-2 as gptjax computes it. The first is
# the default, which transformers takes where config.json has none.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # three spellings of the tanh GELU
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
}
SIZES = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}  # and their defaults
COMMON_NAMES = {  # which transformers takes for the same fields: attribute_map of GPT2Config
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def read(directory: str, *, origin: str, dropout: float | None = None) -> Weights:
    """Returns the model in `directory`.

    dropout: of the result; None takes the one that all three fields of config.json agree on.

    Raises:
        DataError: a file is missing or damaged, or the model is not exactly a GPT-2.
        UnavailableError: it is pickled, and torch is missing or too old to read that safely.
    """
    config = read_config(directory, dropout=dropout)
    tensors, notes = find_tensors(directory, config, tied=config.tie_embeddings)
    tokenizer, line = read_tokenizer(directory)
    return make_weights(origin, config, tensors, tokenizer=tokenizer, notes=(*notes, line))


def read_config(directory: str, *, dropout: float | None = None) -> GPTConfig:
    """Returns the GPTConfig of the config.json in `directory`; see `parse_config`."""
    path = locate(directory, "config.json")
    if path is None:
        raise DataError(f"{directory}: no config.json, so this is no model of transformers")
    return parse_config(read_json(path), path, dropout=dropout)


def parse_config(values: Any, path: str, *, dropout: float | None = None) -> GPTConfig:
    """Returns the GPTConfig of a GPT2Config's JSON.

    Raises:
        DataError: a field has a value that gptjax does not compute exactly, or of the wrong type.
    """
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected an object with fields")
    for name, allowed in REQUIRED.items():
        value = values.get(name, allowed[0])
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise DataError(f"{path}: {name}={show(value)}: gptjax computes GPT-2 with {_one_of(allowed)} only")
    sizes = _parse_sizes(values, path)
    inner = values.get("n_inner")
    if inner not in (None, width := 4 * sizes["n_embd"]):
        raise DataError(f"{path}: n_inner={show(inner)}: gptjax computes GPT-2 with 4 n_embd = {width} only")
    tied = values.get("tie_word_embeddings", True)
    if type(tied) is not bool:
        raise DataError(f"{path}: tie_word_embeddings={show(tied)}: expected true or false")
    block_size = sizes.pop("n_positions")
    rate = _common_dropout(values, path) if dropout is None else dropout
    return GPTConfig(block_size=block_size, dropout=rate, bias=True, tie_embeddings=tied, **sizes)


def _parse_sizes(values: Mapping[str, Any], path: str) -> dict[str, int]:
    """Returns the sizes by GPT-2's names, whichever of its two names config.json has for each."""
    sizes = {}
    for name, default in SIZES.items():
        common = COMMON_NAMES.get(name, name)
        sizes[name] = values.get(name, values.get(common, default))
        check_sizes(path, {name: sizes[name]})
        if (other := values.get(common, sizes[name])) != sizes[name]:
            raise DataError(f"{path}: {name}={sizes[name]}, but {common}={show(other)}: both are names of one size")
    return sizes


def _one_of(allowed: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(value) for value in allowed)


def _common_dropout(values: Mapping[str, Any], path: str) -> float:
    rates = {name: values.get(name, 0.1) for name in DROPOUTS}
    if not all(type(rate) in (int, float) and 0 <= rate < 1 for rate in rates.values()):
        raise DataError(f"{path}: {show(rates)}: expected numbers from 0 to below 1")
    if len(set(rates.values())) > 1:
        shown = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        raise DataError(f"{path}: {shown}: gptjax has one rate of dropout for all three; choose it with --dropout=RATE")
    return float(rates[DROPOUTS[0]])


def find_tensors(directory: str, config: GPTConfig, *, tied: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors in a directory's weight files by GPT-2's names, and notes on what was left out."""
    tensors: dict[str, Tensor] = {}
    for path, names, opened in _weight_files(directory):
        for name, tensor in opened.items():
            if names is not None and name not in names:
                raise DataError(f"{path}: has {name}, which the index does not place there")
            short = name.removeprefix(PREFIX)
            if IGNORED.fullmatch(short):
                continue
            if short in tensors:
                raise DataError(f"{path}: {short} is there twice, as {tensors[short].label} and as {tensor.label}")
            tensors[short] = tensor
        for name in sorted((names or set()) - set(opened)):
            raise DataError(f"{path}: {name} is missing, which the index places there")
    return _without_tied_head(directory, tensors) if tied else (tensors, [])


def _without_tied_head(directory: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns `tensors` without an lm_head that repeats the token embedding."""
    head, table = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if head is None or table is None:
        return tensors, []
    if head.shape != table.shape or head.dtype != table.dtype or not _same_bytes(head.read(), table.read()):
        raise DataError(
            f"{directory}: {head.label} is not {table.label}, but config.json has tie_word_embeddings=true; "
            "set it to false to keep both, or remove the one that is wrong"
        )
    rest = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return rest, ["lm_head.weight repeats wte.weight, as the tied model needs: kept once"]


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    unsigned = f"uint{8 * a.dtype.itemsize}"
    return bool(np.array_equal(a.view(unsigned), b.view(unsigned)))


def has_weights(directory: str) -> bool:
    """Returns whether `read` finds weights in `directory`."""
    names = (SAFETENSORS, PICKLED)
    return any(locate(directory, file) for name in names for file in (name, f"{name}.index.json"))


def _weight_files(directory: str) -> Iterator[tuple[str, set[str] | None, Mapping[str, Tensor]]]:
    """Yields (path, names that an index places there or None, tensors) of each weight file."""
    readers: dict[str, Callable[[str], Mapping[str, Tensor]]] = {SAFETENSORS: open_safetensors, PICKLED: _open_pickled}
    for name, reader in readers.items():
        whole, index = locate(directory, name), locate(directory, f"{name}.index.json")
        if whole:
            yield whole, None, reader(whole)
            return
        if index:
            for shard, names in _parse_index(index).items():
                path = locate(directory, shard)
                if path is None:
                    raise DataError(f"{index}: the file {shard} is missing in {directory}")
                yield path, names, reader(path)
            return
    raise DataError(f"{directory}: no {SAFETENSORS} or {PICKLED}, whole or with an index")


def _parse_index(path: str) -> dict[str, set[str]]:
    """Returns the names of tensors by the file that an index places them in."""
    values = read_json(path)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise DataError(f"{path}: expected a weight_map from tensors to files")
    files: dict[str, set[str]] = {}
    for name, shard in places.items():
        files.setdefault(shard, set()).add(check_name(path, name))
    return files


def open_safetensors(path: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, each read when it is asked for.

    Raises:
        DataError: the file is damaged.
    """
    with _opened(path) as file:
        slices = {check_name(path, name): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        _refuse_twice(path)
        return {
            name: Tensor(tuple(s.get_shape()), _dtype(path, name, s.get_dtype()), _reader(path, name), name)
            for name, s in slices.items()
        }


def _refuse_twice(path: str) -> None:
    """Raises DataError if a name stands twice in the header: the library would take the last without a word."""

    def refuse(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            ((twice, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
            raise DataError(f"{path}: not a usable safetensors file: {show(twice)} is there twice in its header")
        return fields

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        json.loads(file.read(size), object_pairs_hook=refuse)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with open(path, "rb") as start:
            size = int.from_bytes(start.read(8), "little")
        if LARGEST_JSON < size <= os.path.getsize(path):
            raise DataError(f"{path}: not a usable safetensors file: its header takes {size} bytes")
        # Not mapped into memory: pages once read would count as ours until the end.
        with safetensors.safe_open(path, framework="np", backend="pread") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a usable safetensors file: {plain(error)}") from error


def _reader(path: str, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with _opened(path) as file:
            return file.get_tensor(name)

    return read


def _dtype(path: str, name: str, stored: str) -> np.dtype:
    if stored not in STORED_TYPES:
        raise DataError(f"{path}: {name} has type {stored}; expected one of {', '.join(STORED_TYPES)}")
    return DTYPES[STORED_TYPES[stored]]


def _open_pickled(path: str) -> dict[str, Tensor]:
    return torch_file.tensors(torch_file.load(path), path)


def write(directory: str, weights: Weights, tensors: Iterator[tuple[str, np.ndarray]], *, dtype: str) -> None:
    """Writes the model into the empty `directory` as transformers does, with what is needed to use it there."""
    config = weights.config
    write_json(f"{directory}/config.json", make_config(weights, dtype))
    eot = _eot(weights)
    write_json(f"{directory}/generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
    if weights.tokenizer is not None:
        _write_tokenizer(weights.tokenizer, directory, config.block_size)
    _write_safetensors(f"{directory}/{SAFETENSORS}", weights, tensors, dtype)
    with open(f"{directory}/README.md", "w", encoding="utf-8") as file:
        file.write(model_card(weights, dtype))


def _write_tokenizer(tokenizer: Tokenizer, directory: str, block_size: int) -> None:
    try:
        write_tokenizer(tokenizer, directory, block_size=block_size)
    except DataError as error:  # the weights are worth having without it
        log.warning("exported without its tokenizer: %s", error)


def _write_safetensors(path: str, weights: Weights, tensors: Iterator[tuple[str, np.ndarray]], dtype: str) -> None:
    """Writes a tensor at a time; the library's own writer wants all of them in memory.

    Source of the format: the README of safetensors, "Format".
    """
    kind, stored = DTYPES[dtype], next(code for code, name in STORED_TYPES.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in shapes(weights.config).items():
        start, end = end, end + math.prod(sizes) * kind.itemsize
        full = name if name == "lm_head.weight" else PREFIX + name
        header[full] = {"dtype": stored, "shape": sizes, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            np.ascontiguousarray(tensor, kind).tofile(file)


def make_config(weights: Weights, dtype: str) -> dict[str, Any]:
    """Returns the GPT2Config of the model, as config.json has it."""
    config, eot = weights.config, _eot(weights)
    fixed = {name: allowed[0] for name, allowed in REQUIRED.items() if allowed[0] not in (None, {})}
    sizes = {name: getattr(config, name) for name in SIZES if name != "n_positions"}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **fixed,
        **sizes,
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
    """Returns end-of-text's id; without a tokenizer GPT-2's own where the vocabulary has it."""
    if weights.tokenizer is not None:
        return weights.tokenizer.eot_id
    return 50256 if weights.config.vocab_size > 50256 else None
