"""J1: damaged JSON and text of a run, of data or of a model ends in one line that names the file, or is left out."""

import dataclasses
import errno
import json
import os

import pytest

from gptjax import goodput, logs
from gptjax.config import Config
from gptjax.config_files import settings_in
from gptjax.convert import huggingface, native
from gptjax.data import journal
from gptjax.data.meta import read_meta
from gptjax.data.source import Place
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import CheckpointError, ConfigError, DataError, UnavailableError
from gptjax.record import Record
from gptjax.replay import update
from gptjax.strict_json import InvalidTextError
from tests.convert.models import read_header, write_header, write_hf
from tests.helpers import failing, os_error, raises

pytestmark = pytest.mark.faults
DEEP = b"[" * 900 + b"]" * 900  # which Python's parser takes
NOT_JSON = {
    "brackets": b"[" * 100_000, "objects": b'{"a":' * 100_000, "not UTF-8": b'{"a": "\xff"}',
    "digits": b'{"step": ' + b"9" * 5000 + b"}", "many digits": b'{"step": ' + b"9" * 400 + b"}",
    "deep": b'{"step": 0, "loss": ' + DEEP + b"}", "twice": b'{"step": 0, "step": 0}',
    "half a pair": b'{"step": 0, "a": "\\ud800"}',
}  # fmt: skip
NOT_JSON |= {"a list": b"[1]", "null": b"null", "a string": b'"x"', "a number": b"1"}
NOT_JSON |= {"NULs": b"\0" * 100, "UTF-16": b"\xff\xfe{\0}\0", "empty": b""}
NOT_AN_OBJECT = {"a list", "null", "a string", "a number"}
LATE = b'{"step": 9223372036854775808, "loss": 1.0}'  # more than 63 bits
NAN = {"NaN": b'{"step": 0, "loss": NaN}', "too large": b'{"step": 0, "loss": 1e999}'}


def is_text_invalid(error):
    """Returns whether the strict parser has caused `error`."""
    return isinstance(error, InvalidTextError) or (error is not None and is_text_invalid(error.__cause__))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_hf(directory)
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "vocab.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "model.safetensors.index.json"]
)
def test_j1_damaged_model_file_is_named(model, name, monkeypatch):
    path, before = model / name, (model / name).read_bytes() if (model / name).exists() else None
    if "index" in name:
        (model / "model.safetensors").rename(model / "away")
    try:
        # config.json and the index may have NaN: what is looked at in them is compared by itself.
        nan = NAN if "token" in name or "vocab" in name else {}
        for what, content in (NOT_JSON | nan).items():
            path.write_bytes(content)
            with raises(DataError, str(model if nan else path), match=name) as caught:
                huggingface.read(str(model), origin="hf:model")
            assert is_text_invalid(caught.value) or what in NOT_AN_OBJECT, what
            assert str(caught.value).isprintable(), what
            assert len(str(caught.value)) < 400, what
    finally:
        path.write_bytes(before) if before is not None else path.unlink()
        if "index" in name:
            (model / "away").rename(model / "model.safetensors")


def test_j1_text_files_are_utf8_with_or_without_a_mark(tmp_path):
    write_hf(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "config.json").read_bytes())
    assert huggingface.read(str(tmp_path), origin="hf:model").config.n_layer == 2
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n\xff \xfe\n")
    with raises(DataError, str(tmp_path), match=r"merges\.txt: .*byte 14 is 0xff"):
        huggingface.read(str(tmp_path), origin="hf:model")


@pytest.mark.parametrize("field", [b"9" * 5000, b"1e999", b'{"a": 1, "a": 2}', b'"\\ud800"'])
def test_j1_invalid_json_in_an_unused_header_field_is_refused(model, tmp_path, field):
    header, data = read_header(model / "model.safetensors")
    header["transformer.ln_f.bias"]["more"] = "HERE"
    write_hf(tmp_path)
    write_header(tmp_path / "model.safetensors", json.dumps(header).encode().replace(b'"HERE"', field), data)
    with raises(DataError, f"{tmp_path}/model.safetensors", match="header"):
        huggingface.read(str(tmp_path), origin="hf:model")


@pytest.mark.parametrize("content", (NOT_JSON | NAN).values(), ids=NOT_JSON | NAN)
def test_j1_damaged_json_of_gptjax_is_refused_or_ignored(tmp_path, content):
    for name in ("tokenizer.json", "meta.json", "journal.json"):
        (tmp_path / name).write_bytes(content)
    with raises(DataError, f"{tmp_path}/tokenizer.json", remedy="give gpt2, bytes") as tokenizer:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with raises(DataError, f"{tmp_path}/meta.json") as meta:
        read_meta(str(tmp_path))
    assert all(is_text_invalid(caught.value) for caught in (tokenizer, meta))
    assert journal.read_journal(str(tmp_path)) is None


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a directory"])
def test_j1_tokenizer_that_is_no_file_is_named(kind, reference, tmp_path):
    path = tmp_path / "tokenizer.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for load in (lambda: load_tokenizer(str(path)), lambda: native.read_tokenizer(str(tmp_path))):
        with raises(DataError, str(path), remedy="gpt2, bytes", match=f"is {kind}, not a regular file"):
            load()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["stat", "open"])
def test_c6_unreadable_tokenizer_is_not_damage(call, number, reference, monkeypatch):
    path = f"{reference}/tokenizer.json"
    real = getattr(os, call)

    def fail(name, *args, **kwargs):
        if name == path:
            raise OSError(number, os.strerror(number))
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, call, fail)
    with raises(UnavailableError, path, remedy="again", match=f"cannot be read now: {os.strerror(number)}"):
        load_tokenizer(path)


def test_j1_tokenizer_link_that_leads_nowhere_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.symlink_to(tmp_path / "missing")
    for name in (str(path), f"{path}\0"):
        problem = "leads to no file" if name == str(path) else "no such tokenizer"
        with raises(ConfigError, "data.tokenizer", value=name, match=problem):
            load_tokenizer(name)


def test_j1_journal_with_an_invalid_value_is_ignored(tmp_path):
    good = journal.Journal({"source": "x"}, 3, Place(1, 2, 3, 4))
    journal.write_journal(str(tmp_path), good)
    assert journal.read_journal(str(tmp_path)) == good
    values = dataclasses.asdict(good)
    train = values["splits"]["train"]
    for bad in (
        *({"documents": count} for count in ("3", -1, 2**63, 1.5, True, None, [])),
        {"place": 1},
        {"place": [0, 0, 0, -1]},
        {"place": [0] * 7},
        {"skipped": -1},
        {"settings": []},
        {"splits": []},
        {"splits": values["splits"] | {"train": train | {"tokens": "9"}}},
        {"splits": values["splits"] | {"train": train | {"bytes": -1}}},
    ):
        (tmp_path / "journal.json").write_text(json.dumps(values | bad))
        assert journal.read_journal(str(tmp_path)) is None, bad


def record(step):
    return Record(step, Config().to_dict(), {}, {}, {}, {})


UNKNOWN = b'{"model": {"n_wheels": 3}}'


@pytest.mark.parametrize("content", [*(NOT_JSON | NAN).values(), UNKNOWN], ids=[*NOT_JSON, *NAN, "unknown field"])
def test_j1_damaged_run_config_falls_back_to_the_checkpoint(tmp_path, said, content):
    (tmp_path / "config.json").write_bytes(content)
    if content != UNKNOWN:
        with pytest.raises(InvalidTextError):
            settings_in(content)
    problem = r"config\.json: .*n_wheels" if content == UNKNOWN else r"config\.json: "
    with raises(CheckpointError, "--workdir", value=str(tmp_path), match=problem):
        update.find_config(str(tmp_path), 9, records={}, overrides={})
    assert update.find_config(str(tmp_path), 9, records={3: record(3)}, overrides={}) == Config()
    (line,) = said
    assert line.startswith(f"{tmp_path}/config.json: ")
    assert line.endswith(" step 3")


def test_j1_damaged_log_lines_are_skipped(tmp_path):
    rows = [{"step": 1, "loss": 2.5, "step_seconds": 1.0}]
    rows.append({"step": 2, "val_loss": 3.5, "loss": 1.5, "step_seconds": 2.0})
    lines = [json.dumps(row).encode() for row in rows]
    content = b"\n".join([lines[0], *NOT_JSON.values(), LATE, lines[1], b'{"step": 3, "lo']) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert list(logs.parse_rows(content)) == rows
    assert list(logs.rows_after(str(tmp_path), 1)) == rows[1:]
    assert goodput.seconds_after(logs.rows_after(str(tmp_path), 0), 0) == 3.0
    assert native._losses(str(tmp_path), 9) == {"loss": 1.5, "val_loss": 3.5}
    metrics = {"loss": 1.5}
    assert update.compare_with_log(str(tmp_path), 2, metrics, skipped=()) == "equal to metrics.jsonl, bit for bit"
    assert logs.cut_to_step(tmp_path / "metrics.jsonl", 1) == rows[:1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[0] + b"\n"


def unreadable_log(kind, directory, monkeypatch):
    """Makes a metrics.jsonl that cannot be read, and returns the reason."""
    path = directory / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
        return "is a pipe, not a regular file"
    if kind == "endless":
        path.symlink_to("/dev/zero")
        return "is a symbolic link, not a regular file"
    path.touch()
    if kind == "huge":
        monkeypatch.setattr(logs, "LARGEST_FILE", 2**20)
        os.truncate(path, 10**12)
        return "more than 1,048,576 bytes to be searched"

    monkeypatch.setattr("gptjax.log_reader.open_regular", failing(os_error(errno.EACCES)))
    return "Permission denied"


@pytest.mark.parametrize("kind", ["pipe", "endless", "huge", "forbidden"])
def test_j1_unreadable_log_is_left_out_and_named(kind, said, monkeypatch, tmp_path):
    reason = unreadable_log(kind, tmp_path, monkeypatch)
    assert native._losses(str(tmp_path), 9) == {}
    assert said == [f"{tmp_path}/metrics.jsonl: {reason}: converted without its losses"]
    line = update.compare_with_log(str(tmp_path), 2, {"loss": 1.5}, skipped=())
    assert line == f"metrics.jsonl: {reason}: not compared"


def test_j1_unreachable_log_in_a_bucket_is_left_out(said, monkeypatch):
    monkeypatch.setattr("gptjax.log_reader.read_file", failing(RuntimeError("403 Forbidden")))
    assert native._losses("gs://bucket/run", 9) == {}
    assert said == ["gs://bucket/run/metrics.jsonl: 403 Forbidden: converted without its losses"]


def test_w3_end_of_a_large_log_is_read_from_its_end(tmp_path):
    """A row near the end, behind a hole of a terabyte."""
    rows = [{"step": 7, "loss": 2.5}, {"step": 8, "loss": 1.5, "val_loss": 3.5}]
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.truncate(10**12)
        file.seek(10**12)
        file.writelines(b"\n" + json.dumps(row).encode() for row in rows)
    assert native._losses(str(tmp_path), 9) == {"loss": 1.5, "val_loss": 3.5}
    line = update.compare_with_log(str(tmp_path), 7, {"loss": 2.5}, skipped=())
    assert line == "equal to metrics.jsonl, bit for bit"


def test_j1_nonfinite_numbers_in_a_log_become_null(tmp_path):
    assert list(logs.parse_rows(b"\n".join(NAN.values()))) == [{"step": 0, "loss": None}] * 2


@pytest.mark.parametrize("value", ["\x1b[2J" * 99, "9" * 9999, [[["x"]]], {}, True])
def test_j1_odd_log_values_are_reported_in_one_line(tmp_path, value):
    for name, said in (("loss", "DIFFERENT from metrics.jsonl"), ("rollbacks", "not compared")):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 1.5, name: value}))
        line = update.compare_with_log(str(tmp_path), 2, {"loss": 1.5}, skipped=())
        assert said in line
        assert line.isprintable()
        assert len(line) < 300
