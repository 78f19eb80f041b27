"""F1: whatever stands in overrides, shards, meta.json, checkpoints, logs and prompts ends in a documented error.

conversion/test_conversion_fuzz.py has the files of weights. `make soak` runs all of them with more cases.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import cli, config, config_flags
from gptjax.checkpoint import Checkpointer
from gptjax.compute import ResolvedCompute
from gptjax.config import Config, GPTConfig, LogConfig
from gptjax.data import tokens
from gptjax.data.header import make_header
from gptjax.data.meta import Meta, ShardMeta, SplitMeta, write_meta
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from gptjax.data.tokens import open_shard, open_split
from gptjax.errors import BAD_CONFIG, BAD_DATA, CheckpointError, ConfigError, DataError
from gptjax.generate import generate
from gptjax.logs import RunLog
from gptjax.model import GPT
from gptjax.resume import compare_configs
from gptjax.state import TrainState
from gptjax.stored import load_params
from tests.faults import golden
from tests.fuzzing import ODD, PATCHES, TAILS, cases, nothing_written, only_documented_errors, patched
from tests.runs import leaf_bytes, rows, state_bytes

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_compiler")]
FIELDS = sorted(config.flatten(Config()))
NUMBERS = ["0", "-1", "1e400", "nan", "inf", "1e3", "2.5", "9" * 400, "9" * 5000]
NUMBERS += ["²", "\u0661", "0x10", "1_000", " 3", "True"]


# Overrides and flags


@pytest.fixture(scope="module")
def config_file(lab, tmp_path_factory):
    """The tiny config, alone in a directory."""
    return pathlib.Path(shutil.copy(lab.config_file, tmp_path_factory.mktemp("config")))


@cases(500)
@given(st.dictionaries(
    st.one_of(st.sampled_from(FIELDS), st.sampled_from(["model", "", ".", "model.", "a.b.c"]), st.text(max_size=12)),
    st.one_of(st.sampled_from([*NUMBERS, "adamw", "full", "wsd"]), st.text(max_size=12), st.integers().map(str)),
    max_size=4,
))  # fmt: skip
def test_f1_any_overrides_raise_only_documented_errors(config_file, overrides):
    with nothing_written(config_file.parent):
        error = only_documented_errors(
            lambda: config.load(str(config_file), overrides), lines=2 * len(overrides) + len(config.PERIODS)
        )
    assert error is None or error.exit_code == BAD_CONFIG


@cases(200)
@given(st.lists(st.one_of(
    st.sampled_from(["--config", "--workdir", "--config.model.n_layer", "--", "-", "--help=x", "--num_processes"]),
    st.text(max_size=12), st.text(max_size=6).map("--config.".__add__), st.text(max_size=4).map("--workdir=".__add__),
), max_size=4))  # fmt: skip
def test_f1_any_flags_raise_only_documented_errors(arguments):
    parser = cli.Parser("")
    config_flags.add_config_flag(parser)
    for name, kind in (("--workdir", str), ("--num_processes", int)):
        parser.add_argument(name, type=kind)

    def parse():
        if not {"-h", "--help"} & set(arguments):
            config_flags.parse_config_flags(parser, arguments)

    error = only_documented_errors(parse)
    assert error is None or error.exit_code == BAD_CONFIG


# Data

WORDS = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 300), st.sampled_from([20240520, 20240801, 7, 1]))


@cases(300)
@given(st.lists(WORDS, max_size=4), st.integers(0, 300), st.sampled_from([0, 0, 1, -1, -7]), st.binary(max_size=8))
def test_f1_any_shard_header_raises_only_documented_errors(tmp_path_factory, head, count, tail, body):
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    header = np.array([20240520, 1, count, *[0] * 253], "<i4")
    header[: len(head)] = head
    path.write_bytes(patched(header.tobytes() + (body * 300)[: 2 * count], [], tail))

    def read():
        assert 0 < len(open_shard(str(path), 300)) <= path.stat().st_size // 2

    error = only_documented_errors(read)
    assert error is None or error.exit_code == BAD_DATA


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared directory of two small shards, and its meta.json as a dict."""
    root = tmp_path_factory.mktemp("prepared")
    tokenizer, splits = load_tokenizer("bytes"), {}
    for name, count in (("train", 200), ("validation", 100)):
        file = f"{name}_000000.bin"
        ids = (np.arange(count) % 257).astype(np.uint16)
        (root / file).write_bytes(make_header(count, np.dtype("<u2")) + ids.tobytes())
        shard = ShardMeta(file, count, tokens.hash_file(str(root / file)))
        splits[name] = SplitMeta(count, count, 1, (shard,))
    write_meta(str(root), Meta("text:x", "bytes", tokenizer.sha256, 257, 256, "last", splits))
    return root, (root / "meta.json").read_bytes()


def paths_in(value, path=()):
    """Returns the path of every value in nested JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, child in children for below in paths_in(child, (*path, key)))]


def edited(value, edits):
    """Returns nested JSON with some values replaced or, where None is drawn, sometimes removed."""
    value = json.loads(json.dumps(value))
    for which, new, remove in edits:
        places = paths_in(value)
        *above, last = places[which % len(places)] or (None,)
        if last is None:
            value = new
            continue
        target = value
        for key in above:
            target = target[key]
        if remove:
            del target[last]
        else:
            target[last] = new
    return value


EDITS = st.lists(st.tuples(st.integers(0, 10**6), ODD, st.booleans()), max_size=3)


@cases(300)
@given(EDITS, PATCHES, TAILS)
def test_f1_any_meta_json_raises_only_documented_errors(prepared, edits, patches, tail):
    root, original = prepared
    text = json.dumps(edited(json.loads(original), edits)).encode()
    (root / "meta.json").write_bytes(patched(text, patches, tail))
    tokenizer = load_tokenizer("bytes")
    try:
        with nothing_written(root):
            for attempt in (
                lambda: open_split(str(root), "train", tokenizer=tokenizer),
                lambda: tokens.verify(str(root), tokenizer),
            ):
                error = only_documented_errors(attempt, lines=4)
                assert error is None or isinstance(error, DataError | ConfigError)
    finally:
        (root / "meta.json").write_bytes(original)


# Checkpoints


@dataclasses.dataclass(frozen=True, repr=False)
class Stored:
    root: pathlib.Path
    abstract: TrainState
    state: list[bytes]
    params: list[bytes]

    def __repr__(self) -> str:  # hypothesis shows it with each failure
        return "Stored(...)"


@pytest.fixture(scope="module")
def stored(quick_compiler, tmp_path_factory):
    """A work directory with one checkpoint, what it holds, and room for damaged copies.

    Of the optimizer's arrays it has one, as all have the same files.
    """
    root = tmp_path_factory.mktemp("stored")
    abstract, state = (
        dataclasses.replace(whole, opt_state={"mu": jax.tree.leaves(whole.opt_state)[-1]})
        for whole in golden.make_golden_state()
    )
    checkpointer = Checkpointer(str(root / "healthy"))
    checkpointer.save(state, golden.STEP, config=golden.CONFIG, history=golden.HISTORY, data=golden.DATA)
    checkpointer.close()
    return Stored(root, abstract, state_bytes(state), leaf_bytes(state.params))


def copy_of(stored):
    shutil.rmtree(stored.root / "damaged", ignore_errors=True)
    return shutil.copytree(stored.root / "healthy", stored.root / "damaged")


KINDS = ["bytes", "json", "json", "delete", "folder", "link", "swap", "add", "record", "pipe"]
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(KINDS)), min_size=1, max_size=2)


def damage(directory, change, edits, patches, tail):
    number, what = change
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    path = files[number % len(files)]
    if what == "bytes":
        path.write_bytes(patched(path.read_bytes(), patches, tail))
    elif what == "json":
        readable = [p for p in files if p.read_bytes()[:1] in (b"{", b"[")]
        path = readable[number % len(readable)]
        with contextlib.suppress(ValueError):
            path.write_text(json.dumps(edited(json.loads(path.read_text()), edits)))
    elif what == "record":  # by somebody who knows how to seal it again
        path = directory / "_CHECKPOINT_METADATA"
        with contextlib.suppress(Exception):
            assert path in files  # it may be a pipe by now, whose other end would be waited for
            metadata = json.loads(path.read_text())
            text = json.dumps(edited(json.loads(metadata["custom_metadata"]["record"]), edits))
            digest = hashlib.sha256(text.encode()).hexdigest()
            metadata["custom_metadata"] = {"record": text, "sha256": digest}
            path.write_text(json.dumps(metadata))
    elif what == "swap":
        other = files[(number // 7) % len(files)]
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif what == "add":
        (path.parent / ["x", "0", "manifest.ocdbt", "²", "zarr.json"][number % 5]).write_bytes(b"\1" * (number % 100))
    else:
        path.unlink()
        if what == "folder":
            path.mkdir()
        elif what == "link":
            path.symlink_to("/etc/hostname")
        elif what == "pipe":
            os.mkfifo(path)


@cases(24)
@given(CHANGES, EDITS.filter(bool), PATCHES.filter(bool), TAILS)
def test_f1_damaged_checkpoint_never_loads_wrong_bits(stored, changes, edits, patches, tail):
    """What is restored has the bits that were saved, or is refused; with one checkpoint there is nothing else."""
    workdir = copy_of(stored)
    for change in changes:
        damage(workdir / "checkpoints" / str(golden.STEP), change, edits, patches, tail)

    def load():
        found = load_params(str(workdir))[1]
        if jax.tree.structure(found) == jax.tree.structure(stored.abstract.params):
            assert leaf_bytes(found) == stored.params, "wrong bits"

    def restore():
        same = lambda record: compare_configs(record.config, golden.CONFIG)  # noqa: E731
        found = Checkpointer(str(workdir)).restore_latest(stored.abstract, check=same)
        assert found is not None
        assert state_bytes(found[0]) == stored.state, "wrong bits"

    with nothing_written(stored.root):
        errors = [only_documented_errors(load, lines=9)]
    errors.append(only_documented_errors(restore, lines=9))
    assert all(error is None or isinstance(error, CheckpointError | ConfigError) for error in errors)


LIKE_STEPS = ["²", "٣", "007", "0", "9" * 255, "-1", "1e3", " 9", "9 ", "9.orbax-checkpoint-tmp", "9.corrupt-x"]
NAMES = st.one_of(
    st.sampled_from(LIKE_STEPS),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.integers(0, 10**12).map(str),
)


@cases(12)
@given(st.lists(st.tuples(NAMES, st.sampled_from(["folder", "file", "link"])), min_size=1, max_size=3))
def test_f1_foreign_names_do_not_hide_the_checkpoint(stored, names):
    """Whatever lies beside it, the one good checkpoint is found, and the next one can be saved."""
    workdir = copy_of(stored)
    for name, kind in names:
        path = workdir / "checkpoints" / name
        if path.exists() or name in (".", "..") or len(name.encode()) > 255:
            continue
        if kind == "link":
            path.symlink_to(stored.root / "healthy" / "checkpoints")
        else:
            path.mkdir() if kind == "folder" else path.write_text("mine")
    checkpointer, found = Checkpointer(str(workdir)), []
    assert only_documented_errors(lambda: found.append(checkpointer.restore_latest(stored.abstract))) is None
    [(restored, record)] = found
    assert state_bytes(restored) == stored.state
    assert record.step == golden.STEP

    def save():
        checkpointer.save(restored, golden.STEP + 1, config=golden.CONFIG, history={}, data={})
        checkpointer.close()

    assert only_documented_errors(save) is None
    assert golden.STEP + 1 in checkpointer.steps()


# Logs and prompts


ROWS = st.dictionaries(st.sampled_from(["step", "loss", "val_loss", "x"]), ODD, max_size=3)
LINES = st.one_of(
    st.binary(max_size=30),
    st.one_of(ODD, ROWS).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 100_000, b'{"step": 1' + b"0" * 5000 + b"}", b'{"step": 3, "loss": 1e999}', b"\xff\xfe"]),
)


@cases(300)
@given(st.lists(LINES, max_size=4))
def test_f1_damaged_log_tail_is_cut_on_resume(tmp_path_factory, tail):
    directory = tmp_path_factory.getbasetemp() / "log"
    directory.mkdir(exist_ok=True)
    good = [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in good).encode()
    (directory / "metrics.jsonl").write_bytes(text + b"\n".join(tail))

    def resume():
        log = RunLog(str(directory), Config(log=LogConfig(tensorboard=True)), resumed_from=3)
        log.write({"step": 4, "loss": 2.5})
        log.close()

    assert only_documented_errors(resume) is None
    found = [row for row in rows(directory) if isinstance(row.get("loss"), float)]  # no line is damaged
    assert [row for row in found if row in good] == good
    assert found[-1] == {"step": 4, "loss": 2.5}
    assert all(row["step"] <= 3 for row in rows(directory)[:-1])


@functools.cache
def tiny_model():
    """A model of 20 ids whose parameters are all there, and compiled at its first use."""
    made = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8), ResolvedCompute(attention="xla"))
    return made, made.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


@cases(20)
@given(
    st.lists(st.lists(st.one_of(st.integers(0, 19), st.integers(-1, 20), st.just(2**63)), max_size=12), max_size=2),
    st.sampled_from([1.0, 0.0, -1.0, math.nan, math.inf, 1e-30]),
    st.sampled_from([0, 1, 25, -1, 2**40]),
    st.sampled_from([1.0, 0.5, 0.0, 2.0, math.nan]),
)
def test_f1_any_prompt_ids_raise_only_documented_errors(prompts, temperature, top_k, top_p):
    made, params = tiny_model()

    def sample():
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        found = generate(made, params, prompts, max_new_tokens=3, eot_id=19, **options)
        assert len(found) == len(prompts)
        assert all(0 <= token < 19 for row in found for token in row)

    error = only_documented_errors(sample, lines=4)
    assert error is None or error.exit_code == BAD_CONFIG


@cases(200)
@given(st.one_of(st.text(max_size=60), st.text(string.printable), st.binary(max_size=30).map(os.fsdecode)))
def test_f1_any_prompt_text_is_encoded(text):
    two = make_tokenizer("two", r"(?s).{1,4}", {bytes([b]): b for b in range(256)})
    for tokenizer in (load_tokenizer("bytes"), two):
        ids = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.eot_id for token in ids)
        if text.isprintable():
            assert tokenizer.decode(ids) == text
