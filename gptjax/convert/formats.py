"""Every format by its name: which can read a model, which can write one, and what they cannot hold."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import GPTConfig
from gptjax.convert import huggingface, llmc, msgpack, nanogpt, native
from gptjax.convert.names import Row, layers, leaf_shape, rows, shape
from gptjax.convert.weights import Weights, describe, read_leaves, read_tensors, with_biases
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.model import padded_vocab_size
from gptjax.sharding import nest

log = logging.getLogger("gptjax")
READABLE = ("gptjax", "hf", "nanogpt", "llmc", "msgpack")
WRITABLE = ("gptjax", "hf", "nanogpt", "llmc")
PADDED = ("gptjax", "llmc")  # formats with more rows than the vocabulary has
FILES = {
    "nanogpt": "ckpt.pt",
    "llmc": "model.bin",
}  # formats of one file, and a name for it; the others are directories
GPT2_VOCABULARIES = range(50257, 50305)  # nanoGPT pads GPT-2's 50,257 ids up to 50,304 and says no more
FORMS = "hf:DIR, hf:OWNER/NAME[@REVISION], gptjax:WORKDIR[@STEP], nanogpt:ckpt.pt, llmc:model.bin, msgpack:DIR"


class Place(NamedTuple):
    """What --from, --to and --model name."""

    format: str
    path: str

    def __str__(self) -> str:
        return f"{self.format}:{self.path}"


def parse_place(flag: str, text: str, formats: tuple[str, ...]) -> Place:
    """Returns the Place of FORMAT:PATH.

    Raises:
        ConfigError: there is no such format, or no path.
    """
    name, colon, path = text.partition(":")
    if not colon or not path or name not in formats:
        raise ConfigError(f"{flag}={text}: expected one of {', '.join(formats)}, a colon and a path, such as {FORMS}")
    return Place(name, os.path.expanduser(path))


def open_weights(place: Place, *, tokenizer: str = "", dropout: float | None = None) -> Weights:
    """Returns the model at `place`, after comparing it strictly with GPT-2; no tensor is read yet.

    tokenizer: what to use instead of the source's own: a name or a file as in data.tokenizer.
    dropout: of the result; None takes the source's.

    Raises:
        DataError: it is damaged, or not exactly a GPT-2.
        UnavailableError: an extra is missing, or a server.
    """
    weights = _open(place, dropout)
    chosen = load_tokenizer(tokenizer) if tokenizer else weights.tokenizer
    notes = weights.notes
    if chosen is None and place.format in FILES:
        chosen, note = _guess_tokenizer(weights.config.vocab_size)
        notes = (*notes, note)
    if chosen is not None and chosen.vocab_size > weights.config.vocab_size:
        notes = (*notes, f"tokenizer {chosen.name} left out: {chosen.vocab_size} ids, vocab_size is less")
        chosen = None
    return dataclasses.replace(weights, tokenizer=chosen, notes=notes)


def open_model(text: str, *, tokenizer: str = "") -> Weights:
    """Returns what --model names, to be used as it is: dropout off, and with a tokenizer.

    Raises:
        ConfigError: there is no tokenizer with it.
    """
    weights = open_weights(parse_place("--model", text, READABLE), tokenizer=tokenizer, dropout=0.0)
    if weights.tokenizer is None:
        raise ConfigError("\n".join([*weights.notes, f"--model={text}: has no tokenizer: give one with --tokenizer"]))
    return weights


def _open(place: Place, dropout: float | None) -> Weights:
    path, origin = place.path, str(place)
    if place.format == "hf":
        if not os.path.isdir(path):
            from gptjax.convert import hub

            if os.path.lexists(path) or not hub.NAME.fullmatch(path):
                raise DataError(f"{path}: no such directory, and not OWNER/NAME[@REVISION] of the Hub")
            log.info("%s: no directory here, so it is looked for on the Hub", path)
            repo, _, revision = path.partition("@")
            path, commit = hub.download(repo, revision)
            origin = f"hf:{repo}@{commit}"
            if not huggingface.has_weights(path):  # then it is msgpack: others may have put that beside better ones
                return msgpack.read(path, origin=origin, dropout=dropout)
        return huggingface.read(path, origin=origin, dropout=dropout)
    if place.format == "gptjax":
        return native.read(path, dropout=dropout)
    readers: dict[str, Callable[..., Weights]] = {"nanogpt": nanogpt.read, "llmc": llmc.read, "msgpack": msgpack.read}
    return readers[place.format](path, origin=origin, dropout=dropout)


def _guess_tokenizer(vocab_size: int) -> tuple[Tokenizer | None, str]:
    if vocab_size in GPT2_VOCABULARIES:
        return load_tokenizer("gpt2"), f"no tokenizer in the source: GPT-2's is taken, as vocab_size={vocab_size}"
    return None, f"no tokenizer in the source, and vocab_size={vocab_size} is not GPT-2's: give one with --tokenizer"


def adapt(weights: Weights, target: str) -> Weights:
    """Returns the same function in a form that the format `target` can hold.

    Raises:
        ConfigError: there is none.
    """
    if target in FILES and not weights.config.tie_embeddings:
        raise ConfigError(f"--to={target}: that format has no lm_head of its own, and this model is untied; use hf:DIR")
    return with_biases(weights) if target in ("hf", "llmc") else weights


def export_dtype(weights: Weights, target: str, wanted: str) -> str:
    """Returns the dtype to write: the one asked for, else the source's where the format has it."""
    if target == "gptjax" or (target == "llmc" and not wanted and weights.dtype == "float16"):
        return "float32"
    return wanted or weights.dtype


def stored_as(row: Row, config: GPTConfig, target: str) -> tuple[str, tuple[int, ...]]:
    """Returns (name, shape) of the tensors of `row` in the format `target`; {} is the layer."""
    if target == "gptjax":
        return row.path, leaf_shape(row, config)
    sizes = shape(row, config)
    if target in FILES and row.linear:
        sizes = sizes[::-1]
    if target == "llmc":
        return row.name, (padded_vocab_size(config), *sizes[1:]) if row.name == "wte.weight" else sizes
    return row.name if row.path.startswith("lm_head") else huggingface.PREFIX + row.name, sizes


def map_table(weights: Weights, target: str, dtype: str) -> list[str]:
    """Returns a line for each kind of tensor: what it is in the source, and what it becomes in `target`."""
    lines = [("source", "", "", f"-> {target}", "", "")]
    for row in rows(weights.config):
        names = [name for _, name in layers(row, weights.config)]
        first, count = weights.tensors[names[0]], f" x {len(names)}" if row.layered else ""
        name, sizes = stored_as(row, weights.config, target)
        many = count if "{}" in name else ""
        found = f"{first.label}{count}", describe(shape(row, weights.config)), str(first.dtype)
        lines.append((*found, name.format(0) + many, describe(sizes), dtype))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def differences(weights: Weights, target: str, dtype: str) -> list[str]:
    """Returns a line for everything in which the result is not what the source is."""
    config, lines = weights.config, []
    if dtype != weights.dtype:
        lines.append(f"{weights.dtype} becomes {dtype}")
    if target in PADDED and padded_vocab_size(config) != config.vocab_size:
        lines.append(f"{config.vocab_size} rows of the vocabulary are padded with zeros to {padded_vocab_size(config)}")
    if target in FILES:
        lines.append("matrices of layers are stored as [out, in]")
    if target in FILES and weights.tokenizer is not None:
        lines.append(f"the tokenizer is left out: there is no place for it in {target}")
    if target == "llmc" and config.dropout:
        lines.append(f"dropout={config.dropout:g} is left out: there is no place for it in llmc")
    return lines


def write(place: Place, path: str, weights: Weights, tensors: Iterator[tuple[str, np.ndarray]], *, dtype: str) -> None:
    """Writes the model in the format of `place` to `path`, from which it will be moved to where it belongs."""
    if place.format == "gptjax":
        os.mkdir(path)
        native.write(path, place.path, weights, tensors)
        return
    if place.format == "hf":
        os.mkdir(path)
    writers: dict[str, Any] = {"hf": huggingface.write, "nanogpt": nanogpt.write, "llmc": llmc.write}
    writers[place.format](path, weights, tensors, dtype=dtype)


def load_params(weights: Weights, place: Callable[[str, np.ndarray], Any]) -> Any:
    """Returns gptjax's parameter tree of the model, each leaf as place(path, array) gives it; one is read at a time."""
    return nest((path, place(path, leaf)) for path, leaf in read_leaves(weights, read_tensors(weights)))
