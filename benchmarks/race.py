"""Training steps of several contestants, each in a process of its own, taking turns on one device.

    python benchmarks/race.py --case=small --seconds=20 'gptjax --batch=32' 'torch --batch=32 --compile'
    python benchmarks/race.py --case=small --alone 'gptjax --batch=64' 'gptjax --batch=32'

A contestant is a command line of benchmarks/contestant.py; --python=FILE in it gives it a Python of its own. One that
fails, or is not ready in time, costs its own row only. They get ready at the same time and then take turns; with
--alone, each ends before the next one starts, so that it has the whole memory. A contestant takes a short turn as soon
as it is ready, so that a hanging one does not cost the others their rows. The ratio is that of the medians: the other
contestant's step time by the first one's. A row is recorded after each round; the last one counts. Exits with 1 if a
contestant failed at something this device can do.
"""

import argparse
import contextlib
import json
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import bench
from contestant import MARK
from train_step import CASES

ROUNDS, ROUNDS_ALONE = 5, 2
FIRST_TURN_SECONDS = 1.0
READY_SHARE = 0.6  # of the time that a part has
PYTHON = "--python="
HERE = pathlib.Path(__file__).resolve().parent


class Contestant:
    """A process that answers in lines; what else it prints goes to our standard error."""

    def __init__(self, text: str, case: str, memory: str) -> None:
        self.text = text
        self.known: dict[str, Any] = {}
        self.times: list[float] = []
        self.failed = ""
        words = shlex.split(text)
        python = next((word.removeprefix(PYTHON) for word in words if word.startswith(PYTHON)), sys.executable)
        words = [word for word in words if not word.startswith(PYTHON)]
        command = [python, str(HERE / "contestant.py"), *words, f"--case={case}"]
        environment = dict(os.environ)
        if memory:
            environment.pop("XLA_CLIENT_MEM_FRACTION", None)  # JAX takes one of the two
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = memory
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                self._answers.put(json.loads(line.removeprefix(MARK)))
            else:
                sys.stderr.write(line)
        self._answers.put(None)

    def hear(self, deadline: float, what: str) -> dict[str, Any]:
        """Returns the next answer; {} where there is none, and then `failed` says why."""
        try:
            while True:
                answer = self._answers.get(timeout=max(0.1, deadline - time.monotonic()))
                if answer is None:
                    self.failed = f"ended with code {self.process.wait()}"
                elif "failed" in answer:
                    self.failed = answer["failed"]
                elif "note" in answer:
                    print(f"{self.text}: {answer['note']}", flush=True)
                    continue
                break
        except queue.Empty:
            answer, self.failed = None, f"not {what} in time"
        if self.failed:
            self.end()
            return {}
        return answer or {}

    def get_ready(self, deadline: float) -> None:
        self.known = self.hear(deadline, "ready")
        self.known.pop("ready", None)

    def take_turn(self, seconds: float) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it has ended, which is told when it is heard
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        self.times += self.hear(time.monotonic() + 4 * seconds + 20, "back from its turn").get("times", [])

    def end(self) -> None:
        """Ends the process, which frees the device's memory, and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def tokens_per_second(contestant: Contestant, case: str) -> float:
    return contestant.known["batch"] * CASES[case][3] / bench.median(contestant.times)


def make_row(contestant: Contestant, first: Contestant, case: str) -> dict[str, Any]:
    row: dict[str, Any] = {"who": contestant.text, "case": case}
    if not contestant.times:
        return row | {"verdict": contestant.failed or "ready"}
    known, step = dict(contestant.known), bench.median(contestant.times)
    row |= {"batch": known.pop("batch"), "ms": 1e3 * step}
    row["tokens/s"] = tokens_per_second(contestant, case)
    flops, peak = (first.known.get(name, 0) for name in ("FLOP a token", "peak FLOP/s"))
    row["MFU %"] = 100 * flops * row["tokens/s"] / peak if peak else ""
    if contestant is not first and first.times:
        row["gptjax is x faster"] = tokens_per_second(first, case) / row["tokens/s"]
    known = {name: value for name, value in known.items() if name not in ("FLOP a token", "peak FLOP/s")}
    return row | known | {"rows of steps": len(contestant.times), "verdict": contestant.failed or "measured"}


def race(contestants: list[Contestant], args: argparse.Namespace) -> bool:
    """Lets `contestants` take turns, records a row for each, and returns whether all did what they can here."""
    deadline = time.monotonic() + args.ready_seconds
    for one in contestants:
        one.get_ready(deadline)
        if not one.failed and len(contestants) > 1:
            one.take_turn(FIRST_TURN_SECONDS)
        if one.failed or one.times:
            bench.record(args.part, make_row(one, contestants[0], args.case))
    running = [one for one in contestants if not one.failed]
    for one in running:
        one.times.clear()
    rounds = ROUNDS_ALONE if args.alone else ROUNDS
    for _ in range(rounds):
        running = [one for one in contestants if not one.failed]
        for one in running:
            one.take_turn(args.seconds / rounds / len(running))
        for one in running:
            bench.record(args.part, make_row(one, contestants[0], args.case))
    for one in contestants:
        one.end()
    return all(not one.failed or one.failed.startswith("not here") for one in contestants)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="+")
    parser.add_argument("--part", default="race", help="name of the rows")
    parser.add_argument("--case", default="small", choices=tuple(CASES))
    parser.add_argument("--seconds", type=float, default=20.0, help="of all turns together; with --alone, of each")
    parser.add_argument("--ready_share", type=float, default=READY_SHARE, help="of the part's time, to get ready in")
    parser.add_argument("--ready_seconds", type=float, default=0, help="the same in seconds")
    parser.add_argument("--alone", action="store_true", help="one after another, not taking turns")
    parser.add_argument(
        "--memory", default="", help="share of a GPU that each gptjax takes; default: the environment's"
    )
    args = parser.parse_args(arguments)
    limit = float(os.environ.get("GPTJAX_SECONDS", 200))  # that gpu.py leaves this part
    args.ready_seconds = args.ready_seconds or args.ready_share * limit
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    groups = [[text] for text in args.contestants] if args.alone else [args.contestants]
    done = True
    for texts in groups:
        contestants = [Contestant(text, args.case, args.memory) for text in texts]
        try:
            done &= race(contestants, args)
        finally:
            for one in contestants:
                one.end()
    sys.exit(not done)


if __name__ == "__main__":
    main()
