"""The model card of an export says what can be done with it; test_command.py has the history of a run."""

import re
import textwrap

import pytest

from gptjax.convert import __main__ as command
from tests.convert.models import CONFIG, write_hf


def export_card(root, *flags):
    """Returns the model card of an export with 257 ids."""
    write_hf(root / "a", config=CONFIG | {"vocab_size": 257})
    command.main([f"--from=hf:{root}/a", f"--to=hf:{root}/b", *flags])
    return (root / "b" / "README.md").read_text()


def code_of(card):
    return textwrap.dedent("".join(re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)))


def test_card_says_which_tokenizers_the_converter_of_llama_cpp_takes(tmp_path):
    text = " ".join(export_card(tmp_path, "--tokenizer=bytes").split())
    assert "llama.cpp, `convert_hf_to_gguf.py`, takes an export with GPT-2's tokenizer" in text
    assert "does not take a tokenizer of single bytes or a custom one" in text


def test_card_of_a_model_without_tokenizer_does_not_load_one(tmp_path):
    card = export_card(tmp_path)
    assert "okenizer" not in code_of(card)
    assert "## Tokenizer" not in card
    assert "| tokenizer | not included |" in card


@pytest.mark.torch
def test_code_of_the_card_pads_a_batch(tmp_path):
    """What the model computes of a padded text is what it computes without padding."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    card = export_card(tmp_path, "--tokenizer=bytes")
    names = {}
    exec(code_of(card).replace("DIRECTORY OF THIS FILE", str(tmp_path / "b")), names)
    tokenizer, model = names["tokenizer"], names["model"].eval()
    batch = tokenizer(["abc", "d"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[97, 98, 99], [256, 256, 100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    padded = model.generate(**batch, **options)[1, 3:]
    alone = model.generate(**tokenizer(["d"], return_tensors="pt"), **options)[0, 1:]
    assert torch.equal(padded, alone)
