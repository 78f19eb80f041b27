"""Reports a plan as a dict and as lines: memory, communication compared with the minimum, time and cost."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterable, Iterator
from typing import Any

from gptjax.chips import GIB, find_chip
from gptjax.errors import install
from gptjax.params import count_params
from gptjax.plan.aot import peak_bytes
from gptjax.plan.estimate import (
    TYPICAL,
    Candidate,
    StepLayout,
    estimate_memory,
    hierarchical_all_reduce,
    minimum_traffic,
    roofline,
    step_flops,
)
from gptjax.plan.overlap import Overlap, Speeds, hidden_share, read_overlaps
from gptjax.plan.topology import Topology
from gptjax.plan.traffic import NETWORK, Collective, read_collectives, sum_traffic


def make_report(
    setting: Candidate,
    topology: Topology,
    compiled: Any,
    *,
    target_tokens: float,
    price_per_chip_hour: float,
) -> dict[str, Any]:
    """Returns all figures of a plan, as --json writes them; `compiled` is None for a plan by formulas only."""
    config = setting.config
    chip = topology.chip
    tokens_per_step = config.data.global_batch_size * config.model.block_size
    target = target_tokens or config.train.num_steps * tokens_per_step
    minimum = minimum_traffic(setting)
    if compiled:
        source = f"{compiler_version(topology)}: memory and communication; by formulas: FLOP and times"
        text = compiled.as_text()
        collectives = read_traffic(text, setting.shape, topology)
        overlaps = read_overlap(text, setting.shape, topology)
        traffic = sum_traffic(collectives)
        memory = measured_memory(estimate_memory(setting), peak_bytes(compiled))
    else:
        source = "analytic: formulas only, nothing was compiled"
        if not topology.is_tpu:
            source += f"; to compile without a GPU: {install(topology.chip.extra or 'cuda')}"
        collectives = []
        overlaps = []
        traffic = minimum
        memory = estimate_memory(setting)
    efficiency = TYPICAL
    if overlaps:
        efficiency = dataclasses.replace(TYPICAL, exposed_communication=1 - hidden_share(overlaps))
    roof = roofline(setting, chip, traffic)
    typical = efficiency.seconds(roof)
    flops = step_flops(config)
    hours = target / tokens_per_step * roof.seconds / 3600
    chip_hours = hours * topology.devices
    return {
        "topology": str(topology),
        "chips": topology.devices,
        "device_kind": chip.kind,
        "source": source,
        "mesh": dict(setting.shape.mesh),
        "slices": setting.shape.slices,
        "parameters": count_params(config.model),
        "num_microbatches": setting.shape.num_microbatches,
        "micro_batch": setting.shape.micro_batch,
        "attention": setting.compute.attention,
        "remat": setting.compute.remat,
        "memory_bytes": memory,
        "memory_available_bytes": topology.memory_bytes,
        "flops_per_step": flops,
        "tokens_per_step": tokens_per_step,
        "collectives": compare_traffic(collectives, minimum),
        "traffic_bytes": sum(traffic.values()),
        "minimum_traffic_bytes": sum(minimum.values()),
        "seconds": dataclasses.asdict(roof) | {"step": roof.seconds},
        "bound": roof.bound,
        "best_case_mfu": flops / (roof.seconds * topology.devices * chip.peak_flops),
        "best_case_tokens_per_second": tokens_per_step / roof.seconds,
        "typical_seconds": typical,
        "typical_mfu": flops / (typical * topology.devices * chip.peak_flops),
        "typical_tokens_per_second": tokens_per_step / typical,
        "typical_efficiencies": dataclasses.asdict(efficiency),
        "overlap": summarize_overlap(overlaps),
        "target_tokens": target,
        "hours": hours,
        "chip_hours": chip_hours,
        "typical_hours": target / tokens_per_step * typical / 3600,
        "cost": chip_hours * price_per_chip_hour if price_per_chip_hour else None,
        "typical_cost": chip_hours * typical / roof.seconds * price_per_chip_hour if price_per_chip_hour else None,
    }


def compiler_version(topology: Topology) -> str:
    """Returns the name and version of the package that compiles for `topology`."""
    package = "libtpu" if topology.is_tpu else "jaxlib"
    return f"compiled with {package} {importlib.metadata.version(package)}"


def read_traffic(
    text: str,
    shape: StepLayout,
    topology: Topology,
) -> list[Collective]:
    """Returns the collectives of a compiled step; those between slices or nodes are separate entries."""
    if topology.is_tpu:
        return read_collectives(text, shape.mesh, shape.slices)
    found = []
    for collective in read_collectives(text, shape.mesh):
        found += _split_by_network(collective, shape)
    return found


def read_overlap(
    text: str,
    shape: StepLayout,
    topology: Topology,
) -> list[Overlap]:
    """Returns the collectives of a compiled step, and how much of each the schedule hides, at typical efficiencies."""
    chip = topology.chip
    slices = shape.slices if topology.is_tpu else 1

    def seconds_to_send(collective: Collective) -> float:
        parts = [collective] if topology.is_tpu else _split_by_network(collective, shape)
        seconds = 0.0
        for part in parts:
            if part.kind == NETWORK:
                seconds += part.bytes / (TYPICAL.network * chip.network_bandwidth)
            else:
                seconds += part.bytes / (TYPICAL.links * chip.ring_bandwidth)
        return seconds

    speeds = Speeds(
        memory=TYPICAL.memory * chip.memory_bandwidth,
        flops=TYPICAL.matrix_units * chip.peak_flops,
        seconds_to_send=seconds_to_send,
    )
    return read_overlaps(text, shape.mesh, slices, speeds=speeds)


def summarize_overlap(overlaps: Iterable[Overlap]) -> list[dict[str, Any]]:
    """Returns a row for each kind, axes, dtype and place in the model, the longest wait first; times per step."""
    rows: dict[Any, dict[str, Any]] = {}
    for overlap in overlaps:
        collective = overlap.collective
        place = _place(collective.where)
        key = collective.kind, collective.axes, collective.dtype, place
        empty = {"runs": 0, "bytes": 0.0, "seconds": 0.0, "hidden_seconds": 0.0}
        about = {"kind": collective.kind, "axes": list(collective.axes), "dtype": collective.dtype, "where": place}
        row = rows.setdefault(key, about | empty)
        row["runs"] += collective.count
        row["bytes"] += collective.total_bytes
        row["seconds"] += overlap.seconds
        row["hidden_seconds"] += overlap.hidden
    return sorted(rows.values(), key=lambda row: row["hidden_seconds"] - row["seconds"])


def _place(where: str) -> str:
    """Returns a short name of the part of the step that a name scope belongs to."""
    if "GPT.layers" not in where:
        return "step"
    return "layers, backward" if "transpose" in where or "rematted" in where else "layers, forward"


def _split_by_network(collective: Collective, shape: StepLayout) -> Iterator[Collective]:
    """Yields the parts of a GPU's all-reduce over all nodes, which NCCL does hierarchically; others as they are."""
    if shape.slices == 1 or "data" not in collective.axes or collective.kind != "all-reduce":
        yield collective
        return
    devices = math.prod(shape.mesh[axis] for axis in collective.axes)
    amount = collective.bytes / 2 * devices / (devices - 1)  # the ring sends 2 (n - 1) / n of the operand's bytes
    parts = hierarchical_all_reduce(shape, collective.axes, amount)
    for (kind, axes), sent in parts.items():
        yield dataclasses.replace(collective, kind=kind, axes=axes, bytes=sent)


def measured_memory(memory: dict[str, float], peak: float) -> dict[str, float]:
    """Returns the bytes of one device by kind: the state from the formulas in `memory`, the rest of the peak below it.

    The compiler reports one peak. The state's size is exact, so the rest belongs to gradients and activations.
    """
    state = {name: memory[name] for name in ("parameters", "optimizer")}
    rest = peak - sum(state.values())
    return state | {"gradients and activations": rest, "peak": peak}


def compare_traffic(collectives: list[Any], minimum: dict[Any, float]) -> list[dict[str, Any]]:
    """Returns a row for each kind and axes of `collectives`, most bytes first, then a row for each entry of `minimum`.

    The compiler may choose other kinds than the formulas, so the two are not matched row by row.
    """
    rows: dict[Any, dict[str, Any]] = {}
    for collective in collectives:
        empty = {"kind": collective.kind, "axes": list(collective.axes), "runs": 0, "bytes": 0.0}
        row = rows.setdefault((collective.kind, collective.axes), empty)
        row["runs"] += collective.count
        row["bytes"] += collective.total_bytes
    compared = sorted(rows.values(), key=lambda row: -row["bytes"])
    for (kind, axes), amount in minimum.items():
        compared.append({"kind": kind, "axes": list(axes), "minimum_bytes": amount})
    return compared


def describe(report: dict[str, Any]) -> list[str]:
    """Returns the lines of a report."""
    r = report
    mesh = " ".join(f"{axis}={size}" for axis, size in r["mesh"].items())
    return [
        f"{r['config']} on {r['topology']}: {r['chips']} x {r['device_kind']}, mesh {mesh}",
        f"{r['source']}",
        f"model: {r['parameters']:,} parameters, {r['attention']} attention, remat {r['remat']}",
        f"step: {r['tokens_per_step']:,} tokens, {r['flops_per_step']:.3g} FLOP (by formula)",
        f"  accumulation steps: {r['num_microbatches']}, sequences per device and micro-batch: {r['micro_batch']}",
        _describe_memory(r),
        *describe_traffic(r),
        describe_times(r),
        f"best case: {100 * r['best_case_mfu']:.1f}% MFU, {r['best_case_tokens_per_second']:,.0f} tokens/s (estimate)",
        describe_typical(r),
        *_describe_chip(r),
        _describe_cost(r),
    ]


def describe_typical(r: dict[str, Any]) -> str:
    """Returns the line of a report on the typical case and the efficiencies that it assumes."""
    shares = {name.replace("_", " "): f"{100 * share:.0f}%" for name, share in r["typical_efficiencies"].items()}
    exposed = shares.pop("exposed communication")
    assumed = ", ".join(f"{name} {share}" for name, share in shares.items())
    origin = "by the schedule" if r["overlap"] else "assumed"
    return (
        f"typical case: {100 * r['typical_mfu']:.1f}% MFU, {r['typical_tokens_per_second']:,.0f} tokens/s "
        f"(estimate; assumes of the peak: {assumed}; {exposed} of communication not hidden, {origin})"
    )


def describe_overlap(r: dict[str, Any]) -> list[str]:
    """Returns the lines of a report on how much of each collective the compiled schedule hides."""
    if not r["overlap"]:
        return ["nothing is sent, or nothing was compiled: there is no schedule to read"]
    total = sum(row["seconds"] for row in r["overlap"])
    hidden = sum(row["hidden_seconds"] for row in r["overlap"])
    lines = [f"hidden by the compiled schedule: {1e3 * hidden:.2f} of {1e3 * total:.2f} ms per step (estimate)"]
    for row in r["overlap"]:
        axes = "+".join(row["axes"])
        times = f"{1e3 * row['seconds']:>8.2f} ms, hidden {1e3 * row['hidden_seconds']:.2f} ms"
        lines.append(
            f"  {row['kind']:<27} {axes:<12} {row['dtype']:<5} {row['where']:<17} {row['runs']:>6} times "
            f"{row['bytes'] / 1e6:>9.1f} MB {times}"
        )
    return lines


def _describe_chip(r: dict[str, Any]) -> list[str]:
    """Returns the lines on what a reader must know of the chip before renting it."""
    chip = find_chip(r["device_kind"])
    assert chip is not None, r["device_kind"]
    lines = []
    if not chip.has_bfloat16:
        lines.append(
            f"{chip.kind} has no matrix units for bfloat16: its peak is float32's, and compute.dtype=auto takes float32"
        )
    if chip.extra:
        lines.append(f"{chip.kind} needs the extra {chip.extra}: {install(chip.extra)}")
    return lines


def _describe_memory(r: dict[str, Any]) -> str:
    memory = r["memory_bytes"]
    available = r["memory_available_bytes"]
    total = memory["peak"] if "peak" in memory else sum(memory.values())
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items() if name != "peak")
    verdict = "fits" if total <= available else "does not fit"
    return f"memory per device (GiB): {parts}; {total / GIB:.2f} of {available / GIB:.2f}: {verdict}"


def _describe_cost(r: dict[str, Any]) -> str:
    typical = r["typical_hours"]
    line = (
        f"{r['target_tokens']:.4g} tokens: at least {_duration(r['hours'])}, {r['chip_hours']:,.1f} chip hours; "
        f"typically {_duration(typical)}, {typical * r['chips']:,.1f} chip hours"
    )
    if r["cost"] is None:
        return line
    return f"{line}, cost {r['cost']:,.0f} to {r['typical_cost']:,.0f}"


def _duration(hours: float) -> str:
    """Returns a time in the unit in which it is easy to read."""
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    if hours < 48:
        return f"{hours:.1f} hours"
    return f"{hours / 24:.1f} days"


def describe_traffic(r: dict[str, Any]) -> list[str]:
    """Returns the lines of a report on the bytes that a device sends per step."""
    if not r["collectives"]:
        return ["one device: nothing is sent"]
    lines = ["communication per device and step:"]
    for row in r["collectives"]:
        kind = row["kind"]
        axes = "+".join(row["axes"])
        if "bytes" in row:
            megabytes = row["bytes"] / 1e6
            lines.append(f"  {kind:<27} {axes:<12} {row['runs']:>6} times {megabytes:>10.1f} MB")
        else:
            megabytes = row["minimum_bytes"] / 1e6
            lines.append(f"  at least: {kind:<17} {axes:<12} {'':>12} {megabytes:>10.1f} MB")
    total = r["traffic_bytes"]
    minimum = r["minimum_traffic_bytes"]
    if minimum and total != minimum:
        lines.append(f"  total {total / 1e6:.1f} MB, {total / minimum:.2f}x minimum")
    return lines


def describe_times(r: dict[str, Any]) -> str:
    """Returns the line of a report on the least time of a step by resource, and the bound."""
    milliseconds = {name: 1e3 * seconds for name, seconds in r["seconds"].items()}
    bound = r["bound"].replace("_", " ")
    return (
        f"a step takes at least: matrix units {milliseconds['matrix_units']:.2f} ms, "
        f"memory {milliseconds['memory']:.2f} ms (estimate), links {milliseconds['links']:.2f} ms (estimate), "
        f"network {milliseconds['network']:.2f} ms; bound by {bound}"
    )
