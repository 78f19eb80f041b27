"""Whether a run may go on from a checkpoint."""

import dataclasses
import re

from gptjax.config import Config, GPTConfig, TrainConfig
from gptjax.errors import ConfigError
from gptjax.resume import compare_configs
from tests.helpers import raises

CONFIG = Config(model=GPTConfig(block_size=8, vocab_size=100, n_layer=2, n_head=2, n_embd=16, bias=False))


def test_compare_configs_notes_changes_and_refuses_other_models(said):
    old = CONFIG.to_dict()
    compare_configs(old, CONFIG)
    assert said == []
    compare_configs(old, dataclasses.replace(CONFIG, train=TrainConfig(num_steps=7, nan_policy="skip")))
    assert [re.sub(r"from .*", "", line) for line in said] == [
        "note: train.num_steps changed ",
        "note: train.nan_policy changed ",
    ]
    with raises(ConfigError, "model.activation", remedy="another --workdir"):
        compare_configs(old, dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, activation="gelu")))
    with raises(ConfigError, "model.n_layer", remedy="another --workdir") as caught:
        compare_configs(old, dataclasses.replace(CONFIG, model=GPTConfig(block_size=8, vocab_size=100)))
    changed = [error.field.removeprefix("model.") for error in caught.value.errors]
    assert changed == ["n_layer", "n_head", "n_embd", "bias"]
