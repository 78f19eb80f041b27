"""Every format by its name: which ones can be read, which written, and which parts of a model each cannot hold."""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.config import GPTConfig
from gptjax.convert import huggingface, llmc, msgpack, nanogpt, native, probe
from gptjax.convert.beside import make_side_file
from gptjax.convert.model_ref import READABLE, ModelRef, parse_model_ref
from gptjax.convert.names import PREFIX, Shape, layers
from gptjax.convert.nanogpt_run import settings_left_out
from gptjax.convert.staging import SideFile
from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.convert.weights import (
    Checksum,
    NamedTensors,
    Weights,
    format_shape,
    read_leaves,
    read_tensors,
    with_biases,
)
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.params import Param, leaf_shape, padded_vocab_size, rows, tensor_shape
from gptjax.sharding import nest

log = logging.getLogger("gptjax")
WITH_MOMENTS = ("gptjax", "nanogpt")  # formats that hold AdamW's state
PADDED = ("gptjax", "llmc")  # formats whose embedding table has more rows than the vocabulary
FILES = {  # formats of one file, with a usual name for it; the others are directories
    "nanogpt": "ckpt.pt",
    "llmc": "model.bin",
}
COMPUTED = {  # the activation that a program computes whose files do not store it
    "nanogpt": "gelu",
    "llmc": "gelu_new",
}
GPT2_VOCABULARIES = range(50257, 50305)  # nanoGPT pads GPT-2's 50,257 ids up to 50,304, and does not store the number
# Fields of GPTConfig. Any other field may change the function, and other programs would not know it.
GPT2_FIELDS = {
    "block_size",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
    "dropout",
    "bias",
    "tie_embeddings",
    "activation",
}
GPT2_ACTIVATIONS = ("gelu_new", "gelu")  # which other programs know; _require_gpt2 refuses any other


def open_weights(
    place: ModelRef,
    *,
    tokenizer: str = "",
    dropout: float | None = None,
    activation: str = "",
) -> Weights:
    """Returns the model at `place`, after comparing it strictly with GPT-2; no tensor is read yet.

    tokenizer: replaces the source's own: a name or a file as in data.tokenizer.
    dropout: of the result; None means the source's.
    activation: of a model whose file does not store it; "" means what the format's program computes.

    Raises:
        ConfigError: an activation is given, and the format stores it.
        DataError: the model is damaged, or not exactly a GPT-2.
        UnavailableError: an extra is missing, or a server cannot be reached.
    """
    weights = _with_activation(_open(place, dropout), place, activation)
    vocab_size = weights.config.vocab_size
    notes = list(weights.notes)
    chosen = weights.tokenizer
    if tokenizer:
        chosen = open_tokenizer(tokenizer)
    elif chosen is None and place.format in FILES:
        chosen, note = _guess_tokenizer(vocab_size)
        notes.append(note)
    # A model may have unused ids, but a tokenizer may not produce ids that the model lacks.
    if chosen is not None and chosen.vocab_size > vocab_size:
        notes.append(f"tokenizer {chosen.name} left out: {chosen.vocab_size} ids, vocab_size is less")
        chosen = None
    return dataclasses.replace(weights, tokenizer=chosen, notes=tuple(notes))


def _with_activation(weights: Weights, place: ModelRef, activation: str) -> Weights:
    """Returns `weights` with the activation of a format that does not store it, and a note where programs differ."""
    if place.format not in COMPUTED:
        if activation:
            raise ConfigError(
                f"{place.format} stores it",
                field="--activation",
                value=activation,
                remedy="leave the flag out",
            )
        return weights
    notes = weights.notes
    if place.format == "nanogpt" and not activation:
        note = "activation gelu, the exact one: convert a model from before May 2023 with --activation=gelu_new"
        notes = (*notes, note)
    config = dataclasses.replace(weights.config, activation=activation or COMPUTED[place.format])
    return dataclasses.replace(weights, config=config, notes=notes)


def open_model(text: str, *, tokenizer: str = "", activation: str = "") -> Weights:
    """Returns the model that --model names, for sampling and evaluation: with a tokenizer, and dropout off.

    tokenizer, activation: as in `open_weights`.

    Raises:
        ConfigError: --model is not FORMAT:PATH, the model has no tokenizer, or the format stores the activation.
        DataError: the model is damaged, or not exactly a GPT-2.
        UnavailableError: an extra is missing, or a server cannot be reached.
    """
    place = parse_model_ref("--model", text, READABLE)
    weights = open_weights(place, tokenizer=tokenizer, dropout=0.0, activation=activation)
    if weights.tokenizer is None:
        problem = ConfigError(
            "has no tokenizer",
            field="--model",
            value=text,
            remedy="give one with --tokenizer",
        )
        reasons = [ConfigError(note) for note in weights.notes]
        raise ConfigError.of([problem, *reasons])
    return weights


def _open(place: ModelRef, dropout: float | None) -> Weights:
    path = place.path
    if place.format == "hf":
        if os.path.isdir(path):
            return huggingface.read(path, origin=str(place), dropout=dropout)
        return _open_from_hub(path, dropout)
    if place.format == "gptjax":
        return native.read(path, dropout=dropout)
    readers: dict[str, Callable[..., Weights]] = {
        "nanogpt": nanogpt.read,
        "llmc": llmc.read,
        "msgpack": msgpack.read,
    }
    read = readers[place.format]
    return read(path, origin=str(place), dropout=dropout)


def _open_from_hub(name: str, dropout: float | None) -> Weights:
    """Downloads and opens the model OWNER/NAME[@REVISION]."""
    from gptjax.convert import hub

    # A file that exists is a mistake in the command, and its name shall not reach a server.
    if os.path.lexists(name) or not hub.NAME.fullmatch(name):
        raise DataError("no such directory, and not OWNER/NAME[@REVISION] of the Hub", field=name)
    log.info("%s: no such directory on this machine, searching the Hub", name)
    repo, _, revision = name.partition("@")
    snapshot, commit = hub.download(repo, revision)
    # Other programs may have put flax_model.msgpack next to better files in the same snapshot.
    read = huggingface.read if huggingface.has_weights(snapshot) else msgpack.read
    return read(snapshot, origin=f"hf:{repo}@{commit}", dropout=dropout)


def _guess_tokenizer(vocab_size: int) -> tuple[Tokenizer | None, str]:
    """Returns GPT-2's tokenizer if the size of the vocabulary is GPT-2's, and a note for the user."""
    if vocab_size in GPT2_VOCABULARIES:
        note = f"no tokenizer in the source: using GPT-2's, because of vocab_size={vocab_size}"
        return load_tokenizer("gpt2"), note
    note = f"no tokenizer in the source, and vocab_size={vocab_size} is not GPT-2's: give one with --tokenizer"
    return None, note


def adapt(weights: Weights, target: str) -> Weights:
    """Returns a model that the format `target` can hold, of the same function but perhaps for the activation.

    Raises:
        ConfigError: the format cannot hold any such model.
    """
    if target != "gptjax":
        _require_gpt2(weights.config, target)
    elif weights.origin.startswith("gptjax:") and weights.adamw:
        note = "AdamW's moments are left out: this copies the weights, not the run"
        weights = dataclasses.replace(weights, adamw=None, notes=(*weights.notes, note))
    if target in FILES and not weights.config.tie_embeddings:
        raise ConfigError(
            "that format has no lm_head of its own, and this model is untied",
            field="--to",
            value=target,
            remedy="use hf:DIR",
        )
    return with_biases(weights) if target in ("hf", "llmc") else weights


def _require_gpt2(config: GPTConfig, target: str) -> None:
    """Raises ConfigError, naming it, for a parameter or setting of the model that only gptjax's own format can hold."""
    remedy = f"--to={target}: that format has no place for it; use gptjax:DIR"
    for row in rows(config):
        if not row.name:
            raise ConfigError("GPT-2 has no such parameter", field=row.path, remedy=remedy)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        unknown = field.name not in GPT2_FIELDS and value != field.default
        if unknown or (field.name == "activation" and value not in GPT2_ACTIVATIONS):
            raise ConfigError(
                "GPT-2 has no such setting",
                field=f"model.{field.name}",
                value=value,
                remedy=remedy,
            )


def other_activation(weights: Weights, target: str) -> str:
    """Returns a line if the program of `target` computes another activation than the model's, otherwise "".

    The line gives the largest difference of a logit, for which all parameters are read.

    Raises:
        DataError: a tensor is damaged.
    """
    own = weights.config.activation
    other = COMPUTED.get(target, own)
    if own == other:
        return ""
    log.info("%s computes another activation: comparing the logits of %d tokens", target, probe.PROBE_TOKENS)
    difference = probe.largest_logit_difference(weights, other)
    return (
        f"{target} computes activation {other}, and this model has {own}: "
        f"on {probe.PROBE_TOKENS} probe tokens the logits differ by at most {difference:.1e}"
    )


def export_dtype(weights: Weights, target: str, wanted: str) -> str:
    """Returns the dtype to write: `wanted`, or if that is "" the source's dtype where the format supports it."""
    if target == "gptjax":
        return "float32"
    if wanted:
        return wanted
    if target == "llmc" and weights.dtype == "float16":
        return "float32"
    return weights.dtype


def stored_as(row: Param, config: GPTConfig, target: str) -> tuple[str, Shape]:
    """Returns (name, shape) of the tensors of `row` in the format `target`; {} in the name is the layer."""
    if target == "gptjax":
        return row.path, leaf_shape(row, config)
    shape = tensor_shape(row, config)
    if target in FILES and row.linear:
        shape = shape[::-1]
    if target == "llmc":
        if row.name == "wte.weight":
            shape = (padded_vocab_size(config), config.n_embd)
        return row.name, shape
    if row.path.startswith("lm_head"):
        return row.name, shape
    return PREFIX + row.name, shape


def map_table(weights: Weights, target: str, dtype: str) -> list[str]:
    """Returns a line for each kind of tensor: its name, shape and dtype in the source and in `target`."""
    config = weights.config
    table = [("source", "", "", f"-> {target}", "", "")]
    for row in rows(config):
        names = [name for _, name in layers(row, config)]
        first = weights.tensors[names[0]]
        count = f" x {len(names)}" if row.layered else ""
        stored_name, stored_shape = stored_as(row, config, target)
        stored_count = count if "{}" in stored_name else ""  # gptjax stacks the layers in one array
        cells = (
            first.label + count,
            format_shape(tensor_shape(row, config)),
            str(first.dtype),
            stored_name.format(0) + stored_count,
            format_shape(stored_shape),
            dtype,
        )
        table.append(cells)

    widths = []
    for column in zip(*table, strict=True):
        widths.append(max(map(len, column)))
    lines = []
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines


def differences(weights: Weights, target: str, dtype: str) -> list[str]:
    """Returns a line for every difference between the source and the result."""
    config = weights.config
    padded = padded_vocab_size(config)
    lines = []
    if dtype != weights.dtype:
        lines.append(f"{weights.dtype} becomes {dtype}")
    if target in PADDED and padded != config.vocab_size:
        lines.append(f"{config.vocab_size} rows of the vocabulary are padded with zeros to {padded}")
    if target in FILES:
        lines.append("matrices of layers are stored as [out, in]")
    _, tokenizer_line = make_side_file(weights.tokenizer, target, vocab_size=config.vocab_size)
    if tokenizer_line:
        lines.append(tokenizer_line)
    lines += _moments_lines(weights, target)
    if target == "llmc" and config.dropout:
        lines.append(f"dropout={config.dropout:g} is left out: there is no place for it in llmc")
    return lines


def side_file(weights: Weights, target: str) -> SideFile | None:
    """Returns the file beside the model from which the program of `target` reads the tokenizer; None without one."""
    file, _ = make_side_file(weights.tokenizer, target, vocab_size=weights.config.vocab_size)
    return file


def _moments_lines(weights: Weights, target: str) -> list[str]:
    adamw = weights.adamw
    if target in WITH_MOMENTS and adamw:
        lines = [f"AdamW's moments of step {adamw.step} are kept: a run resumes from there"]
        left_out = list(adamw.left_out)
        if target == "nanogpt":
            left_out += settings_left_out(adamw.config, adamw.step)
        return [*lines, *(f"a setting of the run is left out: {setting}" for setting in left_out)]
    if adamw:
        return [f"AdamW's moments are left out: there is no place for them in {target}"]
    run = weights.history.get("config")
    optim = run.get("optim") if isinstance(run, dict) else None
    name = optim.get("name", "adamw") if isinstance(optim, dict) else "adamw"
    if target == "nanogpt" and name != "adamw":
        return [f"moments are left out: nanoGPT has AdamW only, and the run has optim.name={name}"]
    return []


def same_moments(weights: Weights, result: Weights) -> bool:
    """Returns whether both have AdamW's moments and count with the same bits, or neither has any.

    Raises:
        DataError: a moment is damaged.
    """
    hashes = []
    for each in (weights, result):
        checksum = Checksum()
        adamw = each.adamw
        if adamw:
            checksum.update("count", adamw.count.read())
            for moments in (adamw.first, adamw.second):
                for _ in read_tensors(each, source=moments, checksum=checksum, allow_nonfinite=True):
                    pass
        hashes.append(checksum.hexdigest())
    return hashes[0] == hashes[1]


def write(
    place: ModelRef,
    path: str,
    weights: Weights,
    *,
    tensors: NamedTensors,
    dtype: str,
    allow_nonfinite: bool = False,
) -> None:
    """Writes the model in the format of `place` to `path`, from which the caller moves it to `place.path`.

    tensors: (name, tensor) in the order of `read_tensors`.
    dtype: of the tensors in the result.
    allow_nonfinite: accept moments that are NaN or infinite; `tensors` were checked where they were read.

    Raises:
        OSError: a file cannot be written.
        DataError: a moment is damaged or not finite.
        UnavailableError: an extra is missing.
    """
    if place.format == "gptjax":
        os.mkdir(path)
        native.write(path, place.path, weights, tensors=tensors, allow_nonfinite=allow_nonfinite)
        return
    if place.format == "nanogpt":
        dataset = ""
        if side_file(weights, "nanogpt"):
            dataset = os.path.dirname(os.path.abspath(place.path))
        nanogpt.write(
            path,
            weights,
            tensors,
            dtype=dtype,
            dataset=dataset,
            allow_nonfinite=allow_nonfinite,
        )
        return
    if place.format == "hf":
        os.mkdir(path)
    writers: dict[str, Callable[..., None]] = {
        "hf": huggingface.write,
        "llmc": llmc.write,
    }
    write_format = writers[place.format]
    write_format(path, weights, tensors, dtype=dtype)


def load_params(weights: Weights, place: Callable[[str, np.ndarray], Any]) -> Any:
    """Returns gptjax's parameter tree of the model, holding one leaf at a time in host memory.

    place: called with the path and the float32 array, of `params.leaf_shape`, of each parameter; its result becomes
        the leaf.

    Raises:
        DataError: a tensor is damaged, or has values that are NaN or infinite.
    """
    leaves = read_leaves(weights, read_tensors(weights))
    return nest((path, place(path, leaf)) for path, leaf in leaves)
