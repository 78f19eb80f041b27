"""Estimates a run by formulas: memory, FLOPs, bytes between chips, and the least time of a step."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from gptjax.chips import Chip
from gptjax.collectives import Parallel
from gptjax.compute import ResolvedCompute
from gptjax.config import Config
from gptjax.params import Param, find
from gptjax.plan.traffic import NETWORK
from gptjax.sharding import AXES
from gptjax.sizes import activation_bytes_per_sequence, train_flops_per_token

# Bytes per parameter
FLOAT32_BYTES = 4
OPTIMIZER_BYTES = 8  # the two float32 moments of AdamW, the most that an optimizer here keeps
UPDATE_BYTES = 28  # memory traffic of an AdamW update: reads the gradient, reads and writes parameter and two moments

Traffic = dict[tuple[str, tuple[str, ...]], float]  # (kind, mesh axes) -> bytes that a device sends per step


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """How a step is divided among devices and accumulation steps.

    Attributes:
        mesh: the size of each mesh axis.
        num_microbatches: accumulation steps of one update.
        micro_batch: sequences per data-parallel rank and accumulation step.
        slices: TPU slices, or GPU nodes, that the network joins.
    """

    mesh: Mapping[str, int]
    num_microbatches: int
    micro_batch: int
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config on a mesh, with everything that the formulas need."""

    config: Config
    compute: ResolvedCompute
    parallel: Parallel
    shape: StepLayout
    params: dict[str, tuple[int, ...]]  # the shape of each parameter by path


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds of a step by resource. The step cannot be faster than the slowest of them."""

    matrix_units: float
    memory: float  # an estimate: weights, activations and the update, each moved once
    links: float  # an estimate: rings over both directions of each torus dimension of an axis
    network: float

    @property
    def bound(self) -> str:
        """The name of the slowest resource."""
        times = dataclasses.asdict(self)
        return max(times, key=times.__getitem__)

    @property
    def seconds(self) -> float:
        """The time of the slowest resource, which is the least that a step takes."""
        return max(dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The shares of its peaks that a step reaches. Assumed, not measured: the first run shows the real ones."""

    matrix_units: float
    memory: float
    links: float
    network: float
    exposed_communication: float  # the share that computation does not hide

    def seconds(self, roof: Roofline) -> float:
        """Returns the time of a step, whose matmuls and element-wise kernels run one after the other."""
        computation = roof.matrix_units / self.matrix_units + roof.memory / self.memory
        communication = roof.links / self.links + roof.network / self.network
        return computation + self.exposed_communication * communication


TYPICAL = Efficiency(
    matrix_units=0.6,
    memory=0.6,
    links=0.7,
    network=0.6,
    exposed_communication=0.5,
)


def minimum_traffic(setting: Candidate) -> Traffic:
    """Returns a lower bound on the bytes that a device sends per step, with ring collectives.

    Each micro-batch all-gathers weights twice, forward and backward, and reduce-scatters their gradients. Tables are
    all-gathered once per step.
    Weights and gradients travel in the compute and reduce dtypes, gradients of tables in their own. Source of the costs
    of a ring: Patarasuk and Yuan 2009, "Bandwidth Optimal All-reduce Algorithms", section 3.
    """
    traffic: Traffic = {}
    for path, sizes in setting.params.items():
        _add(traffic, _parameter_traffic(setting, find(path), sizes))
    _add(traffic, _activation_traffic(setting))
    return traffic


def _add(total: Traffic, part: Traffic) -> None:
    """Adds `part` to `total` in place, without the entries that are 0."""
    for key, sent in part.items():
        if sent:
            total[key] = total.get(key, 0.0) + sent


def _parameter_traffic(
    setting: Candidate,
    param: Param,
    sizes: tuple[int, ...],
) -> Traffic:
    """Returns the traffic of one parameter of shape `sizes`: its FSDP collectives and its gradient's all-reduce."""
    shape = setting.shape
    is_table = param.role == "table"
    elements = math.prod(sizes)
    if "tensor" in param.spec:
        elements /= shape.mesh["tensor"]
    parallel = setting.parallel
    gathered = elements * jnp.dtype(parallel.dtype).itemsize
    reduce_dtype = parallel.table_reduce_dtype if is_table else parallel.reduce_dtype
    reduced = elements * jnp.dtype(reduce_dtype).itemsize
    traffic: Traffic = {}
    if "fsdp" in param.spec:
        fsdp = shape.mesh["fsdp"]
        gathers = 1 if is_table else 2 * shape.num_microbatches
        scatters = 1 if is_table else shape.num_microbatches
        traffic["all-gather", ("fsdp",)] = gathers * gathered * (fsdp - 1) / fsdp
        traffic["reduce-scatter", ("fsdp",)] = scatters * reduced * (fsdp - 1) / fsdp
        reduced /= fsdp  # the reduce-scatter has summed the gradient over `fsdp`, and left a shard
    unsharded = tuple(axis for axis in AXES if axis not in param.spec)
    return traffic | hierarchical_all_reduce(shape, unsharded, reduced)


def _activation_traffic(setting: Candidate) -> Traffic:
    """Returns the traffic of sequence parallelism.

    Attention and MLP each all-gather the sequence before their first matmul and reduce-scatter it after the last; the
    backward pass does the transposes. The embedding lookup and the head add one of each. Remat repeats the layer's
    collectives, except the MLP's reduce-scatter.
    """
    model = setting.config.model
    shape = setting.shape
    tensor = shape.mesh["tensor"]
    tokens = shape.num_microbatches * shape.micro_batch * model.block_size
    activations = tokens * model.n_embd * jnp.dtype(setting.parallel.dtype).itemsize
    has_remat = setting.compute.remat != "none"
    gathers = 6 if has_remat else 4
    scatters = 5 if has_remat else 4
    return {
        ("all-gather", ("tensor",)): (gathers * model.n_layer + 2) * activations * (tensor - 1) / tensor,
        ("reduce-scatter", ("tensor",)): (scatters * model.n_layer + 2) * activations * (tensor - 1) / tensor,
    }


def hierarchical_all_reduce(
    shape: StepLayout,
    axes: tuple[str, ...],
    amount: float,
) -> Traffic:
    """Returns the bytes that a device sends to all-reduce `amount` bytes over `axes`, which include `data`.

    With several slices the sum is reduce-scattered within a slice, all-reduced across slices, and all-gathered within a
    slice. The two steps within a slice count as one all-reduce.
    """
    local_devices = math.prod(shape.mesh[axis] for axis in axes) // shape.slices
    local_axes = []
    for axis in axes:
        local_size = shape.mesh[axis] // shape.slices if axis == "data" else shape.mesh[axis]
        if local_size > 1:
            local_axes.append(axis)
    sent = {
        ("all-reduce", tuple(local_axes)): 2 * amount * (local_devices - 1) / local_devices,
        (NETWORK, ("data",)): 2 * amount / local_devices * (shape.slices - 1) / shape.slices,
    }
    return {key: moved for key, moved in sent.items() if moved}


def estimate_memory(setting: Candidate) -> dict[str, float]:
    """Returns the bytes of one device by kind: parameters, optimizer, gradients, activations; no fragments counted."""
    config = setting.config
    shape = setting.shape
    tensor = shape.mesh["tensor"]
    local_params = 0.0  # of this device
    table_params = 0.0  # all-gathered over `fsdp`
    for path, sizes in setting.params.items():
        param = find(path)
        elements = math.prod(sizes)
        sharded = [shape.mesh[axis] for axis in param.spec if axis is not None]
        local_params += elements / math.prod(sharded)
        if param.role == "table":
            table_params += elements / tensor
    # Accumulation keeps the summed gradients, and those of the current micro-batch.
    gradient_buffers = 2 if shape.num_microbatches > 1 else 1
    gathered_tables = 2 * FLOAT32_BYTES * table_params  # and their gradients
    sequence_bytes = activation_bytes_per_sequence(
        config.model,
        setting.compute,
        config.compute.loss_chunk,
        tensor=tensor,
    )
    return {
        "parameters": FLOAT32_BYTES * local_params,
        "optimizer": (OPTIMIZER_BYTES + average_bytes(config)) * local_params,
        "gradients": FLOAT32_BYTES * local_params * gradient_buffers + gathered_tables,
        "activations": shape.micro_batch * sequence_bytes,
    }


def average_bytes(config: Config) -> int:
    """Returns the bytes per parameter of the moving average."""
    return FLOAT32_BYTES if config.optim.ema_decay else 0


def roofline(setting: Candidate, chip: Chip, traffic: Traffic) -> Roofline:
    """Returns the least seconds of a step on `chip`, with `traffic` between the devices."""
    network_bytes = 0.0
    link_bytes = 0.0
    for (kind, _), sent in traffic.items():
        if kind == NETWORK:
            network_bytes += sent
        else:
            link_bytes += sent
    devices = math.prod(setting.shape.mesh.values())
    # Full remat repeats the forward pass, a third of a step's FLOPs.
    repeated = 4 / 3 if setting.compute.remat == "full" else 1
    return Roofline(
        matrix_units=step_flops(setting.config) * repeated / devices / chip.peak_flops,
        memory=_memory_traffic(setting) / chip.memory_bandwidth,
        links=link_bytes / chip.ring_bandwidth,
        network=network_bytes / chip.network_bandwidth,
    )


def _memory_traffic(setting: Candidate) -> float:
    """Returns the bytes that a device reads and writes per step.

    Each micro-batch reads the all-gathered weights three times (forward, and for both gradients of a matmul), and
    writes and reads its activations.
    """
    shape = setting.shape
    memory = estimate_memory(setting)
    gathered_params = 0.0
    for path, sizes in setting.params.items():
        shards = shape.mesh["tensor"] if "tensor" in find(path).spec else 1
        gathered_params += math.prod(sizes) / shards
    weights = shape.num_microbatches * 3 * gathered_params * jnp.dtype(setting.compute.dtype).itemsize
    activations = shape.num_microbatches * 2 * memory["activations"]
    update = UPDATE_BYTES * memory["parameters"] / FLOAT32_BYTES
    return weights + activations + update


def step_flops(config: Config) -> float:
    """Returns the FLOPs of one update on all devices, remat not counted."""
    tokens = config.data.global_batch_size * config.model.block_size
    return tokens * train_flops_per_token(config.model)
