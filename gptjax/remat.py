"""What the backward pass computes again instead of reading it from memory: policies of jax.checkpoint, and a mark.

The mark is JAX's linear_call, whose results no policy saves. Gathered weights have it (collectives.py), and so have
splash attention's q, k and v.
"""

import functools
from collections.abc import Callable

import jax
from jax.extend.core import Primitive

from gptjax.params import PyTree

# compute.remat -> policy of jax.checkpoint, which decides for each primitive whether its output is saved.
REMAT_POLICIES = {
    # Gathered weights of all layers together would be an unsharded model on each device, so the backward pass
    # all-gathers them a second time.
    "none": lambda primitive, *_, **__: primitive is not recomputed_primitive(),
    "full": None,  # saves the input of each layer only
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def recomputed(function: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """Returns `function`, which must be linear, with the mark: under a policy above its results are not saved."""

    def call(x: PyTree) -> PyTree:
        # linear_transpose takes no tracers here, only their shapes.
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)

        def transpose(_: None, g: PyTree) -> PyTree:
            [x_g] = jax.linear_transpose(function, shapes)(g)
            return x_g

        return jax.custom_derivatives.linear_call(lambda _, x: function(x), transpose, None, x)

    return call


@functools.cache
def recomputed_primitive() -> Primitive:
    """Returns the primitive of linear_call."""

    def call(x: jax.Array) -> jax.Array:
        return jax.custom_derivatives.linear_call(lambda _, x: x, lambda _, g: g, None, x)

    # JAX exports the function, not its primitive. If JAX renamed it, a comparison of names would let the policy save
    # the weights of all layers, without an error. A name of our own (checkpoint_name) would not do either: the policy
    # would save the array that gets the name.
    [equation] = jax.make_jaxpr(call)(0.0).eqns
    return equation.primitive
