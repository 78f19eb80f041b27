"""Paired trials of averages and schedules: the same seeds and texts with each, and a paired test of the differences.

    python benchmarks/trials.py --sources=text:bible.txt,text:gcide.txt [--seeds=5] [--steps=500] [--dir=/tmp/trials]

Each run is the quickstart's model on a text. A seed draws the initial values and the order of the windows, so that two
variants with one seed and text differ in nothing else. Rerun the command to continue: finished runs are not repeated.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import bench
import numpy as np
from scipy import stats

DECAY = {"schedule": "wsd", "decay_fraction": 0.4}
# An average of 0.99 reaches that decay only at step 890: at step 500 it has (1 + n) / (10 + n) = 0.982.
VARIANTS: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant", "ema_decay": 0.99},
    "constant, shorter": {"schedule": "constant", "ema_decay": 0.95},
    "cosine": {"schedule": "cosine", "ema_decay": 0.95},
    "wsd linear": DECAY | {"decay_shape": "linear", "ema_decay": 0.95},
    "wsd cosine": DECAY | {"decay_shape": "cosine"},
    "wsd sqrt": DECAY | {"decay_shape": "sqrt"},
    "wsd power 2": DECAY | {"decay_shape": "power", "decay_power": 2.0},
}
COMPARED = [  # (what, with what): the difference is of the first to the second
    ("constant, EMA 0.99", "constant"),
    ("constant, EMA 0.95", "constant"),
    ("cosine", "constant"),
    ("wsd linear", "constant"),
    ("wsd cosine", "wsd linear"),
    ("wsd sqrt", "wsd linear"),
    ("wsd power 2", "wsd linear"),
    ("wsd linear", "cosine"),
    ("cosine, EMA 0.95", "cosine"),
    ("wsd linear, EMA 0.95", "wsd linear"),
    ("wsd linear", "constant, EMA 0.99"),
]


def train(workdir: pathlib.Path, source: str, *, settings: Mapping[str, Any], steps: int, seed: int) -> None:
    """Trains a run to its end, or continues it."""
    kind, _, path = source.partition(":")
    fixed = {
        "data.source": f"{kind}:{pathlib.Path(path).resolve()}",
        "data.seed": seed,
        "train.seed": seed,
        "train.num_steps": steps,
        "train.eval_every": 0,
        "train.eval_batches": 60,
        "train.sample_every": 0,
        "checkpoint.save_every": steps,
        "checkpoint.keep": 1,
    }
    changed = fixed | {f"optim.{name}": value for name, value in settings.items()}
    flags = [f"--config.{name}={value}" for name, value in changed.items()]
    command = [sys.executable, "-m", "gptjax.main", "--config=quickstart", f"--workdir={workdir}", *flags]
    with open(workdir.with_suffix(".log"), "w") as log:
        # The data are prepared once, below the directory in which the commands run.
        subprocess.run(command, check=True, cwd=workdir.parent, stdout=log, stderr=subprocess.STDOUT)


def last_validation(workdir: pathlib.Path) -> dict[str, float]:
    """Returns what the run measured at its end."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "val_bits_per_byte" in row][-1]


def raw_bits_per_byte(workdir: pathlib.Path) -> float:
    """Returns it for the parameters themselves, of a run that keeps their average."""
    command = [sys.executable, "-m", "gptjax.evaluate", f"--workdir={workdir}", "--raw", "--batches=60"]
    shown = subprocess.check_output(command, cwd=workdir.parent, text=True)
    [loss] = re.findall(r"raw weights: validation loss ([0-9.]+)", shown)
    averaged = last_validation(workdir)
    # Both are over the same tokens, and the printed loss has more digits than the printed bits per byte.
    return averaged["val_bits_per_byte"] * float(loss) / averaged["val_loss"]


def run_all(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns {variant: {"source seed": bits per byte}}."""
    root = pathlib.Path(args.dir).resolve()  # the commands run in it
    root.mkdir(parents=True, exist_ok=True)
    stored = root / "results.json"
    found: dict[str, dict[str, float]] = json.loads(stored.read_text()) if stored.exists() else {}
    for seed in range(args.seeds):
        for source in args.sources.split(","):
            for name, settings in VARIANTS.items():
                key = f"{pathlib.Path(source).stem} {seed}"
                workdir = root / f"{name} {key}".replace(" ", "-").replace(",", "")
                decay = settings.get("ema_decay", 0)
                averaged = f"{name.split(',')[0]}, EMA {decay}" if decay else name
                if key in found.get(averaged, {}):
                    continue
                train(workdir, source, settings=settings, steps=args.steps, seed=seed)
                found.setdefault(averaged, {})[key] = last_validation(workdir)["val_bits_per_byte"]
                # The updates do not depend on the average, so one run shows both.
                if decay and "," not in name:
                    found.setdefault(name, {})[key] = raw_bits_per_byte(workdir)
                print(key, {variant: values[key] for variant, values in found.items() if key in values}, flush=True)
                stored.write_text(json.dumps(found, indent=1))
    return found


def compare(found: Mapping[str, Mapping[str, float]], what: str, other: str, texts: Sequence[str]) -> dict[str, Any]:
    """Returns the paired difference over all texts and seeds, with its 95 % interval and the p of a paired t test."""
    keys = [key for key in found[what] if key in found[other] and key.rsplit(" ", 1)[0] in texts]
    differences = np.array([found[what][key] - found[other][key] for key in keys])
    test = stats.ttest_rel([found[what][key] for key in keys], [found[other][key] for key in keys])
    low, high = test.confidence_interval(0.95)
    return {
        "variant": what,
        "compared with": other,
        "texts": "+".join(texts),
        "pairs": len(keys),
        "bits per byte": float(np.mean([found[what][key] for key in keys])),
        "difference": float(differences.mean()),
        "from": float(low),
        "to": float(high),
        "p": float(test.pvalue),
        "better in": int(np.sum(differences < 0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True, help="two or more, with commas, as for data.source")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dir", default="/tmp/trials", help="of data and runs")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine = bench.machine()
    found = run_all(args)
    texts = [pathlib.Path(source).stem for source in args.sources.split(",")]
    rows = [compare(found, *pair, which) for which in ([text] for text in texts) for pair in COMPARED]
    rows += [compare(found, *pair, texts) for pair in COMPARED]
    print(bench.table(rows))
    print(bench.write("trials", rows, machine | {"steps": args.steps}, args.out))


if __name__ == "__main__":
    main()
