"""A run with someone else's tokenizer, whose special tokens come first, from the text to an export."""

import json
import sys

import pytest

from gptjax import evaluate, sample
from gptjax.convert import __main__ as convert
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.data import prepare
from gptjax.data.patterns import GPT2_PATTERN
from gptjax.data.tokenizer import make_tokenizer
from tests.runs import losses

SPECIALS = {"<s>": 0, "</s>": 1, "<pad>": 2}


@pytest.fixture
def words(tmp_path):
    """The directory of a tokenizer in Hugging Face's files."""
    pieces = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b"se", b"lf", b"self"]
    ranks = {piece: number + len(SPECIALS) for number, piece in enumerate(pieces)}
    tokenizer = make_tokenizer("mine", GPT2_PATTERN, ranks, specials=SPECIALS, eot="</s>")
    write_tokenizer(tokenizer, str(tmp_path / "words"), block_size=32)
    return tmp_path / "words"


def test_run_with_special_tokens_first_resumes_replays_and_is_exported(lab, words, tmp_path, capsys):
    data = tmp_path / "data"
    prepare.main([f"--source=text:{lab.root}/text", f"--tokenizer={words}", f"--out={data}"])
    settings = [f"data.path={data}", f"data.tokenizer={words}", "model.vocab_size=265", "train.num_steps=8"]
    settings.append("data.document_mask=True")  # where documents end is read from the ids
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lab.train(whole, *settings)
    lab.train(cut, *settings, "train.num_steps=4")
    lab.train(cut, *settings)
    assert list(losses(whole)) == list(range(1, 9))
    assert losses(cut) == losses(whole)
    replay = [sys.executable, "-m", "gptjax.replay", f"--workdir={cut}", "--step=6", f"--out={tmp_path}/page.html"]
    assert "equal to metrics.jsonl, bit for bit" in lab.call(replay).stdout

    convert.main([f"--from=gptjax:{cut}", f"--to=hf:{tmp_path}/hf"])
    exported, given = (json.loads((place / "tokenizer.json").read_text()) for place in (tmp_path / "hf", words))
    assert exported["model"]["vocab"] == given["model"]["vocab"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == SPECIALS["</s>"]

    capsys.readouterr()
    scores, texts = [], []
    for model in (f"gptjax:{cut}@8", f"hf:{tmp_path}/hf"):
        evaluate.main([f"--model={model}", f"--data={data}", "--batches=1"])
        scores.append(capsys.readouterr().out.removeprefix(f"{model}: "))
        sample.main([f"--model={model}", "--prompt=the self", "--max_new_tokens=16", "--temperature=0"])
        texts.append(capsys.readouterr().out)
    assert scores[0] == scores[1]
    assert "bits per byte" in scores[0]
    assert texts[0] == texts[1]
    assert texts[0].startswith("the self")
