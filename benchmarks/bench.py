"""What the benchmarks share: the machine in words, medians of interleaved runs, tables, and files of results."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "triton")


def machine() -> dict[str, Any]:
    """Returns what figures depend on: processor, cores, accelerator, versions, date, and the load now: ask first."""
    import jax

    now = datetime.datetime.now(datetime.UTC)
    found = {"date": f"{now:%Y-%m-%d}", "time": f"{now:%H%M%S}", "python": platform.python_version()}
    found |= {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    device = jax.devices()[0]
    found["device"] = f"{jax.device_count()} x {device.device_kind}"
    return found | versions()


def versions() -> dict[str, str]:
    """Returns the version of each of PACKAGES that is installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def interleave(runs: Mapping[str, Callable[[], Any]], *, seconds: float, rounds: int = 5) -> dict[str, list[float]]:
    """Returns the seconds of each call of `runs`, which take turns: in each round one runs for its share of `seconds`.

    The first call of a turn is not counted: caches and threads are still those of the other.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            end = time.perf_counter() + seconds / rounds / len(runs)
            while True:
                start = time.perf_counter()
                run()
                stop = time.perf_counter()
                times[name].append(stop - start)
                if stop >= end:
                    break
    return times


def median(times: Iterable[float]) -> float:
    return statistics.median(times)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as an aligned table, with a column for each key that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def write(name: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], directory: str) -> pathlib.Path:
    """Writes rows and the machine `found` to DIRECTORY/NAME-DATE-TIME-DEVICE.json, and returns the path.

    Where $GPTJAX_RESULTS names a file, `record` has written the rows there, and this writes nothing.
    """
    if "GPTJAX_RESULTS" in os.environ:
        return pathlib.Path(os.environ["GPTJAX_RESULTS"])
    kind = found["device"].split(" x ")[1].lower().replace(" ", "-")
    path = pathlib.Path(directory or RESULTS) / f"{name}-{found['date']}-{found['time']}-{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": found, "rows": list(rows)}, indent=2) + "\n")
    return path


def record(part: str, row: Mapping[str, Any]) -> None:
    """Prints a row, and appends it to the file that $GPTJAX_RESULTS names, if any: a figure that is known is kept."""
    print(describe(part, row), flush=True)
    if path := os.environ.get("GPTJAX_RESULTS"):
        append(pathlib.Path(path), part, row)


@contextlib.contextmanager
def own_row(part: str, row: dict[str, Any]) -> Iterator[None]:
    """Records a row, which the caller completes within; what fails there costs this row only, and is its verdict."""
    try:
        yield
    except Exception as error:  # of a compiler, a kernel or a library: the next row may be right
        row["verdict"] = failure(error)
    record(part, row)


def failure(error: Exception) -> str:
    """Returns a verdict of one line: "not here" where gptjax refuses a setting on this device, FAILED otherwise."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if kind == "ConfigError":  # by its name: torch's process never imports gptjax
        return f"not here: {(text.partition(': ')[2] or text).split(';')[0]}"
    return f"FAILED: {kind}: {text[:200]}"


def describe(part: str, row: Mapping[str, Any]) -> str:
    return f"{part}: " + ", ".join(f"{name} {_cell(value)}" for name, value in row.items() if value != "")


def append(path: pathlib.Path, part: str, row: Mapping[str, Any]) -> None:
    """Appends a row to a file of JSON lines; it is on disk when this returns."""
    line = json.dumps({"part": part, "time": f"{datetime.datetime.now(datetime.UTC):%H:%M:%S}"} | dict(row))
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows that the last call of gpu.sh appended; a line that was cut short, or is no row, is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("part"), str):
                rows = [row] if row["part"] == "machine" else [*rows, row]
    return rows


def copy_library(folder: pathlib.Path, most: float) -> list[str]:
    """Copies standard-library files to `folder`, `most` bytes in total at most, and returns their texts."""
    texts, size = [], 0
    for number, path in enumerate(sorted(pathlib.Path(sysconfig.get_path("stdlib")).rglob("*.py"))):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not text or size >= most:
            continue
        (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
        texts.append(text)
        size += len(text.encode())
    return texts
