"""Every kind of mistake in a config ends as a ConfigError that names the field, its value and the remedy."""

import contextlib
import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import BOUNDS, CHOICES, PERIODS, Config, GPTConfig, default_config, find_problems, flatten, from_dict
from gptjax.config_values import EXPECTED, convert, nearest_divisors
from gptjax.errors import BAD_CONFIG, ConfigError

FIELDS = sorted(flatten(Config()))


def nested(path, value):
    section, _, name = path.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def errors_of(values):
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert caught.value.exit_code == BAD_CONFIG
    return caught.value.errors


def error_of(path, value):
    """Returns the error about a wrong value of one field, which names both."""
    (error,) = errors_of(nested(path, value))
    assert (error.field, error.value) == (path, "None" if value is None else value)
    return error


def test_defaults_are_valid_and_gpt2_small():
    assert from_dict({}) == Config()
    assert Config().model == GPTConfig(1024, 50257, 12, 12, 768, 0.0, True, True)
    assert find_problems(Config()) == []


def test_config_survives_a_dict_round_trip():
    values = {"model": {"n_layer": 3, "bias": False}, "mesh": {"data": 2, "fsdp": -1}, "init_from": "runs/x"}
    config = from_dict(values)
    assert config != Config()
    assert from_dict(config.to_dict()) == config
    assert [flatten(config)[path] for path in ("model.n_layer", "mesh.fsdp", "init_from")] == [3, -1, "runs/x"]


def test_default_config_is_a_locked_config_dict_of_every_field():
    config = default_config()
    assert config.to_dict() == Config().to_dict()
    config.model.n_layer = 2
    assert from_dict(config.to_dict()).model.n_layer == 2
    with pytest.raises((AttributeError, KeyError)):
        config.model.n_layers = 2


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("model.n_layers", "model.n_layer"), ("optim.learning_rate", None), ("optim.peaklr", "optim.peak_lr"),
        ("modle.n_layer", None), ("n_head", "model.n_head"), ("peak_lr", "optim.peak_lr"),
    ],
)  # fmt: skip
def test_unknown_field_names_the_nearest(path, nearest):
    (error,) = errors_of(nested(path, 1))
    assert error.field == ("modle" if path.startswith("modle") else path)
    if nearest:
        assert nearest in error.remedy.removeprefix("nearest: ").split(", ")


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("model.n_layer", ("twelve", 1.5, True, None, (1,), math.inf, "0" * 5000, "9" * 4300)),
        ("model.bias", ("yes", 1)),
        ("optim.peak_lr", ("fast", math.nan, "nan", -math.inf, False, 10**400)),
        ("data.source", (3, None)),
        ("init_from", (0,)),
    ],
)
def test_wrong_type_error_names_the_expected_type(path, values):
    for value in values:
        assert error_of(path, value).problem.endswith(f" {EXPECTED[type(flatten(Config())[path])]}")


@pytest.mark.parametrize("value", [2**60 + 1, str(2**60 + 1)])
def test_large_integers_keep_every_digit(value):
    assert from_dict({"train": {"num_steps": value}}).train.num_steps == 2**60 + 1


@pytest.mark.parametrize("value", [3, "small", None, [1]])
def test_section_that_is_not_a_dict_is_refused(value):
    error_of("model", value)


@pytest.mark.parametrize("path", CHOICES)
def test_unknown_choice_lists_the_choices(path):
    assert error_of(path, "bogus").problem.endswith(f" {', '.join(CHOICES[path])}")


@pytest.mark.parametrize("path", BOUNDS)
def test_every_bound_is_checked(path):
    kind, bounds = type(flatten(Config())[path]), BOUNDS[path]
    assert error_of(path, kind(bounds.at_least - 1)).problem.endswith(f" {bounds.at_least}")
    assert path not in [error.field for error in find_problems(_with(path, kind(bounds.at_least)))]
    if bounds.below < math.inf:
        assert error_of(path, kind(bounds.below)).problem.endswith(f" {bounds.below}")
    if bounds.at_most < math.inf:
        assert error_of(path, kind(bounds.at_most + 1)).problem.endswith(f" {bounds.at_most}")
        assert flatten(from_dict(nested(path, kind(bounds.at_most))))[path] == bounds.at_most


def test_every_number_has_a_bound():
    numbers = {path for path, value in flatten(Config()).items() if type(value) in (int, float)}
    assert numbers - set(BOUNDS) == {"mesh.data", "mesh.fsdp", "mesh.tensor"}


@pytest.mark.parametrize(
    ("path", "bad", "good"),
    [
        ("model.dropout", 1.0, 0.99), ("optim.beta2", 1, 0.0), ("data.seed", 2**31, 2**31 - 1), ("train.seed", -1, 0),
        ("optim.decay_fraction", 1.1, 1.0), ("train.log_every", 0, 1), ("train.eval_every", -1, 0),
        ("compute.scan_unroll", -2, -1), ("train.profile_step", -2, -1), ("train.barrier_timeout_seconds", 0.9, 1),
        ("train.num_steps", -1, 0), ("checkpoint.keep", 0, 1), ("optim.grad_clip", -0.1, 0),
    ],
)  # fmt: skip
def test_bounds_have_the_documented_values(path, bad, good):
    error_of(path, bad)
    assert flatten(from_dict(nested(path, good)))[path] == good


@pytest.mark.parametrize(
    ("path", "value", "named", "remedy"),
    [
        ("model.n_head", 13, "model.n_embd=768", "nearest valid: 12, 16"),
        ("optim.min_lr", 1.0, "optim.peak_lr=0.0006", ""),
        ("mesh.fsdp", 0, "-1", ""),
        ("mesh.tensor", -2, "-1", ""),
    ],
)
def test_impossible_values_are_refused(path, value, named, remedy):
    error = error_of(path, value)
    assert named in error.problem
    assert error.remedy == remedy


@pytest.mark.parametrize("path", PERIODS)
def test_periods_are_multiples_of_steps_per_dispatch(path):
    values = {name: {} for name in ("train", "checkpoint")}
    for period in PERIODS:
        section, name = period.split(".")
        values[section][name] = 40
    values["train"]["steps_per_dispatch"] = 20
    from_dict(values)
    section, name = path.split(".")
    for wrong, nearest in ((50, 40), (7, 20)):
        values[section][name] = wrong
        (error,) = errors_of(values)
        assert (error.field, error.value, error.remedy) == (path, wrong, f"nearest valid: {nearest}")
        assert "train.steps_per_dispatch=20" in error.problem


def test_nan_policy_accepts_stop_skip_and_rollback():
    for policy in ("stop", "skip", "rollback"):
        assert from_dict({"train": {"nan_policy": policy, "max_rollbacks": 0}}).train.nan_policy == policy


def test_several_problems_are_listed_at_once():
    unparsable = {"model": {"n_layers": 2, "bias": "maybe"}, "optim": {"peak_lr": math.nan}, "tarin": {}, "mesh": 2}
    fields = ["tarin", "model.n_layers", "model.bias", "optim.peak_lr", "mesh"]
    assert [error.field for error in errors_of(unparsable)] == fields
    impossible = {"train": {"num_steps": -5, "nan_policy": "pray"}, "model": {"dropout": 1.0}}
    fields = ["model.dropout", "train.nan_policy", "train.num_steps"]
    assert sorted(error.field for error in errors_of(impossible)) == fields
    assert [error.field for error in errors_of({"mesh": {"data": -1, "fsdp": -1}})] == ["mesh"], "two are the rest"
    conflicts = {"model": {"n_head": 13}, "optim": {"min_lr": 1.0}, "mesh": {"fsdp": 0, "tensor": -1}}
    assert len(errors_of(conflicts)) == 4


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("12", int, 12), ("-1", int, -1), ("+7", int, 7), ("1e3", int, 1000), ("2147483647", int, 2**31 - 1),
        (4.0, int, 4), ("3e-4", float, 3e-4), ("1", float, 1.0), (1, float, 1.0), ("true", bool, True),
        ("False", bool, False), ("1", bool, True), ("0", bool, False), ("None", str, "None"),
    ],
)  # fmt: skip
def test_text_is_read_as_on_a_command_line(text, kind, value):
    read = convert("field", text, kind)
    assert read == value
    assert type(read) is kind


@pytest.mark.parametrize("number", [1, 2, 25, 97, 768, 1600, 50304])
def test_nearest_divisors_are_the_nearest(number):
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    for wanted in (1, 3, 13, 48, 1000, 10**6):
        for count in (1, 2, 3):
            near = nearest_divisors(number, wanted, count)
            assert near == sorted(near)
            assert set(near) <= set(divisors)
            assert len(near) == min(count, len(divisors))
            worst = max(abs(d - wanted) for d in near)
            assert all(abs(d - wanted) >= worst for d in divisors if d not in near)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.from_regex(r"[+-]?[0-9]{1,30}(e[+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "true", "²", "１", "0x10", "1_000", "--5"]),  # noqa: RUF001
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
)
ANY_VALUES = st.recursive(SCALARS, lambda inner: st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=4)


@given(
    st.dictionaries(st.sampled_from(FIELDS), SCALARS, max_size=4), st.dictionaries(st.text(), ANY_VALUES, max_size=2)
)
@settings(max_examples=400)
def test_any_values_give_a_valid_config_or_a_config_error(fields, others):
    values = dict(others)
    for path, value in fields.items():
        section, _, name = path.rpartition(".")
        home = values.setdefault(section, {}) if section else values
        if isinstance(home, dict):
            home[name] = value
    try:
        config = from_dict(values)
    except ConfigError:
        return
    assert find_problems(config) == []
    for path, value in flatten(config).items():
        assert type(value) is type(flatten(Config())[path]), path
        assert not isinstance(value, float) or math.isfinite(value), path


@given(st.sampled_from(FIELDS), SCALARS)
@settings(max_examples=400)
def test_any_value_of_any_field_is_converted_or_refused(path, value):
    kind = type(flatten(Config())[path])
    with contextlib.suppress(ConfigError):
        assert type(convert(path, value, kind)) is kind


def _with(path, value):
    section, name = path.split(".")
    config = Config()
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
