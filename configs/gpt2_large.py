"""GPT-2 large, 774,030,080 parameters, with the data, batch and schedule of gpt2_small.py.

    python -m gptjax.main --config=configs/gpt2_large.py

Data sources: see the docstring of gpt2_small.py.
Peak learning rate: that of GPT-3's model of this size (Brown et al. 2020, table 2.1).
Expected result and cost: not yet run.
"""

from typing import Any

from gptjax.config import base_config


def get_config() -> Any:
    config = base_config("gpt2_small")
    config.model.n_layer = 36
    config.model.n_head = 20
    config.model.n_embd = 1280
    config.optim.peak_lr = 2.5e-4
    config.optim.min_lr = 2.5e-5
    return config
