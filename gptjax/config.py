"""Every setting of a run and its validation; imports only the standard library, so a mistake exits before JAX loads."""

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from gptjax.config_files import read_settings
from gptjax.config_values import Bounds, Value, convert, nearest_divisors, nearest_fields, wrong_value
from gptjax.errors import ConfigError, one_line
from gptjax.former_names import current_name, make_config_dict, rename_fields
from gptjax.mix import parse_mix

LARGEST_SEED = 2**31 - 1


# Types of numeric fields, with the ranges that find_problems checks.
Positive = Annotated[int, Bounds(1)]
Count = Annotated[int, Bounds(0)]
AtLeastMinusOne = Annotated[int, Bounds(-1)]
Seed = Annotated[int, Bounds(0, at_most=LARGEST_SEED)]
NonNegative = Annotated[float, Bounds(0)]
AtLeastOne = Annotated[float, Bounds(1)]
Fraction = Annotated[float, Bounds(0, at_most=1)]
Rate = Annotated[float, Bounds(0, below=1)]
Share = Annotated[float, Bounds(1e-9, below=1)]
# Of the MLP, by transformers' names: the tanh form of GELU, which is GPT-2's, or the exact one, which is nanoGPT's.
Activation = Literal["gelu_new", "gelu"]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Determines the parameter tree and the function that it computes: no field may change within a run."""

    block_size: Positive = 1024  # tokens of a sequence
    vocab_size: Positive = 50257  # the tokenizer's true size; padded inside the model only
    n_layer: Positive = 12  # blocks
    n_head: Positive = 12  # attention heads of a block; divides n_embd
    n_embd: Positive = 768  # model width; the MLP is four times as wide
    dropout: Rate = 0.0  # rate, after the embedding, on attention weights, and on each residual branch
    bias: bool = True  # use biases in linear layers and LayerNorm
    tie_embeddings: bool = True  # use the token embedding as output head
    activation: Activation = "gelu_new"  # of the MLP: GELU's tanh form, which is GPT-2's, or the exact one of nanoGPT


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the function is computed: every field may change on resume."""

    # The attention kernel. auto: splash on a TPU and cudnn on a GPU where they can run, otherwise xla.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    # What a block recomputes in the backward pass. none: nothing; full: all; dots: all but its matmuls; dots_no_batch:
    # all but the matmuls with weights.
    remat: Literal["none", "full", "dots", "dots_no_batch"] = "none"
    # Layers per iteration of the loop over layers. 0: no loop. -1: no loop on GPUs, and for up to 8 layers on one CPU
    # device; otherwise 1.
    scan_unroll: AtLeastMinusOne = -1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmul inputs; parameters are float32
    reduce_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of gradients in collectives; auto: as dtype
    # Of gradients of the embedding tables and the head in collectives. auto: as reduce_dtype.
    table_reduce_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    loss: Literal["xla", "triton"] = "xla"  # triton: one kernel for loss and gradient; NVIDIA GPUs; not yet run on one
    loss_chunk: Count = 0  # tokens per chunk of the loss; 0 means all at once


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule: the schedule may change on resume, `name` may not."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"  # the optimizer
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # of the learning rate, after a linear warm-up
    peak_lr: NonNegative = 6e-4  # learning rate after the warm-up
    min_lr: NonNegative = 6e-5  # learning rate at the end of the run
    warmup_steps: Count = 2000  # steps in which the learning rate rises
    decay_fraction: Fraction = 0.2  # wsd: the last part of the run, in which the rate falls to min_lr
    # wsd: how it falls, by the share x of the decay that is done: 1 - x, as a half cosine, 1 - sqrt(x), or (1 - x)**p.
    decay_shape: Literal["linear", "cosine", "sqrt", "power"] = "linear"
    decay_power: AtLeastOne = 2.0  # wsd: p of decay_shape=power
    weight_decay: NonNegative = 0.1  # on matrices and embeddings only
    beta1: Rate = 0.9  # decay of the first moment
    beta2: Rate = 0.95  # decay of the second moment
    eps: NonNegative = 1e-8  # added to the root of the second moment
    muon_beta: Rate = 0.95  # muon: momentum of the matrices; the other parameters have AdamW
    muon_nesterov: bool = True  # muon: look one step of the momentum ahead
    # muon: of the iteration that orthogonalizes. polar_express has others in each of its five steps, and comes nearer.
    muon_coefficients: Literal["quintic", "polar_express"] = "quintic"
    # muon: of an update. rms: as large as AdamW's; shape: sqrt(max(1, outputs / inputs)), which needs another rate.
    muon_scale: Literal["rms", "shape"] = "rms"
    ema_decay: Rate = 0.0  # of an average of the parameters, which is then what is evaluated and exported; 0 means none
    grad_clip: NonNegative = 1.0  # largest global gradient norm; 0 means no clipping


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from, and how they are grouped into batches."""

    # stdlib | text: | lines: | jsonl: | csv: | parquet:PATH | tfds:NAME[/CONFIG] | tfds:/DIR | hf:OWNER/NAME
    source: str = "stdlib"
    path: str = ""  # a directory of shards; '' means data/<source>-<tokenizer>
    mix: str = ""  # directories of shards with weights, as data/web:70,data/code:30; '' means one directory
    # gpt2 | bytes | bpe:N, trained on the data | a saved file | a tokenizer.json or its directory | hf:OWNER/NAME
    tokenizer: str = "gpt2"
    text_feature: str = "text"  # tfds, jsonl, csv, parquet: the feature, field or column that holds the text
    val_fraction: Share = 0.05  # the share of the documents that is for validation, where data are prepared
    global_batch_size: Positive = 512  # sequences per update, over all devices and accumulation steps
    seed: Seed = 0  # seed of the order of the sequences
    document_mask: bool = False  # attention and positions restart at each document
    # Whether end-of-text begins or ends a document. auto: read from meta.json, or inferred from the first token.
    eot_position: Literal["auto", "first", "last"] = "auto"
    allow_changed: bool = False  # resume on data other than the checkpoint's


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1, at most once, means all remaining devices."""

    data: int = -1  # shards the batch only; the one axis that may span slices
    fsdp: int = 1  # shards the batch, and parameters with their optimizer state along the model width
    tensor: int = 1  # shards heads, MLP width, vocabulary, and the sequence between matmuls


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The length of a run, its periods, and the policy on divergence and hangs."""

    num_steps: Count = 600_000  # updates of the whole run
    micro_batch_size: Count = 0  # sequences per data-parallel rank and accumulation step; 0: chosen by memory
    steps_per_dispatch: Count = 0  # most steps in one jitted call, which stops wait for; 0: chosen by a step's time
    log_every: Positive = 10  # steps between two lines of metrics
    eval_every: Count = 1000  # steps between two validations; 0 means only after the last step
    eval_batches: Count = 20  # global batches of a validation, of each source of a mixture; 0 means all
    sample_every: Count = 0  # steps between two samples; 0 means never
    stats_every: Count = 0  # steps between two rows of statistics of each layer; 0 means never
    sample_prompt: str = ""  # the text that samples continue
    seed: Seed = 0  # seed of initialisation and dropout
    # The reaction to a non-finite step. Only rollback looks for spikes, too.
    nan_policy: Literal["stop", "skip", "rollback"] = "stop"
    max_consecutive_nonfinite: Positive = 10  # skip: this many non-finite steps in a row end the run
    max_rollbacks: Count = 3  # rollback: one more than this ends the run
    barrier_timeout_seconds: AtLeastOne = 600.0  # how long processes wait for each other at data, restore and saves
    watchdog_timeout_seconds: NonNegative = 3600.0  # without a step or an evaluation batch: exit; 0 means never
    z_loss: NonNegative = 0.0  # weight of the squared log-partition function
    profile_step: AtLeastMinusOne = -1  # write a profiler trace of this step; -1 means never


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Tasks that the model is asked during the run, in the evaluations of the validation split."""

    names: str = ""  # hellaswag, lambada_openai, file:my.jsonl, ... with commas; '' means none
    every: Count = 0  # steps between two, a multiple of train.eval_every; 0 means only after the last step
    limit: Count = 0  # questions of each task, the first ones; 0 means all


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, how many are kept, and which one a run resumes from."""

    save_every: Positive = 1000  # steps between two checkpoints
    keep: Positive = 3  # checkpoints: the newest ones; the best by validation loss is kept in addition
    # auto: from the newest checkpoint, or from the start without one. never: refuses where there is one.
    resume: Literal["auto", "require", "never"] = "auto"
    allow_foreign: bool = False  # resume from a checkpoint of another run


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go in addition to metrics.jsonl and the screen."""

    tensorboard: bool = True  # write event files for TensorBoard
    wandb_project: str = ""  # the project in Weights & Biases; '' means none


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: batch, learning rate, dropout key and shardings are functions of these settings and of the step."""

    model: GPTConfig = GPTConfig()
    compute: ComputeConfig = ComputeConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    tasks: TasksConfig = TasksConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    init_from: str = ""  # initial weights: a work directory, or FORMAT:PATH of gptjax.convert; '' means random

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as nested dicts, {"model": {"n_layer": 12, ...}, ...}."""
        return dataclasses.asdict(self)


def _field_types(cls: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Returns {"model.n_layer": Positive, ...}."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found |= _field_types(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field.type
    return found


FIELD_TYPES = _field_types()
# Both by dotted name. Derived from the annotations, so that a bound or a choice is written once, on its field.
CHOICES: dict[str, tuple[str, ...]] = {}
BOUNDS: dict[str, Bounds] = {}
for _path, _kind in FIELD_TYPES.items():
    if typing.get_origin(_kind) is Literal:
        CHOICES[_path] = typing.get_args(_kind)
    elif hasattr(_kind, "__metadata__"):  # Annotated[int, Bounds(...)]
        BOUNDS[_path] = _kind.__metadata__[0]
# The host sees only the ends of dispatches, so these must be multiples of a train.steps_per_dispatch that is not 0.
PERIODS = (
    "train.log_every",
    "train.eval_every",
    "train.sample_every",
    "train.stats_every",
    "checkpoint.save_every",
    "train.num_steps",
)


def default_config() -> Any:
    """Returns every field with its default as a locked ConfigDict; a config file's get_config() starts from it."""
    return make_config_dict(Config().to_dict())


def from_dict(values: Mapping[str, object]) -> Config:
    """Returns the validated Config of nested `values`, in which fields may have their former names.

    Raises:
        ConfigError: one line for every unknown field, wrong type and impossible value.
    """
    errors: list[ConfigError] = []
    config = _parse(Config, rename_fields(values, warn=False), "", errors)
    # A field that did not parse has its default here, so a conflict with it would be a false report.
    if not errors:
        errors = find_problems(config)
    if errors:
        raise ConfigError.of(errors)
    return config


def load(path: str, overrides: Mapping[str, object]) -> Config:
    """Returns the Config of a config file's get_config(), with `overrides` {"model.n_layer": "6"} applied.

    path: of a file, or the name of one that comes with gptjax, such as quickstart.

    Raises:
        ConfigError: the file is missing or fails, or a field or value is wrong.
    """
    values = rename_fields(read_settings(path, FIELD_TYPES), warn=True)
    for name, text in overrides.items():
        name = current_name(name)
        if name not in FIELD_TYPES:
            raise unknown_field(name)
        # The file's values are not validated yet: a section can be missing, or something other than a dict.
        *sections, last = name.split(".")
        target: Any = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{section}={target!r}: expected a section with fields", field="--config", value=path)
        target[last] = text
    return from_dict(values)


def base_config(path: str | os.PathLike[str]) -> Any:
    """Returns the settings of another config file as `default_config` does; get_config() of a config file may use it.

        def get_config():
            config = base_config("gpt2_small")
            config.model.n_layer = 24
            return config

    path: as in `load`. A path is relative to the current directory: `pathlib.Path(__file__).with_name("other.py")` is
        a file in the same directory as the caller.

    Raises:
        ConfigError: the file is missing or fails, or a field or a value is wrong.
    """
    values = rename_fields(read_settings(os.fspath(path), FIELD_TYPES), warn=True)
    return make_config_dict(from_dict(values).to_dict())


def flatten(config: Config) -> dict[str, Value]:
    """Returns {"model.n_layer": 12, ...}."""
    flat: dict[str, Value] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def unknown_field(path: str) -> ConfigError:
    """Returns the error for a dotted `path` that is not a config field, with the nearest field names."""
    of_section = [name for name in FIELD_TYPES if name.startswith(f"{path}.")]
    if of_section:
        return ConfigError("is a section with fields", field=path, remedy=f"name one of them, as {of_section[0]}")
    near = nearest_fields(path, FIELD_TYPES)
    return ConfigError(
        "no such config field",
        field=one_line(path),
        remedy=f"nearest: {', '.join(near)}" if near else "",
    )


def _parse(cls: Any, values: object, prefix: str, errors: list[ConfigError]) -> Any:
    """Returns the dataclass `cls` made from `values`; appends to `errors`, where a field keeps its default."""
    if not isinstance(values, Mapping):
        errors.append(wrong_value(prefix.rstrip("."), values, expected="a section with fields"))
        return cls()
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    for key in values:
        if key not in kinds:
            errors.append(unknown_field(prefix + " ".join(str(key).split())))
    chosen = {}
    for name, kind in kinds.items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(kind):
            chosen[name] = _parse(kind, values[name], f"{prefix}{name}.", errors)
            continue
        try:
            chosen[name] = convert(prefix + name, values[name], _plain_type(kind))
        except ConfigError as error:
            errors.append(error)
    return cls(**chosen)


def _plain_type(kind: Any) -> type:
    """Returns bool, int, float or str for the type of a field."""
    return str if typing.get_origin(kind) is Literal else getattr(kind, "__origin__", kind)


def find_problems(config: Config) -> list[ConfigError]:
    """Returns one error for each impossible value or combination, naming the field, its value and the remedy."""
    flat = flatten(config)
    errors = []
    for path, choices in CHOICES.items():
        if flat[path] not in choices:
            errors.append(wrong_value(path, flat[path], expected=f"one of {', '.join(choices)}"))
    for path, bounds in BOUNDS.items():
        value = typing.cast(float, flat[path])  # only numbers have bounds
        if value < bounds.at_least:
            errors.append(ConfigError(f"must be at least {bounds.at_least}", field=path, value=value))
        if value >= bounds.below:
            errors.append(ConfigError(f"must be below {bounds.below}", field=path, value=value))
        if value > bounds.at_most:
            errors.append(ConfigError(f"must be at most {bounds.at_most}", field=path, value=value))
    if errors:
        return errors
    # Conflicts are only looked for among valid values: a modulus by 0 would raise.
    errors += _model_conflicts(config)
    errors += _data_conflicts(config.data)
    errors += _mesh_conflicts(config.mesh)
    errors += _period_conflicts(config, flat)
    errors += _task_conflicts(config)
    return errors


def _model_conflicts(config: Config) -> list[ConfigError]:
    model = config.model
    optim = config.optim
    errors = []
    if model.n_embd % model.n_head:
        near = nearest_divisors(model.n_embd, model.n_head)
        errors.append(
            ConfigError(
                f"must divide model.n_embd={model.n_embd}",
                field="model.n_head",
                value=model.n_head,
                remedy=f"nearest valid: {', '.join(map(str, near))}",
            )
        )
    if optim.min_lr > optim.peak_lr:
        errors.append(
            ConfigError(f"must not exceed optim.peak_lr={optim.peak_lr}", field="optim.min_lr", value=optim.min_lr)
        )
    return errors


def _data_conflicts(data: DataConfig) -> list[ConfigError]:
    if not data.mix:
        return []
    if data.path:
        return [ConfigError("names a directory, and so does data.mix", field="data.path", value=data.path)]
    try:
        parse_mix(data.mix)
    except ConfigError as error:
        return [error]
    return []


def _mesh_conflicts(mesh: MeshConfig) -> list[ConfigError]:
    """Checks the sizes themselves; whether they fit the devices is checked by sharding.make_mesh."""
    errors = []
    sizes = dataclasses.asdict(mesh)
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            errors.append(ConfigError("must be positive, or -1 for the rest", field=f"mesh.{axis}", value=size))
    if list(sizes.values()).count(-1) > 1:
        errors.append(ConfigError("only one of mesh.data, mesh.fsdp, mesh.tensor may be -1", field="mesh"))
    return errors


def _period_conflicts(config: Config, flat: dict[str, Value]) -> list[ConfigError]:
    every = config.train.steps_per_dispatch or 1  # chosen automatically, it follows the periods
    errors = []
    for path in PERIODS:
        period = int(flat[path])
        if period % every:
            # Rounded down, but not to 0, which means another thing or is invalid.
            nearest = max(every, period // every * every)
            errors.append(
                ConfigError(
                    f"must be a multiple of train.steps_per_dispatch={every}",
                    field=path,
                    value=period,
                    remedy=f"nearest valid: {nearest}",
                )
            )
    return errors


def _task_conflicts(config: Config) -> list[ConfigError]:
    """Checks that tasks fall into evaluations."""
    every = config.train.eval_every
    value = config.tasks.every
    if not value or (every and value % every == 0):
        return []
    nearest = f"nearest valid: {max(every, value // every * every)}" if every else "set train.eval_every, too"
    problem = f"must be a multiple of train.eval_every={every}"
    return [ConfigError(problem, field="tasks.every", value=value, remedy=nearest)]
