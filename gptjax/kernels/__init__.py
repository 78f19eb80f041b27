"""Hand-written kernels and derivatives; each computes the same function as plain JAX."""
