"""The NumPy oracle itself: its gradients against central differences, its masks against separate runs."""

import itertools
import math

import numpy as np
import pytest

from tests import reference_gpt2

V, BLOCK, D, L, N, B, T = 11, 7, 6, 2, 3, 2, 7


def make_params(rng, *, tied, bias):
    def normal(*shape, mean=0.0):
        return mean + 0.5 * rng.standard_normal(shape)

    def norm(*stack):
        return {"scale": normal(*stack, D, mean=1.0)} | ({"bias": normal(*stack, D)} if bias else {})

    def dense(features_in, *features_out):
        kernel = {"kernel": normal(L, features_in, *features_out)}
        return kernel | ({"bias": normal(L, *features_out)} if bias else {})

    params = {
        "wte": {"embedding": normal(V, D)},
        "wpe": {"embedding": normal(BLOCK, D)},
        "h": {
            "ln_1": norm(L),
            "attn": {"c_attn": dense(D, 3, D), "c_proj": dense(D, D)},
            "ln_2": norm(L),
            "mlp": {"c_fc": dense(D, 4 * D), "c_proj": dense(4 * D, D)},
        },
        "ln_f": norm(),
    }
    return params if tied else params | {"lm_head": {"kernel": normal(D, V)}}


def make_batch(rng):
    """Tokens, targets (one of weight 0) and document starts at the first position, inside, and at the last."""
    tokens_BT, targets_BT = rng.integers(V, size=(2, B, T))
    targets_BT[1, 2] = -1
    starts_BT = np.zeros((B, T), bool)
    starts_BT[0, [0, 3]] = starts_BT[1, [2, 3, T - 1]] = True
    return tokens_BT, targets_BT, starts_BT


def leaves(tree, path=""):
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from leaves(node, f"{path}/{name}")
        else:
            yield f"{path}/{name}", node


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_match_central_differences(tied, bias, documents):
    rng = np.random.default_rng(0)
    params = make_params(rng, tied=tied, bias=bias)
    tokens_BT, targets_BT, starts_BT = make_batch(rng)
    options = {"n_head": N, "document_starts_BT": starts_BT if documents else None}
    value, grads = reference_gpt2.loss_and_grads(params, tokens_BT, targets_BT, **options)
    assert value == reference_gpt2.loss(params, tokens_BT, targets_BT, **options)
    assert [(path, leaf.shape) for path, leaf in leaves(grads)] == [(path, leaf.shape) for path, leaf in leaves(params)]

    step = 1e-5
    for (path, leaf), (_, grad) in zip(leaves(params), leaves(grads), strict=True):
        for flat_index in rng.choice(leaf.size, size=min(8, leaf.size), replace=False):
            index = np.unravel_index(flat_index, leaf.shape)
            centre, losses = leaf[index], []
            for moved in (centre + step, centre - step):
                leaf[index] = moved
                losses.append(reference_gpt2.loss(params, tokens_BT, targets_BT, **options))
            leaf[index] = centre
            difference = (losses[0] - losses[1]) / (2 * step)
            assert grad[index] == pytest.approx(difference, rel=1e-6, abs=1e-9), (path, index)


def test_documents_are_computed_as_if_alone():
    rng = np.random.default_rng(1)
    params = make_params(rng, tied=True, bias=True)
    tokens_BT, _, starts_BT = make_batch(rng)
    packed_BTV = reference_gpt2.logits(params, tokens_BT, n_head=N, document_starts_BT=starts_BT)
    for row in range(B):
        bounds = [0, *(t for t in range(1, T) if starts_BT[row, t]), T]
        for start, end in itertools.pairwise(bounds):
            alone_BTV = reference_gpt2.logits(params, tokens_BT[row : row + 1, start:end], n_head=N)
            np.testing.assert_allclose(packed_BTV[row, start:end], alone_BTV[0], rtol=1e-12, atol=1e-12)


def test_a_token_changes_no_earlier_logits():
    rng = np.random.default_rng(2)
    params = make_params(rng, tied=False, bias=True)
    tokens_BT, _, _ = make_batch(rng)
    changed_BT = tokens_BT.copy()
    changed_BT[:, 4] = (changed_BT[:, 4] + 1) % V
    before_BTV, after_BTV = (reference_gpt2.logits(params, each_BT, n_head=N) for each_BT in (tokens_BT, changed_BT))
    change_BT = np.abs(after_BTV - before_BTV).max(axis=-1)
    assert (change_BT[:, :4] == 0).all()
    assert (change_BT[:, 4:] > 1e-6).all()


def test_loss_is_the_mean_over_weighted_targets():
    rng = np.random.default_rng(3)
    params = make_params(rng, tied=True, bias=False)
    tokens_BT, targets_BT, _ = make_batch(rng)
    logits_BTV = reference_gpt2.logits(params, tokens_BT, n_head=N)
    losses = [
        math.log(sum(math.exp(logit) for logit in logits_BTV[b, t])) - logits_BTV[b, t, targets_BT[b, t]]
        for b in range(B)
        for t in range(T)
        if targets_BT[b, t] != -1
    ]
    assert len(losses) == B * T - 1
    expected = sum(losses) / len(losses)
    assert reference_gpt2.loss(params, tokens_BT, targets_BT, n_head=N) == pytest.approx(expected, rel=1e-12)
