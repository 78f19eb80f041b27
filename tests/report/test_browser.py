"""The page in a real headless Chromium."""

import json

import pytest

from gptjax.report.data import read_run
from gptjax.report.page import render
from tests.browser import CHROMIUM, browser
from tests.report.conftest import HOSTILE, add_layers, make_rows

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")

BOX = "(r => [r.left, r.top, r.width, r.height])(document.querySelector('svg').getBoundingClientRect())"
TIP = "[...document.querySelectorAll('.tip div')].map(row => [...row.children].map(part => part.textContent))"


@pytest.fixture(scope="module")
def tab():
    with browser() as opened:
        yield opened


@pytest.fixture
def show(tab, tmp_path):
    """show(workdirs, width=..., dark=...) opens their page."""

    def show(*workdirs, reload_seconds=0, **options):
        path = tmp_path / "page.html"
        path.write_text(render([read_run(str(workdir)) for workdir in workdirs], reload_seconds=reload_seconds))
        tab.open(path, **options)
        return path

    return show


def is_quiet(tab, path):
    assert tab.errors == []
    assert set(tab.requests) == {path.as_uri()}


def points_drawn(tab, run, name):
    paths = tab.evaluate(
        f"[...document.querySelectorAll('path')].filter(p => p.dataset.run === {json.dumps(run)} && "
        f"p.dataset.name === {json.dumps(name)}).map(p => p.getAttribute('d'))"
    )
    return [path.count("L") + 1 for path in paths]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_loads_nothing_and_reports_no_error(width, dark, tab, show, make_run):
    long = make_run("b_with_a_name_that_is_as_long_as_names_of_runs_become", changes={"model": {"n_layer": 6}})
    path = show(make_run("a"), long, width=width, dark=dark)
    is_quiet(tab, path)
    outside = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('svg') &&
        e.getBoundingClientRect().right > WIDTH + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert tab.evaluate(outside.replace("WIDTH", str(width))) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert points_drawn(tab, "a", "loss") == [100]
    assert points_drawn(tab, "a", "val_loss") == [5, 5]
    body = "getComputedStyle(document.body).backgroundColor"
    assert (sum(map(int, tab.evaluate(body)[4:-1].split(","))) < 384) == dark


def test_drawn_points_are_those_of_the_metrics(tab, show, make_run):
    workdir = make_run("a")
    show(workdir)
    figure = "document.querySelector('path[data-name=grad_norm]').closest('figure')"
    path = tab.evaluate(f"{figure}.querySelector('path').getAttribute('d')")
    points = [tuple(map(float, part.split(" "))) for part in path[1:].split("L")]
    labels = (
        f"[...{figure}.querySelectorAll('text')].map(t => [+t.textContent, +t.getAttribute('x'), +t.getAttribute('y')])"
    )
    *ys, (x_value, x, bottom) = [label for label in tab.evaluate(labels) if label[0] != 100]
    (low, _, y_low), (high, _, y_high) = [label for label in ys if label[2] != bottom][:2]
    # What the axes say about each point.
    series = read_run(str(workdir)).series["grad_norm"]
    found = [low + (y + 4 - y_low) * (high - low) / (y_high - y_low) for _, y in points]
    assert found == pytest.approx(series.values.tolist(), abs=0.01)
    left = points[0][0]
    steps = [1 + (at - left) * (x_value - 1) / (x - left) for at, _ in points]
    assert steps == pytest.approx(series.steps.tolist(), abs=0.1)


def test_hovering_shows_the_values_of_all_runs(tab, show, make_run):
    show(make_run("a"), make_run("b", offset=1.0))
    left, top, width, height = tab.evaluate(BOX)
    # Step 50 of 1 to 100, between the margins.
    tab.move(left + 54 + (width - 66) * 49.0 / 99, top + height / 2)
    tip = tab.evaluate(TIP)
    expected = make_rows(50)[-1]["loss"]
    assert tip[0] == ["step", "50"]
    assert [row[1] for row in tip if row[0] == ""] == ["a", "b"]
    assert [row[0] for row in tip if row[0]] == ["step", *["one update", "smoothed", "validation"] * 2]
    assert float(tip[2][1]) == pytest.approx(expected, rel=1e-4)
    assert float(tip[6][1]) == pytest.approx(expected + 1, rel=1e-4)
    lines = "[...document.querySelectorAll('.cross')].map(line => line.getAttribute('visibility'))"
    assert set(tab.evaluate(lines)) == {"visible"}, "in every panel"
    tab.move(2, 2)
    assert tab.evaluate("document.querySelector('.tip')") is None


@pytest.mark.parametrize("layers", [3, 12, 20])
def test_hovering_over_layers_shows_all_or_the_extremes(layers, tab, show, make_run):
    workdir = make_run("a")
    add_layers(workdir, layers)
    path = show(workdir)
    assert points_drawn(tab, "runs/a", "stats/grad_rms/h0") == [10]
    opacity = "document.querySelector('path[data-name=\"stats/grad_rms/h%d\"]').getAttribute('stroke-opacity')"
    assert [float(tab.evaluate(opacity % layer)) for layer in (0, layers - 1)] == [0.2, 1.0]
    # In this panel there is also a part that is no layer.
    svg = "document.querySelector('path[data-name=\"stats/grad_rms/h0\"]').closest('svg')"
    tab.evaluate(f"{svg}.scrollIntoView({{block: 'center'}})")
    left, top, width, height = tab.evaluate(BOX.replace("document.querySelector('svg')", svg))
    tab.move(left + 54 + (width - 66) * 49.0 / 99, top + height / 2)
    _, *tip, table = tab.evaluate(TIP)
    assert table == ["wte", "25"]
    highest, first = f"layer {layers // 2}", "layer 0"
    if layers <= 12:
        assert [row[0] for row in tip] == [f"layer {layer}" for layer in range(layers)]
        assert dict(tip)[highest] == "150"
    else:
        assert [row[0] for row in tip] == [highest, tip[1][0], first]
        assert tip[1][0].startswith("median, layer ")
        assert [row[1] for row in tip] == ["150", "145", "140"]
    is_quiet(tab, path)


def test_values_are_not_shown_where_a_curve_has_ended(tab, show, make_run):
    show(make_run("a"), make_run("b", steps=50))
    left, top, width, height = tab.evaluate(BOX)
    tab.move(left + width * 0.8, top + height / 2)
    assert [row[1] for row in tab.evaluate(TIP) if row[0] == ""] == ["a"]


def test_dragging_enlarges_every_panel(tab, show, make_run):
    show(make_run("a"))
    left, top, width, height = tab.evaluate(BOX)
    button = "document.querySelector('button.whole')"
    assert tab.evaluate(f"{button}.offsetWidth") == 0
    for kind, share in (("mousePressed", 0.5), ("mouseMoved", 0.7), ("mouseReleased", 0.9)):
        place = {"x": left + share * width, "y": top + height / 2}
        tab.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
    [loss] = points_drawn(tab, "runs/a", "loss")
    assert 30 < loss < 50
    assert points_drawn(tab, "runs/a", "lr") == [loss]
    assert tab.evaluate(f"{button}.offsetWidth") > 0
    tab.evaluate(f"{button}.click()")
    assert points_drawn(tab, "runs/a", "loss") == [100]


def test_legend_axis_and_log_switches_redraw(tab, show, make_run):
    path = show(make_run("a"), make_run("b"))
    assert points_drawn(tab, "b", "loss") == [100]
    tab.evaluate("document.querySelectorAll('button.run')[1].click()")
    assert points_drawn(tab, "b", "loss") == []
    assert points_drawn(tab, "a", "loss") == [100]
    labels = "[...document.querySelectorAll('svg')][0].textContent"
    by_step = tab.evaluate(labels)
    for axis, unit in (("tokens", "K"), ("time", "s"), ("FLOPs", "e1")):
        tab.evaluate(f"[...document.querySelectorAll('.axes button')].find(b => b.textContent === '{axis}').click()")
        assert tab.evaluate(labels) != by_step
        assert unit in tab.evaluate(labels), axis
    linear = tab.evaluate("document.querySelector('path[data-name=loss]').getAttribute('d')")
    tab.evaluate("document.querySelector('button.log').click()")
    assert tab.evaluate("document.querySelector('path[data-name=loss]').getAttribute('d')") != linear
    tab.evaluate(
        "[...document.querySelectorAll('figcaption button')].find(b => b.textContent === 'validation').click()"
    )
    assert points_drawn(tab, "a", "val_loss") == [5], "its own panel still has it"
    is_quiet(tab, path)


def test_hostile_run_executes_nothing(tab, show, make_run):
    path = show(make_run(f"a {HOSTILE.replace('/', '!')}", text=HOSTILE), make_run("b"))
    is_quiet(tab, path)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    box = tab.evaluate("(r => [r.left + 200, r.top + 60])(document.querySelector('svg').getBoundingClientRect())")
    tab.move(*box)
    assert "window.bad" in tab.evaluate("document.querySelector('.tip').innerText")
    assert tab.evaluate("typeof window.bad") == "undefined"
    assert tab.evaluate("document.querySelectorAll('img').length") == 0
    is_quiet(tab, path)


def test_policy_of_the_page_refuses_another_script(tab, show, make_run):
    show(make_run("a"))
    tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 3'}))"
    )
    assert tab.evaluate("typeof window.bad") == "undefined"
    assert "Content Security Policy" in " ".join(tab.errors)


def test_watched_page_loads_itself_again_and_keeps_the_choices(tab, show, make_run):
    workdir = make_run("a")
    path = show(workdir, reload_seconds=0.3)
    tab.evaluate("document.querySelector('button.log').click(); window.old = true")
    path.write_text(render([read_run(str(workdir))]))
    tab.wait("window.old === undefined && document.querySelector('button.log') !== null")
    assert tab.evaluate("document.body.dataset.reload") == "0"
    assert tab.evaluate("document.querySelector('button.log').getAttribute('aria-pressed')") == "true"


def test_page_in_a_frame_of_a_notebook_draws(tab, tmp_path, make_run):
    from gptjax.report.write import Report

    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{Report([str(make_run('a'))])._repr_html_()}")
    tab.open(path)
    assert tab.errors == []
    assert tab.requests[0] == path.as_uri()
    assert not [request for request in tab.requests if request.startswith("http")]


def test_run_without_a_step_shows_that(tab, show, make_run):
    workdir = make_run("a")
    (workdir / "metrics.jsonl").write_text("")
    path = show(workdir)
    is_quiet(tab, path)
    assert "No step is logged yet." in tab.evaluate("document.body.innerText")
