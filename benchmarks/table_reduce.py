"""Paired trials of compute.table_reduce_dtype=bfloat16: the same seeds with and without it, and a paired test.

    python benchmarks/table_reduce.py [--seeds=5] [--steps=300] [--dir=/tmp/table_reduce]

Each run is the quickstart's model, with each micro-batch of one sequence in the place of one of eight devices. A CPU's
compiler sums bfloat16 in float32, which hides what is to be measured. So here the gradients of micro-batches are summed
as a ring of eight GPUs sums those of devices: one after the other, rounded after each addition. All else is in float32,
so that nothing has been rounded before. Rerun the command to continue.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

DTYPES = ("float32", "bfloat16")


def run(flags: list[str]) -> None:
    """Trains one run in this process. It sums over micro-batches as a ring of GPUs sums over devices."""
    import jax
    import jax.numpy as jnp

    from gptjax import main as gptjax_main
    from gptjax import step
    from gptjax.params import find
    from gptjax.sharding import path_name

    make_gradient_fn: Any = step.make_gradient_fn
    accumulate = step.accumulate

    def sum_in_a_ring(run_microbatch: Any, tokens_ABT: Any, parallel: Any) -> Any:
        def add(path: Any, total: Any, gradient: Any) -> Any:
            is_table = find(path_name(path)).role == "table"
            dtype = parallel.table_reduce_dtype if is_table else parallel.reduce_dtype
            if dtype == jnp.float32:
                return total + gradient
            return rounded(total + rounded(gradient))

        def add_all(total: Any, micro: Any) -> Any:
            (grads, sums), (new_grads, new_sums) = total, run_microbatch(*micro)
            grads = jax.tree.map_with_path(add, grads, new_grads)
            return (grads, jax.tree.map(jnp.add, sums, new_sums)), None

        index_A = jnp.arange(len(tokens_ABT))
        result = jax.eval_shape(run_microbatch, index_A[0], tokens_ABT[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
        return jax.lax.scan(add_all, zeros, (index_A, tokens_ABT))[0]

    def rounded(x: Any) -> Any:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may drop a pair of casts, not this

    def make(loss_fn: Any, *, config: Any, parallel: Any) -> Any:
        def gradient_fn(*arguments: Any) -> Any:
            # While the step is traced: the evaluation step accumulates something else.
            step.accumulate = lambda run, tokens_ABT: sum_in_a_ring(run, tokens_ABT, parallel)
            try:
                return made(*arguments)
            finally:
                step.accumulate = accumulate

        made = make_gradient_fn(loss_fn, config=config, parallel=parallel)
        return gradient_fn

    step.make_gradient_fn = make
    sys.argv = ["table_reduce", *flags]
    gptjax_main.cli()


def train(workdir: pathlib.Path, dtype: str, *, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the losses of a run that it trains to its end."""
    settings = {
        "compute.reduce_dtype": "bfloat16",
        "compute.table_reduce_dtype": dtype,
        "data.seed": seed,
        "train.seed": seed,
        "train.micro_batch_size": 1,
        "train.num_steps": args.steps,
        "train.eval_every": args.steps // 4,
        "train.eval_batches": args.eval_batches,
        "train.sample_every": 0,
        "train.log_every": args.steps // 20,
        "checkpoint.save_every": args.steps,
        "checkpoint.keep": 1,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--run", "--config=quickstart"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with open(workdir.with_suffix(".log"), "w") as log:
        # The data are prepared once, below the directory in which the commands run.
        command += [f"--workdir={workdir}", *flags]
        subprocess.run(command, check=True, cwd=workdir.parent, env=env, stdout=log, stderr=subprocess.STDOUT)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "train": {row["step"]: row["loss"] for row in rows if "loss" in row},
        "validation": {row["step"]: row["val_loss"] for row in rows if "val_loss" in row},
    }


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the mean losses, and below them the mean differences with their 95 % intervals. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gptjax"}  # text as text, and the same file each time
    figure, (above, below) = plt.subplots(2, figsize=(8, 5), sharex=True, layout="constrained")
    for kind, color in (("train", "#8fa3b5"), ("validation", "#1f6fb2")):
        chosen = [row for row in rows if row["loss"] == kind]
        steps, exact, difference, low, high = (
            [float(row[name]) for row in chosen] for name in ("step", "float32", "difference", "from", "to")
        )
        above.plot(steps, exact, "o", color=color, label=f"{kind}, float32")
        sums = [one + other for one, other in zip(exact, difference, strict=True)]
        above.plot(steps, sums, "x", color="black", label=f"{kind}, bfloat16")
        below.vlines(steps, low, high, color=color)
        below.plot(steps, difference, "o", color=color)
    above.set_ylabel("loss, nats per token")
    above.legend()
    below.axhline(0, color="black", linewidth=1)
    below.set_ylabel("bfloat16 minus float32")
    below.set_xlabel("step")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    import bench
    import numpy as np
    from scipy import stats

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval_batches", type=int, default=60)
    parser.add_argument("--dir", default="/tmp/table_reduce", help="of data and runs")
    parser.add_argument("--svg", default="benchmarks/results/table_reduce.svg", help="file of the picture")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    root = pathlib.Path(args.dir).resolve()  # the commands run in it
    root.mkdir(parents=True, exist_ok=True)
    stored = root / "results.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    for seed in range(args.seeds):
        for dtype in DTYPES:
            key = f"{dtype} {seed}"
            if key not in found:
                found[key] = train(root / key.replace(" ", "-"), dtype, seed=seed, args=args)
                stored.write_text(json.dumps(found, indent=1))
                print(key, found[key]["validation"], flush=True)
    found = json.loads(stored.read_text())  # steps are text in it, also in the runs of this process
    rows = []
    for kind in ("train", "validation"):
        for step in found["float32 0"][kind]:
            exact, rounded = ([found[f"{dtype} {seed}"][kind][step] for seed in range(args.seeds)] for dtype in DTYPES)
            test = stats.ttest_rel(rounded, exact)
            low, high = test.confidence_interval(0.95)
            row = {"loss": kind, "step": step, "pairs": args.seeds, "float32": float(np.mean(exact))}
            row |= {"difference": float(np.mean(np.subtract(rounded, exact))), "from": float(low), "to": float(high)}
            rows.append(row | {"p": float(test.pvalue), "lower in": int(np.sum(np.less(rounded, exact)))})
    draw(rows, pathlib.Path(args.svg))
    print(bench.table(rows))
    settings = {"steps": args.steps, "eval_batches": args.eval_batches}
    print(bench.write("table_reduce", rows, bench.machine() | settings, args.out))


if __name__ == "__main__":
    if "--run" in sys.argv:
        sys.argv.remove("--run")
        run(sys.argv[1:])
    else:
        main()
