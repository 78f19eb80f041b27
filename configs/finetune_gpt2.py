"""Finetunes OpenAI's GPT-2 small on a small set of text, such as a few books: 200 updates of 32 sequences.

    python -m gptjax.main --config=configs/finetune_gpt2.py

With --config.data.source=text:FOLDER it reads your text; without, the source text of Python's standard library.
It needs the extra `hub`, or the model on disk: --config.init_from=hf:DIR. For another size take its sizes from
configs/gpt2_medium.py, gpt2_large.py or gpt2_xl.py.
Expected result and cost: not yet run (no access to OpenAI's weights).
"""

from typing import Any

from gptjax.config import base_config


def get_config() -> Any:
    config = base_config("gpt2_small")
    config.init_from = "hf:openai-community/gpt2"
    config.data.global_batch_size = 32
    config.model.dropout = 0.1

    config.optim.schedule = "constant"  # after the warm-up, so that num_steps can be raised later
    config.optim.peak_lr = 3e-5
    config.optim.min_lr = 3e-5
    config.optim.warmup_steps = 10

    config.train.num_steps = 200
    config.train.eval_every = 50
    config.train.eval_batches = 8
    config.train.sample_every = 50
    config.checkpoint.save_every = 50
    return config
