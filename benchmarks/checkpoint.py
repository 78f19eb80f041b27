"""How long a save holds up training, how long it takes in the background, and how long a verified restore takes.

    python benchmarks/checkpoint.py [--config=configs/quickstart.py] [--repeat=3]

The state is that of the config's model and optimizer, freshly initialised, on all devices; medians over the repeats.
"""

import argparse
import statistics
import tempfile
import time

import bench
import jax

from gptjax import config
from gptjax.checkpoint import Checkpointer
from gptjax.compute import resolve_compute
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.sharding import bytes_per_device, make_mesh
from gptjax.state import TrainState, make_init


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine = bench.machine()
    settings = config.load(args.config, {})
    mesh = make_mesh(settings.mesh)
    model = GPT(settings.model, resolve_compute(settings, mesh))
    abstract, init = make_init(model, make_optimizer(settings.optim), mesh=mesh, seed=0)
    state = jax.block_until_ready(init())
    rows: dict[str, list[float]] = {"save, held up": [], "save, until on disk": [], "restore and verify": []}
    with tempfile.TemporaryDirectory() as directory:
        for step in range(args.repeat + 1):
            checkpointer = Checkpointer(directory, keep=1)
            start = time.perf_counter()
            saved = TrainState(state.step + step, state.params, state.opt_state)
            checkpointer.save(saved, step, config=settings, history={}, data={})
            held = time.perf_counter() - start
            checkpointer.close()
            done = time.perf_counter() - start
            start = time.perf_counter()
            jax.block_until_ready(Checkpointer(directory).restore_latest(abstract))
            if step:  # the first one compiles and imports
                for name, seconds in zip(rows, (held, done, time.perf_counter() - start), strict=True):
                    rows[name].append(seconds)
    size = bytes_per_device(abstract) * mesh.size
    found = []
    for name, values in rows.items():
        seconds = statistics.median(values)
        found.append({"what": name, "config": args.config, "MB of state": size / 1e6, "ms": 1e3 * seconds})
        found[-1]["MB/s"] = size / 1e6 / seconds
    print(bench.table(found))
    print(bench.write("checkpoint", found, machine, args.out))


if __name__ == "__main__":
    main()
