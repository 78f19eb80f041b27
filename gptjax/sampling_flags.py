"""Sampling parameters: their defaults, help and valid ranges, without importing JAX."""

import math
import numbers

from gptjax.config import LARGEST_SEED
from gptjax.errors import ConfigError

FLAGS = {  # name: (default, meaning)
    "num_samples": (1, "The number of continuations of each prompt."),
    "max_new_tokens": (200, "The most tokens that each continuation gets."),
    "temperature": (0.8, "The number that the logits are divided by; 0 takes the most likely token."),
    "top_k": (0, "Sample from the k most likely tokens only; 0 is off."),
    "top_p": (1.0, "Sample only from the most likely tokens that sum to this probability; 1 is off."),
    "min_p": (0.0, "Sample only from tokens with at least this probability relative to the most likely one; 0 is off."),
    "seed": (0, "The seed of the random choices."),
}


def validate_sampling_params(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
) -> None:
    """Checks that each value is a number in its range; NaN is not.

    Raises:
        ConfigError: a value is no number or out of range; the message has one line for each.
    """
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in {**given, "min_p": min_p, "seed": seed}.items():
        is_whole = isinstance(FLAGS[name][0], int)
        if not isinstance(value, numbers.Integral if is_whole else numbers.Real):
            expected = "a whole number" if is_whole else "a number"
            raise ConfigError(f"expected {expected}", field=name, value="None" if value is None else value)
    seeds = f"must be from 0 to {LARGEST_SEED}"
    temperatures = "must be 0 (the most likely token) or a positive number"
    checks = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "must be at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, temperatures),
        ("top_k", top_k, 0 <= top_k <= LARGEST_SEED, "must be 0 (off) or a number of tokens"),
        ("top_p", top_p, 0 < top_p <= 1, "must be above 0 and at most 1 (off)"),
        ("min_p", min_p, 0 <= min_p <= 1, "must be from 0 (off) to 1"),
        ("seed", seed, 0 <= seed <= LARGEST_SEED, seeds),
    )
    errors = []
    for name, value, is_valid, rule in checks:
        if not is_valid:
            errors.append(ConfigError(rule, field=name, value=value))
    if errors:
        raise ConfigError.of(errors)
