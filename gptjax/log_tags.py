"""The names of a run's metrics in TensorBoard and Weights & Biases, which draw a group for each prefix."""

from collections.abc import Mapping
from typing import Any

TAGS = {
    "loss_mean": "train/loss",  # smoother than the loss of one update
    "tokens_per_second": "perf/tokens_per_second",
    "mfu": "perf/mfu",
    "step_seconds": "perf/step_seconds",
    "data_wait": "perf/data_wait",
    "goodput": "time/goodput",
}
STATS = "stats/"  # begins the names of statistics of layers, as in stats/grad_rms/h0
PREFIXES = {
    "val_": "eval/",
    "seconds/": "time/",
    "tasks/": "tasks/",
    STATS: STATS,
}  # of the names in metrics.jsonl, and what they become


def tagged(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of metrics.jsonl under the tags, without its step.

    The loss of the update itself is left out where the row has the mean, as all rows have but those of older versions.

    >>> tagged({"step": 20, "loss_mean": 2.6, "loss": 2.5, "mfu": 0.4, "lr": 1e-3})
    {'train/loss': 2.6, 'perf/mfu': 0.4, 'train/lr': 0.001}
    """
    values = {}
    for name, value in row.items():
        if name != "step" and not (name == "loss" and "loss_mean" in row):
            values[tag(name)] = value
    return values


def tag(name: str) -> str:
    """Returns the tag of a metric, such as train/lr for lr."""
    if name in TAGS:
        return TAGS[name]
    for prefix, group in PREFIXES.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"


def describe_sources(result: Mapping[str, float]) -> list[str]:
    """Returns a line for each source of a mixture, of the result of `evaluate.evaluate`; [] without one."""
    names = [key.removeprefix("val_loss/") for key in result if key.startswith("val_loss/")]
    return [
        f"  {name}: loss {result[f'val_loss/{name}']:.4f}, {result[f'val_bits_per_byte/{name}']:.3f} bits per byte"
        for name in names
    ]
