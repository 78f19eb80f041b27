"""Continues text with a trained model: `gptjax sample --workdir=DIR --prompt="Once upon a time"`.

With `--model=hf:DIR` or `--model=hf:OWNER/NAME` it samples from weights in any format that gptjax.convert reads.
On a terminal, control characters in the text are printed as escapes like \\x1b, except newlines and tabs. A file or a
pipe receives the text unchanged.
"""

import argparse
import codecs
import dataclasses
import functools
import io
import logging
import os
import stat
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gptjax import distributed, workdir
from gptjax.cli import Parser, run_cli
from gptjax.config import Config, MeshConfig
from gptjax.errors import ConfigError
from gptjax.model_flags import add_model_flags, check_model_flags
from gptjax.redaction import shown
from gptjax.sampling_flags import FLAGS, validate_sampling_params

log = logging.getLogger("gptjax")
SEPARATOR = "-" * 15
LARGEST_PROMPT = 2**24  # bytes


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line, with every check that needs no model.

    Raises:
        ConfigError: a flag is unknown, or its value out of range.
    """
    parser = Parser(__doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="A text to continue. The flag may be repeated. By default the model starts a document.",
    )
    parser.add_argument(
        "--prompt_file",
        action="append",
        default=[],
        metavar="FILE",
        help="A file that holds one prompt. The flag may be repeated. By default no file is read.",
    )
    for name, (default, meaning) in FLAGS.items():
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            help=meaning,
        )
    args = parser.parse_strictly(arguments)
    check_model_flags(args)
    if args.num_samples < 1:
        raise ConfigError("must be at least 1", field="num_samples", value=args.num_samples)
    validate_sampling_params(**sampling_params_of(args))
    return args


def sampling_params_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that are arguments of generate(), by name."""
    return {name: getattr(args, name) for name in FLAGS if name != "num_samples"}


def read_prompts(prompts: Sequence[str], files: Sequence[str]) -> list[str]:
    """Returns the prompts and the contents of the files; [""] if both are empty.

    Raises:
        ConfigError: a file cannot be read.
    """
    texts = list(prompts)
    for name in files:
        try:
            texts.append(_read_prompt(name).decode())
        except OSError as error:
            raise ConfigError(str(error.strerror), field="--prompt_file", value=name) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"not UTF-8 text (byte {error.start})", field="--prompt_file", value=name) from error
    return texts or [""]


def _read_prompt(name: str) -> bytes:
    """Returns the contents of a file or pipe.

    Raises:
        ConfigError: it is larger than LARGEST_PROMPT.
        OSError: it cannot be read.
    """
    if stat.S_ISFIFO(os.stat(name).st_mode):
        log.info("--prompt_file=%s: a pipe: waiting for its text", name)
    with open(name, "rb") as file:
        content = file.read(LARGEST_PROMPT + 1)  # bounded: /dev/zero does not end
    if len(content) > LARGEST_PROMPT:
        raise ConfigError(f"more than {LARGEST_PROMPT:,} bytes", field="--prompt_file", value=name)
    return content


def name_prompts(args: argparse.Namespace) -> list[str]:
    """Returns a name for each sampled text, for messages: the flag that it comes from, num_samples times."""
    names = [f"--prompt={text[:20]}" for text in args.prompt]
    names += [f"--prompt_file={name}" for name in args.prompt_file]
    names = names or ["--prompt="]
    return [name for name in names for _ in range(args.num_samples)]


def for_stdout(text: str) -> str:
    """Returns `text` for stdout: with escapes for control characters on a terminal, otherwise unchanged."""
    return shown(text) if sys.stdout.isatty() else text


def make_writer(decode_bytes: Callable[[list[int]], bytes]) -> Callable[[int | None], None]:
    """Returns write(id), which prints all characters that are complete: tokens may end inside of a character.

    write(None) prints the remaining bytes and ends the line. The text is escaped as in `for_stdout`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(token: int | None) -> None:
        is_last = token is None
        data = b"" if is_last else decode_bytes([token])
        text = decoder.decode(data, final=is_last)
        print(for_stdout(text), end="\n" if is_last else "", flush=True)

    return write


def main(arguments: list[str]) -> None:
    """Samples continuations of the prompts, and prints them.

    Raises:
        UserError: the model, a prompt or a sampling parameter is wrong, or the output cannot be written.
    """
    args = parse_flags(arguments)
    prompts = read_prompts(args.prompt, args.prompt_file)
    texts = [text for text in prompts for _ in range(args.num_samples)]
    distributed.start_jax()
    import jax

    from gptjax import generate, sharding
    from gptjax.compute import resolve_compute
    from gptjax.model import GPT

    config, params, tokenizer, _ = load_model(args)
    # Attention over the KV cache has no fused kernel.
    compute = dataclasses.replace(config.compute, attention="xla")
    config = dataclasses.replace(config, compute=compute)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    model = GPT(config.model, resolve_compute(config, mesh))
    sample = functools.partial(
        generate.generate,
        model,
        params,
        tokenizer.encode_batch(texts, names=name_prompts(args)),
        eot_id=tokenizer.eot_id,
        start_id=tokenizer.start_id,
        vocab_size=tokenizer.vocab_size,  # the model may have more ids, which no text has
        **sampling_params_of(args),
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot encode all characters
    print_samples(sample, tokenizer.decode_bytes, texts)


def load_model(args: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    """Returns (config, params on one device, tokenizer, FORMAT:PATH) of --workdir or --model.

    Raises:
        UserError: the model or its tokenizer is missing or damaged.
    """
    import jax.numpy as jnp

    from gptjax import bucket_logs
    from gptjax.convert import formats
    from gptjax.convert.tokenizer_source import open_tokenizer
    from gptjax.stored import load_params

    if args.model:
        weights = formats.open_model(args.model, tokenizer=args.tokenizer, activation=args.activation)
        params = formats.load_params(weights, lambda _, leaf: jnp.asarray(leaf))
        return Config(model=weights.config), params, weights.tokenizer, weights.origin
    settings, params, step = load_params(args.workdir, step=args.step, raw=args.raw)
    local = workdir.local_directory(args.workdir)
    bucket_logs.fetch_logs(args.workdir, local)  # with the tokenizer, if the run is in a bucket
    tokenizer = open_tokenizer(args.tokenizer or os.path.join(local, workdir.TOKENIZER_FILE))
    return settings, params, tokenizer, f"gptjax:{args.workdir}@{step}"


def print_samples(
    run: Callable[..., list[list[int]]],
    decode_bytes: Callable[[list[int]], bytes],
    texts: Sequence[str],
) -> None:
    """Prints each text and its continuation by run(on_token=...): a single one token by token, several at the end."""
    if len(texts) == 1:
        write = make_writer(decode_bytes)
        print(for_stdout(texts[0]), end="", flush=True)
        run(on_token=lambda row, token: write(token))
        write(None)
        return
    for text, new in zip(texts, run(), strict=True):
        continuation = decode_bytes(new).decode(errors="replace")
        print(for_stdout(text + continuation), SEPARATOR, sep="\n", flush=True)


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
