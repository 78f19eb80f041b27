"""gptjax from Python: the functions and the class that `import gptjax` offers.

>>> import os, pathlib
>>> os.mkdir("txt")
>>> for name in range(40):
...     _ = pathlib.Path(f"txt/{name}.txt").write_text(f"document {name}: the quick brown fox\\n" * 20)
>>> import gptjax
>>> small = {"model.n_layer": 1, "model.n_embd": 16, "model.n_head": 1, "model.block_size": 32}
>>> short = {"train.num_steps": 2, "train.sample_every": 0, "data.source": "text:txt", "log.tensorboard": False}
>>> of_bytes = {"data.tokenizer": "bytes", "model.vocab_size": 257}
>>> config = gptjax.load_config("quickstart", small | short | of_bytes)
>>> result = gptjax.train(config, "runs/x")
>>> result.step, result.exit_code
(2, 0)
>>> model = gptjax.load("runs/x")
>>> len(model.tokenizer.encode(model.generate("the ", max_new_tokens=8, temperature=0))) <= 8
True
>>> model.logits(model.tokenizer.encode("the")).shape
(3, 257)
>>> bool(abs(model.loss("the quick") + model.logprobs("the quick").mean()) < 1e-6)
True
"""

import argparse
import codecs
import contextlib
import dataclasses
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import distributed, errors
from gptjax import evaluate as evaluation
from gptjax import sample as sampling
from gptjax import train as training
from gptjax.arguments import check_config, check_count, check_ids, check_path, check_text, check_texts
from gptjax.checkpoint import Checkpointer
from gptjax.compute import resolve_compute
from gptjax.config import Config, GPTConfig, MeshConfig, load
from gptjax.convert import __main__ as conversion
from gptjax.convert.model_ref import find_model
from gptjax.data import prepare as preparation
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError, DataError, PlanError, UnavailableError, UserError
from gptjax.generate import generate
from gptjax.log_reader import newest_rows
from gptjax.model import GPT
from gptjax.model_flags import check_model_flags
from gptjax.result import TrainResult
from gptjax.sampling_flags import FLAGS
from gptjax.sharding import make_mesh

# Those of gptjax sample.
DEFAULTS = {name: default for name, (default, _) in FLAGS.items() if name != "num_samples"}
SMALLEST_WINDOW = 16  # tokens; a window is padded to a power of two, so that few lengths are compiled
EXIT_ERRORS = {kind.exit_code: kind for kind in (ConfigError, DataError, PlanError, UnavailableError)}


def load_config(config: str | os.PathLike[str], changes: Mapping[str, object] | None = None) -> Config:
    """Returns the config of a file, or of a name such as quickstart, with changed fields.

    >>> load_config("quickstart", {"train.num_steps": 200}).train.num_steps
    200

    changes: {"train.num_steps": 200, ...}.

    Raises:
        ConfigError: the file is missing or fails, or a field or value is wrong.
    """
    file = check_path("config", config, expected="the name of a config or the path of its file")
    if changes is not None and not (isinstance(changes, Mapping) and all(isinstance(name, str) for name in changes)):
        raise ConfigError('expected a dict, such as {"train.num_steps": 200}', field="changes", value=changes)
    return load(file, changes or {})


def train(config: Config, workdir: str | os.PathLike[str], *, verbose: bool = False) -> TrainResult:
    """Trains the run of `config` in the directory `workdir`, or resumes it.

    Ctrl-C, or an interrupt of the notebook's kernel, saves a checkpoint and returns.

    verbose: print the lines of progress that the command prints. They always go to the logger `gptjax`.

    Raises:
        UserError: with field, value and remedy, for every expected failure.
    """
    check_config(config)
    directory = check_path("workdir", workdir, expected="a directory")
    with _logging(verbose=verbose):
        distributed.start_jax()
        code = training.train(config, directory, owns_process=False)
    rows = list(newest_rows(directory))
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    return TrainResult(
        step=max(Checkpointer(directory).steps(), default=0),  # training saves its last step before it returns
        val_loss=losses[0] if losses else None,
        history=rows[::-1],
        exit_code=code,
        workdir=directory,
    )


@contextlib.contextmanager
def _logging(*, verbose: bool) -> Iterator[None]:
    """Hides what Orbax logs at each save; with `verbose` prints gptjax's own lines."""
    loggers = [logging.getLogger(name) for name in ("absl", "gptjax")]
    levels = [logger.level for logger in loggers]
    absl, own = loggers
    propagate = own.propagate
    absl.setLevel(logging.CRITICAL)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    if verbose:
        own.addHandler(handler)
        own.setLevel(logging.INFO)
        own.propagate = False  # in a notebook the root logger prints lines, too
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.propagate = propagate
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_model(
    model: str | os.PathLike[str],
    *,
    step: int | None = None,
    tokenizer: str = "",
    activation: str = "",
    raw: bool = False,
) -> "Model":
    """Returns the model of a work directory, or of weights in any format that gptjax converts.

    model: a work directory, or FORMAT:PATH: hf:openai-community/gpt2, hf:DIR, nanogpt:ckpt.pt, llmc:model.bin, ...
    step: of the checkpoint in a work directory; None means the newest.
    tokenizer: replaces the model's: gpt2, bytes, a file, a directory or hf:OWNER/NAME.
    activation: of a format that does not store it: gelu or gelu_new.
    raw: take the parameters themselves, where a run keeps an average of them.

    Raises:
        UserError: the model or its tokenizer is missing or damaged.
    """
    args = argparse.Namespace(step=step, tokenizer=tokenizer, activation=activation, raw=raw, **_name(model))
    check_model_flags(args)
    config, params, chosen, origin = sampling.load_model(args)
    options = {"tokenizer": tokenizer, "activation": activation}
    return Model(config, params, tokenizer=chosen, origin=origin, options=options)


def _name(model: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the flags --workdir and --model, one of them empty, for a work directory or FORMAT:PATH."""
    model = check_path("model", model, expected="a work directory, or FORMAT:PATH such as hf:openai-community/gpt2")
    reference = find_model("model", model)
    is_workdir = reference.format == "gptjax" and not model.startswith("gptjax:")
    return {"workdir": model if is_workdir else "", "model": "" if is_workdir else model}


def _flags(**values: object) -> list[str]:
    """Returns --name=value for each value that is not empty."""
    return [f"--{name}={value}" for name, value in values.items() if value]


class Model:
    """A GPT with its parameters and its tokenizer, on one device of this process. `load` makes it."""

    def __init__(
        self,
        config: Config,
        params: Any,
        *,
        tokenizer: Tokenizer,
        origin: str,
        options: Mapping[str, str],
    ) -> None:
        """params: the tree of gptjax.model.GPT. origin: FORMAT:PATH of its source, and `options` how it was read."""
        self._config = config
        self._params = params
        self._tokenizer = tokenizer
        self.origin = origin
        self.options = options
        # Attention over the KV cache has no fused kernel.
        compute = dataclasses.replace(config.compute, attention="xla")
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        self._model = GPT(config.model, resolve_compute(dataclasses.replace(config, compute=compute), mesh))
        self._forward = jax.jit(lambda params, tokens_BT: self._model.apply({"params": params}, tokens_BT))

    def __repr__(self) -> str:
        c = self.config
        return f"<{self.origin}: {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {c.block_size} positions>"

    @property
    def config(self) -> GPTConfig:
        """The sizes of the model."""
        return self._config.model

    @property
    def params(self) -> Any:
        """The parameters, float32, as a tree with GPT-2's names: params["h"]["mlp"]["c_fc"]["kernel"] is [L, D, F]."""
        return self._params

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode(text)` returns ids, `decode(ids)` text."""
        return self._tokenizer

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
        """Returns the text that continues each prompt, without the prompt: a str for a str, otherwise a list.

        options: max_new_tokens (200), temperature (0.8; 0 takes the most likely token), top_k (0: all), top_p (1),
            min_p (0), seed (0).

        Raises:
            ConfigError: a prompt is no text, or an option is out of range.
        """
        found = [self._tokenizer.decode(ids) for ids in self._generate(check_texts("prompt", prompt), **options)]
        return found[0] if isinstance(prompt, str) else found

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yields the text of `generate` in pieces, as soon as they are known.

        Raises:
            ConfigError: as `generate`.
        """
        pieces: queue.Queue[tuple[bytes, Any]] = queue.Queue()
        stopped = threading.Event()

        def put(row: int, token: int) -> None:
            if stopped.is_set():
                raise InterruptedError
            pieces.put((self._tokenizer.decode_bytes([token]), None))

        def work() -> None:
            problem: Any = StopIteration()
            try:
                self._generate([check_text("prompt", prompt)], on_token=put, **options)
            except BaseException as error:  # raised again where the text is read
                problem = error
            pieces.put((b"", problem))

        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        thread = threading.Thread(target=work, daemon=True, name="stream")
        thread.start()
        try:
            while True:
                data, end = pieces.get()
                text = decoder.decode(data, final=end is not None)
                if text:
                    yield text
                if isinstance(end, StopIteration):
                    return
                if end is not None:
                    raise end
        finally:
            stopped.set()
            thread.join()

    def _generate(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        options = DEFAULTS | options
        return generate(
            self._model,
            self._params,
            self._tokenizer.encode_batch(texts),
            eot_id=self._tokenizer.eot_id,
            start_id=self._tokenizer.start_id,
            vocab_size=self._tokenizer.vocab_size,  # the model may have more ids, which no text has
            **options,
        )

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the logits of the token after each id: float32 [T, V] for ids [T], [B, T, V] for [B, T].

        Raises:
            ConfigError: there are no ids or more than config.block_size in a row, or an id that the model lacks.
        """
        tokens = check_ids(ids, block_size=self.config.block_size, vocab_size=self.config.vocab_size)
        length = tokens.shape[-1]
        rows = tokens.reshape(-1, length)
        # Padding stands behind the ids, and attention sees no later position.
        window = min(max(SMALLEST_WINDOW, 1 << (length - 1).bit_length()), self.config.block_size)
        padded = np.zeros((len(rows), window), np.int32)
        padded[:, :length] = rows
        found = np.asarray(self._forward(self._params, padded))[:, :length]
        return found.reshape(*tokens.shape, -1)

    def logprobs(self, text: str) -> np.ndarray:
        """Returns the log-probability in nats of each token of `text`, after end-of-text: float32 [tokens].

        A text of more than config.block_size tokens is cut into windows of that length, and each sees only itself and
        the token before it.
        """
        ids = self._tokenizer.encode(check_text("text", text))
        return self._logprobs([self._tokenizer.start_id], ids)

    def _logprobs(self, before: list[int], ids: list[int]) -> np.ndarray:
        """Returns the log-probability of each of `ids`; `before` is their context, at least one id."""
        sequence = [*before, *ids]
        size = self.config.block_size
        found = [np.zeros(0, np.float32)]
        for start in range(0, len(sequence) - 1, size):
            inputs = sequence[start : start + size]
            targets = sequence[start + 1 : start + 1 + size]
            logits_TV = jnp.asarray(self.logits(inputs[: len(targets)]))
            log_TV = jax.nn.log_softmax(logits_TV, axis=-1)
            found.append(np.asarray(log_TV)[np.arange(len(targets)), targets])
        return np.concatenate(found)[len(before) - 1 :]

    def score(self, context: str, continuation: str) -> float:
        """Returns the log-probability in nats of `continuation` after `context`, summed over its tokens.

        Both are tokenized together, and spaces at the end of the context belong to the continuation, as in lm-eval. Of
        a long text the last config.block_size tokens are the input. An empty context is end-of-text.
        """
        kept = check_text("context", context).rstrip()
        spaces = context[len(kept) :]
        before = self._tokenizer.encode(kept) if kept else []
        whole = self._tokenizer.encode(kept + spaces + check_text("continuation", continuation))
        ids = whole[len(before) :]
        before = before or [self._tokenizer.start_id]
        size = self.config.block_size
        fits = max(size + 1 - len(ids), 1)
        return float(self._logprobs(before[-fits:], ids).sum())

    def loss(self, text: str) -> float:
        """Returns the mean loss of `text` in nats per token, the negative mean of `logprobs`.

        Raises:
            ConfigError: the text is empty.
        """
        logprobs = self.logprobs(text)
        if not logprobs.size:
            raise ConfigError("has no token, and so no mean", field="text", value=text)
        return -float(logprobs.mean())

    def save(self, target: str, *, force: bool = False, dtype: str = "") -> None:
        """Writes the model in another format, from its source; see `convert`."""
        convert(self.origin, target, force=force, dtype=dtype, **self.options)


def prepare(
    source: str, *, tokenizer: str | os.PathLike[str] = "gpt2", out: str | os.PathLike[str] = "", **options: Any
) -> str:
    """Turns the text of `source` into token shards, and returns their directory; nothing happens if they are there.

    source: stdlib, text:PATH, lines:PATH, jsonl:PATH, csv:PATH, parquet:PATH, tfds:NAME.
    out: by default data/<source>-<tokenizer>.
    options: text_feature, val_fraction, shard_tokens, encoding, skip_bad, as `gptjax prepare --help` describes them.

    Raises:
        UserError: the source, the tokenizer or the output is wrong.
    """
    check_text("source", source)
    tokenizer = check_path("tokenizer", tokenizer, expected="gpt2, bytes, or the path of a tokenizer")
    out = os.fspath(out) or preparation.default_path(source, tokenizer)
    preparation.prepare(source=source, tokenizer=tokenizer, out=out, **options)
    return out


def convert(
    source: str,
    target: str,
    *,
    force: bool = False,
    dtype: str = "",
    tokenizer: str = "",
    activation: str = "",
) -> None:
    """Converts the model FORMAT:PATH `source` to FORMAT:PATH `target`, reads the result back and compares it.

    tokenizer, activation: as in `load`. dtype: of the tensors in the result.

    Raises:
        UserError: the weights cannot be read, do not fit the format, or cannot be written.
    """
    flags = _flags(to=target, dtype=dtype, tokenizer=tokenizer, activation=activation)
    conversion.main([f"--from={source}", *flags, *(["--force"] if force else [])])


def evaluate(model: "str | os.PathLike[str] | Model", *, data: str = "", batches: int = 0) -> dict[str, float]:
    """Returns val_loss (nats per token), val_perplexity and val_bits_per_byte of a model on the validation split.

    model: a work directory, FORMAT:PATH, or a `Model`. data: a directory of shards; by default that of the run.
    batches: the global batches to read; 0 means all.

    Raises:
        UserError: the weights or the data are missing, damaged, or do not fit together.
    """
    options = {"model": model.origin, **model.options} if isinstance(model, Model) else _name(model)
    args = evaluation.parse_flags(_flags(data=data, batches=batches, **options))
    distributed.start_jax()
    run, params, _ = evaluation.load_run(args)
    return evaluation.evaluate_run(run, params, batches=batches)


def plan(config: Config, topology: str, *, slices: int = 1) -> dict[str, Any]:
    """Returns the plan of a run on chips that are not here: memory, communication, time; `gptjax plan` prints it.

    topology: v5e:4x4, h100:8, ... A process of its own makes the plan, because this one has its devices already.

    Raises:
        UserError: the config does not fit, or the compiler is missing.
    """
    with tempfile.TemporaryDirectory() as directory:
        file, report = (os.path.join(directory, name) for name in ("config.json", "report.json"))
        with open(file, "w") as stream:
            json.dump(check_config(config).to_dict(), stream)
        flags = [f"--config={file}", f"--topology={topology}", f"--slices={check_count('slices', slices)}"]
        command = [sys.executable, "-m", "gptjax.plan", *flags, f"--json={report}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not os.path.exists(report):  # it ended before it could write one
            raise UserError(f"the plan ended with code {done.returncode}: {errors.one_line(done.stderr[-200:])}")
        with open(report) as stream:
            found = json.loads(stream.read().replace(file, "this config"))
    if "error" in found:
        raise _plan_error(**found["error"])
    return found


def _plan_error(message: str, *, problem: str, exit_code: int, **parts: Any) -> UserError:
    """Returns the error of a plan's process, from its JSON; parts: field, value, remedy."""
    error = EXIT_ERRORS.get(exit_code, UserError)(message)
    error.problem = problem
    for name, part in parts.items():
        setattr(error, name, part)
    return error
