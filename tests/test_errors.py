"""Errors: how a message is put together from its parts, and what a combination of errors keeps."""

import pickle

import pytest

from gptjax.errors import ConfigError, DataError, UserError, first_line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("nothing works"), "nothing works"),
        (UserError("nothing works", remedy="sleep"), "nothing works; sleep"),
        (UserError("no such file", field="meta.json"), "meta.json: no such file"),
        (UserError("must be positive", field="model.n_head", value=0), "model.n_head=0: must be positive"),
        (UserError("is odd", field="mesh.data", value=3, remedy="set 2"), "mesh.data=3: is odd; set 2"),
        (UserError("no text", field="data.path", value=""), "data.path='': no text"),
        (UserError("no text", field="data.path", value="a b"), "data.path='a b': no text"),
        (UserError("no text", field="data.path", value="\x1b[2J"), r"data.path='\x1b[2J': no text"),
        (UserError("no", field="a", value="9" * 5000), f"a={'9' * 200}... (5000 characters): no"),
        (UserError("no", field="a", value=10**4000), f"a=1{'0' * 199}... (4001 characters): no"),
        (UserError("no", field="a", value=["b" * 300]), f"a=['{'b' * 198}... (304 characters): no"),
        (UserError("no", field="a", value=-(10**5000)), "a=a value of type int that cannot be printed: no"),
        (UserError("no", field="a", value=[10**5000]), "a=a value of type list that cannot be printed: no"),
        (UserError("no", field="a" * 300, value=1), f"{'a' * 200}... (300 characters)=1: no"),
        (UserError("no", field="data.path", value="/" + "x" * 999), f"data.path=/{'x' * 999}: no"),
        (UserError(field="data.path", value=True), "data.path=True"),
        (UserError("no such file", field="data\nerror: all is lost"), r"data\nerror: all is lost: no such file"),
    ],
)
def test_a_message_consists_of_its_parts(error, message):
    assert str(error) == message


@pytest.mark.parametrize(("message", "line"), [("a\nb", "a"), ("", ""), (RuntimeError(), ""), (ValueError("x\n"), "x")])
def test_first_line_of_any_message(message, line):
    assert first_line(message) == line


def test_a_combination_prints_a_line_per_error():
    first = ConfigError("must be positive", field="model.n_head", value=0, remedy="set 1")
    second = ConfigError("must be positive", field="model.n_layer", value=0)
    both = ConfigError.of([first, second])
    assert str(both) == f"{first}\n{second}"
    assert (both.field, both.value, both.remedy) == ("model.n_head", 0, "set 1")
    assert both.errors == (first, second)
    assert (type(both), first.errors) == (ConfigError, ())


def test_a_combination_has_the_first_remedy_of_any():
    both = ConfigError.of([ConfigError("the data changed", field="data.seed"), ConfigError(remedy="allow it")])
    assert str(both) == "data.seed: the data changed\nallow it"
    assert (both.field, both.remedy) == ("data.seed", "allow it")


def test_error_about_a_file_keeps_the_remedy():
    inner = ConfigError("is odd", field="n_head", value=3, remedy="set 2")
    outer = DataError.about("config.json", inner)
    assert str(outer) == "config.json: n_head=3: is odd; set 2"
    assert (type(outer), outer.field, outer.value, outer.remedy) == (DataError, "config.json", None, "set 2")
    assert str(DataError.about("config.json", inner, remedy="fetch it")) == "config.json: n_head=3: is odd; fetch it"
    both = DataError.about("config.json", ConfigError.of([inner, ConfigError("is missing", field="n_layer")]))
    assert str(both) == "config.json: n_head=3: is odd; set 2\nconfig.json: n_layer: is missing"


def test_an_error_keeps_its_parts_across_processes():
    error = pickle.loads(pickle.dumps(DataError("is damaged", field="a.bin", value=7, remedy="fetch it again")))
    assert (type(error), str(error)) == (DataError, "a.bin=7: is damaged; fetch it again")
    assert (error.field, error.value, error.remedy) == ("a.bin", 7, "fetch it again")
