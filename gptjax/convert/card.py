"""The model card of an export: what was trained, how, and how well."""

import dataclasses
import json

from gptjax.convert.weights import Weights
from gptjax.model import count_params


def model_card(weights: Weights, dtype: str) -> str:
    """Returns README.md for a model directory: front matter, then config, data, steps and loss as far as known."""
    history = weights.history
    facts = {
        "parameters": f"{count_params(weights.config):,}",
        "weights": f"model.safetensors, {dtype}",
        "converted from": weights.origin,
        "steps": _number(history.get("step")),
        "tokens seen": _number(history.get("tokens")),
        "training loss": _number(history.get("loss")),
        "validation loss": _number(history.get("val_loss")),
        "data": history.get("data") or "not known",
        "tokenizer": weights.tokenizer.name if weights.tokenizer else "not included",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    model = json.dumps(dataclasses.asdict(weights.config), indent=2)
    run = history.get("config")
    settings = f"\n## Settings of the run\n\n```json\n{json.dumps(run, indent=2)}\n```\n" if run else ""
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
from transformers import AutoTokenizer, GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("DIRECTORY OF THIS FILE")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY OF THIS FILE")
```

## Model

```json
{model}
```
{settings}"""


def _number(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
