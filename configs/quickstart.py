"""A byte-level GPT on the source text of Python's own standard library: two CPU cores, no network, three minutes.

python -m gptjax.main --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

from gptjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.block_size = 256
    config.model.vocab_size = 257
    config.model.n_layer = 4
    config.model.n_head = 4
    config.model.n_embd = 128

    config.data.tokenizer = "bytes"
    config.data.global_batch_size = 8

    config.optim.name = "muon"
    config.optim.peak_lr = 3e-3
    config.optim.min_lr = 0.0
    config.optim.warmup_steps = 100
    config.optim.schedule = "wsd"
    config.optim.decay_fraction = 0.5

    config.train.num_steps = 1000
    config.train.log_every = 100
    config.train.eval_every = 500
    config.train.eval_batches = 0
    config.train.sample_every = 1000
    config.train.sample_prompt = "def "
    config.checkpoint.save_every = 250
    return config
