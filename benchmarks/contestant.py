"""One contestant of benchmarks/race.py, in a process of its own: prepares training steps, then runs them when told to.

    python benchmarks/contestant.py gptjax --case=small --batch=64,32 [--xla=...] [--loss=triton] [--trace=DIR]
    python benchmarks/contestant.py torch --case=small --batch=32 [--compile]

It answers in lines that start with MARK and hold JSON: what it is, once it is ready; then, for each line with a number
of seconds on standard input, the seconds of the steps that it took in that time. --batch: the first that fits.
"""

import argparse
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from train_step import CASES

MARK = "@contestant "
OUT_OF_MEMORY = 71
MEMORY_WORDS = ("out of memory", "resource_exhausted", "allocate memory", "bad_alloc")
# Between two waits for the device, so that the host runs ahead as in training. Steps of over a second are alone.
STEPS_IN_A_ROW = 4
ROW = "steps in a row"  # their number in what is known of a contestant
Run = Callable[[int], None]  # run(n) takes n steps and waits for the last


def say(values: Any) -> None:
    print(MARK + json.dumps(values), flush=True)


def make_gptjax(args: argparse.Namespace, batch: int) -> tuple[Run, dict[str, Any]]:
    """Returns run(n) and what is known of it: memory, compile seconds, and the model's FLOPs.

    Raises:
        MemoryError: the step needs more than JAX may take; found out before it runs.
    """
    import jax
    from train_step import make_config, make_ours, parse_options

    from gptjax.chips import device_memory, find_chip
    from gptjax.cpu_memory import keep_freed_memory
    from gptjax.devices import expects_accelerator
    from gptjax.plan.aot import peak_bytes
    from gptjax.sizes import train_flops_per_token

    if not expects_accelerator():
        keep_freed_memory()  # as a run does
    settings = {"attention": args.attention, "remat": args.remat, "dtype": args.dtype, "loss": args.loss}
    settings |= {"scan_unroll": args.scan_unroll, "steps_per_dispatch": args.steps_per_dispatch}
    config = make_config(args.case, batch, settings)
    ours = make_ours(config, options=parse_options(args.xla))
    need, device = peak_bytes(ours.step), jax.devices()[0]
    have = device_memory(device)
    if device.platform != "cpu" and need > have:
        raise MemoryError(f"out of memory: the step needs {need / 2**30:.1f} GiB of {have / 2**30:.1f}")

    def run(steps: int) -> None:
        metrics = None
        for done in range(0, steps, ours.most_steps):
            ours.state, metrics = ours.step(ours.state, ours.batches(min(ours.most_steps, steps - done)))
        jax.block_until_ready(metrics)

    chip = find_chip(device.device_kind)
    known = {"GiB": need / 2**30, "compile s": ours.compile_seconds}
    known[ROW] = max(STEPS_IN_A_ROW, ours.most_steps)
    known |= {"FLOP a token": train_flops_per_token(config.model), "peak FLOP/s": chip.peak_flops if chip else 0}
    return run, known


def make_torch(args: argparse.Namespace, batch: int) -> tuple[Run, dict[str, Any]]:
    import torch_gpt

    if args.host_gb:
        limit_host_memory(args.host_gb)
    layers, heads, width, positions, _, vocabulary = CASES[args.case]
    shape = (layers, heads, width, positions, -(-vocabulary // 128) * 128)
    run, peak = torch_gpt.make_step(shape, batch, compiled=args.compile)
    start = time.perf_counter()
    run(1)
    return run, {"GiB": peak(), "compile s": time.perf_counter() - start if args.compile else ""}


def limit_host_memory(gigabytes: float) -> None:
    """Lets this process take so much more memory of the host than it has."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    now = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))
    limit = now + int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def prepare(args: argparse.Namespace) -> tuple[Run, int, dict[str, Any]]:
    """Returns (run, batch, what is known) of the first batch that fits."""
    make = {"gptjax": make_gptjax, "torch": make_torch}[args.who]
    batches = [int(batch) for batch in args.batch.split(",")]
    for batch in batches:
        try:
            run, known = make(args, batch)
            run(1)
            run(known.setdefault(ROW, STEPS_IN_A_ROW))
            return run, batch, known
        except Exception as error:
            if batch == batches[-1] or not is_out_of_memory(error):
                raise
            say({"note": f"batch {batch} does not fit"})
    raise AssertionError("there is a last batch")


def is_out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, MemoryError) or any(word in text for word in MEMORY_WORDS)


def take_turn(run: Run, seconds: float, row: int) -> list[float]:
    """Returns the seconds of each step, as a mean over each row of steps; the first step is not counted."""
    start = time.perf_counter()
    run(1)
    if time.perf_counter() - start > 1:
        row = 1
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run(row)
        times.append((time.perf_counter() - start) / row)
    return times


def trace(run: Run, directory: str) -> None:
    import jax

    with jax.profiler.trace(directory):
        run(3)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=("gptjax", "torch"))
    parser.add_argument("--case", default="small", choices=tuple(CASES))
    parser.add_argument("--batch", default="32", help="sequences: the first of these that fits")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan_unroll", type=int, default=-1, help="-1: what a run does on this device")
    parser.add_argument("--steps_per_dispatch", type=int, default=0, help="0: what a run does")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--loss", default="xla")
    parser.add_argument("--xla", default="", help="options for the compiler, NAME=VALUE,NAME=VALUE")
    parser.add_argument("--compile", action="store_true", help="torch: by torch.compile")
    parser.add_argument("--trace", default="", help="gptjax: directory of a profile of three steps")
    parser.add_argument(
        "--host_gb", type=float, default=0, help="torch: more memory of the host than this it may not take"
    )
    return parser.parse_args(arguments)


def main() -> None:
    args = parse(sys.argv[1:])
    try:
        run, batch, known = prepare(args)
        if args.trace:
            trace(run, args.trace)
        say({"ready": True, "batch": batch} | known)
        for line in sys.stdin:
            say({"times": take_turn(run, float(line), known[ROW])})
    except Exception as error:  # it costs this contestant its row, and is told as one line
        kind = "out of memory" if is_out_of_memory(error) else "failed"
        if type(error).__name__ == "ConfigError":  # by its name: in torch's process gptjax is never imported
            kind = "not here"
        first = next(iter(str(error).strip().splitlines()), "")[:300]
        say({"failed": f"{kind}: {type(error).__name__}: {first}"})
        sys.exit(OUT_OF_MEMORY if kind == "out of memory" else 1)


if __name__ == "__main__":
    main()
