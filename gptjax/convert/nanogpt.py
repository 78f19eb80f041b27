"""nanoGPT's ckpt.pt: a pickled state_dict with torch's Linear layout, and what its train.py needs to go on."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gptjax.config import GPTConfig
from gptjax.convert import torch_file
from gptjax.convert.files import plain
from gptjax.convert.names import ROWS
from gptjax.convert.weights import DTYPES, Tensor, Weights, check_sizes, make_history, make_weights, show
from gptjax.errors import DataError

COMPILED_PREFIX, PREFIX = "_orig_mod.", "transformer."
BUFFER = ".attn.bias"  # the causal mask of nanoGPT without flash attention: it has four dims, the bias is c_attn.bias
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
NO_LOSS = 1e9  # nanoGPT's best_val_loss before its first validation
ADAMW = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}  # nanoGPT's defaults


def read(path: str, *, origin: str, dropout: float | None = None) -> Weights:
    """Returns the model of a ckpt.pt.

    dropout: of the result; None takes the checkpoint's.

    Raises:
        DataError: the file is damaged, or not such a checkpoint.
        UnavailableError: torch is missing or too old to read it safely.
    """
    saved = torch_file.load(path)
    if not isinstance(saved, Mapping) or not {"model", "model_args"} <= set(saved):
        raise DataError(f"{path}: not a checkpoint of nanoGPT: expected a dict with model and model_args")
    config = _parse_args(saved["model_args"], path, dropout)
    found = torch_file.tensors(saved["model"], path)
    tensors = _rename(found, path)
    head, table = tensors.pop("lm_head.weight", None), tensors.get("wte.weight")
    if head is not None and table is not None and not np.array_equal(head.read(), table.read(), equal_nan=True):
        raise DataError(f"{path}: {head.label} is not {table.label}, though nanoGPT ties them")
    return make_weights(origin, config, tensors, history=_history(saved))


def _history(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns step and best loss, which may be a tensor; without the loss if there was no validation yet."""
    loss: Any = saved.get("best_val_loss")
    loss = loss.item() if hasattr(loss, "item") and getattr(loss, "ndim", 1) == 0 else loss
    history = make_history({"step": saved.get("iter_num"), "val_loss": loss})
    return {name: value for name, value in history.items() if (name, value) != ("val_loss", NO_LOSS)}


def _parse_args(values: Any, path: str, dropout: float | None) -> GPTConfig:
    if not isinstance(values, Mapping):
        raise DataError(f"{path}: model_args is a {type(values).__name__}, expected a dict")
    sizes: dict[str, Any] = {name: values.get(name) for name in SIZES}
    check_sizes(f"{path}: model_args", sizes)
    bias, rate = values.get("bias", True), values.get("dropout", 0.0) if dropout is None else dropout
    if type(bias) is not bool or type(rate) not in (int, float) or not 0 <= rate < 1:
        raise DataError(f"{path}: model_args: bias={show(bias)}, dropout={show(rate)}")
    return GPTConfig(**sizes, bias=bias, dropout=float(rate), tie_embeddings=True)


def _rename(found: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Returns the tensors by GPT-2's names, matrices as [in, out], without the causal masks."""
    linear = {row.name.split("{}.")[1] for row in ROWS if row.linear}
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        short = name.removeprefix(COMPILED_PREFIX).removeprefix(PREFIX)
        if short.endswith(BUFFER) and short.startswith("h."):
            continue
        if short in tensors:
            raise DataError(f"{path}: {short} is there twice, as {tensors[short].label} and as {name}")
        is_matrix = short.startswith("h.") and short.split(".", 2)[-1] in linear and len(tensor.shape) == 2
        tensors[short] = torch_file.transposed(tensor) if is_matrix else tensor
    return tensors


def write(path: str, weights: Weights, tensors: Iterator[tuple[str, np.ndarray]], *, dtype: str) -> None:
    """Writes a ckpt.pt that nanoGPT's sample.py and train.py take: its optimizer has not taken a step.

    Raises:
        OSError: it cannot be written.
        UnavailableError: torch is missing or too old.
    """
    torch = torch_file.import_torch(path)
    config = weights.config
    linear = {row.name.split("{}.")[1] for row in ROWS if row.linear}
    state = {}
    for name, tensor in tensors:
        layout = tensor.T if name.split(".", 2)[-1] in linear else tensor
        state[PREFIX + name] = _to_torch(torch, np.array(layout, DTYPES[dtype], order="C"))
    state["lm_head.weight"] = state[f"{PREFIX}wte.weight"]
    args = {name: getattr(config, name) for name in SIZES} | {"bias": config.bias, "dropout": config.dropout}
    history = weights.history
    saved = {
        "model": state,
        "optimizer": _fresh_adamw(torch, config),
        "model_args": args,
        "iter_num": history.get("step", 0),
        "best_val_loss": history.get("val_loss", NO_LOSS),
        "config": {"out_dir": "out", "init_from": "resume", "gptjax": weights.origin, **args},
    }
    try:
        with open(path, "wb") as file:
            torch.save(saved, file)
    except RuntimeError as error:  # of torch's archive, which is cut off; what the file said stands behind it
        raise OSError(plain(error.__context__ or error)) from error


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _fresh_adamw(torch: Any, config: GPTConfig) -> dict[str, Any]:
    """Returns the state_dict of nanoGPT's AdamW before its first step: matrices and tables decay, vectors do not."""
    decayed = 2 + 4 * config.n_layer
    others = (8 * config.n_layer + 2) if config.bias else (2 * config.n_layer + 1)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(decayed + others)]
    groups = [{"params": parameters[:decayed]}, {"params": parameters[decayed:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **ADAMW).state_dict()
