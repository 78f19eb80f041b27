"""gptjax's own checkpoints as a format to convert from and to."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from gptjax.checkpoint import Checkpointer, Damaged, StoredParams, save_params
from gptjax.config import Config, DataConfig
from gptjax.convert.files import plain
from gptjax.convert.names import from_leaf, layers, leaf_shape, rows, shape
from gptjax.convert.weights import DTYPES, Tensor, Weights, make_history, make_weights, read_leaves
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.workdir import write_json

MOST_LAYERS = 10_000  # before a loop is as long as a number in a file says
TOKENIZER_FILE = "tokenizer.json"


def read(path: str, *, dropout: float | None = None) -> Weights:
    """Returns the model of WORKDIR, or WORKDIR@STEP, or of one checkpoint's directory; of a run, the newest checkpoint.

    Raises:
        DataError: there is none, or it is damaged.
    """
    workdir, step = _locate(path)
    steps = Checkpointer(workdir).steps()
    if not steps or (step is not None and step not in steps):
        have = ", ".join(map(str, steps)) or "none"
        raise DataError(f"{workdir}: no checkpoint{'' if step is None else f' of step {step}'}; there are: {have}")
    step = steps[-1] if step is None else step
    try:
        stored = StoredParams(workdir, step)
    except (Damaged, ConfigError) as damage:
        raise _damaged(workdir, step, damage) from damage
    config, origin = stored.config.model, f"gptjax:{workdir}@{step}"
    if config.n_layer > MOST_LAYERS:
        raise DataError(f"{origin}: n_layer={config.n_layer}: expected at most {MOST_LAYERS}")
    config = config if dropout is None else dataclasses.replace(config, dropout=dropout)
    imported = stored.record.history.get("imported") if step == 0 else None
    imported = imported if isinstance(imported, dict) else {}
    dtype = imported.get("dtype")
    return make_weights(
        origin,
        config,
        _tensors(workdir, stored),
        dtype=dtype if isinstance(dtype, str) and dtype in DTYPES else "float32",
        tokenizer=read_tokenizer(workdir),
        history=_history(workdir, stored) if step else make_history(imported.get("history")),
    )


def _locate(text: str) -> tuple[str, int | None]:
    """Returns (work directory, step, if one is named) of what `read` takes; a name that is there is no WORKDIR@STEP."""
    path, match = epath.Path(text), re.fullmatch(r"(.+)@(\d+)", text)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return str(path.parent.parent), int(path.name)
    if path.exists():
        return text, None
    if match and epath.Path(match[1]).exists():
        return match[1], int(match[2])
    raise DataError(f"{match[1] if match else text}: no such directory")


def _damaged(workdir: str, step: int, damage: Exception) -> DataError:
    others = [str(other) for other in Checkpointer(workdir).steps() if other != step]
    remedy = f"; take another with @STEP: {', '.join(others)}" if others else ""
    return DataError(f"{workdir}/checkpoints/{step}: damaged: {plain(damage)}{remedy}")


def _tensors(workdir: str, stored: StoredParams) -> dict[str, Tensor]:
    config = stored.config.model
    by_path = {row.path: row for row in rows(config)}

    newest: dict[str, np.ndarray] = {}  # one leaf: tensors are asked for layer after layer

    def leaf(path: str) -> np.ndarray:
        if path not in newest:
            newest.clear()
            try:
                newest[path] = stored.read(path, leaf_shape(by_path[path], config))
            except Damaged as damage:
                raise _damaged(workdir, stored.step, damage) from damage
        return newest[path]

    return {
        name: Tensor(
            shape(row, config),
            DTYPES["float32"],
            lambda row=row, layer=layer: from_leaf(row, leaf(row.path), layer, config),
            name,
        )
        for row in rows(config)
        for layer, name in layers(row, config)
    }


def read_tokenizer(workdir: str) -> Tokenizer | None:
    """Returns the tokenizer that is kept beside the checkpoints."""
    path = epath.Path(workdir) / TOKENIZER_FILE
    return load_tokenizer(str(path)) if path.exists() else None


def _history(workdir: str, stored: StoredParams) -> dict[str, Any]:
    """Returns what a model card can say of the checkpoint of a run; an imported one says what its source did."""
    config = stored.config
    source = config.data.path or config.data.source
    history = {
        "step": stored.step,
        "tokens": stored.step * config.data.global_batch_size * config.model.block_size,
        "data": f"{source} ({stored.record.data.get('fingerprint', 'no fingerprint')})",
        "config": stored.record.config,
    }
    return history | _losses(workdir, stored.step)


def _losses(workdir: str, step: int) -> dict[str, float]:
    """Returns the newest losses up to `step` in metrics.jsonl, which may be damaged or missing: then none."""
    path, found = epath.Path(workdir) / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            found |= make_history({name: row.get(name) for name in ("loss", "val_loss")})
    return found


def write(directory: str, final: str, weights: Weights, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes a work directory with the checkpoint of step 0, config.json and the tokenizer.

    final: where the directory will be in the end.
    """
    name = _tokenizer_name(weights.tokenizer, final)
    config = Config(model=weights.config, data=DataConfig(tokenizer=name), init_from=weights.origin)
    imported = {"from": weights.origin, "dtype": weights.dtype, "history": dict(weights.history)}
    save_params(directory, read_leaves(weights, tensors), config=config, history={"imported": imported})
    write_json(f"{directory}/config.json", config.to_dict())
    if weights.tokenizer is not None:
        weights.tokenizer.save(f"{directory}/{TOKENIZER_FILE}")


def _tokenizer_name(tokenizer: Tokenizer | None, final: str) -> str:
    """Returns what data.tokenizer says for `tokenizer`: a built-in's name, or the file in the work directory."""
    for name in ("gpt2", "bytes"):
        if tokenizer is not None and tokenizer.name == name and tokenizer.sha256 == load_tokenizer(name).sha256:
            return name
    return os.path.join(os.path.abspath(final), TOKENIZER_FILE) if tokenizer is not None else "gpt2"
