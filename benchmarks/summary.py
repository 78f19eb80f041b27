"""The results of benchmarks/gpu.sh as short tables, beside targets and static roofs; or those in a directory.

python benchmarks/summary.py results.jsonl
python benchmarks/summary.py benchmarks/results
"""

import json
import pathlib
import sys
from typing import Any

import bench

# Goals and the roofs of static.py, in tokens per second, by card and part.
TARGETS = {
    ("NVIDIA H100", "124M"): 500_000, ("NVIDIA H200", "124M"): 560_000,
    ("NVIDIA H100", "1558M"): 45_000, ("NVIDIA H200", "1558M"): 50_000,
}  # fmt: skip
SHAPES = {"train-cublaslt": "124M", "train": "124M", "peer": "124M", "triton-loss": "124M", "xl": "1558M"}  # by part
DECODE_TARGETS = {1: 2_500, 256: 120_000}  # by rows, on either card
ROOFS = {("NVIDIA H100", "124M"): 643_000, ("NVIDIA H200", "124M"): 713_000}
KEYS = ("who", "what", "path", "batch", "command")  # a later row of the same ones replaces an earlier one


def latest(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows by part, in their order, of those that were measured several times the last."""
    parts: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["part"], {})[tuple(row.get(key) for key in KEYS)] = row
    return {part: list(found.values()) for part, found in parts.items()}


def with_goals(part: str, row: dict[str, Any], card: str) -> dict[str, Any]:
    """Returns a row of tokens per second with the target and the static roof of its shape, where there are some."""
    family, shape = " ".join(card.split()[:2]), SHAPES.get(part, "")
    goal = DECODE_TARGETS.get(row.get("batch", 0)) if part == "decode" else TARGETS.get((family, shape))
    if "tokens/s" not in row or str(row.get("who", "")).startswith("torch") or goal is None:
        return row
    roof = ROOFS.get((family, shape), "")
    return row | {"target": goal, "of target": row["tokens/s"] / goal, "static roof": roof}


def show_lines(path: pathlib.Path) -> None:
    rows = bench.read_rows(path)
    card = next((row["card"] for row in rows if "card" in row), "")
    for part, found in latest(rows).items():
        if part == "machine":
            print(", ".join(f"{name} {value}" for name, value in found[-1].items() if name != "part"))
            continue
        shown = [with_goals(part, row, card) for row in found]
        columns = {name: "" for row in shown for name in row if name not in ("part", "time")}
        print(f"\n{part}\n{bench.table([columns | {n: row.get(n, '') for n in columns} for row in shown])}")


def show_directory(directory: pathlib.Path) -> None:
    files = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
    machine = {}
    for result in (one for one in map(json.loads, (path.read_text() for path in files)) if one.get("rows")):
        found = {name: value for name, value in result["machine"].items() if name not in ("time", "load", "seed")}
        if found != machine:
            machine = found
            print(", ".join(f"{name} {value}" for name, value in machine.items()))
        print(f"\n{result['benchmark']}\n{bench.table(result['rows'])}")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/summary.py RESULTS.jsonl | DIRECTORY")
    path = pathlib.Path(sys.argv[1])
    (show_directory if path.is_dir() else show_lines)(path)


if __name__ == "__main__":
    main()
