"""What the compiled train step sends between chips, beside the least that would do, for every GPT-2 config.

    python benchmarks/traffic.py [--configs=gpt2_small,gpt2_xl] [--topologies=v5e:4x4] [--out=DIR]

Needs the extra `plan`; no TPU. One row for each config, topology and mesh: pure data, pure fsdp, fsdp x tensor, and two
slices. A row is over the budget if it sends more than 1.2 times the minimum, has an all-to-all, or has a permute that
is not XLA's windowed product. A hundredth of the bytes may be permutes: XLA's scatter of shards that end within a tile
has one of its own. A config that does not fit the chip is tried with one sequence per micro-batch and full remat; if
that does not fit either, there is no compiled program to read.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from gptjax import config as config_module
from gptjax.config import Config, MeshConfig
from gptjax.errors import PlanError
from gptjax.plan import search
from gptjax.plan.__main__ import LIBTPU
from gptjax.plan.topology import Topology, parse_topology

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4")
BUDGET = 1.2


def meshes(config: Config, topology: Topology) -> dict[str, tuple[int, MeshConfig]]:
    """Returns {name: (slices, mesh)}; fsdp and tensor as large as the widths divide."""
    count, width = topology.devices, config.model.n_embd
    fsdp = max(n for n in range(1, count + 1) if count % n == 0 and width % n == 0)
    tensor = next(n for n in (4, 2, 1) if config.model.n_head % n == 0 and count % n == 0)
    rest = max(n for n in range(1, count // tensor + 1) if count // tensor % n == 0 and width % n == 0)
    found = {
        "data": (1, MeshConfig(count, 1, 1)),
        "fsdp": (1, MeshConfig(count // fsdp, fsdp, 1)),
        "fsdp x tensor": (1, MeshConfig(count // tensor // rest, rest, tensor)),
        "2 slices": (2, MeshConfig(2 * count // fsdp, fsdp, 1)),
    }
    return {name: pair for name, pair in found.items() if name != "fsdp x tensor" or tensor > 1}


def measure(name: str, topology: Topology, mesh: MeshConfig) -> dict[str, Any]:
    """Returns the plan's report of a config on a mesh, or why there is none."""
    path = str(ROOT / "configs" / f"{name}.py")
    config = dataclasses.replace(config_module.load(path, {}), mesh=mesh)
    args = argparse.Namespace(config=path, target_tokens=0, price_per_chip_hour=0)
    start, refused = time.perf_counter(), ""
    for changed in (config, smallest(config)):
        try:
            report = search.plan(changed, topology, args, remedy=False)
            return report | {"compile_seconds": time.perf_counter() - start}
        except PlanError as error:
            refused = str(error)
    return {"refused": refused, "compile_seconds": time.perf_counter() - start}


def smallest(config: Config) -> Config:
    """Returns `config` with the least memory: a sequence a micro-batch, all of it computed again."""
    train = dataclasses.replace(config.train, micro_batch_size=1)
    return dataclasses.replace(search.with_remat(config, "full"), train=train)


def problems(report: dict[str, Any]) -> list[str]:
    """Returns what is over the budget in a report."""
    least, sent = report["minimum_traffic_bytes"], report["traffic_bytes"]
    found = [f"{sent / least:.2f} x"] if sent > BUDGET * least else []
    rows = [row for row in report["collectives"] if "runs" in row]
    limits = {"all-to-all": 0, "ragged-all-to-all": 0, "collective-permute": 0.01 * sent}
    over = [row for row in rows if row["bytes"] > limits.get(row["kind"], math.inf)]
    return found + [f"{row['kind']} {row['bytes'] / 1e6:.1f} MB" for row in over]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--meshes", default="", help="only these, for example data,fsdp")
    parser.add_argument("--out", default="", help="write each report there as JSON")
    args = parser.parse_args()
    logging.getLogger("gptjax").setLevel(logging.WARNING)
    os.environ.update({name: os.environ.get(name, value) for name, value in LIBTPU.items()})
    print(f"{'config':<12} {'topology':<10} {'mesh':<14} {'A':>3} {'MB':>8} {'least':>8} {'ratio':>6} {'permutes':>8} "
          f"{'GiB':>6} {'s':>4}")  # fmt: skip
    over = 0
    for name, text in itertools.product(args.configs.split(","), args.topologies.split(",")):
        config = config_module.load(str(ROOT / "configs" / f"{name}.py"), {})
        for title, (slices, mesh) in meshes(config, parse_topology(text, 1)).items():
            if args.meshes and title not in args.meshes.split(","):
                continue
            report = measure(name, parse_topology(text, slices), mesh)
            shape = f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}" + (f" / {slices}" if slices > 1 else "")
            line = f"{name:<12} {text:<10} {shape:<14}"
            if "refused" in report:
                print(f"{line} {report['refused']}", flush=True)
                continue
            sent, least = report["traffic_bytes"], report["minimum_traffic_bytes"]
            found = problems(report)
            over += bool(found)
            permuted = sum(row["bytes"] for row in report["collectives"] if row["kind"] == "collective-permute")
            print(f"{line} {report['num_microbatches']:>3} {sent / 1e6:>8.1f} {least / 1e6:>8.1f} {sent / least:>6.2f} "
                  f"{100 * permuted / sent:>7.2f}% "
                  f"{report['memory_bytes']['peak'] / 2**30:>6.2f} {report['compile_seconds']:>4.0f}"
                  f"  {'; '.join(found)}", flush=True)  # fmt: skip
            if args.out:
                file = pathlib.Path(args.out) / f"{name}-{text.replace(':', '-')}-{title.replace(' ', '-')}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(over > 0)


if __name__ == "__main__":
    main()
