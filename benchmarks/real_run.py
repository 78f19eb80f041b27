"""Runs of the real command, gptjax.main, as benchmarks: one on cold shards, one that is killed and resumed.

    python benchmarks/real_run.py cold [--case=small] [--batch=64] [--steps=60]
    python benchmarks/real_run.py resume [--data=DIR] [--steps=50]

cold: 300 shards (links to a few files of random GPT-2 ids) are dropped from the page cache twice a second while a run
trains on them; its tokens per second, the share of time that it waits for data, and the bytes that come from disk.
resume: the quickstart config takes 50 steps twice, once undisturbed, once killed (SIGKILL) half-way and started again:
whether the losses agree to the bit, and how soon the restart takes a step beyond the kill. On a GPU they may differ a
little, unless XLA_FLAGS has --xla_gpu_deterministic_ops=true. --data: a prepared directory of bytes; the default
prepares the config's own data.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import bench
from cold_shards import bytes_from_disk, drop_cache, link_shards, write_shard
from train_step import CASES

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES, SHARDS = 4, 300
COUNTED_FROM = 10  # steps: the first ones warm up
LIMIT_SECONDS = 300.0
CLOSE = 1e-3  # relative difference of losses that a GPU's order of sums explains


@contextlib.contextmanager
def started(workdir: pathlib.Path, flags: Sequence[str], fault: str = "") -> Iterator[subprocess.Popen[str]]:
    """Starts gptjax.main, its output in WORKDIR.log, and ends it, whatever happens; `fault` is its GPTJAX_FAULT."""
    command = [sys.executable, "-m", "gptjax.main", f"--workdir={workdir}", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    environment["GPTJAX_FAULT"] = fault
    with open(f"{workdir}.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def rows_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of steps in metrics.jsonl so far; a line that is being written is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for line in lines if "loss" in (row := json.loads(line))]


def finish(process: subprocess.Popen[str], workdir: pathlib.Path) -> None:
    """Waits for the end of a run, and raises RuntimeError with its last lines if it failed."""
    code = process.wait(LIMIT_SECONDS)
    if code:
        lines = pathlib.Path(f"{workdir}.log").read_text().splitlines()
        raise RuntimeError(f"gptjax.main ended with {code}: {' | '.join(lines[-3:])}")


def overrides(section_values: dict[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in section_values.items()]


def write_shards(directory: pathlib.Path, tokens: int) -> list[pathlib.Path]:
    """Writes FILES files of random ids, links SHARDS names to them, and returns the files."""
    files = [directory / f"{number}.ids" for number in range(FILES)]
    for file in files:
        write_shard(str(file), tokens)
    link_shards(files, directory, SHARDS)
    write_shard(str(directory / "random_val_000000.bin"), 200_000)
    return files


def keep_dropping(files: list[pathlib.Path], done: threading.Event) -> None:
    while not done.wait(0.5):
        drop_cache(files)


def cold(args: argparse.Namespace, directory: pathlib.Path) -> dict[str, Any]:
    data = directory / "data"
    data.mkdir()
    files = write_shards(data, args.tokens)
    layers, heads, width, positions, _, _ = CASES[args.case]
    settings = {
        "model.n_layer": layers, "model.n_head": heads, "model.n_embd": width, "model.block_size": positions,
        "data.path": data, "data.global_batch_size": args.batch, "data.eot_position": "last",
        "train.micro_batch_size": args.batch, "train.num_steps": args.steps, "train.log_every": 1,
        "train.eval_every": 0, "train.eval_batches": 1, "optim.warmup_steps": 10,
        "checkpoint.save_every": args.steps, "log.tensorboard": False,
    }  # fmt: skip
    flags = ["--config=configs/gpt2_small.py", *overrides(settings)]
    done, workdir = threading.Event(), directory / "run"
    thread = threading.Thread(target=keep_dropping, args=(files, done))
    thread.start()
    reads: list[int] = []  # while the counted steps run
    try:
        with started(workdir, flags) as process:
            while process.poll() is None:
                seen = len(rows_of(workdir))
                if COUNTED_FROM <= seen < args.steps:
                    reads.append(bytes_from_disk(process.pid))
                time.sleep(0.1)
            finish(process, workdir)
    finally:
        done.set()
        thread.join()
    rows = [row for row in rows_of(workdir) if row["step"] > COUNTED_FROM and row["tokens_per_second"]]
    waits = [row["data_wait"] for row in rows]  # as shares of the steps' time
    return {
        "what": f"gptjax.main on {SHARDS} cold shards", "case": args.case, "batch": args.batch, "steps": args.steps,
        "tokens/s": bench.median(row["tokens_per_second"] for row in rows),
        "wait for data %": 100 * sum(waits) / len(waits),
        "MB from disk": (max(reads) - min(reads)) / 1e6 if reads else "",
        "GPU memory": "92 %" if "so JAX takes 92 %" in pathlib.Path(f"{workdir}.log").read_text() else "JAX's default",
    }  # fmt: skip


def resume(args: argparse.Namespace, directory: pathlib.Path) -> dict[str, Any]:
    often = {"train.num_steps": args.steps, "train.log_every": 1, "train.eval_every": 0, "train.eval_batches": 2}
    often |= {"train.sample_every": 0, "checkpoint.save_every": args.steps // 5, "log.tensorboard": False}
    often |= {"optim.warmup_steps": 10, "data.tokenizer": "bytes", "model.vocab_size": 257}
    if args.data:
        often["data.path"] = pathlib.Path(args.data).resolve()
    flags = ["--config=configs/quickstart.py", *overrides(often)]
    reference, killed = directory / "reference", directory / "killed"
    with started(reference, flags) as process:
        finish(process, reference)
    with started(killed, flags, fault=f"step:{args.steps // 2}:kill") as process:
        was_killed = process.wait(LIMIT_SECONDS) == -signal.SIGKILL
    before, start, resumed, first = len(rows_of(killed)), time.perf_counter(), 0, 0.0
    with started(killed, flags) as process:
        while process.poll() is None and not first:
            said = re.search(r"resumed from step (\d+)", pathlib.Path(f"{killed}.log").read_text())
            resumed = int(said[1]) if said else 0
            if resumed and rows_of(killed)[-1]["step"] > max(resumed, before):
                first = time.perf_counter() - start
            time.sleep(0.01)
        finish(process, killed)
    losses = [[row["loss"] for row in rows_of(workdir)] for workdir in (reference, killed)]
    log = pathlib.Path(f"{killed}.log").read_text()
    interrupted = bool(was_killed and resumed)
    return {
        "what": "quickstart, killed and started again", "steps": args.steps, "killed after": before,
        "resumed from": resumed, "step beyond the kill after s": first or "",
        "verdict": judge(losses, args.steps, on_cpu=is_on_cpu(log), interrupted=interrupted),
    }  # fmt: skip


def is_on_cpu(log: str) -> bool:
    """Returns whether a run computed on a CPU, by the line of its devices."""
    said = re.search(r"devices: \d+ x (.+?), mesh", log)
    return said is None or said[1] == "cpu"


def judge(losses: Sequence[Sequence[float]], steps: int, *, on_cpu: bool, interrupted: bool) -> str:
    """Compares the losses of an undisturbed run and of one that was killed and resumed.

    A CPU must give the same bits. A GPU sums scatters and the gradient of attention in any order by default.
    """
    if any(len(one) != steps for one in losses):
        return "WRONG: steps are missing"
    if not interrupted:
        return "WRONG: it was not killed, or did not resume"
    differences = [abs(b - a) / max(abs(a), 1e-30) for a, b in zip(*losses, strict=True) if a != b]
    if not differences:
        return "right: equal to the bit"
    apart = "not bit-equal: up to" if all(difference < CLOSE for difference in differences) and not on_cpu else ""
    return f"{apart or 'WRONG: the losses differ by up to'} {max(differences):.2g} relative"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cold", "resume"))
    parser.add_argument("--case", default="small", choices=tuple(CASES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of each file of the cold shards")
    parser.add_argument("--data", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        row = {"cold": cold, "resume": resume}[args.what](args, pathlib.Path(directory))
    bench.record("data" if args.what == "cold" else "resume", row)
    sys.exit(str(row.get("verdict", "")).startswith("WRONG"))


if __name__ == "__main__":
    main()
