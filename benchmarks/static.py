"""What a train step costs on chips that are not here: kernels, bytes, FLOPs, memory, and the least time they allow.

    python benchmarks/static.py --chips=h200,v5e --cases=small [--batch=32,64] [--scan_unroll=0,1] [--top=20]
    python benchmarks/static.py --snapshot [--chips=h200]      compares with static_snapshot.json; code 1 beyond 5 %
    python benchmarks/static.py --update [--chips=h200]        writes it anew for these chips

Needs the extra `static`: jax[cuda] for GPUs, libtpu for TPUs; no accelerator. The step that trains is compiled for one
device of each chip, and plan/hlo_kernels.py reads the compiled text. Bytes are those of each kernel's operands and
results in device memory: loops times their trips, slices and changes in place by their size. FLOPs are those of
matrix products; fused attention counts half of all pairs of positions, backward two and a half times as many as
forward (7/2 on TPUs, whose two kernels both compute the weights again). The roof is the sum over kernels of max(bytes /
bandwidth, FLOPs / peak): no step is faster, so it ranks programs. A TPU's copies beside kernels count as bytes and
time, and are not among `kernels`. GPU programs are those of XLA without its tuning on the device: products in Triton.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import bench
from train_step import CASES, make_config

from gptjax import sharding
from gptjax.chips import GIB, Chip
from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.errors import PlanError, UnavailableError
from gptjax.plan.aot import compile_step, find_devices, has_compiler
from gptjax.plan.estimate import Candidate, StepLayout
from gptjax.plan.hlo_kernels import Kernel, buffers, read_kernels
from gptjax.plan.topology import Topology, parse_topology

TOPOLOGIES = {"h200": "h200:1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}  # one device of each is used
# Assumed shares of the data sheet's bandwidth and bfloat16 peak, for every chip: 4.3 of 4.8 TB/s and 788 of 989 TFLOP/s
# is what streaming kernels and large products of an H200 are reported to reach. Nothing of it was measured by us.
BANDWIDTH_SHARE, PEAK_SHARE = 4.3 / 4.8, 788 / 989
SNAPSHOT = pathlib.Path(__file__).resolve().parent / "static_snapshot.json"
Case = tuple[str, str, int, dict[str, Any]]  # chip, case, batch, settings
SNAPSHOT_CASES: tuple[Case, ...] = (
    ("h200", "small", 64, {"attention": "cudnn"}),
    ("h200", "small", 64, {"attention": "cudnn", "loss": "triton"}),
    ("h200", "small", 32, {"attention": "cudnn"}),
    ("v5e", "small", 8, {"attention": "splash"}),
    ("v5e", "small", 8, {"attention": "splash", "scan_unroll": 1}),
    ("v5p", "small", 32, {"attention": "splash", "scan_unroll": 1}),
    ("v6e", "small", 16, {"attention": "splash", "scan_unroll": 1}),
)
DEFAULTS = {"attention": "auto", "remat": "none", "scan_unroll": 0, "loss": "xla", "loss_chunk": 0, "dtype": "auto"}
FIGURES = ("kernels", "GB/step", "TFLOP/step", "temp GiB", "roof ms")
TOLERANCE = 0.05
SHOWN = ("chip", "case", "batch", "settings", *FIGURES, "sheet ms", "roof tokens/s", "compile s")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Bytes and FLOPs a second that a chip is taken to reach."""

    bandwidth: float
    peak_flops: float


def assumed(chip: Chip) -> Speed:
    return Speed(BANDWIDTH_SHARE * chip.memory_bandwidth, PEAK_SHARE * chip.peak_flops)


def roof(kernels: list[Kernel], speed: Speed) -> float:
    return sum(k.seconds(speed.bandwidth, speed.peak_flops) for k in kernels)


def why_not(topology: Topology) -> str:
    """Returns why nothing can be compiled for a chip here, and what to install, or ''."""
    if not has_compiler(topology):
        return "no GPU compiler; pip install 'gptjax[static]' or 'jax[cuda12]'"
    try:
        find_devices(topology)
    except UnavailableError as error:
        return str(error)
    return ""


def measure(chip: str, case: str, batch: int, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Kernel]]:
    """Returns a row of figures, and the kernels of the step.

    Raises:
        PlanError: the step does not fit the chip.
    """
    topology = parse_topology(TOPOLOGIES[chip], 1)
    config = make_config(case, batch, DEFAULTS | settings | {"steps_per_dispatch": 1})
    mesh = sharding.make_mesh(config.mesh, find_devices(topology)[:1])
    compute, size = resolve_compute(config, mesh), config.data.global_batch_size
    start = time.perf_counter()
    setting = Candidate(config, compute, resolve_parallel(config, mesh), StepLayout(dict(mesh.shape), 1, size), {})
    compiled = compile_step(setting, mesh, memory_bytes=topology.memory_bytes)
    seconds, text = time.perf_counter() - start, compiled.as_text()
    kernels, speed = read_kernels(text), assumed(topology.chip)
    best, tokens = roof(kernels, speed), size * config.model.block_size
    row: dict[str, Any] = {"chip": chip, "case": case, "batch": size, "settings": describe(settings, compute.attention)}
    row |= {
        "kernels": sum(k.count for k in kernels if not k.is_copy),
        "GB/step": sum(k.count * k.bytes for k in kernels) / 1e9,
        "TFLOP/step": sum(k.count * k.flops for k in kernels) / 1e12,
        "temp GiB": compiled.memory_analysis().temp_size_in_bytes / GIB,
        "roof ms": 1e3 * best,
        "sheet ms": 1e3 * roof(kernels, Speed(topology.chip.memory_bandwidth, topology.chip.peak_flops)),
        "roof tokens/s": tokens / best,
        "compile s": seconds,
        "assumed": dataclasses.asdict(speed),
        **large_buffers(text, config.model.block_size, tokens),
        "compiler": compiler(topology),
    }
    return row, kernels


def describe(settings: dict[str, Any], attention: str) -> str:
    shown = settings | {"attention": attention}
    return " ".join(f"{name}={value}" for name, value in shown.items() if value != DEFAULTS[name])


def compiler(topology: Topology) -> dict[str, str]:
    packages = ("jax", "libtpu") if topology.is_tpu else ("jax", "jaxlib")
    return {package: importlib.metadata.version(package) for package in packages}


def large_buffers(text: str, positions: int, tokens: int) -> dict[str, int]:
    """Returns how many arrays in memory are [.., T, T] scores, and how many [B, T, V] in float32."""
    found = list(buffers(text))
    return {
        "[T,T] buffers": sum(a.dims.count(positions) > 1 for a in found),
        "float32 [B,T,V] buffers": sum(a.dtype == "f32" and a.size >= tokens * 32768 for a in found),
    }


def most_expensive(kernels: list[Kernel], speed: Speed, count: int) -> list[dict[str, Any]]:
    """Returns rows of the kernels that take longest; alike ones, as of all layers, are one."""
    alike = collections.defaultdict(list)
    for k in kernels:
        alike[re.sub(r"\.\d+", "", k.name), k.where, k.bytes, k.flops].append(k)
    groups = sorted(alike.values(), key=lambda group: -roof(group, speed))
    return [
        {
            "ms": 1e3 * roof(group, speed),
            "runs": sum(k.count for k in group),
            "GB": sum(k.count * k.bytes for k in group) / 1e9,
            "TFLOP": sum(k.count * k.flops for k in group) / 1e12,
            "kernel": group[0].name,
            "where": group[0].where.removeprefix("jit(train_step)/")[-90:],
        }
        for group in groups[:count]
    ]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["chip"], row["case"], row["batch"], row["settings"]


def differences(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each figure that is not what the snapshot says, within 5 %; one of another jax says so."""
    by_key, lines = {key(row): row for row in expected}, []
    for row in rows:
        name, known = " ".join(map(str, key(row))), by_key.get(key(row))
        if known is None:
            lines.append(f"{name}: not in the snapshot; --update writes it")
        elif known["compiler"] != row["compiler"]:
            lines.append(f"{name}: the snapshot is of {known['compiler']}, this is {row['compiler']}")
        else:
            far = [f for f in FIGURES if abs(row[f] - known[f]) > TOLERANCE * known[f]]
            lines += [f"{name}: {f} is {row[f]:.4g}, {known[f]:.4g} in the snapshot" for f in far]
    return lines


def update(rows: list[dict[str, Any]]) -> None:
    """Writes the snapshot with these rows in place of those of the same chips."""
    old = json.loads(SNAPSHOT.read_text())["rows"] if SNAPSHOT.exists() else []
    chips = {row["chip"] for row in rows}
    kept = [row for row in old if row["chip"] not in chips]
    new = [{name: value for name, value in row.items() if name != "compile s"} for row in rows]
    SNAPSHOT.write_text(json.dumps({"rows": sorted(kept + new, key=key)}, indent=1) + "\n")


def combinations(args: argparse.Namespace) -> list[Case]:
    """Returns all that is asked for."""
    chips = args.chips.split(",")
    if args.snapshot or args.update:
        return [one for one in SNAPSHOT_CASES if one[0] in chips]
    numbers = ("batch", "scan_unroll", "loss_chunk")
    lists = {name: getattr(args, name).split(",") for name in ("batch", *DEFAULTS)}
    lists = {name: [int(v) for v in values] if name in numbers else values for name, values in lists.items()}
    return [
        (chip, case, batch, dict(zip(DEFAULTS, values, strict=True)))
        for chip, case, batch, *values in itertools.product(chips, args.cases.split(","), *lists.values())
    ]


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--cases", default="small", help=f"of {', '.join(CASES)}")
    parser.add_argument("--batch", default="0", help="sequences; 0: the case's own")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", default=str(default))
    parser.add_argument("--top", type=int, default=0, help="also print so many of the most expensive kernels")
    parser.add_argument("--snapshot", action="store_true", help="the snapshot's cases, compared with it")
    parser.add_argument("--update", action="store_true", help="the snapshot's cases, written to it")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    for name, known in (("chips", TOPOLOGIES), ("cases", CASES)):
        for value in getattr(args, name).split(","):
            if value not in known:
                parser.error(f"--{name}={value}: expected of {', '.join(known)}")
    return args


def possible(chips: Iterable[str]) -> list[str]:
    """Returns the chips that there is a compiler for here, saying what is skipped, and what is assumed."""
    found = []
    for chip in chips:
        topology = parse_topology(TOPOLOGIES[chip], 1)
        reason, speed, sheet = why_not(topology), assumed(topology.chip), topology.chip
        if reason:
            print(f"{chip}: skipped, {reason}")
            continue
        found.append(chip)
        print(
            f"{chip}: assumed {speed.bandwidth / 1e12:.3g} TB/s and {speed.peak_flops / 1e12:.4g} TFLOP/s, "
            f"data sheet {sheet.memory_bandwidth / 1e12:.3g} and {sheet.peak_flops / 1e12:.4g}"
        )
    return found


def run(asked: Iterable[Case], top: int) -> list[dict[str, Any]]:
    """Returns a row for each that fits, printing it as it comes."""
    rows = []
    for chip, case, batch, settings in asked:
        try:
            row, kernels = measure(chip, case, batch, settings)
        except PlanError as error:
            print(f"{chip} {case} {batch} {settings}: {error}")
            continue
        rows.append(row)
        print(show([row]), flush=True)
        if top:
            print(bench.table(most_expensive(kernels, Speed(**row["assumed"]), top)), flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    return bench.table([{name: row[name] for name in SHOWN} for row in rows])


def main() -> None:
    args = parse_flags()
    asked = combinations(args)
    chips = possible(dict.fromkeys(chip for chip, *_ in asked))
    rows = run([one for one in asked if one[0] in chips], args.top)
    if not rows:
        sys.exit(69)
    print(show(rows))
    print(bench.write("static", rows, bench.machine(), args.out))
    if args.update:
        update(rows)
    elif args.snapshot:
        lines = differences(rows, json.loads(SNAPSHOT.read_text())["rows"])
        print("\n".join(lines) or "as in the snapshot")
        sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
