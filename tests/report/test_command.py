"""gptjax report at the command line, and the report that each run writes at its end."""

import json
import subprocess
import sys

from gptjax import record, workdir
from gptjax.errors import ConfigError, WorkdirError
from gptjax.report import __main__ as command
from gptjax.report import data, write
from tests.helpers import raises
from tests.report.conftest import make_rows


def test_page_of_one_run_is_in_its_work_directory(make_run, capsys):
    workdir = make_run("a")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    command.main([str(workdir)])
    assert capsys.readouterr().out == f"{workdir}/report.html\n"
    assert (workdir / "report.html").read_text().startswith("<!doctype html>")
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(workdir.iterdir())) == 6


def test_page_of_several_runs_is_in_the_current_directory(make_run, tmp_path, monkeypatch, capsys):
    runs = [str(make_run("a")), str(make_run("b"))]
    monkeypatch.chdir(tmp_path)
    command.main(runs)
    assert capsys.readouterr().out == "report.html\n"
    page = (tmp_path / "report.html").read_text()
    assert "<a href='runs/a/replay-7.html'>" in page
    command.main([*runs, f"--out={tmp_path}/runs/other.html"])
    assert "<a href='a/replay-7.html'>" in (tmp_path / "runs" / "other.html").read_text()


def test_wrong_directories_and_outputs_are_refused(make_run, tmp_path, monkeypatch):
    workdir = make_run("a")
    monkeypatch.chdir(tmp_path)
    with raises(ConfigError, "runs/none", remedy="runs: runs/a"):
        command.main(["runs/none"])
    with raises(ConfigError, "runs", remedy="runs: runs/a"):
        command.main(["runs"])
    with raises(ConfigError, "--out", value="gs://bucket/x.html"):
        command.main([str(workdir), "--out=gs://bucket/x.html"])
    with raises(ConfigError, "nowhere://bucket/a"):
        command.main(["nowhere://bucket/a"])
    with raises(WorkdirError, f"{tmp_path}/no/x.html", remedy="choose another with --out=FILE"):
        command.main([str(workdir), f"--out={tmp_path}/no/x.html"])


def test_notes_go_to_the_error_stream(make_run, capsys):
    workdir = make_run("a")
    (workdir / "config.json").write_text("{")
    command.main([str(workdir)])
    said = capsys.readouterr()
    assert said.out == f"{workdir}/report.html\n"
    assert said.err.startswith(f"note: {workdir}: config.json cannot be read: ")


def test_watched_page_is_written_again_until_the_run_is_finished(make_run, monkeypatch):
    workdir = make_run("a", steps=40)
    pages = []

    def sleep(seconds):
        assert seconds >= command.WATCH_SECONDS
        pages.append((workdir / "report.html").read_text())
        if len(pages) == 1:
            with open(workdir / "metrics.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in make_rows(60)[42:])
        else:
            (make_run("finished") / "checkpoints" / "100").rename(workdir / "checkpoints" / "100")

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.main([str(workdir), "--watch"])
    assert [f"<dd>{step} <small>of 100" in page for step, page in zip((40, 60), pages, strict=True)] == [True, True]
    assert all("data-reload=5>" in page for page in pages)
    last = (workdir / "report.html").read_text()
    assert "<dd>100 <small>of 100" in last
    assert "data-reload=0>" in last, "nothing will follow"


def test_interrupted_watch_leaves_a_page_that_does_not_reload(make_run, monkeypatch):
    workdir = make_run("a", steps=40)

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.main([str(workdir), "--watch"])
    assert "data-reload=0>" in (workdir / "report.html").read_text()


def test_run_writes_its_report_at_its_end(train_here, tmp_path, said):
    workdir = tmp_path / "run"
    assert train_here(workdir, train={"num_steps": 2}) == 0
    page = (workdir / "report.html").read_text()
    assert "<dd>2 <small>of 2" in page
    assert "<th>jax<td>" in page
    assert ">checkpoint<td>" in page, "the time of the last save, which no row of the metrics has"
    assert said[-1] == f"  open in a browser: {workdir}/report.html"


def test_failing_report_is_a_warning(train_here, tmp_path, said, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no page\ntoday")

    monkeypatch.setattr(write, "render", fail)
    workdir = tmp_path / "run"
    assert train_here(workdir, train={"num_steps": 2}) == 0
    [warning] = [line for line in said if "report.html" in line]
    assert warning.startswith(f"{workdir}/report.html cannot be written: ")
    assert "no page" in warning
    assert "\n" not in warning
    assert said[-1].startswith("  python -m gptjax evaluate")


def test_directory_in_the_way_of_the_report_is_a_warning(train_here, tmp_path, said):
    workdir = tmp_path / "run"
    (workdir / "report.html").mkdir(parents=True)
    assert train_here(workdir, train={"num_steps": 2}) == 0
    assert any("report.html cannot be written" in line for line in said)


def test_report_of_a_run_in_a_bucket_is_copied_there(make_run, tmp_path, monkeypatch):
    workdir = make_run("a")
    real = write.epath.Path
    monkeypatch.setattr(write.epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(tmp_path / "stored"))))
    (tmp_path / "stored").mkdir()
    assert write.report_end(str(workdir), "gs://bucket", spent={"step": 7.0}) == "report.html"
    assert (tmp_path / "stored" / "report.html").read_bytes() == (workdir / "report.html").read_bytes()


def test_page_of_a_run_in_a_bucket_is_here(make_run, tmp_path, monkeypatch, capsys):
    make_run("a")
    real = workdir.epath.Path
    for module in (data, record, workdir):
        monkeypatch.setattr(module.epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(tmp_path / "runs"))))
    monkeypatch.chdir(tmp_path)
    command.main(["gs://bucket/a"])
    assert capsys.readouterr().out == "runs/gs-bucket-a/report.html\n"
    assert "<dd>100 <small>of 100" in (tmp_path / "runs" / "gs-bucket-a" / "report.html").read_text()
    with raises(ConfigError, "gs://bucket/none"):
        command.main(["gs://bucket/none"])


def test_training_does_not_import_the_report_before_its_end():
    code = "import sys, gptjax.train; print([name for name in sys.modules if name.startswith('gptjax.report')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"
