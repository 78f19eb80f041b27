"""Every setting of a run and its validation; the standard library only, so that a mistake exits before JAX loads."""

import dataclasses
import difflib
import math
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from gptjax.errors import ConfigError, plain


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """What fixes the parameter tree or the function that it computes: these never change within a run."""

    block_size: int = 1024
    vocab_size: int = 50257  # the tokenizer's true size; padded inside the model only
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # after the embedding, on attention weights, and before each residual
    bias: bool = True  # in every linear layer and LayerNorm
    tie_embeddings: bool = True  # the output head is the token embedding


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the function is computed: free to change on resume."""

    attention: str = "auto"  # auto | xla | cudnn | splash
    remat: str = "none"  # none | full | dots | dots_no_batch
    unroll: int = -1  # layers per loop iteration; 0 means all of them, no loop; -1 means all on a GPU, else 1
    dtype: str = "auto"  # of matrix products: auto | float32 | bfloat16
    reduce_dtype: str = "auto"  # in which devices sum gradients: auto (as dtype) | float32 | bfloat16
    loss: str = "xla"  # xla | triton: a kernel for NVIDIA GPUs that reads the logits once, not yet run on one
    loss_chunk: int = 0  # tokens per chunk of the loss; 0 means all at once


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # adamw | lion | adafactor | muon
    schedule: str = "cosine"  # cosine | wsd | constant, each after a linear warm-up
    peak_lr: float = 6e-4
    min_lr: float = 6e-5
    warmup_steps: int = 2000
    decay_fraction: float = 0.2  # wsd: the last part of the run, in which lr falls to min_lr
    weight_decay: float = 0.1  # on matrices and embeddings only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95
    grad_clip: float = 1.0  # largest global norm of a gradient; 0 means none


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"  # stdlib | tfds:NAME[/CONFIG] | text:PATH | lines:PATH
    path: str = ""  # a directory of shards; '' means data/<source>-<tokenizer>
    tokenizer: str = "gpt2"  # gpt2 | bytes | a saved tokenizer file
    text_feature: str = "text"  # tfds only
    global_batch_size: int = 512  # sequences per update, over all devices and accumulation steps
    seed: int = 0
    document_mask: bool = False  # attention and positions restart at each document
    eot_position: str = "auto"  # of end-of-text in a document: auto (meta.json, else the first token) | first | last
    allow_changed: bool = False  # accept other data than the checkpoint was trained on


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1, at most once, means all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int = 600_000
    micro_batch_size: int = 0  # sequences per data-parallel shard and accumulation step; 0 means choose
    steps_per_dispatch: int = 1
    log_every: int = 10
    eval_every: int = 1000  # 0 means only after the last step
    eval_batches: int = 20  # global batches; 0 means the whole validation split
    sample_every: int = 0  # 0 means never
    sample_prompt: str = ""
    seed: int = 0  # of initialisation and dropout
    nan_policy: str = "stop"  # of a step that is not finite: stop | skip | rollback, which a spike sets off, too
    nan_limit: int = 10  # skip: so many non-finite steps in a row end the run
    max_rollbacks: int = 3  # rollback: one more ends the run
    barrier_seconds: float = 600.0  # for which processes wait for each other before data, restore and saves
    watchdog_seconds: float = 3600.0  # without a step or a batch of an evaluation that ended, leave; 0 means never
    z_loss: float = 0.0  # weight of the squared log-partition
    profile_step: int = -1  # write a profiler trace of this step; -1 means never


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    save_every: int = 1000
    keep: int = 3  # the newest ones; the best by validation loss is kept beside them
    resume: str = "auto"  # auto | require | never


@dataclasses.dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = True
    wandb_project: str = ""  # '' means no Weights & Biases


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run: batch, learning rate, dropout key and shardings are functions of this and of the step."""

    model: GPTConfig = GPTConfig()
    compute: ComputeConfig = ComputeConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    init_from: str = ""  # weights to start from: a work directory, or as --from of gptjax.convert; '' means fresh

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


CHOICES = {
    "compute.attention": ("auto", "xla", "cudnn", "splash"),
    "compute.remat": ("none", "full", "dots", "dots_no_batch"),
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "compute.loss": ("xla", "triton"),
    "compute.reduce_dtype": ("auto", "float32", "bfloat16"),
    "optim.name": ("adamw", "lion", "adafactor", "muon"),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "data.eot_position": ("auto", "first", "last"),
    "train.nan_policy": ("stop", "skip", "rollback"),
    "checkpoint.resume": ("auto", "require", "never"),
}

# The least value of each number; what is not listed may be anything finite.
AT_LEAST = {
    "model.block_size": 1,
    "model.vocab_size": 1,
    "model.n_layer": 1,
    "model.n_head": 1,
    "model.n_embd": 1,
    "model.dropout": 0,
    "compute.unroll": -1,
    "compute.loss_chunk": 0,
    "optim.peak_lr": 0,
    "optim.min_lr": 0,
    "optim.warmup_steps": 0,
    "optim.decay_fraction": 0,
    "optim.weight_decay": 0,
    "optim.beta1": 0,
    "optim.beta2": 0,
    "optim.eps": 0,
    "optim.muon_beta": 0,
    "optim.grad_clip": 0,
    "data.global_batch_size": 1,
    "data.seed": 0,
    "train.num_steps": 0,
    "train.micro_batch_size": 0,
    "train.steps_per_dispatch": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_batches": 0,
    "train.sample_every": 0,
    "train.seed": 0,
    "train.nan_limit": 1,
    "train.max_rollbacks": 0,
    "train.barrier_seconds": 1,
    "train.watchdog_seconds": 0,
    "train.z_loss": 0,
    "train.profile_step": -1,
    "checkpoint.save_every": 1,
    "checkpoint.keep": 1,
}

BELOW_ONE = ("model.dropout", "optim.beta1", "optim.beta2", "optim.muon_beta")
LARGEST_SEED = 2**31 - 1
PERIODS = ("train.log_every", "train.eval_every", "train.sample_every", "checkpoint.save_every", "train.num_steps")


def default_config() -> Any:
    """Returns every field with its default as a locked ConfigDict: what a config file's get_config() starts from."""
    from ml_collections import ConfigDict  # here, so that this module needs the standard library only

    config = ConfigDict(Config().to_dict())
    config.lock()
    return config


def from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the validated Config of nested `values`.

    Raises:
        ConfigError: one line for every unknown field, wrong type and impossible value.
    """
    problems: list[str] = []
    config = _parse(Config, values, "", problems)
    if not problems:
        problems = find_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def load(path: str, overrides: Mapping[str, str]) -> Config:
    """Returns the Config of a config file's get_config(), with `overrides` {"model.n_layer": "6"} applied.

    Raises:
        ConfigError: the file is missing or fails, or a field or value is wrong.
    """
    values, known = _run_config_file(path), flatten(Config())
    for name, text in overrides.items():
        if name not in known:
            raise ConfigError(unknown_field(name))
        *sections, last = name.split(".")
        target: Any = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--config={path}: {section}={target!r}: expected a section with fields")
        target[last] = text
    return from_dict(values)


def _run_config_file(path: str) -> dict[str, Any]:
    file = pathlib.Path(path)
    if not file.is_file():
        near = ", ".join(sorted(str(p) for p in file.parent.glob("*.py"))) if file.parent.is_dir() else ""
        raise ConfigError(f"--config={path}: no such file" + (f"; there are: {near}" if near else ""))
    scope: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(file.read_text(), str(file), "exec"), scope)  # a config file is code: see SECURITY.md
        values = scope["get_config"]()
    except Exception as error:
        raise ConfigError(f"--config={path}: get_config() failed: {type(error).__name__}: {error}") from error
    return values.to_dict() if hasattr(values, "to_dict") else dict(values)


def flatten(config: Config) -> dict[str, Any]:
    """Returns {"model.n_layer": 12, ...}."""
    flat: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def unknown_field(path: str) -> str:
    """Returns the message for a dotted `path` that no Config has, naming the nearest ones."""
    known = list(flatten(Config()))
    last = path.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(path, known, 3, 0.6) or [k for k in known if k.rsplit(".", 1)[-1] == last]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"{plain(path)}: no such config field{hint}"


def convert(path: str, value: Any, kind: type) -> Any:
    """Returns `value` as a `kind` (bool, int, float or str); text is read as on a command line.

    Raises:
        ConfigError: the value is not one of that kind.
    """
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "1", "false", "0"):
        return value.lower() in ("true", "1")
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number: float = float(value)
            if math.isfinite(number) and isinstance(value, str) and value.lstrip("+-").isdigit():
                number = int(value)  # exact where a float is not
        except (ValueError, OverflowError):
            number = math.nan
        if kind is float and math.isfinite(number):
            return float(number)
        if kind is int and math.isfinite(number) and number == int(number):
            return int(number)
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    raise ConfigError(f"{path}={plain(repr(value))}: expected {names[kind]}")


def _parse(cls: Any, values: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.')}={plain(repr(values))}: expected a section with fields")
        return cls()
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    problems.extend(unknown_field(prefix + " ".join(str(key).split())) for key in values if key not in kinds)
    chosen = {}
    for name, kind in kinds.items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(kind):
            chosen[name] = _parse(kind, values[name], f"{prefix}{name}.", problems)
            continue
        try:
            chosen[name] = convert(prefix + name, values[name], typing.cast(type, kind))
        except ConfigError as error:
            problems.append(str(error))
    return cls(**chosen)


def find_problems(config: Config) -> list[str]:
    """Returns one line for each impossible value or combination, naming the field, its value and the remedy."""
    flat = flatten(config)
    problems = [
        f"{path}={plain(repr(flat[path]))}: expected one of {', '.join(choices)}"
        for path, choices in CHOICES.items()
        if flat[path] not in choices
    ]
    problems += [f"{p}={flat[p]}: must be at least {low}" for p, low in AT_LEAST.items() if flat[p] < low]
    problems += [f"{path}={flat[path]}: must be below 1" for path in BELOW_ONE if flat[path] >= 1]
    problems += [
        f"{p}={flat[p]}: must be at most {LARGEST_SEED}" for p in ("data.seed", "train.seed") if flat[p] > LARGEST_SEED
    ]
    return problems or _find_conflicts(config, flat)


def _find_conflicts(config: Config, flat: dict[str, Any]) -> list[str]:
    model, optim, train = config.model, config.optim, config.train
    problems = []
    if model.n_embd % model.n_head:
        near = ", ".join(map(str, nearest_divisors(model.n_embd, model.n_head)))
        problems.append(f"model.n_head={model.n_head}: must divide model.n_embd={model.n_embd}; nearest valid: {near}")
    if optim.min_lr > optim.peak_lr:
        problems.append(f"optim.min_lr={optim.min_lr}: must not exceed optim.peak_lr={optim.peak_lr}")
    if optim.decay_fraction > 1:
        problems.append(f"optim.decay_fraction={optim.decay_fraction}: must be at most 1")
    sizes = {name: getattr(config.mesh, name) for name in ("data", "fsdp", "tensor")}
    problems += [f"mesh.{n}={s}: must be positive, or -1 for the rest" for n, s in sizes.items() if s < 1 and s != -1]
    if list(sizes.values()).count(-1) > 1:
        problems.append("mesh: only one of mesh.data, mesh.fsdp, mesh.tensor may be -1")
    every = train.steps_per_dispatch
    problems += [
        f"{path}={flat[path]}: must be a multiple of train.steps_per_dispatch={every}; "
        f"nearest valid: {max(every, flat[path] // every * every)}"
        for path in PERIODS
        if flat[path] % every
    ]
    return problems


def nearest_divisors(number: int, wanted: int, count: int = 2) -> list[int]:
    """Returns the `count` divisors of `number` nearest to `wanted`, in rising order.

    >>> nearest_divisors(768, 13)
    [12, 16]
    """
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    return sorted(sorted(divisors, key=lambda d: (abs(d - wanted), d))[:count])
