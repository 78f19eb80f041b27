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
PEER_TARGET = 1.15  # gptjax's tokens per second by those of the best torch
ROOFS = {  # by card, shape, sequences and whether the loss is Triton's: those that static.py has compiled
    ("NVIDIA H100", "124M", 64, False): 643_000, ("NVIDIA H200", "124M", 64, False): 713_000,
    ("NVIDIA H200", "124M", 32, False): 699_000, ("NVIDIA H200", "124M", 64, True): 737_000,
}  # fmt: skip
RATIO = "gptjax is x faster"  # of race.py
GOOD_VERDICTS = ("", "measured")
KEYS = ("who", "what", "path", "batch", "command")  # a later row of the same ones replaces an earlier one


def latest(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows by part, in their order, of those that were measured several times the last."""
    parts: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["part"], {})[tuple(row.get(key) for key in KEYS)] = row
    return {part: list(found.values()) for part, found in parts.items()}


def with_goals(part: str, row: dict[str, Any], card: str) -> dict[str, Any]:
    """Returns a row of tokens per second with the target and the static roof of its shape, where there are some.

    A row that failed has none, and one of torch has neither.
    """
    family, shape, who = " ".join(card.split()[:2]), SHAPES.get(part, ""), str(row.get("who", ""))
    batch = row.get("batch", 0)
    goal = DECODE_TARGETS.get(batch) if part == "decode" else TARGETS.get((family, shape))
    failed = row.get("verdict", "") not in GOOD_VERDICTS
    if "tokens/s" not in row or who.startswith("torch") or goal is None or failed:
        return row
    roof = ROOFS.get((family, shape, batch, "--loss=triton" in who), "")
    return row | {"target": goal, "of target": row["tokens/s"] / goal, "static roof": roof}


def with_peer_target(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a part; that of the fastest torch, which gptjax has to beat, is marked with this target.

    Also one that failed after some of its turns: without it, a slower one would be the best.
    """
    peers = [row for row in rows if str(row.get("who", "")).startswith("torch") and {"tokens/s", RATIO} <= row.keys()]
    if not peers:
        return rows
    best = max(peers, key=lambda row: row["tokens/s"])
    marked = best | {"peer": "best torch", "least ratio": PEER_TARGET, "of least ratio": best[RATIO] / PEER_TARGET}
    return [marked if row is best else row for row in rows]


def show_lines(path: pathlib.Path) -> None:
    rows = bench.read_rows(path)
    card = next((row["card"] for row in rows if "card" in row), "")
    for part, found in latest(rows).items():
        if part == "machine":
            print(", ".join(f"{name} {value}" for name, value in found[-1].items() if name != "part"))
            continue
        shown = with_peer_target([with_goals(part, row, card) for row in found])
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
