"""Chooses the panels of the page, and turns the series of runs into the JSON that its script draws."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.log_tags import STATS
from gptjax.report.data import RunData
from gptjax.report.series import Series, seconds_by_step, smooth, thin

MOST_COLUMNS = 600  # pixel columns that a curve is thinned to; a panel is hardly wider
FEWEST_COLUMNS = 30
MOST_POINTS = 40_000  # of all curves together: about 600 kB of JSON
MOST_LAYER_POINTS = 16_000  # of all curves of layers, which are many
FEWEST_LAYER_COLUMNS = 8
POINTS_OF_A_COLUMN = 4  # at most, see series.thin
SMOOTH_POINTS = 400
TIME_POINTS = 300
SMOOTHED = "smoothed "  # begins the name of a smoothed metric, which no row has
STDERR = "_stderr"  # the end of the name of a standard error
FEWEST_SMOOTHED = 100  # rows; a mean of fewer would be over one
DIGITS = 6  # significant, of a drawn value


class Line(NamedTuple):
    """One metric in a panel."""

    name: str  # in metrics.jsonl, or after SMOOTHED
    style: str  # "faint", "solid", "dots" or "dashed"
    label: str = ""
    layer: int = -1  # -1: of no layer


class Panel(NamedTuple):
    """A drawing with one curve for each run and line."""

    title: str
    group: str
    lines: tuple[Line, ...]
    is_percent: bool = False
    is_log: bool = False  # whether its axis is logarithmic at first


LOSS = Panel(
    "Loss",
    "Loss",
    (
        Line("loss", "faint", "one update"),
        Line(SMOOTHED + "loss", "solid", "smoothed"),
        Line("val_loss", "dots", "validation"),
    ),
)
TITLES = {
    "val_loss": "Validation loss, nats per token",
    "val_bits_per_byte": "Validation, bits per byte",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "update_norm": "Update norm",
    "tokens_per_second": "Tokens per second",
    "mfu": "MFU: share of the peak FLOPs",
    "step_seconds": "Seconds per step",
    "data_wait": "Time spent waiting for data",
    "goodput": "Goodput",
}
GROUPS = {
    "val_loss": "Validation",
    "val_bits_per_byte": "Validation",
    "lr": "Training",
    "grad_norm": "Training",
    "update_norm": "Training",
    "tokens_per_second": "Speed",
    "mfu": "Speed",
    "data_wait": "Speed",
}
# Each a panel with a line for each layer.
STATISTICS = {
    "grad_rms": "Gradients, RMS",
    "update_rms": "Updates, RMS",
    "param_rms": "Parameters, RMS",
    "residual_rms": "Residual stream, RMS",
    "attention_logit": "Largest attention logit",
}
LAYER = re.compile(r"h(\d{1,4})")  # the name of a layer after that of a statistic
NOISY = ("grad_norm", "update_norm", "tokens_per_second", "mfu", "step_seconds", "data_wait")
PERCENT = ("mfu", "data_wait", "goodput")
LAYERS = "Layers"
ORDER = ("Validation", "Tasks", "Training", LAYERS, "Speed", "Memory", "Other metrics")
# Drawn elsewhere, or constant, or another view of a number that is drawn.
LEFT_OUT = {"loss", "loss_mean", "tokens", "tokens_seen", "val_perplexity"}


def choose_panels(runs: Iterable[RunData]) -> list[Panel]:
    """Returns the panels for all metrics of the runs, the loss first."""
    names = dict.fromkeys(name for run in runs for name in run.series)
    panels = []
    for name in (*TITLES, *names):
        if name not in names or name in LEFT_OUT or name.startswith(("seconds/", STATS)) or name.endswith(STDERR):
            continue
        del names[name]
        panels.append(Panel(_title(name), _group(name), _lines(name), name in PERCENT))
    panels += _layer_panels(names)
    panels.sort(key=lambda panel: ORDER.index(panel.group))
    return [LOSS, *panels]


def _layer_panels(names: Iterable[str]) -> list[Panel]:
    """Returns a panel for each statistic of layers among `names`: first the layers, then what is outside of them."""
    parts: dict[str, list[str]] = {statistic: [] for statistic in STATISTICS}
    for name in names:
        statistic, slash, part = name.removeprefix(STATS).partition("/")
        if name.startswith(STATS) and slash:
            parts.setdefault(statistic, []).append(part)
    panels = []
    for statistic, found in parts.items():
        layers = sorted(int(match[1]) for match in map(LAYER.fullmatch, found) if match)
        lines = [Line(f"{STATS}{statistic}/h{layer}", "solid", f"layer {layer}", layer) for layer in layers]
        outside = [part for part in found if not LAYER.fullmatch(part)]
        lines += [Line(f"{STATS}{statistic}/{part}", "dashed", part) for part in outside]
        if lines:
            # Embeddings and LayerNorms are of another size than the layers, which a linear axis would flatten.
            is_log = bool(outside)
            panels.append(Panel(STATISTICS.get(statistic, statistic), LAYERS, tuple(lines), is_log=is_log))
    return panels


def _lines(name: str) -> tuple[Line, ...]:
    if name in NOISY:
        return Line(name, "faint", "one row"), Line(SMOOTHED + name, "solid", "smoothed")
    return (Line(name, "dots" if _group(name) in ("Validation", "Tasks") else "solid"),)


def _title(name: str) -> str:
    if name in TITLES:
        return TITLES[name]
    return name.removeprefix("tasks/").replace("val_loss/", "Validation loss on ")


def _group(name: str) -> str:
    if name in GROUPS:
        return GROUPS[name]
    if name.startswith("val_loss/"):
        return "Validation"
    if name.startswith("tasks/"):
        return "Tasks"
    return "Memory" if "memory" in name else "Other metrics"


def drawing(runs: Sequence[RunData], names: Sequence[str], *, panels: Sequence[Panel]) -> dict[str, Any]:
    """Returns everything that curves.js draws, as JSON values.

    names: of the runs, for the legend.
    """
    wanted = [line.name for panel in panels for line in panel.lines]
    drawn = [name for run in runs for name in wanted if name in run.series]
    num_layer_curves = sum(name.startswith(STATS) for name in drawn)
    columns = _columns(MOST_POINTS, len(drawn) - num_layer_curves, fewest=FEWEST_COLUMNS)
    layer_columns = _columns(MOST_LAYER_POINTS, num_layer_curves, fewest=FEWEST_LAYER_COLUMNS)
    columns_of = {name: layer_columns if name.startswith(STATS) else columns for name in wanted}
    return {
        "panels": [
            {
                "title": panel.title,
                "lines": [line._asdict() for line in panel.lines],
                "percent": panel.is_percent,
                "log": panel.is_log,
            }
            for panel in panels
        ],
        "runs": [_curves(run, name, columns_of) for run, name in zip(runs, names, strict=True)],
    }


def _columns(points: int, num_curves: int, *, fewest: int) -> int:
    """Returns the number of columns that each curve is thinned to: about `points` in all curves together."""
    columns = points // max(1, POINTS_OF_A_COLUMN * num_curves)
    return min(MOST_COLUMNS, max(fewest, columns))


def _curves(run: RunData, name: str, wanted: Mapping[str, int]) -> dict[str, Any]:
    """Returns all that is drawn of a run.

    wanted: the names of the lines, with the columns that each is thinned to.
    """
    curves = {one: _encode(thin(run.series[one], columns)) for one, columns in wanted.items() if one in run.series}
    for one in list(curves):
        if one + STDERR in run.series:
            curves[one]["e"] = _errors(run.series[one], run.series[one + STDERR], wanted[one])
    for one in wanted:
        raw = run.series.get(one.removeprefix(SMOOTHED))
        if one.startswith(SMOOTHED) and raw:
            # Of the loss the mean since the last row, which is smoother than that of one update.
            curves[one] = _encode(_smoothed(run.series.get("loss_mean", raw) if raw is run.series.get("loss") else raw))
    seconds = run.series.get("step_seconds")
    return {
        "name": name,
        "tokens": run.tokens_per_step,
        "flops": run.flops_per_step,
        "seconds": _encode(seconds_by_step(seconds, TIME_POINTS)) if seconds else None,
        "marks": [{"step": part.spike or part.step, "why": _why(part)} for part in run.history.skipped_ranges],
        "curves": curves,
    }


def _smoothed(series: Series) -> Series:
    return smooth(series, SMOOTH_POINTS) if series.steps.size >= FEWEST_SMOOTHED else series


def _why(part: Any) -> str:
    return f"rolled back to step {part.step}: {part.why}" if part.why else f"rolled back to step {part.step}"


def _encode(series: Series) -> dict[str, list[float]]:
    """Returns a series as the differences of its steps, which have few digits, and its values."""
    steps = series.steps.tolist()
    before = [0, *steps]
    return {
        "s": [step - last for step, last in zip(steps, before, strict=False)],
        "v": [_rounded(value) for value in series.values.tolist()],
    }


def _rounded(value: float) -> float:
    number = float(f"{value:.{DIGITS}g}")
    return int(number) if number.is_integer() and abs(number) < 10**DIGITS else number


def _errors(values: Series, errors: Series, columns: int) -> list[float]:
    """Returns the standard error of each point that `thin` keeps of `values`; 0 where it is not known."""
    known = dict(zip(errors.steps.tolist(), errors.values.tolist(), strict=True))
    return [_rounded(known.get(step, 0.0)) for step in thin(values, columns).steps.tolist()]
