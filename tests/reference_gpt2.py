"""GPT-2 in NumPy float64 with a hand-written backward pass: the oracle the JAX model is tested against.

Written from the definition of GPT-2 (pre-LayerNorm blocks, learned positions, tanh-approximated GELU, causal attention
scaled by 1/sqrt(head width)) and sharing no code with gptjax. The parameters are nested dicts of arrays, those of the
layers stacked along a leading dimension L; leaves named "bias" may be absent, and without "lm_head" the head is tied.

Shape suffixes: B batch, T query position, S key position, D width, N heads, H head width, F MLP width, V vocabulary,
L layers; C is the 3 of query, key and value, I and O are the input and output features of a dense layer.
"""

from functools import partial

import numpy as np

LAYER_NORM_EPSILON = 1e-5
GELU_SCALE, GELU_CUBIC = np.sqrt(2 / np.pi), 0.044715
NO_TARGET = -1

einsum = partial(np.einsum, optimize=True)


def logits(params, tokens_BT, *, n_head, document_starts_BT=None):
    """Next-token logits [B, T, V]."""
    return _forward(_map(_float64, params), tokens_BT, n_head, document_starts_BT)[0]


def largest_scores(params, tokens_BT, *, n_head, document_starts_BT=None):
    """The largest attention score of each layer, and the residual streams: before the first layer and after each."""
    _, cache = _forward(_map(_float64, params), tokens_BT, n_head, document_starts_BT)
    largest = []
    for layer in cache["layers"]:
        _, q_BTNH, k_BSNH, _, weights_BNTS, _ = layer["attn"]
        scores_BNTS = einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / np.sqrt(q_BTNH.shape[-1])
        largest.append(scores_BNTS[weights_BNTS > 0].max())
    return largest, cache["streams"]


def loss(params, tokens_BT, targets_BT, *, n_head, document_starts_BT=None):
    """Mean cross-entropy in nats over the targets that are not -1."""
    logits_BTV = logits(params, tokens_BT, n_head=n_head, document_starts_BT=document_starts_BT)
    return _cross_entropy(logits_BTV, targets_BT)[0]


def loss_and_grads(params, tokens_BT, targets_BT, *, n_head, document_starts_BT=None):
    """The loss and its gradient, a float64 tree with the structure of `params`."""
    params = _map(_float64, params)
    logits_BTV, cache = _forward(params, tokens_BT, n_head, document_starts_BT)
    value, dlogits_BTV = _cross_entropy(logits_BTV, targets_BT)
    return value, _backward(params, cache, dlogits_BTV, np.asarray(tokens_BT))


# The model


def _forward(params, tokens_BT, n_head, document_starts_BT):
    """Logits, and what the backward pass needs of the way there."""
    tokens_BT = np.asarray(tokens_BT)
    vocab_size, T = len(params["wte"]["embedding"]), tokens_BT.shape[1]
    _require(tokens_BT.min() >= 0 and tokens_BT.max() < vocab_size, "token outside the vocabulary")
    starts_BT = np.zeros(tokens_BT.shape, bool) if document_starts_BT is None else np.asarray(document_starts_BT)
    _require(starts_BT.shape == tokens_BT.shape and starts_BT.dtype == bool, "document starts must be bool [B, T]")

    index_T = np.arange(T)
    position_BT = index_T - np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
    _require(position_BT.max() < len(params["wpe"]["embedding"]), "position beyond the position embedding")
    document_BT = np.cumsum(starts_BT, axis=1)
    mask_BTS = (index_T[:, None] >= index_T[None, :]) & (document_BT[:, :, None] == document_BT[:, None, :])

    x_BTD = params["wte"]["embedding"][tokens_BT] + params["wpe"]["embedding"][position_BT]
    layers, streams = [], [x_BTD]
    for layer in range(len(params["h"]["ln_1"]["scale"])):
        x_BTD, layer_cache = _block(x_BTD, _layer(params["h"], layer), mask_BTS, n_head)
        layers.append(layer_cache)
        streams.append(x_BTD)
    y_BTD, ln_f = _layer_norm(x_BTD, params["ln_f"])
    logits_BTV = einsum("BTD,DV->BTV", y_BTD, _head(params))
    cache = {"position_BT": position_BT, "layers": layers, "streams": streams, "ln_f": ln_f, "y_BTD": y_BTD}
    return logits_BTV, cache


def _backward(params, cache, dlogits_BTV, tokens_BT):
    grads = _map(np.zeros_like, params)
    dhead_DV = einsum("BTD,BTV->DV", cache["y_BTD"], dlogits_BTV)
    if "lm_head" in params:
        grads["lm_head"]["kernel"] += dhead_DV
    else:
        grads["wte"]["embedding"] += dhead_DV.T
    dy_BTD = einsum("BTV,DV->BTD", dlogits_BTV, _head(params))
    dx_BTD = _layer_norm_backward(dy_BTD, params["ln_f"], cache["ln_f"], grads["ln_f"])
    for layer, layer_cache in reversed(list(enumerate(cache["layers"]))):
        dx_BTD = _block_backward(dx_BTD, _layer(params["h"], layer), layer_cache, _layer(grads["h"], layer))
    np.add.at(grads["wte"]["embedding"], tokens_BT, dx_BTD)
    np.add.at(grads["wpe"]["embedding"], cache["position_BT"], dx_BTD)
    return grads


def _head(params):
    return params["lm_head"]["kernel"] if "lm_head" in params else params["wte"]["embedding"].T


# One block: x + attention(ln_1(x)), then x + mlp(ln_2(x)). A backward function takes the gradient of its output, adds
# those of its parameters to `grads` in place and returns that of its input.


def _block(x_BTD, params, mask_BTS, n_head):
    y_BTD, ln_1 = _layer_norm(x_BTD, params["ln_1"])
    y_BTD, attn = _attention(y_BTD, params["attn"], mask_BTS, n_head)
    x_BTD = x_BTD + y_BTD
    y_BTD, ln_2 = _layer_norm(x_BTD, params["ln_2"])
    y_BTD, mlp = _mlp(y_BTD, params["mlp"])
    return x_BTD + y_BTD, {"ln_1": ln_1, "attn": attn, "ln_2": ln_2, "mlp": mlp}


def _block_backward(dx_BTD, params, cache, grads):
    dy_BTD = _mlp_backward(dx_BTD, params["mlp"], cache["mlp"], grads["mlp"])
    dx_BTD = dx_BTD + _layer_norm_backward(dy_BTD, params["ln_2"], cache["ln_2"], grads["ln_2"])
    dy_BTD = _attention_backward(dx_BTD, params["attn"], cache["attn"], grads["attn"])
    return dx_BTD + _layer_norm_backward(dy_BTD, params["ln_1"], cache["ln_1"], grads["ln_1"])


def _attention(x_BTD, params, mask_BTS, n_head):
    B, T, D = x_BTD.shape
    _require(D % n_head == 0, "the width is no multiple of n_head")
    qkv_BTCNH = _dense(x_BTD, params["c_attn"]).reshape(B, T, 3, n_head, D // n_head)
    q_BTNH, k_BSNH, v_BSNH = np.moveaxis(qkv_BTCNH, 2, 0)
    scores_BNTS = einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / np.sqrt(D // n_head)
    scores_BNTS = np.where(mask_BTS[:, None], scores_BNTS, -np.inf)
    weights_BNTS = np.exp(scores_BNTS - scores_BNTS.max(axis=-1, keepdims=True))
    weights_BNTS /= weights_BNTS.sum(axis=-1, keepdims=True)
    y_BTD = einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH).reshape(B, T, D)
    return _dense(y_BTD, params["c_proj"]), (x_BTD, q_BTNH, k_BSNH, v_BSNH, weights_BNTS, y_BTD)


def _attention_backward(dout_BTD, params, cache, grads):
    x_BTD, q_BTNH, k_BSNH, v_BSNH, weights_BNTS, y_BTD = cache
    B, T, D = x_BTD.shape
    dy_BTNH = _dense_backward(dout_BTD, params["c_proj"], y_BTD, grads["c_proj"]).reshape(q_BTNH.shape)
    dv_BSNH = einsum("BNTS,BTNH->BSNH", weights_BNTS, dy_BTNH)
    dweights_BNTS = einsum("BTNH,BSNH->BNTS", dy_BTNH, v_BSNH)
    dscores_BNTS = weights_BNTS * (dweights_BNTS - (weights_BNTS * dweights_BNTS).sum(axis=-1, keepdims=True))
    dscores_BNTS /= np.sqrt(q_BTNH.shape[-1])
    dq_BTNH = einsum("BNTS,BSNH->BTNH", dscores_BNTS, k_BSNH)
    dk_BSNH = einsum("BNTS,BTNH->BSNH", dscores_BNTS, q_BTNH)
    dqkv_BTCD = np.stack([dq_BTNH, dk_BSNH, dv_BSNH], axis=2).reshape(B, T, 3, D)
    return _dense_backward(dqkv_BTCD, params["c_attn"], x_BTD, grads["c_attn"])


def _mlp(x_BTD, params):
    pre_BTF = _dense(x_BTD, params["c_fc"])
    tanh_BTF = np.tanh(GELU_SCALE * (pre_BTF + GELU_CUBIC * pre_BTF**3))
    post_BTF = 0.5 * pre_BTF * (1 + tanh_BTF)
    return _dense(post_BTF, params["c_proj"]), (x_BTD, pre_BTF, tanh_BTF, post_BTF)


def _mlp_backward(dout_BTD, params, cache, grads):
    x_BTD, pre_BTF, tanh_BTF, post_BTF = cache
    dpost_BTF = _dense_backward(dout_BTD, params["c_proj"], post_BTF, grads["c_proj"])
    dtanh_BTF = (1 - tanh_BTF**2) * GELU_SCALE * (1 + 3 * GELU_CUBIC * pre_BTF**2)
    dpre_BTF = dpost_BTF * 0.5 * (1 + tanh_BTF + pre_BTF * dtanh_BTF)
    return _dense_backward(dpre_BTF, params["c_fc"], x_BTD, grads["c_fc"])


# Layers and the loss


def _layer_norm(x_BTD, params):
    centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
    std_BT1 = np.sqrt((centred_BTD**2).mean(axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    normed_BTD = centred_BTD / std_BT1
    return normed_BTD * params["scale"] + params.get("bias", 0), (normed_BTD, std_BT1)


def _layer_norm_backward(dy_BTD, params, cache, grads):
    normed_BTD, std_BT1 = cache
    grads["scale"] += (dy_BTD * normed_BTD).sum(axis=(0, 1))
    if "bias" in grads:
        grads["bias"] += dy_BTD.sum(axis=(0, 1))
    dnormed_BTD = dy_BTD * params["scale"]
    mean_BT1 = dnormed_BTD.mean(axis=-1, keepdims=True)
    slope_BT1 = (dnormed_BTD * normed_BTD).mean(axis=-1, keepdims=True)
    return (dnormed_BTD - mean_BT1 - normed_BTD * slope_BT1) / std_BT1


def _dense(x_BTI, params):
    """Contracts I; the output features may be several dimensions, as the [3, D] of c_attn."""
    return np.tensordot(x_BTI, params["kernel"], axes=1) + params.get("bias", 0)


def _dense_backward(dy, params, x_BTI, grads):
    dy_BTO = dy.reshape(*x_BTI.shape[:2], -1)
    kernel_IO = params["kernel"].reshape(x_BTI.shape[2], -1)
    grads["kernel"] += einsum("BTI,BTO->IO", x_BTI, dy_BTO).reshape(params["kernel"].shape)
    if "bias" in grads:
        grads["bias"] += dy.sum(axis=(0, 1))
    return einsum("BTO,IO->BTI", dy_BTO, kernel_IO)


def _cross_entropy(logits_BTV, targets_BT):
    """The mean loss and its gradient with respect to the logits."""
    targets_BT = np.asarray(targets_BT)
    _require(targets_BT.min() >= NO_TARGET and targets_BT.max() < logits_BTV.shape[-1], "target outside the vocabulary")
    _require((targets_BT != NO_TARGET).any(), "no target to take the mean over")
    weight_BT = (targets_BT != NO_TARGET) / np.count_nonzero(targets_BT != NO_TARGET)
    shifted_BTV = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
    log_probs_BTV = shifted_BTV - np.log(np.exp(shifted_BTV).sum(axis=-1, keepdims=True))
    one_hot_BTV = targets_BT[:, :, None] == np.arange(logits_BTV.shape[-1])
    value = -einsum("BT,BTV,BTV->", weight_BT, one_hot_BTV, log_probs_BTV)
    return float(value), weight_BT[:, :, None] * (np.exp(log_probs_BTV) - one_hot_BTV)


# Trees


def _map(function, tree):
    return {name: _map(function, node) if isinstance(node, dict) else function(node) for name, node in tree.items()}


def _layer(tree, layer):
    """Views of one layer's slice of every leaf, so that adding to them in place adds to the stack."""
    return _map(lambda leaf: leaf[layer], tree)


def _float64(leaf):
    return np.asarray(leaf, np.float64)


def _require(condition, message):
    if not condition:
        raise ValueError(message)
