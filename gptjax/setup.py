"""Builds the mesh, the model, the datasets and the jitted steps of a run from a Config."""

import dataclasses
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.chips import device_memory
from gptjax.compute import ResolvedCompute, resolve_compute, resolve_parallel
from gptjax.config import Config
from gptjax.config_values import nearest_divisors
from gptjax.data.dataset import Dataset, batch_index
from gptjax.data.mixture import Mixture
from gptjax.data.own_tokenizer import is_own, own_size
from gptjax.data.tokenizer import Tokenizer
from gptjax.dispatch import (
    Batches,
    Tokens,
    abstract_tokens,
    choose_steps_per_dispatch,
    dispatch_end,
    tokens_sharding,
)
from gptjax.documents import NO_EOT
from gptjax.errors import ConfigError, OutOfMemoryError, WorkdirError
from gptjax.exhaustion import show, show_bytes
from gptjax.goodput import duration
from gptjax.history import SkippedRange
from gptjax.identity import Identity
from gptjax.layer_stats import StatsFn, jit_stats_step
from gptjax.model import GPT
from gptjax.optim import make_optimizer, parameter_table
from gptjax.params import count_params
from gptjax.run_data import describe_sources, identify, open_data, open_tokenizer_of
from gptjax.sharding import bytes_per_device, data_parallel_size, make_mesh
from gptjax.sizes import activation_bytes_per_sequence, train_flops_per_token
from gptjax.state import TrainState, make_init
from gptjax.step import DispatchFn, EvalFn, jit_steps
from gptjax.tasks.ask import Asked, encode_task
from gptjax.tasks.score import Scorer
from gptjax.tasks.store import open_tasks, parse_names
from gptjax.versions import versions
from gptjax.workdir import CONFIG_FILE, PARAMETERS_FILE, TOKENIZER_FILE, write_json

log = logging.getLogger("gptjax")
# (parameters, 2 moments, 2 gradient buffers) / (parameters, 2 moments): the memory relative to AdamW's state.
STATE_AND_GRADIENTS = 5 / 3
MEMORY_SHARE = 0.8  # fraction of device memory to fill; activations are only estimated, and XLA needs temporary buffers
CPU_MEMORY_SHARE = 0.25  # of the machine's memory: other programs need it, too
SLOW_STEP_SECONDS = 60.0  # the run warns if it expects a CPU step to take longer
SMALL_BATCH = 4  # sequences, the batch suggested for a CPU
CPU_EFFICIENCY = 0.5  # fraction of matmul peak that a CPU train step reaches
LEAST_FLOPS_PER_SECOND = 1e9  # of a CPU's matmuls: a core reaches more than ten times that
MATMUL_SIZE = 1024  # width of the square matrices in the CPU speed test


@dataclasses.dataclass(frozen=True)
class Run:
    """The constant parts of a run. State and history change, so the loop takes them as arguments."""

    config: Config
    mesh: Mesh
    compute: ResolvedCompute  # config.compute with every "auto" resolved for this mesh
    model: GPT
    abstract_state: TrainState  # of jax.ShapeDtypeStruct with shardings, for restoring and for compiling ahead of time
    init: Callable[[], TrainState]  # jitted: creates each shard on its device
    train_step: DispatchFn  # jitted, donates the state; takes what `batch` returns
    eval_step: EvalFn  # jitted, donates nothing
    stats_step: StatsFn | None  # jitted; takes the tokens of a dispatch. None unless train.stats_every is set
    train_data: Dataset | Mixture
    validation_data: Dataset | Mixture
    tasks: tuple[Asked, ...]  # of config.tasks
    scorer: Scorer  # answers them
    tokenizer: Tokenizer
    token_bytes_V: jax.Array  # int32, replicated; for bits per byte
    num_microbatches: int  # A, accumulation steps per update
    steps_per_dispatch: int  # K, the most steps of a dispatch
    batch_sharding: NamedSharding  # of [A, B, T+1]
    data_identity: dict[str, str | int]  # a resume compares it with the one in the checkpoint
    data_location: dict[str, str | int]  # where the data are and how many tokens: saved for messages and evaluation

    @property
    def tokens_per_step(self) -> int:
        """The tokens that one update predicts, over all devices."""
        return self.config.data.global_batch_size * self.config.model.block_size

    @property
    def flops_per_step(self) -> float:
        """The FLOPs of one update on all devices, without recomputation by remat."""
        return self.tokens_per_step * train_flops_per_token(self.config.model)

    @property
    def machine(self) -> str:
        """The number and kind of the devices, as "8 x TPU v4"."""
        # Checkpoints record it, because the bits of a run depend on it.
        return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"

    def dispatch_end(self, step: int, *, start: int | None = None) -> int:
        """Returns the step after the dispatch that begins at `step`; start is as in dispatch.dispatch_end."""
        return dispatch_end(self.config, step, at_most=self.steps_per_dispatch, start=start)

    def batch(self, step: int, skipped: Sequence[SkippedRange] = (), *, end: int | None = None) -> Tokens:
        """Returns the tokens of a dispatch from `step` to `end`.

        skipped: the ranges of data that rollbacks skip.
        end: at most steps_per_dispatch steps later; None means a dispatch of one step.
        """
        # Where every dispatch has one step, the program has no loop, and its tokens no axis K.
        if self.steps_per_dispatch == 1:
            return self._read_batch(batch_index(step, skipped))
        last = step if end is None else end - 1
        # The last batch is repeated up to K, so that the arrays of all dispatches have one shape.
        steps = [min(update, last) for update in range(step, step + self.steps_per_dispatch)]
        tokens_KABT = self._read_batch([batch_index(update, skipped) for update in steps])
        return Batches(tokens_KABT, on_each_device(np.asarray(last + 1 - step, np.int32), self.mesh))

    def _read_batch(self, index: int | list[int]) -> jax.Array:
        return self.train_data.batch(
            index,
            sharding=tokens_sharding(self.mesh, self.steps_per_dispatch),
            num_microbatches=self.num_microbatches,
        )


def make_run(config: Config, *, tokenizer: Tokenizer | None = None, has_tasks: bool = False) -> Run:
    """Returns the run of `config` on all devices. Missing data are prepared first, if that needs no network.

    tokenizer: of the data; None means data.tokenizer.
    has_tasks: whether the run asks config.tasks, whose files must then be here.

    Raises:
        ConfigError: data, model, batch and mesh do not fit together.
        DataError: train.sample_prompt cannot be tokenized, or the data are damaged.
    """
    # Over the devices of all processes. From here on each process must do the same things in the same order.
    mesh = make_mesh(config.mesh)
    compute = resolve_compute(config, mesh)
    tokenizer = tokenizer or open_tokenizer_of(config)
    check_vocabulary(config, tokenizer)
    # Tokenizing the prompt can fail. It should do so now, and not in the middle of the run.
    if config.train.sample_every:
        tokenizer.encode_batch([config.train.sample_prompt], names=["train.sample_prompt"])
    model = GPT(config.model, compute, resolve_parallel(config, mesh))
    optimizer = make_optimizer(config.optim)
    # Nothing is allocated here: `abstract` has shapes only, and `init` has not been called.
    abstract, init = make_init(
        model, optimizer, mesh=mesh, seed=config.train.seed, has_average=config.optim.ema_decay > 0
    )
    num_microbatches = choose_num_microbatches(config, compute, mesh, state_bytes=bytes_per_device(abstract))
    # A replay or an evaluation needs no questions, and may run where there are none.
    names = parse_names(config.tasks.names, field="tasks.names") if has_tasks and config.tasks.names else []
    tasks = tuple(encode_task(task, tokenizer) for task in open_tasks(names, limit=config.tasks.limit))
    # open_data may write files, so it comes after all checks of the config: a bad config leaves no files behind.
    train_data, validation_data, location = open_data(config, tokenizer)
    # Traced and compiled at the first call, not here.
    train_step, eval_step = jit_steps(model, optimizer, config, abstract=abstract, eot=train_data.eot)
    stats_step = None
    if config.train.stats_every:
        stats_step = jit_stats_step(model, config, eot=train_data.eot, sharding=abstract.step.sharding)
    return Run(
        config=config,
        mesh=mesh,
        compute=compute,
        model=model,
        abstract_state=abstract,
        init=init,
        train_step=train_step,
        eval_step=eval_step,
        stats_step=stats_step,
        train_data=train_data,
        validation_data=validation_data,
        tasks=tasks,
        scorer=Scorer(model, mesh),
        tokenizer=tokenizer,
        token_bytes_V=on_each_device(np.asarray(tokenizer.token_bytes()), mesh),
        num_microbatches=num_microbatches,
        steps_per_dispatch=choose_steps_per_dispatch(config, mesh),
        batch_sharding=tokens_sharding(mesh, 1),
        data_identity=identify(config, train_data),
        data_location=location,
    )


def train_step_hash(run: Run) -> str:
    """Returns the sha256 (hex) of the train step's StableHLO, the program that XLA compiles. It compiles nothing."""
    tokens = abstract_tokens(
        run.config,
        run.mesh,
        num_microbatches=run.num_microbatches,
        steps_per_dispatch=run.steps_per_dispatch,
    )
    step: Any = run.train_step  # DispatchFn does not declare `lower`
    stablehlo = step.lower(run.abstract_state, tokens).as_text()
    return hashlib.sha256(stablehlo.encode()).hexdigest()


def on_each_device(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns `x`, of any shape and dtype, replicated on all devices of `mesh`."""
    # jax.device_put would compare `x` across processes with a collective, and block until all of them arrive.
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda index: x[index])


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Checks that the model's vocabulary is the tokenizer's; an imported model's may be larger.

    Raises:
        ConfigError: the sizes differ, or data.document_mask is on and the tokenizer has no end-of-text.
    """
    if config.data.document_mask and tokenizer.eot_id == NO_EOT:
        raise ConfigError(
            f"the tokenizer {tokenizer.name!r} has no end-of-text, so documents are joined",
            field="data.document_mask",
            value=True,
            remedy="set it to False",
        )
    name = config.data.tokenizer
    # A tokenizer that is trained on little text finds fewer merges than it was asked for.
    expected = own_size(name) if is_own(name) else tokenizer.vocab_size
    # Published models often pad their vocabulary; the last ids never occur in text.
    if config.init_from and config.model.vocab_size > expected:
        return
    if config.model.vocab_size != expected:
        raise ConfigError(
            f"the tokenizer {name!r} has {expected} ids",
            field="model.vocab_size",
            value=config.model.vocab_size,
            remedy=f"set model.vocab_size={expected}",
        )


def choose_num_microbatches(config: Config, compute: ResolvedCompute, mesh: Mesh, *, state_bytes: int) -> int:
    """Returns A, the number of micro-batches per update, from train.micro_batch_size or the device memory.

    state_bytes: of the optimizer and the parameters on one device.

    Raises:
        ConfigError: the batch is not divisible by the ranks or the micro-batch; the message names the nearest sizes.
    """
    # The axis `tensor` does not count: its devices work on the same sequences.
    ranks = data_parallel_size(mesh)
    per_rank = _sequences_per_rank(config.data.global_batch_size, ranks)
    micro_batch = config.train.micro_batch_size
    if micro_batch and per_rank % micro_batch:
        near = nearest_divisors(per_rank, micro_batch)
        raise ConfigError(
            f"must divide data.global_batch_size / (mesh.data x mesh.fsdp) = {per_rank}",
            field="train.micro_batch_size",
            value=micro_batch,
            remedy=f"nearest valid: {', '.join(map(str, near))}",
        )
    if micro_batch:
        return per_rank // micro_batch
    sequence_bytes = activation_bytes_per_sequence(
        config.model,
        compute,
        config.compute.loss_chunk,
        tensor=mesh.shape["tensor"],
    )
    free = memory_budget(mesh.devices.flat[0]) - STATE_AND_GRADIENTS * state_bytes
    fits = max(1, int(free / sequence_bytes))  # tries one sequence even if the estimate exceeds the memory
    divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    # Larger micro-batches use the matrix units better. A different A changes the last bits, since sums change order.
    return per_rank // max(size for size in divisors if size <= fits)


def _sequences_per_rank(batch_size: int, ranks: int) -> int:
    if batch_size % ranks == 0:
        return batch_size // ranks
    below = batch_size // ranks * ranks
    near = sorted({max(ranks, below), below + ranks})  # 0 is not a batch
    raise ConfigError(
        f"must be a multiple of mesh.data x mesh.fsdp = {ranks}",
        field="data.global_batch_size",
        value=batch_size,
        remedy=f"nearest valid: {', '.join(map(str, near))}",
    )


def memory_budget(device: Any) -> float:
    """Returns the bytes of one device that a run may use."""
    if device.platform != "cpu":
        return MEMORY_SHARE * device_memory(device)
    # All CPU devices share the machine's memory; tests have several.
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return CPU_MEMORY_SHARE * machine_bytes / jax.local_device_count()


def describe_run(run: Run) -> list[str]:
    """Returns the first lines that a run logs: versions, devices, mesh, model, data, step, memory."""
    libraries = versions()
    own_version = libraries.pop("gptjax")
    made_with = ", ".join(f"{name} {version}" for name, version in libraries.items())
    mesh = " ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items())
    processes = _count(jax.process_count(), "process", "processes")
    parameters = count_params(run.config.model)
    train_tokens = run.train_data.tokens
    validation_tokens = run.validation_data.tokens
    state, activations, micro_batch = estimated_memory(run)
    accumulation = _count(run.num_microbatches, "accumulation step")
    return [
        f"gptjax {own_version} with {made_with}",
        f"devices: {run.machine}, mesh {mesh}, {processes}",
        f"model: {parameters:,} parameters, {run.compute.attention} attention, {run.compute.dtype}",
        f"data: {train_tokens:,} tokens to train on, {validation_tokens:,} to validate",
        *describe_sources(run.train_data),
        f"step: {run.tokens_per_step:,} tokens, {run.flops_per_step:.3g} FLOP",
        f"micro-batch: {_count(micro_batch, 'sequence')} per data-parallel rank, {accumulation}",
        f"memory per device, estimated: {show_bytes(state)} of state, {show_bytes(activations)} of activations",
    ]


def _count(number: int, one: str, several: str = "") -> str:
    """Returns `number` with a noun: "1 process", "2 processes"."""
    noun = one if number == 1 else several or f"{one}s"
    return f"{number} {noun}"


def write_description(run: Run, workdir: str, identity: Identity, *, has_roles: bool) -> None:
    """Logs a description of the run, and writes its files to the work directory.

    has_roles: whether the description has the table of parameters; otherwise only --verbose shows it.

    Raises:
        WorkdirError: they cannot be written.
    """
    write_files(run, workdir, identity)
    roles = parameter_table(run.abstract_state.params, run.config.optim)
    for line in describe_run(run):
        log.info("%s", line)
    for line in describe_roles(roles):
        log.log(logging.INFO if has_roles else logging.DEBUG, "%s", line)  # parameters.json has them always
    # An accelerator finishes any step in seconds; a CPU may need an hour for a batch of 512.
    if run.mesh.devices.flat[0].platform == "cpu":
        warn_if_slow(run)


def write_files(run: Run, workdir: str, identity: Identity) -> None:
    """Writes config and identity, the table of parameters, and the tokenizer to the work directory.

    Raises:
        WorkdirError: they cannot be written.
    """
    roles = parameter_table(run.abstract_state.params, run.config.optim)
    # With a copy of the tokenizer, sampling from the run does not depend on a file elsewhere.
    writers = {
        CONFIG_FILE: functools.partial(write_json, value=run.config.to_dict() | identity.to_json()),
        PARAMETERS_FILE: functools.partial(write_json, value=roles),
        TOKENIZER_FILE: run.tokenizer.save,
    }
    for name, write in writers.items():
        path = os.path.join(workdir, name)
        try:
            write(path)
        except OSError as error:
            raise WorkdirError(
                f"cannot be written: {error.strerror}",
                field=path,
                remedy="make room or allow writing there, or choose another --workdir",
            ) from error


def out_of_memory_error(run: Run, size: float) -> OutOfMemoryError:
    """Returns the error for a run that could not allocate `size` bytes, with an estimate and remedies, cheapest first.

    size: 0 if it is not known.
    """
    model = run.config.model
    compute = run.config.compute
    # Estimated by formula, because JAX's message has only the size of one buffer and no names.
    state, activations, micro_batch = estimated_memory(run)
    # By cost: a smaller micro-batch and a chunked loss are almost free, remat adds a forward pass, devices cost money.
    remedies = []
    if micro_batch > 1:
        # A divisor of the sequences per rank, as the micro-batch itself is one.
        smaller = max(size for size in range(1, micro_batch // 2 + 1) if micro_batch % size == 0)
        remedies.append(f"--config.train.micro_batch_size={smaller} (now {micro_batch})")
    if not compute.loss_chunk:
        (chunk,) = nearest_divisors(model.block_size, model.block_size // 8, 1)
        remedies.append(f"--config.compute.loss_chunk={chunk}")
    if compute.remat == "none":
        remedies.append("--config.compute.remat=full")
    remedies.append(f"shard over more devices: mesh.fsdp is {run.mesh.shape['fsdp']}, of {run.mesh.size} devices")
    estimate = f"estimated per device: {show_bytes(state)} of state and {show_bytes(activations)} of activations"
    cause = OutOfMemoryError(f"out of memory: {show(size)} could not be allocated; {estimate}")
    return OutOfMemoryError.of([cause, OutOfMemoryError(remedy=f"to use less: {'; '.join(remedies)}")])


def estimated_memory(run: Run) -> tuple[float, float, int]:
    """Returns (bytes of state, bytes of activations, sequences of a micro-batch) per device, by formula."""
    config = run.config
    # Like the batch, a micro-batch is sharded over `data` and `fsdp`.
    micro_batch = config.data.global_batch_size // run.num_microbatches // data_parallel_size(run.mesh)
    sequence_bytes = activation_bytes_per_sequence(
        config.model,
        run.compute,
        config.compute.loss_chunk,
        tensor=run.mesh.shape["tensor"],
    )
    return bytes_per_device(run.abstract_state), micro_batch * sequence_bytes, micro_batch


def describe_roles(roles: list[dict[str, Any]]) -> list[str]:
    """Returns one line per parameter: path, shape, optimizer, weight decay, sharding."""
    lines = []
    for row in roles:
        shape = "x".join(map(str, row["shape"]))
        decay = "decay" if row["weight_decay"] else "no decay"
        lines.append(f"  {row['parameter']:<22} {shape:<18} {row['optimizer']:<9} {decay:<8} {row['sharding']}")
    return lines


def warn_if_slow(run: Run) -> None:
    """Warns if a step will take long on this CPU, by the time of one matmul."""
    # A small step is quick on any CPU: its run starts without the measurement, which loads a program.
    if run.flops_per_step < SLOW_STEP_SECONDS * CPU_EFFICIENCY * LEAST_FLOPS_PER_SECOND:
        return
    x = np.ones((MATMUL_SIZE, MATMUL_SIZE), np.float32)  # jnp.ones would load two more programs
    matmul = jax.jit(lambda x: x @ x)
    matmul(x).block_until_ready()  # compiles
    start = time.perf_counter()
    matmul(x).block_until_ready()
    flops_per_second = 2 * MATMUL_SIZE**3 / (time.perf_counter() - start)
    seconds = run.flops_per_step / (CPU_EFFICIENCY * flops_per_second)
    if seconds > SLOW_STEP_SECONDS:
        log.warning("one step will take about %s on this CPU", duration(seconds))
        log.warning("configs/quickstart.py is sized for a CPU")
        if run.config.data.global_batch_size > SMALL_BATCH:
            log.warning("a smaller batch takes less time: --config.data.global_batch_size=%d", SMALL_BATCH)
