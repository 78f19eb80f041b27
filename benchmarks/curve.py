"""Draws the losses of a run: python benchmarks/curve.py runs/quickstart docs/quickstart.svg"""

import json
import math
import pathlib
import sys

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt


def main() -> None:
    workdir, out = map(pathlib.Path, sys.argv[1:])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [(row["step"], row["loss_mean"]) for row in rows if "loss_mean" in row]
    validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    plt.rcParams.update({"svg.hashsalt": "gptjax", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
    axes.plot(*zip(*training, strict=True), label="training, one batch", color="#9ab")
    axes.plot(*zip(*validation, strict=True), "o-", label="validation", color="#c40")
    axes.set(xlabel="step", ylabel="loss, nats per byte", ylim=(1, math.ceil(training[0][1])))
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
