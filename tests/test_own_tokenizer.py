"""Runs with someone else's tokenizer, whose special tokens come first, and with characters, from text to export."""

import json
import sys

import pytest

import gptjax
from gptjax import evaluate, sample, tokenizer
from gptjax.convert import __main__ as convert
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.data import prepare
from gptjax.data.patterns import GPT2_PATTERN
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from gptjax.errors import DataError
from tests.helpers import raises
from tests.runs import losses

SPECIALS = {"<s>": 0, "</s>": 1, "<pad>": 2}


@pytest.fixture
def words(tmp_path):
    """The directory of a tokenizer in Hugging Face's files."""
    pieces = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b"se", b"lf", b"self"]
    ranks = {piece: number + len(SPECIALS) for number, piece in enumerate(pieces)}
    mine = make_tokenizer("mine", GPT2_PATTERN, ranks, specials=SPECIALS, eot="</s>")
    write_tokenizer(mine, str(tmp_path / "words"), block_size=32)
    return tmp_path / "words"


def train_and_replay(lab, tmp_path, settings):
    """Trains 8 steps at once and in two runs, which must be alike; returns both, of which the second was replayed."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lab.train(whole, *settings)
    lab.train(cut, *settings, "train.num_steps=4")
    lab.train(cut, *settings)
    assert list(losses(whole)) == list(range(1, 9))
    assert losses(cut) == losses(whole)
    replay = [sys.executable, "-m", "gptjax.replay", f"--workdir={cut}", "--step=6", f"--out={tmp_path}/page.html"]
    assert "equal to metrics.jsonl, bit for bit" in lab.call(replay).stdout
    return whole, cut


def test_run_with_special_tokens_first_resumes_replays_and_is_exported(lab, words, tmp_path, capsys):
    data = tmp_path / "data"
    prepare.main([f"--source=text:{lab.root}/text", f"--tokenizer={words}", f"--out={data}"])
    settings = [f"data.path={data}", f"data.tokenizer={words}", "model.vocab_size=265", "train.num_steps=8"]
    settings.append("data.document_mask=True")  # where documents end is read from the ids
    _, cut = train_and_replay(lab, tmp_path, settings)
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


def test_run_of_characters_resumes_replays_and_samples(lab, tmp_path, capsys):
    text = (lab.root / "text").rglob("*")
    (tmp_path / "input.txt").write_text("".join(path.read_text() for path in sorted(text) if path.is_file())[:200_000])
    characters = tmp_path / "chars.json"
    tokenizer.main([f"--source=text:{tmp_path}/input.txt", "--characters", f"--out={characters}"])
    size = load_tokenizer(str(characters)).vocab_size
    data = tmp_path / "data"
    prepare.main([f"--source=text:{tmp_path}/input.txt", f"--tokenizer={characters}", f"--out={data}"])
    settings = [f"data.path={data}", f"data.tokenizer={characters}", f"model.vocab_size={size}"]
    settings += ["train.num_steps=8", "train.sample_every=8"]
    whole, cut = train_and_replay(lab, tmp_path, settings)
    masked = lab.call(lab.command(tmp_path / "masked", *settings, "data.document_mask=True"), expect=2)
    assert "data.document_mask=True: the tokenizer" in masked.stderr

    capsys.readouterr()
    sample.main([f"--workdir={cut}", "--max_new_tokens=16"])
    assert len(capsys.readouterr().out) > 10, "it starts from a line end"
    with raises(DataError, "--prompt=5 \u20ac", match=r"no id for the character .*u20ac"):
        sample.main([f"--workdir={cut}", "--prompt=5 \u20ac"])
    evaluate.main([f"--model=gptjax:{cut}", "--batches=1"])
    assert "bits per byte" in capsys.readouterr().out
    for target in (f"hf:{tmp_path}/hf", f"llmc:{tmp_path}/model.bin"):
        with raises(DataError, "tokenizer chars.json"):
            convert.main([f"--from=gptjax:{cut}", f"--to={target}"])
    assert not (tmp_path / "hf").exists()
    models = [gptjax.load(str(workdir)) for workdir in (cut, whole)]
    assert len({model.generate("def", max_new_tokens=4, temperature=0) for model in models}) == 1
    assert models[0].loss("def main") > 0


@pytest.mark.torch
def test_model_of_characters_goes_to_nanogpt_and_back(lab, tmp_path, capsys):
    pytest.importorskip("torch")
    (tmp_path / "input.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 100)
    characters = tmp_path / "chars.json"
    tokenizer.main([f"--source=text:{tmp_path}/input.txt", "--characters", f"--out={characters}"])
    size = load_tokenizer(str(characters)).vocab_size
    settings = [f"data.source=text:{tmp_path}/input.txt", "data.path=", f"data.tokenizer={characters}"]
    lab.train(tmp_path / "run", *settings, f"model.vocab_size={size}", "train.num_steps=4")
    (tmp_path / "nano").mkdir()
    convert.main([f"--from=gptjax:{tmp_path}/run", f"--to=nanogpt:{tmp_path}/nano/ckpt.pt"])
    meta = tmp_path / "nano/meta.pkl"
    assert load_tokenizer(str(meta)).characters == load_tokenizer(str(characters)).characters
    convert.main([f"--from=nanogpt:{tmp_path}/nano/ckpt.pt", f"--tokenizer={meta}", f"--to=gptjax:{tmp_path}/back"])
    capsys.readouterr()
    texts = []
    for workdir in ("run", "back"):
        sample.main([f"--workdir={tmp_path / workdir}", "--prompt=First", "--max_new_tokens=8", "--temperature=0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("First")
