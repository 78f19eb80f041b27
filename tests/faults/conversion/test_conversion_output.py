"""V: wrong flags, and results that cannot be written, leave everything as it was."""

import os
import resource
from unittest import mock

import pytest

from gptjax.convert import __main__ as convert
from gptjax.convert import llmc
from gptjax.errors import ConfigError, DataError, WorkdirError
from tests.convert import models
from tests.faults.conversion.shared import QKV, assert_equal_bits, spoil_bits

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    "flag",
    [
        "--from=pt:model", "--from=model", "--from=hf:", "--from=", "--to=msgpack:out", "--to=onnx:out", "--to=out",
        "--to=llmc:",
    ],
)  # fmt: skip
def test_v_unknown_format_is_refused(flag, refuse, hf, monkeypatch):
    monkeypatch.chdir(hf.parent)
    name, _, value = flag.partition("=")
    places = {"--from": "hf:model", "--to": "hf:out"} | {name: value}
    refuse(places["--from"], f"--to={places['--to']}", kind=ConfigError, field=name, value=value)


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--dropout=1", {"field": "--dropout", "value": 1.0}),
        ("--dropout=nan", {"field": "--dropout", "value": mock.ANY, "match": "=nan"}),
        ("--dtype=float16", {"field": "--dtype", "match": "--dtype: invalid choice"}),
        ("--dropuot=0.1", {"field": "--dropuot=0.1", "remedy": "nearest: --dropout"}),
        ("--push=a/b", {"field": "--push"}),
    ],
)
def test_v_bad_flag_is_refused(flag, parts, refuse, hf):
    refuse(f"hf:{hf}", flag, to=f"llmc:{hf.parent}/out", kind=ConfigError, **parts)


@pytest.mark.parametrize("form", ["gptjax", "hf", "llmc", "msgpack"])
@pytest.mark.parametrize("name", ["none/such/model", "empty", "file"])
def test_v_source_that_is_no_model_is_refused(name, form, refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    refuse(f"{form}:{tmp_path}/{name}", field=tmp_path / name)


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
@pytest.mark.parametrize("form", ["hf", "llmc", "gptjax"])
def test_v_an_existing_output_is_left_alone(form, kind, model, refuse):
    models.write_hf(model)
    out = model.parent / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "directory":
        out.mkdir()
        (out / "precious").write_text("precious")
    else:
        out.symlink_to("nowhere")
    parts = {"field": out, "remedy": "--force replaces it"}
    if (form, kind) == ("llmc", "directory"):  # --force would not help
        parts = {"field": "--to", "value": f"llmc:{out}", "remedy": f"such as {out}/model.bin"}
    refuse(f"hf:{model}", to=f"{form}:{out}", kind=ConfigError, **parts)


def test_v_force_replaces_the_output_only_after_success(model, refuse, accept, tmp_path):
    old = models.write_hf(model)
    assert_equal_bits(accept(f"hf:{model}"), old)
    (tmp_path / "accepted" / "mine").touch()
    models.write_hf(model, changes={QKV: spoil_bits})
    refuse(f"hf:{model}", "--force", to=f"hf:{tmp_path}/accepted", remedy="--allow_nonfinite")
    new = models.write_hf(model, seed=1)
    assert_equal_bits(accept(f"hf:{model}", "--force"), new)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "accepted"}
    assert not (tmp_path / "accepted" / "mine").exists()


@pytest.mark.parametrize("failing", ["rename", "read back", "write"])
def test_v_force_keeps_the_old_output_if_writing_fails(failing, model, refuse, tmp_path, monkeypatch):
    models.write_hf(model)
    out = tmp_path / "out.bin"
    convert.main([f"--from=hf:{model}", f"--to=llmc:{out}"])
    rename, read_header, write = os.rename, llmc.read_header, llmc.write

    def fail_to_rename(source, target):
        if target == str(out) and source.endswith("/new"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    def write_and_damage(path, *args, **rest):
        write(path, *args, **rest)
        with open(path, "r+b") as file:
            file.seek(2000)
            file.write(b"\x01\x02")

    def fail_to_write(*_, **__):
        raise OSError(28, "No space left on device")

    if failing == "rename":
        monkeypatch.setattr(os, "rename", fail_to_rename)
    else:
        monkeypatch.setattr(llmc, "write", write_and_damage if failing == "read back" else fail_to_write)
    reason = {"rename": "Permission denied", "read back": "differ", "write": "No space left on device"}[failing]
    kind, field = (DataError, f"llmc:{out}") if failing == "read back" else (WorkdirError, out)
    refuse(f"hf:{model}", "--force", to=f"llmc:{out}", kind=kind, field=field, match=reason)
    assert read_header(str(out))


@pytest.mark.parametrize("form", ["hf", "llmc", "gptjax", pytest.param("nanogpt", marks=pytest.mark.torch)])
def test_v_file_size_limit_is_reported_as_unwritable(form, model, refuse, tmp_path):
    """As on a full disk, which every library tells of in its own way."""
    if form == "nanogpt":
        pytest.importorskip("torch")
    models.write_hf(model, config=models.CONFIG | {"vocab_size": 2000, "n_embd": 64})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
        reason = " written$" if form in ("hf", "llmc") else "File too large$"
        refuse(f"hf:{model}", to=f"{form}:{tmp_path}/out", kind=WorkdirError, field=tmp_path / "out", match=reason)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_v_failed_conversion_removes_the_directories_it_created(model, refuse, tmp_path):
    models.write_hf(model, changes={QKV: spoil_bits})
    refuse(f"hf:{model}", to=f"hf:{tmp_path}/some/where/out", remedy="--allow_nonfinite")


def test_v_file_in_the_output_path_is_refused(hf, refuse, tmp_path):
    (tmp_path / "file").write_text("x")
    refuse(f"hf:{hf}", to=f"hf:{tmp_path}/file/out", kind=WorkdirError, field=tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.isdir("/sys/kernel"), reason="root may write anywhere")
def test_v_unwritable_output_directory_is_refused(model, refuse, tmp_path):
    models.write_hf(model)
    place = "/sys/kernel"  # not even root may
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        place = f"{tmp_path}/closed"
    refuse(f"hf:{model}", to=f"hf:{place}/out", kind=WorkdirError, field=f"{place}/out")
