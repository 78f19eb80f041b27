"""Log-likelihoods equal those of the definition, on any mesh, in any order and batch."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import Config
from gptjax.data.tokenizer import load_tokenizer
from gptjax.model import GPT
from gptjax.sharding import param_shardings
from gptjax.tasks import score
from gptjax.tasks.score import Pair, Scorer, bucket_lengths, encode_pair
from tests import reference_gpt2
from tests.helpers import mesh_of, random_params, tiny

CONFIG = tiny(block_size=160, vocab_size=257, n_layer=2, n_head=4, n_embd=32, dropout=0.0)
PARAMS = random_params(CONFIG)
BYTES = load_tokenizer("bytes")


def make_pairs(count=40):
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        lengths = random.integers(1, 100), random.integers(1, 20)
        pairs.append(Pair(*(random.integers(0, 257, length).tolist() for length in lengths)))
    return pairs


PAIRS = make_pairs()


def scorer_on(data=1, fsdp=1, tensor=1, config=CONFIG, params=PARAMS):
    mesh = mesh_of(data, fsdp, tensor)
    run = Config(model=config)
    model = GPT(config, resolve_compute(run, mesh), resolve_parallel(run, mesh))
    return Scorer(model, mesh), jax.tree.map(jax.device_put, params, param_shardings(params, mesh))


@pytest.fixture(scope="module")
def one_device():
    return scorer_on()


@pytest.fixture(scope="module")
def scores(one_device):
    scorer, params = one_device
    return scorer.score(params, PAIRS)


def reference_logits(ids):
    """The logits of each position, without the columns that pad the vocabulary."""
    return reference_gpt2.logits(PARAMS, np.array([ids]), n_head=CONFIG.n_head)[0, :, : CONFIG.vocab_size]


def expected_logprobs(pair):
    """The log-probability of each token of the continuation, by NumPy in float64, and whether each is the likeliest."""
    whole = [*pair.context, *pair.continuation][-(CONFIG.block_size + 1) :]
    logits = reference_logits(whole[:-1])
    logits -= logits.max(axis=-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    count = min(len(pair.continuation), len(whole) - 1)
    places, targets = np.arange(len(whole) - 1)[-count:], whole[-count:]
    return logprobs[places, targets], bool((logprobs[places].argmax(axis=-1) == targets).all())


def greedy_pair():
    """A pair whose continuation is what the model itself would write."""
    context = PAIRS[0].context
    ids = list(context)
    for _ in range(3):
        ids.append(int(reference_logits(ids)[-1].argmax()))
    return Pair(context, ids[len(context) :])


def test_logprobs_are_those_of_the_definition(one_device, scores):
    pairs = [*PAIRS, greedy_pair()]
    found = [*scores, *one_device[0].score(one_device[1], pairs[-1:])]
    for pair, one in zip(pairs, found, strict=True):
        logprobs, is_greedy = expected_logprobs(pair)
        assert one.logprob == pytest.approx(logprobs.sum(), rel=1e-5, abs=1e-5)
        assert one.is_greedy == is_greedy
        assert not one.is_cut
    assert [one.is_greedy for one in found].count(True) >= 1
    assert not found[1].is_greedy


def test_long_contexts_are_cut_at_the_left_and_counted(one_device):
    scorer, params = one_device
    pair = Pair(list(range(200)), [1, 2, 3])
    [one] = scorer.score(params, [pair])
    assert one.is_cut
    assert one.logprob == pytest.approx(expected_logprobs(pair)[0].sum(), rel=1e-5)
    longest = Pair(list(range(158)), [1, 2, 3])  # 161 tokens, of which the last is no input
    assert not scorer.score(params, [longest])[0].is_cut
    assert scorer.score(params, [Pair([5], list(range(200)))])[0].is_cut


def test_scores_do_not_depend_on_order_or_on_other_pairs(one_device, scores):
    scorer, params = one_device
    order = np.random.default_rng(1).permutation(len(PAIRS))
    shuffled = scorer.score(params, [PAIRS[number] for number in order])
    assert [shuffled[place] for place in np.argsort(order)] == scores
    for number in (0, 7, 39):
        assert scorer.score(params, [PAIRS[number]]) == [scores[number]]
    assert scorer.score(params, PAIRS * 3) == scores * 3


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)], ids=str)
def test_scores_agree_on_all_meshes(scores, mesh):
    scorer, params = scorer_on(*mesh)
    for one, other in zip(scorer.score(params, PAIRS), scores, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5, abs=1e-5)
        assert one.is_greedy == other.is_greedy


def test_each_bucket_compiles_once(monkeypatch):
    compiled = []
    make = score.make_score_fn

    def counting(model):
        call = make(model)
        return lambda params, tokens: (compiled.append(tokens.shape), call(params, tokens))[1]

    monkeypatch.setattr(score, "make_score_fn", counting)
    monkeypatch.setattr(score, "TOKENS_PER_DEVICE", 512)
    scorer, params = scorer_on()
    scorer.score(params, PAIRS)
    assert len(compiled) > 3
    assert set(compiled) == {(2, 8, 64), (2, 4, 128)}


def test_interrupted_scoring_has_no_result(one_device):
    scorer, params = one_device
    assert scorer.score(params, PAIRS, should_stop=lambda: True) == []
    seen = []
    scorer.score(params, PAIRS, on_batch=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, len(PAIRS))
    assert seen == sorted(seen)


def test_buckets_end_at_the_context():
    assert bucket_lengths(1024) == [64, 128, 256, 512, 1024]
    assert bucket_lengths(100) == [64, 100]
    assert bucket_lengths(32) == [32]


# Text to pairs


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_contexts_and_continuations_are_tokenized_together(name):
    tokenizer = load_tokenizer(name)
    for context, continuation in [("The cat", " sat"), ("A:", " yes"), ("x  ", "y"), ("x\n", "y")]:
        pair = encode_pair(context, continuation, tokenizer)
        assert tokenizer.decode(pair.context + pair.continuation) == context + continuation
        assert pair.context == tokenizer.encode(context.rstrip())
    assert encode_pair("A: ", "yes", tokenizer) == encode_pair("A:", " yes", tokenizer)


def test_empty_context_is_end_of_text():
    assert encode_pair("", "ab", BYTES) == Pair([256], [97, 98])
    assert encode_pair("  ", "ab", BYTES) == Pair([256], [32, 32, 97, 98])


def test_last_token_is_cut_off_by_the_tokenizer():
    gpt2 = load_tokenizer("gpt2")
    pair = encode_pair("", "I looked at Anastasia", gpt2, only_last_token=True)
    assert pair.context + pair.continuation == gpt2.encode("I looked at Anastasia")
    assert len(pair.continuation) == 1


def test_dropout_is_not_used():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    scorer, params = scorer_on(config=config)
    plain, same = scorer_on()
    assert scorer.score(params, PAIRS[:4]) == plain.score(same, PAIRS[:4])
