"""Tier N of the faults: hours of kills, flips and fuzz, with a table at the end. `make soak`, or

    python -m tests.faults.soak [--only=K1,C2] [--kills=200] [--flips=2000] [--fuzz=2000] [--json=runs/soak.json]

It may be stopped at any time, and shows what it has: the same command goes on from its JSON and does only what is
missing. Every run is compared, loss by loss and bit by bit, with a reference run.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from gptjax import cli
from tests import processes, runs
from tests.faults import test_damage
from tests.runs import Lab, kill, last_step, losses, restored_bytes, said, temporary_directories, validations, wait_for

STEPS, SAVE_EVERY = 48, 4
LONG = (f"train.num_steps={STEPS}", f"checkpoint.save_every={SAVE_EVERY}")
KILLS_A_RUN = 8
LEAK_STEPS, LEAK_SAVES = 10_000, 200
MIB = 2**20
POOL = 128 + (os.cpu_count() or 1) + 1  # tensorstore's threads: for files, for copies, and one that makes them


@dataclasses.dataclass
class Tally:
    """What has happened so far to one fault."""

    injected: int = 0
    survived: int = 0
    lost_bits: int = 0
    silent: int = 0
    orphans: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclasses.dataclass
class Soak:
    """What all faults share."""

    lab: Lab
    root: pathlib.Path  # for work directories
    token: str  # in the environment of each process that is started, by which those that were left are found

    def reference(self) -> pathlib.Path:
        return runs.make_reference(self.lab, "long-reference", "train.num_steps=48", "checkpoint.save_every=24")

    def orphans(self) -> int:
        """Returns how many processes of this soak are still there, and ends them."""
        found = 0
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                mine = f"GPTJAX_SOAK={self.token}".encode() in path.read_bytes()
                if mine and int(path.parent.name) != os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found += 1
            except (OSError, ValueError):
                continue
        return found

    def equals_reference(self, workdir: pathlib.Path, reference: pathlib.Path) -> bool:
        state, expected = restored_bytes(workdir, self.abstract), self.reference_state
        return (
            losses(workdir) == losses(reference)
            and validations(workdir) == validations(reference)
            and state == expected
        )

    def keep(self, workdir: pathlib.Path) -> pathlib.Path:
        """Returns a copy of a work directory, to look at when the soak is over."""
        return pathlib.Path(shutil.copytree(workdir, tempfile.mkdtemp(prefix="gptjax-soak-kept-"), dirs_exist_ok=True))

    @functools.cached_property
    def abstract(self) -> Any:
        return runs.make_run_on(self.lab.config()).abstract_state

    @functools.cached_property
    def reference_state(self) -> Any:
        return restored_bytes(self.reference(), self.abstract)


# Each fault does one injection at a time and yields, so that the count can be shown, kept and stopped.


def kills(soak: Soak, tally: Tally, count: int) -> Iterator[None]:
    """K1: SIGKILL at a random moment of a process's life, or of a save; after some the run is finished and compared."""
    reference = soak.reference()
    began = time.monotonic()
    soak.lab.train(soak.root / "first", *LONG, GPTJAX_SOAK=soak.token)
    life = time.monotonic() - began  # of an undisturbed run
    for number in itertools.count(tally.injected):  # also after a process that ended before it could be killed
        if tally.injected >= count:
            return
        workdir, found = soak.root / f"k1-{number}", []
        for turn in range(min(KILLS_A_RUN, count - tally.injected)):
            found.append(one_kill(soak, workdir, random.Random(1000 * number + turn), life))
            tally.orphans += soak.orphans()
            if found[-1] is None:
                break
        soak.lab.train(workdir, *LONG, GPTJAX_SOAK=soak.token)
        broken = [what for what in found if what]
        broken += [f"{name} was left" for name in temporary_directories(workdir)]
        made = len(found) - found.count(None)
        tally.injected += made  # now that what came of them is known
        tally.survived += made - min(made, len(broken))
        tally.lost_bits += not soak.equals_reference(workdir, reference)
        if broken:
            tally.note = "; ".join([*filter(None, [tally.note]), *broken])
            print(f"K1 after {number}: {broken}: see {soak.keep(workdir)}", flush=True)
        shutil.rmtree(workdir)
        yield


def one_kill(soak: Soak, workdir: pathlib.Path, moment: random.Random, life: float) -> str | None:
    """Returns what the process did that promise (a) does not say, '' if nothing; None if it ended before the kill."""
    reached = last_step(workdir)
    with soak.lab.start(workdir, *LONG, GPTJAX_SOAK=soak.token) as process:
        if moment.random() < 0.5:
            pause(process, moment.uniform(0, life))
        else:  # in a save
            before = set(temporary_directories(workdir))
            wait_for(lambda: process.poll() is not None or set(temporary_directories(workdir)) - before, pause=0.001)
            pause(process, moment.uniform(0, 0.2))
        if process.poll() == 0:
            return None
        kill(process)
    if process.returncode != -signal.SIGKILL:
        return f"it had ended with {process.returncode}"
    if "Traceback" in said(workdir):
        return "a traceback"
    resumed = re.search(r"^resumed from step (\d+)", said(workdir), re.M)
    if resumed and reached - int(resumed[1]) > 2 * SAVE_EVERY:
        return f"it had been at step {reached} and went on from {resumed[1]}"
    return ""


def pause(process: "subprocess.Popen[str]", seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.001)


def signals_to_one_of_two(soak: Soak, tally: Tally, count: int) -> Iterator[None]:
    """T3: both leave with 75 and the same checkpoint, and go on to the bits of two that were never disturbed."""
    reference = runs.make_once(soak.lab, "two", lambda workdir: processes.train(soak.lab, workdir, 2))
    while tally.injected < count:
        victim, step = tally.injected % 2, 2 + tally.injected % 11
        workdir = soak.root / f"t3-{tally.injected}"
        with processes.Group(soak.lab, workdir, 2) as made:
            for number in range(2):
                extra = {"GPTJAX_FAULT": f"step:{step}:term"} if number == victim else {}
                override = processes.one_micro_batch_each(2)
                made.start(number, override, "checkpoint.save_every=1000", GPTJAX_SOAK=soak.token, **extra)
            codes = made.wait()
        tally.injected += 1
        tally.survived += codes == [runs.PREEMPTED] * 2 and len(runs.checkpoint_steps(workdir)) == 1
        tally.orphans += soak.orphans()
        processes.train(soak.lab, workdir, 2)
        tally.lost_bits += losses(workdir) != losses(reference)
        yield


def second_signals(soak: Soak, tally: Tally, count: int) -> Iterator[None]:
    """T4: SIGINT saves; a second signal leaves at once, even from a step that hangs, and the checkpoints stand."""
    reference = soak.reference()
    while tally.injected < count:
        workdir, twice = soak.root / f"t4-{tally.injected}", tally.injected % 2
        fault = "step:11:hang" if twice else "step:11:stop"
        with soak.lab.start(workdir, *LONG, GPTJAX_FAULT=fault, GPTJAX_SOAK=soak.token) as process:
            if twice:
                wait_for(lambda w=workdir: last_step(w) >= 10, process)
            else:
                runs.wait_until_stopped(process)
            before = runs.checkpoint_steps(workdir)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            if twice:
                wait_for(lambda w=workdir: "SIGINT" in said(w), process)
                process.send_signal(signal.SIGINT)
            code = process.wait(timeout=120)
        tally.injected += 1
        kept = set(before) <= set(runs.checkpoint_steps(workdir))
        tally.survived += code == runs.PREEMPTED and (kept if twice else runs.checkpoint_steps(workdir)[-1] >= 11)
        tally.orphans += soak.orphans()
        soak.lab.train(workdir, *LONG)
        tally.lost_bits += not soak.equals_reference(workdir, reference)
        yield


def flips(soak: Soak, tally: Tally, count: int) -> Iterator[None]:
    """C2: one bit of a checkpoint's file; the other checkpoint is taken, or the bits are those that were saved."""
    healthy = soak.root / "healthy"
    test_damage.write_checkpoints(healthy)
    noticed = int(tally.note.split()[0]) if tally.note else 0
    while tally.injected < count:
        workdir = soak.root / f"c2-{tally.injected}"
        shutil.copytree(healthy, workdir)
        test_damage.flip_a_bit(workdir, random.Random(tally.injected), anywhere=bool(tally.injected % 2))
        tally.injected += 1
        try:
            noticed += test_damage.restore(workdir) == 1
            tally.survived += 1
        except AssertionError:
            tally.silent += 1
        shutil.rmtree(workdir)
        tally.note = f"{noticed} of them fell back, the others loaded equal bits"
        yield


def fuzz(soak: Soak, tally: Tally, count: int) -> Iterator[None]:
    """F1: rounds of all fuzz tests, each of other seeds than the one before."""
    files = ["tests/faults/test_fuzz.py", "tests/faults/conversion/test_conversion_fuzz.py"]
    while tally.injected < count:
        seed = tally.injected
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "f1", *files, f"--hypothesis-seed={seed}"]
        environment = os.environ | {"GPTJAX_FUZZ": "1", "JAX_PLATFORMS": "cpu", "GPTJAX_SOAK": soak.token}
        done = subprocess.run(
            [*command, "--hypothesis-show-statistics"],
            cwd=runs.REPOSITORY, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        generated = re.findall(r"generate phase.*?(\d+) passing.*?(\d+) failing", done.stdout, re.S)
        passing, failing = np.array(generated or [("0", "0")], int).sum(0).tolist()
        tally.injected += passing + failing
        tally.survived += passing
        if done.returncode or not passing:
            tally.note = "failed"
            (soak.root / f"fuzz-{seed}.txt").write_text(done.stdout)
            print(done.stdout[-5000:], flush=True)
        yield


def hangs(soak: Soak, tally: Tally, count: int) -> Iterator[None]:
    """H1: a step that never ends is ended by the watchdog, with 69 and the stacks of all threads."""
    reference = soak.reference()
    while tally.injected < count:
        workdir = soak.root / f"h1-{tally.injected}"
        fault = {"GPTJAX_FAULT": "step:7:hang", "GPTJAX_SOAK": soak.token}
        done = soak.lab.train(workdir, *LONG, "train.watchdog_timeout_seconds=15", expect=69, **fault)
        tally.injected += 1
        tally.survived += "in fault_point" in done.stderr and done.stderr.count("Thread 0x") > 1
        tally.orphans += soak.orphans()
        soak.lab.train(workdir, *LONG)
        tally.lost_bits += not soak.equals_reference(workdir, reference)
        yield


def leaks(soak: Soak, tally: Tally, count: int) -> Iterator[None]:
    """H2: a long run with many saves; memory, open files and threads stay where they are."""
    while tally.injected < count:
        workdir = soak.root / "h2"
        every = LEAK_STEPS // LEAK_SAVES
        overrides = (f"train.num_steps={LEAK_STEPS}", f"checkpoint.save_every={every}", f"train.log_every={every}")
        with soak.lab.start(workdir, *overrides, "train.eval_every=0", GPTJAX_SOAK=soak.token) as process:
            samples = watch(process, workdir)
            code = process.wait()
        tally.injected += 1
        tally.orphans += soak.orphans()
        counted = np.array([row for row in samples if LEAK_STEPS // 5 < row[0] < LEAK_STEPS]).T
        steps, memory, files, threads, pool = counted
        slope = 1000 * np.polyfit(steps, memory, 1)[0] / MIB
        part = len(steps) // 5  # the least of each: a save has some for a while
        grown = [int(kind[-part:].min() - kind[:part].min()) for kind in (files, threads)]
        tally.survived += int(code == 0 and slope < 1 and max(grown) <= 1 and pool.max() <= POOL)
        tally.note = f"{slope:+.2f} MiB per 1,000 steps, {grown[0]:+d} files, {grown[1]:+d} threads"
        shutil.rmtree(workdir)
        yield


def watch(process: "subprocess.Popen[str]", workdir: pathlib.Path) -> list[tuple[float, ...]]:
    """Returns (step, resident bytes, open files, threads, tensorstore's) ten times a second until the process ends.

    tensorstore's pool, which has one more whenever its files wait for one, is counted apart from all other threads.
    """
    samples, place = [], pathlib.Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(0.1)
        with contextlib.suppress(OSError, IndexError):  # it, or a thread of it, has just ended
            memory = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            names = [(task / "comm").read_text() for task in (place / "task").iterdir()]
            pool = sum(name.startswith("ts_pool") for name in names)
            files = len(list((place / "fd").iterdir()))
            samples.append((last_step(workdir), memory, files, len(names) - pool, pool))
    return samples


FAULTS = {
    "K1": kills,
    "T3": signals_to_one_of_two,
    "T4": second_signals,
    "C2": flips,
    "F1": fuzz,
    "H1": hangs,
    "H2": leaks,
}


def table(tallies: dict[str, Tally]) -> str:
    lines = [
        "| id | injected | survived | lost bits | silent | orphans | seconds | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, t in tallies.items():
        counts = f"{t.injected:,} | {t.survived:,} | {t.lost_bits} | {t.silent} | {t.orphans} | {t.seconds:,.0f}"
        lines.append(f"| {name} | {counts} | {t.note} |")
    return "\n".join(lines)


def is_clean(tally: Tally, target: int) -> bool:
    failed = tally.lost_bits or tally.silent or tally.orphans or tally.note == "failed"
    return tally.injected >= target and tally.survived == tally.injected and not failed


def run(soak: Soak, tallies: dict[str, Tally], targets: dict[str, int], path: pathlib.Path) -> None:
    for name, target in targets.items():
        tally, shown = tallies[name], time.monotonic()
        since = shown
        for _ in FAULTS[name](soak, tally, target):
            now = time.monotonic()
            tally.seconds, since = tally.seconds + now - since, now
            path.write_text(json.dumps({key: dataclasses.asdict(value) for key, value in tallies.items()}, indent=2))
            if now - shown > 10 or tally.injected >= target:
                print(f"{name}: {tally.injected:,} of {target:,}, {tally.seconds:,.0f} s {tally.note}", flush=True)
                shown = now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAULTS), help="ids, separated by commas")
    parser.add_argument("--kills", type=int, default=200, help="of K1")
    parser.add_argument("--pairs", type=int, default=10, help="of T3")
    parser.add_argument("--flips", type=int, default=2000, help="of C2")
    parser.add_argument("--fuzz", type=int, default=2000, help="cases of F1, at least")
    parser.add_argument("--json", default="runs/soak.json", help="what was counted; to begin anew, remove it")
    args = parser.parse_args()
    counts = {"K1": args.kills, "T3": args.pairs, "T4": 2, "C2": args.flips, "F1": args.fuzz, "H1": 1, "H2": 1}
    targets = {name: counts[name] for name in args.only.split(",")}
    path = pathlib.Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    tallies = {name: Tally() for name in FAULTS}
    if path.exists():
        tallies |= {name: Tally(**values) for name, values in json.loads(path.read_text()).items()}
    logging.disable(logging.CRITICAL)  # of the damage done in this process, as is the next
    sys.unraisablehook = cli.print_unraisable
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with tempfile.TemporaryDirectory(prefix="gptjax-soak-") as root:
        soak = Soak(runs.make_lab(pathlib.Path(root) / "lab"), pathlib.Path(root) / "runs", pathlib.Path(root).name)
        soak.root.mkdir()
        try:
            run(soak, tallies, targets, path)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", flush=True)
    shown = {name: tally for name, tally in tallies.items() if tally.injected}
    print(table(shown))
    return 0 if all(is_clean(tallies[name], target) for name, target in targets.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
