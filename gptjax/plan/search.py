"""Plans one config on one topology, and searches for the fastest mesh, micro-batch size and remat policy."""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gptjax import config as config_module
from gptjax import setup, sharding
from gptjax.chips import GIB
from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import Config
from gptjax.errors import PlanError
from gptjax.params import leaf_shape, rows
from gptjax.plan import aot, estimate, report
from gptjax.plan.topology import Topology

log = logging.getLogger("gptjax")
MEMORY_SHARE = 0.9  # of the memory that a candidate may need by the formulas; the compiler's layout needs more
LARGEST_MICRO_BATCH = 64
REMATS = ("none", "full")
SHOWN = 10  # candidates in the table of a search
COMPILED = 2  # candidates that a search compiles, the fastest by the formulas


def make_setting(
    config: Config,
    topology: Topology,
    mesh: Any,
) -> estimate.Candidate:
    """Returns the candidate of `config` on `mesh`, real or of a topology.

    Raises:
        ConfigError: the mesh does not divide the batch or the model.
    """
    compute = resolve_compute(config, mesh)
    tree = sharding.abstract_params(config.model)
    shardings = sharding.param_shardings(tree, mesh)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings,
    )
    optimizer_share = (estimate.OPTIMIZER_BYTES + estimate.average_bytes(config)) / estimate.FLOAT32_BYTES
    state_bytes = (1 + optimizer_share) * sharding.bytes_per_device(placed)
    num_microbatches = setup.choose_num_microbatches(config, compute, mesh, state_bytes=int(state_bytes))
    sequences = config.data.global_batch_size // num_microbatches
    shape = estimate.StepLayout(
        mesh=dict(mesh.shape),
        num_microbatches=num_microbatches,
        micro_batch=sequences // sharding.data_parallel_size(mesh),
        slices=topology.slices,
    )
    return estimate.Candidate(
        config=config,
        compute=compute,
        parallel=resolve_parallel(config, mesh),
        shape=shape,
        params=param_shapes(config),
    )


def plan(
    config: Config,
    topology: Topology,
    args: argparse.Namespace,
    *,
    remedy: bool = True,
) -> dict[str, Any]:
    """Returns the report of one config on one topology.

    Raises:
        PlanError: it does not fit; the message has the shortfall and, with `remedy`, names a candidate that fits.
    """
    mesh = aot.make_mesh(config, topology)
    setting = make_setting(config, topology, mesh)
    try:
        compiled = _compile(setting, topology, mesh, name=args.config)
    except PlanError as error:
        if not remedy:
            raise
        fits = nearest_that_fits(config, topology)
        raise PlanError.about(f"{args.config} on {topology}", error, remedy=fits) from error
    return make_report(setting, topology, args, compiled=compiled)


def _compile(
    setting: estimate.Candidate,
    topology: Topology,
    mesh: Any,
    *,
    name: str,
) -> Any:
    """Returns the compiled train step, or None where the topology has no compiler here.

    Raises:
        PlanError: it does not fit, according to the compiler or, without one, to the formulas.
    """
    if not aot.has_compiler(topology):
        need = analytic_bytes(setting)
        if need > topology.memory_bytes:
            raise aot.out_of_memory_error("does not fit, by the formulas", need, topology.memory_bytes)
        return None
    start = time.perf_counter()
    log.info("compiling %s for %s ...", name, topology)
    compiled = aot.compile_step(setting, mesh, memory_bytes=topology.memory_bytes)
    log.info("compiled in %.0f s", time.perf_counter() - start)
    return compiled


def make_report(
    setting: estimate.Candidate,
    topology: Topology,
    args: argparse.Namespace,
    *,
    compiled: Any,
) -> dict[str, Any]:
    """Returns the report of one candidate; `compiled` is None for a plan by formulas only."""
    figures = report.make_report(
        setting,
        topology,
        compiled,
        target_tokens=args.target_tokens,
        price_per_chip_hour=args.price_per_chip_hour,
    )
    return {"config": args.config} | figures


def analytic_bytes(setting: estimate.Candidate) -> float:
    """Returns the bytes per device that a candidate needs by the formulas."""
    return sum(estimate.estimate_memory(setting).values())


def candidates(
    config: Config,
    topology: Topology,
    params: dict[str, tuple[int, ...]],
) -> Iterator[estimate.Candidate]:
    """Yields `config` with every mesh, micro-batch and remat that divides, within limits."""
    # The formulas use only those fields of ResolvedCompute that do not depend on the mesh, so one device suffices.
    one_device = _one_device_mesh(topology)
    configs = {remat: with_remat(config, remat) for remat in REMATS}
    computes = {remat: resolve_compute(configs[remat], one_device) for remat in REMATS}
    parallel = resolve_parallel(config, one_device)  # the formulas use its dtypes only
    for mesh in _meshes(config, topology):
        if not sharding.divides(params, mesh):
            continue
        rank_sequences = config.data.global_batch_size // (mesh["data"] * mesh["fsdp"])
        for micro_batch, remat in itertools.product(_micro_batches(rank_sequences), REMATS):
            shape = estimate.StepLayout(
                mesh=mesh,
                num_microbatches=rank_sequences // micro_batch,
                micro_batch=micro_batch,
                slices=topology.slices,
            )
            train = dataclasses.replace(config.train, micro_batch_size=micro_batch)
            mesh_config = config_module.MeshConfig(**mesh)
            yield estimate.Candidate(
                config=dataclasses.replace(
                    configs[remat],
                    mesh=mesh_config,
                    train=train,
                ),
                compute=computes[remat],
                parallel=parallel,
                shape=shape,
                params=params,
            )


def _one_device_mesh(topology: Topology) -> jax.sharding.Mesh:
    platform = "tpu" if topology.is_tpu else "gpu"
    device = aot.VirtualDevice(0, topology.chip.kind, platform)
    grid = np.array([[[device]]], object)
    return jax.sharding.Mesh(grid, sharding.AXES)


def _meshes(config: Config, topology: Topology) -> Iterator[dict[str, int]]:
    """Yields the meshes of a topology that divide the global batch, the heads and the sequence."""
    devices = topology.devices
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    tensor_limit = math.gcd(config.model.n_head, config.model.block_size)
    for fsdp, tensor in itertools.product(divisors, divisors):
        if devices % (fsdp * tensor) or tensor_limit % tensor:
            continue
        data = devices // (fsdp * tensor)
        if data % topology.slices or config.data.global_batch_size % (data * fsdp):
            continue
        yield {"data": data, "fsdp": fsdp, "tensor": tensor}


def _micro_batches(rank_sequences: int) -> Iterator[int]:
    """Yields the powers of two, up to LARGEST_MICRO_BATCH, that divide a rank's sequences."""
    micro_batch = 1
    while micro_batch <= LARGEST_MICRO_BATCH:
        if rank_sequences % micro_batch == 0:
            yield micro_batch
        micro_batch *= 2


def with_remat(config: Config, remat: str) -> Config:
    """Returns `config` with another compute.remat."""
    compute = dataclasses.replace(config.compute, remat=remat)
    return dataclasses.replace(config, compute=compute)


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter, by its path."""
    return {param.path: leaf_shape(param, config.model) for param in rows(config.model)}


def analytic_seconds(setting: estimate.Candidate, topology: Topology) -> float:
    """Returns the least seconds of a step by the formulas, with no communication hidden behind computation.

    The roofline alone would not distinguish two candidates with the same bound; this prefers the one with less to hide.
    """
    roof = estimate.roofline(setting, topology.chip, estimate.minimum_traffic(setting))
    return max(roof.matrix_units, roof.memory) + roof.links + roof.network


def rank(config: Config, topology: Topology) -> list[tuple[float, estimate.Candidate]]:
    """Returns (seconds per step by the formulas, candidate) of all that should fit, the fastest first.

    Of equally fast candidates, the one with the fewest micro-batches comes first.
    """
    available = MEMORY_SHARE * topology.memory_bytes
    timed = []
    for setting in candidates(config, topology, param_shapes(config)):
        if analytic_bytes(setting) < available:
            timed.append((analytic_seconds(setting, topology), setting))
    return sorted(timed, key=lambda pair: (pair[0], pair[1].shape.num_microbatches))


def overrides(setting: estimate.Candidate) -> str:
    """Returns the flags that set the fields which a search chooses."""
    config = setting.config
    values: dict[str, Any] = {f"mesh.{axis}": size for axis, size in setting.shape.mesh.items()}
    values["train.micro_batch_size"] = config.train.micro_batch_size
    values["compute.remat"] = config.compute.remat
    return " ".join(f"--config.{name}={value}" for name, value in values.items())


def nearest_that_fits(config: Config, topology: Topology) -> str:
    """Returns, as text, the nearest candidate that fits where `config` does not, compiled where that is possible.

    A candidate with the same mesh is nearer than one with another; then one with the same remat; then a faster one.
    """
    by_distance = _by_distance(config, topology)
    # The compiler's layout needs more than the formulas say, so the smallest candidate is the last resort.
    smallest = sorted(by_distance, key=analytic_bytes)[:1]
    for setting in by_distance[:COMPILED] + smallest:
        if not aot.has_compiler(topology):
            return f"by the formulas this fits: {overrides(setting)}"
        mesh = aot.make_mesh(setting.config, topology)
        with contextlib.suppress(PlanError):
            # Made from its config as a run makes it, which may resolve "auto" differently than the formulas.
            as_trained = make_setting(setting.config, topology, mesh)
            aot.compile_step(as_trained, mesh, memory_bytes=topology.memory_bytes)
            return f"this fits (compiled): {overrides(setting)}"
    return "nothing was found that fits: take more chips, or a smaller data.global_batch_size"


def _by_distance(config: Config, topology: Topology) -> list[estimate.Candidate]:
    """Returns the candidates that should fit, the nearest to `config` first."""
    sizes = sharding.mesh_sizes(config.mesh, topology.devices, topology.slices)
    mesh = dict(zip(sharding.AXES, sizes, strict=True))

    def distance(setting: estimate.Candidate) -> tuple[bool, bool]:
        differs_in_mesh = setting.shape.mesh != mesh
        differs_in_remat = setting.config.compute.remat != config.compute.remat
        return differs_in_mesh, differs_in_remat

    fastest_first = [setting for _, setting in rank(config, topology)]
    return sorted(fastest_first, key=distance)


def search(
    config: Config,
    topology: Topology,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the report of the fastest candidate that fits, with the ranking; logs the table.

    Raises:
        PlanError: nothing fits.
    """
    ranked = rank(config, topology)
    _log_table(ranked)
    reports = []
    for _, setting in ranked[:COMPILED]:
        try:
            found = plan(setting.config, topology, args, remedy=False)
        except PlanError as error:
            log.info("  %s: %s", overrides(setting), error)
            continue
        reports.append(found | {"overrides": overrides(setting)})
        if not aot.has_compiler(topology):
            break  # the formulas have ranked the candidates already
    if not reports:
        raise PlanError(nearest_that_fits(config, topology), field=f"{args.config} on {topology}")
    best = min(reports, key=lambda found: found["seconds"]["step"])
    shown = [{"seconds": seconds, "overrides": overrides(setting)} for seconds, setting in ranked[:SHOWN]]
    return best | {"ranked": shown}


def _log_table(ranked: list[tuple[float, estimate.Candidate]]) -> None:
    log.info("%d candidates should fit; estimated ms per step, communication not overlapped:", len(ranked))
    log.info(f"  {'data':>5} {'fsdp':>5} {'tensor':>6} {'micro-batch':>11} {'remat':>6} {'ms':>9} {'GiB':>6}")
    for seconds, setting in ranked[:SHOWN]:
        log.info(
            "  %5d %5d %6d %11d %6s %9.2f %6.2f",
            setting.shape.mesh["data"],
            setting.shape.mesh["fsdp"],
            setting.shape.mesh["tensor"],
            setting.shape.micro_batch,
            setting.compute.remat,
            1e3 * seconds,
            analytic_bytes(setting) / GIB,
        )
