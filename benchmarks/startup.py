"""How long until something happens: import, --help, the first train step, and a new step of a run that was killed.

    python benchmarks/startup.py [--config=configs/quickstart.py] [--repeat=3] [--no_restart] [--config.x.y=VALUE ...]
    python benchmarks/startup.py --config=configs/gpt2_small.py --no_restart --config.data.global_batch_size=4

Each figure is a process of its own, started and timed from outside; the median is shown. The data is prepared first and
not counted. A step is dispatched when the program has been compiled or read from the cache and handed to the device;
on a CPU the step itself may then take seconds.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import bench

ROOT = pathlib.Path(__file__).resolve().parent.parent


def seconds_until(command: list[str], marker: str, environment: dict[str, str]) -> float:
    """Returns the seconds from the start of `command` to a line that starts with `marker`, or to its end if ''."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if marker and line.startswith(marker):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    if marker or process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode} before {marker!r}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no_restart", action="store_true", help="leave out the run that is killed: 45 steps")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args, overrides = parser.parse_known_args()
    machine, found = bench.machine(), []
    python = [sys.executable, "-u"]
    train = [*python, "-m", "gptjax.main", f"--config={args.config}", "--config.train.log_every=1", *overrides]
    with tempfile.TemporaryDirectory() as directory:
        count = iter(range(1000))

        def first_step(cache: str, marker: str = "compiled the train step") -> float:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{directory}/{cache}"}
            return seconds_until([*train, f"--workdir={directory}/run{next(count)}"], marker, environment)

        def restart() -> float:
            """Kills a run after its save of step 20, and times the same command until it has taken a new step."""
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{directory}/unused"}
            command = [*train, "--config.checkpoint.save_every=20", f"--workdir={directory}/run{next(count)}"]
            seconds_until(command, "step 45/", environment)
            return seconds_until(command, "step ", environment)

        empty = [*python, "-c", "pass"]
        first_step("unused", "step 1/")  # prepares the data and fills the cache
        plain = dict(os.environ)
        rows = {
            "python itself": lambda: seconds_until(empty, "", plain),
            "import gptjax": lambda: seconds_until([*python, "-c", "import gptjax"], "", plain),
            "python -m gptjax.main --help": lambda: seconds_until([*python, "-m", "gptjax.main", "--help"], "", plain),
            "dispatch, cold cache": lambda: first_step(f"cold{next(count)}"),
            "dispatch, warm cache": lambda: first_step("unused"),
            "first step ended, warm cache": lambda: first_step("unused", "step 1/"),
            "restart until a new step, warm": restart,
        }
        if args.no_restart:
            del rows["restart until a new step, warm"]
        for name, measure in rows.items():
            values = [measure() for _ in range(args.repeat)]
            found.append({"what": name, "config": args.config, "seconds": statistics.median(values)})
            print(f"{name:32s} {found[-1]['seconds']:6.2f} s", flush=True)
    print(bench.write("startup", found, machine, args.out))


if __name__ == "__main__":
    main()
