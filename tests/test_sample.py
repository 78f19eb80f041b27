"""Sampling at the command line."""

import contextlib
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from gptjax import generate as generation
from gptjax import sample
from gptjax.checkpoint import Checkpointer
from gptjax.compute import resolve_compute
from gptjax.config import ComputeConfig, Config, GPTConfig, MeshConfig
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import CheckpointError, ConfigError
from gptjax.model import GPT
from gptjax.sharding import make_mesh
from gptjax.state import TrainState
from tests.helpers import raises
from tests.test_generate import BLOCK, make_params


def test_multibyte_characters_are_printed_unsplit(capsys):
    write = sample.make_writer(bytes)
    shown = []
    for byte in "né漢😀".encode() + b"\xff" + "ü".encode()[:1]:
        write(byte)
        shown.append(capsys.readouterr().out)
    assert shown == ["n", "", "é", "", "", "漢", "", "", "", "😀", "\N{REPLACEMENT CHARACTER}", ""]
    write(None)
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_one_sample_is_streamed_and_several_are_separated(capsys):
    seen = []

    def run(on_token=None):
        for token in b"bc" if on_token else ():
            on_token(0, token)
            seen.append(capsys.readouterr().out)
        return [list(b"bc"), [0xC3]]

    sample.print_samples(run, bytes, ["a"])
    assert seen == ["ab", "c"]
    sample.print_samples(run, bytes, ["a", "x"])
    assert capsys.readouterr().out == "\nabc\n---------------\nx\N{REPLACEMENT CHARACTER}\n---------------\n"


def test_prompt_files_follow_the_prompts(tmp_path):
    (tmp_path / "good").write_text("two\n")
    (tmp_path / "bad").write_bytes(b"\xff")
    assert sample.read_prompts(["one"], [str(tmp_path / "good")]) == ["one", "two\n"]
    assert sample.read_prompts([], []) == [""]
    for path, reason in ((f"{tmp_path}/bad", "UTF-8"), (f"{tmp_path}/none", "No such file")):
        with raises(ConfigError, "--prompt_file", value=path, match=reason):
            sample.read_prompts([], [path])


@pytest.mark.faults
def test_l2_prompt_may_be_a_pipe_of_bounded_length(tmp_path, said):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["two\n"], daemon=True)
    writer.start()
    assert sample.read_prompts([], [str(tmp_path / "pipe")]) == ["two\n"]
    assert said == [f"--prompt_file={tmp_path}/pipe: a pipe: waiting for its text"]
    with raises(ConfigError, "--prompt_file", value="/dev/zero", match="16,777,216 bytes"):
        sample.read_prompts([], ["/dev/zero"])


def test_each_prompt_is_named_by_its_flag(tmp_path):
    long = "a prompt of many words"
    flags = [f"--prompt={long}", f"--prompt_file={tmp_path}/p", "--num_samples=2"]
    names = sample.name_prompts(sample.parse_flags(["--workdir=w", *flags]))
    assert names == [f"--prompt={long[:20]}"] * 2 + [f"--prompt_file={tmp_path}/p"] * 2
    assert sample.name_prompts(sample.parse_flags(["--workdir=w"])) == ["--prompt="]


def test_help_and_wrong_flags_end_before_jax_is_loaded():
    code = """
import sys
import threading
from gptjax import sample
for arguments in (["--help"], ["--workdir=x", "--top_p=0", "--temperature=-1"], ["--seed=1"],
                  ["--workdir=x", "--tok=1"], ["--workdir=x", "--seed=x"], ["--workdir=x", "--num_samples=0"],
                  ["--workdir=x", "--prompt_file=/no"]):
    sys.argv = ["sample", *arguments]
    try:
        sample.cli()
    except SystemExit as end:
        print("exit", end.code, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    ends = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert ends == ["exit 0 False"] + ["exit 2 False"] * 6
    assert "--max_new_tokens" in done.stdout
    starts = (
        "temperature=-1.0: must",
        "top_p=0.0: must",
        "one of --workdir=DIR and --model=FORMAT:PATH is required",
        "--tok=1: no such flag; nearest: --top_k",
        "--seed=x: expected a whole number",
        "num_samples=0: must",
        "--prompt_file=/no: No such file",
    )
    lines = done.stderr.splitlines()
    assert [line.startswith(f"error: {start}") for line, start in zip(lines, starts, strict=True)] == [True] * 7


def test_the_command_samples_a_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "MAX_ROWS", 1)
    monkeypatch.setattr(sample.distributed, "start_jax", lambda: None)  # it is for a whole process
    tokenizer = load_tokenizer("bytes")
    model = GPTConfig(block_size=BLOCK, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8)
    config = Config(model=model, compute=ComputeConfig(attention="cudnn"))  # of the training machine
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    state = TrainState(jnp.asarray(3), make_params(model), {"count": jnp.zeros(())})
    with contextlib.closing(Checkpointer(str(tmp_path))) as checkpointer:
        checkpointer.save(state, 3, config=config, history={}, data={})
    (tmp_path / "prompt").write_text("naïve")
    arguments = [f"--workdir={tmp_path}", "--max_new_tokens=9", "--temperature=0"]
    sample.main([*arguments, "--prompt=ab"])
    one = capsys.readouterr().out
    sample.main([*arguments, "--prompt=ab", f"--prompt_file={tmp_path / 'prompt'}", "--num_samples=2", "--step=3"])
    several = capsys.readouterr().out.split(f"\n{sample.SEPARATOR}\n")
    assert several[:2] == [one[:-1]] * 2
    assert several[2].startswith("naïve")
    assert (several[2], several[4]) == (several[3], "")
    gpt = GPT(model, resolve_compute(Config(model=model), make_mesh(MeshConfig(), jax.devices()[:1])))
    options = {"max_new_tokens": 9, "eot_id": tokenizer.eot_id, "temperature": 0.0}
    [new] = generation.generate(gpt, state.params, [[97, 98]], **options)
    assert one == "ab" + tokenizer.decode(new) + "\n"
    with raises(CheckpointError, "--workdir", value=str(tmp_path), remedy="available: 3"):
        sample.main([*arguments, "--step=4"])
