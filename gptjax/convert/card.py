"""The model card of an export: the model, its training data, settings and losses."""

import dataclasses
import json
import re

from gptjax.convert.weights import Weights
from gptjax.params import count_params
from gptjax.redaction import shown

# ASCII that may begin or end an element of Markdown or HTML, or an address that some programs turn into a link.
MARKUP = re.compile(
    r"[^\w\s./:@,+=%()-]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|(?<=\w)@(?=[\w-]+\.)", re.IGNORECASE
)

LOAD_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY OF THIS FILE")'
TOKENIZER_SECTION = """
## Tokenizer

The tokenizer has no padding token, because the model was trained without padding. A batch of texts of different lengths
needs one, and end-of-text can serve as it:

```python
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "left"  # for generate(), which continues the right end
```

The attention mask that the tokenizer returns hides the padding from the model. Pass it on with the ids.

The converter of llama.cpp, `convert_hf_to_gguf.py`, takes an export with GPT-2's tokenizer. It does not take a
tokenizer of single bytes or a custom one, because it knows only the tokenizers in its own list.
"""


def model_card(weights: Weights, dtype: str) -> str:
    """Returns README.md for a model directory: front matter, then tokenizer, config, data, steps, losses if known.

    dtype: of the exported tensors.
    """
    history = weights.history
    tokenizer = weights.tokenizer
    facts = {
        "parameters": f"{count_params(weights.config):,}",
        "weights": f"model.safetensors, {dtype}",
        "converted from": as_text(weights.origin),
        "steps": _number(history.get("step")),
        "tokens seen": _number(history.get("tokens")),
        "training loss": _number(history.get("loss")),
        "validation loss": _number(history.get("val_loss")),
        "data": as_text(str(history.get("data") or "not known")),
        "tokenizer": as_text(tokenizer.name) if tokenizer else "not included",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    model = json.dumps(dataclasses.asdict(weights.config), indent=2)
    run_config = history.get("config")
    settings = ""
    if run_config:
        settings = f"\n## Settings of the run\n\n```json\n{json.dumps(run_config, indent=2)}\n```\n"
    imports = "GPT2LMHeadModel"
    loading = ""
    if tokenizer:
        imports = "AutoTokenizer, GPT2LMHeadModel"
        loading = f"{LOAD_TOKENIZER}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- gptjax
---

# A GPT-2 language model

| | |
|---|---|
{rows}

```python
from transformers import {imports}

model = GPT2LMHeadModel.from_pretrained("DIRECTORY OF THIS FILE")
{loading}```
{TOKENIZER_SECTION if tokenizer else ""}
## Model

```json
{model}
```
{settings}"""


def as_text(text: str) -> str:
    """Returns `text` as one line of Markdown without markup: special characters become character references."""
    line = " ".join(shown(text).split())
    return MARKUP.sub(_character_references, line)


def _character_references(match: re.Match[str]) -> str:
    return "".join(f"&#{ord(character)};" for character in match[0])


def _number(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
