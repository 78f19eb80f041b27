"""A model of gptjax for EleutherAI's lm-eval, which needs the extra `lm-eval` and no torch."""

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.errors import ConfigError
from gptjax.generate import generate
from gptjax.named_model import load_model
from gptjax.tasks.command import place_model
from gptjax.tasks.score import Pair

DEFAULT_NEW_TOKENS = 256  # lm-eval's, where a task does not say


@register_model("gptjax")
class GptjaxLM(TemplateLM):
    """Answers the requests of lm-eval: log-likelihoods, rolling log-likelihoods, and greedy or sampled text."""

    def __init__(
        self,
        workdir: str = "",
        model: str = "",
        *,
        step: int | str | None = None,
        tokenizer: str = "",
        activation: str = "",
        raw: bool | str = False,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        seed: int | str = 0,
        **others: Any,
    ) -> None:
        """Loads the model of a work directory, or of FORMAT:PATH, onto all devices.

        batch_size, max_batch_size, device: lm-eval passes them; gptjax chooses both by itself.
        raw: take the parameters themselves, where a run keeps an average of them.
        seed: of sampled text.

        Raises:
            UserError: the model or its tokenizer is missing or damaged.
        """
        super().__init__()
        if others:
            raise ConfigError(
                f"gptjax has no argument {', '.join(others)}",
                field="--model_args",
                remedy="give workdir, model, step, tokenizer, activation, raw or seed",
            )
        if bool(workdir) == bool(model):
            raise ConfigError("name one of workdir=DIR and model=FORMAT:PATH", field="--model_args")
        args = argparse.Namespace(
            workdir=workdir,
            model=model,
            step=_integer("step", step),
            tokenizer=tokenizer,
            activation=activation,
            raw=raw in (True, "True", "true", "1"),
            data="",
        )
        config, params, found, name = load_model(args, needs_data=False)
        self._name = name
        self._seed = _integer("seed", seed) or 0
        self._tokenizer = found or open_tokenizer(config.data.tokenizer)
        self._scorer, self._params = place_model(config, params, self._tokenizer)
        self._block_size = config.model.block_size

    @property
    def eot_token_id(self) -> int:
        """End-of-text, from which an empty context starts."""
        return self._tokenizer.start_id

    @property
    def max_length(self) -> int:
        """The tokens of the model's context."""
        return self._block_size

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return self._tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text, without end-of-text."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [Pair(list(context), list(continuation)) for _, context, continuation in requests]
        return [(one.logprob, one.is_greedy) for one in self._scorer.score(self._params, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, in windows of the model's context."""
        pairs = []
        owners = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                context, continuation = make_disjoint_window(window)
                pairs.append(Pair(context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.score(self._params, pairs), strict=True):
            totals[owner] += score.logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that continues each context, up to the first of its stop strings."""
        texts = []
        for index, request in enumerate(requests):
            context, settings = request.args
            texts.append(self._generate(context, dict(settings), index))
        return texts

    def _generate(self, context: str, settings: dict[str, Any], index: int) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        is_sampled = settings.get("do_sample", False)
        limit = int(settings.get("max_gen_toks", settings.get("max_new_tokens", DEFAULT_NEW_TOKENS)))
        ids: list[int] = []

        def append(_: int, token: int) -> None:
            ids.append(token)
            text = self._tokenizer.decode(ids)
            if any(stop in text for stop in stops):
                raise _StopError

        with contextlib.suppress(_StopError):
            generate(
                self._scorer.model,
                self._params,
                [self._tokenizer.encode(context)[-self.max_length :]],
                max_new_tokens=limit,
                eot_id=self._tokenizer.eot_id,
                start_id=self._tokenizer.start_id,
                vocab_size=self._tokenizer.vocab_size,
                temperature=float(settings.get("temperature", 1.0)) if is_sampled else 0.0,
                top_p=float(settings.get("top_p", 1.0)) if is_sampled else 1.0,
                top_k=int(settings.get("top_k", 0)) if is_sampled else 0,
                seed=self._seed + index,
                on_token=append,
            )
        text = self._tokenizer.decode(ids)
        ends = [text.index(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text

    def get_model_info(self) -> dict[str, Any]:
        """Returns what lm-eval stores with its results."""
        return {"model": self._name, "devices": jax.device_count()}


def _integer(name: str, value: int | str | None) -> int | None:
    """Returns an argument that lm-eval passes as text or as a number."""
    try:
        return None if value is None else int(value)
    except ValueError as error:
        raise ConfigError("must be a number", field=f"--model_args {name}", value=value) from error


class _StopError(Exception):
    """Ends a generation at a stop string."""
