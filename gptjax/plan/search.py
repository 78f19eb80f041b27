"""What a run needs on chips that are not here: memory, communication, time and cost, before anything is rented.

    python -m gptjax.plan --config=configs/gpt2_xl.py --topology=v5e:16x16 --config.mesh.fsdp=64
    python -m gptjax.plan --config=configs/gpt2_small.py --topology=v5p:4x4x4 --search

The real train step is compiled by the real TPU compiler (pip install 'gptjax[plan]'); no TPU is needed. For GPUs, as
--topology=h100:8 --slices=4 for four nodes of eight, it is compiled where 'gptjax[cuda]' is installed, no GPU needed
either; else the figures come from formulas and say so. --topology=local plans for the devices of this machine.
"""

from __future__ import annotations  # Config in a signature would need nothing, but jax's types would load it

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from etils import epy

from gptjax import config as config_module
from gptjax import runtime
from gptjax.chips import GIB, Topology, parse_topology
from gptjax.config import Config
from gptjax.errors import ConfigError, PlanError

with epy.lazy_imports():  # so that a wrong flag exits before anything large loads
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptjax import aot, estimate, report, run, sharding
    from gptjax import model as gpt

log = logging.getLogger("gptjax")
LIBTPU = {  # on a machine without TPUs, else it asks a server for what it is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
}
FULL = 0.9  # of the memory, by the formulas: beyond, a setting is not worth compiling
LARGEST_MICRO_BATCH = 64
SHOWN = 10
COMPILED = 2  # of the settings that a search finds, so many are compiled


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """Returns the command line and the config, checked as far as that needs no compiler."""
    parser = runtime.Parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/gpt2_small.py")
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE", help="v5e:4x4, v5p:4x4x4, h100:8, or local")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices, or GPU nodes, joined by the network")
    parser.add_argument("--target_tokens", type=float, default=0, help="to train on; by default the config's steps")
    parser.add_argument("--price_per_chip_hour", type=float, default=0, help="in your currency, for the cost")
    parser.add_argument("--search", action="store_true", help="rank meshes, micro-batches and remat that fit")
    parser.add_argument("--json", default="", metavar="FILE", help="write the report there, too")
    args, rest = parser.parse_known_args(arguments)
    for name in ("slices", "target_tokens", "price_per_chip_hour"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= (name == "slices")):
            raise ConfigError(f"--{name}={value}: must be a positive number")
    return args, config_module.load(args.config, runtime.parse_overrides(parser, rest))


def make_setting(config: Config, topology: Topology, mesh: Any) -> estimate.Setting:
    """Returns the setting of `config` on `mesh`, real or of a topology.

    Raises:
        ConfigError: mesh, batch or model do not divide.
    """
    compute, tree = gpt.resolve_compute(config, mesh), param_tree(config)
    shardings = sharding.param_shardings(tree, mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
    stored = (1 + estimate.OPTIMIZER_BYTES / 4) * sharding.bytes_per_device(placed)
    micro_steps = run.choose_micro_steps(config, compute, mesh, state_bytes=int(stored))
    micro_batch = config.data.global_batch_size // micro_steps // sharding.data_parallel_size(mesh)
    params = shapes_by_path(tree)
    shape = estimate.Shape(dict(mesh.shape), micro_steps, micro_batch, topology.slices)
    return estimate.Setting(config, compute, shape, params)


def plan(config: Config, topology: Topology, args: argparse.Namespace, *, remedy: bool = True) -> dict[str, Any]:
    """Returns the report of one config on one topology.

    Raises:
        PlanError: it does not fit; the message says by how much and, with `remedy`, names a setting that does.
    """
    mesh = aot.make_mesh(config, topology)
    setting = make_setting(config, topology, mesh)
    start = time.perf_counter()
    try:
        if not aot.has_compiler(topology):
            need, have = analytic_bytes(setting), topology.chip.memory_bytes
            if need > have:
                raise aot.too_large("does not fit, by the formulas", need, have)
            return make_report(setting, topology, None, args)
        log.info("compiling %s for %s ...", args.config, topology)
        compiled = aot.compile_step(setting, mesh, memory_bytes=topology.chip.memory_bytes)
    except PlanError as error:
        if not remedy:
            raise
        raise PlanError(f"{args.config} on {topology}: {error}; {nearest_that_fits(config, topology)}") from error
    log.info("compiled in %.0f s", time.perf_counter() - start)
    return make_report(setting, topology, compiled, args)


def make_report(setting: estimate.Setting, topology: Topology, compiled: Any, args: argparse.Namespace) -> Any:
    chosen = {"target_tokens": args.target_tokens, "price_per_chip_hour": args.price_per_chip_hour}
    return {"config": args.config} | report.make_report(setting, topology, compiled, **chosen)


def analytic_bytes(setting: estimate.Setting) -> float:
    return sum(estimate.estimate_memory(setting).values())


def candidates(config: Config, topology: Topology, params: dict[str, tuple[int, ...]]) -> Iterator[estimate.Setting]:
    """Yields `config` with every mesh, micro-batch and remat that divides, within limits."""
    count, cut = topology.devices, math.gcd(config.model.n_head, config.model.block_size)
    device = np.array([aot.AbsentDevice(0, topology.chip.kind, "tpu" if topology.is_tpu else "gpu")], object)
    one = jax.sharding.Mesh(device.reshape(1, 1, 1), sharding.AXES)
    remats = {remat: with_remat(config, remat) for remat in ("none", "full")}
    computes = {remat: gpt.resolve_compute(changed, one) for remat, changed in remats.items()}
    for fsdp, tensor in itertools.product(*[[n for n in range(1, count + 1) if count % n == 0]] * 2):
        data, parts = count // (fsdp * tensor), count // tensor
        mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
        share, rest = divmod(config.data.global_batch_size, parts)
        if count % (fsdp * tensor) or rest or not share or cut % tensor or data % topology.slices:
            continue
        if not sharding.divides(params, mesh):
            continue
        for micro, remat in itertools.product((2**n for n in range(LARGEST_MICRO_BATCH.bit_length())), remats):
            if share % micro == 0:
                train = dataclasses.replace(config.train, micro_batch_size=micro)
                changed = dataclasses.replace(remats[remat], mesh=config_module.MeshConfig(**mesh), train=train)
                shape = estimate.Shape(mesh, share // micro, micro, topology.slices)
                yield estimate.Setting(changed, computes[remat], shape, params)


def with_remat(config: Config, remat: str) -> Config:
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))


def param_tree(config: Config) -> Any:
    """Returns the parameters as shapes."""
    tokens = jnp.zeros((1, config.model.block_size), jnp.int32)
    return jax.eval_shape(gpt.GPT(config.model).init, jax.random.key(0), tokens)["params"]


def shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    return {sharding.path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def analytic_seconds(setting: estimate.Setting, topology: Topology) -> float:
    """Returns the least seconds of a step by the formulas, if communication is not hidden behind computation at all.

    Of two settings that the same thing bounds, this tells the one that leaves less to be hidden.
    """
    roof = estimate.roofline(setting, topology.chip, estimate.minimum_traffic(setting))
    return max(roof.matrix_units, roof.memory) + roof.links + roof.network


def rank(config: Config, topology: Topology) -> list[tuple[float, estimate.Setting]]:
    """Returns (seconds a step by the formulas, setting) of all that should fit: fastest first, fewest micro-steps."""
    room = FULL * topology.chip.memory_bytes
    found = [s for s in candidates(config, topology, shapes_by_path(param_tree(config))) if analytic_bytes(s) < room]
    timed = ((analytic_seconds(s, topology), s) for s in found)
    return sorted(timed, key=lambda pair: (pair[0], pair[1].shape.micro_steps))


def overrides(setting: estimate.Setting) -> str:
    """Returns the flags that set what a search chooses."""
    c, mesh = setting.config, setting.shape.mesh
    values = {f"mesh.{axis}": size for axis, size in mesh.items()}
    values |= {"train.micro_batch_size": c.train.micro_batch_size, "compute.remat": c.compute.remat}
    return " ".join(f"--config.{name}={value}" for name, value in values.items())


def nearest_that_fits(config: Config, topology: Topology) -> str:
    """Returns which setting fits where `config` does not: compiled where that can be, or that none does.

    The nearest keeps the mesh if one of that mesh fits, and of the same mesh the remat; the fastest comes first.
    """
    asked = dict(zip(sharding.AXES, sharding.mesh_sizes(config.mesh, topology.devices, topology.slices), strict=True))

    def distance(setting: estimate.Setting) -> tuple[bool, bool]:
        return setting.shape.mesh != asked, setting.config.compute.remat != config.compute.remat

    by_distance = sorted((setting for _, setting in rank(config, topology)), key=distance)
    smallest = sorted(by_distance, key=analytic_bytes)[:1]  # the last resort: what compiles is larger than formulas
    for setting in by_distance[:COMPILED] + smallest:
        if not aot.has_compiler(topology):
            return f"by the formulas this fits: {overrides(setting)}"
        mesh = aot.make_mesh(setting.config, topology)
        with contextlib.suppress(PlanError):
            as_it_trains = make_setting(setting.config, topology, mesh)
            aot.compile_step(as_it_trains, mesh, memory_bytes=topology.chip.memory_bytes)
            return f"this fits (compiled): {overrides(setting)}"
    return "nothing was found that fits: take more chips, or a smaller data.global_batch_size"


def search(config: Config, topology: Topology, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the report of the fastest setting that fits, with all that were ranked; prints the table.

    Raises:
        PlanError: nothing fits.
    """
    ranked, reports = rank(config, topology), []
    print(f"{len(ranked)} settings should fit; ms a step by the formulas, communication not hidden:")
    print(f"  {'data':>5} {'fsdp':>5} {'tensor':>6} {'micro-batch':>11} {'remat':>6} {'ms':>9} {'GiB':>6}")
    for seconds, s in ranked[:SHOWN]:
        mesh, size = s.shape.mesh, analytic_bytes(s) / GIB
        print(f"  {mesh['data']:>5} {mesh['fsdp']:>5} {mesh['tensor']:>6} {s.shape.micro_batch:>11} "
              f"{s.compute.remat:>6} {1e3 * seconds:>9.2f} {size:>6.2f}")  # fmt: skip
    for _, setting in ranked[:COMPILED]:
        try:
            reports.append(plan(setting.config, topology, args, remedy=False) | {"overrides": overrides(setting)})
        except PlanError as error:
            log.info("  %s: %s", overrides(setting), error)
        if reports and not aot.has_compiler(topology):
            break
    if not reports:
        raise PlanError(f"{args.config} on {topology}: {nearest_that_fits(config, topology)}")
    best = min(reports, key=lambda found: found["seconds"]["step"])
    shown = [{"seconds": seconds, "overrides": overrides(s)} for seconds, s in ranked[:SHOWN]]
    return best | {"ranked": shown}


def command(found: dict[str, Any], args: argparse.Namespace) -> str:
    return f"python -m gptjax.main --config={args.config} {found['overrides']}"


def main(arguments: list[str]) -> None:
    args, config = parse_flags(arguments)
    if args.topology == "local":
        if args.slices > 1:
            raise ConfigError(f"--slices={args.slices}: --topology=local finds its slices itself; leave it out")
        topology = aot.find_local()
    else:
        topology = parse_topology(args.topology, args.slices)
        os.environ.update({name: os.environ.get(name, value) for name, value in LIBTPU.items()})
        os.environ["JAX_PLATFORMS"] = "cpu"  # the chips of the plan are elsewhere, and those here are not taken
    found = search(config, topology, args) if args.search else plan(config, topology, args)
    for line in report.describe(found):
        print(line)
    if args.search:
        print(f"start it with: {command(found, args)}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


def cli() -> None:
    runtime.run_cli(main)


if __name__ == "__main__":
    cli()
