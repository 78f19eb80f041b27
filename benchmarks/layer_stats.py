"""What train.stats_every costs: the share of the time that statistics of layers add to training.

    python benchmarks/layer_stats.py --cases=toy,char,small-cpu [--every=100] [--seconds=60]

Steps with and without statistics take turns, and the program that looks at a forward pass, which runs once in `every`
steps. All figures are medians of one run.
"""

import argparse
import dataclasses
from typing import Any

import bench
import jax
from train_step import CASES, make_config, make_ours

from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import Config
from gptjax.documents import EndOfText
from gptjax.layer_stats import jit_stats_step
from gptjax.model import GPT
from gptjax.sharding import make_mesh


def with_stats(config: Config, every: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, stats_every=every))


def measure(case: str, *, every: int, seconds: float, rounds: int) -> dict[str, Any]:
    config = make_config(case, 0, {"steps_per_dispatch": 1})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    off, on = make_ours(config), make_ours(with_stats(config, every))
    model = GPT(config.model, resolve_compute(config, mesh), resolve_parallel(config, mesh))
    sharding = on.state.step.sharding
    stats_step: Any = jit_stats_step(model, config, eot=EndOfText(0, "last"), sharding=sharding)

    def look() -> None:
        jax.block_until_ready(stats_step(on.state.params, on.tokens))

    times = bench.interleave({"off": off, "on": on, "look": look}, seconds=seconds, rounds=rounds)
    step, observed, seen = (bench.median(times[name]) for name in ("off", "on", "look"))
    return {
        "case": case,
        "ms a step": 1e3 * step,
        "with statistics": 1e3 * observed,
        "forward pass, ms": 1e3 * seen,
        "compile s more": on.compile_seconds - off.compile_seconds,
        f"% of the time at {every}": 100 * (observed - step + seen / every) / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="toy,char,small-cpu", help=f"of {', '.join(CASES)}")
    parser.add_argument("--every", type=int, default=100, help="train.stats_every")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each case")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine = bench.machine()
    rows = [measure(case, every=args.every, seconds=args.seconds, rounds=args.rounds) for case in args.cases.split(",")]
    print(bench.table(rows))
    print(bench.write("layer_stats", rows, machine, args.out))


if __name__ == "__main__":
    main()
