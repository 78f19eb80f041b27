"""gptjax from Python: training, models and their numbers, and that the process stays the caller's."""

import io
import json
import logging
import math
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import api
from gptjax.errors import ConfigError, PlanError, UserError
from gptjax.signals import REQUESTS
from tests.convert.models import write_llmc
from tests.helpers import raises
from tests.runs import losses, rows

SIZES = {"vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
SHORT = {"train.num_steps": 4, "train.micro_batch_size": 1, "checkpoint.save_every": 2, "train.eval_every": 0}


def config(lab, **changes):
    """The tests' small run in four steps; mesh__fsdp=8 changes mesh.fsdp."""
    return gptjax.load_config(str(lab.config_file), SHORT | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def trained(lab, tmp_path_factory):
    """Returns (the work directory, the result) of a run of four steps."""
    workdir = tmp_path_factory.mktemp("api") / "run"
    return workdir, gptjax.train(config(lab), str(workdir))


@pytest.fixture(scope="module")
def model(trained):
    return gptjax.load(str(trained[0]))


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# Imports


@pytest.mark.parametrize("name", gptjax.MODULES)
@pytest.mark.parametrize(
    "first",
    ["import gptjax.{name}; import gptjax", "import gptjax; gptjax.load; import gptjax.{name}", "import gptjax"],
    ids=["the module first", "after another name", "by its name only"],
)
def test_function_and_module_of_one_name_work_in_every_order(name, first):
    code = f"""
{first.format(name=name)}
import inspect
for _ in range(2):
    assert callable(gptjax.{name})
    assert inspect.signature(gptjax.{name}) == inspect.signature(gptjax.api.{name})
    assert inspect.getdoc(gptjax.{name}) == inspect.getdoc(gptjax.api.{name})
    from gptjax import {name}
    assert {name} is gptjax.{name}
try:
    gptjax.{name}(no_such=1)
except TypeError as error:
    print(error)
"""
    assert run_python(code).startswith(f"{name}() got an unexpected keyword argument")


def test_import_is_light_and_lists_every_name():
    code = "import sys, gptjax; assert 'jax' not in sys.modules; print(*dir(gptjax)); gptjax.train"
    assert {*gptjax.NAMES, *gptjax.MODULES} <= set(run_python(code).split())
    with pytest.raises(AttributeError, match="no attribute 'nothere'"):
        gptjax.nothere  # noqa: B018
    from gptjax.train import train

    assert train is not gptjax.train


# Training


def test_training_returns_what_the_log_has(trained):
    workdir, result = trained
    assert (result.step, result.exit_code) == (4, 0)
    assert result.history == rows(workdir)
    assert [row["step"] for row in result.history if "loss" in row] == [1, 2, 3, 4]
    assert result.val_loss == rows(workdir)[-1]["val_loss"]
    page = result.report()
    assert "<dd>4 <small>of 4" in page.html
    assert page._repr_html_().startswith("<iframe srcdoc=")


def test_verbose_training_prints_each_line_once(trained, lab, monkeypatch, capsys):
    """Also in a notebook, where the root logger has a handler."""
    root = io.StringIO()
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(root)])
    monkeypatch.setattr(logging.getLogger("gptjax"), "propagate", True)
    gptjax.train(config(lab), str(trained[0]), verbose=True)
    assert capsys.readouterr().out.count("finished at step 4 of 4") == 1
    assert root.getvalue() == ""
    assert logging.getLogger("gptjax").propagate


def test_run_resumes_in_the_same_process_bit_equal(trained, lab, tmp_path):
    first = gptjax.train(config(lab, train__num_steps=2), str(tmp_path / "run"))
    assert first.step == 2
    assert gptjax.train(config(lab), str(tmp_path / "run")).step == 4
    assert losses(tmp_path / "run") == losses(trained[0])


def test_second_mesh_in_the_same_process_gives_the_same_losses(trained, lab, tmp_path):
    changes = {"mesh__data": 2, "mesh__fsdp": 4, "train__num_steps": 2}
    result = gptjax.train(config(lab, **changes), str(tmp_path / "run"))
    expected = [row["loss"] for row in trained[1].history if "loss" in row][:2]
    assert [row["loss"] for row in result.history if "loss" in row] == pytest.approx(expected, rel=1e-5)


def test_interrupt_saves_and_returns_and_leaves_no_handler(lab, tmp_path, monkeypatch, trained, capsys):
    handlers = [signal.getsignal(number) for number in REQUESTS]
    monkeypatch.setenv("GPTJAX_FAULT", "step:2:int")
    result = gptjax.train(config(lab), str(tmp_path / "run"))
    assert (result.step, result.exit_code) == (2, 75)
    assert [signal.getsignal(number) for number in REQUESTS] == handlers
    assert gptjax.train(config(lab), str(tmp_path / "run")).exit_code == 0
    assert losses(tmp_path / "run") == losses(trained[0])
    assert capsys.readouterr().out == ""


def test_step_is_that_of_the_checkpoint_not_of_the_log(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_FAULT", "step:3:int")
    result = gptjax.train(config(lab, train__log_every=100, train__steps_per_dispatch=1), str(tmp_path / "run"))
    assert (result.step, result.exit_code, result.history) == (3, 75, [])


def test_interrupt_before_training_is_a_keyboard_interrupt(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_FAULT", "restore:1:int")
    with pytest.raises(KeyboardInterrupt):
        gptjax.train(config(lab), str(tmp_path / "run"))
    assert gptjax.train(config(lab, train__num_steps=2), str(tmp_path / "run")).step == 2


# A model


def test_streamed_pieces_are_the_generated_text(model):
    options = {"max_new_tokens": 40, "temperature": 0.9, "seed": 5}
    text = model.generate("def ", **options)
    assert text == model.generate(["def ", "x"], **options)[0]
    assert "".join(model.stream("def ", **options)) == text
    assert len(text) > 10
    stream = model.stream("def ", **options)
    next(stream)
    stream.close()  # the generation ends
    with raises(ConfigError, "temperature", value=-1):
        list(model.stream("def ", temperature=-1))


def test_logits_are_those_of_the_model_whatever_the_length(model):
    ids = np.random.default_rng(0).integers(257, size=(2, 32))
    expected = np.asarray(model._model.apply({"params": model.params}, jnp.asarray(ids)))
    np.testing.assert_allclose(model.logits(ids), expected, atol=1e-5)
    for length in (1, 5, 17, 32):
        np.testing.assert_allclose(model.logits(ids[0, :length].tolist()), expected[0, :length], atol=1e-5)
    assert model.logits([1]).dtype == np.float32
    for wrong in ([], range(33)):
        with raises(ConfigError, "ids", value=len(wrong)):
            model.logits(wrong)
    for wrong in (257, -1, 2**40):
        with raises(ConfigError, "ids", value=wrong, match="expected ids from 0 to 256"):
            model.logits([[1, 2], [3, wrong]])
    with raises(ConfigError, "ids", value=(0, 3), match="at least one row"):
        model.logits(np.zeros((0, 3), int))


@pytest.mark.parametrize("wrong", [5, "def", [1.5], [[1, 2], [3]], [True], [2**70]])
def test_ids_are_whole_numbers_in_rows_of_one_length(model, wrong):
    with raises(ConfigError, "ids", value=wrong, match="expected whole numbers"):
        model.logits(wrong)


def test_scores_are_sums_of_log_probabilities(model):
    text = "def main(argv):\n    return 0\n" * 3  # 87 tokens: three windows
    logprobs = model.logprobs(text)
    assert logprobs.shape == (len(text),)
    sequence = [256, *text.encode()]
    for number in (0, 31, 32, 86):
        start = number // 32 * 32
        logits = model.logits(sequence[start : number + 1])[-1]
        expected = logits[sequence[number + 1]] - np.log(np.exp(logits.astype(np.float64)).sum())
        assert logprobs[number] == pytest.approx(expected, abs=1e-5)
    assert model.loss(text) == pytest.approx(-logprobs.mean())
    assert model.score("", text[:20]) == pytest.approx(logprobs[:20].sum(), abs=1e-4)
    with_context = model.score(text[:12], text[12:20])
    inputs = list(text[:20].encode())
    expected = jax.nn.log_softmax(model.logits(inputs[:-1]))[np.arange(11, 19), inputs[12:]]
    assert with_context == pytest.approx(float(expected.sum()), abs=1e-4)
    # A space at the end of the context is scored, as in lm-eval, and so is the same text in another cut.
    assert model.score("def main(argv): ", "x") == pytest.approx(model.score("def main(argv):", " x"), abs=1e-6)
    # Of a long context the end is the input.
    assert model.score(text, "x") == pytest.approx(model.score(text[-32:], "x"), abs=1e-5)
    assert model.score(text, "x") != pytest.approx(model.score(text[-31:], "x"), abs=1e-7)


@pytest.mark.parametrize("wrong", [None, 5, b"def"])
def test_text_is_text(model, wrong):
    value = "None" if wrong is None else wrong
    for call in (model.generate, lambda text: list(model.stream(text)), lambda text: model.generate([text])):
        with raises(ConfigError, "prompt", value=value, match="expected a text"):
            call(wrong)
    for call in (model.logprobs, model.loss):
        with raises(ConfigError, "text", value=value, match="expected a text"):
            call(wrong)
    for field, texts in (("continuation", ("def", wrong)), ("context", (wrong, "def"))):
        with raises(ConfigError, field, value=value, match="expected a text"):
            model.score(*texts)


def test_empty_text_has_no_mean_loss(model):
    assert model.logprobs("").shape == (0,)
    with raises(ConfigError, "text", value="", match="has no token"):
        model.loss("")


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", "hot"), ("temperature", None), ("max_new_tokens", 2.5), ("top_k", "all")]
)
def test_option_of_a_wrong_type_is_refused(model, option, value):
    with raises(ConfigError, option, value=value or "None", match="expected a"):
        model.generate("def ", **{option: value})


def test_saved_model_loads_with_equal_logits(model, tmp_path):
    model.save(f"hf:{tmp_path}/hf")
    again = gptjax.load(f"hf:{tmp_path}/hf")
    assert again.config == gptjax.load(model.origin).config
    assert repr(again) == f"<hf:{tmp_path}/hf: 2 layers, 2 heads, width 32, 32 positions>"
    np.testing.assert_array_equal(again.logits([1, 2, 3]), model.logits([1, 2, 3]))
    options = {"max_new_tokens": 9, "temperature": 0}
    assert again.generate("def ", **options) == model.generate("def ", **options)


def test_options_of_a_loaded_model_reach_its_copies(tmp_path, lab):
    """A file that stores no activation means another function without the option."""
    names = [f"h.{layer}.mlp.{name}.weight" for layer in range(2) for name in ("c_fc", "c_proj")]
    wide = dict.fromkeys(names, lambda tensor: 20 * tensor)
    write_llmc(tmp_path / "m.bin", config=SIZES, padded=384, changes=wide)
    options = {"tokenizer": "bytes", "activation": "gelu"}
    exact, plain = (gptjax.load(f"llmc:{tmp_path}/m.bin", **{**options, "activation": a}) for a in ("gelu", ""))
    assert (exact.config.activation, plain.config.activation) == ("gelu", "gelu_new")
    exact.save(f"hf:{tmp_path}/hf")
    again = gptjax.load(f"hf:{tmp_path}/hf")
    assert again.config.activation == "gelu"
    np.testing.assert_array_equal(again.logits([1, 2, 3]), exact.logits([1, 2, 3]))
    found = [gptjax.evaluate(each, data=str(lab.data), batches=1)["val_loss"] for each in (exact, again, plain)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("model", "flag"),
    [("runs/x", "workdir"), ("gs://bucket/run", "workdir"), ("gptjax:runs/x@4", "model"),
     ("hf:openai-community/gpt2", "model")],
)  # fmt: skip
def test_model_is_a_work_directory_or_has_a_format(model, flag):
    assert api._name(model) == {"workdir": "", "model": ""} | {flag: model}


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("call", [gptjax.load, gptjax.evaluate])
def test_model_without_a_format_is_refused_with_what_to_write(call, name):
    with raises(ConfigError, "model", value=name, remedy="write model=hf:openai-community/gpt2"):
        call(name)


def test_evaluation_equals_the_last_validation(trained, model, lab):
    workdir, result = trained
    found = gptjax.evaluate(str(workdir), batches=2)
    assert found["val_loss"] == pytest.approx(result.val_loss, rel=1e-6)
    everything = gptjax.evaluate(model)
    assert everything["val_loss"] == pytest.approx(gptjax.evaluate(model, data=str(lab.data))["val_loss"], rel=1e-6)
    assert everything["val_perplexity"] == pytest.approx(math.exp(everything["val_loss"]))


# The rest


def test_data_are_prepared_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "txt").mkdir()
    for number in range(40):
        (tmp_path / "txt" / f"{number}.txt").write_text(f"document {number}\n" * 30)
    directory = gptjax.prepare("text:txt", tokenizer="bytes", val_fraction=0.3)
    meta = json.loads((tmp_path / directory / "meta.json").read_text())
    assert meta["splits"].keys() == {"train", "validation"}
    assert gptjax.prepare("text:txt", tokenizer="bytes", val_fraction=0.3) == directory


@pytest.mark.parametrize(
    ("option", "value"),
    [("val_fraction", "x"), ("shard_tokens", 1.5), ("shard_tokens", "many"), ("tokenizer", 5), ("source", 5)],
)
def test_option_of_prepare_of_a_wrong_type_is_refused(tmp_path, option, value):
    options = {"source": "stdlib", "tokenizer": "bytes", "out": tmp_path / "data", option: value}
    with raises(ConfigError, option, value=value):
        gptjax.prepare(**options)
    assert not list(tmp_path.iterdir())


def test_plan_is_a_dict_and_a_wrong_one_an_error(lab):
    found = gptjax.plan(gptjax.load_config("gpt2_small"), "a100:8")
    assert sum(found["memory_bytes"].values()) > 1e9
    with raises(ConfigError, "--topology", value="a100:x", remedy="--slices", match="expected a100:N"):
        gptjax.plan(gptjax.load_config("gpt2_small"), "a100:x")
    with raises(ConfigError, "slices", value="two", match="expected a whole number"):
        gptjax.plan(gptjax.load_config("gpt2_small"), "a100:8", slices="two")
    with raises(PlanError, "this config on t4:1", match="GiB per device"):
        gptjax.plan(gptjax.load_config("gpt2_xl", {"mesh.data": 1}), "t4:1")


def test_paths_may_be_pathlib(trained, lab, tmp_path):
    workdir, result = trained
    assert gptjax.train(config(lab), workdir).step == result.step
    assert gptjax.load(workdir).origin == gptjax.load(str(workdir)).origin
    assert gptjax.evaluate(workdir, batches=1).keys() == {"val_loss", "val_perplexity", "val_bits_per_byte"}
    assert gptjax.load_config(lab.config_file) == gptjax.load_config(str(lab.config_file))


@pytest.mark.parametrize("wrong", [None, "", 5])
def test_path_that_is_none_is_refused(lab, wrong):
    value = "None" if wrong is None else wrong
    with raises(ConfigError, "config", value=value, match="expected the name of a config"):
        gptjax.load_config(wrong)
    with raises(ConfigError, "workdir", value=value, match="expected a directory"):
        gptjax.train(config(lab), wrong)
    for call in (gptjax.load, gptjax.evaluate):
        with raises(ConfigError, "model", value=value, match="expected a work directory, or FORMAT:PATH"):
            call(wrong)


def test_name_in_place_of_a_config_names_the_right_call(tmp_path):
    for call in (gptjax.train, lambda config, _: gptjax.plan(config, "h100:8")):
        with raises(ConfigError, "config", value="quickstart", remedy='gptjax.load_config("quickstart") makes one'):
            call("quickstart", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changes_of_a_config_are_a_dict_of_fields():
    with raises(ConfigError, "changes", value=["train.num_steps=3"], match="expected a dict"):
        gptjax.load_config("quickstart", ["train.num_steps=3"])
    with raises(ConfigError, "changes", value={5: 3}, match="expected a dict"):
        gptjax.load_config("quickstart", {5: 3})
    with raises(ConfigError, "train", match="is a section with fields", remedy="as train.num_steps"):
        gptjax.load_config("quickstart", {"train": {"num_steps": 3}})
    numbers = {"train.num_steps": np.int64(2**60 + 1), "optim.peak_lr": np.float32(0.5)}
    found = gptjax.load_config("quickstart", numbers)
    assert (found.train.num_steps, found.optim.peak_lr) == (2**60 + 1, 0.5)
    assert type(found.train.num_steps) is int
    with raises(ConfigError, "train.num_steps", value=np.float64(2.5)):
        gptjax.load_config("quickstart", {"train.num_steps": np.float64(2.5)})


def test_errors_have_field_value_and_remedy():
    with pytest.raises(UserError) as caught:
        gptjax.load("runs/nothere")
    assert (caught.value.field, caught.value.value) == ("--workdir", "runs/nothere")
    with raises(ConfigError, "train.num_step", remedy="nearest: train.num_steps"):
        gptjax.load_config("quickstart", {"train.num_step": 3})
    assert api.load_config is gptjax.load_config
