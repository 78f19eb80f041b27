"""Everything that matters on one GPU, in one call: the parts of benchmarks/gpu.sh, in order of their value.

    bash benchmarks/gpu.sh [--out=DIR] [--deadline=540] [--only=PART,PART] [--limit=PART:SECONDS] [--toy]

Each figure is appended to DIR/results.jsonl as soon as it is known, by the process that measures it. A part that fails,
or that its limit ends, costs its own rows only; what the deadline leaves no time for is named. All parts share their
compiled programs and what XLA's autotuning finds, which comes back as DIR/autotune.tgz: copied to benchmarks/carry, or
left there, it is loaded the next time.
DIR then has five files: results.jsonl, tables.txt, log.txt, autotune.tgz, trace.tgz.
--toy: the same at toy size, to try the script on a CPU; then --host_gb=GB lets the last peer run out of memory.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from typing import Any, NoReturn

import bench

from gptjax.gpu_memory import FRACTIONS, RUN_FRACTION, VARIABLE

HERE = pathlib.Path(__file__).resolve().parent
CARRY = HERE / "carry"  # of gpu_carry.py
LARGEST_FILE = 16 * 10**6  # bytes of one file that comes back
RESERVE_SECONDS = 8.0  # of the deadline, for the tables and archives at the end
LEAST_SECONDS = 8.0  # of a part: with less, it is left out
TOY_LIMIT = 180.0  # seconds of a toy part: it ends what hangs, and no busy machine meets it
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"  # products by cuBLASLt: they compile in half the time
BEST = "<best>"
CUBLASLT = "xla_gpu_enable_triton_gemm=false,xla_gpu_autotune_level=0"
RESULTS = "results.jsonl"
BAD_VERDICTS = ("failed", "FAILED", "ended", "left", "WRONG", "JAX", "stopped")  # how they begin
PROBE = (
    "import json, jax; device = jax.devices()[0]; "
    "print('@probe', json.dumps({'platform': device.platform, 'card': device.device_kind, "
    "'GiB': (device.memory_stats() or {}).get('bytes_limit', 0) / 2**30}))"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Commands that run one after another.

    BEST in a command stands for the compiler options of the fastest train step so far with the same batch.
    """

    name: str
    limit: float  # seconds, for all commands together
    commands: tuple[tuple[str, ...], ...]
    xla_flags: str = ""


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-u", str(HERE / f"{name}.py"), *arguments)


def race(part: str, case: str, seconds: float, *arguments: str) -> tuple[str, ...]:
    return script("race", f"--part={part}", f"--case={case}", f"--seconds={seconds}", *arguments)


def losses(batch: int) -> tuple[str, str]:
    """Returns the contestants of the two losses, which take turns: the default is kept unless Triton wins here."""
    return f"gptjax --batch={batch} {BEST}", f"gptjax --batch={batch} --loss=triton {BEST}"


def carried_data() -> tuple[str, ...]:
    """Returns the flag for the data that gpu_carry.py prepared, none if they are not there."""
    return (f"--data={CARRY / 'data'}",) if (CARRY / "data").exists() else ()


def gpu_parts(out: str) -> list[Part]:
    """Returns the parts for a card of 80 GB or more, the most valuable first."""
    trace = f"--trace={shlex.quote(f'{out}/trace')}"
    torch = ("torch --batch=32 --compile", "torch --batch=32")
    decode = ("--prompt=32", "--seconds=5", "--dtype=bfloat16")
    quick = f"--xla={CUBLASLT}"
    return [
        Part("ceilings", 45, (script("ceilings", "--seconds=4", "--products=small:64"),), NO_TRITON),
        Part("correct", 110, (script("correct"),), f"{NO_TRITON} --xla_gpu_autotune_level=0"),
        Part("train-cublaslt", 70, (
            race("train-cublaslt", "small", 4, "--alone", f"gptjax --batch=64 {quick}", f"gptjax --batch=32 {quick}"),
        )),
        Part("train", 120, (race("train", "small", 4, "--alone", "gptjax --batch=64", "gptjax --batch=32"),)),
        Part("peer", 120, (race("peer", "small", 24, "--memory=0.24", f"gptjax --batch=32 {BEST}", *torch),)),
        Part("triton-loss", 60, (
            race("triton-loss", "small", 8, "--memory=0.42", *losses(64)),
        )),
        Part("decode", 60, tuple(script("sample", f"--batch={batch}", *decode) for batch in (1, 256))),
        Part("xl", 120, (  # it takes 73 s to compile on two cores
            race("xl", "xl", 8, "--alone", "--ready_share=0.8", f"gptjax --batch=16,8,4 {quick}"),
        )),
        Part("data", 70, (script("real_run", "cold", "--steps=80"),)),
        Part("resume", 70, (script("real_run", "resume", *carried_data()),)),
        Part("trace", 40, (race("trace", "small", 1, "--alone", f"gptjax --batch=64 {trace} {BEST}"),)),
    ]  # fmt: skip


def toy_parts(out: str, host_gb: str) -> list[Part]:
    """Returns the same parts at toy size; with `host_gb`, the last peer has a large batch and so much memory for it."""
    trace = f"--trace={shlex.quote(f'{out}/trace')}"
    last = f"torch --batch=20000 --host_gb={host_gb}" if host_gb else "torch --batch=2"
    torch = ("torch --batch=2 --compile", last)
    decode = ("--case=mini", "--prompt=8", "--new=16", "--seconds=0.5")
    quick = "--xla=xla_cpu_enable_fast_math=true"
    return [
        Part("ceilings", TOY_LIMIT, (script("ceilings", "--width=256", "--seconds=0.5", "--products=mini:2"),)),
        Part("correct", TOY_LIMIT, (script("correct", "--case=mini"),)),
        Part("train-cublaslt", TOY_LIMIT, (
            race("train-cublaslt", "mini", 0.5, "--alone", f"gptjax --batch=2 {quick}", f"gptjax --batch=1 {quick}"),
        )),
        Part("train", TOY_LIMIT, (race("train", "mini", 0.5, "--alone", "gptjax --batch=2", "gptjax --batch=1"),)),
        Part("peer", TOY_LIMIT, (race("peer", "mini", 2, f"gptjax --batch=2 {BEST}", *torch),)),
        Part("triton-loss", TOY_LIMIT, (
            race("triton-loss", "mini", 1, *losses(2)),
        )),
        Part("decode", TOY_LIMIT, tuple(script("sample", f"--batch={batch}", *decode) for batch in (1, 4))),
        Part("xl", TOY_LIMIT, (race("xl", "mini", 0.5, "--alone", "gptjax --batch=2,1"),)),
        Part("data", TOY_LIMIT, (
            script("real_run", "cold", "--case=mini", "--batch=4", "--steps=20", "--tokens=500000"),
        )),
        Part("resume", TOY_LIMIT, (script("real_run", "resume", *carried_data()),)),
        Part("trace", TOY_LIMIT, (race("trace", "mini", 0.5, "--alone", f"gptjax --batch=2 {trace} {BEST}"),)),
    ]  # fmt: skip


def find_best(rows: Sequence[dict[str, Any]], contestant: str) -> str:
    """Returns the compiler's options of the fastest train step so far with the contestant's batch."""
    batch = next(word for word in contestant.split() if word.startswith("--batch="))
    found = [row for row in rows if row["part"].startswith("train") and batch in row.get("who", "").split()]
    best = max((row for row in found if "tokens/s" in row), key=lambda row: row["tokens/s"], default={"who": ""})
    return " ".join(word for word in best["who"].split() if word.startswith("--xla="))


class Driver:
    """Runs parts until the deadline, with their output in the log, and records what happened to each."""

    def __init__(self, out: pathlib.Path, environment: dict[str, str], deadline: float) -> None:
        self.out, self.environment, self.deadline = out, environment, deadline
        self.results = out / RESULTS

    def say(self, text: str) -> None:
        print(text, flush=True)
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def record(self, part: str, row: dict[str, Any]) -> None:
        self.say(bench.describe(part, row))
        bench.append(self.results, part, row)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic() - RESERVE_SECONDS

    def run(self, part: Part, limit: float) -> None:
        if self.seconds_left() < LEAST_SECONDS:
            self.record(part.name, {"verdict": "left out: the deadline is near"})
            return
        self.say(f"\n=== {part.name} ({time.strftime('%H:%M:%S')}, {self.seconds_left():.0f} s left)")
        start = time.monotonic()
        end = start + min(limit, self.seconds_left())
        flags = f"{self.environment['XLA_FLAGS']} {part.xla_flags}".strip()
        environment = self.environment | {"XLA_FLAGS": flags, "GPTJAX_SECONDS": f"{end - start:.0f}"}
        for given in part.commands:
            command = [
                word.replace(BEST, find_best(bench.read_rows(self.results), word)) if BEST in word else word
                for word in given
            ]
            verdict = self._run_command(command, end, environment)
            if verdict:
                about = " ".join(command[2:]).replace(f"{HERE}/", "")
                self.record(part.name, {"command": about, "verdict": verdict})
        self.say(f"({time.monotonic() - start:.0f} s)")

    def _run_command(self, command: Sequence[str], end: float, environment: dict[str, str]) -> str:
        """Returns what went wrong with a command, '' if nothing; it and all that it started are gone afterwards."""
        if end <= time.monotonic():
            return "left out: the part's time is over"
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=environment, start_new_session=True, cwd=HERE.parent,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_listen, args=(process, lines), daemon=True).start()
        last, over = "", 0.0  # the last line, and when the process was seen to have ended
        try:
            while time.monotonic() < end and not (over and time.monotonic() > over + 2):
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=0.2)
                    if line is None:
                        break
                    self.say(line)
                    last = line.strip() or last
                if process.poll() is not None:  # one that it has started may hold its output open
                    over = over or time.monotonic()
            else:
                if process.poll() is None:
                    return "ended by its limit"
            code = process.wait()
            return f"failed with code {code}: {last[:300]}" if code else ""
        finally:
            end_session(process)


def _listen(process: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    assert process.stdout
    with process.stdout:
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def end_session(process: subprocess.Popen[str]) -> None:
    """Ends a process and its children. Contestants have sessions of their own, and end when their input does."""
    children = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # those that it left behind, too
    for pid in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5  # until their memory on the card is free
    while time.monotonic() < deadline and any(map(is_running, children)):
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Returns the process ids of all that a process has started, and these in turn."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, rest = [], [pid]
    while rest:
        started = children.get(rest.pop(), [])
        found += started
        rest += started
    return found


def unpack_wheels(site: pathlib.Path) -> list[str]:
    """Unpacks the carried wheels that this Python lacks, and returns a line for each, also for one that is damaged."""
    lines = []
    for wheel in sorted((CARRY / "wheels").glob("*.whl")):
        try:
            if unpack_wheel(wheel, site):
                lines.append(f"unpacked: {wheel.name.split('-')[0]}")
        except Exception as error:  # of zipfile, zlib or the disk: most parts need no wheel
            lines.append(f"{wheel.name}: left out: {bench.failure(error)}")
    return lines or ["unpacked: no wheel"]


def unpack_wheel(wheel: pathlib.Path, site: pathlib.Path) -> bool:
    """Unpacks a wheel, unless this Python has its modules or it is for another one; returns whether it did."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}
        modules = [name.removesuffix(".py") for name in names if name.removesuffix(".py").isidentifier()]
        here = f"cp{sys.version_info.major}{sys.version_info.minor}"
        fits = any(tag in wheel.name for tag in ("-py3-", "py2.py3", here))
        if all(map(importlib.util.find_spec, modules)) or not fits:
            return False
        archive.extractall(site)
        return True


def autotune_directory(scratch: pathlib.Path) -> pathlib.Path:
    return scratch / "compiled" / "xla_gpu_per_fusion_autotune_cache_dir"  # where JAX looks beside its own cache


def load_autotune(out: pathlib.Path, scratch: pathlib.Path) -> list[str]:
    """Loads what earlier calls packed, and returns a line for each archive that is damaged: nothing of it is loaded."""
    lines = []
    for before in (CARRY / "autotune.tgz", out / "autotune.tgz"):
        if not before.exists():
            continue
        with tempfile.TemporaryDirectory(dir=scratch) as unpacked:
            try:
                with tarfile.open(before) as archive:
                    archive.extractall(unpacked, filter="data")
                shutil.copytree(unpacked, autotune_directory(scratch), dirs_exist_ok=True)
            except Exception as error:  # of tarfile, gzip, zlib or the disk: without it, a part only compiles longer
                lines.append(f"{before}: left out: {bench.failure(error)}")
    return lines


def make_environment(out: pathlib.Path, scratch: pathlib.Path, *, toy: bool) -> dict[str, str]:
    """Returns the environment that all parts share: packages, compiled programs, autotuning, memory, results."""
    site, compiled, temporary = scratch / "site", scratch / "compiled", scratch / "tmp"
    autotune = autotune_directory(scratch)
    for directory in (site, autotune, temporary):
        directory.mkdir(parents=True)
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")]), str(site)]
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_gpu_per_fusion_autotune_cache_dir={autotune}"]
    environment = os.environ | {
        "GPTJAX_RESULTS": str(out / RESULTS),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(temporary),  # a part that its limit ends cannot remove its own files
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_FLAGS": " ".join(filter(None, flags)),
    }
    if not set(FRACTIONS) & set(os.environ):  # JAX takes one of them only
        environment[VARIABLE] = str(RUN_FRACTION)
    if toy:
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def describe_machine(driver: Driver) -> dict[str, Any]:
    """Records versions and card; one short process of JAX asks for them."""
    row: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "python": platform.python_version()}
    row |= {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)} | bench.versions()
    try:
        smi = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")
        row["nvidia-smi"] = subprocess.run(smi, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        row["nvidia-smi"] = "none"
    try:
        probe = [sys.executable, "-c", PROBE]
        environment = driver.environment
        probed = subprocess.run(probe, capture_output=True, text=True, timeout=90, env=environment, check=True).stdout
        row |= json.loads(probed.rpartition("@probe ")[2])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        last = getattr(error, "stderr", None) or str(error)
        row["verdict"] = f"JAX found no device: {last.strip().splitlines()[-1][:200]}"
    driver.record("machine", row)
    return row


def pack(source: pathlib.Path, archive: pathlib.Path, keep: str = "") -> str:
    """Packs a directory as one file, only what ends with `keep` if all is too large; returns what is amiss."""
    if not source.exists() or not any(source.iterdir()):
        return f"{archive.name}: there is nothing to pack"
    partial = archive.with_name(f"{archive.name}.part")  # an archive is whole, or is not there
    try:
        with tarfile.open(partial, "w:gz") as file:
            file.add(source, arcname=".")
        if partial.stat().st_size > LARGEST_FILE and keep:
            with tarfile.open(partial, "w:gz") as file:
                for path in sorted(source.rglob(f"*{keep}")):
                    file.add(path, arcname=path.name)
        if partial.stat().st_size > LARGEST_FILE:
            archive.unlink(missing_ok=True)
            return f"{archive.name}: larger than {LARGEST_FILE // 10**6} MB, left out"
        os.replace(partial, archive)
    except OSError as error:
        return f"{archive.name}: left out: {bench.failure(error)}"
    finally:
        partial.unlink(missing_ok=True)
    return ""


def finish(driver: Driver, scratch: pathlib.Path) -> None:
    """Packs the trace and the autotuning, and prints and writes the tables."""
    tables = subprocess.run(
        [sys.executable, str(HERE / "summary.py"), str(driver.results)],
        capture_output=True, text=True, env=driver.environment, check=False,
    )  # fmt: skip
    (driver.out / "tables.txt").write_text(tables.stdout + tables.stderr)
    trace = driver.out / "trace"
    autotune = autotune_directory(scratch)
    for amiss in (pack(trace, driver.out / "trace.tgz", ".xplane.pb"), pack(autotune, driver.out / "autotune.tgz")):
        if amiss:
            driver.say(amiss)
    shutil.rmtree(trace, ignore_errors=True)
    driver.say(f"\n=== tables\n{tables.stdout}{tables.stderr}")


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    return {name: float(seconds) for name, _, seconds in (text.rpartition(":") for text in texts)}


def stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE / "results" / "gpu"), help="directory of the results")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--only", default="", help="names of parts, separated by ','; by default all")
    parser.add_argument("--limit", action="append", default=[], metavar="PART:SECONDS", help="another limit of a part")
    parser.add_argument("--host_gb", default="", help="with --toy: memory of the eager peer, to see it fail")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + args.deadline
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = toy_parts(str(out), args.host_gb) if args.toy else gpu_parts(str(out))
    limits, names = parse_limits(args.limit), [part.name for part in parts]
    wanted = [name for name in args.only.split(",") if name] or names
    for name in (*wanted, *limits):
        if name not in names:
            parser.error(f"{name!r}: no such part; there are: {', '.join(names)}")
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory() as directory:
        scratch = pathlib.Path(directory)
        driver = Driver(out, make_environment(out, scratch, toy=args.toy), deadline)
        try:
            for line in (*unpack_wheels(scratch / "site"), *load_autotune(out, scratch)):
                driver.say(line)
            machine = describe_machine(driver)
            if not args.toy and machine.get("platform") != "gpu":
                driver.record("all", {"verdict": "left out: JAX finds no GPU here; --toy runs on a CPU"})
                parts = []
            for part in parts:
                if part.name in wanted:
                    driver.run(part, limits.get(part.name, part.limit))
        except KeyboardInterrupt:
            driver.record("all", {"verdict": "stopped by a signal"})
        finally:
            finish(driver, scratch)
    verdicts = [row.get("verdict", "") for row in bench.read_rows(driver.results)]
    return int(any(verdict.startswith(BAD_VERDICTS) for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
