"""gptjax: train GPT-2-style language models in JAX and Flax linen."""

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here, without an import
