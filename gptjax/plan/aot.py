"""Compiles the real train step ahead of time, for chips that this machine lacks: TPUs by libtpu, GPUs by jax[cuda]."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from gptjax import sharding
from gptjax.chips import GIB, device_memory, find_chip
from gptjax.config import Config
from gptjax.dispatch import abstract_tokens
from gptjax.documents import EndOfText
from gptjax.errors import ConfigError, PlanError, UnavailableError, install, one_line
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.plan.estimate import Candidate
from gptjax.plan.topology import Topology, gpu_target, local_topology
from gptjax.state import make_init
from gptjax.step import jit_steps

GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # the packages of jax[cuda]; either has XLA's GPU compiler
UNIT_BYTES = {"M": 2**20, "G": 2**30}  # in the TPU compiler's messages


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Suppresses standard error, where libtpu prints notices on a machine that has no TPU.

    libtpu writes to file descriptor 2 itself, so replacing sys.stderr would not suppress them.
    """
    saved = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


@dataclasses.dataclass(frozen=True)
class VirtualDevice:
    """A chip for which this machine has no compiler: enough of a device to resolve a config for it."""

    id: int
    device_kind: str
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        """Returns no statistics, as an absent device has none."""
        return {}


def has_compiler(topology: Topology) -> bool:
    """Returns whether this machine can compile for a topology.

    It is True for TPUs without a look: a plan for TPUs without libtpu is an error of `find_devices`, while a plan for
    GPUs without their compiler uses formulas.
    """
    if topology.is_tpu or topology.is_local:
        return True
    return any(importlib.util.find_spec(plugin) is not None for plugin in GPU_PLUGINS)


def find_local() -> Topology:
    """Returns the topology of the devices that this process sees.

    Raises:
        ConfigError: the table of chips does not have their kind.
    """
    devices = jax.devices()
    kind = devices[0].device_kind
    chip = find_chip(kind)
    if chip is None:
        raise ConfigError(
            f"this machine has {len(devices)} x {kind}, and the table of chips has no figures for them",
            field="--topology",
            value="local",
            remedy="name a topology to plan for, as v5e:4x4 or h100:8",
        )
    chip = dataclasses.replace(chip, memory_bytes=device_memory(devices[0]))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    return local_topology(chip, len(devices), len(slices))


def find_devices(topology: Topology) -> list[Any]:
    """Returns the devices of a topology to compile for; virtual ones for GPUs that have no compiler here.

    Raises:
        UnavailableError: libtpu is missing.
        ConfigError: the compiler describes another number of devices.
    """
    if topology.is_local:
        return list(jax.devices())
    if not has_compiler(topology):
        return [VirtualDevice(number, topology.chip.kind) for number in range(topology.devices)]
    found = _describe_tpus(topology) if topology.is_tpu else _describe_gpus(topology)
    if len(found) != topology.devices:
        raise ConfigError(
            f"the compiler describes {len(found)} devices for it, not {topology.devices}",
            field="--topology",
            value=_flag_value(topology),
        )
    return found


def _flag_value(topology: Topology) -> str:
    return f"{topology.kind}:{topology.shape}"


def _describe_tpus(topology: Topology) -> list[Any]:
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.devices == topology.slices:
        # The default host has 2 x 2 chips; a slice of one chip has a host of one chip.
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as JAX runs them
    name = _flag_value(topology)
    try:
        with quiet_compiler():
            found: Any = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UnavailableError(
            f"the TPU compiler is missing or refuses: {one_line(error)}",
            field="--topology",
            value=name,
            remedy=install("plan"),
        ) from error
    return list(found.devices)


def _describe_gpus(topology: Topology) -> list[Any]:
    shape = f"1x{topology.slices}x{topology.shape}"  # partitions, hosts per partition, GPUs per host
    with quiet_compiler():
        found: Any = topologies.get_topology_desc(
            platform="cuda",
            topology_name=str(topology),
            target_config=gpu_target(topology.chip),
            topology=shape,
        )
    return list(found.devices)


def make_mesh(config: Config, topology: Topology) -> Any:
    """Returns the mesh of a topology: of devices to compile for, or of virtual ones.

    Raises:
        UserError: the topology cannot be described, or the mesh does not fit it.
    """
    devices = find_devices(topology)
    if topology.is_tpu or topology.is_local:
        return sharding.make_mesh(config.mesh, devices)
    # Before its processes run, JAX does not see GPU nodes as slices. The devices are ordered by node, so that `data`,
    # the outermost axis, spans the nodes here as it does in the run.
    sizes = sharding.mesh_sizes(config.mesh, topology.devices, topology.slices)
    grid = np.array(devices, object).reshape(sizes)
    return jax.sharding.Mesh(grid, sharding.AXES)


def compile_step(
    setting: Candidate,
    mesh: Any,
    *,
    memory_bytes: float,
) -> Any:
    """Returns the compiled train step, for devices that each have `memory_bytes`.

    Raises:
        PlanError: it does not fit, according to the TPU compiler or to the GPU compiler's memory layout.
    """
    lowered = _lower_step(setting, mesh)
    with quiet_compiler():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            overflow = parse_oom(str(error))
            if overflow is None:
                raise
            need, have = overflow
            raise out_of_memory_error("does not fit", need, have) from error
    need = peak_bytes(compiled)
    if need > memory_bytes:
        raise out_of_memory_error("does not fit", need, memory_bytes)
    return compiled


def _lower_step(setting: Candidate, mesh: Any) -> Any:
    config = setting.config
    model = GPT(config.model, setting.compute, setting.parallel)
    optimizer = make_optimizer(config.optim)
    abstract_state, _ = make_init(model, optimizer, mesh=mesh, seed=0, has_average=config.optim.ema_decay > 0)
    eot = EndOfText(config.model.vocab_size - 1, "last")  # any token costs the same
    train_step: Any = jit_steps(
        model,
        optimizer,
        config,
        abstract=abstract_state,
        eot=eot,
    )[0]
    # The figures are those of one step. A dispatch of several steps loops over this program, and holds their tokens.
    tokens = abstract_tokens(
        config,
        mesh,
        num_microbatches=setting.shape.num_microbatches,
        steps_per_dispatch=1,
    )
    with quiet_compiler():
        return train_step.lower(abstract_state, tokens)


def peak_bytes(compiled: Any) -> float:
    """Returns the most bytes that a compiled program holds on one device at once, its arguments included."""
    stats = compiled.memory_analysis()
    shardings = jax.tree.leaves(compiled.output_shardings)
    device = next(iter(shardings[0].device_set))
    # Only the TPU compiler's peak is usable: the GPU compiler reports none, and the CPU's leaves temporaries out.
    peak = stats.peak_memory_in_bytes if device.platform == "tpu" else 0
    if not peak:
        # Donated arguments share their buffers with results, and count once.
        arguments_and_results = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = arguments_and_results + stats.temp_size_in_bytes
    return peak + stats.generated_code_size_in_bytes


def parse_oom(message: str) -> tuple[float, float] | None:
    """Returns (bytes needed, bytes available) from the TPU compiler's out-of-memory error, None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([MG])"
    total = rf"Used {size} of {size} hbm"
    temporaries = rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)"
    found = re.search(f"{total}|{temporaries}", message)
    if found is None:
        return None
    need, need_unit, have, have_unit = (part for part in found.groups() if part)
    return float(need) * UNIT_BYTES[need_unit], float(have) * UNIT_BYTES[have_unit]


def out_of_memory_error(what: str, need: float, have: float) -> PlanError:
    """Returns the error of a program that needs `need` bytes of a device, and the device has `have`."""
    short = need - have
    return PlanError(
        f"{what}: needs {need / GIB:.2f} GiB per device, {have / GIB:.2f} available ({short / GIB:.2f} short)"
    )
