"""What a plan tells, as a dict and as lines: memory, communication beside the least that would do, time, cost."""

import dataclasses
import importlib.metadata
import math
from typing import Any

from gptjax.aot import peak_bytes
from gptjax.chips import GIB, Topology
from gptjax.estimate import Setting, Shape, estimate_memory, minimum_traffic, roofline, split_sum, step_flops
from gptjax.hlo import Collective, read_collectives, sum_traffic
from gptjax.model import count_params


def make_report(
    setting: Setting, topology: Topology, compiled: Any, *, target_tokens: float, price_per_chip_hour: float
) -> dict[str, Any]:
    """Returns all figures of a plan, as --json writes them; `compiled` is None where there are formulas only."""
    config, shape, chip = setting.config, setting.shape, topology.chip
    minimum = minimum_traffic(setting)
    collectives = read_traffic(compiled, shape, topology) if compiled else []
    traffic = sum_traffic(collectives) if compiled else minimum
    roof = roofline(setting, chip, traffic)
    memory = estimate_memory(setting)
    if compiled:
        memory = measured_memory(memory, peak_bytes(compiled))
    tokens_per_step = config.data.global_batch_size * config.model.block_size
    target = target_tokens or config.train.num_steps * tokens_per_step
    flops, hours = step_flops(config), target / tokens_per_step * roof.seconds / 3600
    return {
        "topology": str(topology),
        "chips": topology.devices,
        "device_kind": chip.kind,
        "source": compiler_version(topology) if compiled else "analytic: formulas only, nothing was compiled",
        "mesh": dict(shape.mesh),
        "slices": shape.slices,
        "parameters": count_params(config.model),
        "micro_steps": shape.micro_steps,
        "micro_batch": shape.micro_batch,
        "attention": setting.compute.attention,
        "remat": setting.compute.remat,
        "memory_bytes": memory,
        "memory_available_bytes": chip.memory_bytes,
        "flops_per_step": flops,
        "tokens_per_step": tokens_per_step,
        "collectives": compare_traffic(collectives, minimum),
        "traffic_bytes": sum(traffic.values()),
        "minimum_traffic_bytes": sum(minimum.values()),
        "seconds": dataclasses.asdict(roof) | {"step": roof.seconds},
        "bound": roof.bound,
        "best_case_mfu": flops / (roof.seconds * topology.devices * chip.peak_flops),
        "best_case_tokens_per_second": tokens_per_step / roof.seconds,
        "target_tokens": target,
        "hours": hours,
        "chip_hours": hours * topology.devices,
        "cost": hours * topology.devices * price_per_chip_hour if price_per_chip_hour else None,
    }


def compiler_version(topology: Topology) -> str:
    package = "libtpu" if topology.is_tpu else "jaxlib"
    return f"compiled with {package} {importlib.metadata.version(package)}"


def read_traffic(compiled: Any, shape: Shape, topology: Topology) -> list[Collective]:
    """Returns the collectives of a compiled step, what goes between slices or nodes apart."""
    if topology.is_tpu:
        return read_collectives(compiled.as_text(), shape.mesh, shape.slices)
    found = []
    for c in read_collectives(compiled.as_text(), shape.mesh):
        if shape.slices == 1 or "data" not in c.axes or c.kind != "all-reduce":
            found.append(c)
            continue
        # One sum over all nodes, which NCCL does as well as it can: within each, and one part of it across.
        devices = math.prod(shape.mesh[axis] for axis in c.axes)
        parts = split_sum(shape, c.axes, c.bytes / 2 * devices / (devices - 1))
        found += [dataclasses.replace(c, kind=kind, axes=axes, bytes=sent) for (kind, axes), sent in parts.items()]
    return found


def measured_memory(memory: dict[str, float], peak: float) -> dict[str, float]:
    """Returns the bytes of one device by kind as the compiler laid them out; `memory` has those of the state."""
    state = {name: memory[name] for name in ("parameters", "optimizer")}
    rest = peak - sum(state.values())
    return state | {"gradients and activations": rest, "peak": peak}


def compare_traffic(collectives: list[Any], minimum: dict[Any, float]) -> list[dict[str, Any]]:
    """Returns a row for each kind and axes of what is sent, with the least that would do where they are the same."""
    rows: dict[Any, dict[str, Any]] = {}
    for c in collectives:
        row = rows.setdefault((c.kind, c.axes), {"kind": c.kind, "axes": list(c.axes), "runs": 0, "bytes": 0.0})
        row["runs"] += c.count
        row["bytes"] += c.total_bytes
    least = [{"kind": kind, "axes": list(axes), "minimum_bytes": amount} for (kind, axes), amount in minimum.items()]
    return sorted(rows.values(), key=lambda row: -row["bytes"]) + least


def describe(report: dict[str, Any]) -> list[str]:
    """Returns the lines that tell a report."""
    r, memory = report, report["memory_bytes"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    total = memory.get("peak", sum(memory.values()))
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items() if name != "peak")
    verdict = "fits" if total <= r["memory_available_bytes"] else "does not fit"
    return [
        f"{r['config']} on {r['topology']}: {r['chips']} x {r['device_kind']} as {mesh}",
        f"{r['source']}",
        f"model: {r['parameters']:,} parameters, {r['attention']} attention, remat {r['remat']}",
        f"step: {r['tokens_per_step']:,} tokens, {r['flops_per_step']:.3g} FLOP (by hand)",
        f"  {r['micro_steps']} micro-step(s) of {r['micro_batch']} sequence(s) a device",
        f"memory of a device in GiB: {parts}; {total / GIB:.2f} of {r['memory_available_bytes'] / GIB:.2f}: {verdict}",
        *describe_traffic(r),
        describe_times(r),
        f"best case: {100 * r['best_case_mfu']:.1f}% MFU, {r['best_case_tokens_per_second']:,.0f} tokens/s (estimate)",
        f"{r['target_tokens']:.4g} tokens: at least {r['hours'] / 24:.2f} days, {r['chip_hours']:,.0f} chip hours"
        + (f", cost {r['cost']:,.0f}" if r["cost"] is not None else ""),
    ]


def describe_traffic(r: dict[str, Any]) -> list[str]:
    lines = ["sent by a device in a step:" if r["collectives"] else "one device: nothing is sent"]
    for row in r["collectives"]:
        name, axes = row["kind"], "+".join(row["axes"])
        if "bytes" in row:
            lines.append(f"  {name:<27} {axes:<12} {row['runs']:>6} times {row['bytes'] / 1e6:>10.1f} MB")
        else:
            lines.append(f"  at least: {name:<17} {axes:<12} {'':>12} {row['minimum_bytes'] / 1e6:>10.1f} MB")
    if r["minimum_traffic_bytes"] and r["traffic_bytes"] != r["minimum_traffic_bytes"]:
        ratio = r["traffic_bytes"] / r["minimum_traffic_bytes"]
        lines.append(f"  in all {r['traffic_bytes'] / 1e6:.1f} MB, {ratio:.2f} times the least")
    return lines


def describe_times(r: dict[str, Any]) -> str:
    s = r["seconds"]
    return (
        f"a step takes at least: matrix units {1e3 * s['matrix_units']:.2f} ms, memory {1e3 * s['memory']:.2f} ms "
        f"(estimate), links {1e3 * s['links']:.2f} ms (estimate), network {1e3 * s['network']:.2f} ms; "
        f"bound by {r['bound'].replace('_', ' ')}"
    )
