"""nanoGPT's AdamW and its settings, read from a ckpt.pt and written to one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.config import Config, GPTConfig, OptimConfig, from_dict
from gptjax.convert import torch_file
from gptjax.convert.names import layers
from gptjax.convert.weights import DTYPES, AdamW, Tensor, Weights, read_tensors, short_repr
from gptjax.errors import ConfigError
from gptjax.params import PARAMS, rows

ADAMW = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}  # nanoGPT's defaults, for a model without a run
LARGEST_COUNT = 2**31 - 1


class OtherOptimizerError(Exception):
    """A file has no moments of nanoGPT's AdamW; the message is the reason. It is handled, so it is no UserError."""


def linear_names() -> set[str]:
    """Returns the names within a layer, such as attn.c_attn.weight, of the matrices that nn.Linear has as [out, in]."""
    return {row.tensor_name(0).removeprefix("h.0.") for row in PARAMS if row.linear}


def name_in_layer(name: str) -> str:
    """Returns attn.c_attn.weight for h.3.attn.c_attn.weight."""
    return name.split(".", 2)[-1]


def is_linear(name: str) -> bool:
    """Returns whether the tensor `name` is [out, in] in nn.Linear and [in, out] in Hugging Face's layout."""
    return name.startswith("h.") and name_in_layer(name) in linear_names()


def parameter_order(model: GPTConfig) -> list[str]:
    """Returns GPT-2's names of a tied model's tensors in the order of nanoGPT's parameters: layer after layer."""
    outside = [row.name for row in rows(model) if not row.layered]
    embeddings = [name for name in outside if not name.startswith("ln_f.")]
    names = list(embeddings)
    for layer in range(model.n_layer):
        names += [row.tensor_name(layer) for row in rows(model) if row.layered]
    return names + [name for name in outside if name.startswith("ln_f.")]


def optimizer_order(model: GPTConfig) -> list[str]:
    """Returns the same names as torch numbers them in nanoGPT's optimizer: first those with weight decay."""
    decays = {name: row.decays for row in rows(model) for _, name in layers(row, model)}
    names = parameter_order(model)
    return [name for name in names if decays[name]] + [name for name in names if not decays[name]]


def read_adamw(
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    model: GPTConfig,
    path: str,
) -> AdamW:
    """Returns the AdamW of a ckpt.pt.

    tensors: the model's, by GPT-2's names, in Hugging Face's layout and in the order of the file.

    Raises:
        OtherOptimizerError: there are no moments, or they are not those of nanoGPT's AdamW.
    """
    step = saved.get("iter_num")
    optimizer = saved.get("optimizer")
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("state"), Mapping):
        raise OtherOptimizerError("the file has no moments")
    state = optimizer["state"]
    if not state:
        raise OtherOptimizerError("the file has no moments")
    if type(step) is not int or not 0 <= step <= LARGEST_COUNT:
        raise OtherOptimizerError("iter_num is not a number of steps")
    group = _first_group(optimizer)
    # The moments have numbers only. In a model with another order of parameters they would belong to others.
    if list(tensors) != parameter_order(model):
        raise OtherOptimizerError("the model's parameters are not in nanoGPT's order")
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    counts = set()
    for number, name in enumerate(optimizer_order(model)):
        moments = state.get(number)
        if not isinstance(moments, Mapping):
            raise OtherOptimizerError(f"no moments of {name}")
        first[name] = _moment(moments, "exp_avg", name, tensors[name], path)
        second[name] = _moment(moments, "exp_avg_sq", name, tensors[name], path)
        counts.add(_count(moments.get("step")))
    if len(state) != len(tensors) or len(counts) != 1:
        raise OtherOptimizerError("its parameters have different numbers of updates, or are not the model's")
    config, left_out = _run_config(saved.get("config"), group, model)
    return AdamW(
        config=config,
        step=step,
        count=_scalar(counts.pop()),
        first=first,
        second=second,
        left_out=tuple(left_out),
    )


def _first_group(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise OtherOptimizerError("it has no groups of parameters")
    # Compared by identity, because a tensor may have no truth value.
    if any(group.get(flag, False) is not False for group in groups for flag in ("amsgrad", "maximize")):
        raise OtherOptimizerError("it is a variant of AdamW")
    betas = groups[0].get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise OtherOptimizerError("it has no two betas")
    return groups[0]


def _moment(
    moments: Mapping[str, Any],
    kind: str,
    name: str,
    parameter: Tensor,
    path: str,
) -> Tensor:
    value = moments.get(kind)
    if not hasattr(value, "shape"):
        raise OtherOptimizerError(f"no {kind} of {name}")
    [tensor] = torch_file.tensors({f"{kind} of {name}": value}, path).values()
    if is_linear(name) and len(tensor.shape) == 2:
        tensor = torch_file.transposed(tensor)
    if tensor.shape != parameter.shape or tensor.dtype not in DTYPES.values():
        raise OtherOptimizerError(f"{kind} of {name} has another shape or type than the parameter")
    return tensor


def _count(value: Any) -> int:
    """Returns the number of updates, which torch stores as a float tensor without dims."""
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if type(number) not in (int, float) or number != number // 1 or not 0 <= number <= LARGEST_COUNT:
        raise OtherOptimizerError("its number of updates is no whole number")
    return int(number)


def _scalar(value: int) -> Tensor:
    return Tensor((), np.dtype(np.int32), read=lambda: np.asarray(value, np.int32), label="count")


def _run_config(values: Any, group: Mapping[str, Any], model: GPTConfig) -> tuple[Config, list[str]]:
    """Returns gptjax's config for nanoGPT's settings, and those as NAME=VALUE that it cannot hold.

    A setting that is missing or cannot be held has gptjax's default; a least rate has 0.
    """
    settings = values if isinstance(values, Mapping) else {}
    decays = settings.get("decay_lr", True) is not False
    beta1, beta2 = group["betas"]
    peak = settings.get("learning_rate", group.get("lr"))
    # (nanoGPT's name, section, field, value)
    wanted = [
        ("learning_rate", "optim", "peak_lr", peak),
        ("weight_decay", "optim", "weight_decay", group.get("weight_decay")),
        ("beta1", "optim", "beta1", beta1),
        ("beta2", "optim", "beta2", beta2),
        ("eps", "optim", "eps", group.get("eps")),
        ("grad_clip", "optim", "grad_clip", settings.get("grad_clip")),
        ("max_iters", "train", "num_steps", settings.get("max_iters")),
        ("min_lr", "optim", "min_lr", settings.get("min_lr", peak)),
    ]
    optim = OptimConfig(schedule="constant", warmup_steps=0, min_lr=0.0)
    if decays:
        optim = OptimConfig(schedule="cosine", min_lr=0.0)
        wanted.append(("warmup_iters", "optim", "warmup_steps", settings.get("warmup_iters")))
    sequences = settings.get("batch_size")
    micro_batches = settings.get("gradient_accumulation_steps", 1)  # before nanoGPT divides them among its processes
    batch: Any = sequences
    if type(sequences) is int and type(micro_batches) is int:
        batch = sequences * micro_batches
    wanted.append(("batch_size", "data", "global_batch_size", batch))
    config = Config(model=model, optim=optim)
    left_out = []
    for name, section, field, value in wanted:
        changed = None if value is None else _with(config, section, field, value)
        config = changed or config
        is_used = decays or name != "min_lr"
        if value is not None and changed is None and is_used:
            left_out.append(f"{name}={short_repr(value)}")
    end = settings.get("lr_decay_iters", config.train.num_steps)
    if decays and end != config.train.num_steps:
        left_out.append(f"lr_decay_iters={short_repr(end)}, because the rate falls until max_iters")
    return config, left_out


def _with(
    config: Config,
    section: str,
    field: str,
    value: Any,
) -> Config | None:
    """Returns `config` with section.field set to `value`; None if that cannot be."""
    values = config.to_dict()
    values[section][field] = value
    try:
        return None if isinstance(value, str) else from_dict(values)
    except ConfigError:
        return None


def settings_left_out(config: Config, step: int) -> list[str]:
    """Returns the settings of a run of gptjax at `step`, as NAME=VALUE, that `write_config` cannot express."""
    optim = config.optim
    if optim.schedule == "wsd":
        return ["optim.schedule=wsd, for which decay_lr=True stands"]
    if optim.schedule == "constant" and optim.warmup_steps > step:
        return [f"optim.warmup_steps={optim.warmup_steps}, because decay_lr=False has no warm-up"]
    return []


def write_config(config: Config) -> dict[str, Any]:
    """Returns nanoGPT's settings of a run of gptjax."""
    optim = config.optim
    return {
        "learning_rate": optim.peak_lr,
        "min_lr": optim.min_lr,
        "warmup_iters": optim.warmup_steps,
        "decay_lr": optim.schedule != "constant",
        "lr_decay_iters": config.train.num_steps,
        "max_iters": config.train.num_steps,
        "weight_decay": optim.weight_decay,
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "grad_clip": optim.grad_clip,
        "batch_size": config.data.global_batch_size,
        "gradient_accumulation_steps": 1,
    }


def write_optimizer(torch: Any, weights: Weights, *, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Returns the state_dict of nanoGPT's AdamW with the moments of `weights`, or from before its first step.

    Raises:
        DataError: a moment is damaged, or is not finite where `allow_nonfinite` is off.
    """
    names = optimizer_order(weights.config)
    decayed = [name for name in names if len(weights.tensors[name].shape) > 1]
    # The state_dict numbers the parameters, so only their number matters.
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in names]
    adamw = weights.adamw
    settings: dict[str, Any] = ADAMW
    if adamw is not None:
        optim = adamw.config.optim
        settings = {
            "lr": optim.peak_lr,
            "betas": (optim.beta1, optim.beta2),
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        }
    groups = [
        {"params": parameters[: len(decayed)]},
        {"params": parameters[len(decayed) :], "weight_decay": 0.0},
    ]
    state_dict = torch.optim.AdamW(groups, **settings).state_dict()
    if adamw is None:
        return state_dict
    count = float(adamw.count.read())
    state: dict[int, dict[str, Any]] = {}
    for number in range(len(names)):
        state[number] = {"step": torch.tensor(count)}
    numbers = {name: number for number, name in enumerate(names)}
    for kind, moments in (("exp_avg", adamw.first), ("exp_avg_sq", adamw.second)):
        for name, tensor in read_tensors(weights, source=moments, allow_nonfinite=allow_nonfinite):
            layout = tensor.T if is_linear(name) else tensor
            array = np.array(layout, np.float32, order="C")  # a copy, because torch would share its memory
            state[numbers[name]][kind] = torch.from_numpy(array)
    return state_dict | {"state": state}
