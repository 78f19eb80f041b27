"""Compiles the real train step ahead of time, for chips that are elsewhere: TPUs by libtpu, GPUs by jax[cuda]."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gptjax import sharding
from gptjax.chips import GIB, Topology, device_memory, find_chip, gpu_target, local_topology
from gptjax.config import Config
from gptjax.errors import ConfigError, PlanError, UnavailableError
from gptjax.estimate import Setting
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.state import make_init
from gptjax.step import jit_steps


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keeps libtpu's notices on a machine that has no TPU from standard error; it writes there by itself."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
    """A chip that no compiler is here for: enough of a device to resolve a config on it."""

    id: int
    device_kind: str
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {}


def has_compiler(topology: Topology) -> bool:
    """Returns whether steps can be compiled for a topology here; of TPUs yes, or it is an error to ask for a plan."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return topology.is_tpu or topology.is_local or any(map(importlib.util.find_spec, plugins))


def find_local() -> Topology:
    """Returns the topology of the devices of this machine, or of all that this process sees.

    Raises:
        ConfigError: the table of chips has none of their kind.
    """
    devices = jax.devices()
    kind, chip = devices[0].device_kind, find_chip(devices[0].device_kind)
    if chip is None:
        raise ConfigError(f"--topology=local: {len(devices)} x {kind} are here, of which the table of chips has no "
                          "figures; name what you plan for, as in v5e:4x4 or h100:8")  # fmt: skip
    chip = dataclasses.replace(chip, memory_bytes=device_memory(devices[0]))
    return local_topology(chip, len(devices), len({getattr(one, "slice_index", 0) for one in devices}))


def find_devices(topology: Topology) -> list[Any]:
    """Returns the devices of a topology, to compile for; of GPUs that there is no compiler for, absent ones.

    Raises:
        UnavailableError: libtpu is missing.
        ConfigError: the compiler sees another number of devices.
    """
    if topology.is_local:
        return list(jax.devices())
    if not has_compiler(topology):
        return [AbsentDevice(number, topology.chip.kind) for number in range(topology.devices)]
    found = _describe_tpus(topology) if topology.is_tpu else _describe_gpus(topology)
    if len(found) != topology.devices:
        raise ConfigError(f"--topology={topology}: the compiler describes {len(found)} devices for it")
    return found


def _describe_tpus(topology: Topology) -> list[Any]:
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.devices == topology.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)  # of a host that has one chip; others have 2 x 2
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as JAX runs them
    name = f"{topology.kind}:{topology.shape}"
    try:
        with quiet_compiler():
            found: Any = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnavailableError(f"--topology={topology}: the TPU compiler is missing or refuses: {reason}; "
                               "pip install 'gptjax[plan]'") from error  # fmt: skip
    return list(found.devices)


def _describe_gpus(topology: Topology) -> list[Any]:
    shape = f"1x{topology.slices}x{topology.shape}"  # partitions, hosts, GPUs of each
    with quiet_compiler():
        found: Any = topologies.get_topology_desc(
            platform="cuda", topology_name=str(topology), target_config=gpu_target(topology.chip), topology=shape
        )
    return list(found.devices)


def make_mesh(config: Config, topology: Topology) -> Any:
    """Returns the mesh of a topology, of devices to compile for or of absent ones."""
    devices = find_devices(topology)
    if topology.is_tpu or topology.is_local:
        return sharding.make_mesh(config.mesh, devices)
    # Nodes are no slices to JAX before their processes run; in order, `data` goes across them here, too.
    sizes = sharding.mesh_sizes(config.mesh, topology.devices, topology.slices)
    return jax.sharding.Mesh(np.array(devices, object).reshape(sizes), sharding.AXES)


def compile_step(setting: Setting, mesh: Any, *, memory_bytes: float) -> Any:
    """Returns the compiled train step, for devices of so much memory.

    Raises:
        PlanError: it does not fit, by the TPU compiler's own verdict, or by what the GPU compiler laid out.
    """
    config, shape = setting.config, setting.shape
    model, optimizer = GPT(config.model, setting.compute), make_optimizer(config.optim)
    abstract, _ = make_init(model, optimizer, mesh=mesh, seed=0)
    ends = {"eot_id": config.model.vocab_size - 1, "eot_position": "last"}  # of no matter to what it costs
    step: Any = jit_steps(model, optimizer, config, abstract, **ends)[0]
    size = (shape.micro_steps, config.data.global_batch_size // shape.micro_steps, config.model.block_size + 1)
    if config.train.steps_per_dispatch > 1:
        size = (config.train.steps_per_dispatch, *size)
    spec = jax.sharding.PartitionSpec(*[None] * (len(size) - 3), *sharding.BATCH_SPEC)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=jax.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh), quiet_compiler():
        try:
            compiled = step.lower(abstract, tokens).compile()
        except jax.errors.JaxRuntimeError as error:
            overflow = read_overflow(str(error))
            if overflow is None:
                raise
            raise too_large("does not fit", *overflow) from error
    need = peak_bytes(compiled)
    if need > memory_bytes:
        raise too_large("does not fit", need, memory_bytes)
    return compiled


def peak_bytes(compiled: Any) -> float:
    """Returns the most bytes of one device that a compiled program holds at once, its arguments included."""
    stats = compiled.memory_analysis()
    [device, *_] = jax.tree.leaves(compiled.output_shardings)[0].device_set
    # The GPU compiler does not tell it, and the CPU's leaves temporaries out.
    peak = stats.peak_memory_in_bytes if device.platform == "tpu" else 0
    laid_out = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return (peak or laid_out + stats.temp_size_in_bytes) + stats.generated_code_size_in_bytes


def read_overflow(message: str) -> tuple[float, float] | None:
    """Returns (bytes needed, bytes there) of what the TPU compiler says when a program is too large, else None."""
    size = r"([\d.]+)([MG])"
    found = re.search(
        rf"Used {size} of {size} hbm|HLO temporaries \({size}\) exceeds available HBM \({size}\)", message
    )
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    need, need_unit, have, have_unit = (part for part in found.groups() if part)
    unit = {"M": 2**20, "G": 2**30}
    return float(need) * unit[need_unit], float(have) * unit[have_unit]


def too_large(what: str, need: float, have: float) -> PlanError:
    return PlanError(f"{what}: needs {need / GIB:.2f} GiB a device, {have / GIB:.2f} are there, "
                     f"{(need - have) / GIB:.2f} too few")  # fmt: skip
