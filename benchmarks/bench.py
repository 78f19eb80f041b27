"""What the benchmarks share: the machine in words, medians of interleaved runs, tables, and a JSON file of results."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Returns what figures depend on: processor, cores, accelerator, versions, date, and the load now: ask first."""
    import jax

    now = datetime.datetime.now(datetime.UTC)
    found = {"date": f"{now:%Y-%m-%d}", "time": f"{now:%H%M%S}", "python": platform.python_version()}
    found |= {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    device = jax.devices()[0]
    found["device"] = f"{jax.device_count()} x {device.device_kind}"
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
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
    """Returns rows of the same keys as an aligned table."""
    names = list(rows[0])
    cells = [names] + [[_cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def write(name: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], directory: str) -> pathlib.Path:
    """Writes rows and the machine `found` to DIRECTORY/NAME-DATE-TIME-DEVICE.json, and returns the path."""
    kind = found["device"].split(" x ")[1].lower().replace(" ", "-")
    path = pathlib.Path(directory or RESULTS) / f"{name}-{found['date']}-{found['time']}-{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": found, "rows": list(rows)}, indent=2) + "\n")
    return path
