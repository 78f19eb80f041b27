"""What the loop does every so many steps."""

import types

import jax
import jax.numpy as jnp

from gptjax.compute import ResolvedCompute
from gptjax.data.tokenizer import load_tokenizer
from gptjax.model import GPT
from gptjax.periodic import write_samples
from tests.helpers import fake_reporter, tiny


def test_a_sample_has_no_ids_beyond_the_tokenizer(monkeypatch):
    """As of an imported model with added tokens: its most likely id is one that the tokenizer cannot decode."""
    tokenizer, model = load_tokenizer("bytes"), GPT(tiny(vocab_size=300, block_size=16), ResolvedCompute())
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    params["ln_f"]["bias"] = jnp.ones(16)
    params["wte"]["embedding"] = params["wte"]["embedding"].at[280].set(10.0).at[65].set(5.0)
    written = []
    reporter = fake_reporter(report_sample=lambda step, text: written.append(text))
    config = types.SimpleNamespace(train=types.SimpleNamespace(sample_prompt="x"))
    run = types.SimpleNamespace(model=model, tokenizer=tokenizer, config=config)
    write_samples(run, params, reporter, step=5, should_stop=lambda: False)
    assert written == ["x" + 256 * "A"]
