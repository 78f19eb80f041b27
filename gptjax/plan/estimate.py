"""What a run will need and cost, by formula: memory, FLOPs, bytes between chips, and the time that these allow."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from gptjax.chips import Chip
from gptjax.config import Config
from gptjax.hlo import NETWORK
from gptjax.model import Compute, activation_bytes_per_sequence, train_flops_per_token
from gptjax.sharding import AXES, TABLES, param_spec

OPTIMIZER_BYTES = 8  # float32 moments of AdamW a parameter, the most that an optimizer here keeps
UPDATE_BYTES = 28  # read and written of memory by an AdamW update: parameter, two moments twice, gradient once
Traffic = dict[tuple[str, tuple[str, ...]], float]  # (kind, mesh axes) -> bytes that a device sends in a step


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a step is cut: sizes of the mesh by axis, accumulation steps, sequences a device and micro-step."""

    mesh: Mapping[str, int]
    micro_steps: int
    micro_batch: int
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """A config on a mesh, with all that the formulas need."""

    config: Config
    compute: Compute
    shape: Shape
    params: dict[str, tuple[int, ...]]  # the shape of each parameter by path


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one step takes at least, by what governs it; the step cannot be faster than the longest."""

    matrix_units: float
    memory: float  # an estimate: weights, activations and the update, each moved once
    links: float  # an estimate: rings over both directions of each torus dimension of an axis
    network: float

    @property
    def bound(self) -> str:
        times = dataclasses.asdict(self)
        return max(times, key=times.__getitem__)

    @property
    def seconds(self) -> float:
        return max(dataclasses.asdict(self).values())


def minimum_traffic(setting: Setting) -> Traffic:
    """Returns the bytes that a device must send in a step, by rings, whatever the compiler does.

    Weights are gathered twice a micro-step, forward and backward, and their gradients scattered; tables once a step.
    Weights and gradients travel in the compute and reduce dtypes, gradients of tables in float32. Source of the costs
    of a ring: Patarasuk and Yuan 2009, "Bandwidth Optimal All-reduce Algorithms", section 3.
    """
    config, compute, shape = setting.config, setting.compute, setting.shape
    fsdp, tensor = shape.mesh["fsdp"], shape.mesh["tensor"]
    width, reduce_width = (jnp.dtype(dtype).itemsize for dtype in (compute.dtype, compute.reduce_dtype))
    traffic: Traffic = {}

    def add(kind: str, axes: tuple[str, ...], amount: float) -> None:
        if amount:
            traffic[kind, axes] = traffic.get((kind, axes), 0.0) + amount

    for path, sizes in setting.params.items():
        spec = param_spec(path)
        local = math.prod(sizes) / (tensor if "tensor" in spec else 1)
        reduced = local * (4 if path in TABLES else reduce_width)
        if "fsdp" in spec:
            times = (1, 1) if path in TABLES else (2 * shape.micro_steps, shape.micro_steps)
            add("all-gather", ("fsdp",), times[0] * local * width * (fsdp - 1) / fsdp)
            add("reduce-scatter", ("fsdp",), times[1] * reduced * (fsdp - 1) / fsdp)
            reduced /= fsdp
        for key, sent in split_sum(shape, tuple(axis for axis in AXES if axis not in spec), reduced).items():
            add(*key, sent)
    model = config.model
    activations = shape.micro_steps * shape.micro_batch * model.block_size * model.n_embd * width
    # Positions are gathered before attention and MLP, their sums scattered after, and backward the other way round;
    # likewise what is looked up, and what the head takes. Remat does all of it again, but for the MLP's sum.
    gathered, scattered = (6, 5) if compute.remat != "none" else (4, 4)
    for kind, times in (("all-gather", gathered), ("reduce-scatter", scattered)):
        add(kind, ("tensor",), (times * model.n_layer + 2) * activations * (tensor - 1) / tensor)
    return traffic


def split_sum(shape: Shape, axes: tuple[str, ...], amount: float) -> Traffic:
    """Returns what a device sends for the sum of so many bytes over `axes`, `data` among them.

    Between slices it takes the way that is the same in all: scattered within, summed across, gathered within.
    """
    near = math.prod(shape.mesh[axis] for axis in axes) // shape.slices
    within = tuple(a for a in axes if shape.mesh[a] // (shape.slices if a == "data" else 1) > 1)
    sent = {
        ("all-reduce", within): 2 * amount * (near - 1) / near,
        (NETWORK, ("data",)): 2 * amount / near * (shape.slices - 1) / shape.slices,
    }
    return {key: moved for key, moved in sent.items() if moved}


def estimate_memory(setting: Setting) -> dict[str, float]:
    """Returns the bytes of one device by kind: parameters, optimizer, gradients, activations; no fragments counted."""
    config, compute, shape = setting.config, setting.compute, setting.shape
    stored = 0.0
    for path, sizes in setting.params.items():
        axes = [axis for axis in param_spec(path) if axis is not None]
        stored += math.prod(sizes) / math.prod(shape.mesh[axis] for axis in axes)
    tensor = shape.mesh["tensor"]
    tables = sum(math.prod(sizes) for path, sizes in setting.params.items() if path in TABLES) / tensor
    sequence = activation_bytes_per_sequence(config.model, compute, config.compute.loss_chunk, tensor)
    accumulated = 2 if shape.micro_steps > 1 else 1  # what has been summed, and a micro-step's
    return {
        "parameters": 4 * stored,
        "optimizer": OPTIMIZER_BYTES * stored,
        "gradients": 4 * stored * accumulated + 8 * tables,  # and the tables, whole, with their gradient
        "activations": shape.micro_batch * sequence,
    }


def roofline(setting: Setting, chip: Chip, traffic: Traffic) -> Roofline:
    """Returns the least seconds of a step on `chip`, if it sends what `traffic` says."""
    config, compute, shape = setting.config, setting.compute, setting.shape
    devices = math.prod(shape.mesh.values())
    memory = estimate_memory(setting)
    cut = {path: shape.mesh["tensor"] if "tensor" in param_spec(path) else 1 for path in setting.params}
    whole = sum(math.prod(sizes) / cut[path] for path, sizes in setting.params.items())
    weights = shape.micro_steps * 3 * whole * jnp.dtype(compute.dtype).itemsize
    moved = weights + shape.micro_steps * 2 * memory["activations"] + UPDATE_BYTES * memory["parameters"] / 4
    ring = min(2, chip.links) * chip.link_bandwidth
    across = {key: amount for key, amount in traffic.items() if key[0] == NETWORK}
    return Roofline(
        matrix_units=step_flops(config) * (4 / 3 if compute.remat == "full" else 1) / devices / chip.peak_flops,
        memory=moved / chip.memory_bandwidth,
        links=sum(amount for key, amount in traffic.items() if key not in across) / ring,
        network=sum(across.values()) / chip.network_bandwidth,
    )


def step_flops(config: Config) -> float:
    return config.data.global_batch_size * config.model.block_size * train_flops_per_token(config.model)
