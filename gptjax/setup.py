"""Everything that a config stands for, built once: mesh, model, data, and the jitted steps ("pjit")."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.checkpoint import versions
from gptjax.chips import device_memory
from gptjax.config import Config, nearest_divisors
from gptjax.data.dataset import Dataset, data_index
from gptjax.data.prepare import ensure_prepared
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import ConfigError
from gptjax.model import (
    GPT,
    Compute,
    activation_bytes_per_sequence,
    count_params,
    resolve_compute,
    train_flops_per_token,
)
from gptjax.optim import make_optimizer
from gptjax.sharding import BATCH_SPEC, bytes_per_device, data_parallel_size, make_mesh
from gptjax.state import TrainState, make_init
from gptjax.step import StepFn, jit_steps

log = logging.getLogger("gptjax")
STATE_AND_GRADIENTS = 5 / 3  # of AdamW's state: gradients twice, those summed so far and a micro-step's
MEMORY_SHARE = 0.8  # of a device's free memory, for activations
CPU_MEMORY_SHARE = 0.25  # of the machine's memory, for everything: others live there too


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run. Nothing here changes while it runs."""

    config: Config
    mesh: Mesh
    compute: Compute
    model: GPT
    abstract_state: TrainState
    init: Callable[[], TrainState]
    train_step: StepFn  # jitted, donates the state; takes steps_per_dispatch batches at once where that is above 1
    eval_step: Callable[..., Any]
    train_data: Dataset
    validation_data: Dataset
    tokenizer: Tokenizer
    token_bytes_V: jax.Array
    num_micro_steps: int
    batch_sharding: NamedSharding
    data_identity: dict[str, Any]

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.global_batch_size * self.config.model.block_size

    @property
    def flops_per_step(self) -> float:
        return self.tokens_per_step * train_flops_per_token(self.config.model)

    @property
    def machine(self) -> str:
        return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"

    def batch(self, step: int, skipped: Sequence[Mapping[str, Any]] = ()) -> jax.Array:
        """Returns the tokens of the dispatch that starts at `step`: [A, B, T+1], or [K, A, B, T+1] for K steps.

        skipped: as of data_index.
        """
        count = self.config.train.steps_per_dispatch
        place = {"sharding": self.batch_sharding, "num_micro_steps": self.num_micro_steps}
        batches = [self.train_data.batch(data_index(s, skipped), **place) for s in range(step, step + count)]
        return batches[0] if count == 1 else jnp.stack(batches)


def make_run(config: Config, *, tokenizer: Tokenizer | None = None) -> Run:
    """Returns the run of `config` on all devices; data that needs no network is prepared if it is missing.

    tokenizer: instead of the one that data.tokenizer names.

    Raises:
        ConfigError: data, model, batch and mesh do not fit together.
    """
    mesh = make_mesh(config.mesh)
    compute = resolve_compute(config, mesh)
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    directory = ensure_prepared(config.data)
    splits = [
        open_split(directory, name, tokenizer=tokenizer, eot_position=config.data.eot_position)
        for name in ("train", "validation")
    ]
    model, optimizer = GPT(config.model, compute), make_optimizer(config.optim)
    abstract, init = make_init(model, optimizer, mesh=mesh, seed=config.train.seed)
    size = config.data.global_batch_size
    num_micro_steps = choose_micro_steps(config, compute, mesh, state_bytes=bytes_per_device(abstract))
    datasets = [Dataset(split, config.model.block_size, size, config.data.seed) for split in splits]
    jit = functools.partial(jit_steps, model, optimizer, config, abstract)
    train_step, eval_step = jit(eot_id=tokenizer.eot_id, eot_position=splits[0].eot_position)
    return Run(
        config=config,
        mesh=mesh,
        compute=compute,
        model=model,
        abstract_state=abstract,
        init=init,
        train_step=train_step,
        eval_step=eval_step,
        train_data=datasets[0],
        validation_data=datasets[1],
        tokenizer=tokenizer,
        token_bytes_V=on_each_device(np.asarray(tokenizer.token_bytes()), mesh),
        num_micro_steps=num_micro_steps,
        batch_sharding=NamedSharding(mesh, BATCH_SPEC),
        data_identity={
            "fingerprint": splits[0].fingerprint,
            "data.seed": config.data.seed,
            "data.global_batch_size": size,
            "model.block_size": config.model.block_size,
        },
    )


def on_each_device(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns `x`, whole on each device; jax.device_put would have all processes compare theirs, and wait."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda index: x[index])


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError unless the model's vocabulary is the tokenizer's; one that was imported may be larger."""
    if config.init_from and config.model.vocab_size > tokenizer.vocab_size:
        return
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer {config.data.tokenizer!r} has "
            f"{tokenizer.vocab_size} ids; set model.vocab_size={tokenizer.vocab_size}"
        )


def choose_micro_steps(config: Config, compute: Compute, mesh: Mesh, *, state_bytes: int) -> int:
    """Returns A, the accumulation steps of one update, from train.micro_batch_size or from the devices' memory.

    Raises:
        ConfigError: the batch does not divide; the message names the nearest sizes that do.
    """
    size, parts, wanted = config.data.global_batch_size, data_parallel_size(mesh), config.train.micro_batch_size
    if size % parts:
        near = sorted({max(parts, size // parts * parts), (size // parts + 1) * parts})
        raise ConfigError(
            f"data.global_batch_size={size}: must divide by the {parts} devices of mesh.data x mesh.fsdp; "
            f"nearest valid: {', '.join(map(str, near))}"
        )
    share = size // parts
    if wanted and share % wanted:
        raise ConfigError(
            f"train.micro_batch_size={wanted}: must divide data.global_batch_size / (mesh.data x mesh.fsdp) = {share}; "
            f"nearest valid: {', '.join(map(str, nearest_divisors(share, wanted)))}"
        )
    if wanted:
        return share // wanted
    sequence = activation_bytes_per_sequence(
        config.model, compute, config.compute.loss_chunk, tensor=mesh.shape["tensor"]
    )
    fits = max(1, int((memory_budget(mesh.devices.flat[0]) - STATE_AND_GRADIENTS * state_bytes) / sequence))
    return share // max(d for d in range(1, share + 1) if share % d == 0 and d <= fits)


def memory_budget(device: Any) -> float:
    """Returns how many bytes of one device a run may use."""
    if device.platform != "cpu":
        return MEMORY_SHARE * device_memory(device)
    return CPU_MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()


def describe_run(run: Run) -> list[str]:
    """Returns the first lines of a run: versions, devices, mesh, model, data, step, memory."""
    config, model = run.config, run.config.model
    made_with = versions()
    shape = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    micro = config.data.global_batch_size // run.num_micro_steps // data_parallel_size(run.mesh)
    sequence = activation_bytes_per_sequence(model, run.compute, config.compute.loss_chunk, run.mesh.shape["tensor"])
    activations = micro * sequence
    state = bytes_per_device(run.abstract_state)
    train_tokens, validation_tokens = run.train_data.split.tokens, run.validation_data.split.tokens
    ours, others = made_with.pop("gptjax"), ", ".join(f"{name} {version}" for name, version in made_with.items())
    return [
        f"gptjax {ours} with {others}",
        f"{run.machine} as {shape}, {jax.process_count()} process(es)",
        f"model: {count_params(model):,} parameters, {run.compute.attention} attention, {run.compute.dtype}",
        f"data: {train_tokens:,} tokens to train on, {validation_tokens:,} to validate",
        f"step: {run.tokens_per_step:,} tokens, {run.flops_per_step:.3g} FLOP, {run.num_micro_steps} micro-step(s)",
        f"train.micro_batch_size: {micro} sequence(s) a device and micro-step",
        f"memory per device, estimated: {state / 1e9:.2f} GB of state, {activations / 1e9:.2f} GB of activations",
    ]
