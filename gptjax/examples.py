"""Splits a token batch into inputs and targets, and finds where documents start."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import Config
from gptjax.documents import EndOfText


class Examples(NamedTuple):
    """Inputs, document starts (or None) and targets of a token batch [B, T+1]. A target of -1 is not counted."""

    inputs_BT: jax.Array  # int32
    starts_BT: jax.Array | None  # bool
    targets_BT: jax.Array  # int32


def make_examples(
    tokens: jax.Array,
    config: Config,
    *,
    eot: EndOfText,
) -> Examples:
    """Returns the examples in `tokens`, int32 [B, T+1]. Negative tokens are padding.

    With data.document_mask, attention and positions restart at each document. A prediction from one document's trailing
    end-of-text to the next document is not counted.
    """
    # Padding becomes token 0 as an input, since a negative index would count from the table's end. As a target it stays
    # negative, which gives it no weight. The causal mask hides trailing padding from real positions.
    inputs_BT = jnp.maximum(tokens[:, :-1], 0)
    targets_BT = tokens[:, 1:]
    starts_BT = None
    if config.data.document_mask:
        starts_BT = document_starts(inputs_BT, eot)
        # If end-of-text begins documents, a document's last token predicts it; that counts, since it ends the document.
        if eot.position == "last":
            targets_BT = jnp.where(inputs_BT == eot.id, -1, targets_BT)
    return Examples(inputs_BT, starts_BT, targets_BT)


def document_starts(
    tokens_BT: jax.Array,
    eot: EndOfText,
) -> jax.Array:
    """Returns bool [B, T] for int32 tokens [B, T], True where a document starts.

    A document starts at position 0, and after ('last') or at ('first') each end-of-text.
    """
    # Padding has been replaced by token 0 and may look like end-of-text; its targets have no weight.
    eot_BT = tokens_BT == eot.id
    if eot.position == "last":
        eot_BT = jnp.roll(eot_BT, 1, axis=1)  # wraps the last position around to 0, which is True anyway
    return eot_BT.at[:, 0].set(True)


def position_ids(
    shape: tuple[int, ...],
    starts_BT: jax.Array | None,
) -> jax.Array:
    """Returns int32 [B, T]: 0, 1, 2, ... from each document's start, or of each row if starts_BT (bool) is None."""
    position_BT = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if starts_BT is None:
        return position_BT  # one document per row
    # The running maximum over the positions of starts is the start of the current document.
    started_BT = jnp.where(starts_BT, position_BT, 0)
    return position_BT - jax.lax.cummax(started_BT, axis=1)
