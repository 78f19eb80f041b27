"""The page of runs: its curves are those of the metrics, and nothing in a run can add markup to it."""

import base64
import hashlib
import html.parser
import json
import re
import time

import numpy as np
import pytest

from gptjax.log_reader import newest_rows
from gptjax.report import page as page_module
from gptjax.report.data import differences, is_finished, read_run
from gptjax.report.page import render
from gptjax.report.panels import SMOOTHED, choose_panels
from gptjax.report.write import Report
from tests.report.conftest import HOSTILE, SPIKE, add_layers


class Elements(html.parser.HTMLParser):
    """Collects the elements of a page, the JSON of its curves, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.scripts = []
        self.texts = []
        self.is_script = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.is_script = tag == "script"
        if self.is_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.is_script = False

    def handle_data(self, data):
        if self.is_script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def drawing(self):
        return json.loads(self.scripts[0])


def page_of(*workdirs, **options):
    return render([read_run(str(workdir)) for workdir in workdirs], **options)


def points(curve):
    return dict(zip(np.cumsum(curve["s"]).tolist(), curve["v"], strict=True))


def test_curves_have_the_points_of_the_metrics(make_run):
    workdir = make_run("a")
    [run] = Elements(page_of(workdir)).drawing["runs"]
    rows = list(newest_rows(str(workdir)))[::-1]
    for name in ("loss", "val_loss", "val_loss/web", "lr", "grad_norm", "tokens_per_second", "tasks/blimp/acc"):
        expected = {row["step"]: row[name] for row in rows if row.get(name) is not None}
        assert points(run["curves"][name]) == pytest.approx(expected, rel=1e-5), name
    assert run["curves"]["tasks/blimp/acc"]["e"] == [0.02] * 5
    smoothed = points(run["curves"][SMOOTHED + "loss"])
    mean = np.mean([row["loss_mean"] for row in rows if abs(row["step"] - SPIKE) <= 1 and "loss_mean" in row])
    assert smoothed[SPIKE] == pytest.approx(mean, rel=1e-5), "of loss_mean, not of loss"
    assert run["tokens"] == 640
    assert run["flops"] > 0
    assert points(run["seconds"])[100] == pytest.approx(12.5)
    assert run["marks"] == [{"step": 45, "why": "rolled back to step 40: why Once"}]


def test_many_steps_are_thinned_and_spikes_stay(make_run):
    workdir = make_run("a", steps=30_000)
    page = page_of(workdir)
    assert len(page) < 1_000_000
    curve = points(Elements(page).drawing["runs"][0]["curves"]["loss"])
    assert len(curve) < 5000
    assert curve[SPIKE] == 20.0
    assert (min(curve), max(curve)) == (1, 30_000)


def test_page_of_a_million_rows_is_small_and_takes_seconds(make_run):
    workdir = make_run("a")
    lines = [f'{{"step": {n}, "loss": 2.{n % 97}, "lr": 0.001}}\n' for n in range(1_000_000)]
    lines[777_777] = '{"step": 777777, "loss": 50.5, "lr": 0.001}\n'
    (workdir / "metrics.jsonl").write_text("".join(lines))
    began = time.process_time()
    page = page_of(workdir)
    assert time.process_time() - began < 20  # 2 s on two cores of an AMD EPYC
    assert len(page) < 1_000_000
    assert points(Elements(page).drawing["runs"][0]["curves"]["loss"])[777_777] == 50.5


def test_page_of_many_runs_is_small(make_run):
    runs = [read_run(str(make_run(f"run{n}", steps=3000))) for n in range(12)]
    assert len(render(runs)) < 1_000_000


def test_layers_share_a_panel_of_each_statistic(make_run):
    workdir = make_run("a")
    rows = add_layers(workdir, 12)
    panels = choose_panels([read_run(str(workdir))])
    layered = [panel for panel in panels if panel.group == "Layers"]
    assert [panel.title.split(",")[0] for panel in layered] == [
        "Gradients", "Updates", "Parameters", "Residual stream", "Largest attention logit",
    ]  # fmt: skip
    gradients = layered[0].lines
    assert [line.label for line in gradients] == [*(f"layer {n}" for n in range(12)), "wte"]
    assert [line.layer for line in gradients] == [*range(12), -1]
    assert gradients[-1].style == "dashed"
    assert [panel.is_log for panel in layered] == [True, False, False, True, False], "where there is more than layers"
    [run] = Elements(page_of(workdir)).drawing["runs"]
    for line in (line for panel in layered for line in panel.lines):
        assert points(run["curves"][line.name]) == {row["step"]: row[line.name] for row in rows}
    assert len(choose_panels([read_run(str(make_run("b")))])) == len(panels) - 5


def test_many_layers_leave_the_page_small_and_the_loss_as_it_is(make_run):
    runs = [make_run(f"run{n}", steps=5000) for n in range(4)]
    without = Elements(page_of(*runs)).drawing["runs"][0]["curves"]["loss"]
    for workdir in runs:
        add_layers(workdir, 48, every=20, steps=5000)
    page = page_of(*runs)
    assert len(page) < 1_000_000
    curves = Elements(page).drawing["runs"][0]["curves"]
    assert curves["loss"] == without
    assert len(points(curves["stats/grad_rms/h47"])) >= 16


def test_every_metric_has_a_panel_and_a_group(make_run):
    panels = choose_panels([read_run(str(make_run("a")))])
    assert [(panel.group, panel.lines[0].name) for panel in panels] == [
        ("Loss", "loss"),
        ("Validation", "val_loss"),
        ("Validation", "val_bits_per_byte"),
        ("Validation", "val_loss/web"),
        ("Tasks", "tasks/blimp/acc"),
        ("Training", "lr"),
        ("Training", "grad_norm"),
        ("Speed", "tokens_per_second"),
        ("Memory", "memory/peak_bytes"),
        ("Other metrics", "step_seconds"),
        ("Other metrics", "goodput"),
    ]


def test_hostile_names_texts_and_values_add_no_markup(make_run):
    changes = {"train": {"num_steps": 100, "sample_prompt": HOSTILE}, "data": {"source": f"text:{HOSTILE}"}}
    workdir = make_run(f"a {HOSTILE.replace('/', '!')}", changes=changes, text=HOSTILE)
    rows = [{"step": 1, HOSTILE: 2.0, f"tasks/{HOSTILE}/acc": 0.5, f"seconds/{HOSTILE}": 5.0, "loss": 1.0}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "results").mkdir()
    tasks = {HOSTILE: {"protocol": HOSTILE, "acc": 0.5, "acc_stderr": 0.1, "count": HOSTILE}}
    (workdir / "results" / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    calm = make_run("calm")
    for others in ([], [calm]):
        page = page_of(workdir, *others)
        found = Elements(page)
        assert {tag for tag, _ in found.tags}.isdisjoint({"img", "iframe", "link", "object", "embed", "form"})
        assert len(found.scripts) == 2, "data and curves.js"
        assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
        assert not [attributes for _, attributes in found.tags if "src" in attributes]
        assert "\x1b" not in page
        assert "\u202e" not in page
        assert "window.bad = 1" in "".join(found.texts), "it is shown as text"
        links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
        assert all(re.fullmatch(r"[\w%./~-]*replay-7\.html", link) for link in links)
        assert len(links) == 1 + len(others)


def test_policy_allows_only_the_own_script(make_run):
    page = page_of(make_run("a"))
    [policy] = re.findall(r'http-equiv=Content-Security-Policy content="([^"]+)"', page)
    script = Elements(page).scripts[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert not re.findall(r"(?:https?:)?//[a-z0-9]+\.", re.sub("http://www.w3.org/2000/svg", "", page))


def test_settings_of_one_run_are_those_unlike_the_defaults(make_run):
    page = page_of(make_run("a", changes={"optim": {"peak_lr": 0.0123}}))
    changed, whole = page.split("<summary>All settings")
    assert "<tr><th>optim.peak_lr<td>0.0123" in changed
    assert "model.n_layer" not in changed
    assert "<tr><th>model.n_layer<td>12" in whole


def test_settings_of_several_runs_are_the_differences(make_run):
    runs = [make_run("a", changes={"optim": {"peak_lr": 0.0123}}), make_run("b", changes={"model": {"n_layer": 6}})]
    page = page_of(*runs)
    settings = page.partition("<h2>Settings</h2>")[2].partition("</section>")[0]
    assert re.findall(r"<tr><th>([^<]+)<td>([^<]+)<td>([^<]+)", settings) == [
        ("model.n_layer", "12", "6"),
        ("optim.peak_lr", "0.0123", "0.0006"),
    ]
    assert "ab" * 16 not in settings
    assert re.search(r"The other \d\d+ settings are equal", settings)
    drawn = Elements(page).drawing
    assert [run["name"] for run in drawn["runs"]] == ["a", "b"]
    assert all({"loss", "val_loss"} <= run["curves"].keys() for run in drawn["runs"])


def test_missing_fields_and_types_count_as_differences():
    assert differences([{"a": 1, "b": [1], "c": True}, {"b": [1], "c": 1}]) == {"a": [1, None], "c": [True, 1]}


def test_facts_samples_versions_events_and_links_are_shown(make_run, tmp_path):
    text = page_of(make_run("a"), page_directory=str(tmp_path))
    for part in (
        "<dt>steps<dd>100 <small>of 100",
        "<dt>goodput<dd>73.5 %",
        "compile<td>3.0s <small>17.6%</small>",
        "<summary>step 40</summary><pre>Once</pre>",
        "<summary>step 20</summary><pre>early</pre>",
        "<th>jax<td>0.10.2",
        "<th>devices<td>8 devices Once",
        "<th>restarts<td>2",
        "<th>rollbacks<td>1",
        "<td>45<td>why Once<td>40<td>9",
        "<a href='runs/a/replay-7.html'>step 7</a>",
        "2026-09-21",
    ):
        assert part in text, part
    assert "data-reload=0>" in text
    assert "data-reload=5>" in page_of(tmp_path / "runs" / "a", reload_seconds=5)


def test_run_names_are_short_and_differ():
    names = page_module._short_names
    assert names(["/home/me/runs/a"]) == ["runs/a"]
    assert names(["/x/runs/a", "/x/runs/b/"]) == ["a", "b"]
    assert names(["p/a", "q/a"]) == ["p/a", "q/a"]
    assert names(["gs://b/runs/x", "runs/x"]) == ["gs://b/runs/x", "runs/x"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "samples.txt", "results/tasks.json", "checkpoints"])
@pytest.mark.parametrize("damage", ["missing", "bytes", "directory", "pipe"])
def test_damaged_file_is_a_note_and_the_rest_is_shown(name, damage, make_run):
    import os
    import shutil

    workdir = make_run("a")
    path = workdir / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if damage == "bytes":
        path.write_bytes(b"\xff\xfe{[\0" * 50)
    elif damage == "directory":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    run = read_run(str(workdir))
    page = render([run])
    assert "</html>" in page
    is_silent = damage == "missing" or (damage == "bytes" and name in ("metrics.jsonl", "samples.txt"))
    if name == "checkpoints":
        is_silent = damage in ("missing", "directory")
    assert bool(run.notes) != is_silent, run.notes
    assert (name in page.partition("<h2>Notes</h2>")[2]) != is_silent
    if name != "metrics.jsonl":
        assert "loss" in run.series
    if name != "config.json" and name != "checkpoints":
        assert run.config["model.n_layer"] == 12


def test_damaged_newest_checkpoint_is_noted_and_the_one_before_it_counts(make_run):
    workdir = make_run("a")
    (workdir / "checkpoints" / "120").mkdir()
    run = read_run(str(workdir))
    assert run.record.step == 100
    assert "step 120" in run.notes[0]
    assert is_finished(run)


def test_run_in_a_bucket_is_read(make_run, tmp_path, monkeypatch):
    from gptjax import record, workdir
    from gptjax.report import data

    make_run("a")
    real = workdir.epath.Path
    for module in (record, workdir, data):
        monkeypatch.setattr(module.epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(tmp_path / "runs"))))
    run = read_run("gs://bucket/a")
    assert run.notes == []
    assert run.step == 100
    assert run.record.step == 100
    assert [sample.text for sample in run.samples] == ["early", "Once"]
    lost = read_run("gs://bucket/none")
    assert (lost.series, lost.record) == ({}, None)


def test_unreachable_bucket_is_a_note(monkeypatch):
    from gptjax.report import data

    def fail(path):
        raise RuntimeError(f"no way to {path}")

    monkeypatch.setattr(data.epath, "Path", fail)
    run = read_run("gs://bucket/a")
    assert "metrics.jsonl cannot be read: " in " ".join(run.notes)
    assert "No step is logged yet" in render([run])


def test_notebook_shows_the_page_in_a_frame_without_access(make_run, tmp_path):
    report = Report([str(make_run("a"))])
    shown = report._repr_html_()
    frame = Elements(shown).tags
    assert [tag for tag, _ in frame] == ["iframe"]
    assert frame[0][1]["srcdoc"] == report.html
    assert frame[0][1]["sandbox"] == "allow-scripts"
    report.save(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text() == report.html
