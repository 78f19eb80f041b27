"""Renders runs as one HTML page that loads nothing."""

import base64
import hashlib
import html
import importlib.resources
import itertools
import json
import os
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax import __version__, goodput
from gptjax.redaction import redact, shown
from gptjax.report.data import RunData, Sample, differences, unlike_defaults
from gptjax.report.panels import LAYERS, Panel, choose_panels, drawing

COLOURS = 8  # of page.css; a ninth run has the first one again
KINDS = 12  # of time, each with a colour in page.css
MOST_SAMPLES = 12  # of a run, spread over its steps
LONGEST_SAMPLE = 2000  # characters
LONGEST_VALUE = 300  # characters of a value of the config
MOST_PANELS = 80
MOST_NOTES = 20  # of a run
LAYERS_HINT = "A curve for each layer: the first is light, the last is dark. Dashed: what is outside of the layers."
COLLAPSED = "Other metrics"  # the group of panels that is closed at first
LEAST_SHARE = 0.002  # of the time; shorter kinds have no part in the bar
MISSING = "\N{EN DASH}"


def render(runs: Sequence[RunData], *, page_directory: str = ".", reload_seconds: float = 0) -> str:
    """Returns the page of one run, or of several beside each other.

    page_directory: where the page will lie, so that its links to other pages are right.
    reload_seconds: after which the page loads itself again; 0 means never.
    """
    names = _short_names([run.workdir for run in runs])
    panels = choose_panels(runs)
    left_out = max(0, len(panels) - MOST_PANELS)
    panels = panels[:MOST_PANELS]
    script = _resource("curves.js")
    # The browser itself refuses any other script, and every request.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_hash(script)}'; base-uri 'none'"
    others = names[1:] if len(names) == 2 else [f"{len(names) - 1} more"]
    title = _text(" and ".join([names[0], *(others if len(names) > 1 else [])]))
    parts = [
        "<!doctype html>\n<html lang=en><meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{policy}">',
        f"<meta name=viewport content='width=device-width,initial-scale=1'><title>{title}</title>",
        f"<style>{_resource('page.css')}</style>\n<body data-reload={reload_seconds:g}>",
        f"<header><h1>{title}</h1>",
        *_overview(runs, names),
        "</header>\n<main>",
        *_panel_sections(panels, runs, names),
        *_time_section(runs, names),
        *_task_section(runs, names),
        *_sample_section(runs, names),
        *_config_section(runs, names),
        *_machine_section(runs, names),
        *_event_section(runs, names),
        *_replay_section(runs, names, page_directory),
        *_note_section(runs, names, left_out),
        f"</main>\n<footer>Written by gptjax {__version__} on {_date(time.time())}.</footer>",
        f"<script type=application/json id=data>{_script_json(drawing(runs, names, panels=panels))}</script>",
        f"<script>{script}</script></html>\n",
    ]
    return "\n".join(parts)


def _resource(name: str) -> str:
    return (importlib.resources.files("gptjax.report") / name).read_text("utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _script_json(value: Any) -> str:
    """Returns JSON in which no text can end the script element that holds it."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII only, so that no character is invisible
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value: object) -> str:
    """Returns a value as HTML, without secrets and control characters."""
    return html.escape(shown(redact(str(value))))


def _short_names(workdirs: Sequence[str]) -> list[str]:
    """Returns names of runs: their paths from below the directory that all have in common, each name once."""
    paths = [workdir.rstrip("/") or "/" for workdir in workdirs]
    split = [path.split("/") for path in paths]
    common = 0
    if len(paths) > 1:
        for column in zip(*(parts[:-1] for parts in split), strict=False):
            if len(set(column)) > 1:
                break
            common += 1
    names = ["/".join(parts[common:]) for parts in split]
    if len(names) == 1:
        names = ["/".join(split[0][-2:])]
    counts = itertools.count(2)
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            names[index] = f"{name} ({next(counts)})"
        seen.add(name)
    return names


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if 0 < seconds < 2**35 else MISSING


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of HTML cells, the first of each row its header."""
    parts = ["<div class=wide><table><thead><tr>"]
    parts += [f"<th>{cell}" for cell in head]
    parts.append("<tbody>")
    for first, *others in rows:
        parts.append(f"<tr><th>{first}")
        parts += [f"<td>{cell}" for cell in others]
    parts.append("</table></div>")
    return "".join(parts)


def _by_run(names: Sequence[str], rows: dict[str, list[str]]) -> str:
    """Returns a table with a column of HTML cells for each run; a row that no run has is left out."""
    head = ["", *(map(_run_name, range(len(names)), names) if len(names) > 1 else [""])]
    kept = [[name, *cells] for name, cells in rows.items() if any(cell != MISSING for cell in cells)]
    return _table(head, kept)


def _run_name(index: int, name: str) -> str:
    return f"<span class='key c{index % COLOURS}'></span>{_text(name)}"


def _overview(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        yield "<dl class=tiles>"
        for name, value in facts[0].items():
            if value != MISSING:
                yield f"<div><dt>{name}<dd>{value}</div>"
        yield "</dl>"
        return
    yield _by_run(names, {name: [fact[name] for fact in facts] for name in facts[0]})


def _facts(run: RunData) -> dict[str, str]:
    """Returns what a reader asks first, as HTML."""
    total = f" <small>of {run.num_steps:,}</small>" if run.num_steps else ""
    best = MISSING
    if validation := run.series.get("val_loss"):
        at = int(validation.values.argmin())
        best = f"{validation.values[at]:.4f} <small>at step {int(validation.steps[at]):,}</small>"
    seconds = run.seconds
    return {
        "steps": f"{run.step:,}{total}",
        "validation loss": _last(run, "val_loss", ".4f"),
        "best validation loss": best,
        "bits per byte": _last(run, "val_bits_per_byte", ".3f"),
        "training loss": _last(run, "loss_mean" if "loss_mean" in run.series else "loss", ".4f"),
        "tokens": _count(run.step * run.tokens_per_step),
        "FLOPs": _count(run.step * run.flops_per_step),
        "time": goodput.duration(sum(seconds.values())) if seconds else MISSING,
        "goodput": f"{100 * goodput.share(seconds):.1f} %" if seconds else MISSING,
        "tokens per second": _last(run, "tokens_per_second", ",.0f"),
        "MFU": _last(run, "mfu", ".1%"),
    }


def _last(run: RunData, name: str, form: str) -> str:
    series = run.series.get(name)
    return format(float(series.values[-1]), form) if series else MISSING


def _count(value: float) -> str:
    if not value:
        return MISSING
    for size, unit in ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (0, "")):
        if abs(value) >= size:
            return f"{value:.3g}" if size == 1e15 or not size else f"{value / size:.3g}{unit}"
    return MISSING


def _panel_sections(panels: Sequence[Panel], runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    yield "<nav><span class=axes></span><button class=whole hidden>whole width</button>"
    if len(runs) > 1:
        yield "<span class=legend>"
        for index, name in enumerate(names):
            yield f"<button class=run data-run={index} aria-pressed=true>{_run_name(index, name)}</button>"
        yield "</span>"
    yield "</nav><noscript><p>The curves need JavaScript, which is part of this file.</noscript>"
    has_loss = any("loss" in run.series or "loss_mean" in run.series or "val_loss" in run.series for run in runs)
    for group, members in itertools.groupby(enumerate(panels), key=lambda item: item[1].group):
        if group == "Loss" and not has_loss:
            yield "<section><h2>Loss</h2><p>No step is logged yet.</section>"
            continue
        tag, heading = "section", f"<h2>{group}</h2>"
        if group == COLLAPSED:
            tag, heading = "details", f"<summary><h2>{group}</h2></summary>"
        if group == LAYERS:
            heading += f"<p class=hint>{LAYERS_HINT}</p>"
        yield f"<{tag} class=panels id='{group.split()[0].lower()}'>{heading}<div class=grid>"
        for number, panel in members:
            yield f"<figure class='{'large' if group == 'Loss' else 'small'}' data-panel={number}><figcaption>"
            yield f"<b>{_text(panel.title)}</b><button class=log aria-pressed=false>log y</button></figcaption>"
            yield "<div class=drawing></div></figure>"
        yield f"</div></{tag}>"


def _time_section(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    spent = [run.seconds for run in runs]
    totals = [sum(seconds.values()) for seconds in spent]
    if not any(totals):
        return
    kinds = sorted({kind for seconds in spent for kind in seconds}, key=lambda kind: _kind_order(kind, spent))
    yield "<section><h2>Where the time went</h2>"
    for index, (seconds, total) in enumerate(zip(spent, totals, strict=True)):
        if total <= 0:
            continue
        if len(runs) > 1:
            yield f"<p class=barname>{_run_name(index, names[index])}"
        yield "<div class=bar>"
        for number, kind in enumerate(kinds):
            share = seconds.get(kind, 0.0) / total
            if share > LEAST_SHARE:
                tip = f"{_kind(kind)}: {goodput.duration(seconds[kind])}, {share:.1%}"
                yield f"<span class='k{number % KINDS}' style='width:{100 * share:.2f}%' title='{tip}'></span>"
        yield "</div>"
    rows = {}
    for number, kind in enumerate(kinds):
        cells = [_time_cell(seconds, kind, total) for seconds, total in zip(spent, totals, strict=True)]
        rows[f"<span class='key k{number % KINDS}'></span>{_kind(kind)}"] = cells
    yield _by_run(names, rows)
    yield "<p class=hint>From the first start to the last account. Goodput is the share of the steps."
    yield "</section>"


def _kind(kind: str) -> str:
    return _text(kind.replace("_", " "))


def _kind_order(kind: str, spent: Sequence[dict[str, float]]) -> tuple[bool, float]:
    return kind != "step", -sum(seconds.get(kind, 0.0) for seconds in spent)


def _time_cell(seconds: dict[str, float], kind: str, total: float) -> str:
    if not seconds.get(kind) or total <= 0:
        return MISSING
    return f"{goodput.duration(seconds[kind])} <small>{seconds[kind] / total:.1%}</small>"


def _task_section(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    tasks = dict.fromkeys(task for run in runs for task in run.tasks)
    if not tasks:
        return
    rows = {}
    for task in tasks:
        for metric in ("acc", "acc_norm", "acc_bytes", "perplexity"):
            cells = [_task_cell(run.tasks.get(task, {}), metric) for run in runs]
            rows[f"{_text(task)} {metric}"] = cells
    yield f"<section><h2>Tasks, last results</h2>{_by_run(names, rows)}"
    yield "<p class=hint>With the standard error. The curves above have the results during training.</section>"


def _task_cell(result: dict[str, Any], metric: str) -> str:
    value = result.get(metric)
    error = result.get(f"{metric}_stderr")
    if type(value) not in (int, float):
        return MISSING
    spread = f" ± {error:.4f}" if type(error) in (int, float) else ""
    count = result.get("count")
    about = [f"{count:,} questions"] if type(count) is int else []
    protocol = f"<br><small>{_text(', '.join([str(result.get('protocol', '')), *about]))}</small>"
    return f"{value:.4f}{spread}{protocol if metric == 'acc' else ''}"


def _sample_section(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    if not any(run.samples for run in runs):
        return
    yield "<section id=samples><h2>Samples over time</h2>"
    for index, run in enumerate(runs):
        if not run.samples:
            continue
        if len(runs) > 1:
            yield f"<h3>{_run_name(index, names[index])}</h3>"
        chosen = _spread(run.samples)
        if len(chosen) < len(run.samples):
            yield f"<p class=hint>{len(chosen)} of {len(run.samples):,} samples; samples.txt has all."
        for sample in reversed(chosen):
            is_open = " open" if sample is chosen[-1] else ""
            text = sample.text[:LONGEST_SAMPLE]
            cut = " …" if len(sample.text) > LONGEST_SAMPLE else ""
            yield f"<details{is_open}><summary>step {sample.step:,}</summary><pre>{_text(text)}{cut}</pre></details>"
    yield "</section>"


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """Returns at most MOST_SAMPLES samples, evenly spread, the first and the last among them."""
    count = min(MOST_SAMPLES, len(samples))
    if count < 2:
        return list(samples)
    return [samples[round(index * (len(samples) - 1) / (count - 1))] for index in range(count)]


def _value(value: object) -> str:
    if value is None:
        return MISSING
    text = json.dumps(value) if isinstance(value, bool | list | dict) else str(value)
    return _text(text[:LONGEST_VALUE]) or "<small>empty</small>"


def _config_section(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    configs = [run.config for run in runs]
    if not any(configs):
        return
    yield "<section><h2>Settings</h2>"
    if len(runs) == 1:
        changed = unlike_defaults(configs[0])
        yield "<p class=hint>Those that are not the defaults of this version of gptjax.</p>"
        yield _table(["field", "value"], [[_text(name), _value(value)] for name, value in changed.items()])
        yield "<details><summary>All settings</summary>"
        yield _table(["field", "value"], [[_text(name), _value(value)] for name, value in configs[0].items()])
        yield "</details></section>"
        return
    rows = differences(configs)
    same = len({name for config in configs for name in config} - rows.keys())
    if rows:
        yield _by_run(names, {_text(name): [_value(value) for value in values] for name, values in rows.items()})
    yield f"<p class=hint>The other {same} settings are equal in all runs.</section>"


def _machine_section(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    versions = dict.fromkeys(name for run in runs if run.record for name in run.record.versions)
    rows = {
        "devices": [_value(run.history.machine or None) for run in runs],
        "data": [_value(_data_of(run)) for run in runs],
    }
    for name in versions:
        rows[_text(name)] = [_value(run.record.versions.get(name) if run.record else None) for run in runs]
    rows["run id"] = [_value(run.history.run_id or None) for run in runs]
    rows["work directory"] = [_value(run.workdir) for run in runs]
    yield f"<section><h2>Machine and versions</h2>{_by_run(names, rows)}"
    if not any(run.record for run in runs):
        yield "<p class=hint>A checkpoint records devices and versions; there is none yet."
    yield "</section>"


def _data_of(run: RunData) -> object:
    data = run.record.data if run.record else {}
    return data.get("mix") or data.get("directory")


def _event_section(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[str]:
    rows = {
        "first start": [_date(run.history.started_at) for run in runs],
        "last checkpoint": [_checkpoint(run) for run in runs],
        "restarts": [str(run.history.restarts) if run.record else MISSING for run in runs],
        "skipped updates": [str(run.history.skipped_steps) if run.record else MISSING for run in runs],
        "rollbacks": [str(run.history.rollbacks) if run.record else MISSING for run in runs],
    }
    yield f"<section><h2>Restarts and rollbacks</h2>{_by_run(names, rows)}"
    events = []
    for index, run in enumerate(runs):
        for part in run.history.skipped_ranges:
            at = f"{part.spike:,}" if part.spike else MISSING
            events.append(
                [_run_name(index, names[index]), at, _value(part.why), f"{part.step:,}", f"{part.batches:,}"],
            )
    if events:
        yield _table(["run", "step that spiked", "why", "rolled back to", "batches skipped"], events)
    yield "</section>"


def _checkpoint(run: RunData) -> str:
    if not run.record:
        return MISSING
    when = f" <small>{_date(run.history.saved_at)}</small>" if run.history.saved_at else ""
    return f"step {run.record.step:,}{when}"


def _replay_section(runs: Sequence[RunData], names: Sequence[str], page_directory: str) -> Iterator[str]:
    if not any(run.replays for run in runs):
        return
    yield "<section><h2>Replayed steps</h2><ul>"
    for index, run in enumerate(runs):
        for step, path in run.replays:
            link = urllib.parse.quote(os.path.relpath(path, page_directory))  # which also encodes quotes and colons
            yield f"<li><a href='{link}'>step {step:,}</a> of {_run_name(index, names[index])}"
    yield "</ul></section>"


def _note_section(runs: Sequence[RunData], names: Sequence[str], left_out: int) -> Iterator[str]:
    notes = [
        f"{_text(name)}: {_text(note)}"
        for run, name in zip(runs, names, strict=True)
        for note in run.notes[:MOST_NOTES]
    ]
    if left_out:
        notes.append(f"{left_out} more metrics are in metrics.jsonl")
    if notes:
        yield "<section><h2>Notes</h2><ul>"
        yield from (f"<li>{note}" for note in notes)
        yield "</ul></section>"
