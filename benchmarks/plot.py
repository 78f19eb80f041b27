"""Tokens a second against what the hardware allows, as a picture.

    python benchmarks/plot.py [benchmarks/results] [--out=benchmarks/results/speed.svg]

Reads the results of train_step.py and ceilings.py, and the snapshot of static.py: one panel for each machine, one bar
for each contestant and shape, of several settings the fastest. Its length is its share of the speed at which matrix
products alone would take all of the time (attention counted in full): where it was measured, the product of
ceilings.py; for the snapshot, the share of the data sheet that static.py assumes. A bar of the snapshot is no
measurement, but the least time of the compiled program. Needs matplotlib (extra `test`).
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import bench
import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from train_step import CASES, make_config

from gptjax.config import GPTConfig
from gptjax.sizes import train_flops_per_token

SNAPSHOT = pathlib.Path(__file__).resolve().parent / "static_snapshot.json"
COLORS = {"gptjax": "#1f6fb2", "torch eager": "#f2a65a", "torch compiled": "#c8553d", "compiled only": "#8fa3b5"}

TEXT = {"gptjax": "white", "torch eager": "black", "torch compiled": "white", "compiled only": "black"}


class Bar(NamedTuple):
    label: str
    who: str  # of COLORS
    speed: float  # tokens a second
    most: float  # if products of matrices took all of the time


def read(directory: pathlib.Path) -> dict[str, list[Bar]]:
    """Returns the bars of each machine: measured where ceilings.py has run as well, and of the snapshot."""
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    peaks: dict[str, float] = {}
    steps: dict[str, list[Any]] = collections.defaultdict(list)
    bars: dict[str, list[Bar]] = collections.defaultdict(list)
    for result in results:
        rows = result["rows"]
        if result["benchmark"] == "ceilings":
            peaks[machine(result)] = max(1e12 * row["rate"] for row in rows if row["unit"] == "TFLOP/s")
        elif result["benchmark"] == "train_step":
            steps[machine(result)] += rows
    for name, rows in steps.items():
        if name in peaks:
            bars[f"{name}; products {peaks[name] / 1e12:.3g} TFLOP/s"] = fastest(rows, peaks[name])
    for row in json.loads(SNAPSHOT.read_text())["rows"]:
        bars[f"{row['chip']}: not run; the least time of the compiled program"].append(static_bar(row))
    return bars


def machine(result: Mapping[str, Any]) -> str:
    about = result["machine"]
    is_cpu = about["device"].endswith("cpu")
    return f"{about['processor']}, {about['cores']} cores" if is_cpu else about["device"]


def model_of(row: Mapping[str, Any]) -> GPTConfig:
    return make_config(row["case"], row["batch"], {"steps_per_dispatch": 1}).model


def describe(row: Mapping[str, Any]) -> str:
    return f"{row['case']}, {row['batch']} x {model_of(row).block_size}"


def fastest(rows: list[dict[str, Any]], peak: float) -> list[Bar]:
    """Returns a bar for each shape and contestant, by shape in the order of CASES."""
    best: dict[tuple[str, str], Bar] = {}
    for row in sorted(rows, key=lambda row: (list(CASES).index(row["case"]), row["batch"])):
        one = Bar(describe(row), row["who"], row["tokens/s"], peak / train_flops_per_token(model_of(row)))
        key = one.label, one.who
        if key not in best or one.speed > best[key].speed:
            best[key] = one
    return list(best.values())


def static_bar(row: Mapping[str, Any]) -> Bar:
    most = row["assumed"]["peak_flops"] / train_flops_per_token(model_of(row))
    return Bar(f"{describe(row)} {row['settings']}", "compiled only", row["roof tokens/s"], most)


def draw(panels: Mapping[str, list[Bar]], path: pathlib.Path) -> None:
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gptjax"}  # text as text, and the same file each time
    heights = [len(bars) + 1 for bars in panels.values()]
    figure, grid = plt.subplots(
        len(panels), figsize=(9, 0.8 + 0.32 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axes, (name, bars) in zip(grid[:, 0], panels.items(), strict=True):
        for at, bar in enumerate(bars):
            axes.barh(at, bar.speed / bar.most, color=COLORS[bar.who], height=0.75)
            axes.text(0.005, at, f"{bar.who}: {bar.speed:,.0f} tokens/s", va="center", fontsize=8, color=TEXT[bar.who])
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.05)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_title(name, fontsize=9, loc="left")
    grid[-1, 0].set_xlabel("share of the speed of matrix products alone")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", default=str(bench.RESULTS))
    parser.add_argument("--out", default="", help="the SVG file; default speed.svg in the directory")
    args = parser.parse_args()
    directory = pathlib.Path(args.directory)
    panels = read(directory)
    path = pathlib.Path(args.out or directory / "speed.svg")
    draw(panels, path)
    print(path)


if __name__ == "__main__":
    main()
