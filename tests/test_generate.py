"""Generation: the cache against computing everything again, the choice of tokens against NumPy."""

import dataclasses
import functools
import itertools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import decode, sampling
from gptjax import generate as generation
from gptjax.compute import ResolvedCompute
from gptjax.config import GPTConfig, MeshConfig
from gptjax.errors import ConfigError
from gptjax.model import GPT
from gptjax.sharding import make_mesh, param_shardings, path_name
from tests.helpers import raises

BLOCK, VOCAB, EOT = 16, 11, 10
CONFIG = GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16)
UNTIED = dataclasses.replace(CONFIG, bias=False, tie_embeddings=False, activation="gelu")
MODEL = GPT(CONFIG)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
ROWS = 6  # generate() below fills up to so many, since another number compiles again


pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(autouse=True)
def _chunk_that_divides_nothing(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 5)


@functools.cache
def make_params(config=CONFIG):
    """Weights so large that a token depends on all that the model sees, biases and scales unlike their initial ones."""
    std = {"kernel": 0.6, "embedding": 0.5, "bias": 0.1, "scale": 0.1}

    def draw(path, leaf):
        key = jax.random.key(zlib.crc32(path_name(path).encode()))
        return (path[-1].key == "scale") + std[path[-1].key] * jax.random.normal(key, leaf.shape)

    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.jit(lambda: jax.tree.map_with_path(draw, shapes))()


@functools.cache
def full_forward(model):
    return jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT))


def naive_logits(tokens, model=MODEL, params=None):
    """The logits after each of up to block_size tokens, without a cache; what follows a token cannot change its own."""
    padded = np.zeros((1, BLOCK), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(full_forward(model)(params or make_params(model.config), padded))[0, : len(tokens)]


def naive_greedy(prompt, count, vocab_size=VOCAB):
    """Computes everything again for each token; a context beyond block_size is cut to its last half."""
    context, new = list(prompt)[-BLOCK:], []
    for _ in range(count):
        if len(context) > BLOCK:
            context = context[-(BLOCK // 2) :]
        new.append(int(np.argmax(naive_logits(context)[-1, :vocab_size])))
        context.append(new[-1])
    return new


def generate(prompts, count=12, *, model=MODEL, params=None, eot_id=EOT, rows=ROWS, **options):
    filled = [*prompts, *[[1]] * (rows - len(prompts) if len(prompts) else 0)]
    options = {"temperature": 0.0} | options
    new = generation.generate(model, params or make_params(), filled, max_new_tokens=count, eot_id=eot_id, **options)
    return new[: len(prompts)]


def until(tokens, eot_id):
    return tokens[: tokens.index(eot_id)] if eot_id in tokens else tokens


@pytest.fixture
def forwards(monkeypatch):
    """Collects the arguments of each trace of the model with a cache, of which none is there yet."""
    traced, make = [], decode.make_cached_forward
    monkeypatch.setattr(decode, "make_cached_forward", lambda *m: lambda *a: traced.append(a) or make(*m)(*a))
    decode.make_step.cache_clear()
    yield traced
    decode.make_step.cache_clear()


@pytest.fixture
def steps(monkeypatch):
    """Collects how many tokens each step makes."""
    counts, make = [], generation.make_step
    step = lambda *m: lambda *a, **k: counts.append(k["count"]) or make(*m)(*a, **k)  # noqa: E731
    monkeypatch.setattr(generation, "make_step", step)
    return counts


COMPILED = "Finished XLA compilation of jit(step)"


def test_two_compilations_serve_any_prompt_and_any_sampling_parameters(caplog, forwards):
    with jax.log_compiles():
        for length in range(BLOCK + 1):
            generate([[1] * length], 6, temperature=length / 10, top_k=length, seed=length)
        generate([[1, 2]], 40, top_p=0.5, temperature=1.0)
    assert sorted(tokens.shape for _, _, tokens, *_ in forwards) == [(ROWS, 1), (ROWS, 5)]
    assert sum(r.startswith(COMPILED) for r in caplog.messages) == 2


@pytest.mark.parametrize("device", [0, 1])
def test_caches_are_committed_to_the_device_of_the_parameters(device):
    params = jax.device_put(make_params(), jax.devices()[device])
    for array in jax.tree.leaves(decode.empty_state(MODEL, params, 1)):
        assert array.committed
        assert array.devices() == {jax.devices()[device]}


@pytest.mark.parametrize(("chunk", "config", "flatten"), [(5, UNTIED, False), (16, CONFIG, True)])
def test_cached_logits_equal_uncached_ones_at_every_position(monkeypatch, chunk, config, flatten):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    model, params = GPT(config, ResolvedCompute(flatten_tokens=flatten)), make_params(config)
    extend, weights = jax.jit(decode.make_cached_forward(model)), decode.unstack_layers(model, params)
    caches, _ = decode.empty_state(model, params, 4)
    caches = jax.tree.map(lambda x: jnp.full_like(x, 7.0), caches)  # leftovers, which the mask must hide
    contexts = {0: PROMPTS[0], 1: PROMPTS[1], 3: PROMPTS[2]}  # row 2 has none
    seen = {b: [] for b in contexts}
    for tokens_BC, positions_BC, _ in generation.prompt_chunks(contexts, 4, BLOCK):
        old = caches
        for i in range(tokens_BC.shape[1]):
            caches, logits_BV = extend(weights, old, tokens_BC, positions_BC, np.full(4, i, np.int32))
            for b in contexts:
                if positions_BC[b, i] < BLOCK:
                    seen[b].append(np.asarray(logits_BV[b]))
    for b, context in contexts.items():
        expected = naive_logits(context, GPT(config, ResolvedCompute(flatten_tokens=True)), params)
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(np.stack(seen[b]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [5, 64])
def test_greedy_generation_equals_naive_recomputation_past_block_size(monkeypatch, chunk):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    prompts = [*PROMPTS, [], [7, 0, 2, 4] * 5, [6] * BLOCK]
    expected = [naive_greedy(prompt or [EOT], 40) for prompt in prompts]
    assert len({tuple(new[-8:]) for new in expected}) > 2  # contexts matter, and are told apart
    assert generate(prompts, 40) == [until(new, EOT) for new in expected]


def test_tokens_after_the_cut_depend_on_the_kept_half_only(monkeypatch):
    new = naive_greedy(PROMPTS[0], BLOCK + 1 - len(PROMPTS[0]))
    kept = (PROMPTS[0] + new)[-(BLOCK // 2) :]
    eot_id = min(set(range(VOCAB)) - set(generate([PROMPTS[0]], 24)[0]), default=EOT)
    whole = generate([PROMPTS[0]], 24, eot_id=eot_id)[0]
    assert whole[: len(new)] == new
    assert whole[len(new) :] == generate([kept], 24 - len(new), eot_id=eot_id)[0]


filter_logits = jax.jit(sampling.filter_logits)
sample_token = jax.jit(sampling.sample_token)


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def hugging_face_filter(logits, top_k, top_p, min_p):
    """TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper, one after the other, for one row, in float64."""
    logits = logits.astype(np.float64)
    if top_k:
        logits = np.where(logits < np.sort(logits)[-min(top_k, len(logits))], -np.inf, logits)
    if top_p < 1:
        rising = np.argsort(logits)
        remove = np.cumsum(softmax(logits[rising])) <= 1 - top_p
        remove[-1] = False
        logits[rising[remove]] = -np.inf
    if min_p:
        p = softmax(logits)
        logits = np.where(p < min_p * p.max(), -np.inf, logits)
    return logits


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (10**6, 1.0, 0.0), (0, 0.9, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.1),
     (0, 1.0, 1.0), (20, 0.7, 0.0), (5, 0.9, 0.2), (30, 0.5, 0.01), (2, 0.99, 0.9)],
)  # fmt: skip
def test_sampling_filters_equal_those_of_hugging_face(top_k, top_p, min_p):
    logits_BV = np.random.default_rng(0).normal(0, 2, (6, 50)).astype(np.float32)
    found = filter_logits(logits_BV, top_k=np.int32(top_k), top_p=np.float32(top_p), min_p=np.float32(min_p))
    expected = np.stack([hugging_face_filter(row, top_k, top_p, min_p) for row in logits_BV])
    np.testing.assert_array_equal(np.asarray(found), expected.astype(np.float32))


def test_sampling_filters_keep_ties_and_disabled_ones_drop_nothing():
    rows = np.zeros((6, 50), np.float32)
    rows[:, :3] = [1.0, 1.0, 2.0]
    kept = np.isfinite(filter_logits(rows, top_k=2, top_p=1.0, min_p=0.0)[0])
    assert np.flatnonzero(kept).tolist() == [0, 1, 2]
    rows[:] = np.linspace(0, 60, 50)  # in float32 the last ones alone sum to 1
    assert np.isfinite(filter_logits(rows, top_k=0, top_p=1.0, min_p=0.0)).all()


def draws(logits_V, count=20_000, **options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    keys = jax.random.split(jax.random.key(3), count)
    ids = sample_token(jnp.broadcast_to(logits_V, (count, len(logits_V))), keys, **options)
    return np.bincount(np.asarray(ids), minlength=len(logits_V))


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.8}])
def test_tokens_are_drawn_in_proportion_to_their_probabilities(options):
    logits_V = np.random.default_rng(1).normal(0, 1, 12).astype(np.float32)
    warm = logits_V / options.get("temperature", 1.0)
    kept = hugging_face_filter(warm, options.get("top_k", 0), options.get("top_p", 1.0), 0.0)
    expected = 20_000 * softmax(kept)
    counts = draws(jnp.asarray(logits_V), **options)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = possible.sum() - 1
    chi_square = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
    plain = 20_000 * softmax(logits_V)
    assert np.sum((counts - plain) ** 2 / plain) > 10 * len(plain)  # the knob does something


def test_temperature_zero_always_selects_the_most_likely_token():
    logits_V = jnp.asarray([0.0, 3.0, 2.9] + [-1.0] * 9)
    assert draws(logits_V, temperature=0.0, top_k=3, top_p=0.9, min_p=0.1).tolist() == [0, 20_000] + [0] * 10


def test_a_row_does_not_depend_on_the_others(monkeypatch):
    warm = {"temperature": 1.5, "seed": 5, "count": 30}
    together = generate([[1, 2], [3], [1, 2], [4] * 9], **warm)
    assert together[0] != together[2]  # the same prompt in another row is another sample
    assert generate([[1, 2], [9] * BLOCK, [1, 2], []], **warm)[::2] == together[::2]
    assert generate([[1, 2]], **warm | {"seed": 6}) != together[:1]
    assert generate([[1, 2]], rows=1, **warm) == together[:1]
    monkeypatch.setattr(generation, "MAX_ROWS", 1)
    assert generate([[1, 2], [3], [1, 2], [4] * 9], rows=4, **warm) == together


def test_each_token_is_sampled_with_fresh_noise():
    params = jax.tree.map(jnp.zeros_like, make_params())
    params["ln_f"]["bias"] += 1.0
    params["wte"]["embedding"] = params["wte"]["embedding"].at[EOT].set(-10.0)  # every other id is as likely
    new = generate([[1]], 200, params=params, temperature=1.0)[0]
    assert len(new) == 200
    assert set(new) == set(range(VOCAB)) - {EOT}
    repeats = [(n, lag) for lag in range(1, BLOCK + 1) for n in range(100) if new[n : n + 6] == new[n + lag :][:6]]
    assert not repeats


@pytest.mark.parametrize("smallest", [1, 3, 16])
def test_cache_growth_does_not_change_the_tokens(monkeypatch, forwards, smallest):
    monkeypatch.setattr(decode, "SMALLEST_CONTEXT", smallest)
    prompts = [[token, 2, 6] for token in range(1, ROWS)]  # as long as each other: each is at the end when it grows
    assert generate(prompts, 40) == [naive_greedy(prompt, 40) for prompt in prompts]
    sizes = {caches[0][0].shape[2] for _, caches, *_ in forwards}
    assert sizes == {1: {4, 8, 16}, 3: {3, 6, 12, 16}, 16: {16}}[smallest]


@dataclasses.dataclass
class SmallDevice:
    memory: int = 2**30
    platform: str = "tpu"
    device_kind: str = "of the tests"

    def memory_stats(self):
        return {"bytes_limit": self.memory}


@pytest.mark.parametrize("count", [1, 4, 5, 40])
def test_tokens_in_bursts_equal_tokens_one_at_a_time(monkeypatch, steps, count):
    prompts = [*PROMPTS, [], [6] * BLOCK]
    said, options = [], {"temperature": 1.0, "top_k": 5, "seed": 3}
    expected = generate(prompts, count, **options)
    monkeypatch.setattr(generation, "device_of", lambda params: SmallDevice())
    monkeypatch.setattr(generation, "TOKENS_PER_DISPATCH", 4)
    assert generate(prompts, count, on_token=lambda row, token: said.append((row, token)), **options) == expected
    assert [[token for row, token in said if row == b] for b in range(len(prompts))] == expected
    assert (4 in steps) == (count == 40)
    free = generate(PROMPTS, count)  # without the empty prompt, which starts from the end-of-text that changes here
    assert generate(PROMPTS, count, eot_id=free[0][0]) == [until(new, free[0][0]) for new in free]


def test_rows_at_once_fit_the_available_memory(monkeypatch):
    row_bytes = 2 * 2 * BLOCK * 16 * 4  # keys and values, layers, positions, width, float32
    for room, rows in ((7 * row_bytes, 7), (1, 1), (10**9, generation.MAX_ROWS)):
        monkeypatch.setattr(generation, "CPU_CACHE_BYTES", room)
        assert generation.rows_at_once(MODEL, make_params()) == rows
    monkeypatch.setattr(generation, "device_of", lambda params: SmallDevice(4 * 5 * row_bytes))
    assert generation.rows_at_once(MODEL, make_params()) == 5


def test_compiler_options_are_set_only_for_one_gpu_row(monkeypatch):
    monkeypatch.setattr(generation, "make_step", lambda model, options, mesh: options)
    chosen = {}
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(generation, "device_of", lambda params, p=platform: SmallDevice(platform=p))
        for size in (1, 2):
            options, burst = generation.make_steps(MODEL, make_params(), size)
            assert burst == (1 if platform == "cpu" else generation.TOKENS_PER_DISPATCH)
            chosen[platform, size] = dict(options)
    one_row = chosen.pop(("gpu", 1))
    assert one_row == {"xla_disable_hlo_passes": "dot-strength-reduction"}
    assert not any(chosen.values())


def test_generation_stops_at_end_of_text_row_by_row():
    free = [naive_greedy(prompt, 30) for prompt in PROMPTS]
    eot_id = free[0][4]
    expected = [until(new, eot_id) for new in free]
    assert len({len(new) for new in expected}) > 1
    calls = []
    assert generate(PROMPTS, 30, eot_id=eot_id, on_token=lambda row, token: calls.append((row, token))) == expected
    calls = [call for call in calls if call[0] < len(PROMPTS)]
    in_order = [(b, new[n]) for n in range(30) for b, new in enumerate(expected) if n < len(new)]
    assert calls == in_order


def test_generation_ends_early_when_all_rows_end(steps):
    eot_id = naive_greedy(PROMPTS[0], 1)[0]
    assert generate([PROMPTS[0]], 1000, rows=1, eot_id=eot_id) == [[]]
    assert len(steps) < 4


def test_exception_in_on_token_ends_the_generation():
    with pytest.raises(KeyboardInterrupt):
        generate([[1]], on_token=lambda row, token: (_ for _ in ()).throw(KeyboardInterrupt))


def test_only_ids_of_the_vocabulary_are_chosen():
    table = np.array(make_params()["wte"]["embedding"])
    table[VOCAB:] *= 100
    params = make_params() | {"wte": {"embedding": jnp.asarray(table)}}
    hidden = jax.jit(lambda params, tokens: MODEL.apply({"params": params}, tokens, method="hidden"))
    x_D = np.asarray(hidden(params, np.asarray([PROMPTS[0]])))[0, -1]
    assert np.argmax(np.asarray(params["wte"]["embedding"]) @ x_D) >= VOCAB
    for temperature in (0.0, 1.0, 100.0):
        new = generate(PROMPTS, 30, params=params, temperature=temperature)
        assert max(itertools.chain(*new), default=0) < VOCAB
    assert generate([PROMPTS[1]], 9, eot_id=6, vocab_size=9) == [until(naive_greedy(PROMPTS[1], 9, 9), 6)]
    assert max(itertools.chain(*generate([[1]] * ROWS, 30, temperature=100.0, eot_id=0, vocab_size=7))) == 6


def test_a_mesh_gives_the_same_tokens_and_compiles_as_often(caplog):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.device_put(make_params(), param_shardings(make_params(), mesh))
    expected = generate(PROMPTS, 20)
    model = GPT(CONFIG, ResolvedCompute(flatten_tokens=False))
    with jax.log_compiles():
        assert generate(PROMPTS, 20, model=model, params=params) == expected
    assert sum(r.startswith(COMPILED) for r in caplog.messages) == 2


WRONG = [("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0)]
WRONG += [("top_p", 1.1), ("min_p", 1.5), ("seed", -1)]


@pytest.mark.parametrize(
    ("wrong", "field", "value"),
    [
        *(({name: value}, name, value) for name, value in WRONG),
        ({"count": 0}, "max_new_tokens", 0),
        ({"prompts": []}, "prompts", []),
        ({"prompts": [[1], [2, VOCAB]]}, "prompts[1]", None),
        ({"prompts": [[-1]]}, "prompts[0]", None),
        ({"eot_id": VOCAB}, "eot_id", VOCAB),
        ({"vocab_size": 9}, "eot_id", 10),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(wrong, field, value):
    with raises(ConfigError, field, value=value) as caught:
        generate(**{"prompts": [[1]]} | wrong)
    assert "\n" not in str(caught.value)


def test_every_problem_is_named_at_once():
    with raises(ConfigError, "temperature", value=-1) as caught:
        generate([[1]], temperature=-1, top_p=2, top_k=-3)
    found = [(error.field, error.value) for error in caught.value.errors]
    assert found == [("temperature", -1), ("top_k", -3), ("top_p", 2)]


def test_truncated_prompt_is_reported_once(caplog):
    long = PROMPTS[0] * 3 + PROMPTS[2]
    with caplog.at_level("WARNING", "gptjax"):
        new, _ = generate([long, [2] * 30])
    assert new == until(naive_greedy(long[-BLOCK:], 12), EOT)
    assert new != until(naive_greedy(long[:BLOCK], 12), EOT)
    assert len([r for r in caplog.messages if "block_size" in r]) == 1


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_on_a_cpu_the_weights_are_views_of_the_parameters(config):
    """Matrices of 64 bytes or more per row are aligned; the smaller ones may be copied."""
    wide = dataclasses.replace(config, n_embd=16 * config.n_head)
    params = make_params(wide)
    weights = decode.unstack_layers(GPT(wide), params)
    stacked = params["h"]["mlp"]["c_fc"]["kernel"]
    size = stacked[0].nbytes
    for i, layer in enumerate(weights["layers"]):
        view = layer["mlp"]["c_fc"]["kernel"]
        assert view.unsafe_buffer_pointer() == stacked.unsafe_buffer_pointer() + i * size
    assert ("head_DV" in weights) == ("lm_head" in params)
    expected = jax.tree.map(np.array, [jax.tree.map(lambda a, i=i: a[i], params["h"]) for i in range(wide.n_layer)])
    del params, stacked  # the views keep the memory
    for found, leaf in zip(jax.tree.leaves(weights["layers"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_a_donated_parameter_is_not_overwritten_while_a_view_of_it_lives():
    wide = dataclasses.replace(CONFIG, n_embd=16 * CONFIG.n_head)
    params = jax.tree.map(jnp.copy, make_params(wide))
    weights = decode.unstack_layers(GPT(wide), params)
    before = jax.tree.map(np.array, weights["layers"])
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(params))
    for found, leaf in zip(jax.tree.leaves(weights["layers"]), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_prompts_that_fit_a_short_chunk_are_fed_in_one(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 64)
    for length, widths in ((1, [32]), (32, [32]), (33, [64]), (65, [64, 64])):
        chunks = list(generation.prompt_chunks({0: [1] * length}, 1, 128))
        assert [tokens_BC.shape[1] for tokens_BC, *_ in chunks] == widths
