"""Weak scaling on paper: the plan of a step on 8 to 2,048 chips, as the tables of docs/scaling.md.

    python benchmarks/scaling.py --out=docs/scaling.md [--configs=gpt2_small,gpt2_xl] [--kind=v5p] [--per_chip=8]

With --out, the tables replace those that stand after MARK in the file.

Needs the extra `plan`; no TPU. The batch grows with the chips. For each slice the fastest mesh, micro-batch and remat
are chosen as `gptjax.plan --search` does, by formulas, and compiled; the figures of the row are of that program.
"""

import argparse
import dataclasses
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from gptjax import config as config_module
from gptjax.chips import GIB
from gptjax.errors import PlanError
from gptjax.plan import search
from gptjax.plan.__main__ import LIBTPU
from gptjax.plan.topology import SLICES, parse_topology

ROOT = pathlib.Path(__file__).resolve().parent.parent
FEWEST = 8
MARK = "<!-- from here on: python benchmarks/scaling.py --out=docs/scaling.md --per_chip=8 -->"
COLUMNS = (
    "chips", "slice", "data x fsdp x tensor", "micro-batches x sequences", "remat", "GiB", "sent, MB", "of the least",
    "matrix units, ms", "links, ms", "bound", "best MFU", "best tokens/s a chip",
)  # fmt: skip


def best(name: str, topology: Any, per_chip: int) -> dict[str, Any] | None:
    """Returns the report of the fastest setting that fits, None if none does."""
    path = str(ROOT / "configs" / f"{name}.py")
    config = config_module.load(path, {})
    data = dataclasses.replace(config.data, global_batch_size=per_chip * topology.devices)
    config = dataclasses.replace(config, data=data)
    args = argparse.Namespace(config=path, target_tokens=0, price_per_chip_hour=0)
    for _, setting in search.rank(config, topology):
        try:
            return search.plan(setting.config, topology, args, remedy=False)
        except PlanError:
            continue
    return None


def row(topology: Any, r: dict[str, Any]) -> tuple[object, ...]:
    seconds = r["seconds"]
    least = r["minimum_traffic_bytes"]
    return (
        f"{topology.devices:,}", topology.shape, " x ".join(map(str, r["mesh"].values())),
        f"{r['num_microbatches']} x {r['micro_batch']}", r["remat"], f"{r['memory_bytes']['peak'] / GIB:.1f}",
        f"{r['traffic_bytes'] / 1e6:,.0f}", f"{r['traffic_bytes'] / least:.2f}" if least else "",
        f"{1e3 * seconds['matrix_units']:.1f}", f"{1e3 * seconds['links']:.1f}", r["bound"].replace("_", " "),
        f"{100 * r['best_case_mfu']:.0f} %", f"{r['best_case_tokens_per_second'] / topology.devices:,.0f}",
    )  # fmt: skip


def tables(configs: list[str], kind: str, per_chip: list[int]) -> Iterator[str]:
    """Yields the lines of all tables."""
    for name, sequences in itertools.product(configs, per_chip):
        yield f"\n### {name} on {kind}, {sequences} sequences a chip\n"
        yield "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
        for shape in SLICES[kind]:
            topology = parse_topology(f"{kind}:{shape}", 1)
            if topology.devices >= FEWEST:
                report = best(name, topology, sequences)
                cells = row(topology, report) if report else (f"{topology.devices:,}", shape, "nothing fits")
                yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="gpt2_small,gpt2_xl")
    parser.add_argument("--kind", default="v5p", choices=SLICES)
    parser.add_argument("--per_chip", default="8", help="sequences of a step, a chip: one table for each")
    parser.add_argument("--out", default="", metavar="FILE", help="put the tables there")
    args = parser.parse_args()
    logging.getLogger("gptjax").setLevel(logging.WARNING)
    os.environ.update({name: os.environ.get(name, value) for name, value in LIBTPU.items()})
    lines = []
    for line in tables(args.configs.split(","), args.kind, [int(n) for n in args.per_chip.split(",")]):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        file = pathlib.Path(args.out)
        file.write_text(file.read_text().split(MARK)[0] + MARK + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
