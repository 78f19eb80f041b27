"""Checks a state's arrays: all values are finite before a save, and the names match before a restore."""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.errors import CheckpointError, DivergedError
from gptjax.params import SHOWN_PATHS
from gptjax.record import Record
from gptjax.sharding import path_name


def refuse_nonfinite(trees: Any, step: int) -> None:
    """Checks that all values of `trees` are finite; the leaves are arrays of any shape, dtype and sharding.

    Raises:
        DivergedError: a value is NaN or infinite; the message names its array.
    """
    counts = jax.tree.leaves_with_path(_count_nonfinite(trees))
    bad = [path_name(path) for path, count in counts if int(count)]
    if bad:
        raise DivergedError(f"non-finite at step {step}; not saved, the previous checkpoint is kept", field=bad[0])


@jax.jit
def _count_nonfinite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32), tree)


def check_same_arrays(path: Any, abstract: dict[str, Any], record: Record) -> None:
    """Checks that the checkpoint at `path` has the arrays of `abstract`, by their names.

    Raises:
        CheckpointError: it has others, because the model or the optimizer is another one.
    """
    wanted = {path_name(key) for key, _ in jax.tree.leaves_with_path(abstract)}
    saved = {name for name in record.fingerprints if name.partition("/")[0] in abstract}
    problems = [f"has {name}, which this {_owner(name)} does not have" for name in sorted(saved - wanted)]
    problems += [f"lacks {name}, which this {_owner(name)} has" for name in sorted(wanted - saved)]
    if problems:
        raise CheckpointError.of([CheckpointError(line, field=str(path)) for line in problems[:SHOWN_PATHS]])


def _owner(name: str) -> str:
    return "model" if name.startswith("params/") else "optimizer"
