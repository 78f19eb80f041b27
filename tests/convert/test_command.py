"""`python -m gptjax.convert`: what it prints, what it leaves behind, and the ways through several formats."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest

from gptjax.convert import __main__ as command
from gptjax.convert import formats, hub
from gptjax.convert.formats import ModelRef
from gptjax.convert.weights import read_tensors
from gptjax.data.patterns import GPT2_PATTERN
from gptjax.data.tokenizer import make_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.model import GPT
from tests.convert.models import CONFIG, write_hf, write_llmc
from tests.helpers import raises


def convert(source, target, *flags):
    command.main([f"--from={source}", f"--to={target}", *flags])


def tensors(place):
    kind, _, path = place.partition(":")
    return {n: (t.dtype, t.tobytes()) for n, t in read_tensors(formats.open_weights(ModelRef(kind, path)))}


def hf_weights(directory):
    return formats.open_weights(ModelRef("hf", str(directory)))


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hf_round_trip_through_gptjax_keeps_every_byte(tmp_path, dtype, said):
    write_hf(tmp_path / "a", dtype=dtype)
    convert(f"hf:{tmp_path}/a", f"gptjax:{tmp_path}/b")
    convert(f"gptjax:{tmp_path}/b", f"hf:{tmp_path}/c")
    assert tensors(f"hf:{tmp_path}/c") == tensors(f"hf:{tmp_path}/a")
    assert left(tmp_path) == ["a", "b", "c"]
    assert len({line.split()[-1] for line in said if "weights sha256" in line}) == 1
    assert sum("weights sha256" in line for line in said) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llmc_round_trip_through_gptjax_writes_the_same_file(tmp_path, dtype):
    write_llmc(tmp_path / "a.bin", dtype=dtype)
    convert(f"llmc:{tmp_path}/a.bin", f"gptjax:{tmp_path}/b", "--dropout=0.1")
    convert(f"gptjax:{tmp_path}/b", f"llmc:{tmp_path}/c.bin")
    assert (tmp_path / "c.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model"]["dropout"] == 0.1


def test_bfloat16_export_reports_the_rounding_and_both_checksums(tmp_path, said):
    write_hf(tmp_path / "a")
    convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/b", "--dtype=bfloat16")
    expected = {n: t.read().astype("bfloat16").tobytes() for n, t in hf_weights(tmp_path / "a").tensors.items()}
    assert {n: t for n, (_, t) in tensors(f"hf:{tmp_path}/b").items()} == expected
    assert any("float32 becomes bfloat16" in line for line in said)
    assert len({line.split()[-1] for line in said if "weights sha256" in line}) == 2


ROWS = 16  # kinds of tensors in a tied model


def dry_run(capsys, source, *flags):
    """Returns the table as {name in the source: (name in the result, its shape and dtype)}."""
    capsys.readouterr()
    command.main([f"--from={source}", "--dry_run", *flags])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "source"
    assert len(lines) == ROWS
    cells = [re.split(r"  +", line) for line in lines]
    assert {len(row) for row in cells} == {6}
    return {row[0]: tuple(row[3:]) for row in cells}


def test_a_dry_run_shows_the_map_and_writes_nothing(tmp_path, capsys, said):
    write_hf(tmp_path / "a", dtype="bfloat16")
    table = dry_run(capsys, f"hf:{tmp_path}/a", f"--to=gptjax:{tmp_path}/b")
    assert table["transformer.wte.weight"] == ("wte/embedding", "128x16", "float32")
    assert table["transformer.h.0.attn.c_attn.weight x 2"] == ("h/attn/c_attn/kernel", "2x16x3x16", "float32")
    assert any("no tokenizer" in line for line in said)
    assert dry_run(capsys, f"hf:{tmp_path}/a") == table
    assert left(tmp_path) == ["a"]


def test_a_dry_run_shows_names_and_shapes_of_each_target(tmp_path, capsys):
    write_hf(tmp_path / "a")
    qkv, table = "transformer.h.0.attn.c_attn.weight x 2", "transformer.wte.weight"
    shown = {
        kind: dry_run(capsys, f"hf:{tmp_path}/a", f"--to={kind}:{tmp_path}/b") for kind in ("llmc", "nanogpt", "hf")
    }
    assert shown["llmc"][qkv] == ("h.0.attn.c_attn.weight x 2", "48x16", "float32")
    assert shown["llmc"][table] == ("wte.weight", "128x16", "float32")
    assert shown["nanogpt"][qkv] == (qkv, "48x16", "float32")
    assert shown["nanogpt"][table] == (table, "50x16", "float32")
    assert shown["hf"][qkv] == (qkv, "16x48", "float32")


DIFFERENCES = {
    "gptjax": ["50 rows of the vocabulary are padded with zeros to 128"],
    "hf": [],
    "nanogpt": ["matrices of layers are stored as [out, in]"],
    "llmc": [
        "50 rows of the vocabulary are padded with zeros to 128",
        "matrices of layers are stored as [out, in]",
        "dropout=0.1 is left out: there is no place for it in llmc",
    ],
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_dry_run_reports_the_differences_of_each_target(tmp_path, capsys, said, kind):
    write_hf(tmp_path / "a")
    dry_run(capsys, f"hf:{tmp_path}/a", f"--to={kind}:{tmp_path}/b")
    first, tokenizer, *rest = said
    assert "7,520 parameters" in first
    assert "no tokenizer" in tokenizer
    found = [line.strip() for line in rest if "activation" not in line]
    assert found == DIFFERENCES[kind]


# target, model.activation, and what the target's program computes instead
OTHER_FORMS = {
    ("nanogpt", "gelu_new"): "gelu",
    ("llmc", "gelu"): "gelu_new",
    **dict.fromkeys([("nanogpt", "gelu"), ("llmc", "gelu_new"), ("hf", "gelu"), ("gptjax", "gelu")], ""),
}


@pytest.mark.parametrize(("kind", "activation"), OTHER_FORMS)
def test_target_that_computes_another_activation_is_reported_or_refused(tmp_path, capsys, said, kind, activation):
    """The reported number is that of the two functions, on the same tokens for every model."""
    wide = {f"h.{layer}.mlp.c_fc.weight": lambda tensor: 40 * tensor for layer in range(2)}
    write_hf(tmp_path / "a", config=CONFIG | {"activation_function": activation}, changes=wide)
    command = (f"hf:{tmp_path}/a", f"--to={kind}:{tmp_path}/b")
    dry_run(capsys, *command)
    other = OTHER_FORMS[kind, activation]
    lines = [line for line in said if "activation" in line and "logits differ" in line]
    assert len(lines) == bool(other)
    if not other:
        dry_run(capsys, *command, "--strict")
        return
    weights = hf_weights(tmp_path / "a")
    params = formats.load_params(weights, lambda path, leaf: leaf)
    tokens_BT = np.random.default_rng(0).integers(0, 50, (8, 8), np.int32)
    logits = [
        GPT(dataclasses.replace(weights.config, activation=each)).apply({"params": params}, tokens_BT)
        for each in ("gelu_new", "gelu")
    ]
    largest = float(np.abs(logits[0] - logits[1]).max())
    assert largest > 1e-5
    assert lines[0].endswith(f" {largest:.1e}")
    assert f"activation {other}, and this model has {activation}" in lines[0]
    with raises(DataError, "--to", value=kind, remedy="--strict"):
        dry_run(capsys, *command, "--strict")


def test_activation_flag_is_only_for_files_without_an_activation(tmp_path, capsys):
    write_llmc(tmp_path / "a.bin")
    assert formats.open_weights(ModelRef("llmc", f"{tmp_path}/a.bin")).config.activation == "gelu_new"
    assert formats.open_weights(ModelRef("llmc", f"{tmp_path}/a.bin"), activation="gelu").config.activation == "gelu"
    write_hf(tmp_path / "a")
    with raises(ConfigError, "--activation", value="gelu"):
        dry_run(capsys, f"hf:{tmp_path}/a", "--activation=gelu")


# target, tokenizer, its vocab_size, and the line about it
TOKENIZER_LINES = [
    ("llmc", "bytes", 257, "is in gpt2_tokenizer.bin beside"),
    ("llmc", "gpt2", 50257, "is in gpt2_tokenizer.bin beside"),
    ("nanogpt", "bytes", 257, "is in meta.pkl beside"),
    ("nanogpt", "gpt2", 50257, ""),  # which nanoGPT assumes
    ("nanogpt", "words", 258, "is left out: nanogpt has place for single characters only"),
    ("hf", "bytes", 257, ""),
    ("gptjax", "bytes", 257, ""),
]


@pytest.mark.parametrize(("kind", "name", "vocab_size", "line"), TOKENIZER_LINES)
def test_dry_run_says_where_the_tokenizer_goes(tmp_path, capsys, said, kind, name, vocab_size, line):
    if name == "words":
        ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b"ab"])}
        name = str(tmp_path / "words")
        make_tokenizer("words", GPT2_PATTERN, ranks).save(name)
    write_hf(tmp_path / "a", config=CONFIG | {"vocab_size": vocab_size})
    dry_run(capsys, f"hf:{tmp_path}/a", f"--to={kind}:{tmp_path}/b/m", f"--tokenizer={name}")
    lines = [each for each in said if each.startswith("  the tokenizer")]
    assert len(lines) == bool(line)
    assert line in "".join(lines)
    assert not (tmp_path / "b").exists()


def test_empty_output_directory_is_accepted(tmp_path):
    write_hf(tmp_path / "a")
    (tmp_path / "b").mkdir()
    convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/b")
    assert "model.safetensors" in left(tmp_path / "b")


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("hf:gs://bucket/model", "this machine's disks"),
        ("llmc:full", r"such as full/model\.bin"),
        ("nanogpt:empty", r"such as empty/ckpt\.pt"),
        ("hf:full", "contains the source"),
        ("hf:.", "the command runs"),
        ("hf:{0}", "the command runs"),
    ],
)
def test_force_replaces_only_an_old_output(tmp_path, monkeypatch, target, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    write_llmc(tmp_path / "full" / "m.bin")
    target = target.format(tmp_path)
    with raises(ConfigError, "--to", value=target, match=problem):
        convert("llmc:full/m.bin", target, "--force")
    assert (left(tmp_path), left(tmp_path / "full")) == (["empty", "full"], ["m.bin"])


def test_run_is_never_replaced(tmp_path):
    """Its other checkpoints, moments and metrics would be lost; a model that was only converted has no metrics."""
    write_hf(tmp_path / "a")
    for _ in range(2):
        convert(f"hf:{tmp_path}/a", f"gptjax:{tmp_path}/run", "--force")
    (tmp_path / "run/metrics.jsonl").touch()
    for target in (f"hf:{tmp_path}/run", f"gptjax:{tmp_path}/run"):
        with raises(ConfigError, "--to", value=target, match="has a run", remedy="name another, or remove it"):
            convert(f"gptjax:{tmp_path}/run", target, "--force")
    assert (tmp_path / "run/checkpoints").is_dir()


def test_the_source_itself_may_be_replaced(tmp_path):
    write_hf(tmp_path / "a")
    before = {name: data for name, (_, data) in tensors(f"hf:{tmp_path}/a").items()}
    convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/a/", "--force", "--dtype=float32")
    assert {name: data for name, (_, data) in tensors(f"hf:{tmp_path}/a").items()} == before
    assert "README.md" in left(tmp_path / "a")


def test_output_created_during_the_conversion_is_kept(tmp_path, monkeypatch):
    write_hf(tmp_path / "a")
    plain = formats.write

    def write_while_another_does(*rest, **options):
        plain(*rest, **options)
        (tmp_path / "b").write_text("theirs")

    monkeypatch.setattr(formats, "write", write_while_another_does)
    with raises(ConfigError, f"{tmp_path}/b", remedy="--force"):
        convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/b")
    assert (tmp_path / "b").read_text() == "theirs"
    assert left(tmp_path) == ["a", "b"]


def test_output_link_is_followed_only_to_an_empty_directory(tmp_path):
    write_hf(tmp_path / "a")
    (tmp_path / "disk").mkdir()
    (tmp_path / "b").symlink_to("disk")
    convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/b")
    assert (tmp_path / "b").is_symlink()
    found = left(tmp_path / "disk")
    assert "model.safetensors" in found
    convert(f"hf:{tmp_path}/a", f"llmc:{tmp_path}/c.bin")
    with raises(ConfigError, f"{tmp_path}/b/", remedy="--force"):
        convert(f"llmc:{tmp_path}/c.bin", f"hf:{tmp_path}/b/")
    (tmp_path / "d").symlink_to("nowhere")
    with raises(ConfigError, f"{tmp_path}/d/", remedy="--force"):  # with the slash, nothing would seem to be there
        convert(f"llmc:{tmp_path}/c.bin", f"hf:{tmp_path}/d/")
    convert(f"llmc:{tmp_path}/c.bin", f"hf:{tmp_path}/b/", "--force")
    assert not (tmp_path / "b").is_symlink()
    assert left(tmp_path / "disk") == found


def test_missing_target_is_refused():
    with raises(ConfigError, "--to", remedy="give FORMAT:PATH"):
        command.main(["--from=hf:a"])


def test_checkpoint_takes_no_other_dtype():
    with raises(ConfigError, "--dtype", value="bfloat16"):
        convert("hf:a", "gptjax:b", "--dtype=bfloat16")


def test_push_uploads_the_output_except_in_a_dry_run(tmp_path, monkeypatch, said):
    sent = []
    monkeypatch.setattr(hub, "upload", lambda *names: sent.append((*names, left(tmp_path))) or "https://there/1")
    write_hf(tmp_path / "a")
    convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/b", "--push=me/it", "--dry_run")
    assert sent == []
    convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/b", "--push=me/it")
    assert sent == [(f"{tmp_path}/b", "me/it", ["a", "b"])]
    assert said[-1] == "uploaded to https://there/1"


def test_progress_is_logged_every_few_seconds(monkeypatch, said):
    now = iter(range(100))
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(now))
    list(command.with_progress(((name, np.zeros(1)) for name in "abcdefghijkl"), 12))
    assert said == ["  50% of the parameters", "  100% of the parameters"]


def test_conversion_logs_progress_up_to_100_percent(tmp_path, monkeypatch, said):
    monkeypatch.setattr(command, "REPORT_SECONDS", 0.0)
    write_hf(tmp_path / "a")
    convert(f"hf:{tmp_path}/a", f"hf:{tmp_path}/b")
    percents = [int(line.split("%")[0]) for line in said if "% of the parameters" in line]
    assert percents[-1] == 100
    assert percents == sorted(percents)


def test_only_the_command_line_sets_jax_platforms_to_cpu(tmp_path, monkeypatch):
    write_hf(tmp_path / "a")
    flags = [f"--from=hf:{tmp_path}/a", "--dry_run"]
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    command.main(flags)
    assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setattr("sys.argv", ["gptjax-convert", *flags])
    monkeypatch.setattr("gptjax.cli.start_logging", lambda: None)
    with pytest.raises(SystemExit) as left_with:
        command.cli()
    assert left_with.value.code == 0
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_model_card_states_the_known_training_history(tmp_path, reference):
    convert(f"gptjax:{reference}@8", f"hf:{tmp_path}/a")
    card = (tmp_path / "a" / "README.md").read_text()
    logged = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    at_8 = {name: value for row in logged if row["step"] == 8 for name, value in row.items()}
    assert at_8["loss"] != at_8["val_loss"]
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in (
        "| steps | 8 |",
        f"| training loss | {at_8['loss']:.4f} |",
        f"| validation loss | {at_8['val_loss']:.4f} |",
        "| tokenizer | bytes |",
        '"n_embd": 32',
        '"peak_lr"',
    ):
        assert text in card
    assert re.search(r"^\| data \| \S+ \([0-9a-f]{8,}\) \|$", card, re.MULTILINE)
    write_hf(tmp_path / "b", config=CONFIG)
    convert(f"hf:{tmp_path}/b", f"hf:{tmp_path}/c")
    assert "| steps | not known |" in (tmp_path / "c" / "README.md").read_text()
