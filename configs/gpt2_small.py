"""GPT-2 small, 124M parameters, on batches of 524,288 tokens, with nanoGPT's hyper-parameters.

    python -m gptjax.main --config=configs/gpt2_small.py

The default data is the source text of Python's standard library, so that the run starts anywhere. It is far too little
text to train such a model on. Use one of these sources for real training:

    FineWeb in llm.c's shards (docs/gpt2.md):
        gptjax fetch hf:kjj0/fineweb10B-gpt2 --out=data/fineweb10B
        --config.data.path=data/fineweb10B
    your own text, in a folder of files:
        --config.data.source=text:DIR
    any TFDS data set, which prepare downloads once:
        python -m gptjax.data.prepare --source=tfds:lm1b --tokenizer=gpt2 --out=data/lm1b
        --config.data.path=data/lm1b

For a first try on a laptop, add: --config.data.global_batch_size=4 --config.train.num_steps=2

Expected: validation loss about 2.85 on OpenWebText (nanoGPT's figure); gptjax has not yet run it to the end.
Cost: 600,000 steps are 315 billion tokens and 2.7e20 FLOP, about 1 day on one node of 8 H100 at 40 % MFU
(computed, not yet run).
"""

from typing import Any

from gptjax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.model.n_layer = 12
    config.model.n_head = 12
    config.model.n_embd = 768
    config.model.bias = True
    config.model.dropout = 0.0

    config.data.tokenizer = "gpt2"
    config.data.global_batch_size = 512

    config.optim.name = "adamw"
    config.optim.peak_lr = 6e-4
    config.optim.min_lr = 6e-5
    config.optim.beta2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.warmup_steps = 2000

    config.train.num_steps = 600_000
    return config
