"""nanoGPT's ckpt.pt: a pickled state_dict in nn.Linear's layout, with the fields that its train.py needs to resume."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.config import GPTConfig
from gptjax.convert import nanogpt_run, torch_file
from gptjax.convert.names import PREFIX, left_out, rename
from gptjax.convert.weights import (
    DTYPES,
    NamedTensors,
    Tensor,
    Weights,
    check_sizes,
    make_history,
    make_weights,
    short_repr,
)
from gptjax.errors import DataError, one_line

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
NO_LOSS = 1e9  # nanoGPT's best_val_loss before its first validation


def read(
    path: str,
    *,
    origin: str,
    dropout: float | None = None,
) -> Weights:
    """Returns the model of a ckpt.pt.

    dropout: of the result; None means the checkpoint's.

    Raises:
        DataError: the file is damaged, or not such a checkpoint.
        UnavailableError: torch is missing or too old to read it safely.
    """
    saved = torch_file.load(path)
    if not isinstance(saved, Mapping) or not {"model", "model_args"} <= set(saved):
        raise DataError("not a checkpoint of nanoGPT: expected a dict with model and model_args", field=path)
    config = _parse_args(saved["model_args"], path, dropout)
    found = torch_file.tensors(saved["model"], path)
    tensors, heads = _rename(found, path)
    head = tensors.pop("lm_head.weight", None)
    table = tensors.get("wte.weight")
    if head is not None and table is not None:
        _require_equal(head, table, path)
    notes = left_out(heads)
    adamw = None
    try:
        adamw = nanogpt_run.read_adamw(saved, tensors, model=config, path=path)
    except nanogpt_run.OtherOptimizerError as reason:
        step = saved.get("iter_num")
        is_at_start = step is None or (type(step) is int and step == 0)
        if saved.get("optimizer") is not None and not is_at_start:
            notes = (*notes, f"the optimizer's moments are left out: {reason}")
    return make_weights(
        origin,
        config,
        tensors,
        history=_history(saved),
        notes=notes,
        adamw=adamw,
    )


def _require_equal(head: Tensor, table: Tensor, path: str) -> None:
    # NaN equals NaN here: non-finite weights have an error of their own.
    if not np.array_equal(head.read(), table.read(), equal_nan=True):
        raise DataError(f"{head.label} is not {table.label}, though nanoGPT ties them", field=path)


def _history(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the step, and the best validation loss unless no validation has run."""
    loss: Any = saved.get("best_val_loss")
    is_scalar = getattr(loss, "ndim", None) == 0
    if is_scalar and hasattr(loss, "item"):  # nanoGPT saves a tensor
        loss = loss.item()
    history = make_history({"step": saved.get("iter_num"), "val_loss": loss})
    if history.get("val_loss") == NO_LOSS:
        del history["val_loss"]
    return history


def _parse_args(values: Any, path: str, dropout: float | None) -> GPTConfig:
    if not isinstance(values, Mapping):
        raise DataError(f"model_args is a {type(values).__name__}, expected a dict", field=path)
    sizes: dict[str, Any] = {name: values.get(name) for name in SIZES}
    check_sizes(f"{path}: model_args", sizes)
    bias = values.get("bias", True)
    rate = values.get("dropout", 0.0) if dropout is None else dropout
    is_rate = type(rate) in (int, float) and 0 <= rate < 1
    if type(bias) is not bool or not is_rate:
        raise DataError(f"model_args: bias={short_repr(bias)}, dropout={short_repr(rate)}", field=path)
    return GPTConfig(
        **sizes,
        bias=bias,
        dropout=float(rate),
        tie_embeddings=True,
        activation="gelu",  # since May 2023; no file tells the form of before
    )


def _rename(found: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], list[str]]:
    """Returns (the tensors by GPT-2's names, matrices as [in, out]; the names of heads that are left out)."""
    renamed = rename(found)
    if renamed.twice:
        name, first, second = renamed.twice
        raise DataError(f"{name} occurs twice, as {first} and as {second}", field=path)
    tensors: dict[str, Tensor] = {}
    for short, stored in renamed.names.items():
        tensor = found[stored]
        if nanogpt_run.is_linear(short) and len(tensor.shape) == 2:
            tensors[short] = torch_file.transposed(tensor)
        else:
            tensors[short] = tensor
    return tensors, renamed.heads


def write(
    path: str,
    weights: Weights,
    tensors: NamedTensors,
    *,
    dtype: str,
    dataset: str = "",
    allow_nonfinite: bool = False,
) -> None:
    """Writes a ckpt.pt for nanoGPT's sample.py and train.py, which resumes with the moments of `weights.adamw`.

    Without moments the optimizer state is that of step 0.

    tensors: (name, tensor) in Hugging Face's layout.
    dtype: of the tensors in the file; moments are float32.
    dataset: the absolute directory of meta.pkl; "" without one. sample.py of nanoGPT joins it to "data", which an
        absolute path replaces.
    allow_nonfinite: accept moments that are NaN or infinite.

    Raises:
        OSError: the file cannot be written.
        DataError: a moment is damaged or not finite.
        UnavailableError: torch is missing or too old.
    """
    torch = torch_file.import_torch(path)
    config = weights.config
    state = {}
    for name, tensor in tensors:
        layout = tensor.T if nanogpt_run.is_linear(name) else tensor
        array = np.array(layout, DTYPES[dtype], order="C")  # a copy, because torch would share its memory
        state[PREFIX + name] = _to_torch(torch, array)
    state = {PREFIX + name: state[PREFIX + name] for name in nanogpt_run.parameter_order(config)}
    state["lm_head.weight"] = state[f"{PREFIX}wte.weight"]

    args: dict[str, Any] = {name: getattr(config, name) for name in SIZES}
    args["bias"] = config.bias
    args["dropout"] = config.dropout
    history = weights.history
    settings = nanogpt_run.write_config(weights.adamw.config) if weights.adamw else {}
    saved: dict[str, Any] = {
        "model": state,
        "optimizer": nanogpt_run.write_optimizer(torch, weights, allow_nonfinite=allow_nonfinite),
        "model_args": args,
        "iter_num": history.get("step", 0),
        "best_val_loss": history.get("val_loss", NO_LOSS),
        "config": {
            "out_dir": "out",
            "init_from": "resume",
            "gptjax": weights.origin,
            **args,
            **settings,
        },
    }
    if dataset:
        saved["config"]["dataset"] = dataset
    try:
        with open(path, "wb") as file:
            torch.save(saved, file)
    except RuntimeError as error:  # torch's archive reports that it is truncated; its context is the file's own error
        raise OSError(one_line(error.__context__ or error)) from error


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    """Returns a tensor that shares the memory of `array`, of the same shape and dtype."""
    if array.dtype == DTYPES["bfloat16"]:  # which torch does not take from NumPy
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
