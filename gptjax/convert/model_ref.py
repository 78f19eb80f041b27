"""The name of a model in any format: FORMAT:PATH, as in hf:exported or nanogpt:ckpt.pt."""

import os
from typing import NamedTuple

from gptjax.errors import ConfigError
from gptjax.workdir import is_bucket

READABLE = ("gptjax", "hf", "nanogpt", "llmc", "msgpack")
WRITABLE = ("gptjax", "hf", "nanogpt", "llmc")
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FORMATS_HELP = "hf:DIR, hf:OWNER/NAME[@REVISION], gptjax:WORKDIR[@STEP], nanogpt:ckpt.pt, llmc:model.bin, msgpack:DIR"


class ModelRef(NamedTuple):
    """A model as --from, --to and --model name it."""

    format: str
    path: str

    def __str__(self) -> str:
        return f"{self.format}:{self.path}"


def parse_model_ref(flag: str, text: str, formats: tuple[str, ...]) -> ModelRef:
    """Returns the ModelRef of FORMAT:PATH.

    Raises:
        ConfigError: the format is not one of `formats`, or the path is empty.
    """
    name, _, path = text.partition(":")
    if not path and (near := guess(text)):
        raise ConfigError("has no format", field=flag, value=text, remedy=f"write {flag}={near}")
    if not path or name not in formats:
        raise ConfigError(
            f"expected one of {', '.join(formats)}, a colon and a path, such as {FORMATS_HELP}",
            field=flag,
            value=text,
        )
    return ModelRef(name, os.path.expanduser(path))


def find_model(flag: str, text: str) -> ModelRef:
    """Returns the ModelRef of FORMAT:PATH, or of a work directory, which needs no format.

    flag: names the text in an error.

    Raises:
        ConfigError: it is neither, or a directory of another format.
    """
    has_format = text.partition(":")[0] in READABLE
    # gs://... has a colon, and a directory's name may have one.
    is_directory = is_bucket(text) or os.path.isdir(text)
    if not has_format and (is_directory or ":" not in text):
        near = guess(text)
        if near and not near.startswith("gptjax:"):
            raise ConfigError("has no format", field=flag, value=text, remedy=f"write {flag}={near}")
        text = f"gptjax:{text}"
    return parse_model_ref(flag, text, READABLE)


def guess(text: str) -> str:
    """Returns FORMAT:PATH for the path of a model or the name of a GPT-2; "" where nothing tells the format."""
    if text.removeprefix("openai-community/") in OPENAI_MODELS:
        return f"hf:openai-community/{text.removeprefix('openai-community/')}"
    if os.path.isdir(os.path.join(text, "checkpoints")):
        return f"gptjax:{text}"
    if os.path.isfile(os.path.join(text, "config.json")):
        return f"hf:{text}"
    if os.path.isfile(text) and text.endswith((".pt", ".bin")):
        return f"{'nanogpt' if text.endswith('.pt') else 'llmc'}:{text}"
    return ""
